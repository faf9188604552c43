/* What a decoder layer with LoRA computes between its large products: see kernels/layers/block.py.
   Each pass takes 48 rows through all that can follow while they stay in a near cache: the update
   of a product, a sum, a norm, a gate or a rotation, and the first product of the next update. The
   same sums in the same order as rank.c and fused.c. */
#include "fused.h"
#include "parallel.h"
#include "rank.h"

#if defined(__x86_64__)

#define ALONG                                                                                      \
    6 /* rows that a gate goes along together: more are more streams than memory is asked for      \
         ahead */

/* The updates of up to three layers, side by side; count 0: there is none. Forward a factor lies
   across: A (R, width) and B (width, R) as the transposes of what is multiplied with. Factors with
   masks, all or none, are parts of their own: each sees the wide side through its mask. Those
   without are one part, unless they have more than MOST_RANK ranks together. */
struct rank_factors {
    const void *factors[MOST_LAYERS];
    int64_t ranks[MOST_LAYERS], count, across, half;
    struct mask masks[MOST_LAYERS];
    uint16_t *narrow; /* (rows, R), its rows `apart` values from each other */
    int64_t apart;
    float scale;
    uint32_t *pairs; /* C's own, as what is below */
    int64_t parts, sizes[MOST_LAYERS], starts[MOST_LAYERS];
};

static int64_t rank_of(const struct rank_factors *s) {
    int64_t all = 0;
    for (int64_t f = 0; f < s->count; f++) all += s->ranks[f];
    return all;
}

static void split(struct rank_factors *s, int64_t rows, int64_t width) {
    const int64_t apart = rank_of(s) > MOST_RANK;
    s->parts = 0;
    for (int64_t f = 0, at = 0; f < s->count; at += s->ranks[f++]) {
        if (f == 0 || apart || s->masks[f].keys) s->starts[s->parts] = at, s->sizes[s->parts++] = 0;
        s->sizes[s->parts - 1] += s->ranks[f];
        mask_begin(s->masks + f, rows, width);
    }
    s->pairs = s->count ? words(width / 2 * rank_of(s)) : NULL;
}

static void release(struct rank_factors *s) {
    free(s->pairs);
    for (int64_t f = 0; f < s->count; f++) free(s->masks[f].rows);
}

/* For narrow = scale * x W, W (width, R): of each part pairs (width / 2, its R). */
static VENEER_BF16 void pack_down(struct rank_factors *s, int64_t rows, int64_t width) {
    split(s, rows, width);
    for (int64_t f = 0, p = 0, at = 0; f < s->count; at += s->ranks[f++]) {
        if (p + 1 < s->parts && at >= s->starts[p + 1]) p++;
        uint32_t *to = s->pairs + width / 2 * s->starts[p] + at - s->starts[p];
        rank_pairs(s->factors[f], s->across, s->half, width, s->ranks[f], to, s->sizes[p]);
    }
}

/* For x += scale * narrow W, W (R, width). */
static VENEER_BF16 void pack_up(struct rank_factors *s, int64_t rows, int64_t width) {
    split(s, rows, width);
    for (int64_t f = 0, at = 0; f < s->count; at += s->ranks[f++])
        rank_pairs(s->factors[f], s->across, s->half, s->ranks[f], width, s->pairs + at / 2 * width,
                   width);
}

/* x (n, width): rows of the block, from `row` on. */
static VENEER_BF16 void down(const struct rank_factors *s, const uint16_t *x, int64_t row,
                             int64_t n, int64_t width) {
    for (int64_t p = 0; p < s->parts; p++)
        rank_down(s->masks + p, x, row, s->pairs + width / 2 * s->starts[p],
                  s->narrow + row * s->apart + s->starts[p], s->apart, n, width, s->sizes[p],
                  s->scale);
}

/* x (n, width), rows of the block, += the update, columns [c, c + wide); rounded after each part.
 */
static VENEER_BF16 void up_columns(const struct rank_factors *s, uint16_t *x, int64_t row,
                                   int64_t n, int64_t width, int64_t c, int64_t wide) {
    for (int64_t p = 0; p < s->parts; p++)
        rank_up(s->masks + p, s->narrow + row * s->apart + s->starts[p], s->apart,
                s->pairs + s->starts[p] / 2 * width, x, row, n, width, c, wide, s->sizes[p],
                s->scale);
}

static void up(const struct rank_factors *s, uint16_t *x, int64_t row, int64_t n, int64_t width) {
    for (int64_t c = 0; c < width; c += COLUMNS)
        up_columns(s, x, row, n, width, c, rank_columns(width, c));
}

/* A norm as norm_row of fused.h, or layer_norm_row where is_centred; weight NULL: there is no norm.
 */
