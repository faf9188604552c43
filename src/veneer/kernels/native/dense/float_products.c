/* Products of many rows in float32, on processors with AVX2: see kernels/dense/products.py. A panel
   is 16 columns of W, copied side by side for DEPTH values of a sum. It stays in the first cache
   while rows of x go by, read where they lie. Sums of DEPTH products are added to y in their order.
   So a row's bits depend neither on the rows and columns beside it nor on the number of threads.
   W in bf16 becomes float32 while it is copied: the bits are those of W in float32. */
#include "bits.h"
#include "levels.h"

/* As in products.h. The rows of x and of y lie `row` and `apart` values from each other. narrow:
   W is bf16. kernels/bindings/dense_calls.py has the same fields. */
struct float_product {
    const float *x;
    const void *w;
    const float *bias;
    float *y;
    int64_t rows, width, outs, row, apart, along, add, narrow;
};

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

enum {
    SIDE = 16,         /* columns of a panel: two registers */
    HEIGHT = 6,        /* rows of x at once: with two registers each, 12 of 16 registers */
    DEPTH = 256,       /* values of a sum at once: a panel takes 16 KiB of the first cache */
    KEPT = 16,         /* panels at once: 256 KiB of the second cache */
    ROWS = 16 * HEIGHT, /* rows of x at once: 96 KiB of the second cache */
    MEETING = 4096,     /* rows that lie so many bytes apart share a line of the first cache */
};

#define INLINE_AVX2 static inline __attribute__((always_inline)) FOR_AVX2

/* Columns of a row-major 8 x 8 matrix: `to` gets them SIDE values apart. */
INLINE_AVX2 void transpose(const __m256 *rows, float *to) {
    __m256 pairs[8], quads[8];
    UNROLLED(4, i, 4) {
        pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    UNROLLED(2, i, 2) {
        quads[4 * i] = _mm256_shuffle_ps(pairs[4 * i], pairs[4 * i + 2], 0x44);
        quads[4 * i + 1] = _mm256_shuffle_ps(pairs[4 * i], pairs[4 * i + 2], 0xee);
        quads[4 * i + 2] = _mm256_shuffle_ps(pairs[4 * i + 1], pairs[4 * i + 3], 0x44);
        quads[4 * i + 3] = _mm256_shuffle_ps(pairs[4 * i + 1], pairs[4 * i + 3], 0xee);
    }
    UNROLLED(4, i, 4) {
        _mm256_store_ps(to + i * SIDE, _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x20));
        _mm256_store_ps(to + (4 + i) * SIDE, _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x31));
    }
}

/* Values of W from number `at` on, in float32. */
INLINE_AVX2 __m256 eight_of(const void *w, int64_t at, const int narrow) {
    if (!narrow) return _mm256_loadu_ps((const float *)w + at);
    const __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)w + at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

INLINE_AVX2 float one_of(const void *w, int64_t at, const int narrow) {
    if (!narrow) return ((const float *)w)[at];
    return float_of_bits((uint32_t)((const uint16_t *)w)[at] << 16);
}

INLINE_AVX2 void ask_for(const void *w, int64_t at, const int narrow) {
    _mm_prefetch((const char *)w + at * (narrow ? 2 : 4), _MM_HINT_T1);
}

/* Columns [n, n + SIDE) of W for values [k, k + depth) of the sums -> to (depth, SIDE), with zeros
   behind the last column. Asks for what the next panel reads. */
