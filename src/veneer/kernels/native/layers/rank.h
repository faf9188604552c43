/* What rank.c and block.c share: blocks of rows, their products with a matrix of few
   columns or few rows, how it is laid out for them, and dropout's masks. */
#ifndef VENEER_RANK_H
#define VENEER_RANK_H

#include "bf16.h"
#include <stdlib.h>

#if defined(__x86_64__)

#define BLOCK 48 /* rows */
#define COLUMNS 64
#define MOST_RANK 256
#define MOST_LAYERS 3 /* layers of one input; kernels/bindings/rank_calls.py knows it too */

static inline int64_t rank_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

static inline int64_t rank_rows(int64_t block, int64_t rows) {
    return rows - block * BLOCK < BLOCK ? rows - block * BLOCK : BLOCK;
}

/* Memory of its own, aligned to a line. */
static inline uint32_t *words(int64_t count) {
    void *found = NULL;
    if (posix_memalign(&found, 64, (size_t)(4 * count + 64))) abort();
    return found;
}

/* Dropout of one layer: which values stay is computed where they are read
   (kernels/dense/dropout.py). kernels/bindings/rank_calls.py has the same fields. */
struct mask {
    const int64_t *keys; /* of the rows; NULL: all stay */
    uint32_t row_key, column_key, threshold;
    uint32_t *rows, *columns; /* C's own: their hashes, in one piece */
};

/* As dropout.c: lowbias32, Wellons 2018. */
static inline uint32_t mix(uint32_t value) {
    value = (value ^ (value >> 16)) * 0x7FEB352Du;
    value = (value ^ (value >> 15)) * 0x846CA68Bu;
    return value ^ (value >> 16);
}

static __attribute__((unused)) VENEER_BF16 void mask_begin(struct mask *m, int64_t rows,
                                                           int64_t width) {
    m->rows = m->keys ? words(rows + width) : NULL;
    if (!m->keys) return;
    m->columns = m->rows + rows;
    for (int64_t r = 0; r < rows; r++) m->rows[r] = mix((uint32_t)m->keys[r] + m->row_key);
    for (int64_t c = 0; c < width; c++)
        m->columns[c] = mix((uint32_t)c * 0x85EBCA6Bu + m->column_key);
}

/* Which of 16 columns of a row stay. */
VENEER_INLINE __mmask16 kept(const struct mask *m, int64_t row, int64_t column) {
    const __m512i columns = _mm512_loadu_si512(m->columns + column);
    __m512i value = _mm512_xor_si512(columns, _mm512_set1_epi32((int)m->rows[row]));
    value = _mm512_mullo_epi32(_mm512_xor_si512(value, _mm512_srli_epi32(value, 16)),
                               _mm512_set1_epi32(0x7FEB352D));
    value = _mm512_mullo_epi32(_mm512_xor_si512(value, _mm512_srli_epi32(value, 15)),
                               _mm512_set1_epi32((int)0x846CA68Bu));
    return _mm512_cmpge_epu32_mask(_mm512_xor_si512(value, _mm512_srli_epi32(value, 16)),
                                   _mm512_set1_epi32((int)m->threshold));
}

/* out (n, R), rows `apart` values from each other, = scale * x (n, width) W, n <= BLOCK; pairs
   (width / 2, R). x: rows from `row` on, seen through the mask a piece at a time, so that what is
   left of it stays in the first cache. */
static __attribute__((unused)) VENEER_BF16 void
rank_down(const struct mask *m, const uint16_t *x, int64_t row, const uint32_t *pairs,
          uint16_t *out, int64_t apart, int64_t n, int64_t width, int64_t rank, float scale) {
    enum { PIECE = 256 };
    float sums[BLOCK * MOST_RANK];
    uint16_t left[BLOCK * PIECE];
    if (!m->keys)
        bf16_product((const uint32_t *)x, width / 2, 1, pairs, rank, sums, rank, n, rank, width / 2,
                     0);
    for (int64_t c = 0; m->keys && c < width; c += PIECE) {
        const int64_t wide = width - c < PIECE ? width - c : PIECE;
        for (int64_t r = 0; r < n; r++)
            for (int64_t i = 0; i < wide; i += 16) {
                const __m256i own = _mm256_loadu_si256((const __m256i *)(x + r * width + c + i));
                _mm256_storeu_si256((__m256i *)(left + r * PIECE + i),
                                    _mm256_maskz_mov_epi16(kept(m, row + r, c + i), own));
            }
        bf16_product((const uint32_t *)left, PIECE / 2, 1, pairs + c / 2 * rank, rank, sums, rank,
                     n, rank, wide / 2, c > 0);
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < rank; i += 16)
            bf16_store(out + r * apart + i,
                       _mm512_mul_ps(_mm512_loadu_ps(sums + r * rank + i), _mm512_set1_ps(scale)));
}

/* C (R, 16 V) of x += scale * narrow W over K2 pairs: bf16.h's sums, which never leave the
 * registers. */
