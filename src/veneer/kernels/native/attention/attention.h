/* What a call of attention over packed documents is given (attention.c, attention_float.c), and
 * what a task of it is. */
#ifndef VENEER_ATTENTION_H
#define VENEER_ATTENTION_H

#include <stdint.h>
#include <string.h>

/* Values are bf16 or float32. Strides are in values; the innermost one is 1 everywhere.
   kernels/bindings/attention_calls.py has the same fields in this order. */
struct attention {
    const void *q, *k, *v, *before_k, *before_v, *grad;
    const void *forward_out; /* (rows, H, D) what forward wrote, for backward on tiles */
    void *out;
    float *lse; /* (rows, H) log of the sum of exponentials, forward writes, backward reads */
    float *grad_k, *grad_v;               /* (splits, rows, K, D) */
    float *grad_before_k, *grad_before_v; /* (docs, splits, K, before, D) */
    const int64_t *starts; /* (docs + 1) first row of every document, then the number of rows */
    int64_t q_row, q_head, k_row, k_head, v_row, v_head, bk_row, bk_head, bv_row, bv_head, grad_row,
        grad_head;
    int64_t rows, docs, heads, kv_heads, size, before, window, splits;
    float scale, softcap; /* softcap 0: none */
};

/* One document and key head: where its rows and keys are. */
struct place {
    const struct attention *a;
    int64_t doc, kv, split, start, L, J, width; /* width: J rounded up to 16 */
};

/* Factor from a score in memory to the score. In memory is q k, or tanh(scale q k / softcap) if
   there is a soft cap. */
static inline float unit_of(const struct attention *a) {
    return a->softcap != 0.0f ? a->softcap : a->scale;
}

static inline int64_t up16(int64_t n) { return (n + 15) & ~(int64_t)15; }

static inline struct place place_of(const struct attention *a, int64_t task) {
    struct place p = {a,
                      task / a->splits / a->kv_heads,
                      task / a->splits % a->kv_heads,
                      task % a->splits,
                      0,
                      0,
                      0,
                      0};
    p.start = a->starts[p.doc];
    p.L = a->starts[p.doc + 1] - p.start;
    p.J = a->before + p.L;
    p.width = up16(p.J);
    return p;
}

/* Keys that query row i sees: [low, high). */
static inline void seen(const struct attention *a, int64_t i, int64_t *low, int64_t *high) {
    *high = a->before + i + 1;
    *low = a->window && *high > a->window ? *high - a->window : 0;
}

/* Where a value of key j's gradient stands in grad_k and grad_v, or in those of the keys before. */
static inline int64_t place_of_gradient(const struct place *p, int64_t j) {
    const struct attention *a = p->a;
    if (j < a->before)
        return (((p->doc * a->splits + p->split) * a->kv_heads + p->kv) * a->before + j) * a->size;
    return ((p->split * a->rows + p->start + j - a->before) * a->kv_heads + p->kv) * a->size;
}

/* The gradients of all keys and values of a task, (J, D), to where they stand. */
static inline void give_gradients(const struct place *p, const float *grad_k, const float *grad_v) {
    const struct attention *a = p->a;
    const int64_t D = a->size;
    for (int64_t j = 0; j < p->J; j++) {
        const int64_t at = place_of_gradient(p, j);
        memcpy((j < a->before ? a->grad_before_k : a->grad_k) + at, grad_k + j * D, (size_t)D * 4);
        memcpy((j < a->before ? a->grad_before_v : a->grad_v) + at, grad_v + j * D, (size_t)D * 4);
    }
}

/* The bf16 keys or values of place j; NULL beyond the last. */
static inline const uint16_t *key_row(const struct place *p, int64_t j, int values) {
    const struct attention *a = p->a;
    if (j >= p->J) return NULL;
    if (j < a->before)
        return values ? (const uint16_t *)a->before_v + j * a->bv_row + p->kv * a->bv_head
                      : (const uint16_t *)a->before_k + j * a->bk_row + p->kv * a->bk_head;
    j += p->start - a->before;
    return values ? (const uint16_t *)a->v + j * a->v_row + p->kv * a->v_head
                  : (const uint16_t *)a->k + j * a->k_row + p->kv * a->k_head;
}

/* On tiles (attention_tiles.c): 0 where there are none, and nothing is done. */
int attention_tiles_forward(struct attention *a);
int attention_tiles_backward(struct attention *a);

#endif