INLINE_AVX2 void pack(const int narrow, const struct float_product *a, int64_t n, int64_t k,
                      int64_t depth, float *to) {
    const int64_t columns = a->outs - n < SIDE ? a->outs - n : SIDE;
    const int64_t row = a->along ? a->outs : a->width, line = narrow ? 32 : 16;
    const int64_t start = a->along ? k * row + n : n * row + k;
    const int64_t next =
        n + 2 * SIDE <= a->outs ? start + (a->along ? SIDE : SIDE * row) : start;
    int64_t done = 0;
    for (; columns == SIDE && a->along && done < depth; done++) {
        ask_for(a->w, next + done * row, narrow);
        UNROLLED(2, i, 2)
            _mm256_store_ps(to + done * SIDE + 8 * i,
                            eight_of(a->w, start + done * row + 8 * i, narrow));
    }
    for (; columns == SIDE && done + 8 <= depth; done += 8)
        for (int64_t i = 0; i < SIDE; i += 8) {
            __m256 rows[8];
            UNROLLED(8, r, 8) {
                rows[r] = eight_of(a->w, start + (i + r) * row + done, narrow);
                if (done % line == 0) ask_for(a->w, next + (i + r) * row + done, narrow);
            }
            transpose(rows, to + done * SIDE + i);
        }
    for (; done < depth; done++)
        for (int64_t i = 0; i < SIDE; i++) {
            const int64_t at = start + (a->along ? done * row + i : i * row + done);
            to[done * SIDE + i] = i < columns ? one_of(a->w, at, narrow) : 0.0f;
        }
}

static FOR_AVX2 void pack_panel(const struct float_product *a, int64_t n, int64_t k, int64_t depth,
                                float *to) {
    if (a->narrow) pack(1, a, n, k, depth, to);
    else pack(0, a, n, k, depth, to);
}

/* y (R, SIDE), its rows `apart` values from each other, [+]= x (R, depth) times a panel. */
INLINE_AVX2 void multiply(const int R, const float *x, int64_t row, int64_t depth,
                          const float *panel, float *y, int64_t apart, int add) {
    __m256 low[HEIGHT], high[HEIGHT];
    UNROLLED(6, r, R) low[r] = high[r] = _mm256_setzero_ps();
    for (int64_t k = 0; k < depth; k++) {
        const __m256 first = _mm256_load_ps(panel + k * SIDE),
                     second = _mm256_load_ps(panel + k * SIDE + 8);
        UNROLLED(6, r, R) {
            const __m256 value = _mm256_broadcast_ss(x + r * row + k);
            low[r] = _mm256_fmadd_ps(value, first, low[r]);
            high[r] = _mm256_fmadd_ps(value, second, high[r]);
        }
    }
    UNROLLED(6, r, R) {
        float *to = y + r * apart;
        if (add) {
            low[r] = _mm256_add_ps(_mm256_loadu_ps(to), low[r]);
            high[r] = _mm256_add_ps(_mm256_loadu_ps(to + 8), high[r]);
        }
        _mm256_storeu_ps(to, low[r]);
        _mm256_storeu_ps(to + 8, high[r]);
    }
}

static FOR_AVX2 void multiply_rows(int64_t rows, const float *x, int64_t row, int64_t depth,
                                   const float *panel, float *y, int64_t apart, int add) {
    switch (rows) {
        CASE(1, multiply(1, x, row, depth, panel, y, apart, add))
        CASE(2, multiply(2, x, row, depth, panel, y, apart, add))
        CASE(3, multiply(3, x, row, depth, panel, y, apart, add))
        CASE(4, multiply(4, x, row, depth, panel, y, apart, add))
        CASE(5, multiply(5, x, row, depth, panel, y, apart, add))
        CASE(6, multiply(6, x, row, depth, panel, y, apart, add))
    }
}

/* The same of one panel whose first column is n, for up to HEIGHT rows from `first` on. */
static FOR_AVX2 void add_tile(const struct float_product *a, int64_t first, int64_t rows, int64_t n,
                              const float *x, int64_t row, int64_t depth, const float *panel,
                              int add) {
    const int64_t columns = a->outs - n;
    float *y = a->y + first * a->apart + n;
    if (columns >= SIDE) {
        multiply_rows(rows, x, row, depth, panel, y, a->apart, add);
        return;
    }
    float whole[HEIGHT * SIDE] = {0};
    for (int64_t r = 0; add && r < rows; r++)
        memcpy(whole + r * SIDE, y + r * a->apart, (size_t)columns * sizeof(float));
    multiply_rows(rows, x, row, depth, panel, whole, SIDE, add);
    for (int64_t r = 0; r < rows; r++)
        memcpy(y + r * a->apart, whole + r * SIDE, (size_t)columns * sizeof(float));
}

