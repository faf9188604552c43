/* y = x W^T + bias for a few rows of x and blocks of a .gguf file, bf16 on AMX tiles, W's values
   never rounded:

       y[n] = sum over W's steps of 32 values:  scale[n] * sum(code[n] * x)  +  offset[n] * sum(x)

   A code c of 4 to 6 bits becomes the bf16 number 1 + c / 16 to 1 + c / 64, exact, by bits alone: c
   stands in its mantissa. One of 8 bits, 128 + c, becomes two: 16 + its high half, and 1 + its low
   half / 16. What that adds is taken off again in `offset`. A scale for every 16 values makes these
   a step. A tile of W is 16 rows and one step, one of x the same step of 16 rows of x (or of one
   row alone), turned. Within a step the values of x stand in the order in which the codes come out
   of their bytes.

   Each step's sums begin at zero and are added to y's in float32, step by step: a row of x gives
   the same bits alone and among any others, with any number of threads. */
#include "gguf_product.h"
#include "amx.h"
#include "parallel.h"
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if defined(VENEER_AMX_COMPILED)

#define GGUF                                                                                       \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")))
#include "gguf_codes.h"

enum {
    CHUNK = 24, /* steps of W that stay in the first cache while rows of x go by, 16 at a time */
    SLOTS = 32, /* for these */
    RING = 8,   /* steps whose codes are there, where no others go by; steps whose products are */
    AHEAD = 32, /* rows of W that memory is asked for ahead */
    ALONE = 1 << 15,  /* values of W that are not worth a second thread */
    MOST_X = 1 << 20, /* bytes of x that stay in the second cache while W goes by */
};

/* Rows [first, first + rows) of x, turned: a tile for every 32 values of 16 (of one row: 64 bytes),
   and the sum of x within each step, 16 (one). Threads take groups of 16 rows of W from `next` on,
   a `share`th of what is left and one more: long runs first, since memory brings these sooner, and
   short ones last, so that nobody waits. */
struct tiled {
    const struct gguf_product *of;
    uint8_t *turned;
    float *within;
    int64_t first, rows, steps, halves, row_bytes, groups, share, next;
    int failed;
};

/* What one thread works with. codes, scales, offsets: of steps of a group of 16 rows of W;
   products: of a step; sums: so far, of all rows of x; last: W's last rows, with room behind. */
struct room {
    uint8_t *codes, *last;
    float *scales, *offsets, *products, *sums;
};

/* The sums of 16 rows' values, 16 pairs of each across, pair by pair; those of `pairs` alone. */
GGUF_INLINE __m512 sums_within(const uint8_t *turned, uint16_t pairs) {
    __m512 sum = _mm512_setzero_ps();
    UNROLLED(16, k, 16)
        if (pairs >> k & 1)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_load_si512(turned + 64 * k),
                                   (__m512bh)_mm512_set1_epi16(0x3f80));
    return sum;
}

static GGUF void turn(const struct tiled *all) {
    const int64_t width = all->of->width, halves = all->halves;
    const uint16_t *x = (const uint16_t *)all->of->x + all->first * width;
    const int kind = (int)all->of->kind;
    const __m512i order = order_of(kind);
    __attribute__((aligned(64))) uint8_t own[TILE];
    __m512i words[16];
    if (all->rows == 1) { /* 32 values each stand where rows would */
        for (int64_t at = 0; at < width / 32; at += 16) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; i++) {
                words[i] = _mm512_setzero_si512();
                if (at + i >= width / 32) continue;
                words[i] = _mm512_permutexvar_epi16(order, _mm512_loadu_si512(x + 32 * (at + i)));
                _mm512_store_si512(all->turned + 64 * (at + i), words[i]);
            }
            words_turned(words, (uint32_t *)own);
            for (int64_t half = 0; half < halves; half++) {
                __attribute__((aligned(64))) float sums[16];
                _mm512_store_ps(sums, sums_within(own, pairs_of(kind, half)));
                for (int64_t i = 0; i < 16; i++) all->within[halves * (at + i) + half] = sums[i];
            }
        }
        return;
    }
    for (int64_t row = 0, number = 0; row < all->rows; row += 16) {
        for (int64_t at = 0; at < width / 32; at++, number++) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; i++) {
                words[i] = _mm512_setzero_si512();
                if (row + i < all->rows)
                    words[i] = _mm512_permutexvar_epi16(
                        order, _mm512_loadu_si512(x + (row + i) * width + 32 * at));
            }
            words_turned(words, (uint32_t *)(all->turned + number * TILE));
            for (int64_t half = 0; half < halves; half++)
                _mm512_store_ps(all->within + 16 * (halves * number + half),
                                sums_within(all->turned + number * TILE, pairs_of(kind, half)));
        }
    }
}

