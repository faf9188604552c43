/* Included by attention_float.c once for each set of instructions, behind float_vectors.h: WIDE is
   the most registers of a tile's row, FUSED(a, b, sum) sum + a b. */

#define TALL 6 /* rows of a tile of sums */

/* A product: C (M, N) [+]= A B over K, N a multiple of 16. A's (m, k) stands at A[m * am + k * ak],
 * B's row k at B + k * ldb. */
struct NAME(product) {
    const float *A, *B;
    float *C;
    int64_t am, ak, ldb, ldc, M, N, K;
    int add;
};

INLINE void NAME(tile)(const int rows, const int wide, const struct NAME(product) * p, int64_t m,
                       int64_t n) {
    const float *A = p->A + m * p->am, *B = p->B + n;
    float *C = p->C + m * p->ldc + n;
    const int64_t am = p->am, ak = p->ak, ldb = p->ldb, ldc = p->ldc;
    NAME(fv) sums[TALL][WIDE];
    UNROLLED(6, r, rows)
        UNROLLED(4, v, wide)
            sums[r][v] = p->add ? NAME(load)(C + r * ldc + v * W) : NAME(all)(0.0f);
    for (int64_t k = 0; k < p->K; k++, B += ldb, A += ak) {
        NAME(fv) b[WIDE];
        UNROLLED(4, v, wide) b[v] = NAME(load)(B + v * W);
        UNROLLED(6, r, rows) {
            const NAME(fv) a = NAME(all)(A[r * am]);
            UNROLLED(4, v, wide) sums[r][v] = FUSED(a, b[v], sums[r][v]);
        }
    }
    UNROLLED(6, r, rows)
        UNROLLED(4, v, wide) NAME(store)(C + r * ldc + v * W, sums[r][v]);
}

INLINE void NAME(rows)(const int wide, const struct NAME(product) * p, int64_t n) {
    int64_t m = 0;
    for (; m + TALL <= p->M; m += TALL) NAME(tile)(TALL, wide, p, m, n);
    switch (p->M - m) {
    case 5: NAME(tile)(5, wide, p, m, n); break;
    case 4: NAME(tile)(4, wide, p, m, n); break;
    case 3: NAME(tile)(3, wide, p, m, n); break;
    case 2: NAME(tile)(2, wide, p, m, n); break;
    case 1: NAME(tile)(1, wide, p, m, n); break;
    }
}

static TARGET void NAME(multiply)(struct NAME(product) p) {
    int64_t n = 0;
    for (; n + WIDE * W <= p.N; n += WIDE * W) NAME(rows)(WIDE, &p, n);
#if WIDE * W > 16
    for (; n < p.N; n += 16) NAME(rows)(16 / W, &p, n);
#endif
}

/* Key j's own row, of its keys or values. */
INLINE const float *NAME(key)(const struct place *p, int64_t j, int values) {
    const struct attention *a = p->a;
    if (j < a->before)
        return values ? (const float *)a->before_v + j * a->bv_row + p->kv * a->bv_head
                      : (const float *)a->before_k + j * a->bk_row + p->kv * a->bk_head;
    j += p->start - a->before;
    return values ? (const float *)a->v + j * a->v_row + p->kv * a->v_head
                  : (const float *)a->k + j * a->k_row + p->kv * a->k_head;
}

/* (J, D) rows -> (D, width), zeros behind. */
INLINE void NAME(across)(const struct place *p, int values, float *to) {
    const int64_t D = p->a->size;
    for (int64_t j = 0; j < p->width; j++) {
        const float *from = j < p->J ? NAME(key)(p, j, values) : NULL;
        for (int64_t d = 0; d < D; d++) to[d * p->width + j] = from == NULL ? 0.0f : from[d];
    }
}

/* (J, D) rows -> (width, D), zeros behind. */
INLINE void NAME(along)(const struct place *p, int values, float *to) {
    const size_t bytes = (size_t)p->a->size * sizeof(float);
    for (int64_t j = 0; j < p->width; j++, to += p->a->size) {
        if (j < p->J) memcpy(to, NAME(key)(p, j, values), bytes);
        else memset(to, 0, bytes);
    }
}

#include "attention_softmax.h"

