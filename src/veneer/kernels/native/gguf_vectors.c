/* y = x W^T + bias for rows of x and blocks of a .gguf file, bf16 pairs in registers, W's values never rounded: the sums of
   gguf_tiles.c on a processor without tiles.

       y[n] = sum over W's steps of 32 values:  scale[n] * sum(code[n] * x)  +  offset[n] * sum(x)

   A register holds one pair of codes of each of 16 rows of W: their bytes are turned over as they lie, four at a time, and
   each four are two pairs, or four. The pair's two values of x stand beside it, the same in all lanes; so sums lie in lanes
   of their own, and scales of 16 rows are multiplied with them at once. Codes of 4 to 6 bits are numbers as on tiles, those
   of 8 bits themselves.

   Each step's sums begin at zero and are added to y's in float32, step by step: a row of x gives the same bits alone and
   among any others, with any number of threads. */
#include "gguf_tiles.h"
#include "parallel.h"
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define GGUF __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#include "gguf_codes.h"

enum {
    SIDES = 2,      /* groups of 16 rows of W that go together */
    AT_ONCE = 4,    /* rows of x with them, where codes wait in the first cache */
    DIRECT = 2,     /* rows of x that codes are multiplied with as they are decoded */
    MOST_X = 128,   /* rows of x whose sums wait there */
    AHEAD = 64,     /* rows of W that memory is asked for ahead */
    BEYOND = 128,   /* bytes that may be read behind a row */
    ALONE = 1 << 15, /* values of W that are not worth a second thread */
};

/* Rows [first, first + rows) of x. pairs: for every 32 values 16 of each row, one row behind the other; within: the sums
   of x in each step, the same way. last: 16 rows of each weight, with room behind. */
struct vectors {
    const struct gguf_product *of;
    uint32_t *pairs;
    float *within;
    uint8_t *last;
    int64_t first, rows, blocks, row_bytes, last_bytes;
    struct gguf_runs runs;
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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
            const __m512 sums = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)words, (__m512bh)ones);
            for (int half = 0; half < halves; half++)
                all->within[(halves * at + half) * all->rows + row] = _mm512_mask_reduce_add_ps(pairs_of(kind, half), sums);
        }
    }
}

/* Four words of 16 rows each: words[i] of all of them. */
GGUF_INLINE void across(const uint8_t *p, int64_t row_bytes, __m512i words[4]) {
    __m512i four[4];
#define AT(i) _mm_loadu_si128((const __m128i *)row_at(p, row_bytes, i))
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        four[i] = _mm512_inserti32x4(_mm512_castsi128_si512(AT(i)), AT(i + 4), 1);
        four[i] = _mm512_inserti32x4(_mm512_inserti32x4(four[i], AT(i + 8), 2), AT(i + 12), 3);
    }
#undef AT
    turned_over(four, words);
}

/* The bytes of 32 values of 16 rows, across: of their codes, and of what stands apart from these. */
struct bytes {
    __m512i codes[8], above[8];
};

/* (a & mask) | (b & ~mask) */
GGUF_INLINE __m512i chosen(__m512i a, __m512i b, int mask) { return _mm512_ternarylogic_epi32(a, _mm512_set1_epi32(mask), b, 0xe2); }

/* own: which 32 of 256 values; p: where their block begins, of small ones the first of four. */
GGUF_INLINE void read_bytes(const int kind, const uint8_t *p, int64_t row_bytes, const int own, struct bytes *to) {
    if (kind == Q6_K) {
        across(p + own / 4 * 64 + own % 2 * 32, row_bytes, to->codes);
        across(p + own / 4 * 64 + own % 2 * 32 + 16, row_bytes, to->codes + 4);
        across(p + 128 + own / 4 * 32, row_bytes, to->above);
        across(p + 128 + own / 4 * 32 + 16, row_bytes, to->above + 4);
        return;
    }
    const uint8_t *codes = p + codes_at(kind, own);
    across(codes, row_bytes, to->codes);
    if (!in_mixed_order(kind)) across(codes + 16, row_bytes, to->codes + 4);
    if (kind == Q5_K) {
        across(p + 16, row_bytes, to->above);
        across(p + 32, row_bytes, to->above + 4);
    }
    if (kind == Q5_0 || kind == Q5_1) { /* bits of values 2 apart, 16 apart: of the first 16 values, and of those behind */
        __m512i words[4];
        across(codes - 4, row_bytes, words);
        const __m512i bits = words[0];
        to->above[0] = chosen(bits, _mm512_slli_epi32(bits, 14), 0xffff);
        to->above[1] = chosen(_mm512_srli_epi32(bits, 16), _mm512_srli_epi32(bits, 2), 0xffff);
    }
}

