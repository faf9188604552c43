/* Attention over packed documents in float32, forward and backward: what attention.c computes in
   bf16, by the same tasks and in the same order. attention_float_body.h holds the code, written
   once and compiled here for each set of instructions. */
#include "attention.h"
#include "levels.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 48 /* query rows whose scores exist at once */

static float *attention_room(int64_t count) {
    void *found = NULL;
    if (posix_memalign(&found, 64, (size_t)count * sizeof(float) + 64)) abort();
    return found;
}

#define NAME(x) x##_plain
#define TARGET
#define W 4
#if defined(__aarch64__)
#define WIDE 4
#else
#define WIDE 2
#endif
#define FUSED(a, b, sum) ((fv_plain)FUSED_128(a, b, sum))
#include "float_vectors.h"
#include "attention_float_body.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define NAME(x) x##_avx2
#define TARGET FOR_AVX2
#define W 8
#define WIDE 2
#define FUSED(a, b, sum) ((fv_avx2)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(sum)))
#include "float_vectors.h"
#include "attention_float_body.h"

#define NAME(x) x##_avx512
#define TARGET FOR_AVX512
#define W 16
#define WIDE 4
#define FUSED(a, b, sum) ((fv_avx512)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(sum)))
#include "float_vectors.h"
#include "attention_float_body.h"
#endif

void veneer_attention_float_forward(struct attention *a) {
    veneer_parallel(LOOP_OF(forward, veneer_level()), a, a->docs * a->kv_heads * a->splits, 1);
}

/* out: the gradient of q, (rows, H, D). */
void veneer_attention_float_backward(struct attention *a) {
    veneer_parallel(LOOP_OF(backward, veneer_level()), a, a->docs * a->kv_heads * a->splits, 1);
}
