/* Attention over packed documents in bf16, forward and backward: see kernels/attention/packed.py
   for what it computes.

   A document of L rows attends to `before` keys that it sees whole (a prefix, a shared prompt),
   then causally to itself. One task takes one document and one key head, with all query heads of
   that key head: keys and values are laid out once as pairs and stay in the cache; scores exist for
   ROWS query rows at a time and never reach memory beyond it. What causality or the window hides is
   not computed. Every sum over keys or rows runs in float32. Where there are AMX tiles,
   attention_tiles.c computes the same.

   Shapes: H query heads, K key heads, G = H / K, D head size (a multiple of 16), J keys = before +
   L. */
#include "attention.h"
#include "bf16.h"
#include "parallel.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 32

#if defined(__x86_64__)

static void *scratch(int64_t bytes) {
    void *found = NULL;
    if (posix_memalign(&found, 64, (size_t)(bytes + 64))) abort();
    return found;
}

/* (J, D) rows -> pairs along D, (D/2, ld): what scores are multiplied with. Words of places beyond
 * J are left. */
static VENEER_BF16 void pack_across(const uint16_t *x, int64_t row, int64_t J, int64_t D,
                                    uint32_t *to, int64_t ld, int64_t at) {
    _Alignas(64) uint32_t turned[16 * 16];
    for (int64_t j = 0; j < J; j += 16) {
        const int64_t n = J - j < 16 ? J - j : 16;
        for (int64_t p = 0; p < D / 2; p += 16) {
            const int64_t wide = D / 2 - p < 16 ? D / 2 - p : 16;
            const __mmask16 words = (__mmask16)((1u << wide) - 1);
            __m512i rows[16];
            UNROLLED(16, i, 16)
                rows[i] = i < n ? _mm512_maskz_loadu_epi32(words, x + (j + i) * row + 2 * p)
                                : _mm512_setzero_si512();
            words_turned(rows, turned);
            words_put(turned, wide, n, to + p * ld + at + j, ld);
        }
    }
}

/* Rows j and j + 1 of (J, D) -> one row of pairs, (J/2, D): what probabilities are multiplied with.
 */
static VENEER_BF16 void pack_along(const uint16_t *first, const uint16_t *second, int64_t D,
                                   uint32_t *to) {
    for (int64_t d = 0; d < D; d += 16) {
        __m512i low = first
                          ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(first + d)))
                          : _mm512_setzero_si512();
        __m512i high =
            second ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(second + d)))
                   : _mm512_setzero_si512();
        _mm512_storeu_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

static VENEER_BF16 void keys_across(const struct place *p, int values, uint32_t *to) {
    const struct attention *a = p->a;
    for (int64_t c = 0; c < a->size / 2; c++)
        for (int64_t j = p->J; j < p->width; j++) to[c * p->width + j] = 0;
    if (a->before)
        pack_across(key_row(p, 0, values), values ? a->bv_row : a->bk_row, a->before, a->size, to,
                    p->width, 0);
    pack_across(key_row(p, a->before, values), values ? a->v_row : a->k_row, p->L, a->size, to,
                p->width, a->before);
}

static VENEER_BF16 void keys_along(const struct place *p, int values, uint32_t *to) {
    for (int64_t j = 0; j < p->width; j += 2)
        pack_along(key_row(p, j, values), key_row(p, j + 1, values), p->a->size,
                   to + j / 2 * p->a->size);
}

static inline __mmask16 lanes(int64_t j, int64_t low, int64_t high) {
    __mmask16 m = 0xFFFF;
    if (j < low) m &= low - j >= 16 ? 0 : (__mmask16)(0xFFFF << (low - j));
    if (j + 16 > high) m &= high <= j ? 0 : (__mmask16)((1u << (high - j)) - 1);
    return m;
}

/* What query row i sees of scores that begin with key `first`: vectors of 16 from `whole` to `edge`
   as a whole, others in part or not at all. */
struct view {
    int64_t first, low, high, whole, edge;
};

