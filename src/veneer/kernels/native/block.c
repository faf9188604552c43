/* What a decoder layer with LoRA computes between its large products: see kernels/block.py. Each pass takes 48 rows
   through all that can follow while they stay in a near cache: the update of a product, a sum, a norm, a gate or a
   rotation, and the first product of the next update. The same sums in the same order as rank.c and fused.c. */
#include "fused.h"
#include "parallel.h"
#include "rank.h"

#if defined(__x86_64__)

#define MOST 3 /* layers of one input; kernels/block_calls.py knows it too */

/* The update of up to three layers, side by side. Forward a factor lies across: A (R, width) and B (width, R) as the
   transposes of what is multiplied with. count 0: there is none. */
struct side {
    const void *factors[MOST];
    int64_t ranks[MOST], count, across, half;
    uint16_t *narrow; /* (rows, R), its rows `apart` values from each other */
    int64_t apart;
    float scale;
    uint32_t *pairs; /* C's own */
};

static int64_t rank_of(const struct side *s) {
    int64_t all = 0;
    for (int64_t f = 0; f < s->count; f++) all += s->ranks[f];
    return all;
}

/* For narrow = scale * x W, W (width, R). */
static VENEER_BF16 void pack_down(struct side *s, int64_t width) {
    const int64_t rank = rank_of(s);
    s->pairs = s->count ? words(width / 2 * rank) : NULL;
    for (int64_t f = 0, at = 0; f < s->count; at += s->ranks[f++])
        rank_pairs(s->factors[f], s->across, s->half, width, s->ranks[f], s->pairs + at, rank);
}

/* For x += scale * narrow W, W (R, width). */
static VENEER_BF16 void pack_up(struct side *s, int64_t width) {
    s->pairs = s->count ? words(rank_of(s) / 2 * width) : NULL;
    for (int64_t f = 0, at = 0; f < s->count; at += s->ranks[f++])
        rank_pairs(s->factors[f], s->across, s->half, s->ranks[f], width, s->pairs + at / 2 * width, width);
}

VENEER_INLINE void down(const struct side *s, const uint16_t *x, int64_t row, int64_t n, int64_t width) {
    if (s->count) rank_down(x, s->pairs, s->narrow + row * s->apart, s->apart, n, width, rank_of(s), s->scale);
}

/* sums (n, COLUMNS) = narrow W, columns [c, c + wide). */
VENEER_INLINE void up_sums(const struct side *s, int64_t row, int64_t n, int64_t width, int64_t c, int64_t wide, float *sums) {
    bf16_product((const uint32_t *)(s->narrow + row * s->apart), s->apart / 2, 1, s->pairs + c, width, sums, COLUMNS, n, wide, rank_of(s) / 2,
                 0);
}

VENEER_INLINE __m512 updated(const struct side *s, const uint16_t *x, const float *sums) {
    return _mm512_fmadd_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(s->scale), bf16_floats(x));
}

static inline int64_t columns(int64_t width, int64_t c) { return width - c < COLUMNS ? width - c : COLUMNS; }

/* x (n, width), rows of the block, += the update. */
static VENEER_BF16 void up(const struct side *s, uint16_t *x, int64_t row, int64_t n, int64_t width) {
    float sums[BLOCK * COLUMNS];
    for (int64_t c = 0; s->count && c < width; c += COLUMNS) {
        const int64_t wide = columns(width, c);
        up_sums(s, row, n, width, c, wide, sums);
        for (int64_t r = 0; r < n; r++)
            for (int64_t i = 0; i < wide; i += 16)
                bf16_store(x + r * width + c + i, updated(s, x + r * width + c + i, sums + r * COLUMNS + i));
    }
}

/* A norm with what stands in front of it and behind it. Forward: x + update + beside, in place where there is one of
   these; out = its norm, unless weight is NULL; the update behind of out. Backward: x is the gradient of what the norm
   gave, of `normed`; out that of normed, + beside; the update behind of out. */
struct norms {
    uint16_t *x;
    const uint16_t *beside, *weight, *normed;
    uint16_t *out;
    float *scale; /* one a row: 1 / root mean square */
    struct side before, behind;
    int64_t rows, width;
    float epsilon;
};

static VENEER_BF16 void norm_forward(void *arguments, int64_t from, int64_t to) {
    const struct norms *a = arguments;
    const int64_t width = a->width;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows), at = row * width;
        up(&a->before, a->x + at, row, n, width);
        for (int64_t i = 0; a->beside && i < n * width; i += 16)
            bf16_store(a->x + at + i, _mm512_add_ps(bf16_floats(a->beside + at + i), bf16_floats(a->x + at + i)));
        if (!a->weight) continue;
        for (int64_t r = 0; r < n; r++)
            a->scale[row + r] = norm_row(a->x + at + r * width, a->weight, a->out + at + r * width, width, a->epsilon);
        down(&a->behind, a->out + at, row, n, width);
    }
}

static VENEER_BF16 void norm_backward(void *arguments, int64_t from, int64_t to) {
    const struct norms *a = arguments;
    const int64_t width = a->width;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows), at = row * width;
        up(&a->before, a->x + at, row, n, width);
        for (int64_t r = 0; r < n; r++) {
            const int64_t own = at + r * width;
            norm_row_gradient(a->normed + own, a->weight, a->x + own, a->scale[row + r], a->beside + own, a->out + own, width);
        }
        down(&a->behind, a->out + at, row, n, width);
    }
}

