/* What rank.c and dora.c share: blocks of rows, and the product of one with a matrix of few columns. */
#ifndef VENEER_RANK_H
#define VENEER_RANK_H

#include "bf16.h"

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

#endif
#endif
