/* Products of many rows with bf16 weights: see kernels/dense/products.py for what is computed. Some
   columns of W are laid out as pairs and stay in the second cache while x goes by, a few rows at a
   time, read where they lie. Sums go over all of K before they are rounded, once, in an order that
   neither the rows and columns beside them nor the threads change: on AMX tiles in steps of 16
   pairs, as those of few_rows_tiles.c, else pair by pair. */
#include "bf16.h"
#include "parallel.h"
#include "products.h"
#include <stdlib.h>
#include <string.h>

int veneer_has_bf16(void);

#if defined(__x86_64__)

enum {
    SIDE = 32,
    STEP = SIDE * SIDE / 2, /* words of W that meet 32 columns of x: two tiles */
};

static void *room_of(int64_t bytes) {
    void *found = NULL;
    if (posix_memalign(&found, 64, (size_t)bytes)) abort();
    return found;
}

static int64_t most(int64_t n) { return n < SIDE ? n : SIDE; }

VENEER_INLINE __m512i some(const uint16_t *from, int64_t n) {
    return n >= SIDE ? _mm512_loadu_si512(from)
           : n <= 0  ? _mm512_setzero_si512()
                     : _mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), from);
}

/* 32 rows of k and 32 columns of W (K, N) as two tiles of pairs; what is beyond k or n is 0. */
VENEER_INLINE void pack_along(const uint16_t *w, int64_t row, int64_t k, int64_t n, uint32_t *to) {
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = _mm512_or_si512(
        count, _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16 << 16 | 16));
    for (int64_t i = 0; i < 16; i++) {
        const __m512i first = 2 * i < k ? some(w + 2 * i * row, n) : _mm512_setzero_si512();
        const __m512i second =
            2 * i + 1 < k ? some(w + (2 * i + 1) * row, n) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + 16 * i, _mm512_permutex2var_epi16(first, low, second));
        _mm512_storeu_si512(to + STEP / 2 + 16 * i, _mm512_permutex2var_epi16(first, high, second));
    }
}

/* The same of W (N, K). */
VENEER_INLINE void pack_across(const uint16_t *w, int64_t row, int64_t k, int64_t n, uint32_t *to) {
    if (k >= SIDE && n >= SIDE) {
        words_across((const uint32_t *)w, row / 2, 16, to);
        words_across((const uint32_t *)(w + 16 * row), row / 2, 16, to + STEP / 2);
        return;
    }
    uint32_t whole[STEP];
    for (int64_t i = 0; i < SIDE; i++)
        _mm512_storeu_si512(whole + 16 * i, i < n ? some(w + i * row, k) : _mm512_setzero_si512());
    words_across(whole, 16, 16, to);
    words_across(whole + STEP / 2, 16, 16, to + STEP / 2);
}

/* W's columns [n0, n0 + 32) in `steps` steps of k from k0 on; what the next columns are made of is
 * asked for. */
static VENEER_BF16 void pack_panel(const struct product *a, int64_t n0, int64_t k0, int64_t steps,
                                   uint32_t *to) {
    const int64_t n = most(a->outs - n0), ahead = n0 + 2 * SIDE <= a->outs;
    for (int64_t k = k0; k < k0 + steps * SIDE; k += SIDE, to += STEP) {
        const int64_t left = a->width - k;
        if (a->along) {
            const uint16_t *w = a->w + k * a->outs + n0;
            for (int64_t i = 0; ahead && i < most(left); i++)
                _mm_prefetch(w + i * a->outs + SIDE, _MM_HINT_T1);
            pack_along(w, a->outs, left, n, to);
        } else {
            const uint16_t *w = a->w + n0 * a->width + k;
            for (int64_t i = 0; ahead && i < SIDE; i++)
                _mm_prefetch(w + (SIDE + i) * a->width, _MM_HINT_T1);
            pack_across(w, a->width, left, n, to);
        }
    }
}