struct weighting {
    const uint16_t *weight, *bias; /* bias: of one that is centred, or NULL */
    float *scale; /* one a row that is normed: 1 / root mean square, or 1 / deviation */
    int64_t is_wide, is_centred;
    float epsilon, offset;
};

static VENEER_BF16 void norm(const struct weighting *w, const uint16_t *x, uint16_t *out,
                             int64_t row, int64_t n, int64_t width) {
    for (int64_t r = 0, at = 0; r < n; r++, at += width)
        w->scale[row + r] =
            w->is_centred
                ? layer_norm_row(x + at, w->weight, w->bias, out + at, width, w->epsilon,
                                 w->offset)
                : norm_row(x + at, w->weight, out + at, width, w->epsilon, w->offset, w->is_wide);
}

/* x: the gradient of what the norm gave of `normed`; out: that of normed, + residual. */
static VENEER_BF16 void norm_gradient(const struct weighting *w, const uint16_t *normed,
                                      const uint16_t *x, const uint16_t *residual, uint16_t *out,
                                      int64_t row, int64_t n, int64_t width) {
    for (int64_t r = 0, at = 0; r < n; r++, at += width) {
        const uint16_t *more = residual ? residual + at : NULL;
        if (w->is_centred)
            layer_norm_row_gradient(normed + at, w->weight, x + at, w->scale[row + r], more,
                                    out + at, width, w->offset);
        else
            norm_row_gradient(normed + at, w->weight, x + at, w->scale[row + r], more, out + at,
                              width, w->offset);
    }
}

/* out = scale * x, rounded, + residual, which may be NULL. */
static VENEER_BF16 void sum(const uint16_t *x, const uint16_t *residual, uint16_t *out,
                            int64_t count, float scale) {
    for (int64_t i = 0; i < count; i += 16) {
        __m512 y = bf16_floats(x + i);
        if (scale != 1.0f) y = rounded(_mm512_mul_ps(y, _mm512_set1_ps(scale)));
        bf16_store(out + i, residual ? _mm512_add_ps(bf16_floats(residual + i), y) : y);
    }
}

/* Norms with the update and the sum that come first, and the first product of the next update.
   Forward: x + update, in place; total = output_norm of x, or without this norm x itself; total =
   residual + scale * total; out = the norm of total; the product `next` of out, or without a norm
   of total.
   Backward: x + update is the gradient of the norm of `normed`, or without a norm that of scale *
   normed; out is the gradient of normed, + residual; the product `next` of out. */
struct norms {
    uint16_t *x;
    const uint16_t *residual, *normed;
    uint16_t *total, *out;
    struct weighting output_norm, norm;
    struct rank_factors update, next;
    int64_t rows, width;
    float scale;
};

static VENEER_BF16 void norm_forward(void *arguments, int64_t from, int64_t to) {
    const struct norms *a = arguments;
    const int64_t width = a->width;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows), at = row * width;
        uint16_t *x = a->x + at, *total = a->total + at;
        uint16_t *out = a->norm.weight ? a->out + at : total;
        up(&a->update, x, row, n, width);
        if (a->output_norm.weight) norm(&a->output_norm, x, total, row, n, width);
        if (a->residual) sum(total, a->residual + at, total, n * width, a->scale);
        if (a->norm.weight) norm(&a->norm, total, out, row, n, width);
        down(&a->next, out, row, n, width);
    }
}

static VENEER_BF16 void norm_backward(void *arguments, int64_t from, int64_t to) {
    const struct norms *a = arguments;
    const int64_t width = a->width;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows), at = row * width;
        const uint16_t *residual = a->residual ? a->residual + at : NULL;
        uint16_t *x = a->x + at, *out = a->out + at;
        up(&a->update, x, row, n, width);
        if (a->norm.weight)
            norm_gradient(&a->norm, a->normed + at, x, residual, out, row, n, width);
        else
            sum(x, residual, out, n * width, a->scale);
        down(&a->next, out, row, n, width);
    }
}

static void norms(struct norms *a, veneer_body body) {
    pack_up(&a->update, a->rows, a->width);
    pack_down(&a->next, a->rows, a->width);
    veneer_parallel_dealt(body, a, rank_blocks(a->rows), 1, 4);
    release(&a->update);
    release(&a->next);
}

void veneer_block_norm_forward(struct norms *a) { norms(a, norm_forward); }
void veneer_block_norm_backward(struct norms *a) { norms(a, norm_backward); }

/* Forward: gate and up, each + its update (sides 0 and 1), in place; out = activation(gate) * up;
   the first product of the next update (side 2) of out. Backward: out is the gradient of what the
   gate gave, + the update of side 2; it becomes the gradient of gate, and grad_up that of up; the
   products of sides 0 and 1 of these. up and grad_up NULL: out = activation(gate). */
