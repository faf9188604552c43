/* Attention over packed documents in bf16 on ARM, forward and backward: what attention.c computes,
   by products of quads (BFMMLA, quads.h). Called where the processor has them. The softmax between
   the products is that of attention_float_body.h. Sums run in float32; shares and gradients of
   scores are rounded to bf16 before they are multiplied. */
#if defined(__aarch64__)
#include "attention.h"
#include "levels.h"
#include "quads.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 48 /* query rows whose scores exist at once: a multiple of 8 */

#undef INLINE
#define NAME(x) x##_arm
#define TARGET
#define W 4
#define WIDE 4
#define FUSED(a, b, sum) ((fv_arm)FUSED_128(a, b, sum))
#include "float_vectors.h"
#include "attention_softmax.h"

/* Query rows of one head: the n of a block, in bf16. */
struct rows {
    const uint16_t *first;
    int64_t apart, n;
};

static const uint16_t *row_at(const struct rows *rows, int64_t r) {
    return r < rows->n ? rows->first + r * rows->apart : NULL;
}

/* Rows as lines: 8 by 8, their `width` values in quads. */
static void rows_across(const struct rows *rows, int64_t width, uint16_t *to) {
    for (int64_t r = 0; r < rows->n; r += LINES, to += quads_of(width) * QUADS) {
        const uint16_t *of[LINES];
        for (int64_t i = 0; i < LINES; i++) of[i] = row_at(rows, r + i);
        lines_to_quads(of, width, to);
    }
}

/* `width` columns as lines, a multiple of 8: the rows in quads. */
static void rows_along(const struct rows *rows, int64_t width, uint16_t *to) {
    for (int64_t c = 0; c < width; c += LINES)
        for (int64_t r = 0; r < rows->n; r += 4, to += QUADS) {
            const uint16_t *of[4];
            for (int64_t j = 0; j < 4; j++)
                of[j] = r + j < rows->n ? row_at(rows, r + j) + c : NULL;
            rows_to_quads(of, LINES, to);
        }
}

static void keys_across(const struct place *p, int values, uint16_t *to) {
    for (int64_t j = 0; j < p->width; j += LINES, to += p->a->size * LINES) {
        const uint16_t *of[LINES];
        for (int64_t i = 0; i < LINES; i++) of[i] = key_row(p, j + i, values);
        lines_to_quads(of, p->a->size, to);
    }
}

static void keys_along(const struct place *p, int values, uint16_t *to) {
    for (int64_t d = 0; d < p->a->size; d += LINES)
        for (int64_t k = 0; k < p->width; k += 4, to += QUADS) {
            const uint16_t *of[4];
            for (int64_t j = 0; j < 4; j++) {
                of[j] = key_row(p, k + j, values);
                if (of[j] != NULL) of[j] += d;
            }
            rows_to_quads(of, LINES, to);
        }
}

/* C (M, N) [+]= A B of `quads` quads, M and N rounded up to 8. Eight lines of A lie beside each
   other, `apart` values of B from the next eight. */
struct quad_product {
    const uint16_t *A, *B;
    float *C;
    int64_t M, N, quads, apart, ldc;
    int add;
};

static FOR_BFDOT void multiply(struct quad_product p) {
    for (int64_t m = 0; m < p.M; m += LINES)
        for (int64_t n = 0; n < p.N; n += LINES) {
            f4v sums[LINES][2];
            multiply_quads(p.A + m / LINES * p.quads * QUADS, p.B + n / LINES * p.apart, p.quads,
                           sums);
            for (int64_t r = 0; r < LINES; r++)
                for (int64_t j = 0; j < 2; j++) {
                    float *to = p.C + (m + r) * p.ldc + n + 4 * j;
                    put_floats(to, p.add ? some_floats(to, 4, FEW_FP32) + sums[r][j] : sums[r][j],
                               4, FEW_FP32);
                }
        }
}

/* `count` floats, a multiple of 4, divided. */
static void to_bf16(const float *from, int64_t count, float by, uint16_t *to) {
    for (int64_t i = 0; i < count; i += 4)
        put_floats(to + i, some_floats(from + i, 4, FEW_FP32) / by, 4, FEW_BF16);
}

/* What a task works with, in one piece of memory. */
struct room {
    uint16_t *keys, *values, *along, *shares, *gradients, *x, *y;
    float *scores, *grads, *sums, *slopes, *grad_k, *grad_v;
};

static struct room room_of(const struct place *p) {
    const int64_t keys = p->width * p->a->size, block = ROWS * p->width, sums = ROWS * p->a->size;
    const int64_t floats = 2 * block + sums + p->width + 2 * keys;
    const int64_t halves = 3 * keys + 2 * block + (block > sums ? block : sums) + sums;
    void *whole = NULL;
    if (posix_memalign(&whole, 64, (size_t)(4 * floats + 2 * halves))) abort();
    struct room room = {.scores = whole};
    room.grads = room.scores + block, room.sums = room.grads + block;
    room.slopes = room.sums + sums, room.grad_k = room.slopes + p->width;
    room.grad_v = room.grad_k + keys, room.keys = (uint16_t *)(room.grad_v + keys);
    room.values = room.keys + keys, room.along = room.values + keys;
    room.shares = room.along + keys, room.gradients = room.shares + block;
    room.y = room.gradients + block, room.x = room.y + sums;
    return room;
}

