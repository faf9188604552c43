/* What attention on AMX tiles is made of (attention_tiles.c): panels, layouts, products of squares,
   shares.

   A panel is 32 queries of one head. Scores stand across, 32 keys by the 32 queries of a panel:
   what belongs to a query (its greatest score, its sum, its log-sum-exp) is a lane, and shares come
   out as the tiles that the next products take.

   Layouts of 32 rows of D values, filled up with zeros to T steps of 32, 1,024 values a step:
     rows     two tiles of 16 rows, 32 values          multiplied from the left, summed over D
     across   the same turned by pairs of values        from the right, summed over D
     along    two tiles of 16 pairs of rows, 16 values  from the right, summed over the rows
     turned   the same turned by pairs of rows          from the left, summed over the rows */
#ifndef VENEER_ATTENTION_TILES_H
#define VENEER_ATTENTION_TILES_H

#include "attention.h"
#include "bf16.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(VENEER_AMX_COMPILED)

enum {
    SIDE = 32,
    STEP = SIDE * SIDE,
    BLOCK = 2,  /* squares of keys at once */
    PANELS = 4, /* that meet them one after the other */
    MANY = 24,  /* panels of 64 values a row that are laid out at once backward */
};

#define LARGEST 1e20f /* sums beyond are computed again */

/* 32 queries of one head: n of them are real. It sees keys [first, end), of which all rows see
 * [whole, own). */