struct gates {
    uint16_t *gate, *up, *out, *grad_up;
    struct rank_factors sides[3];
    int64_t rows, width, activation;
};

VENEER_INLINE void gate_rows(const int activation, const struct gates *a, int64_t from,
                             int64_t to) {
    const struct rank_factors *s = a->sides;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows), start = row * a->width;
        for (int64_t m = row; m < row + n; m += ALONG)
            for (int64_t c = 0; c < a->width; c += COLUMNS) {
                const int64_t wide = rank_columns(a->width, c),
                              few = row + n - m < ALONG ? row + n - m : ALONG;
                up_columns(s, a->gate + m * a->width, m, few, a->width, c, wide);
                if (a->up) up_columns(s + 1, a->up + m * a->width, m, few, a->width, c, wide);
                for (int64_t r = 0; r < few; r++)
                    for (int64_t i = 0; i < wide; i += 16) {
                        const int64_t at = (m + r) * a->width + c + i;
                        bf16_store(a->out + at, gated(activation, bf16_floats(a->gate + at),
                                                      up_values(a->up, at)));
                    }
            }
        down(s + 2, a->out + start, row, n, a->width);
    }
}

VENEER_INLINE void gate_gradients(const int activation, const struct gates *a, int64_t from,
                                  int64_t to) {
    const struct rank_factors *s = a->sides;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows), start = row * a->width;
        for (int64_t m = row; m < row + n; m += ALONG)
            for (int64_t c = 0; c < a->width; c += COLUMNS) {
                const int64_t wide = rank_columns(a->width, c),
                              few = row + n - m < ALONG ? row + n - m : ALONG;
                up_columns(s + 2, a->out + m * a->width, m, few, a->width, c, wide);
                for (int64_t r = 0; r < few; r++)
                    for (int64_t i = 0; i < wide; i += 16) {
                        const int64_t at = (m + r) * a->width + c + i;
                        gated_gradient(activation, bf16_floats(a->gate + at), up_values(a->up, at),
                                       bf16_floats(a->out + at), a->out + at,
                                       a->grad_up ? a->grad_up + at : NULL);
                    }
            }
        down(s, a->out + start, row, n, a->width);
        if (a->grad_up) down(s + 1, a->grad_up + start, row, n, a->width);
    }
}

#define GATES(name, activation)                                                                    \
    static VENEER_BF16 void name##_forward(void *arguments, int64_t from, int64_t to) {            \
        gate_rows(activation, arguments, from, to);                                                \
    }                                                                                              \
    static VENEER_BF16 void name##_backward(void *arguments, int64_t from, int64_t to) {           \
        gate_gradients(activation, arguments, from, to);                                           \
    }

GATES(silu, SILU)
GATES(gelu_tanh, GELU_TANH)
GATES(gelu_erf, GELU_ERF)
GATES(relu, RELU)
GATES(relu_squared, RELU_SQUARED)

static void gates(struct gates *a, veneer_body body) {
    veneer_parallel_dealt(body, a, rank_blocks(a->rows), 1, 4);
    for (int i = 0; i < 3; i++) release(a->sides + i);
}

void veneer_block_gate_forward(struct gates *a) {
    const veneer_body bodies[] = {silu_forward, gelu_tanh_forward, gelu_erf_forward, relu_forward,
                                  relu_squared_forward};
    pack_up(a->sides, a->rows, a->width);
    pack_up(a->sides + 1, a->rows, a->width);
    pack_down(a->sides + 2, a->rows, a->width);
    gates(a, bodies[a->activation]);
}

void veneer_block_gate_backward(struct gates *a) {
    const veneer_body bodies[] = {silu_backward, gelu_tanh_backward, gelu_erf_backward,
                                  relu_backward, relu_squared_backward};
    pack_down(a->sides, a->rows, a->width);
    pack_down(a->sides + 1, a->rows, a->width);
    pack_up(a->sides + 2, a->rows, a->width);
    gates(a, bodies[a->activation]);
}

/* q, k and v, rows of `heads` heads each. Forward: each + its update, in place; q and k normed and
   turned, into out where there is a norm of theirs, else in place. Backward: gradients of q and k
   turned back and taken through the norms of `normed`, in place, then each one's first product. A
   norm is of so many values of a row side by side (spans): a head, or all heads. norms_last: q and
   k are turned in place before their norms; `normed` are the turned ones. */
