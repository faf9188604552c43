/* y = x W^T + bias for rows of x and blocks of a .gguf file, bf16 pairs in registers, W's values
   never rounded: the sums of gguf_tiles.c on a processor without tiles.

       y[n] = sum over W's steps of 32 values:  scale[n] * sum(code[n] * x)  +  offset[n] * sum(x)

   A register holds one pair of codes of each of 16 rows of W (gguf_pairs.h). The pair's two values
   of x stand beside it, the same in all lanes; so sums lie in lanes of their own, and scales of 16
   rows are multiplied with them at once. Codes of 4 to 6 bits are numbers as on tiles, those of 8
   bits themselves.

   Each step's sums begin at zero and are added to y's in float32, step by step: a row of x gives
   the same bits alone and among any others, with any number of threads. */
#include "gguf_product.h"
#include "parallel.h"
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define GGUF __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#include "gguf_codes.h"
#include "gguf_pairs.h"

enum {
    SIDES = 2,       /* groups of 16 rows of W that go together */
    AT_ONCE = 4,     /* rows of x with them, where codes wait in the first cache */
    DIRECT = 2,      /* rows of x that codes are multiplied with as they are decoded */
    MOST_X = 128,    /* rows of x whose sums wait there */
    AHEAD = 64,      /* rows of W that memory is asked for ahead */
    ALONE = 1 << 15, /* values of W that are not worth a second thread */
    MOST_THREADS = 256,
};

/* What a thread works with, of rows [first, first + rows) of x. pairs: for every 32 values 16 of
   each row, one row behind the other; within: the sums of x in each step, the same way. last: W's
   last rows, with room behind. Each pairs up all of x: lines that another core has written come as
   slowly as from memory. */
struct vectors {
    const struct gguf_product *of;
    uint32_t *pairs;
    float *within;
    uint8_t *last;
    int64_t first, rows, blocks, row_bytes;
};

/* Groups [next, stop) of 32 rows of W: a thread's own, until others have none left of theirs. */
struct range {
    __attribute__((aligned(64))) int64_t next;
    int64_t stop;
};

/* What all threads share. */
struct shared {
    const struct gguf_product *of;
    struct range *ranges;
    int64_t threads, first, rows;
    int failed;
};

/* 32 values, of which steps of W are taken: what four of them, or a K block, hold. */
INLINE int unit_of(const int kind) { return kind > Q8_0 ? 8 : 4; }

static GGUF void pair_up(const struct vectors *all) {
    const int64_t width = all->of->width;
    const int kind = (int)all->of->kind, halves = halves_of(kind);
    const __m512i order = order_of(kind), ones = _mm512_set1_epi16(0x3f80);
    for (int64_t row = 0; row < all->rows; row++) {
        const uint16_t *x = (const uint16_t *)all->of->x + (all->first + row) * width;
        for (int64_t at = 0; at < all->blocks; at++) {
            const __m512i words = _mm512_permutexvar_epi16(order, _mm512_loadu_si512(x + 32 * at));
            _mm512_store_si512(all->pairs + 16 * (at * all->rows + row), words);
            const __m512 sums =
                _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)words, (__m512bh)ones);
            for (int half = 0; half < halves; half++)
                all->within[(halves * at + half) * all->rows + row] =
                    _mm512_mask_reduce_add_ps(pairs_of(kind, half), sums);
        }
    }
}

/* What memory should bring: rows after the next, of the share of 32 values line `line`. It stays
   where it stands: memory takes few requests at a time, and leaves what is more. */
GGUF_INLINE void soon(const int kind, const uint8_t *p, int64_t row_bytes, int64_t at,
                      const int line) {
    const int64_t each = row_bytes_of(kind, 256) * 2;
    if (64 * line < each)
        __asm__ volatile("prefetcht1 %a0"
                         :
                         : "p"(p + AHEAD * row_bytes + at * each + 64 * line)
                         : "memory");
}

/* The products of a step to sums of a row of x. */
#define ADD(sum, scale, offset, products, within)                                                  \
    _mm512_fmadd_ps(offset, _mm512_set1_ps(within), _mm512_fmadd_ps(scale, products, sum))

/* A unit of W, or the `left` first of it, with `rows` rows of x: its products are added to sums as
   it is decoded. at: which 32 values it begins with. */