struct panel {
    int64_t i0, n, head, first, whole, own, end;
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static void *room(int64_t bytes) {
    void *found = NULL;
    if (posix_memalign(&found, 64, (size_t)bytes + 64)) abort();
    return found;
}

/* -- layouts
 * ---------------------------------------------------------------------------------
 */

/* n rows of D values as rows `at` and after of `to`; what is beyond D is 0. */
static VENEER_AMX void lay(const uint16_t *x, int64_t row, int64_t n, int64_t D, int64_t at,
                           uint16_t *to) {
    for (int64_t d = 0; d < D; d += SIDE, to += STEP)
        for (int64_t r = 0; r < n; r++) {
            const __mmask32 real = D - d < SIDE ? (__mmask32)((1u << (D - d)) - 1) : ~(__mmask32)0;
            _mm512_storeu_si512(to + (at + r) * SIDE,
                                _mm512_maskz_loadu_epi16(real, x + r * row + d));
        }
}

/* tiles -> the same turned, word by word. */
static VENEER_AMX void turn(const uint16_t *from, int64_t tiles, uint16_t *to) {
    for (int64_t i = 0; i < tiles; i++)
        words_across((const uint32_t *)(from + i * STEP / 2), 16, 16,
                     (uint32_t *)(to + i * STEP / 2));
}

/* rows -> along. */
static VENEER_AMX void pair(const uint16_t *rows, int64_t T, uint16_t *to) {
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = _mm512_or_si512(
        count, _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16 << 16 | 16));
    for (int64_t t = 0; t < T; t++, rows += STEP, to += STEP)
        for (int64_t r = 0; r < SIDE; r += 2) {
            const __m512i a = _mm512_loadu_si512(rows + r * SIDE),
                          b = _mm512_loadu_si512(rows + (r + 1) * SIDE);
            _mm512_storeu_si512(to + r * SIDE / 2, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(to + STEP / 2 + r * SIDE / 2,
                                _mm512_permutex2var_epi16(a, high, b));
        }
}

/* Keys or values [j, j + 32) of a task as rows; what is beyond the last is 0. */
static VENEER_AMX void lay_keys(const struct place *p, int values, int64_t j, uint16_t *to) {
    const struct attention *a = p->a;
    const int64_t T = (a->size + SIDE - 1) / SIDE, most = p->J - j < SIDE ? p->J - j : SIDE;
    const int64_t shared = a->before - j < 0 ? 0 : a->before - j < most ? a->before - j : most;
    const int64_t own = p->start + j + shared - a->before;
    if (most < SIDE) memset(to, 0, (size_t)(T * STEP * 2));
    const uint16_t *before = values ? a->before_v : a->before_k, *x = values ? a->v : a->k;
    const int64_t before_row = values ? a->bv_row : a->bk_row, row = values ? a->v_row : a->k_row;
    if (shared)
        lay(before + j * before_row + p->kv * (values ? a->bv_head : a->bk_head), before_row,
            shared, a->size, 0, to);
    if (shared < most)
        lay(x + own * row + p->kv * (values ? a->v_head : a->k_head), row, most - shared, a->size,
            shared, to);
}

/* A panel's rows of x as rows; what is beyond the last is 0. */
static VENEER_AMX void lay_queries(const struct place *p, const struct panel *w, const uint16_t *x,
                                   int64_t row, int64_t head, uint16_t *to) {
    if (w->n < SIDE) memset(to, 0, (size_t)((p->a->size + SIDE - 1) / SIDE * STEP * 2));
    lay(x + (p->start + w->i0) * row + w->head * head, row, w->n, p->a->size, 0, to);
}

/* Where the query of column c of a product with `along` shares stands: these are interleaved within
 * 128 bits. */
static int64_t query_of(int64_t c) { return c % 16 / 4 * 8 + c / 16 * 4 + c % 4; }

/* sums of T steps (32 values of D, 32 columns) -> rows of D values in bf16, times `by` of each
 * query. */
static VENEER_AMX void write_turned(const float *sums, int64_t D, int64_t n, const float *by,
                                    uint16_t *to, int64_t row) {
    float turned[16 * 16];
    __m512i x[16];
    for (int64_t d = 0; d < D; d += 16)
        for (int64_t c0 = 0; c0 < SIDE; c0 += 16) {
            const float *from = sums + d / SIDE * STEP + d % SIDE * SIDE + c0;
            UNROLLED(16, i, 16) x[i] = _mm512_loadu_si512(from + i * SIDE);
            words_turned(x, (uint32_t *)turned);
            for (int64_t c = 0; c < 16; c++) {
                const int64_t q = query_of(c0 + c);
                if (q < n)
                    bf16_store(to + q * row + d, _mm512_mul_ps(_mm512_loadu_ps(turned + 16 * c),
                                                               _mm512_set1_ps(by[q])));
            }
        }
}

/* -- products
 * ---------------------------------------------------------------------------------
 */

/* `blocks` times sums (32, 32) [+]= A B over `steps` of 32, each two tiles of A and two of B;
   next_: from one step to the next, block_: from one block. The sums of 16 rows are stored while
   the next ones are made, so they take turns. */
static VENEER_AMX __attribute__((noinline)) void
multiply(const uint16_t *A, int64_t block_a, int64_t next_a, const uint16_t *B, int64_t block_b,
         int64_t next_b, int64_t blocks, int64_t steps, float *sums, int add) {
    __asm__ volatile("" ::: "memory");
#define HALF(first, second, A, sums)                                                               \
    if (add) {                                                                                     \
        _tile_loadd(first, sums, 128);                                                             \
        _tile_loadd(second, (sums) + 16, 128);                                                     \
    } else {                                                                                       \
        _tile_zero(first);                                                                         \
        _tile_zero(second);                                                                        \
    }                                                                                              \
    for (int64_t k = 0; k < steps; k++) {                                                          \
        const uint16_t *b = B + k * next_b;                                                        \
        _tile_loadd(4, (A) + k * next_a, 64);                                                      \
        _tile_loadd(5, b, 64);                                                                     \
        _tile_dpbf16ps(first, 4, 5);                                                               \
        _tile_loadd(6, b + STEP / 2, 64);                                                          \
        _tile_dpbf16ps(second, 4, 6);                                                              \
    }
#define STORED(first, second, sums)                                                                \
    do {                                                                                           \
        _tile_stored(first, sums, 128);                                                            \
        _tile_stored(second, (sums) + 16, 128);                                                    \
    } while (0)
    for (int64_t i = 0; i < blocks; i++, A += block_a, B += block_b, sums += STEP) {
        HALF(0, 1, A, sums)
        if (i) STORED(2, 3, sums - STEP / 2);
        HALF(2, 3, A + STEP / 2, sums + STEP / 2)
        STORED(0, 1, sums);
    }
    STORED(2, 3, sums - STEP / 2);
#undef HALF
#undef STORED
    __asm__ volatile("" ::: "memory");
}

/* -- shares
 * ---------------------------------------------------------------------------------
 */

/* Which of a panel's 32 queries see key j. */
VENEER_AMX_INLINE uint32_t who_sees(const struct attention *a, const struct panel *w, int64_t j) {
    const int64_t from = j - a->before - w->i0, last = from - 1 + a->window;
    uint32_t seen = from <= 0 ? ~0u : from >= SIDE ? 0 : ~0u << from;
    if (a->window) seen &= last < 0 ? 0 : last >= SIDE - 1 ? ~0u : (2u << last) - 1;
    return seen;
}

/* Of scores (32, 32): shares as pairs of keys; sums of each query. */
VENEER_AMX_INLINE void shares_of(const struct attention *a, const struct panel *w, int64_t key,
                                 const int edge, const float *scores, const float *most,
                                 float *sums, uint16_t *pairs) {
    const __m512 by = _mm512_set1_ps(unit_of(a) * LOG2_E);
    const __m512 top[2] = {_mm512_loadu_ps(most), _mm512_loadu_ps(most + 16)};
    __m512 sum[2] = {_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16)};
#pragma GCC unroll 2
    for (int64_t i = 0; i < SIDE; i += 2) {
        __m512i rows[2];
        UNROLLED(2, two, 2) {
            const float *s = scores + (i + two) * SIDE;
            const uint32_t seen = edge ? who_sees(a, w, key + i + two) : 0;
            __m512 p[2];
            UNROLLED(2, half, 2) {
                p[half] = power(_mm512_fmsub_ps(_mm512_loadu_ps(s + 16 * half), by, top[half]));
                if (edge) p[half] = _mm512_maskz_mov_ps((__mmask16)(seen >> 16 * half), p[half]);
                sum[half] = _mm512_add_ps(sum[half], p[half]);
            }
            rows[two] = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]);
        }
        _mm512_storeu_si512(pairs + i * 16, _mm512_unpacklo_epi16(rows[0], rows[1]));
        _mm512_storeu_si512(pairs + STEP / 2 + i * 16, _mm512_unpackhi_epi16(rows[0], rows[1]));
    }
    _mm512_storeu_ps(sums, sum[0]);
    _mm512_storeu_ps(sums + 16, sum[1]);
}

