/* Products of many rows in bf16 on ARM: what products.c computes, where the processor multiplies
   2 x 4 by 4 x 2 values of bf16 in one instruction (BFMMLA). Some columns of W are laid out in
   quads and stay in the second cache while x goes by, eight rows at a time. Sums go over all of K
   in their order before they are rounded, once: a row's bits depend neither on the rows and columns
   beside it nor on the threads. */
#if defined(__aarch64__)
#include "products.h"
#include "quads.h"
#include <stdlib.h>

int veneer_has_bfdot(void);

enum { KEPT = 256 << 10 /* bytes of W */ };

/* Up to 8 lines from `from` on, `row` values apart. */
static void pack_across(const uint16_t *from, int64_t row, int64_t lines, int64_t width,
                        uint16_t *to) {
    const uint16_t *of[LINES];
    for (int64_t i = 0; i < LINES; i++) of[i] = i < lines ? from + i * row : NULL;
    lines_to_quads(of, width, to);
}

/* The same of lines that lie side by side: their value k stands at `row` times k. */
static void pack_along(const uint16_t *from, int64_t row, int64_t lines, int64_t width,
                       uint16_t *to) {
    for (int64_t k = 0; k < width; k += 4, to += QUADS) {
        const uint16_t *of[4];
        for (int64_t j = 0; j < 4; j++) of[j] = k + j < width ? from + (k + j) * row : NULL;
        rows_to_quads(of, lines, to);
    }
}

/* Up to four sums of a row of y, from column n on. */
INLINE void finish(const struct product *a, int64_t row, int64_t n, f4v sums) {
    const int64_t count = a->outs - n < 4 ? a->outs - n : 4;
    if (count <= 0) return;
    uint16_t *y = a->y + row * a->outs + n;
    if (a->bias) sums += some_floats(a->bias + n, count, FEW_BF16);
    if (a->add) sums += some_floats(y, count, FEW_BF16);
    put_floats(y, sums, count, FEW_BF16);
}

/* Up to 8 rows from m on and 8 columns from n on of y. */
static FOR_BFDOT void multiply(const struct product *a, const uint16_t *x, const uint16_t *w,
                               int64_t m, int64_t n) {
    const int64_t rows = a->rows - m < LINES ? a->rows - m : LINES;
    f4v sums[LINES][2];
    multiply_quads(x, w, quads_of(a->width), sums);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < 2; j++) finish(a, m + r, n + 4 * j, sums[r][j]);
}

/* Rows [top, bottom) of y in panels [from, to) of 8 columns. */
static void multiply_part(const struct product *a, int64_t top, int64_t bottom, int64_t from,
                          int64_t to) {
    const int64_t panel = quads_of(a->width) * QUADS, fit = KEPT / (2 * panel), all = to - from;
    const int64_t kept = fit < 1 ? 1 : fit < all ? fit : all;
    void *room = NULL;
    if (posix_memalign(&room, 64, (size_t)(2 * (kept + 1) * panel))) abort();
    uint16_t *w = room, *x = w + kept * panel;
    for (int64_t first = from; first < to; first += kept) {
        const int64_t panels = to - first < kept ? to - first : kept;
        for (int64_t i = 0; i < panels; i++) {
            const int64_t n = (first + i) * LINES, left = a->outs - n;
            const int64_t lines = left < LINES ? left : LINES;
            if (a->along) pack_along(a->w + n, a->outs, lines, a->width, w + i * panel);
            else pack_across(a->w + n * a->width, a->width, lines, a->width, w + i * panel);
        }
        for (int64_t m = top; m < bottom; m += LINES) {
            pack_across(a->x + m * a->width, a->width, bottom - m, a->width, x);
            for (int64_t i = 0; i < panels; i++)
                multiply(a, x, w + i * panel, m, (first + i) * LINES);
        }
    }
    free(room);
}

static void by_columns(void *arguments, int64_t from, int64_t to) {
    const struct product *a = arguments;
    multiply_part(a, 0, a->rows, from, to);
}

/* Items are groups of 8 rows. */
static void by_rows(void *arguments, int64_t from, int64_t to) {
    const struct product *a = arguments;
    const int64_t end = to * LINES < a->rows ? to * LINES : a->rows;
    multiply_part(a, from * LINES, end, 0, (a->outs + LINES - 1) / LINES);
}

int veneer_product(struct product *a) {
    const int64_t panels = (a->outs + LINES - 1) / LINES, groups = (a->rows + LINES - 1) / LINES;
    if (!veneer_has_bfdot()) return 1;
    /* Each run lays out all of x, or all of W. */
    if (panels < groups) veneer_parallel(by_rows, a, groups, 2);
    else veneer_parallel(by_columns, a, panels, 2);
    return 0;
}
#endif