/* Tiles 0 to 3: products; 4, 5: W; 6, 7: x. */
GGUF_INLINE void shapes_of(int64_t rows) {
    const uint16_t x = rows == 1 ? 4 : 64;
    const struct tiles shapes = {
        1, 0, {0}, {x, x, x, x, 64, 64, x, x}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&shapes);
}

/* The products of a step, and its sums of x, to 16 rows of sums. */
GGUF_INLINE void add(const float *scale, const float *offset, const float *products,
                     const float *within, __m512 sum[16]) {
    const __m512 x = _mm512_load_ps(within);
    UNROLLED(16, r, 16) {
        sum[r] =
            _mm512_fmadd_ps(_mm512_set1_ps(scale[r]), _mm512_load_ps(products + 16 * r), sum[r]);
        sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(offset[r]), x, sum[r]);
    }
}

#define FENCE __asm__ volatile("" ::: "memory")

/* The pipeline of a step: decoded, two steps later multiplied, two later its products stored, two
   later added to sums. Each of the four tiles is named by a literal. */
#define PRODUCT(i, w, x, codes, from, apart)                                                       \
    do {                                                                                           \
        _tile_loadd(x, from, apart);                                                               \
        _tile_loadd(w, codes, 64);                                                                 \
        _tile_zero(i);                                                                             \
        _tile_dpbf16ps(i, w, x);                                                                   \
        if (parts_of(kind) > 1) {                                                                  \
            _tile_loadd(w, (codes) + TILE, 64);                                                    \
            _tile_dpbf16ps(i, w, x);                                                               \
        }                                                                                          \
    } while (0)

/* Where a step's own lie among those of `ring` steps. */
#define SLOT(of, step, ring, size) (room->of + ((uint64_t)(step) & ((ring) - 1)) * (size))

/* What memory should bring to the second cache: rows after the next 16, a step's share of them. */
GGUF_INLINE void soon(const int kind, const uint8_t *rows, int64_t row_bytes, int64_t step) {
    const int64_t each = row_bytes_of(kind, 256) * 2 / halves_of(kind),
                  begin = AHEAD * row_bytes + step * each;
#pragma GCC unroll 9
    for (int64_t line = 0; line < each; line += 64) __builtin_prefetch(rows + begin + line, 0, 2);
}

/* 16 rows of W with one row of x: four steps' way through the pipeline. whole: none of what it does
 * is missing. */
GGUF_INLINE void one_row_four(const int kind, const int whole, const struct tiled *all,
                              const struct room *room, const uint8_t *rows, int64_t four,
                              __m512 *sum) {
    const int64_t steps = all->steps, bytes = all->row_bytes;
    __m512 scale[4] = {0}, offset[4] = {0};
    if (whole || four >= 4) scales_of(kind, 0, rows, bytes, four - 4, scale, offset);
#define EACH(i, done, w, x)                                                                        \
    do {                                                                                           \
        const int64_t step = four + i;                                                             \
        if (whole || step + 2 < steps) {                                                           \
            decode(kind, rows, bytes, step + 2,                                                    \
                   SLOT(codes, step + 2, RING, parts_of(kind) * TILE));                            \
            soon(kind, rows, bytes, step + 2);                                                     \
        }                                                                                          \
        FENCE;                                                                                     \
        if (whole || step < steps)                                                                 \
            PRODUCT(i, w, x, SLOT(codes, step, RING, parts_of(kind) * TILE),                       \
                    all->turned + 64 * (step / halves_of(kind)), 4);                               \
        if (whole || (step >= 2 && step < steps + 2))                                              \
            _tile_stored(done, SLOT(products, step - 2, RING, 256), 4);                            \
        FENCE;                                                                                     \
        if (whole || (step >= 4 && step < steps + 4)) {                                            \
            *sum = _mm512_fmadd_ps(scale[i], _mm512_load_ps(SLOT(products, step - 4, RING, 256)),  \
                                   *sum);                                                          \
            *sum = _mm512_fmadd_ps(offset[i], _mm512_set1_ps(all->within[step - 4]), *sum);        \
        }                                                                                          \
    } while (0)
    EACH(0, 2, 4, 6);
    EACH(1, 3, 5, 7);
    EACH(2, 0, 4, 6);
    EACH(3, 1, 5, 7);
#undef EACH
}