static struct view view_of(const struct attention *a, int64_t i, int64_t first) {
    struct view v = {first, 0, 0, 0, 0};
    seen(a, i, &v.low, &v.high);
    v.whole = v.low > first ? up16(v.low - first) : 0;
    v.edge = (v.high - first) & ~(int64_t)15;
    return v;
}

VENEER_INLINE __mmask16 view_lanes(const struct view *v, int64_t j) {
    return j >= v->whole && j < v->edge ? 0xFFFF : lanes(v->first + j, v->low, v->high);
}

/* Scores of a row -> shares and their sum; returns the greatest score, in units (unit_of). */
static VENEER_BF16 float shares_of(const struct attention *a, const struct view *v, int64_t width,
                                   float *s, uint16_t *shares, float *total) {
    if (a->softcap != 0.0f) tanh_of_all(s, width, a->scale / a->softcap);
    const float unit = unit_of(a);
    __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < width; j += 16)
        top = _mm512_mask_max_ps(top, view_lanes(v, j), top, _mm512_loadu_ps(s + j));
    const float most = _mm512_reduce_max_ps(top);
    const __m512 by = _mm512_set1_ps(unit * LOG2_E), less = _mm512_set1_ps(most * (unit * LOG2_E));
    for (int64_t j = 0; j < width; j += 16) {
        __m512 x = power(_mm512_fmsub_ps(_mm512_loadu_ps(s + j), by, less));
        x = _mm512_maskz_mov_ps(view_lanes(v, j), x);
        sum = _mm512_add_ps(sum, x);
        bf16_store(shares + j, x);
    }
    *total = _mm512_reduce_add_ps(sum);
    return most;
}

static VENEER_BF16 void forward_body(void *arguments, int64_t from, int64_t to) {
    const struct attention *a = arguments;
    const int64_t D = a->size, G = a->heads / a->kv_heads;
    for (int64_t task = from; task < to; task++) {
        struct place p = place_of(a, task);
        uint32_t *keys = scratch(D / 2 * p.width * 4), *values = scratch(p.width / 2 * D * 4);
        float *scores = scratch(ROWS * p.width * 4), *sums = scratch(ROWS * D * 4);
        uint16_t *shares = scratch(ROWS * p.width * 2);
        float total[ROWS];
        keys_across(&p, 0, keys);
        keys_along(&p, 1, values);
        int64_t blocks = (p.L + ROWS - 1) / ROWS;
        for (int64_t h = p.kv * G; h < (p.kv + 1) * G; h++)
            for (int64_t block = p.split; block < blocks; block += a->splits) {
                int64_t i0 = block * ROWS, n = p.L - i0 < ROWS ? p.L - i0 : ROWS, high, first,
                        unused;
                seen(a, i0, &first, &unused);
                seen(a, i0 + n - 1, &unused, &high);
                first &= ~(int64_t)15;
                int64_t width = up16(high) - first;
                const uint16_t *q =
                    (const uint16_t *)a->q + (p.start + i0) * a->q_row + h * a->q_head;
                bf16_product((const uint32_t *)q, a->q_row / 2, 1, keys + first, p.width, scores,
                             p.width, n, width, D / 2, 0);
                for (int64_t r = 0; r < n; r++) {
                    const struct view v = view_of(a, i0 + r, first);
                    const float most = shares_of(a, &v, width, scores + r * p.width,
                                                 shares + r * p.width, total + r);
                    a->lse[(p.start + i0 + r) * a->heads + h] = most * unit_of(a) + logf(total[r]);
                }
                bf16_product((const uint32_t *)shares, p.width / 2, 1, values + first / 2 * D, D,
                             sums, D, n, D, width / 2, 0);
                for (int64_t r = 0; r < n; r++) {
                    uint16_t *out = (uint16_t *)a->out + ((p.start + i0 + r) * a->heads + h) * D;
                    for (int64_t d = 0; d < D; d += 16)
                        bf16_store(out + d, _mm512_div_ps(_mm512_loadu_ps(sums + r * D + d),
                                                          _mm512_set1_ps(total[r])));
                }
            }
        free(keys), free(values), free(scores), free(sums), free(shares);
    }
}

/* Scores of a row -> shares; returns the mean of the gradients g, weighted by the shares. slopes:
 * factors from the gradients of the scores in memory to those of q k. */
