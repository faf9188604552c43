/* Products of many rows with bf16 weights on AMX tiles: see kernels/products.py for what is computed. Some columns of W
   are laid out as pairs and stay in the second cache while x goes by, 32 rows at a time, read where they lie. Sums of 32
   rows and 32 columns go over all of K before they are rounded, once; in steps of 16 pairs from the first to the last,
   whichever rows and columns are computed beside them and by whichever thread, as those of few_rows_tiles.c. */
#include "bf16.h"
#include "parallel.h"
#include <stdlib.h>

/* y (rows, outs) = x (rows, width) times w: (outs, width), or, where it lies along, (width, outs). + bias, unless it is
   NULL; add: + what y was. kernels/product_calls.py has the same fields. */
struct product {
    const uint16_t *x, *w, *bias;
    uint16_t *y;
    int64_t rows, width, outs, along, add;
};

#if defined(VENEER_AMX_COMPILED)

enum {
    SIDE = 32,
    STEP = SIDE * SIDE / 2, /* words of W that meet 32 columns of x: two tiles */
    HELD = 1 << 20,         /* bytes of W at once */
    NEAR = 18,              /* steps of x that stay in the first cache */
};

static int64_t most(int64_t n) { return n < SIDE ? n : SIDE; }

VENEER_AMX_INLINE __m512i some(const uint16_t *from, int64_t n) {
    return n >= SIDE ? _mm512_loadu_si512(from)
                     : n <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), from);
}

/* 32 rows of k and 32 columns of W (K, N) as two tiles of pairs; what is beyond k or n is 0. */
VENEER_AMX_INLINE void pack_along(const uint16_t *w, int64_t row, int64_t k, int64_t n, uint32_t *to) {
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = _mm512_or_si512(count, _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16 << 16 | 16));
    for (int64_t i = 0; i < 16; i++) {
        const __m512i first = 2 * i < k ? some(w + 2 * i * row, n) : _mm512_setzero_si512();
        const __m512i second = 2 * i + 1 < k ? some(w + (2 * i + 1) * row, n) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + 16 * i, _mm512_permutex2var_epi16(first, low, second));
        _mm512_storeu_si512(to + STEP / 2 + 16 * i, _mm512_permutex2var_epi16(first, high, second));
    }
}

/* The same of W (N, K). */
VENEER_AMX_INLINE void pack_across(const uint16_t *w, int64_t row, int64_t k, int64_t n, uint32_t *to) {
    if (k >= SIDE && n >= SIDE) {
        amx_across((const uint32_t *)w, row / 2, 16, to);
        amx_across((const uint32_t *)(w + 16 * row), row / 2, 16, to + STEP / 2);
        return;
    }
    uint32_t whole[STEP];
    for (int64_t i = 0; i < SIDE; i++) _mm512_storeu_si512(whole + 16 * i, i < n ? some(w + i * row, k) : _mm512_setzero_si512());
    amx_across(whole, 16, 16, to);
    amx_across(whole + STEP / 2, 16, 16, to + STEP / 2);
}

/* W's columns [n0, n0 + 32); what the next ones are made of is asked for. */
static VENEER_AMX void pack_panel(const struct product *a, int64_t n0, uint32_t *to) {
    const int64_t n = most(a->outs - n0), ahead = n0 + 2 * SIDE <= a->outs;
    for (int64_t k = 0; k < a->width; k += SIDE, to += STEP) {
        const int64_t left = a->width - k;
        if (a->along) {
            const uint16_t *w = a->w + k * a->outs + n0;
            for (int64_t i = 0; ahead && i < most(left); i++) _mm_prefetch(w + i * a->outs + SIDE, _MM_HINT_T1);
            pack_along(w, a->outs, left, n, to);
        } else {
            const uint16_t *w = a->w + n0 * a->width + k;
            for (int64_t i = 0; ahead && i < SIDE; i++) _mm_prefetch(w + (SIDE + i) * a->width, _MM_HINT_T1);
            pack_across(w, a->width, left, n, to);
        }
    }
}

/* 32 rows of x from column k on as tiles, two for each step; what is beyond the last row or the last column is 0. */
static VENEER_AMX void pack_rows(const struct product *a, int64_t m, int64_t k, int64_t count, uint16_t *to) {
    const int64_t real = most(a->rows - m);
    for (int64_t s = 0; s < count; s++, k += SIDE, to += 2 * STEP)
        for (int64_t r = 0; r < SIDE; r++) {
            const __m512i x = r < real ? some(a->x + (m + r) * a->width + k, a->width - k) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + r * SIDE, x);
        }
}

