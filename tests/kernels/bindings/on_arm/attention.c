/* Attention over packed documents, forward and backward: in float32 with NEON and in bf16 by
   BFMMLA, beside sums in float64. Shares and gradients of scores are rounded to bf16, so a sum may
   be off by some of its terms' roundings. */
#include "attention.h"
#include "drawn.h"

void veneer_attention_forward(struct attention *a);
void veneer_attention_backward(struct attention *a);
void veneer_attention_float_forward(struct attention *a);
void veneer_attention_float_backward(struct attention *a);

enum { DOCS = 4, H = 4, K = 2, MOST = 128 };
static const int64_t starts[DOCS + 1] = {0, 1, 6, 70, 87};

/* Row of key j of a document, in k and v; in before_k and before_v where `shared`. */
static int64_t row_of(const struct attention *a, int64_t doc, int64_t j, int *shared) {
    *shared = j < a->before;
    return *shared ? j : starts[doc] + j - a->before;
}

static double at(const void *own, const void *before, int shared, int64_t row, int64_t head,
                 int64_t heads, int64_t size, int64_t d, int type) {
    return value(shared ? before : own, (row * heads + head) * size + d, type);
}

struct found {
    double sum, size;
};

static void add(struct found *to, double x) { to->sum += x, to->size += fabs(x); }

static void check(float found, struct found expected, int type) {
    const double most = type == FEW_FP32 ? 2e-5 : 1.0 / 64;
    cases++;
    bad += !(fabs(found - expected.sum) <= most * (expected.size + 1e-2));
}

/* Sums over the splits of a key's gradient. */
static double given(const struct attention *a, int64_t doc, int64_t j, int64_t kv, int64_t d,
                    int values) {
    double sum = 0;
    for (int64_t split = 0; split < a->splits; split++) {
        const struct place p = {a, doc, kv, split, starts[doc], 0, 0, 0};
        const float *own = values ? a->grad_v : a->grad_k,
                    *before = values ? a->grad_before_v : a->grad_before_k;
        sum += (j < a->before ? before : own)[place_of_gradient(&p, j) + d];
    }
    return sum;
}

static void check_document(const struct attention *a, const float *lse, const void *out,
                           const void *grad_q, int64_t doc, int64_t kv, int type) {
    const int64_t D = a->size, L = starts[doc + 1] - starts[doc], J = a->before + L;
    static struct found of_k[MOST][MOST], of_v[MOST][MOST];
    memset(of_k, 0, sizeof of_k), memset(of_v, 0, sizeof of_v);
    for (int64_t h = kv * H / K; h < (kv + 1) * H / K; h++)
        for (int64_t i = 0; i < L; i++) {
            const int64_t row = starts[doc] + i, flat = (row * H + h) * D;
            double share[MOST], slope[MOST], given_share[MOST], total = 0, mean = 0, size = 0;
            int64_t low, high;
            int shared;
            seen(a, i, &low, &high);
            for (int64_t j = low; j < high; j++) {
                const int64_t other = row_of(a, doc, j, &shared);
                double score = 0, gradient = 0;
                for (int64_t d = 0; d < D; d++) {
                    score += value(a->q, flat + d, type) *
                             at(a->k, a->before_k, shared, other, kv, K, D, d, type);
                    gradient += value(a->grad, flat + d, type) *
                                at(a->v, a->before_v, shared, other, kv, K, D, d, type);
                }
                score *= a->scale, slope[j] = a->scale;
                if (a->softcap != 0) {
                    const double inner = tanh(score / a->softcap);
                    score = a->softcap * inner, slope[j] *= 1 - inner * inner;
                }
                share[j] = exp(score), total += share[j], given_share[j] = gradient;
            }
            for (int64_t j = low; j < high; j++)
                share[j] /= total, mean += share[j] * given_share[j];
            cases++, bad += !(fabs(lse[row * H + h] - log(total)) < 1e-4 * (1 + fabs(log(total))));
            for (int64_t d = 0; d < D; d++) {
                struct found of_out = {0, 0}, of_q = {0, 0};
                for (int64_t j = low; j < high; j++) {
                    const int64_t other = row_of(a, doc, j, &shared);
                    const double ds = share[j] * (given_share[j] - mean) * slope[j];
                    size = share[j] * (fabs(given_share[j]) + fabs(mean)) * slope[j];
                    const double key = at(a->k, a->before_k, shared, other, kv, K, D, d, type),
                                 x = value(a->q, flat + d, type);
                    add(&of_out,
                        share[j] * at(a->v, a->before_v, shared, other, kv, K, D, d, type));
                    of_q.sum += ds * key, of_q.size += size * fabs(key);
                    of_k[j][d].sum += ds * x, of_k[j][d].size += size * fabs(x);
                    add(&of_v[j][d], share[j] * value(a->grad, flat + d, type));
                }
                check(value(out, flat + d, type), of_out, type);
                check(value(grad_q, flat + d, type), of_q, type);
            }
        }
    for (int64_t j = 0; j < J; j++)
        for (int64_t d = 0; d < D; d++) {
            check((float)given(a, doc, j, kv, d, 0), of_k[j][d], type);
            check((float)given(a, doc, j, kv, d, 1), of_v[j][d], type);
        }
}

static void one(int type, int64_t D, int64_t before, int64_t window, float softcap,
                int64_t splits) {
    const int64_t rows = starts[DOCS], queries = rows * H * D, keys = rows * K * D,
                  shared = before * K * D;
    void *q = values(queries, type), *grad = values(queries, type), *out = values(queries, type),
         *grad_q = values(queries, type), *k = values(keys, type), *v = values(keys, type),
         *before_k = values(shared, type), *before_v = values(shared, type);
    float *lse = malloc((size_t)(4 * rows * H)),
          *own = malloc((size_t)(8 * splits * keys)),
          *more = malloc((size_t)(8 * DOCS * splits * shared));
    struct attention a = {
        .q = q, .k = k, .v = v, .before_k = before_k, .before_v = before_v, .grad = grad,
        .forward_out = out, .out = out, .lse = lse, .grad_k = own, .grad_v = own + splits * keys,
        .grad_before_k = more, .grad_before_v = more + DOCS * splits * shared, .starts = starts,
        .q_row = H * D, .q_head = D, .k_row = K * D, .k_head = D, .v_row = K * D, .v_head = D,
        .bk_row = K * D, .bk_head = D, .bv_row = K * D, .bv_head = D, .grad_row = H * D,
        .grad_head = D, .rows = rows, .docs = DOCS, .heads = H, .kv_heads = K, .size = D,
        .before = before, .window = window, .splits = splits, .scale = 2.0f, .softcap = softcap};
    (type == FEW_FP32 ? veneer_attention_float_forward : veneer_attention_forward)(&a);
    a.out = grad_q;
    (type == FEW_FP32 ? veneer_attention_float_backward : veneer_attention_backward)(&a);
    for (int64_t doc = 0; doc < DOCS; doc++)
        for (int64_t kv = 0; kv < K; kv++)
            check_document(&a, lse, out, grad_q, doc, kv, type);
    free(q), free(grad), free(out), free(grad_q), free(k), free(v), free(before_k), free(before_v);
    free(lse), free(own), free(more);
}

int main(void) {
    for (int type = 0; type < 1 + veneer_has_bfdot(); type++) {
        one(type, 16, 0, 0, 0, 1);
        one(type, 48, 21, 0, 0, 2);
        one(type, 32, 3, 9, 0, 1);
        one(type, 16, 10, 30, 0.5f, 2);
    }
    return report();
}