VENEER_INLINE void up_tile(const int R, const int V, const uint32_t *narrow, int64_t apart,
                           const uint32_t *pairs, int64_t width, uint16_t *x, int64_t K2,
                           float scale) {
    __m512 sum[6][4];
    UNROLLED(6, r, R)
        UNROLLED(4, v, V) sum[r][v] = _mm512_setzero_ps();
    bf16_sums(R, V, narrow, apart, 1, pairs, width, K2, sum);
    const __m512 by = _mm512_set1_ps(scale);
    UNROLLED(6, r, R)
        UNROLLED(4, v, V) {
            uint16_t *to = x + r * width + 16 * v;
            bf16_store(to, _mm512_fmadd_ps(sum[r][v], by, bf16_floats(to)));
        }
}

static __attribute__((unused)) VENEER_BF16 void up_tiles(const uint32_t *narrow, int64_t apart,
                                                         const uint32_t *pairs, uint16_t *x,
                                                         int64_t n, int64_t width, int64_t wide,
                                                         int64_t K2, float scale) {
    for (int64_t m = 0; m < n; m += 6, narrow += 6 * apart, x += 6 * width) {
        const int64_t rows = n - m < 6 ? n - m : 6;
#define OF(R, V)                                                                                   \
    case 4 * R + V - 1: up_tile(R, V, narrow, apart, pairs, width, x, K2, scale); break;
#define EACH(R) OF(R, 1) OF(R, 2) OF(R, 3) OF(R, 4)
        switch (4 * rows + wide / 16 - 1) { EACH(1) EACH(2) EACH(3) EACH(4) EACH(5) EACH(6) }
#undef EACH
#undef OF
    }
}

/* x (n, width) += scale * narrow (n, R) W, columns [c, c + wide), wide <= COLUMNS; what is added
   through the mask, of rows from `row` on. pairs (R / 2, width). */
VENEER_INLINE void rank_up(const struct mask *m, const uint16_t *narrow, int64_t apart,
                           const uint32_t *pairs, uint16_t *x, int64_t row, int64_t n,
                           int64_t width, int64_t c, int64_t wide, int64_t rank, float scale) {
    float sums[BLOCK * COLUMNS];
    if (!m->keys && !veneer_has_amx()) {
        up_tiles((const uint32_t *)narrow, apart / 2, pairs + c, x + c, n, width, wide, rank / 2,
                 scale);
        return;
    }
    bf16_product((const uint32_t *)narrow, apart / 2, 1, pairs + c, width, sums, COLUMNS, n, wide,
                 rank / 2, 0);
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < wide; i += 16) {
            uint16_t *to = x + r * width + c + i;
            __m512 sum = _mm512_loadu_ps(sums + r * COLUMNS + i);
            if (m->keys) sum = _mm512_maskz_mov_ps(kept(m, row + r, c + i), sum);
            bf16_store(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), bf16_floats(to)));
        }
}

static inline int64_t rank_columns(int64_t width, int64_t c) {
    return width - c < COLUMNS ? width - c : COLUMNS;
}

VENEER_INLINE __m512i bf16_words(const uint16_t *low, const uint16_t *high) {
    __m512i l = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)low));
    return _mm512_or_si512(
        l, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)high)), 16));
}

/* 16 rows of W^T from column k on, 32 values of each or the last 16, as pairs; rounded to bf16
 * where they are float32. */
VENEER_INLINE void rank_turned(const void *factor, int64_t is_half, int64_t n, int64_t k, int64_t K,
                               uint32_t *to) {
    const __mmask32 real = K - k >= 32 ? ~(__mmask32)0 : 0xFFFF;
    __m512i x[16];
    UNROLLED(16, r, 16) {
        const float *wide = (const float *)factor + (n + r) * K + k;
        if (is_half) {
            x[r] = _mm512_maskz_loadu_epi16(real, (const uint16_t *)factor + (n + r) * K + k);
        } else {
            const __m512 low = _mm512_loadu_ps(wide),
                         high = _mm512_maskz_loadu_ps((__mmask16)(real >> 16), wide + 16);
            x[r] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        }
    }
    words_turned(x, to);
}

/* A factor W (K, N), or W^T (N, K) where it lies `across`, float32 or bf16 where `half` -> pairs (K
   / 2, N), rounded to bf16, their rows ld apart; K and N multiples of 16. */
static __attribute__((unused)) VENEER_BF16 void rank_pairs(const void *factor, int64_t across,
                                                           int64_t is_half, int64_t K, int64_t N,
                                                           uint32_t *to, int64_t ld) {
    const float *wide = factor;
    const uint16_t *half = factor;
    _Alignas(64) uint32_t turned[16 * 16];
    for (int64_t n = 0; n < N; n += 16) {
        for (int64_t k = 0; across && k < K; k += 32) {
            rank_turned(factor, is_half, n, k, K, turned);
            for (int64_t p = 0; p < 16 && k + 2 * p < K; p++)
                _mm512_storeu_si512(to + (k / 2 + p) * ld + n, _mm512_load_si512(turned + 16 * p));
        }
        for (int64_t k = 0; !across && k < K; k += 2) {
            const __m512i found = is_half ? bf16_words(half + k * N + n, half + (k + 1) * N + n)
                                          : bf16_pairs(_mm512_loadu_ps(wide + k * N + n),
                                                       _mm512_loadu_ps(wide + (k + 1) * N + n));
            _mm512_storeu_si512(to + k / 2 * ld + n, found);
        }
    }
}

#endif
#endif
