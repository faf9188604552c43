/* Products of rows of x with blocks of a .gguf file on AMX tiles. */
#ifndef VENEER_GGUF_TILES_H
#define VENEER_GGUF_TILES_H

#include "bits.h"

/* y (rows, outs) = x (rows, width) W^T + bias, bf16; W: `outs` rows of blocks of ggml's kind; bias or NULL. */
struct gguf_product {
    const void *x;
    const uint8_t *blocks;
    const uint16_t *bias;
    void *y;
    int64_t rows, width, outs, kind;
};

/* Where veneer_few_level says 5. 1: no memory. */
int gguf_tiled_product(const struct gguf_product *of);

#endif