/* Writes the bias to y, or adds it to what y holds. */
static FOR_AVX2 void begin(const struct float_product *a, int64_t row, int64_t n, int64_t columns) {
    float *y = a->y + row * a->apart + n;
    for (int64_t i = 0; i < columns; i++) y[i] = a->add ? y[i] + a->bias[n + i] : a->bias[n + i];
}

/* Rows [top, bottom) of y in panels [from, to). room: KEPT panels, then ROWS rows of x. */
static FOR_AVX2 void multiply_part(const struct float_product *a, int64_t top, int64_t bottom,
                                   int64_t from, int64_t to, float *room) {
    const int meet = a->row * 4 % MEETING == 0;
    float *copied = room + KEPT * DEPTH * SIDE;
    for (int64_t first = from; first < to; first += KEPT) {
        const int64_t panels = to - first < KEPT ? to - first : KEPT, n = first * SIDE;
        const int64_t end = (first + panels) * SIDE, columns = (end < a->outs ? end : a->outs) - n;
        for (int64_t row = top; a->bias && row < bottom; row++) begin(a, row, n, columns);
        for (int64_t k = 0; k < a->width; k += DEPTH) {
            const int64_t depth = a->width - k < DEPTH ? a->width - k : DEPTH;
            for (int64_t i = 0; i < panels; i++)
                pack_panel(a, n + i * SIDE, k, depth, room + i * DEPTH * SIDE);
            for (int64_t block = top; block < bottom; block += ROWS) {
                const int64_t rows = bottom - block < ROWS ? bottom - block : ROWS;
                const float *x = a->x + block * a->row + k;
                for (int64_t r = 0; meet && r < rows; r++)
                    memcpy(copied + r * (DEPTH + SIDE), x + r * a->row, (size_t)depth * 4);
                const int64_t apart = meet ? DEPTH + SIDE : a->row;
                for (int64_t i = 0; i < panels; i++)
                    for (int64_t r = 0; r < rows; r += HEIGHT)
                        add_tile(a, block + r, rows - r < HEIGHT ? rows - r : HEIGHT, n + i * SIDE,
                                 (meet ? copied : x) + r * apart, apart, depth,
                                 room + i * DEPTH * SIDE, k > 0 || a->add || a->bias);
            }
        }
    }
}

static float *room_of_part(void) {
    void *room = NULL;
    if (posix_memalign(&room, 64, sizeof(float) * (KEPT * DEPTH * SIDE + ROWS * (DEPTH + SIDE))))
        abort();
    return room;
}

/* Items are panels. */
static FOR_AVX2 void by_columns(void *arguments, int64_t from, int64_t to) {
    const struct float_product *a = arguments;
    float *room = room_of_part();
    multiply_part(a, 0, a->rows, from, to, room);
    free(room);
}

/* Items are groups of HEIGHT rows. */
static FOR_AVX2 void by_rows(void *arguments, int64_t from, int64_t to) {
    const struct float_product *a = arguments;
    float *room = room_of_part();
    const int64_t end = to * HEIGHT < a->rows ? to * HEIGHT : a->rows;
    multiply_part(a, from * HEIGHT, end, 0, (a->outs + SIDE - 1) / SIDE, room);
    free(room);
}
#endif

/* 1: this processor has no AVX2. */
int veneer_product_float(struct float_product *a) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (veneer_level() < 2) return 1;
    const int64_t panels = (a->outs + SIDE - 1) / SIDE;
    /* A run reads all of x, which no cache holds where K is long. */
    const int64_t turns = a->width > 8 * DEPTH ? 1 : 3;
    if (panels < 8 * veneer_threads())
        veneer_parallel(by_rows, a, (a->rows + HEIGHT - 1) / HEIGHT, 4);
    else veneer_parallel_dealt(by_columns, a, panels, 2, turns);
    return 0;
#else
    (void)a;
    return 1;
#endif
}
