/* Norms, gates, rotations and the loss of float32 rows: what fused.c computes in bf16.
   fused_float_body.h holds the code, written once and compiled here for each set of instructions.
 */
#include "levels.h"
#include <math.h>
#include <string.h>

/* As in fused.c. */
struct norm {
    const float *x, *weight, *grad;
    float *out, *scale;
    int64_t width;
    float epsilon, offset;
    int64_t is_wide;
};

struct gate {
    const float *gate, *up, *grad;
    float *out, *grad_gate, *grad_up;
};

struct rotary {
    const float *x, *cos, *sin;
    int64_t turned, neighbours, is_wide;
    float *out;
    int64_t heads, size, back;
};

struct entropy {
    float *logits;
    const int64_t *targets;
    float *loss;
    int64_t vocabulary;
    float softcap;
};

/* As in fused.h. */
#define GELU_LINEAR 1.5957691216057308f
#define GELU_CUBIC (GELU_LINEAR * 0.044715f)
#define GELU_MOST 16.0f

#define NAME(x) x##_plain
#define TARGET
#define W 4
#include "float_vectors.h"
#include "fused_float_body.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define NAME(x) x##_avx2
#define TARGET FOR_AVX2
#define W 8
#include "float_vectors.h"
#include "fused_float_body.h"

#define NAME(x) x##_avx512
#define TARGET FOR_AVX512
#define W 16
#include "float_vectors.h"
#include "fused_float_body.h"
#endif

void veneer_rms_norm_float_forward(struct norm *a, int64_t rows) {
    veneer_parallel(LOOP_OF(norm_forward, veneer_level()), a, rows, 16);
}
void veneer_rms_norm_float_backward(struct norm *a, int64_t rows) {
    veneer_parallel(LOOP_OF(norm_backward, veneer_level()), a, rows, 16);
}
void veneer_gate_float_forward(struct gate *a, int64_t runs, int activation) {
    veneer_parallel(activation ? LOOP_OF(gelu_forward, veneer_level())
                               : LOOP_OF(silu_forward, veneer_level()),
                    a, runs, 256);
}
void veneer_gate_float_backward(struct gate *a, int64_t runs, int activation) {
    veneer_parallel(activation ? LOOP_OF(gelu_backward, veneer_level())
                               : LOOP_OF(silu_backward, veneer_level()),
                    a, runs, 256);
}
void veneer_rotary_float(struct rotary *a, int64_t rows) {
    veneer_parallel(LOOP_OF(rotary, veneer_level()), a, rows, 32);
}
void veneer_entropy_float(struct entropy *a, int64_t rows) {
    veneer_parallel(LOOP_OF(entropy, veneer_level()), a, rows, 1);
}