/* Bit `from` moved to bit `to`. */
GGUF_INLINE __m512i moved(__m512i words, const int from, const int to) {
    return from > to ? _mm512_srli_epi32(words, (unsigned)(from - to)) : _mm512_slli_epi32(words, (unsigned)(to - from));
}

/* (words & mask) | bits */
GGUF_INLINE __m512i with_bits(__m512i words, int mask, __m512i bits) {
    return _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(mask), bits, 0xea);
}

/* A byte of each word, 8 bits with a sign, as a bf16 number in the upper half of 32. */
GGUF_INLINE __m512i number(__m512i words, const int byte) {
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, (unsigned)(24 - 8 * byte)), 24)));
}

/* Pair `pair` of codes of 16 rows, in the order of `order_of`. */
GGUF_INLINE __m512i codes_of(const int kind, const struct bytes *from, const int own, const int pair) {
    const int place = place_of(kind), mask = 0x00010001 * (15 << place), byte = pair / 8;
    const __m512i one = _mm512_set1_epi32(0x3f803f80);
    if (kind == Q8_0) return chosen(_mm512_srli_epi32(number(from->codes[pair % 8], byte), 16), number(from->codes[pair % 8], byte + 2), 0xffff);
    if (in_mixed_order(kind)) {
        const __m512i code = with_bits(moved(from->codes[pair % 4], pair / 4 * 4, place), mask, one);
        const __m512i fifth = moved(from->above[pair / 4 % 2], pair % 4 * 4 + byte, 6);
        return bits_of(kind) == 4 ? code : with_bits(fifth, 0x00400040, code);
    }
    const int high = kind == Q6_K ? own % 4 / 2 : own % 2;
    const __m512i code = with_bits(moved(from->codes[pair % 8], 4 * high + 8 * byte, place), mask, one);
    if (kind == Q5_K) return with_bits(moved(from->above[pair % 8], own + 8 * byte, 6), 0x00400040, code);
    if (kind == Q6_K) return with_bits(moved(from->above[pair % 8], own % 4 * 2 + 8 * byte, 5), 0x00600060, code);
    return code;
}

/* What memory should bring: rows after the next, of the share of 32 values line `line`. It stays where it stands: memory
   takes few requests at a time, and leaves what is more. */
GGUF_INLINE void soon(const int kind, const uint8_t *p, int64_t row_bytes, int64_t at, const int line) {
    const int64_t each = row_bytes_of(kind, 256) * 2;
    if (64 * line < each) __asm__ volatile("prefetcht1 %a0" : : "p"(p + AHEAD * row_bytes + at * each + 64 * line) : "memory");
}

/* The products of a step to sums of a row of x. */
#define ADD(sum, scale, offset, products, within) \
    _mm512_fmadd_ps(offset, _mm512_set1_ps(within), _mm512_fmadd_ps(scale, products, sum))

/* A unit of W, or the `left` first of it, with `rows` rows of x: its products are added to sums as it is decoded. at:
   which 32 values it begins with. */