static TARGET void NAME(forward)(void *arguments, int64_t from, int64_t to) {
    const struct attention *a = arguments;
    const int64_t D = a->size, G = a->heads / a->kv_heads;
    for (int64_t task = from; task < to; task++) {
        const struct place p = place_of(a, task);
        float *keys = attention_room(2 * D * p.width + ROWS * p.width + ROWS * D),
              *values = keys + D * p.width;
        float *scores = values + p.width * D, *sums = scores + ROWS * p.width, totals[ROWS];
        NAME(across)(&p, 0, keys);
        NAME(along)(&p, 1, values);
        for (int64_t h = p.kv * G; h < (p.kv + 1) * G; h++)
            for (int64_t number = p.split; number * ROWS < p.L; number += a->splits) {
                const struct NAME(block) b = NAME(block_of)(&p, number);
                const float *q = (const float *)a->q + b.row * a->q_row + h * a->q_head;
                NAME(multiply)((struct NAME(product)){q, keys + b.first, scores, a->q_row, 1,
                                                      p.width, p.width, b.n, b.width, D, 0});
                for (int64_t r = 0; r < b.n; r++)
                    totals[r] = NAME(exponentials)(a, &b, r, scores + r * p.width,
                                                   a->lse + (b.row + r) * a->heads + h);
                NAME(multiply)((struct NAME(product)){scores, values + b.first * D, sums, p.width,
                                                      1, D, D, b.n, D, b.width, 0});
                for (int64_t r = 0; r < b.n; r++) {
                    float *out = (float *)a->out + ((b.row + r) * a->heads + h) * D;
                    for (int64_t d = 0; d < D; d += W)
                        NAME(store)(out + d, NAME(load)(sums + r * D + d) / totals[r]);
                }
            }
        free(keys);
    }
}

static TARGET void NAME(backward)(void *arguments, int64_t from, int64_t to) {
    const struct attention *a = arguments;
    const int64_t D = a->size, G = a->heads / a->kv_heads;
    for (int64_t task = from; task < to; task++) {
        const struct place p = place_of(a, task);
        const int64_t each = D * p.width;
        float *keys = attention_room(5 * each + (2 * ROWS + 1) * p.width), *values = keys + each,
              *along = values + each;
        float *grad_k = along + each, *grad_v = grad_k + each, *scores = grad_v + each,
              *grads = scores + ROWS * p.width, *slopes = grads + ROWS * p.width;
        NAME(across)(&p, 0, keys);
        NAME(across)(&p, 1, values);
        NAME(along)(&p, 0, along);
        memset(grad_k, 0, (size_t)(2 * each) * sizeof(float));
        for (int64_t h = p.kv * G; h < (p.kv + 1) * G; h++)
            for (int64_t number = p.split; number * ROWS < p.L; number += a->splits) {
                const struct NAME(block) b = NAME(block_of)(&p, number);
                const float *q = (const float *)a->q + b.row * a->q_row + h * a->q_head;
                const float *g = (const float *)a->grad + b.row * a->grad_row + h * a->grad_head;
                float *out = (float *)a->out + (b.row * a->heads + h) * D;
                NAME(multiply)((struct NAME(product)){q, keys + b.first, scores, a->q_row, 1,
                                                      p.width, p.width, b.n, b.width, D, 0});
                NAME(multiply)((struct NAME(product)){g, values + b.first, grads, a->grad_row, 1,
                                                      p.width, p.width, b.n, b.width, D, 0});
                for (int64_t r = 0; r < b.n; r++)
                    NAME(row_gradient)(a, &b, r, a->lse[(b.row + r) * a->heads + h],
                                       scores + r * p.width, grads + r * p.width, slopes);
                NAME(multiply)((struct NAME(product)){grads, along + b.first * D, out, p.width, 1,
                                                      D, a->heads * D, b.n, D, b.width, 0});
                NAME(multiply)((struct NAME(product)){scores, g, grad_v + b.first * D, 1, p.width,
                                                      a->grad_row, D, b.width, D, b.n, 1});
                NAME(multiply)((struct NAME(product)){grads, q, grad_k + b.first * D, 1, p.width,
                                                      a->q_row, D, b.width, D, b.n, 1});
            }
        give_gradients(&p, grad_k, grad_v);
        free(keys);
    }
}

#undef INLINE
#undef TALL
#undef NAME
#undef TARGET
#undef W
#undef WIDE
#undef FUSED
