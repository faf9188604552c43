/* bf16 products on AVX512_BF16, as the attention kernels need them: small matrices that stay in the
   cache.

   A pair is two bf16 values in one 32-bit word, the first in the low half: what vdpbf16ps
   multiplies. */
#ifndef VENEER_BF16_H
#define VENEER_BF16_H

#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

#include "amx.h"

#define VENEER_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define VENEER_INLINE static inline __attribute__((always_inline)) VENEER_BF16

/* sum (R, V) += A B over K2 pairs, in registers. A's pair (m, k) stands at A[m * am + k * ak]; B's
 * row k at B + k * ldb. */
VENEER_INLINE void bf16_sums(const int R, const int V, const uint32_t *A, int64_t am, int64_t ak,
                             const uint32_t *B, int64_t ldb, int64_t K2, __m512 (*sum)[4]) {
    for (int64_t k = 0; k < K2; k++) {
        __m512bh b[4];
        UNROLLED(4, v, V) b[v] = (__m512bh)_mm512_loadu_si512(B + k * ldb + 16 * v);
        UNROLLED(6, r, R) {
            __m512bh a = (__m512bh)_mm512_set1_epi32((int)A[r * am + k * ak]);
            UNROLLED(4, v, V) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, b[v]);
        }
    }
}

/* C (R, 16 V) [+]= A B. */
VENEER_INLINE void bf16_tile(const int R, const int V, const uint32_t *A, int64_t am, int64_t ak,
                             const uint32_t *B, int64_t ldb, float *C, int64_t ldc, int64_t K2,
                             int add) {
    __m512 sum[6][4];
    UNROLLED(6, r, R)
        UNROLLED(4, v, V)
            sum[r][v] = add ? _mm512_loadu_ps(C + r * ldc + 16 * v) : _mm512_setzero_ps();
    bf16_sums(R, V, A, am, ak, B, ldb, K2, sum);
    UNROLLED(6, r, R)
        UNROLLED(4, v, V) _mm512_storeu_ps(C + r * ldc + 16 * v, sum[r][v]);
}

#define BF16_ROWS(R, V)                                                                            \
    bf16_tile(R, V, a, am, ak, B + n, ldb, C + m * ldc + n, ldc, K2, add);                         \
    break;
#define VENEER_ROWS(V)                                                                             \
    switch (rows) {                                                                                \
    case 6: BF16_ROWS(6, V)                                                                        \
    case 5: BF16_ROWS(5, V)                                                                        \
    case 4: BF16_ROWS(4, V)                                                                        \
    case 3: BF16_ROWS(3, V)                                                                        \
    case 2: BF16_ROWS(2, V)                                                                        \
    default: BF16_ROWS(1, V)                                                                       \
    }

int veneer_has_amx(void);

/* C (M, N) [+]= A B, N a multiple of 16. Either ak is 1, or am is and M a multiple of 16. */
static inline VENEER_BF16 void bf16_product(const uint32_t *A, int64_t am, int64_t ak,
                                            const uint32_t *B, int64_t ldb, float *C, int64_t ldc,
                                            int64_t M, int64_t N, int64_t K2, int add) {
#if defined(VENEER_AMX_COMPILED)
    if (veneer_has_amx()) {
        amx_product(A, am, ak, B, ldb, C, ldc, M, N, K2, add);
        return;
    }
#endif
    for (int64_t n = 0; n < N; n += 64) {
        int64_t wide = (N - n) / 16;
        for (int64_t m = 0; m < M; m += 6) {
            int64_t rows = M - m < 6 ? M - m : 6;
            const uint32_t *a = A + m * am;
            if (wide >= 4) VENEER_ROWS(4)
            else if (wide == 3)
                VENEER_ROWS(3) else if (wide == 2) VENEER_ROWS(2) else VENEER_ROWS(1)
        }
    }
}

/* Two rows of floats -> one row of pairs, the first row in the low halves. */
VENEER_INLINE __m512i bf16_pairs(__m512 low, __m512 high) {
    __m512i l = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
    __m512i h = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
    return _mm512_or_si512(l, _mm512_slli_epi32(h, 16));
}

VENEER_INLINE __m512 bf16_floats(const uint16_t *x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

VENEER_INLINE void bf16_store(uint16_t *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* e^x to 2 units in the last place; 0 below -87. */
VENEER_INLINE __m512 exp_floats(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* tanh x to 2e-7. Near 0 a polynomial, which is all that is computed where each x is near. */
VENEER_INLINE __m512 tanh_floats(__m512 x) {
    const __m512 most = _mm512_abs_ps(x), square = _mm512_mul_ps(x, x);
    const __mmask16 near = _mm512_cmp_ps_mask(most, _mm512_set1_ps(0.625f), _CMP_NGE_UQ);
    __m512 p = _mm512_set1_ps(-5.70498872745e-3f);
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.06390887954e-2f));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-5.37397155531e-2f));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(1.33314422036e-1f));
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-3.33332819422e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, square), x, x);
    if (near == 0xFFFF) return p;
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 e = exp_floats(_mm512_mul_ps(most, _mm512_set1_ps(-2.0f)));
    const __m512 far = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
    return _mm512_mask_mov_ps(_mm512_or_ps(far, sign), near, p);
}

/* x = tanh(by * x) of `count` values, a multiple of 16. */
VENEER_INLINE void tanh_of_all(float *x, int64_t count, float by) {
    for (int64_t i = 0; i < count; i += 16)
        _mm512_storeu_ps(x + i,
                         tanh_floats(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(by))));
}

#define LOG2_E 1.44269504f

/* 2^x to 3e-6 of it; 0 far below. */
VENEER_INLINE __m512 power(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, 0x09); /* x - floor(x) */
    __m512 p = _mm512_set1_ps(0.013534168f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05201146f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24144275f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69300383f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0000026f));
    return _mm512_scalef_ps(p, x);
}

#endif
#endif