GGUF_INLINE __m512 one_row(const int kind, const struct tiled *all, const struct room *room,
                           const uint8_t *rows) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t step = 0; step < least(2, all->steps); step++)
        decode(kind, rows, all->row_bytes, step, SLOT(codes, step, RING, parts_of(kind) * TILE));
    for (int64_t four = 0; four < all->steps + 4; four += 4) {
        if (four >= 4 && four + 5 < all->steps) one_row_four(kind, 1, all, room, rows, four, &sum);
        else one_row_four(kind, 0, all, room, rows, four, &sum);
    }
    return sum;
}

/* 16 rows of W with 16 rows of x, as tile number `tile` has them: the same of steps [start, stop).
   decoding: no other tile came before. */
GGUF_INLINE void many_rows_four(const int kind, const int decoding, const int whole,
                                const struct tiled *all, const struct room *room,
                                const uint8_t *rows, int64_t tile, int64_t start, int64_t stop,
                                int64_t four, __m512 sum[16]) {
    const int64_t bytes = all->row_bytes;
    const uint64_t ring = all->rows > 16 ? SLOTS : RING;
    const uint8_t *turned = all->turned + tile * all->steps / halves_of(kind) * TILE;
    const float *within = all->within + 16 * tile * all->steps;
    if (decoding && (whole || four < stop)) {
        __m512 scale[4], offset[4];
        scales_of(kind, 0, rows, bytes, four, scale, offset);
        UNROLLED(4, i, 4) {
            _mm512_store_ps(SLOT(scales, four + i, ring, 16), scale[i]);
            _mm512_store_ps(SLOT(offsets, four + i, ring, 16), offset[i]);
        }
    }
#define EACH(i, done, w, x)                                                                        \
    do {                                                                                           \
        const int64_t step = four + i;                                                             \
        if (decoding && (whole || step + 2 < stop)) {                                              \
            decode(kind, rows, bytes, step + 2,                                                    \
                   SLOT(codes, step + 2, ring, parts_of(kind) * TILE));                            \
            soon(kind, rows, bytes, step + 2);                                                     \
        }                                                                                          \
        FENCE;                                                                                     \
        if (whole || step < stop)                                                                  \
            PRODUCT(i, w, x, SLOT(codes, step, ring, parts_of(kind) * TILE),                       \
                    turned + TILE * (step / halves_of(kind)), 64);                                 \
        if (whole || (step >= start + 2 && step < stop + 2))                                       \
            _tile_stored(done, SLOT(products, step - 2, RING, 256), 64);                           \
        FENCE;                                                                                     \
        if (whole || (step >= start + 4 && step < stop + 4))                                       \
            add(SLOT(scales, step - 4, ring, 16), SLOT(offsets, step - 4, ring, 16),               \
                SLOT(products, step - 4, RING, 256), within + 16 * (step - 4), sum);               \
    } while (0)
    EACH(0, 2, 4, 6);
    EACH(1, 3, 5, 7);
    EACH(2, 0, 4, 6);
    EACH(3, 1, 5, 7);
#undef EACH
}

