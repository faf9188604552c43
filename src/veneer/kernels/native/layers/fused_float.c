/* Norms, gates and rotations of float32 rows, each in one pass: what fused.c computes in bf16.
   fused_float_body.h holds the code, written once and compiled here for each set of instructions.
 */
#include "parallel.h"
#include <math.h>
#include <string.h>

/* As in fused.c. */
struct norm {
    const float *x, *weight, *grad;
    float *out, *scale;
    int64_t width;
    float epsilon;
};

struct gate {
    const float *gate, *up, *grad;
    float *out, *grad_gate, *grad_up;
};

struct rotary {
    const float *x, *cos, *sin;
    float *out;
    int64_t heads, size, back;
};

#define NAME(x) x##_plain
#define TARGET
#define W 4
#include "float_vectors.h"
#include "fused_float_body.h"

#if defined(__x86_64__)
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define W 8
#include "float_vectors.h"
#include "fused_float_body.h"

#define NAME(x) x##_avx512
#define TARGET                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#define W 16
#include "float_vectors.h"
#include "fused_float_body.h"
#endif

int veneer_level(void);

static void on_rows(veneer_body plain, veneer_body avx2, veneer_body avx512, void *arguments,
                    int64_t count, int64_t grain) {
    const int level = veneer_level();
    veneer_parallel(level >= 3 ? avx512 : level >= 2 ? avx2 : plain, arguments, count, grain);
}

#if defined(__x86_64__)
#define BODIES(name) name##_plain, name##_avx2, name##_avx512
#else
#define BODIES(name) name##_plain, name##_plain, name##_plain
#endif

void veneer_rms_norm_float_forward(struct norm *a, int64_t rows) {
    on_rows(BODIES(norm_forward), a, rows, 16);
}
void veneer_rms_norm_float_backward(struct norm *a, int64_t rows) {
    on_rows(BODIES(norm_backward), a, rows, 16);
}
void veneer_silu_gate_float_forward(struct gate *a, int64_t runs) {
    on_rows(BODIES(gate_forward), a, runs, 256);
}
void veneer_silu_gate_float_backward(struct gate *a, int64_t runs) {
    on_rows(BODIES(gate_backward), a, runs, 256);
}
void veneer_rotary_float(struct rotary *a, int64_t rows) { on_rows(BODIES(rotary), a, rows, 32); }