static void norms(struct norms *a, veneer_body body) {
    pack_up(&a->before, a->width);
    pack_down(&a->behind, a->width);
    veneer_parallel(body, a, rank_blocks(a->rows), 1);
    free(a->before.pairs);
    free(a->behind.pairs);
}

void veneer_block_norm_forward(struct norms *a) { norms(a, norm_forward); }
void veneer_block_norm_backward(struct norms *a) { norms(a, norm_backward); }

/* Forward: gate and up, each + its update (sides 0 and 1), in place; out = silu(gate) * up; the update behind (side 2) of
   out. Backward: out is the gradient of what the gate gave, + the update of side 2; it becomes the gradient of gate, and
   grad_up that of up; sides 0 and 1 behind these. */
struct gates {
    uint16_t *gate, *up, *out, *grad_up;
    struct side sides[3];
    int64_t rows, width;
};

static VENEER_BF16 void gate_forward(void *arguments, int64_t from, int64_t to) {
    const struct gates *a = arguments;
    const struct side *s = a->sides;
    float gate_sums[BLOCK * COLUMNS], up_of_sums[BLOCK * COLUMNS];
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        for (int64_t c = 0; c < a->width; c += COLUMNS) {
            const int64_t wide = columns(a->width, c);
            up_sums(s, row, n, a->width, c, wide, gate_sums);
            up_sums(s + 1, row, n, a->width, c, wide, up_of_sums);
            for (int64_t r = 0; r < n; r++)
                for (int64_t i = 0; i < wide; i += 16) {
                    const int64_t at = (row + r) * a->width + c + i;
                    const __m512 gate = rounded(updated(s, a->gate + at, gate_sums + r * COLUMNS + i));
                    const __m512 by = rounded(updated(s + 1, a->up + at, up_of_sums + r * COLUMNS + i));
                    bf16_store(a->gate + at, gate);
                    bf16_store(a->up + at, by);
                    bf16_store(a->out + at, gated(gate, by));
                }
        }
        down(s + 2, a->out + row * a->width, row, n, a->width);
    }
}

static VENEER_BF16 void gate_backward(void *arguments, int64_t from, int64_t to) {
    const struct gates *a = arguments;
    const struct side *s = a->sides;
    float sums[BLOCK * COLUMNS];
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        for (int64_t c = 0; c < a->width; c += COLUMNS) {
            const int64_t wide = columns(a->width, c);
            up_sums(s + 2, row, n, a->width, c, wide, sums);
            for (int64_t r = 0; r < n; r++)
                for (int64_t i = 0; i < wide; i += 16) {
                    const int64_t at = (row + r) * a->width + c + i;
                    const __m512 g = rounded(updated(s + 2, a->out + at, sums + r * COLUMNS + i));
                    gated_gradient(bf16_floats(a->gate + at), bf16_floats(a->up + at), g, a->out + at, a->grad_up + at);
                }
        }
        down(s, a->out + row * a->width, row, n, a->width);
        down(s + 1, a->grad_up + row * a->width, row, n, a->width);
    }
}

void veneer_block_gate_forward(struct gates *a) {
    pack_up(a->sides, a->width);
    pack_up(a->sides + 1, a->width);
    pack_down(a->sides + 2, a->width);
    veneer_parallel(gate_forward, a, rank_blocks(a->rows), 1);
    for (int i = 0; i < 3; i++) free(a->sides[i].pairs);
}

void veneer_block_gate_backward(struct gates *a) {
    pack_down(a->sides, a->width);
    pack_down(a->sides + 1, a->width);
    pack_up(a->sides + 2, a->width);
    veneer_parallel(gate_backward, a, rank_blocks(a->rows), 1);
    for (int i = 0; i < 3; i++) free(a->sides[i].pairs);
}

/* q, k and v, rows of `heads` heads each, in place. Forward: each + its update, then q and k turned. Backward: q and k
   turned back, then each one's first product. */
struct heads {
    uint16_t *x[MOST];
    int64_t heads[MOST];
    struct side sides[MOST];
    const uint16_t *cos, *sin; /* (rows, size) */
    int64_t rows, size, back;
};

static VENEER_BF16 void heads_body(void *arguments, int64_t from, int64_t to) {
    const struct heads *a = arguments;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        for (int64_t i = 0; i < MOST; i++) {
            const int64_t width = a->heads[i] * a->size;
            uint16_t *x = a->x[i] + row * width;
            if (!a->back) up(a->sides + i, x, row, n, width);
            for (int64_t r = 0; i < 2 && r < n; r++) {
                const int64_t at = (row + r) * a->size;
                rotate_row(x + r * width, a->cos + at, a->sin + at, x + r * width, a->heads[i], a->size, a->back);
            }
            if (a->back) down(a->sides + i, x, row, n, width);
        }
    }
}

void veneer_block_heads(struct heads *a) {
    for (int i = 0; i < MOST; i++) (a->back ? pack_down : pack_up)(a->sides + i, a->heads[i] * a->size);
    veneer_parallel(heads_body, a, rank_blocks(a->rows), 1);
    for (int i = 0; i < MOST; i++) free(a->sides[i].pairs);
}

#endif
