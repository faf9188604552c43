/* What rank.c, block.c and dora.c share: blocks of rows, their products with a matrix of few columns or few rows, and
   how it is laid out for them. */
#ifndef VENEER_RANK_H
#define VENEER_RANK_H

#include "bf16.h"
#include <stdlib.h>

#if defined(__x86_64__)

#define BLOCK 48 /* rows; kernels/dora.py knows it too */
#define COLUMNS 64
#define MOST_RANK 256

static inline int64_t rank_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

static inline int64_t rank_rows(int64_t block, int64_t rows) { return rows - block * BLOCK < BLOCK ? rows - block * BLOCK : BLOCK; }

/* out (n, R), rows `apart` values from each other, = scale * x (n, width) W, n <= BLOCK; pairs (width / 2, R). */
VENEER_INLINE void rank_down(const uint16_t *x, const uint32_t *pairs, uint16_t *out, int64_t apart, int64_t n, int64_t width, int64_t rank,
                             float scale) {
    float sums[BLOCK * MOST_RANK];
    bf16_product((const uint32_t *)x, width / 2, 1, pairs, rank, sums, rank, n, rank, width / 2, 0);
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < rank; i += 16)
            bf16_store(out + r * apart + i, _mm512_mul_ps(_mm512_loadu_ps(sums + r * rank + i), _mm512_set1_ps(scale)));
}

/* Memory of its own, aligned to a line. */
static inline uint32_t *words(int64_t count) {
    void *found = NULL;
    if (posix_memalign(&found, 64, (size_t)(4 * count + 64))) abort();
    return found;
}

VENEER_INLINE __m512i bf16_words(const uint16_t *low, const uint16_t *high) {
    __m512i l = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)low));
    return _mm512_or_si512(l, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)high)), 16));
}

/* A factor W (K, N), or W^T (N, K) where it lies `across`, float32 or bf16 where `half` -> pairs (K / 2, N), rounded to
   bf16, their rows ld apart; K even, N a multiple of 16. */
static __attribute__((unused)) VENEER_BF16 void rank_pairs(const void *factor, int64_t across, int64_t is_half, int64_t K, int64_t N,
                                                           uint32_t *to, int64_t ld) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const float *wide = factor;
    const uint16_t *half = factor;
    for (int64_t n = 0; n < N; n += 16) {
        const __m512i rows = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)(is_half ? K / 2 : K)));
        for (int64_t k = 0; k < K; k += 2) {
            __m512i found;
            if (across && is_half)
                found = _mm512_i32gather_epi32(rows, half + n * K + k, 4);
            else if (across)
                found = bf16_pairs(_mm512_i32gather_ps(rows, wide + n * K + k, 4), _mm512_i32gather_ps(rows, wide + n * K + k + 1, 4));
            else if (is_half)
                found = bf16_words(half + k * N + n, half + (k + 1) * N + n);
            else
                found = bf16_pairs(_mm512_loadu_ps(wide + k * N + n), _mm512_loadu_ps(wide + (k + 1) * N + n));
            _mm512_storeu_si512(to + k / 2 * ld + n, found);
        }
    }
}

#endif
#endif
