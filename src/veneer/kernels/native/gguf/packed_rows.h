/* Products of a few rows with a packed W, one after another or several at once. */
#ifndef VENEER_PACKED_ROWS_H
#define VENEER_PACKED_ROWS_H

#include <stdint.h>

enum { MOST_TOGETHER = 4 };

/* y (rows, outs) = x (rows, width) W^T + bias. W: `outs` rows from element `start` of 4-bit weights
   on, or blocks of a .gguf file of ggml's kind. */
struct packed_rows {
    const void *x, *packed, *bias;
    void *y;
    int64_t rows, width, outs, start, kind;
    int type;
};

int veneer_packed_rows(const struct packed_rows *call, int most);

/* Whether packed_together computes both at once. */
int packed_like(const struct packed_rows *a, const struct packed_rows *b, int most);

/* Up to MOST_TOGETHER calls that are alike, whose y do not meet: the bits of each alone. 1: no
 * memory. */
int packed_together(const struct packed_rows *const *calls, int64_t count, int most);

enum { MOST_FLOAT_ROWS = 3 };

/* Blocks in float32, of so few rows of one x, without writing out what they decode to
   (gguf_floats.c): whether there is a way, and that of up to MOST_TOGETHER calls which are alike.
 */
int gguf_float_usable(const struct packed_rows *call, int most);
void gguf_float_product(const struct packed_rows *const *calls, int64_t count, int most);

#endif
