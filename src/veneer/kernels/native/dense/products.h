/* Products of many rows with a dense weight, in bf16: products.c, and products_arm.c on ARM. */
#ifndef VENEER_PRODUCTS_H
#define VENEER_PRODUCTS_H

#include <stdint.h>

/* y (rows, outs) = x (rows, width) times w: (outs, width), or, where it lies along, (width, outs).
   + bias, unless it is NULL; add: + what y was. kernels/bindings/dense_calls.py has the same
   fields. */
struct product {
    const uint16_t *x, *w, *bias;
    uint16_t *y;
    int64_t rows, width, outs, along, add;
};

/* 1: this processor multiplies no pairs of bf16. */
int veneer_product(struct product *a);

#endif
