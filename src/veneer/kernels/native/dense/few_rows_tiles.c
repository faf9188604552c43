/* The products of few_rows.c on AMX tiles, bf16: y^T = W x^T.

   A tile of W is 16 of its rows and 32 values, read where they lie; one of x 16 pairs of 16 rows,
   turned once in a call (words_turned). A sum goes along the width in steps of 32 values, from the
   first to the last, and no tile's shape, nor what else it holds, changes it: the same bits for a
   row alone and among any others. Rows and values that are missing in the last tiles are zeros, or
   are not there; nothing is read behind W's end or x's. */
#include "few_rows.h"
#include "amx.h"
#include <stddef.h>
#include <stdlib.h>

#if defined(VENEER_AMX_COMPILED)

enum {
    GROUP = 32,      /* rows of W at a time: two tiles */
    TILE = 256,      /* words of a tile */
    NEAR = 1 << 20,  /* bytes of x that stay in the second cache while W goes by */
    MOST = 1 << 23,  /* bytes of x that are turned at a time */
    TOGETHER = 1024, /* rows of x at most, however short */
    CHUNK = 9,       /* steps: W's two tiles of so many stay in the first cache while x goes by */
    READ = 12,       /* what reading a tile of W costs, in tiles of products */
    PACKED_ALONE = 512, /* tiles of x that are not worth a second thread */
};

/* Rows [from, to) of x, turned: tiles of 16 rows and 32 values, those of a row behind one another.
 */
struct work {
    const struct piece *of;
    const char *x;
    uint32_t *turned;
    int64_t count, width, apart, steps, from, to, room;
    int failed;
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t groups_of(const struct piece *part) { return (part->outs + GROUP - 1) / GROUP; }

/* Where the rows of a piece begin among those of x. */
INLINE int64_t first_of(const struct work *all, const struct piece *part) {
    return all->apart == 0 ? 0 : ((const char *)part->x - all->x) / (2 * all->apart);
}

/* Rows [first, last) of x that a piece has among those turned. */
INLINE int64_t begin_of(const struct work *all, const struct piece *part) {
    const int64_t first = first_of(all, part);
    return first > all->from ? first : all->from;
}

INLINE int64_t end_of(const struct work *all, const struct piece *part) {
    return least(first_of(all, part) + part->rows, all->to);
}

INLINE int64_t cost_of(const struct work *all, const struct piece *part) {
    const int64_t rows = end_of(all, part) - begin_of(all, part);
    return rows > 0 ? (rows + 15) / 16 + READ : 0;
}

/* Tiles [start, stop) of x. */
static VENEER_AMX void turn_rows(void *arguments, int64_t start, int64_t stop) {
    const struct work *all = arguments;
    for (int64_t item = start; item < stop; item++) {
        const int64_t row = all->from + item / all->steps * 16, value = item % all->steps * 32;
        const int64_t rows = least(16, all->to - row), values = least(32, all->width - value);
        const __mmask32 mask = values == 32 ? 0xffffffffu : (((uint32_t)1 << values) - 1);
        const char *x = all->x + 2 * (row * all->apart + value);
        __m512i words[16];
        UNROLLED(16, r, 16)
            words[r] = r < rows ? _mm512_maskz_loadu_epi16(mask, x + 2 * r * all->apart)
                                : _mm512_setzero_si512();
        words_turned(words, all->turned + item * TILE);
    }
}

/* Two rows of sums to one of pairs, rounded as bf16_of_float. */
VENEER_AMX_INLINE __m512i rounded_pairs(__m512 low, __m512 high) {
    const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    __m512i a = _mm512_castps_si512(low), b = _mm512_castps_si512(high);
    a = _mm512_add_epi32(_mm512_add_epi32(a, half),
                         _mm512_and_si512(_mm512_srli_epi32(a, 16), one));
    b = _mm512_add_epi32(_mm512_add_epi32(b, half),
                         _mm512_and_si512(_mm512_srli_epi32(b, 16), one));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b);
}

