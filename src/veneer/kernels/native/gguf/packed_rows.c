/* Products of a few rows with a packed W: some of its rows at a time are decoded to where they stay
   in the cache, and multiplied with all rows of x (few_rows.c, few_rows_tiles.c). The bits of a
   product with W decoded. */
#include "few_rows.h"
#include "gguf_product.h"
#include "nf4.h"
#include "packed_rows.h"
#include <stddef.h>

void nf4_decode(const struct nf4_weights *w, int64_t start, int64_t count, void *out, int type,
                int level);
void gguf_decode(int kind, const uint8_t *blocks, int64_t first, int64_t rows, int64_t columns,
                 void *out, int type, int level);

struct source {
    const struct packed_rows *of;
    int level;
};

static void of_nf4(const void *packed, int64_t first, int64_t count, void *out) {
    const struct source *s = packed;
    nf4_decode(s->of->packed, s->of->start + first * s->of->width, count * s->of->width, out,
               s->of->type, s->level);
}

static void of_gguf(const void *packed, int64_t first, int64_t count, void *out) {
    const struct source *s = packed;
    gguf_decode((int)s->of->kind, s->of->packed, first, count, s->of->width, out, s->of->type,
                s->level);
}

/* Whether codes of blocks are multiplied, not weights that were rounded. */
INLINE int of_codes(const struct packed_rows *call, int most) {
    return call->kind >= 0 && veneer_few_level(call->type, most) >= 4;
}

/* What is computed of several at once. */
INLINE int goes_together(const struct packed_rows *call, int most) {
    return of_codes(call, most) || gguf_float_usable(call, most);
}

int packed_like(const struct packed_rows *a, const struct packed_rows *b, int most) {
    return a->x == b->x && a->rows == b->rows && a->width == b->width && a->kind == b->kind &&
           a->type == b->type && goes_together(a, most);
}

int packed_together(const struct packed_rows *const *calls, int64_t count, int most) {
    struct gguf_weight weights[MOST_TOGETHER];
    if (!of_codes(calls[0], most)) {
        gguf_float_product(calls, count, most);
        return 0;
    }
    for (int64_t i = 0; i < count; i++)
        weights[i] =
            (struct gguf_weight){calls[i]->packed, calls[i]->bias, calls[i]->y, calls[i]->outs};
    const struct gguf_product product = {calls[0]->x,    weights,         count,
                                         calls[0]->rows, calls[0]->width, calls[0]->kind};
    return veneer_few_level(calls[0]->type, most) == 5 ? gguf_tiled_product(&product)
                                                       : gguf_vector_product(&product);
}

/* most: caps the instructions (5, 4, 3, 2, 0), for tests. 1: no memory for some rows of W. */
int veneer_packed_rows(const struct packed_rows *call, int most) {
    if (goes_together(call, most)) return packed_together(&call, 1, most);
    const struct source source = {call, nf4_level(most)};
    const struct piece piece = {call->x,    &source,     call->bias,
                                call->y,    call->rows,  call->width,
                                call->outs, call->width, call->kind < 0 ? of_nf4 : of_gguf};
    return veneer_pieces(&piece, 1, call->type, most, NULL);
}