VENEER_INLINE __m512 half_of(__m512i x, int second) {
    const __m256i half = second ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* y of up to 32 rows and columns; sums (32, 32). */
static VENEER_BF16 void finish(const struct product *a, const float *sums, int64_t m, int64_t rows,
                               int64_t n0) {
    const int64_t n = most(a->outs - n0);
    const __mmask32 real = n == SIDE ? ~(__mmask32)0 : (__mmask32)((1u << n) - 1);
    const __m512i bias = a->bias ? some(a->bias + n0, n) : _mm512_setzero_si512();
    for (int64_t r = 0; r < rows; r++) {
        uint16_t *y = a->y + (m + r) * a->outs + n0;
        __m512 first = _mm512_loadu_ps(sums + r * SIDE),
               second = _mm512_loadu_ps(sums + r * SIDE + 16);
        if (a->bias)
            first = _mm512_add_ps(first, half_of(bias, 0)),
            second = _mm512_add_ps(second, half_of(bias, 1));
        if (a->add) {
            const __m512i before = some(y, n);
            first = _mm512_add_ps(first, half_of(before, 0)),
            second = _mm512_add_ps(second, half_of(before, 1));
        }
        if (n == SIDE)
            _mm512_storeu_si512(
                y, (__m512i)_mm512_cvtne2ps_pbh(second, first)); /* masked ones take longer */
        else _mm512_mask_storeu_epi16(y, real, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
}

enum {
    PAIRED = 14,      /* rows of x at once */
    ROWS = 256,       /* of x whose sums wait for the next steps */
    WHOLE = 48,       /* steps of W up to which none wait */
    SOME = 16,        /* steps at once beyond: 14 rows of x are 14 KiB of the first cache */
    KEPT = 576 << 10, /* bytes of W */
    MEETING = 2048, /* rows of x that lie so many bytes apart, or twice as many ..., share few lines
                       of the first cache */
};

/* `count` pairs of R rows of x, `row` values apart, and of 32 columns of W, in 2 R registers; to
 * sums (R, 32). */
VENEER_INLINE void multiply_pairs(const int R, const uint16_t *x, int64_t row, int64_t count,
                                  const uint32_t *pairs, float *sums, int add) {
    __m512 low[PAIRED], high[PAIRED];
    UNROLLED(14, r, R) {
        low[r] = add ? _mm512_load_ps(sums + r * SIDE) : _mm512_setzero_ps();
        high[r] = add ? _mm512_load_ps(sums + r * SIDE + 16) : _mm512_setzero_ps();
    }
    for (int64_t step = 0; step < count; step += 16, pairs += STEP)
        for (int64_t p = step, stop = count - step < 16 ? count : step + 16; p < stop; p++) {
            const uint32_t *own = pairs + 16 * (p - step);
            const __m512bh first = (__m512bh)_mm512_load_si512(own),
                           second = (__m512bh)_mm512_load_si512(own + STEP / 2);
            UNROLLED(14, r, R) {
                int32_t pair;
                __builtin_memcpy(&pair, x + r * row + 2 * p, 4);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                low[r] = _mm512_dpbf16_ps(low[r], both, first);
                high[r] = _mm512_dpbf16_ps(high[r], both, second);
            }
        }
    UNROLLED(14, r, R) {
        _mm512_store_ps(sums + r * SIDE, low[r]);
        _mm512_store_ps(sums + r * SIDE + 16, high[r]);
    }
}

static VENEER_BF16 void some_pairs(int64_t rows, const uint16_t *x, int64_t row, int64_t count,
                                   const uint32_t *pairs, float *sums, int add) {
    switch (rows) {
#define OF(R)                                                                                      \
    case R: multiply_pairs(R, x, row, count, pairs, sums, add); break
        OF(1);
        OF(2);
        OF(3);
        OF(4);
        OF(5);
        OF(6);
        OF(7);
        OF(8);
        OF(9);
        OF(10);
        OF(11);
        OF(12);
        OF(13);
        OF(14);
#undef OF
    }
}

/* What a thread works with: of W pairs (panels, steps); sums (panels, rows, 32), or NULL where all
   of K goes at once; of x PAIRED rows side by side, or NULL where they are read as they lie. */
struct near {
    uint32_t *pairs;
    float *sums;
    uint16_t *x;
};

/* What is read after what is at hand, of which piece `number` of `pieces` is asked for: rows of x,
   values [k, k + wide). */
static VENEER_BF16 void ask_for_x(const struct product *a, int64_t row, int64_t rows, int64_t k,
                                  int64_t wide, int64_t number, int64_t pieces) {
    for (int64_t r = row + number; r < row + rows && r < a->rows; r += pieces)
        for (int64_t i = 0; i < wide; i += SIDE)
            _mm_prefetch(a->x + r * a->width + k + i, _MM_HINT_T1);
}

/* The same of W: `steps` steps from k on of some panels from column n on, as far as there are any.
 */
struct soon {
    int64_t n, panels, k, steps;
};

static VENEER_BF16 void ask_for_w(const struct product *a, const struct soon *w, int64_t number,
                                  int64_t pieces) {
    const int64_t k = w->k + w->steps * SIDE < a->width ? w->k + w->steps * SIDE : a->width;
    const int64_t n = w->n + w->panels * SIDE < a->outs ? w->n + w->panels * SIDE : a->outs;
    const int64_t from = a->along ? w->k : w->n, lines = (a->along ? k : n) - from;
    const int64_t begin = a->along ? w->n : w->k, end = a->along ? n : k,
                  row = a->along ? a->outs : a->width;
    for (int64_t r = lines * number / pieces; r < lines * (number + 1) / pieces; r++)
        for (int64_t i = begin; i < end; i += SIDE)
            _mm_prefetch(a->w + (from + r) * row + i, _MM_HINT_T1);
}

/* What `steps` steps from `from` on add to panels [first, first + panels) of rows [begin, end),
   near enough equally many rows at a time. */
static VENEER_BF16 void add_steps(const struct product *a, int64_t first, int64_t panels,
                                  int64_t begin, int64_t end, int64_t from, int64_t steps,
                                  const struct near *near, const struct soon *soon) {
    const int64_t rows = end - begin, turns = (rows + PAIRED - 1) / PAIRED;
    const int64_t left = (a->width - from * SIDE) / 2,
                  count = left < 16 * steps ? left : 16 * steps, last = left <= 16 * steps;
    _Alignas(64) float some_sums[PAIRED * SIDE];
    for (int64_t turn = 0; turn < turns; turn++) {
        const int64_t m = rows * turn / turns, some = rows * (turn + 1) / turns - m;
        const uint16_t *x = a->x + (begin + m) * a->width + from * SIDE;
        const int64_t apart = near->x ? 2 * count + SIDE : a->width;
        for (int64_t r = 0; near->x && r < some; r++)
            memcpy(near->x + r * apart, x + r * a->width, (size_t)(4 * count));
        if (near->x) x = near->x;
        for (int64_t i = 0; i < panels; i++) {
            const uint32_t *pairs = near->pairs + i * steps * STEP;
            float *sums = near->sums ? near->sums + (i * rows + m) * SIDE : some_sums;
            ask_for_x(a, begin + m + some, some, from * SIDE, 2 * count, i, panels);
            ask_for_w(a, soon, turn * panels + i, turns * panels);
            for (int64_t r = begin + m; last && r < begin + m + some; r++)
                __builtin_prefetch(a->y + r * a->outs + (first + i) * SIDE, 1);
            some_pairs(some, x, apart, count, pairs, sums, from > 0);
            if (last) finish(a, sums, begin + m, some, (first + i) * SIDE);
        }
    }
}

/* How a product is dealt: a thread that began with panel p is likely to go on with panel p + next.
 */
struct dealt {
    const struct product *a;
    int64_t next;
};

/* Items are panels of 32 columns. */
static VENEER_BF16 void paired_body(void *arguments, int64_t from, int64_t to) {
    const struct dealt *dealt = arguments;
    const struct product *a = dealt->a;
    const int64_t all = (a->width + SIDE - 1) / SIDE, depth = all <= WHOLE ? all : SOME;
    const int64_t fit = KEPT / (4 * STEP * depth), items = to - from,
                  held = fit < 1       ? 1
                         : fit < items ? fit
                                       : items;
    const int64_t rows = depth < all && a->rows > ROWS ? ROWS : a->rows;
    const struct near near = {
        room_of(4 * held * depth * STEP),
        depth < all ? room_of(4 * held * rows * SIDE) : NULL,
        2 * a->width % MEETING == 0 ? room_of(2 * PAIRED * (depth + 1) * SIDE) : NULL,
    };
    for (int64_t first = from; first < to; first += held) {
        const int64_t panels = to - first < held ? to - first : held;
        const int64_t behind = first + held < to ? first + held : from + dealt->next;
        for (int64_t m = 0; m < a->rows; m += rows)
            for (int64_t s = 0; s < all; s += depth) {
                const int64_t steps = all - s < depth ? all - s : depth,
                              end = a->rows - m < rows ? a->rows : m + rows;
                const int64_t over = s + depth >= all, same = !over || m + rows < a->rows;
                const struct soon soon = {(same ? first : behind) * SIDE, panels,
                                          over ? 0 : (s + depth) * SIDE, depth};
                for (int64_t i = 0; i < panels; i++)
                    pack_panel(a, (first + i) * SIDE, s * SIDE, steps,
                               near.pairs + i * steps * STEP);
                add_steps(a, first, panels, m, end, s, steps, &near, &soon);
            }
    }
    free(near.pairs), free(near.sums), free(near.x);
}

#if defined(VENEER_AMX_COMPILED)

enum {
    HELD = 1 << 20, /* bytes of W at once */
    NEAR = 18,      /* steps of x that stay in the first cache */
};

/* 32 rows of x from column k on as tiles, two for each step; what is beyond the last row or the
 * last column is 0. */
static VENEER_AMX void pack_rows(const struct product *a, int64_t m, int64_t k, int64_t count,
                                 uint16_t *to) {
    const int64_t real = most(a->rows - m);
    for (int64_t s = 0; s < count; s++, k += SIDE, to += 2 * STEP)
        for (int64_t r = 0; r < SIDE; r++) {
            const __m512i x = r < real ? some(a->x + (m + r) * a->width + k, a->width - k)
                                       : _mm512_setzero_si512();
            _mm512_storeu_si512(to + r * SIDE, x);
        }
}

/* sums (32, 32) [+]= x of `count` steps, which stays in the first cache, times pairs, which pass
   by. x's rows are `row` values apart, its steps `next`. */
VENEER_AMX_INLINE void multiply(const uint16_t *x, int64_t row, int64_t next, const uint32_t *pairs,
                                int64_t count, float *sums, int add) {
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
static VENEER_AMX void tiled_body(void *arguments, int64_t from, int64_t to) {
    const struct product *a = arguments;
    const int64_t all = (a->width + SIDE - 1) / SIDE, fit = HELD / (4 * STEP * all),
                  items = to - from;
    const int64_t held = fit < 1 ? 1 : fit < items ? fit : items;
    uint32_t *pairs = room_of(4 * (held * all * STEP + NEAR * STEP + held * SIDE * SIDE));
    uint16_t *packed = (uint16_t *)(pairs + held * all * STEP);
    float *sums = (float *)(packed + 2 * NEAR * STEP);
    amx_shapes(16, 0);
    for (int64_t first = from; first < to; first += held) {
        const int64_t panels = to - first < held ? to - first : held;
        for (int64_t i = 0; i < panels; i++)
            pack_panel(a, (first + i) * SIDE, 0, all, pairs + i * all * STEP);
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
                    for (int64_t k = i; k < count && m + 2 * SIDE <= a->rows;
                         k += panels) /* of the next rows */
                        for (int64_t r = 0; r < SIDE; r++)
                            _mm_prefetch(next + r * a->width + k * SIDE, _MM_HINT_T1);
                    for (int64_t r = 0; last && r < real; r++)
                        __builtin_prefetch(a->y + (m + r) * a->outs + n0, 1);
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
    free(pairs);
}

#endif

int veneer_product(struct product *a) {
    const int64_t panels = (a->outs + SIDE - 1) / SIDE;
    if (!veneer_has_bf16()) return 1;
#if defined(VENEER_AMX_COMPILED)
    if (veneer_has_amx()) {
        veneer_parallel_dealt(tiled_body, a, panels, 1, 3);
        return 0;
    }
#endif
    /* A run reads all of x, which no cache holds where K goes in parts. */
    const int64_t turns = a->width > WHOLE * SIDE ? 1 : 3;
    struct dealt dealt = {a, (panels + turns - 1) / turns};
    veneer_parallel_dealt(paired_body, &dealt, panels, 1, turns);
    return 0;
}

#elif !defined(__aarch64__)

int veneer_product(struct product *a) {
    (void)a;
    return 1;
}

#endif