GGUF_INLINE void add_unit(const int kind, const int rows, const int64_t left, const struct vectors *all, const uint8_t *const p[SIDES],
                          int64_t at, __m512 sums[SIDES][DIRECT]) {
    const int halves = halves_of(kind);
    const int64_t bytes = all->row_bytes, begin = row_bytes_of(kind, 32 * at);
    __m512 scale[SIDES][4], offset[SIDES][4];
#pragma GCC unroll 8
    for (int own = 0; own < unit_of(kind); own++) {
        if (own >= left) break;
        const uint32_t *pairs = all->pairs + 16 * (at + own) * rows;
        const float *within = all->within + halves * (at + own) * rows;
        struct bytes read[SIDES];
#pragma GCC unroll 2
        for (int side = 0; side < SIDES; side++) {
            if (own * halves % 4 == 0) scales_of(kind, 1, p[side] + begin, bytes, own * halves, scale[side], offset[side]);
            read_bytes(kind, p[side] + begin, bytes, own, read + side);
        }
        __m512 products[2][SIDES][DIRECT] = {0};
#pragma GCC unroll 16
        for (int pair = 0; pair < 16; pair++) {
            const int half = pair / 4 % 2;
#pragma GCC unroll 2
            for (int side = 0; side < SIDES; side++) {
                const __m512i codes = codes_of(kind, read + side, own, pair);
                soon(kind, p[side], bytes, at + own, pair);
#pragma GCC unroll 2
                for (int row = 0; row < rows; row++)
                    products[half][side][row] = _mm512_dpbf16_ps(products[half][side][row], (__m512bh)codes,
                                                                 (__m512bh)_mm512_set1_epi32((int)pairs[16 * row + pair]));
            }
        }
#pragma GCC unroll 2
        for (int side = 0; side < SIDES; side++)
#pragma GCC unroll 2
            for (int row = 0; row < rows; row++) {
                if (halves == 1) products[0][side][row] = _mm512_add_ps(products[0][side][row], products[1][side][row]);
#pragma GCC unroll 2
                for (int half = 0; half < halves; half++) {
                    const int step = (own * halves + half) % 4;
                    sums[side][row] = ADD(sums[side][row], scale[side][step], offset[side][step], products[half][side][row],
                                          within[half * rows + row]);
                }
            }
    }
}

/* Few rows of x with 32 of W. */
GGUF_INLINE void multiply_directly(const int kind, const int rows, const struct vectors *all, const uint8_t *const p[SIDES],
                                   __m512 (*out)[SIDES]) {
    __m512 sums[SIDES][DIRECT] = {0};
    int64_t at = 0;
    for (; at + unit_of(kind) <= all->blocks; at += unit_of(kind)) add_unit(kind, rows, unit_of(kind), all, p, at, sums);
    if (at < all->blocks) add_unit(kind, rows, all->blocks - at, all, p, at, sums);
#pragma GCC unroll 2
    for (int side = 0; side < SIDES; side++)
#pragma GCC unroll 2
        for (int row = 0; row < rows; row++) out[row][side] = sums[side][row];
}

/* A unit of 32 rows of W. */
struct unit {
    __m512i codes[8][16][SIDES];
    __m512 scales[16][SIDES], offsets[16][SIDES];
};

GGUF_INLINE void decode_unit(const int kind, const int64_t left, const struct vectors *all, const uint8_t *const p[SIDES], int64_t at,
                             struct unit *to) {
    const int halves = halves_of(kind);
    const int64_t bytes = all->row_bytes, begin = row_bytes_of(kind, 32 * at);
#pragma GCC unroll 2
    for (int side = 0; side < SIDES; side++) {
#pragma GCC unroll 8
        for (int own = 0; own < unit_of(kind); own++) {
            if (own >= left) break;
            struct bytes read;
            if (own * halves % 4 == 0) {
                __m512 scale[4], offset[4];
                scales_of(kind, 1, p[side] + begin, bytes, own * halves, scale, offset);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) to->scales[own * halves + i][side] = scale[i], to->offsets[own * halves + i][side] = offset[i];
            }
            read_bytes(kind, p[side] + begin, bytes, own, &read);
#pragma GCC unroll 16
            for (int pair = 0; pair < 16; pair++) {
                to->codes[own][pair][side] = codes_of(kind, &read, own, pair);
                soon(kind, p[side], bytes, at + own, pair);
            }
        }
    }
}

/* `rows` rows of x from `row` on, with the `left` first 32 values of a unit. */
GGUF_INLINE void multiply_unit(const int kind, const int rows, const struct vectors *all, const struct unit *unit, int64_t left, int64_t at,
                               int64_t row, __m512 (*out)[SIDES]) {
    const int halves = halves_of(kind);
    __m512 sums[AT_ONCE][SIDES];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int side = 0; side < SIDES; side++) sums[r][side] = out[row + r][side];
    for (int64_t own = 0; own < left; own++) {
        const uint32_t *pairs = all->pairs + 16 * ((at + own) * all->rows + row);
        const float *within = all->within + halves * (at + own) * all->rows + row;
        __m512 products[2][AT_ONCE][SIDES] = {0};
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const int pair = 8 * (i / 4) + 4 * half + i % 4;
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    const __m512bh x = (__m512bh)_mm512_set1_epi32((int)pairs[16 * r + pair]);
#pragma GCC unroll 2
                    for (int side = 0; side < SIDES; side++)
                        products[half][r][side] = _mm512_dpbf16_ps(products[half][r][side], (__m512bh)unit->codes[own][pair][side], x);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int side = 0; side < SIDES; side++) {
                if (halves == 1) products[0][r][side] = _mm512_add_ps(products[0][r][side], products[1][r][side]);
#pragma GCC unroll 2
                for (int half = 0; half < halves; half++) {
                    const int64_t step = own * halves + half;
                    sums[r][side] = ADD(sums[r][side], unit->scales[step][side], unit->offsets[step][side], products[half][r][side],
                                        within[half * all->rows + r]);
                }
            }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int side = 0; side < SIDES; side++) out[row + r][side] = sums[r][side];
}

