/* What a decoder layer with LoRA computes between its large products: see kernels/dense/block.py.
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
   without are one part. */
struct side {
    const void *factors[MOST];
    int64_t ranks[MOST], count, across, half;
    struct mask masks[MOST];
    uint16_t *narrow; /* (rows, R), its rows `apart` values from each other */
    int64_t apart;
    float scale;
    uint32_t *pairs; /* C's own, as what is below */
    int64_t parts, sizes[MOST], starts[MOST];
};

static int64_t rank_of(const struct side *s) {
    int64_t all = 0;
    for (int64_t f = 0; f < s->count; f++) all += s->ranks[f];
    return all;
}

static void split(struct side *s, int64_t rows, int64_t width) {
    s->parts = 0;
    for (int64_t f = 0, at = 0; f < s->count; at += s->ranks[f++]) {
        if (f == 0 || s->masks[f].keys) s->starts[s->parts] = at, s->sizes[s->parts++] = 0;
        s->sizes[s->parts - 1] += s->ranks[f];
        mask_begin(s->masks + f, rows, width);
    }
    s->pairs = s->count ? words(width / 2 * rank_of(s)) : NULL;
}

static void release(struct side *s) {
    free(s->pairs);
    for (int64_t f = 0; f < s->count; f++) free(s->masks[f].rows);
}

/* For narrow = scale * x W, W (width, R): of each part pairs (width / 2, its R). */
static VENEER_BF16 void pack_down(struct side *s, int64_t rows, int64_t width) {
    split(s, rows, width);
    for (int64_t f = 0, p = 0, at = 0; f < s->count; at += s->ranks[f++]) {
        if (p + 1 < s->parts && at >= s->starts[p + 1]) p++;
        uint32_t *to = s->pairs + width / 2 * s->starts[p] + at - s->starts[p];
        rank_pairs(s->factors[f], s->across, s->half, width, s->ranks[f], to, s->sizes[p]);
    }
}

/* For x += scale * narrow W, W (R, width). */
static VENEER_BF16 void pack_up(struct side *s, int64_t rows, int64_t width) {
    split(s, rows, width);
    for (int64_t f = 0, at = 0; f < s->count; at += s->ranks[f++])
        rank_pairs(s->factors[f], s->across, s->half, s->ranks[f], width, s->pairs + at / 2 * width,
                   width);
}

/* x (n, width): rows of the block, from `row` on. */
static VENEER_BF16 void down(const struct side *s, const uint16_t *x, int64_t row, int64_t n,
                             int64_t width) {
    for (int64_t p = 0; p < s->parts; p++)
        rank_down(s->masks + p, x, row, s->pairs + width / 2 * s->starts[p],
                  s->narrow + row * s->apart + s->starts[p], s->apart, n, width, s->sizes[p],
                  s->scale);
}

/* x (n, width), rows of the block, += the update, columns [c, c + wide); rounded after each part.
 */
static VENEER_BF16 void up_columns(const struct side *s, uint16_t *x, int64_t row, int64_t n,
                                   int64_t width, int64_t c, int64_t wide) {
    for (int64_t p = 0; p < s->parts; p++)
        rank_up(s->masks + p, s->narrow + row * s->apart + s->starts[p], s->apart,
                s->pairs + s->starts[p] / 2 * width, x, row, n, width, c, wide, s->sizes[p],
                s->scale);
}

static void up(const struct side *s, uint16_t *x, int64_t row, int64_t n, int64_t width) {
    for (int64_t c = 0; c < width; c += COLUMNS)
        up_columns(s, x, row, n, width, c, rank_columns(width, c));
}

/* A norm with what stands in front of it and behind it. Forward: x + update + beside, in place
   where there is one of these; out = its norm, unless weight is NULL; the update behind of out.
   Backward: x is the gradient of what the norm gave, of `normed`; out that of normed, + beside; the
   update behind of out. */
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
            bf16_store(a->x + at + i,
                       _mm512_add_ps(bf16_floats(a->beside + at + i), bf16_floats(a->x + at + i)));
        if (!a->weight) continue;
        for (int64_t r = 0; r < n; r++)
            a->scale[row + r] = norm_row(a->x + at + r * width, a->weight, a->out + at + r * width,
                                         width, a->epsilon);
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
            norm_row_gradient(a->normed + own, a->weight, a->x + own, a->scale[row + r],
                              a->beside + own, a->out + own, width);
        }
        down(&a->behind, a->out + at, row, n, width);
    }
}

