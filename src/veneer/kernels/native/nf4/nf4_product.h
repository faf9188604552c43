/* What the parts of the product with a few rows share: nf4_product.c, and nf4_product_bf16.c for
 * its fastest case. */
#ifndef VENEER_NF4_PRODUCT_H
#define VENEER_NF4_PRODUCT_H

#include "nf4.h"

#define MOST 8 /* rows of x */

struct product {
    const struct nf4_weights *w;
    int64_t start, outs, width; /* W: `outs` rows of `width` elements from element `start` on */
    const void *x;              /* put apart; plain: (rows, width) float */
    int64_t rows;
    const void *bias; /* (outs), or NULL */
    void *y;          /* (rows, outs) */
    int type, level;
    volatile int failed;
};

/* Writes y[row, out] = sum + bias, rounded once. */
INLINE void store_sum(const struct product *c, int64_t row, int64_t out, float sum) {
    const float bias = c->bias == NULL ? 0.0f : load_as(c->bias, out, c->type);
    store_as(c->y, row * c->outs + out, sum + bias, c->type);
}

/* The rows [first, last) of W against x, all in bf16. Blocks are 64 elements or a multiple of it
   and none begins within a row of W. x: as nf4_bf16_apart leaves it. */
void nf4_product_bf16(void *product, int64_t first, int64_t last);

/* Elements of one row of x put apart: `width` filled up to whole registers. */
INLINE int64_t bf16_apart_width(int64_t width) { return (width + 127) / 128 * 128; }

/* x (rows, width) bf16 -> out (rows, bf16_apart_width(width)), filled up with zeros. */
void nf4_bf16_apart(const uint16_t *x, int64_t rows, int64_t width, uint16_t *out);

#endif