GGUF_INLINE void add_unit(const int kind, const int rows, const int64_t left,
                          const struct vectors *all, const uint8_t *const p[SIDES], int64_t at,
                          __m512 sums[SIDES][DIRECT]) {
    const int halves = halves_of(kind);
    const int64_t bytes = all->row_bytes, begin = row_bytes_of(kind, 32 * at);
    __m512 scale[SIDES][4], offset[SIDES][4];
    UNROLLED(8, own, unit_of(kind)) {
        if (own >= left) break;
        const uint32_t *pairs = all->pairs + 16 * (at + own) * rows;
        const float *within = all->within + halves * (at + own) * rows;
        struct bytes read[SIDES];
        UNROLLED(2, side, SIDES) {
            if (own * halves % 4 == 0)
                scales_of(kind, 1, p[side] + begin, bytes, own * halves, scale[side], offset[side]);
            read_bytes(kind, p[side] + begin, bytes, own, read + side);
        }
        __m512 products[2][SIDES][DIRECT] = {0};
        UNROLLED(16, pair, 16) {
            const int half = pair / 4 % 2;
            UNROLLED(2, side, SIDES) {
                const __m512i codes = codes_of(kind, read + side, own, pair);
                soon(kind, p[side], bytes, at + own, pair);
                UNROLLED(2, row, rows)
                    products[half][side][row] =
                        _mm512_dpbf16_ps(products[half][side][row], (__m512bh)codes,
                                         (__m512bh)_mm512_set1_epi32((int)pairs[16 * row + pair]));
            }
        }
        UNROLLED(2, side, SIDES)
            UNROLLED(2, row, rows) {
                if (halves == 1)
                    products[0][side][row] =
                        _mm512_add_ps(products[0][side][row], products[1][side][row]);
                UNROLLED(2, half, halves) {
                    const int step = (own * halves + half) % 4;
                    sums[side][row] = ADD(sums[side][row], scale[side][step], offset[side][step],
                                          products[half][side][row], within[half * rows + row]);
                }
            }
    }
}

/* Few rows of x with 32 of W. */
GGUF_INLINE void multiply_directly(const int kind, const int rows, const struct vectors *all,
                                   const uint8_t *const p[SIDES], __m512 (*out)[SIDES]) {
    __m512 sums[SIDES][DIRECT] = {0};
    int64_t at = 0;
    for (; at + unit_of(kind) <= all->blocks; at += unit_of(kind))
        add_unit(kind, rows, unit_of(kind), all, p, at, sums);
    if (at < all->blocks) add_unit(kind, rows, all->blocks - at, all, p, at, sums);
    UNROLLED(2, side, SIDES)
        UNROLLED(2, row, rows) out[row][side] = sums[side][row];
}

/* A unit of 32 rows of W. */
struct unit {
    __m512i codes[8][16][SIDES];
    __m512 scales[16][SIDES], offsets[16][SIDES];
};

GGUF_INLINE void decode_unit(const int kind, const int64_t left, const struct vectors *all,
                             const uint8_t *const p[SIDES], int64_t at, struct unit *to) {
    const int halves = halves_of(kind);
    const int64_t bytes = all->row_bytes, begin = row_bytes_of(kind, 32 * at);
    UNROLLED(2, side, SIDES) {
        UNROLLED(8, own, unit_of(kind)) {
            if (own >= left) break;
            struct bytes read;
            if (own * halves % 4 == 0) {
                __m512 scale[4], offset[4];
                scales_of(kind, 1, p[side] + begin, bytes, own * halves, scale, offset);
                UNROLLED(4, i, 4)
                    to->scales[own * halves + i][side] = scale[i],
                                              to->offsets[own * halves + i][side] = offset[i];
            }
            read_bytes(kind, p[side] + begin, bytes, own, &read);
            UNROLLED(16, pair, 16) {
                to->codes[own][pair][side] = codes_of(kind, &read, own, pair);
                soon(kind, p[side], bytes, at + own, pair);
            }
        }
    }
}