/* Functions of their own: registers are given out for each. */
#define APART static GGUF __attribute__((noinline))
#define PRODUCTS(kind, rows)                                                                                                      \
    APART void multiply_##kind##_##rows(const struct vectors *all, const struct unit *unit, int64_t left, int64_t at, int64_t row, \
                                        __m512(*out)[SIDES]) {                                                                    \
        multiply_unit(kind, rows, all, unit, left, at, row, out);                                                                 \
    }
#define ALL_PRODUCTS(kind) \
    PRODUCTS(kind, 1) PRODUCTS(kind, 2) PRODUCTS(kind, 3) PRODUCTS(kind, 4)
ALL_PRODUCTS(Q4_0) /* as of all kinds whose 32 values are one step */
ALL_PRODUCTS(Q6_K)

typedef void product_body(const struct vectors *, const struct unit *, int64_t, int64_t, int64_t, __m512 (*)[SIDES]);

#define BODIES(kind) {multiply_##kind##_1, multiply_##kind##_2, multiply_##kind##_3, multiply_##kind##_4}
static product_body *const products_of[2][AT_ONCE] = {BODIES(Q4_0), BODIES(Q6_K)};

/* All rows of x with a unit, near enough equally many at a time. */
static GGUF void multiply(const int kind, const struct vectors *all, const struct unit *unit, int64_t left, int64_t at, __m512 (*out)[SIDES]) {
    const int64_t turns = (all->rows + AT_ONCE - 1) / AT_ONCE;
    for (int64_t turn = 0, row = 0; turn < turns; turn++) {
        const int64_t next = all->rows * (turn + 1) / turns;
        products_of[halves_of(kind) - 1][next - row - 1](all, unit, left, at, row, out);
        row = next;
    }
}

#define OF_KIND(kind)                                                                                                        \
    APART void one_row_##kind(const struct vectors *all, const uint8_t *const p[SIDES], __m512(*out)[SIDES]) {               \
        multiply_directly(kind, 1, all, p, out);                                                                             \
    }                                                                                                                        \
    APART void two_rows_##kind(const struct vectors *all, const uint8_t *const p[SIDES], __m512(*out)[SIDES]) {              \
        multiply_directly(kind, 2, all, p, out);                                                                             \
    }                                                                                                                        \
    APART void more_rows_##kind(const struct vectors *all, const uint8_t *const p[SIDES], __m512(*out)[SIDES]) {             \
        struct unit unit;                                                                                                    \
        int64_t at = 0;                                                                                                      \
        memset(out, 0, (size_t)all->rows * sizeof *out);                                                                     \
        for (; at + unit_of(kind) <= all->blocks; at += unit_of(kind)) {                                                     \
            decode_unit(kind, unit_of(kind), all, p, at, &unit);                                                             \
            multiply(kind, all, &unit, unit_of(kind), at, out);                                                              \
        }                                                                                                                    \
        if (at == all->blocks) return;                                                                                       \
        decode_unit(kind, all->blocks - at, all, p, at, &unit);                                                              \
        multiply(kind, all, &unit, all->blocks - at, at, out);                                                               \
    }
OF_KIND(Q4_0)
OF_KIND(Q4_1)
OF_KIND(Q5_0)
OF_KIND(Q5_1)
OF_KIND(Q8_0)
OF_KIND(Q4_K)
OF_KIND(Q5_K)
OF_KIND(Q6_K)

typedef void rows_body(const struct vectors *, const uint8_t *const *, __m512 (*)[SIDES]);

static rows_body *body_of(int64_t kind, int64_t rows) {
#define EACH(kind) case kind: return rows == 1 ? one_row_##kind : rows == 2 ? two_rows_##kind : more_rows_##kind;
    switch (kind) {
        EACH(Q4_0) EACH(Q4_1) EACH(Q5_0) EACH(Q5_1) EACH(Q8_0) EACH(Q4_K) EACH(Q5_K)
    default: return rows == 1 ? one_row_Q6_K : rows == 2 ? two_rows_Q6_K : more_rows_Q6_K;
    }
#undef EACH
}

