/* The softmax of attention and its gradient, over registers of float_vectors.h: for the products of
   attention_float_body.h and of attention_arm.c. ROWS: query rows whose scores exist at once. */

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