/* `rows` rows of x from `row` on, with the `left` first 32 values of a unit. */
GGUF_INLINE void multiply_unit(const int kind, const int rows, const struct vectors *all,
                               const struct unit *unit, int64_t left, int64_t at, int64_t row,
                               __m512 (*out)[SIDES]) {
    const int halves = halves_of(kind);
    __m512 sums[AT_ONCE][SIDES];
    UNROLLED(8, r, rows)
        UNROLLED(2, side, SIDES) sums[r][side] = out[row + r][side];
    for (int64_t own = 0; own < left; own++) {
        const uint32_t *pairs = all->pairs + 16 * ((at + own) * all->rows + row);
        const float *within = all->within + halves * (at + own) * all->rows + row;
        __m512 products[2][AT_ONCE][SIDES] = {0};
        UNROLLED(2, half, 2) {
            UNROLLED(8, i, 8) {
                const int pair = 8 * (i / 4) + 4 * half + i % 4;
                UNROLLED(8, r, rows) {
                    const __m512bh x = (__m512bh)_mm512_set1_epi32((int)pairs[16 * r + pair]);
                    UNROLLED(2, side, SIDES)
                        products[half][r][side] = _mm512_dpbf16_ps(
                            products[half][r][side], (__m512bh)unit->codes[own][pair][side], x);
                }
            }
        }
        UNROLLED(8, r, rows)
            UNROLLED(2, side, SIDES) {
                if (halves == 1)
                    products[0][r][side] =
                        _mm512_add_ps(products[0][r][side], products[1][r][side]);
                UNROLLED(2, half, halves) {
                    const int64_t step = own * halves + half;
                    sums[r][side] =
                        ADD(sums[r][side], unit->scales[step][side], unit->offsets[step][side],
                            products[half][r][side], within[half * all->rows + r]);
                }
            }
    }
    UNROLLED(8, r, rows)
        UNROLLED(2, side, SIDES) out[row + r][side] = sums[r][side];
}

/* Functions of their own: registers are given out for each. */
#define APART static GGUF __attribute__((noinline))
#define PRODUCTS(kind, rows)                                                                       \
    APART void multiply_##kind##_##rows(const struct vectors *all, const struct unit *unit,        \
                                        int64_t left, int64_t at, int64_t row,                     \
                                        __m512(*out)[SIDES]) {                                     \
        multiply_unit(kind, rows, all, unit, left, at, row, out);                                  \
    }
#define ALL_PRODUCTS(kind) PRODUCTS(kind, 1) PRODUCTS(kind, 2) PRODUCTS(kind, 3) PRODUCTS(kind, 4)
ALL_PRODUCTS(Q4_0) /* as of all kinds whose 32 values are one step */
ALL_PRODUCTS(Q6_K)

typedef void product_body(const struct vectors *, const struct unit *, int64_t, int64_t, int64_t,
                          __m512 (*)[SIDES]);

#define BODIES(kind)                                                                               \
    {multiply_##kind##_1, multiply_##kind##_2, multiply_##kind##_3, multiply_##kind##_4}
static product_body *const products_of[2][AT_ONCE] = {BODIES(Q4_0), BODIES(Q6_K)};

/* All rows of x with a unit, near enough equally many at a time. */
static GGUF void multiply(const int kind, const struct vectors *all, const struct unit *unit,
                          int64_t left, int64_t at, __m512 (*out)[SIDES]) {
    const int64_t turns = (all->rows + AT_ONCE - 1) / AT_ONCE;
    for (int64_t turn = 0, row = 0; turn < turns; turn++) {
        const int64_t next = all->rows * (turn + 1) / turns;
        products_of[halves_of(kind) - 1][next - row - 1](all, unit, left, at, row, out);
        row = next;
    }
}

#define OF_KIND(kind)                                                                              \
    APART void one_row_##kind(const struct vectors *all, const uint8_t *const p[SIDES],            \
                              __m512(*out)[SIDES]) {                                               \
        multiply_directly(kind, 1, all, p, out);                                                   \
    }                                                                                              \
    APART void two_rows_##kind(const struct vectors *all, const uint8_t *const p[SIDES],           \
                               __m512(*out)[SIDES]) {                                              \
        multiply_directly(kind, 2, all, p, out);                                                   \
    }                                                                                              \
    APART void more_rows_##kind(const struct vectors *all, const uint8_t *const p[SIDES],          \
                                __m512(*out)[SIDES]) {                                             \
        struct unit unit;                                                                          \
        int64_t at = 0;                                                                            \
        memset(out, 0, (size_t)all->rows * sizeof *out);                                           \
        for (; at + unit_of(kind) <= all->blocks; at += unit_of(kind)) {                           \
            decode_unit(kind, unit_of(kind), all, p, at, &unit);                                   \
            multiply(kind, all, &unit, unit_of(kind), at, out);                                    \
        }                                                                                          \
        if (at == all->blocks) return;                                                             \
        decode_unit(kind, all->blocks - at, all, p, at, &unit);                                    \
        multiply(kind, all, &unit, all->blocks - at, at, out);                                     \
    }