GGUF_INLINE void many_rows(const int kind, const int decoding, const struct tiled *all,
                           const struct room *room, const uint8_t *rows, int64_t tile,
                           int64_t start, int64_t stop) {
    const uint64_t ring = all->rows > 16 ? SLOTS : RING;
    float *sums = room->sums + 256 * tile;
    __m512 sum[16];
    UNROLLED(16, r, 16) sum[r] = start == 0 ? _mm512_setzero_ps() : _mm512_load_ps(sums + 16 * r);
    if (decoding)
        for (int64_t step = start; step < least(start + 2, stop); step++)
            decode(kind, rows, all->row_bytes, step,
                   SLOT(codes, step, ring, parts_of(kind) * TILE));
    for (int64_t four = start; four < stop + 4; four += 4) {
        if (four >= start + 4 && four + 5 < stop)
            many_rows_four(kind, decoding, 1, all, room, rows, tile, start, stop, four, sum);
        else many_rows_four(kind, decoding, 0, all, room, rows, tile, start, stop, four, sum);
    }
    UNROLLED(16, r, 16) _mm512_store_ps(sums + 16 * r, sum[r]);
}

/* Functions of their own: registers are given out for each. */
#define APART static GGUF __attribute__((noinline))
#define OF_KIND(kind)                                                                              \
    APART __m512 one_row_##kind(const struct tiled *all, const struct room *room,                  \
                                const uint8_t *rows) {                                             \
        return one_row(kind, all, room, rows);                                                     \
    }                                                                                              \
    APART void first_rows_##kind(const struct tiled *all, const struct room *room,                 \
                                 const uint8_t *rows, int64_t start, int64_t stop) {               \
        many_rows(kind, 1, all, room, rows, 0, start, stop);                                       \
    }                                                                                              \
    APART void more_rows_##kind(const struct tiled *all, const struct room *room, int64_t tile,    \
                                int64_t start, int64_t stop) {                                     \
        many_rows(kind, 0, all, room, NULL, tile, start, stop);                                    \
    }
FOR_EACH_KIND(OF_KIND)

/* What is left of 16 rows of W once all steps are added. */
GGUF_INLINE void put_tile(const struct tiled *all, const struct gguf_weight *w, const float *sums,
                          int64_t out, int64_t tile) {
    __attribute__((aligned(64))) float across[256];
    words_across((const uint32_t *)sums, 16, 16, (uint32_t *)across);
    const int64_t count = least(16, all->rows - 16 * tile);
    for (int64_t r = 0; r < count; r++)
        put(w, out, all->first + 16 * tile + r, _mm512_load_ps(across + 16 * r));
}