struct heads {
    uint16_t *x[MOST_LAYERS], *out[2];
    const uint16_t *normed[2];
    struct weighting norms[2];
    int64_t spans[2], heads[MOST_LAYERS];
    struct rank_factors sides[MOST_LAYERS];
    struct rotation rotation;
    int64_t rows, size, norms_last, back;
};

/* Rows of q (i = 0) or of k: their norm, or their gradient back through it. Returns where they are.
 */
static VENEER_BF16 uint16_t *weigh(const struct heads *a, int64_t i, uint16_t *x, int64_t row,
                                   int64_t n) {
    const int64_t width = a->heads[i] * a->size, start = row * width;
    const struct weighting *w = a->norms + i;
    if (!w->weight) return x;
    const int64_t span = a->spans[i], spans = width / span;
    uint16_t *out = a->back ? x : a->out[i] + start;
    if (a->back)
        norm_gradient(w, a->normed[i] + start, x, NULL, x, row * spans, n * spans, span);
    else norm(w, x, out, row * spans, n * spans, span);
    return out;
}

static VENEER_BF16 void turn(const struct heads *a, int64_t i, uint16_t *x, int64_t row,
                             int64_t n) {
    const int64_t width = a->heads[i] * a->size, norm_first = a->norms_last == a->back;
    if (norm_first) x = weigh(a, i, x, row, n);
    for (int64_t r = 0; a->rotation.cos && r < n; r++)
        rotate_row(x + r * width, &a->rotation, row + r, x + r * width, a->heads[i], a->size,
                   a->back);
    if (!norm_first) weigh(a, i, x, row, n);
}

static VENEER_BF16 void heads_body(void *arguments, int64_t from, int64_t to) {
    const struct heads *a = arguments;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        for (int64_t i = 0; i < MOST_LAYERS; i++) {
            const int64_t width = a->heads[i] * a->size;
            uint16_t *x = a->x[i] + row * width;
            if (!a->back) up(a->sides + i, x, row, n, width);
            if (i < 2) turn(a, i, x, row, n);
            if (a->back) down(a->sides + i, x, row, n, width);
        }
    }
}

void veneer_block_heads(struct heads *a) {
    for (int i = 0; i < MOST_LAYERS; i++)
        (a->back ? pack_down : pack_up)(a->sides + i, a->rows, a->heads[i] * a->size);
    veneer_parallel_dealt(heads_body, a, rank_blocks(a->rows), 1, 4);
    for (int i = 0; i < MOST_LAYERS; i++) release(a->sides + i);
}

/* x, rows of `groups` times `heads` heads of q and their k and v, one layer's output. Forward:
   x + its update, q and k turned, in place; and q copied to out, if there is one. Backward, where
   there are gradients `grads` of q, k and v (rows, heads, size): they are put together in x, those
   of q and k turned back, then the first product of x. */
struct heads_joined {
    uint16_t *x, *out;
    const uint16_t *grads[MOST_LAYERS];
    struct rank_factors side;
    struct rotation rotation;
    int64_t rows, groups, heads, size;
};

static VENEER_BF16 void heads_joined_body(void *arguments, int64_t from, int64_t to) {
    const struct heads_joined *a = arguments;
    const int64_t step = (a->heads + 2) * a->size, width = a->groups * step;
    const int64_t q = a->heads * a->size, back = a->grads[0] != NULL;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        uint16_t *x = a->x + row * width;
        if (!back) up(&a->side, x, row, n, width);
        for (int64_t r = 0; r < n; r++) {
            uint16_t *own = x + r * width;
            const int64_t first = (row + r) * a->groups;
            for (int64_t g = 0; back && g < a->groups; g++) {
                uint16_t *to_q = own + g * step;
                memcpy(to_q, a->grads[0] + (first + g) * q, (size_t)q * 2);
                for (int64_t i = 0; i < 2; i++)
                    memcpy(to_q + q + i * a->size, a->grads[1 + i] + (first + g) * a->size,
                           (size_t)a->size * 2);
            }
            for (int64_t i = 0; a->rotation.cos && i <= a->heads; i++)
                rotate_row(own + i * a->size, &a->rotation, row + r, own + i * a->size, a->groups,
                           step, back);
            for (int64_t g = 0; a->out && g < a->groups; g++)
                memcpy(a->out + (first + g) * q, own + g * step, (size_t)q * 2);
        }
        if (back) down(&a->side, x, row, n, width);
    }
}

void veneer_block_heads_joined(struct heads_joined *a) {
    const int64_t width = a->groups * (a->heads + 2) * a->size;
    (a->grads[0] ? pack_down : pack_up)(&a->side, a->rows, width);
    veneer_parallel_dealt(heads_joined_body, a, rank_blocks(a->rows), 1, 4);
    release(&a->side);
}

#endif