static VENEER_BF16 float shares_again(const struct attention *a, const struct view *v,
                                      int64_t width, float lse, float *s, const float *g,
                                      float *slopes) {
    const __m512 by = _mm512_set1_ps(unit_of(a) * LOG2_E), less = _mm512_set1_ps(lse * LOG2_E),
                 scale = _mm512_set1_ps(a->scale);
    __m512 mean = _mm512_setzero_ps();
    if (a->softcap != 0.0f) tanh_of_all(s, width, a->scale / a->softcap);
    for (int64_t j = 0; j < width; j += 16) {
        const __m512 score = _mm512_loadu_ps(s + j);
        __m512 x = power(_mm512_fmsub_ps(score, by, less));
        if (a->softcap != 0.0f)
            _mm512_storeu_ps(slopes + j,
                             _mm512_fnmadd_ps(_mm512_mul_ps(score, score), scale, scale));
        x = _mm512_maskz_mov_ps(view_lanes(v, j), x);
        mean = _mm512_fmadd_ps(x, _mm512_loadu_ps(g + j), mean);
        _mm512_storeu_ps(s + j, x);
    }
    return _mm512_reduce_add_ps(mean);
}

/* scores -> shares as pairs of query rows; scores' gradient as rows and as pairs of rows. */
static VENEER_BF16 void block_gradient(const struct attention *a, const float *lse, int64_t i0,
                                       int64_t n, int64_t first, int64_t width, int64_t ld,
                                       float *scores, const float *grads, float *slopes,
                                       uint32_t *shares, uint16_t *rows, uint32_t *pairs) {
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i turns = _mm512_or_si512(
        count, _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(16)), 16));
    const __m512 none = _mm512_setzero_ps();
    __m512 by[2] = {_mm512_set1_ps(a->scale), _mm512_set1_ps(a->scale)};
    for (int64_t r = 0; r < n; r += 2) {
        const int two = r + 1 < n;
        float *s = scores + r * ld;
        const float *g = grads + r * ld;
        float mean[2] = {0, 0};
        for (int i = 0; i < 1 + two; i++) {
            const struct view v = view_of(a, i0 + r + i, first);
            mean[i] = shares_again(a, &v, width, lse[(r + i) * a->heads], s + i * ld, g + i * ld,
                                   slopes + i * ld);
        }
        const __m512 less = _mm512_set1_ps(mean[0]), other = _mm512_set1_ps(mean[1]);
        for (int64_t j = 0; j < width; j += 16) {
            const __m512 p = _mm512_loadu_ps(s + j), q = two ? _mm512_loadu_ps(s + ld + j) : none;
            if (a->softcap != 0.0f)
                for (int i = 0; i < 1 + two; i++) by[i] = _mm512_loadu_ps(slopes + i * ld + j);
            const __m512 x =
                _mm512_mul_ps(_mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(g + j), less)), by[0]);
            const __m512 given = two ? _mm512_loadu_ps(g + ld + j) : none;
            const __m512 y = _mm512_mul_ps(_mm512_mul_ps(q, _mm512_sub_ps(given, other)), by[1]);
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
            _mm256_storeu_si256((__m256i *)(rows + r * ld + j), _mm512_castsi512_si256(both));
            if (two)
                _mm256_storeu_si256((__m256i *)(rows + (r + 1) * ld + j),
                                    _mm512_extracti64x4_epi64(both, 1));
            const __m512i own = _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(q, p));
            _mm512_storeu_si512(shares + r / 2 * ld + j, own);
            _mm512_storeu_si512(pairs + r / 2 * ld + j, _mm512_permutexvar_epi16(turns, both));
        }
    }
}