/* y of 16 rows of W, or fewer, from `out` on, of one row of x. */
GGUF_INLINE void put(const struct vectors *all, const struct gguf_weight *w, int64_t out, int64_t row, __m512 sums) {
    const __mmask16 mask = (__mmask16)((1u << least(16, w->outs - out)) - 1);
    if (w->bias != NULL) {
        const __m512i bias = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w->bias + out));
        sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(bias, 16)));
    }
    _mm256_mask_storeu_epi16(w->y + (all->first + row) * w->outs + out, mask, (__m256i)_mm512_cvtneps_pbh(sums));
}

/* 16 rows of W from `out` on, where 16 and what is behind them may be read. */
static const uint8_t *readable(const struct vectors *all, const struct gguf_weight *w, int64_t out, uint8_t *room) {
    const int64_t bytes = all->row_bytes, left = (w->outs - out) * bytes, own = least(left, 16 * bytes);
    if (left >= 16 * bytes + BEYOND) return w->blocks + out * bytes;
    memcpy(room, w->blocks + out * bytes, (size_t)own);
    memset(room + own, 0, (size_t)(16 * bytes + BEYOND - own));
    return room;
}

INLINE int64_t groups_of(const struct gguf_weight *w) { return (w->outs + 16 * SIDES - 1) / (16 * SIDES); }

/* Groups [start, stop) of 32 rows of W, those of a weight behind those of the one before. */
static GGUF void groups(const struct vectors *all, int64_t start, int64_t stop) {
    const struct gguf_weight *w = all->of->weights;
    rows_body *const body = body_of(all->of->kind, all->rows);
    __m512 sums[MOST_X][SIDES];
    int64_t before = 0;
    for (int64_t number = start; number < stop; number++) {
        while (number - before >= groups_of(w)) before += groups_of(w++);
        const int64_t out = 16 * SIDES * (number - before);
        uint8_t *room = all->last + (w - all->of->weights) * SIDES * all->last_bytes;
        const uint8_t *p[SIDES] = {readable(all, w, out, room)};
        for (int side = 1; side < SIDES; side++)
            p[side] = out + 16 * side < w->outs ? readable(all, w, out + 16 * side, room + side * all->last_bytes) : p[0];
        body(all, p, sums);
        for (int side = 0; side < SIDES && out + 16 * side < w->outs; side++)
            for (int64_t row = 0; row < all->rows; row++) put(all, w, out + 16 * side, row, sums[row][side]);
    }
}

/* What one thread does, as long as there are runs. */
static void products(void *arguments, int64_t start, int64_t stop) {
    struct vectors *all = arguments;
    (void)start, (void)stop;
    for (int64_t from, to; (to = gguf_take_run(&all->runs, &from)) > 0;) groups(all, from, to);
}

int gguf_vector_product(const struct gguf_product *of) {
    const int64_t blocks = of->width / 32, steps = blocks * halves_of((int)of->kind), most = least(of->rows, MOST_X);
    const int64_t bytes = row_bytes_of(of->kind, of->width), last_bytes = 16 * bytes + BEYOND;
    struct vectors all = {of, NULL, NULL, NULL, 0, 0, blocks, bytes, last_bytes, {0, 0, 0}};
    void *memory = NULL;
    if (posix_memalign(&memory, 64, (size_t)(most * (64 * blocks + 4 * steps) + of->count * SIDES * last_bytes))) return 1;
    all.pairs = memory;
    all.within = (float *)(all.pairs + 16 * most * blocks);
    all.last = (uint8_t *)(all.within + most * steps);
    for (int64_t i = 0; i < of->count; i++) all.runs.groups += groups_of(of->weights + i);
    for (; all.first < of->rows; all.first += all.rows) {
        all.rows = least(most, of->rows - all.first);
        pair_up(&all);
        const int64_t threads = gguf_set_out(&all.runs, 1 + ALONE / (16 * SIDES * of->width * (1 + all.rows / 16)), veneer_threads());
        veneer_parallel(products, &all, threads, 1);
    }
    free(memory);
    return 0;
}

#else

int gguf_vector_product(const struct gguf_product *of) {
    (void)of;
    return 1;
}

#endif