/* Sums (16 outs, 16 rows) of which `outs` are there, to columns [out, out + outs) of y's rows; of
   the tile's own rows [begin, end), the first of which lies at y. */
VENEER_AMX_INLINE void put_tile(const struct piece *part, const float *sums, int64_t out,
                                int64_t outs, char *y, int64_t begin, int64_t end) {
    const uint16_t *bias = part->bias == NULL ? NULL : (const uint16_t *)part->bias + out;
    const __mmask16 mask = (__mmask16)((1u << outs) - 1);
    y += 2 * out;
    if (end - begin == 1) {
        float own[16];
        for (int i = 0; i < 16; i++) own[i] = sums[16 * i + begin];
        __m512 row = _mm512_loadu_ps(own);
        if (bias != NULL)
            row = _mm512_add_ps(
                row, _mm512_castsi512_ps(_mm512_slli_epi32(
                         _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias)), 16)));
        _mm256_mask_storeu_epi16(y, mask,
                                 _mm512_cvtepi32_epi16(rounded_pairs(row, _mm512_setzero_ps())));
        return;
    }
    __m512i a[8], b[8];
    UNROLLED(8, i, 8) {
        __m512 low = _mm512_loadu_ps(sums + 32 * i), high = _mm512_loadu_ps(sums + 32 * i + 16);
        if (bias != NULL) {
            low = _mm512_add_ps(
                low, _mm512_set1_ps(2 * i < outs ? float_of_bits((uint32_t)bias[2 * i] << 16) : 0));
            high = _mm512_add_ps(
                high, _mm512_set1_ps(
                          2 * i + 1 < outs ? float_of_bits((uint32_t)bias[2 * i + 1] << 16) : 0));
        }
        a[i] = rounded_pairs(low, high);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* a[j], a[j + 4]: of rows j, 4 + j, 8 + j, 12 + j the first and the last eight outs */
    const __m512i near = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  far = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    __m256i rows[16];
    UNROLLED(4, j, 4) {
        __m512i low = _mm512_permutex2var_epi64(a[j], near, a[j + 4]),
                high = _mm512_permutex2var_epi64(a[j], far, a[j + 4]);
        rows[j] = _mm512_castsi512_si256(low), rows[4 + j] = _mm512_extracti64x4_epi64(low, 1);
        rows[8 + j] = _mm512_castsi512_si256(high),
                 rows[12 + j] = _mm512_extracti64x4_epi64(high, 1);
    }
    const int64_t step = 2 * part->outs;
    if (outs == 16 && begin == 0 && end == 16) {
        UNROLLED(16, r, 16) _mm256_storeu_si256((__m256i *)(y + r * step), rows[r]);
        return;
    }
    __m256i kept[16];
    memcpy(kept, rows, sizeof kept);
    for (int64_t r = begin; r < end; r++)
        _mm256_mask_storeu_epi16(y + (r - begin) * step, mask, kept[r]);
}

/* Tiles 0 to 3: sums, of the first 16 rows of W and of those behind; 4, 5: these rows; 6, 7: x. */
VENEER_AMX_INLINE void shapes_of(int64_t outs) {
    const uint8_t one = (uint8_t)least(outs, 16), two = (uint8_t)(outs > 16 ? outs - 16 : 1);
    const struct tiles shapes = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {one, one, two, two, one, two, 16, 16}};
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&shapes);
}

/* Rows of W, `step` bytes apart, or copies of what is behind the last whole step of 32 values. */
struct of_w {
    const char *rows;
    int64_t step, whole, rest;
    uint32_t last[2][TILE];
};

/* Steps [start, stop) of W tiles of W's rows with X of x's, which lie `next` words from one
   another; added to the sums from the second on. */