static VENEER_BF16 void backward_body(void *arguments, int64_t from, int64_t to) {
    const struct attention *a = arguments;
    const int64_t D = a->size, G = a->heads / a->kv_heads;
    for (int64_t task = from; task < to; task++) {
        struct place p = place_of(a, task);
        uint32_t *keys = scratch(D / 2 * p.width * 4), *values = scratch(D / 2 * p.width * 4),
                 *along = scratch(p.width / 2 * D * 4);
        float *scores = scratch(ROWS * p.width * 4), *grads = scratch(ROWS * p.width * 4),
              *sums = scratch(ROWS * D * 4), *slopes = scratch(2 * p.width * 4);
        float *grad_k = scratch(p.width * D * 4), *grad_v = scratch(p.width * D * 4);
        uint32_t *shares = scratch(ROWS / 2 * p.width * 4),
                 *pairs = scratch(ROWS / 2 * p.width * 4);
        uint32_t *q_pairs = scratch(ROWS / 2 * D * 4), *g_pairs = scratch(ROWS / 2 * D * 4);
        uint16_t *rows = scratch(ROWS * p.width * 2);
        keys_across(&p, 0, keys);
        keys_across(&p, 1, values);
        keys_along(&p, 0, along);
        memset(grad_k, 0, (size_t)(p.width * D * 4)), memset(grad_v, 0, (size_t)(p.width * D * 4));
        int64_t blocks = (p.L + ROWS - 1) / ROWS;
        for (int64_t h = p.kv * G; h < (p.kv + 1) * G; h++)
            for (int64_t block = p.split; block < blocks; block += a->splits) {
                int64_t i0 = block * ROWS, n = p.L - i0 < ROWS ? p.L - i0 : ROWS, high, first,
                        unused, row = p.start + i0;
                seen(a, i0, &first, &unused);
                seen(a, i0 + n - 1, &unused, &high);
                first &= ~(int64_t)15;
                int64_t width = up16(high) - first;
                const uint16_t *q = (const uint16_t *)a->q + row * a->q_row + h * a->q_head,
                               *g =
                                   (const uint16_t *)a->grad + row * a->grad_row + h * a->grad_head;
                bf16_product((const uint32_t *)q, a->q_row / 2, 1, keys + first, p.width, scores,
                             p.width, n, width, D / 2, 0);
                bf16_product((const uint32_t *)g, a->grad_row / 2, 1, values + first, p.width,
                             grads, p.width, n, width, D / 2, 0);
                block_gradient(a, a->lse + row * a->heads + h, i0, n, first, width, p.width, scores,
                               grads, slopes, shares, rows, pairs);
                bf16_product((const uint32_t *)rows, p.width / 2, 1, along + first / 2 * D, D, sums,
                             D, n, D, width / 2, 0);
                for (int64_t r = 0; r < n; r++)
                    for (int64_t d = 0; d < D; d += 16)
                        bf16_store((uint16_t *)a->out + ((row + r) * a->heads + h) * D + d,
                                   _mm512_loadu_ps(sums + r * D + d));
                for (int64_t r = 0; r < n; r += 2) {
                    pack_along(q + r * a->q_row, r + 1 < n ? q + (r + 1) * a->q_row : NULL, D,
                               q_pairs + r / 2 * D);
                    pack_along(g + r * a->grad_row, r + 1 < n ? g + (r + 1) * a->grad_row : NULL, D,
                               g_pairs + r / 2 * D);
                }
                bf16_product(shares, 1, p.width, g_pairs, D, grad_v + first * D, D, width, D,
                             (n + 1) / 2, 1);
                bf16_product(pairs, 1, p.width, q_pairs, D, grad_k + first * D, D, width, D,
                             (n + 1) / 2, 1);
            }
        give_gradients(&p, grad_k, grad_v);
        free(keys), free(values), free(along), free(scores), free(grads), free(sums), free(grad_k),
            free(grad_v);
        free(shares), free(pairs), free(q_pairs), free(g_pairs), free(rows), free(slopes);
    }
}

void veneer_attention_forward(struct attention *a) {
    if (attention_tiles_forward(a)) return;
    veneer_parallel_dealt(forward_body, a, a->docs * a->kv_heads * a->splits, 1, 8);
}

/* out: the gradient of q, (rows, H, D). */
void veneer_attention_backward(struct attention *a) {
    if (attention_tiles_backward(a)) return;
    veneer_parallel_dealt(backward_body, a, a->docs * a->kv_heads * a->splits, 1, 8);
}

#endif