/* The same backward: shares as rows of queries, scores' gradient as rows and as pairs of keys. */
VENEER_AMX_INLINE void gradients_of(const struct attention *a, const struct panel *w, int64_t key,
                                    const int edge, const float *scores, const float *grads,
                                    const float *lse, const float *mean, uint16_t *shares,
                                    uint16_t *given, uint16_t *pairs) {
    const __m512 by = _mm512_set1_ps(unit_of(a) * LOG2_E);
    const int capped = a->softcap != 0.0f;
    const __m512 minus[2] = {_mm512_loadu_ps(lse), _mm512_loadu_ps(lse + 16)};
    const __m512 less[2] = {_mm512_loadu_ps(mean), _mm512_loadu_ps(mean + 16)};
#pragma GCC unroll 2
    for (int64_t i = 0; i < SIDE; i += 2) {
        __m512i rows[2];
        UNROLLED(2, two, 2) {
            const float *s = scores + (i + two) * SIDE, *g = grads + (i + two) * SIDE;
            const uint32_t seen = edge ? who_sees(a, w, key + i + two) : 0;
            __m512 p[2], x[2];
            UNROLLED(2, half, 2) {
                const __m512 score = _mm512_loadu_ps(s + 16 * half);
                p[half] = power(_mm512_fmsub_ps(score, by, minus[half]));
                if (edge) p[half] = _mm512_maskz_mov_ps((__mmask16)(seen >> 16 * half), p[half]);
                x[half] = _mm512_mul_ps(p[half],
                                        _mm512_sub_ps(_mm512_loadu_ps(g + 16 * half), less[half]));
                if (capped) /* the slope of tanh */
                    x[half] = _mm512_mul_ps(
                        x[half], _mm512_fnmadd_ps(score, score, _mm512_set1_ps(1.0f)));
            }
            _mm512_storeu_si512(shares + (i + two) * SIDE,
                                (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
            rows[two] = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
            _mm512_storeu_si512(given + (i + two) * SIDE, rows[two]);
        }
        _mm512_storeu_si512(pairs + i * 16, _mm512_unpacklo_epi16(rows[0], rows[1]));
        _mm512_storeu_si512(pairs + STEP / 2 + i * 16, _mm512_unpackhi_epi16(rows[0], rows[1]));
    }
}

/* -- panels
 * ---------------------------------------------------------------------------------
 */

/* The next panels of a task, from number `from` on: its blocks of queries one after the other, each
 * with all heads. */
static int64_t panels_of(const struct place *p, int64_t from, int64_t most, struct panel *panels) {
    const struct attention *a = p->a;
    const int64_t G = a->heads / a->kv_heads, blocks = (p->L + SIDE - 1) / SIDE;
    int64_t count = 0, unused;
    for (; count < most; count++) {
        const int64_t block = p->split + (from + count) / G * a->splits;
        struct panel *w = panels + count;
        if (block >= blocks) break;
        w->i0 = block * SIDE;
        w->n = p->L - w->i0 < SIDE ? p->L - w->i0 : SIDE;
        w->head = p->kv * G + (from + count) % G;
        seen(a, w->i0, &w->first, &unused);
        seen(a, w->i0 + SIDE - 1, &w->whole, &unused);
        seen(a, w->i0 + w->n - 1, &unused, &w->end);
        w->first &= ~(int64_t)(SIDE - 1);
        w->own = (a->before + w->i0) & ~(int64_t)(SIDE - 1);
        w->end = (w->end + SIDE - 1) & ~(int64_t)(SIDE - 1);
    }
    return count;
}

/* Whether some query of the panel does not see some of the 32 keys. */
static inline int at_an_edge(const struct panel *w, int64_t key) {
    return key < w->whole || key >= w->own;
}

#endif
#endif