static void norms(struct norms *a, veneer_body body) {
    pack_up(&a->before, a->rows, a->width);
    pack_down(&a->behind, a->rows, a->width);
    veneer_parallel_dealt(body, a, rank_blocks(a->rows), 1, 4);
    release(&a->before);
    release(&a->behind);
}

void veneer_block_norm_forward(struct norms *a) { norms(a, norm_forward); }
void veneer_block_norm_backward(struct norms *a) { norms(a, norm_backward); }

/* Forward: gate and up, each + its update (sides 0 and 1), in place; out = silu(gate) * up; the
   update behind (side 2) of out. Backward: out is the gradient of what the gate gave, + the update
   of side 2; it becomes the gradient of gate, and grad_up that of up; sides 0 and 1 behind these.
 */
struct gates {
    uint16_t *gate, *up, *out, *grad_up;
    struct side sides[3];
    int64_t rows, width;
};

static VENEER_BF16 void gate_forward(void *arguments, int64_t from, int64_t to) {
    const struct gates *a = arguments;
    const struct side *s = a->sides;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows), start = row * a->width;
        for (int64_t m = row; m < row + n; m += ALONG)
            for (int64_t c = 0; c < a->width; c += COLUMNS) {
                const int64_t wide = rank_columns(a->width, c),
                              few = row + n - m < ALONG ? row + n - m : ALONG;
                up_columns(s, a->gate + m * a->width, m, few, a->width, c, wide);
                up_columns(s + 1, a->up + m * a->width, m, few, a->width, c, wide);
                for (int64_t r = 0; r < few; r++)
                    for (int64_t i = 0; i < wide; i += 16) {
                        const int64_t at = (m + r) * a->width + c + i;
                        bf16_store(a->out + at,
                                   gated(bf16_floats(a->gate + at), bf16_floats(a->up + at)));
                    }
            }
        down(s + 2, a->out + start, row, n, a->width);
    }
}

static VENEER_BF16 void gate_backward(void *arguments, int64_t from, int64_t to) {
    const struct gates *a = arguments;
    const struct side *s = a->sides;
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
                        gated_gradient(bf16_floats(a->gate + at), bf16_floats(a->up + at),
                                       bf16_floats(a->out + at), a->out + at, a->grad_up + at);
                    }
            }
        down(s, a->out + start, row, n, a->width);
        down(s + 1, a->grad_up + start, row, n, a->width);
    }
}

static void gates(struct gates *a, veneer_body body) {
    veneer_parallel_dealt(body, a, rank_blocks(a->rows), 1, 4);
    for (int i = 0; i < 3; i++) release(a->sides + i);
}

void veneer_block_gate_forward(struct gates *a) {
    pack_up(a->sides, a->rows, a->width);
    pack_up(a->sides + 1, a->rows, a->width);
    pack_down(a->sides + 2, a->rows, a->width);
    gates(a, gate_forward);
}

void veneer_block_gate_backward(struct gates *a) {
    pack_down(a->sides, a->rows, a->width);
    pack_down(a->sides + 1, a->rows, a->width);
    pack_up(a->sides + 2, a->rows, a->width);
    gates(a, gate_backward);
}

/* q, k and v, rows of `heads` heads each, in place. Forward: each + its update, then q and k
   turned. Backward: q and k turned back, then each one's first product. */
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
                rotate_row(x + r * width, a->cos + at, a->sin + at, x + r * width, a->heads[i],
                           a->size, a->back);
            }
            if (a->back) down(a->sides + i, x, row, n, width);
        }
    }
}

void veneer_block_heads(struct heads *a) {
    for (int i = 0; i < MOST; i++)
        (a->back ? pack_down : pack_up)(a->sides + i, a->rows, a->heads[i] * a->size);
    veneer_parallel_dealt(heads_body, a, rank_blocks(a->rows), 1, 4);
    for (int i = 0; i < MOST; i++) release(a->sides + i);
}

#endif