VENEER_AMX_INLINE void tile(const int W, const int X, const struct of_w *w, const uint32_t *x,
                            int64_t next, float *sums, int64_t start, int64_t stop) {
    const char *second = w->rows + 16 * w->step;
#define EACH(DO)                                                                                   \
    do {                                                                                           \
        DO(0);                                                                                     \
        if (X > 1) DO(1);                                                                          \
        if (W > 1) DO(2);                                                                          \
        if (W > 1 && X > 1) DO(3);                                                                 \
    } while (0)
#define LOAD(i) _tile_loadd(i, sums + i * TILE, 64)
#define STORE(i) _tile_stored(i, sums + i * TILE, 64)
    if (start > 0) EACH(LOAD);
    else EACH(_tile_zero);
#define STEP(first_w, second_w, apart)                                                             \
    do {                                                                                           \
        _tile_loadd(4, first_w, apart);                                                            \
        _tile_loadd(6, x, 64);                                                                     \
        _tile_dpbf16ps(0, 4, 6);                                                                   \
        if (X > 1) {                                                                               \
            _tile_loadd(7, x + next, 64);                                                          \
            _tile_dpbf16ps(1, 4, 7);                                                               \
        }                                                                                          \
        if (W > 1) {                                                                               \
            _tile_loadd(5, second_w, apart);                                                       \
            _tile_dpbf16ps(2, 5, 6);                                                               \
            if (X > 1) _tile_dpbf16ps(3, 5, 7);                                                    \
        }                                                                                          \
        x += TILE;                                                                                 \
    } while (0)
    x += start * TILE;
    const int64_t whole = least(stop, w->whole);
    for (int64_t k = start; k < whole; k++) STEP(w->rows + 64 * k, second + 64 * k, w->step);
    if (whole < stop) STEP(w->last[0], w->last[1], 64);
    EACH(STORE);
    __asm__ volatile("" ::: "memory");
#undef EACH
#undef LOAD
#undef STORE
#undef STEP
}

/* `outs` rows of W, 32 or fewer, with rows [from, to) of x. */
static VENEER_AMX void group(const struct work *all, const struct piece *part, struct of_w *w,
                             float *sums, int64_t out, int64_t outs, int64_t from, int64_t to) {
    const int64_t head = from / 16 * 16, next = all->steps * TILE, first = first_of(all, part);
    if (w->rest) {
        const __mmask32 mask = ((uint32_t)1 << w->rest) - 1;
        for (int64_t r = 0; r < outs; r++)
            _mm512_storeu_si512(
                w->last[0] + 16 * r,
                _mm512_maskz_loadu_epi16(mask, w->rows + r * w->step + 64 * w->whole));
        __asm__ volatile("" ::: "memory");
    }
    const int64_t chunks = to - head > 32 ? (all->steps + CHUNK - 1) / CHUNK : 1;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t start = all->steps * chunk / chunks, stop = all->steps * (chunk + 1) / chunks;
        float *own = sums;
        for (int64_t row = head; row < to; row += 32, own += 4 * TILE) {
            const uint32_t *x = all->turned + (row - all->from) / 16 * next;
            const int64_t two = to - row > 16;
            if (outs > 16 && two) tile(2, 2, w, x, next, own, start, stop);
            else if (outs > 16) tile(2, 1, w, x, next, own, start, stop);
            else if (two) tile(1, 2, w, x, next, own, start, stop);
            else tile(1, 1, w, x, next, own, start, stop);
            if (chunk + 1 < chunks) continue;
            for (int64_t i = 0; i <= two; i++) {
                const int64_t at = row + 16 * i, begin = at < from ? from - at : 0,
                              end = least(16, to - at);
                char *y = (char *)part->y + 2 * (at + begin - first) * part->outs;
                put_tile(part, own + i * TILE, out, least(outs, 16), y, begin, end);
                if (outs > 16)
                    put_tile(part, own + (2 + i) * TILE, out + 16, outs - 16, y, begin, end);
            }
        }
    }
}