static void forward_body(void *arguments, int64_t from, int64_t to) {
    const struct attention *a = arguments;
    const int64_t D = a->size, G = a->heads / a->kv_heads;
    for (int64_t task = from; task < to; task++) {
        const struct place p = place_of(a, task);
        const struct room room = room_of(&p);
        keys_across(&p, 0, room.keys);
        keys_along(&p, 1, room.values);
        for (int64_t h = p.kv * G; h < (p.kv + 1) * G; h++)
            for (int64_t number = p.split; number * ROWS < p.L; number += a->splits) {
                const struct block_arm b = block_of_arm(&p, number);
                const struct rows q = {(const uint16_t *)a->q + b.row * a->q_row + h * a->q_head,
                                       a->q_row, b.n},
                                  shares = {room.shares, p.width, b.n};
                float totals[ROWS];
                rows_across(&q, D, room.x);
                multiply((struct quad_product){room.x, room.keys + b.first * D, room.scores, b.n,
                                               b.width, D / 4, D * LINES, p.width, 0});
                for (int64_t r = 0; r < b.n; r++) {
                    float *scores = room.scores + r * p.width;
                    totals[r] =
                        exponentials_arm(a, &b, r, scores, a->lse + (b.row + r) * a->heads + h);
                    to_bf16(scores, b.width, 1, room.shares + r * p.width);
                }
                rows_across(&shares, b.width, room.x);
                multiply((struct quad_product){room.x, room.values + b.first * LINES, room.sums,
                                               b.n, D, b.width / 4, p.width * LINES, D, 0});
                for (int64_t r = 0; r < b.n; r++)
                    to_bf16(room.sums + r * D, D, totals[r],
                            (uint16_t *)a->out + ((b.row + r) * a->heads + h) * D);
            }
        free(room.scores);
    }
}

/* Keys' gradients (width, D) += the products of what `rows` rows hold for each key with their x. */
static void add_to_keys(const struct room *room, const struct rows *rows, int64_t width,
                        const struct rows *x, int64_t D, float *grad) {
    const int64_t quads = quads_of(x->n);
    rows_along(rows, width, room->x);
    rows_along(x, D, room->y);
    multiply((struct quad_product){room->x, room->y, grad, width, D, quads, quads * QUADS, D, 1});
}

static void backward_body(void *arguments, int64_t from, int64_t to) {
    const struct attention *a = arguments;
    const int64_t D = a->size, G = a->heads / a->kv_heads;
    for (int64_t task = from; task < to; task++) {
        const struct place p = place_of(a, task);
        const struct room room = room_of(&p);
        keys_across(&p, 0, room.keys);
        keys_across(&p, 1, room.values);
        keys_along(&p, 0, room.along);
        memset(room.grad_k, 0, (size_t)(2 * p.width * D) * sizeof(float));
        for (int64_t h = p.kv * G; h < (p.kv + 1) * G; h++)
            for (int64_t number = p.split; number * ROWS < p.L; number += a->splits) {
                const struct block_arm b = block_of_arm(&p, number);
                const struct rows q = {(const uint16_t *)a->q + b.row * a->q_row + h * a->q_head,
                                       a->q_row, b.n},
                                  g = {(const uint16_t *)a->grad + b.row * a->grad_row +
                                           h * a->grad_head,
                                       a->grad_row, b.n},
                                  shares = {room.shares, p.width, b.n},
                                  gradients = {room.gradients, p.width, b.n};
                rows_across(&q, D, room.x);
                multiply((struct quad_product){room.x, room.keys + b.first * D, room.scores, b.n,
                                               b.width, D / 4, D * LINES, p.width, 0});
                rows_across(&g, D, room.x);
                multiply((struct quad_product){room.x, room.values + b.first * D, room.grads, b.n,
                                               b.width, D / 4, D * LINES, p.width, 0});
                for (int64_t r = 0, at = 0; r < b.n; r++, at += p.width) {
                    row_gradient_arm(a, &b, r, a->lse[(b.row + r) * a->heads + h],
                                     room.scores + at, room.grads + at, room.slopes);
                    to_bf16(room.scores + at, b.width, 1, room.shares + at);
                    to_bf16(room.grads + at, b.width, 1, room.gradients + at);
                }
                rows_across(&gradients, b.width, room.x);
                multiply((struct quad_product){room.x, room.along + b.first * LINES, room.sums,
                                               b.n, D, b.width / 4, p.width * LINES, D, 0});
                for (int64_t r = 0; r < b.n; r++)
                    to_bf16(room.sums + r * D, D, 1,
                            (uint16_t *)a->out + ((b.row + r) * a->heads + h) * D);
                add_to_keys(&room, &shares, b.width, &g, D, room.grad_v + b.first * D);
                add_to_keys(&room, &gradients, b.width, &q, D, room.grad_k + b.first * D);
            }
        give_gradients(&p, room.grad_k, room.grad_v);
        free(room.scores);
    }
}

void veneer_attention_forward(struct attention *a) {
    veneer_parallel_dealt(forward_body, a, a->docs * a->kv_heads * a->splits, 1, 8);
}

/* out: the gradient of q, (rows, H, D). */
void veneer_attention_backward(struct attention *a) {
    veneer_parallel_dealt(backward_body, a, a->docs * a->kv_heads * a->splits, 1, 8);
}
#endif
