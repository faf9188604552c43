/* Products of a few rows with a packed W: some of its rows at a time are decoded to where they stay in the cache, and
   multiplied with all rows of x (few_rows.c, few_rows_tiles.c). The bits of a product with W decoded. */
#include "few_rows.h"
#include "gguf_tiles.h"
#include "nf4.h"
#include <stddef.h>

void nf4_decode(const struct nf4_weights *w, int64_t start, int64_t count, void *out, int type, int level);
void gguf_decode(int kind, const uint8_t *blocks, int64_t first, int64_t rows, int64_t columns, void *out, int type, int level);

/* y (rows, outs) = x (rows, width) W^T + bias. W: `outs` rows from element `start` of 4-bit weights on, or blocks of a
   .gguf file of ggml's kind. */
struct packed_rows {
    const void *x, *packed, *bias;
    void *y;
    int64_t rows, width, outs, start, kind;
    int type;
};

struct source {
    const struct packed_rows *of;
    int level;
};

static void of_nf4(const void *packed, int64_t first, int64_t count, void *out) {
    const struct source *s = packed;
    nf4_decode(s->of->packed, s->of->start + first * s->of->width, count * s->of->width, out, s->of->type, s->level);
}

static void of_gguf(const void *packed, int64_t first, int64_t count, void *out) {
    const struct source *s = packed;
    gguf_decode((int)s->of->kind, s->of->packed, first, count, s->of->width, out, s->of->type, s->level);
}

/* most: caps the instructions (5, 4, 3, 2, 0), for tests. 1: no memory for some rows of W. */
int veneer_packed_rows(const struct packed_rows *call, int most) {
    if (call->kind >= 0 && veneer_few_level(call->type, most) == 5) {
        const struct gguf_product product = {call->x, call->packed, call->bias, call->y, call->rows, call->width, call->outs, call->kind};
        return gguf_tiled_product(&product);
    }
    const struct source source = {call, nf4_level(most)};
    const struct piece piece = {call->x,     &source,    call->bias,  call->y, call->rows,
                                call->width, call->outs, call->width, call->kind < 0 ? of_nf4 : of_gguf};
    return veneer_pieces(&piece, 1, call->type, most);
}