/* Rows of x that the second cache has room for beside W. */
INLINE int64_t rows_of(const struct work *all) {
    const int64_t fit = NEAR / (2 * all->width) / 32 * 32;
    return fit < 32 ? 32 : least(fit, TOGETHER);
}

/* The groups of W whose costs begin within [start, stop), all of them in a row. */
static VENEER_AMX void products(void *arguments, int64_t start, int64_t stop) {
    struct work *all = arguments;
    const int64_t most = rows_of(all), pairs = (least(all->to - all->from, most) + 31) / 32;
    void *room = NULL;
    if (posix_memalign(&room, 64, (size_t)(all->room + pairs * 16 * TILE))) {
        all->failed = 1;
        return;
    }
    float *sums = (float *)((char *)room + all->room);
    struct of_w w = {NULL, 2 * all->width, all->width / 32, all->width % 32, {{0}}};
    int64_t before = 0, shaped = 0;
    for (const struct piece *part = all->of; part < all->of + all->count && before < stop; part++) {
        const int64_t cost = cost_of(all, part), groups = groups_of(part);
        if (cost == 0) continue;
        const int64_t begin = start <= before ? 0 : (start - before + cost - 1) / cost;
        const int64_t end =
            stop - before >= groups * cost ? groups : (stop - before + cost - 1) / cost;
        const int64_t first = begin_of(all, part), last = end_of(all, part);
        for (int64_t from = first, to; from < last && begin < end; from = to) {
            to = least(last, from / 32 * 32 + most);
            for (int64_t number = begin; number < end; number++) {
                const int64_t out = number * GROUP, outs = least(GROUP, part->outs - out);
                if (outs != shaped) shapes_of(shaped = outs);
                w.rows = (const char *)part->w + 2 * out * all->width;
                if (part->decode != NULL) {
                    part->decode(part->w, out, outs, room);
                    w.rows = room;
                }
                group(all, part, &w, sums, out, outs, from, to);
            }
        }
        before += groups * cost;
    }
    if (shaped) _tile_release();
    __asm__ volatile("" ::: "memory");
    free(room);
}

int veneer_tiled_pieces(const struct piece *of, int64_t count, struct behind *behind) {
    struct work all = {of, of->x, NULL, count, of->width, of->apart, (of->width + 31) / 32,
                       0,  0,     0,    0};
    int64_t rows = 0;
    for (int64_t i = 0; i < count; i++) {
        if ((const char *)of[i].x < all.x) all.x = of[i].x;
        if (of[i].decode != NULL) all.room = 2 * GROUP * all.width;
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t last = first_of(&all, of + i) + of[i].rows;
        if (last > rows) rows = last;
    }
    const int64_t each = all.steps * 4 * TILE, fit = MOST / each * 16, most = fit < 64 ? 64 : fit;
    if (posix_memalign((void **)&all.turned, 64, (size_t)((least(rows, most) + 15) / 16 * each)))
        return 1;
    for (; all.from < rows; all.from = all.to) {
        all.to = least(rows, all.from + most);
        veneer_parallel(turn_rows, &all, (all.to - all.from + 15) / 16 * all.steps, PACKED_ALONE);
        int64_t cost = 0, worth = 0;
        for (int64_t i = 0; i < count; i++) {
            const int64_t own = end_of(&all, of + i) - begin_of(&all, of + i);
            cost += groups_of(of + i) * cost_of(&all, of + i);
            if (own > 0) worth += of[i].outs * all.width * (1 + own / 64);
        }
        const int64_t grain = cost * ALONE / (worth + 1) + 1,
                      turns = all.to - all.from > FEW ? TURNS : LONG;
        veneer_parallel_behind(products, &all, cost, grain, turns, all.to < rows ? NULL : behind);
    }
    free(all.turned);
    return all.failed;
}

#else

int veneer_tiled_pieces(const struct piece *of, int64_t count, struct behind *behind) {
    (void)of, (void)count, (void)behind;
    return 1;
}

#endif
