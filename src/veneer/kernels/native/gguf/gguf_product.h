/* Products of rows of x with blocks of a .gguf file, whose codes are multiplied. */
#ifndef VENEER_GGUF_PRODUCT_H
#define VENEER_GGUF_PRODUCT_H

#include "bits.h"

/* `outs` rows of blocks, bias or NULL; y (rows, outs). */
struct gguf_weight {
    const uint8_t *blocks;
    const uint16_t *bias;
    uint16_t *y;
    int64_t outs;
};

/* y = x (rows, width) W^T + bias of each of `count` weights, bf16; blocks of ggml's kind. */
struct gguf_product {
    const void *x;
    const struct gguf_weight *weights;
    int64_t count, rows, width, kind;
};

/* On AMX tiles, where veneer_few_level says 5. 1: no memory. */
int gguf_tiled_product(const struct gguf_product *of);

/* In registers, where it says 4 or more. */
int gguf_vector_product(const struct gguf_product *of);

#endif
