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

/* All ones where place j + lane lies in [low, high). */
INLINE NAME(iv) NAME(lanes)(int64_t j, int64_t low, int64_t high) {
    NAME(iv) place;
    for (int i = 0; i < W; i++) place[i] = i;
    place += (int32_t)j;
    return (place >= (int32_t)low) & (place < (int32_t)high);
}

INLINE NAME(fv) NAME(kept)(NAME(fv) x, NAME(iv) mask) { return (NAME(fv))((NAME(iv))x & mask); }

/* Query rows of a head that go together: n of them from i0 on, and the keys [first, first + width)
 * that any of them sees. */
struct NAME(block) {
    int64_t i0, n, first, width, row;
};

INLINE struct NAME(block) NAME(block_of)(const struct place *p, int64_t number) {
    struct NAME(block) b = {number * ROWS, 0, 0, 0, 0};
    int64_t high, unused;
    b.n = p->L - b.i0 < ROWS ? p->L - b.i0 : ROWS;
    b.row = p->start + b.i0;
    seen(p->a, b.i0, &b.first, &unused);
    seen(p->a, b.i0 + b.n - 1, &unused, &high);
    b.first &= ~(int64_t)15;
    b.width = up16(high) - b.first;
    return b;
}

/* Scores of one row, q k -> tanh(scale q k / softcap). slopes: factors from the gradients of these
 * values to those of q k; may be NULL. */
INLINE void NAME(cap)(const struct attention *a, int64_t width, float *scores, float *slopes) {
    const float by = a->scale / a->softcap;
    for (int64_t j = 0; j < width; j += W) {
        const NAME(fv) x = NAME(tanh)(NAME(load)(scores + j) * by);
        NAME(store)(scores + j, x);
        if (slopes) NAME(store)(slopes + j, (1.0f - x * x) * a->scale);
    }
}

/* Scores of one row -> its exponentials, zeros where it does not see; their sum. *lse: the log of
 * that of all. */
INLINE float NAME(exponentials)(const struct attention *a, const struct NAME(block) * b, int64_t r,
                                float *scores, float *lse) {
    int64_t low, high;
    const float unit = unit_of(a);
    seen(a, b->i0 + r, &low, &high);
    if (a->softcap != 0.0f) NAME(cap)(a, b->width, scores, NULL);
    NAME(fv) top = NAME(all)(-INFINITY), total = {};
    for (int64_t j = 0; j < b->width; j += W) {
        const NAME(iv) mask = NAME(lanes)(b->first + j, low, high);
        const NAME(fv) x = (NAME(fv))(((NAME(iv))NAME(load)(scores + j) & mask) |
                                      ((NAME(iv))NAME(all)(-INFINITY) & ~mask));
        const NAME(iv) more = x > top;
        top = (NAME(fv))(((NAME(iv))x & more) | ((NAME(iv))top & ~more));
    }
    float most = -INFINITY;
    for (int i = 0; i < W; i++) most = top[i] > most ? top[i] : most;
    for (int64_t j = 0; j < b->width; j += W) {
        const NAME(fv) x = (NAME(load)(scores + j) - most) * unit;
        const NAME(fv) e = NAME(kept)(NAME(exp)(x), NAME(lanes)(b->first + j, low, high));
        total += e;
        NAME(store)(scores + j, e);
    }
    const float sum = NAME(sum)(total);
    *lse = most * unit + logf(sum);
    return sum;
}

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

/* One row's scores -> probabilities, the gradient of these -> that of the scores. */
INLINE void NAME(row_gradient)(const struct attention *a, const struct NAME(block) * b, int64_t r,
                               float lse, float *scores, float *grads, float *slopes) {
    const int capped = a->softcap != 0.0f;
    const float unit = unit_of(a);
    int64_t low, high;
    seen(a, b->i0 + r, &low, &high);
    if (capped) NAME(cap)(a, b->width, scores, slopes);
    NAME(fv) delta = {};
    for (int64_t j = 0; j < b->width; j += W) {
        const NAME(fv) x = NAME(load)(scores + j) * unit - lse;
        const NAME(fv) share = NAME(kept)(NAME(exp)(x), NAME(lanes)(b->first + j, low, high));
        delta += share * NAME(load)(grads + j);
        NAME(store)(scores + j, share);
    }
    const float mean = NAME(sum)(delta);
    for (int64_t j = 0; j < b->width; j += W) {
        const NAME(fv) by = capped ? NAME(load)(slopes + j) : NAME(all)(a->scale);
        NAME(store)(grads + j, NAME(load)(scores + j) * (NAME(load)(grads + j) - mean) * by);
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
        for (int64_t j = 0; j < p.J; j++) {
            const int64_t at = place_of_gradient(&p, j);
            memcpy((j < a->before ? a->grad_before_k : a->grad_k) + at, grad_k + j * D,
                   (size_t)D * sizeof(float));
            memcpy((j < a->before ? a->grad_before_v : a->grad_v) + at, grad_v + j * D,
                   (size_t)D * sizeof(float));
        }
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