FOR_EACH_KIND(OF_KIND)

typedef void rows_body(const struct vectors *, const uint8_t *const *, __m512 (*)[SIDES]);

static rows_body *body_of(int64_t kind, int64_t rows) {
#define BODY(kind) CASE_OF(kind, one_row_##kind, two_rows_##kind, more_rows_##kind)
#define CASE_OF(kind, one, two, more)                                                              \
    case kind: return rows == 1 ? one : rows == 2 ? two : more;
    switch (kind) { FOR_EACH_KIND(BODY) }
    return NULL;
#undef BODY
#undef CASE_OF
}

INLINE int64_t groups_of(const struct gguf_weight *w) {
    return (w->outs + 16 * SIDES - 1) / (16 * SIDES);
}

/* Group `number` of 32 rows of W, those of a weight behind those of the one before. */
struct place {
    const struct gguf_weight *w;
    int64_t out;
};

static struct place place_of_group(const struct gguf_product *of, int64_t number) {
    const struct gguf_weight *w = of->weights;
    while (number >= groups_of(w)) number -= groups_of(w++);
    return (struct place){w, 16 * SIDES * number};
}

static GGUF void group(const struct vectors *all, struct place at) {
    const struct gguf_weight *w = at.w;
    __m512 sums[MOST_X][SIDES];
    const uint8_t *p[SIDES] = {readable(w, at.out, all->row_bytes, all->last)};
    for (int side = 1; side < SIDES; side++) {
        const int64_t out = at.out + 16 * side;
        p[side] = out < w->outs ? readable(w, out, all->row_bytes,
                                           all->last + side * (16 * all->row_bytes + BEYOND))
                                : p[0];
    }
    body_of(all->of->kind, all->rows)(all, p, sums);
    for (int side = 0; side < SIDES && at.out + 16 * side < w->outs; side++)
        for (int64_t row = 0; row < all->rows; row++)
            put(w, at.out + 16 * side, all->first + row, sums[row][side]);
}

/* What one thread does, as long as there are runs. */
static void products(void *arguments, int64_t start, int64_t stop) {
    struct shared *shared = arguments;
    const struct gguf_product *of = shared->of;
    const int64_t blocks = of->width / 32, steps = blocks * halves_of((int)of->kind),
                  bytes = row_bytes_of(of->kind, of->width);
    struct vectors all = {of, NULL, NULL, NULL, shared->first, shared->rows, blocks, bytes};
    void *memory = NULL;
    (void)stop;
    if (posix_memalign(
            &memory, 64,
            (size_t)(all.rows * (64 * blocks + 4 * steps) + SIDES * (16 * bytes + BEYOND)))) {
        shared->failed = 1;
        return;
    }
    all.pairs = memory;
    all.within = (float *)(all.pairs + 16 * all.rows * blocks);
    all.last = (uint8_t *)(all.within + all.rows * steps);
    pair_up(&all);
    for (int64_t other = 0; other < shared->threads; other++) {
        struct range *range = shared->ranges + (start + other) % shared->threads;
        for (int64_t next;
             (next = __atomic_fetch_add(&range->next, 1, __ATOMIC_RELAXED)) < range->stop;)
            group(&all, place_of_group(of, next));
    }
    free(memory);
}

int gguf_vector_product(const struct gguf_product *of) {
    int64_t groups = 0;
    for (int64_t i = 0; i < of->count; i++) groups += groups_of(of->weights + i);
    const int64_t grain = 1 + ALONE / (16 * SIDES * of->width * (1 + least(MOST_X, of->rows) / 16));
    const int64_t most = least(veneer_threads(), MOST_THREADS), useful = groups / grain,
                  threads = useful < 2 ? 1 : least(useful, most);
    struct range ranges[MOST_THREADS];
    struct shared shared = {of, ranges, threads, 0, 0, 0};
    for (; shared.first < of->rows; shared.first += shared.rows) {
        shared.rows = least(MOST_X, of->rows - shared.first);
        for (int64_t i = 0; i < threads; i++)
            ranges[i] = (struct range){groups * i / threads, groups * (i + 1) / threads};
        veneer_parallel(products, &shared, threads, 1);
    }
    return shared.failed;
}

#else

int gguf_vector_product(const struct gguf_product *of) {
    (void)of;
    return 1;
}

#endif