VENEER_AMX_INLINE __m512 half_of(__m512i x, int second) {
    const __m256i half = second ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* y of up to 32 rows and columns; sums (32, 32). */
static VENEER_AMX void finish(const struct product *a, const float *sums, int64_t m, int64_t rows, int64_t n0) {
    const int64_t n = most(a->outs - n0);
    const __mmask32 real = n == SIDE ? ~(__mmask32)0 : (__mmask32)((1u << n) - 1);
    const __m512i bias = a->bias ? some(a->bias + n0, n) : _mm512_setzero_si512();
    for (int64_t r = 0; r < rows; r++) {
        uint16_t *y = a->y + (m + r) * a->outs + n0;
        __m512 first = _mm512_loadu_ps(sums + r * SIDE), second = _mm512_loadu_ps(sums + r * SIDE + 16);
        if (a->bias) first = _mm512_add_ps(first, half_of(bias, 0)), second = _mm512_add_ps(second, half_of(bias, 1));
        if (a->add) {
            const __m512i before = some(y, n);
            first = _mm512_add_ps(first, half_of(before, 0)), second = _mm512_add_ps(second, half_of(before, 1));
        }
        _mm512_mask_storeu_epi16(y, real, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
}

/* sums (32, 32) [+]= x of `count` steps, which stays in the first cache, times pairs, which pass by. x's rows are `row`
   values apart, its steps `next`. */
VENEER_AMX_INLINE void multiply(const uint16_t *x, int64_t row, int64_t next, const uint32_t *pairs, int64_t count, float *sums, int add) {
    if (add) {
        _tile_loadd(0, sums, 128);
        _tile_loadd(1, sums + 16, 128);
        _tile_loadd(2, sums + 16 * SIDE, 128);
        _tile_loadd(3, sums + 16 * SIDE + 16, 128);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < count; k++, pairs += STEP, x += next) {
        _tile_loadd(4, x, 2 * row);
        _tile_stream_loadd(6, pairs, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, pairs + STEP / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x + 16 * row, 2 * row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * SIDE, 128);
    _tile_stored(3, sums + 16 * SIDE + 16, 128);
    __asm__ volatile("" ::: "memory");
}

/* Items are panels of 32 columns. */
static VENEER_AMX void product_body(void *arguments, int64_t from, int64_t to) {
    const struct product *a = arguments;
    const int64_t all = (a->width + SIDE - 1) / SIDE, fit = HELD / (4 * STEP * all), items = to - from;
    const int64_t held = fit < 1 ? 1 : fit < items ? fit : items;
    void *room = NULL;
    if (posix_memalign(&room, 64, (size_t)(4 * (held * all * STEP + NEAR * STEP + held * SIDE * SIDE)))) abort();
    uint32_t *pairs = room;
    uint16_t *packed = (uint16_t *)(pairs + held * all * STEP);
    float *sums = (float *)(packed + 2 * NEAR * STEP);
    amx_shapes(16, 0);
    for (int64_t first = from; first < to; first += held) {
        const int64_t panels = to - first < held ? to - first : held;
        for (int64_t i = 0; i < panels; i++) pack_panel(a, (first + i) * SIDE, pairs + i * all * STEP);
        for (int64_t m = 0; m < a->rows; m += SIDE) {
            const int64_t real = most(a->rows - m);
            for (int64_t s = 0; s < all; s += NEAR) {
                const int64_t count = all - s < NEAR ? all - s : NEAR, last = s + count == all;
                const int64_t whole = real == SIDE && (s + count) * SIDE <= a->width;
                const uint16_t *x = a->x + m * a->width + s * SIDE, *next = x + SIDE * a->width;
                if (!whole) pack_rows(a, m, s * SIDE, count, packed);
                __asm__ volatile("" ::: "memory");
                for (int64_t i = 0; i < panels; i++) {
                    const int64_t n0 = (first + i) * SIDE;
                    const uint32_t *own = pairs + (i * all + s) * STEP;
                    for (int64_t k = i; k < count && m + 2 * SIDE <= a->rows; k += panels) /* of the next rows */
                        for (int64_t r = 0; r < SIDE; r++) _mm_prefetch(next + r * a->width + k * SIDE, _MM_HINT_T1);
                    for (int64_t r = 0; last && r < real; r++) __builtin_prefetch(a->y + (m + r) * a->outs + n0, 1);
                    if (whole)
                        multiply(x, a->width, SIDE, own, count, sums + i * SIDE * SIDE, s > 0);
                    else
                        multiply(packed, SIDE, 2 * STEP, own, count, sums + i * SIDE * SIDE, s > 0);
                    if (last) finish(a, sums + i * SIDE * SIDE, m, real, n0);
                }
            }
        }
    }
    _tile_release();
    free(room);
}

/* 1: there are no tiles here. */
int veneer_product(struct product *a) {
    if (!veneer_has_amx()) return 1;
    veneer_parallel(product_body, a, (a->outs + SIDE - 1) / SIDE, 1);
    return 0;
}

#else

int veneer_product(struct product *a) {
    (void)a;
    return 1;
}

#endif