/* 16 rows of W from `out` on. */
static GGUF void group(const struct tiled *all, const struct room *room,
                       const struct gguf_weight *w, int64_t out) {
    const int64_t bytes = all->row_bytes, kind = all->of->kind, tiles = (all->rows + 15) / 16;
    const int64_t chunk = tiles > 1 ? CHUNK : all->steps;
    const uint8_t *rows = readable(w, out, bytes, room->last);
#define CALL(name, ...)                                                                            \
    (kind == Q4_0   ? name##_Q4_0(all, room, __VA_ARGS__)                                          \
     : kind == Q4_1 ? name##_Q4_1(all, room, __VA_ARGS__)                                          \
     : kind == Q5_0 ? name##_Q5_0(all, room, __VA_ARGS__)                                          \
     : kind == Q5_1 ? name##_Q5_1(all, room, __VA_ARGS__)                                          \
     : kind == Q8_0 ? name##_Q8_0(all, room, __VA_ARGS__)                                          \
     : kind == Q4_K ? name##_Q4_K(all, room, __VA_ARGS__)                                          \
     : kind == Q5_K ? name##_Q5_K(all, room, __VA_ARGS__)                                          \
                    : name##_Q6_K(all, room, __VA_ARGS__))
    if (all->rows == 1) {
        put(w, out, all->first, CALL(one_row, rows));
        return;
    }
    for (int64_t step = 0; step < all->steps; step += chunk) {
        const int64_t end = least(all->steps, step + chunk);
        CALL(first_rows, rows, step, end);
        for (int64_t tile = 1; tile < tiles; tile++) CALL(more_rows, tile, step, end);
    }
    for (int64_t tile = 0; tile < tiles; tile++)
        put_tile(all, w, room->sums + 256 * tile, out, tile);
#undef CALL
}

INLINE int64_t groups_of(const struct gguf_weight *w) { return (w->outs + 15) / 16; }

/* Groups [start, stop), those of a weight behind those of the one before. */
static GGUF void groups(const struct tiled *all, const struct room *room, int64_t start,
                        int64_t stop) {
    const struct gguf_weight *w = all->of->weights;
    int64_t before = 0;
    for (int64_t number = start; number < stop; number++) {
        while (number - before >= groups_of(w)) before += groups_of(w++);
        group(all, room, w, 16 * (number - before));
    }
}

/* What one thread does, as long as there are runs. */
static GGUF void products(void *arguments, int64_t start, int64_t stop) {
    struct tiled *all = arguments;
    const int64_t tiles = (all->rows + 15) / 16;
    const int64_t codes = SLOTS * parts_of((int)all->of->kind) * TILE,
                  own = SLOTS * 128 + RING * TILE + tiles * TILE;
    (void)start, (void)stop;
    void *memory = NULL;
    if (posix_memalign(&memory, 4096, (size_t)(codes + own + 16 * all->row_bytes + BEYOND))) {
        all->failed = 1;
        return;
    }
    struct room room;
    room.codes = memory;
    room.products = (float *)(room.codes + codes);
    room.sums = room.products + RING * 256;
    room.scales = room.sums + 256 * tiles;
    room.offsets = room.scales + 16 * SLOTS;
    room.last = (uint8_t *)(room.offsets + 16 * SLOTS);
    shapes_of(all->rows);
    for (int64_t run, next = __atomic_load_n(&all->next, __ATOMIC_RELAXED); next < all->groups;) {
        run = least(all->groups - next, 1 + (all->groups - next) / all->share);
        if (!__atomic_compare_exchange_n(&all->next, &next, next + run, 0, __ATOMIC_RELAXED,
                                         __ATOMIC_RELAXED))
            continue;
        groups(all, &room, next, next + run);
        next = __atomic_load_n(&all->next, __ATOMIC_RELAXED);
    }
    _tile_release();
    FENCE;
    free(memory);
}

int gguf_tiled_product(const struct gguf_product *of) {
    const int64_t halves = halves_of((int)of->kind), whole = of->width / 32,
                  bytes = row_bytes_of(of->kind, of->width);
    struct tiled all = {of, NULL, NULL, 0, 0, halves * whole, halves, bytes, 0, 0, 0, 0};
    const int64_t fit = MOST_X / (2 * of->width) / 16 * 16, most = fit < 64 ? 64 : fit;
    const int64_t turned =
        of->rows == 1 ? whole * 64 : (least(of->rows, most) + 15) / 16 * whole * TILE;
    const int64_t sums = of->rows == 1 ? all.steps + 16 * halves : turned / TILE * halves * 16;
    void *memory = NULL;
    if (posix_memalign(&memory, 4096, (size_t)(turned + 4 * sums))) return 1;
    all.turned = memory;
    all.within = (float *)(all.turned + turned);
    for (int64_t i = 0; i < of->count; i++) all.groups += groups_of(of->weights + i);
    for (; all.first < of->rows; all.first += all.rows) {
        all.rows = least(most, of->rows - all.first);
        turn(&all);
        const int64_t grain = 1 + ALONE / (16 * of->width * (1 + all.rows / 16)),
                      useful = all.groups / grain;
        const int64_t threads = useful > 1 ? least(useful, veneer_threads()) : 1;
        all.next = 0, all.share = threads > 1 ? 2 * threads : 1;
        veneer_parallel(products, &all, threads, 1);
    }
    free(memory);
    return all.failed;
}

#else

int gguf_tiled_product(const struct gguf_product *of) {
    (void)of;
    return 1;
}

#endif
