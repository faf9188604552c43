/* Attention over packed documents in bf16 on AMX tiles: what attention.c computes by vectors, by
   the same tasks.

   Forward, some panels go by the keys together, two squares of these at a time, so that keys and
   values are read once for them; shares are powers of a difference to the greatest score among the
   keys beside the query's own, which is one of all and may be far below the greatest: where sums
   grow beyond all measure, the panel is computed again with the greatest of all. Backward, as many
   panels are laid out as the second cache holds beside what they meet, and the keys go by.

   Sums run over keys or queries in their order, 32 by 32, whichever thread computes them. */
#include "attention_tiles.h"
#include "parallel.h"

#if defined(VENEER_AMX_COMPILED)

/* -- forward
 * ---------------------------------------------------------------------------------
 */

struct forward {
    const struct attention *a;
    int64_t T, count;
    struct panel panels[PANELS];
    const uint16_t *keys, *values; /* rows, turned */
    uint16_t *queries, *pairs;     /* (PANELS): across; (BLOCK) */
    float *scores, *out;           /* (BLOCK); (PANELS): sums (32 of D, 32 queries) */
    float most[PANELS][SIDE], sums[PANELS][SIDE];
};

/* Scores of `count` squares of keys, in units (unit_of). */
static VENEER_AMX void scores_of(const struct forward *f, int64_t of, int64_t key, int64_t count) {
    multiply(f->keys + key * f->T * SIDE, f->T * STEP, STEP, f->queries + of * f->T * STEP, 0, STEP,
             count, f->T, f->scores, 0);
    if (f->a->softcap != 0.0f)
        tanh_of_all(f->scores, count * STEP, f->a->scale / f->a->softcap);
}

/* Of each query the greatest score among the keys from `from` on, as a power of 2. */
static VENEER_AMX void greatest(struct forward *f, int64_t of, int64_t from) {
    const struct panel *w = f->panels + of;
    __m512 top[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
    for (int64_t key = from; key < w->end; key += SIDE) {
        scores_of(f, of, key, 1);
        for (int64_t i = 0; i < SIDE; i++) {
            const uint32_t seen = who_sees(f->a, w, key + i);
            for (int half = 0; half < 2; half++) {
                const __m512 s = _mm512_loadu_ps(f->scores + i * SIDE + 16 * half);
                top[half] =
                    _mm512_mask_max_ps(top[half], (__mmask16)(seen >> 16 * half), top[half],
                                       _mm512_mul_ps(s, _mm512_set1_ps(unit_of(f->a) * LOG2_E)));
            }
        }
    }
    _mm512_storeu_ps(f->most[of], top[0]);
    _mm512_storeu_ps(f->most[of] + 16, top[1]);
}

/* Sums of shares, and of values by shares, of all panels. */
static VENEER_AMX void forward_panels(struct forward *f) {
    memset(f->sums, 0, sizeof f->sums);
    memset(f->out, 0, (size_t)(f->count * f->T * STEP * 4));
    for (int64_t start = f->panels[0].first; start < f->panels[f->count - 1].end;
         start += BLOCK * SIDE)
        for (int64_t of = 0; of < f->count; of++) {
            const struct panel *w = f->panels + of;
            const int64_t key = larger(start, w->first),
                          count = (smaller(start + BLOCK * SIDE, w->end) - key) / SIDE;
            if (count <= 0) continue;
            scores_of(f, of, key, count);
            for (int64_t i = 0; i < count; i++)
                if (at_an_edge(w, key + i * SIDE))
                    shares_of(f->a, w, key + i * SIDE, 1, f->scores + i * STEP, f->most[of],
                              f->sums[of], f->pairs + i * STEP);
                else
                    shares_of(f->a, w, key + i * SIDE, 0, f->scores + i * STEP, f->most[of],
                              f->sums[of], f->pairs + i * STEP);
            multiply(f->values + key * f->T * SIDE, STEP, f->T * STEP, f->pairs, 0, STEP, f->T,
                     count, f->out + of * f->T * STEP, 1);
        }
}

static int beyond(const struct forward *f, int64_t of) {
    for (int64_t r = 0; r < f->panels[of].n; r++)
        if (!(f->sums[of][r] < LARGEST)) return 1;
    return 0;
}

static VENEER_AMX void forward_body(void *arguments, int64_t from, int64_t to) {
    const struct attention *a = arguments;
    const int64_t D = a->size, T = (D + SIDE - 1) / SIDE;
    struct forward *f = room(sizeof *f);
    f->a = a, f->T = T;
    amx_shapes(16, 0);
    for (int64_t task = from; task < to; task++) {
        const struct place p = place_of(a, task);
        const int64_t chunks = (p.J + SIDE - 1) / SIDE, all = chunks * T * STEP;
        uint16_t *laid = room(2 * (2 * all + (PANELS + 2) * T * STEP + BLOCK * STEP)),
                 *values = laid + all, *rows = values + all;
        f->keys = laid, f->values = values, f->queries = rows + 2 * T * STEP,
        f->pairs = f->queries + PANELS * T * STEP;
        f->scores = room(4 * (BLOCK + PANELS * T) * STEP), f->out = f->scores + BLOCK * STEP;
        for (int64_t c = 0; c < chunks; c++) {
            lay_keys(&p, 0, c * SIDE, laid + c * T * STEP);
            lay_keys(&p, 1, c * SIDE, rows);
            pair(rows, T, rows + T * STEP);
            turn(rows + T * STEP, 2 * T, values + c * T * STEP);
        }
        for (int64_t first = 0; (f->count = panels_of(&p, first, PANELS, f->panels)) > 0;
             first += f->count) {
            for (int64_t of = 0; of < f->count; of++) {
                lay_queries(&p, f->panels + of, a->q, a->q_row, a->q_head, rows);
                turn(rows, 2 * T, f->queries + of * T * STEP);
                greatest(f, of, f->panels[of].own);
            }
            forward_panels(f);
            int again = 0;
            for (int64_t of = 0; of < f->count; of++)
                if (beyond(f, of)) greatest(f, of, f->panels[of].first), again = 1;
            if (again) forward_panels(f); /* the others once more, to the same bits */
            for (int64_t of = 0; of < f->count; of++) {
                const struct panel *w = f->panels + of;
                const int64_t row = p.start + w->i0;
                float by[SIDE];
                for (int64_t r = 0; r < w->n; r++) {
                    by[r] = 1.0f / f->sums[of][r];
                    a->lse[(row + r) * a->heads + w->head] =
                        (f->most[of][r] + log2f(f->sums[of][r])) * 0.69314718f;
                }
                write_turned(f->out + of * T * STEP, D, w->n, by,
                             (uint16_t *)a->out + (row * a->heads + w->head) * D, a->heads * D);
            }
        }
        free(laid), free(f->scores);
    }
    _tile_release();
    free(f);
}

/* -- backward
 * ---------------------------------------------------------------------------------
 */

struct backward {
    const struct attention *a;
    int64_t T, count, most;
    struct panel panels[MANY];
    const uint16_t *keys, *values, *turned;                  /* rows, rows, turned */
    uint16_t *queries, *grads, *queries_along, *grads_along; /* (most) */
    uint16_t *shares, *given, *pairs;                        /* (BLOCK, PANELS) twice; (BLOCK) */
    float *scores, *products;                                /* (BLOCK) */
    float *grad_q, *grad_k, *grad_v; /* (most): sums (32 of D, 32 queries); sums (keys, 32 of D) */
    float lse[MANY][SIDE], mean[MANY][SIDE];
};

/* A panel's shares and their gradients at `count` squares of keys, number `place` and after of the
   block; then what they add to the gradient of its queries. */
static VENEER_AMX void backward_panel(struct backward *b, int64_t of, int64_t key, int64_t count,
                                      int64_t place) {
    const struct panel *w = b->panels + of;
    const int64_t T = b->T, at = key * T * SIDE, panel = T * STEP;
    multiply(b->keys + at, panel, STEP, b->queries + of * panel, 0, STEP, count, T, b->scores, 0);
    if (b->a->softcap != 0.0f) tanh_of_all(b->scores, count * STEP, b->a->scale / b->a->softcap);
    multiply(b->values + at, panel, STEP, b->grads + of * panel, 0, STEP, count, T, b->products, 0);
    for (int64_t i = 0; i < count; i++) {
        const int64_t to = ((place + i) * PANELS + of % PANELS) * STEP, j = key + i * SIDE;
        const float *scores = b->scores + i * STEP, *products = b->products + i * STEP;
        if (at_an_edge(w, j))
            gradients_of(b->a, w, j, 1, scores, products, b->lse[of], b->mean[of], b->shares + to,
                         b->given + to, b->pairs + i * STEP);
        else
            gradients_of(b->a, w, j, 0, scores, products, b->lse[of], b->mean[of], b->shares + to,
                         b->given + to, b->pairs + i * STEP);
    }
    multiply(b->turned + at, STEP, panel, b->pairs, 0, STEP, T, count, b->grad_q + of * panel, 1);
}

/* What panels [low, high) add to the gradients of 32 keys and values, number `place` of the block.
 */
static VENEER_AMX void backward_keys(struct backward *b, int64_t key, int64_t place, int64_t low,
                                     int64_t high) {
    const int64_t T = b->T, at = key * T * SIDE, from = (place * PANELS + low % PANELS) * STEP,
                  of = low * T * STEP;
    multiply(b->shares + from, 0, STEP, b->grads_along + of, STEP, T * STEP, T, high - low,
             b->grad_v + at, 1);
    multiply(b->given + from, 0, STEP, b->queries_along + of, STEP, T * STEP, T, high - low,
             b->grad_k + at, 1);
}

static VENEER_AMX void backward_panels(struct backward *b) {
    memset(b->grad_q, 0, (size_t)(b->count * b->T * STEP * 4));
    for (int64_t start = b->panels[0].first; start < b->panels[b->count - 1].end;
         start += BLOCK * SIDE)
        for (int64_t first = 0; first < b->count; first += PANELS) {
            const int64_t stop = smaller(first + PANELS, b->count);
            if (b->panels[stop - 1].end <= start) continue;
            if (b->panels[first].first >= start + BLOCK * SIDE) break;
            for (int64_t of = first; of < stop; of++) {
                const struct panel *w = b->panels + of;
                const int64_t key = larger(start, w->first),
                              count = (smaller(start + BLOCK * SIDE, w->end) - key) / SIDE;
                if (count > 0) backward_panel(b, of, key, count, (key - start) / SIDE);
            }
            for (int64_t place = 0; place < BLOCK; place++) {
                const int64_t key = start + place * SIDE;
                int64_t low = first, high = stop;
                while (low < high && b->panels[low].end <= key) low++;
                while (low < high && b->panels[high - 1].first > key) high--;
                if (low < high) backward_keys(b, key, place, low, high);
            }
        }
}

/* A panel's rows, and of each query its log-sum-exp as a power of 2 and the mean of what its shares
 * are given. */
static VENEER_AMX void lay_panel(struct backward *b, const struct place *p, int64_t of,
                                 uint16_t *rows) {
    const struct attention *a = b->a;
    const struct panel *w = b->panels + of;
    const int64_t T = b->T, D = a->size, at = of * T * STEP;
    lay_queries(p, w, a->q, a->q_row, a->q_head, rows);
    turn(rows, 2 * T, b->queries + at);
    pair(rows, T, b->queries_along + at);
    lay_queries(p, w, a->grad, a->grad_row, a->grad_head, rows);
    turn(rows, 2 * T, b->grads + at);
    pair(rows, T, b->grads_along + at);
    memset(b->lse[of], 0, sizeof b->lse[of]);
    memset(b->mean[of], 0, sizeof b->mean[of]);
    for (int64_t r = 0; r < w->n; r++) {
        const int64_t row = (p->start + w->i0 + r) * a->heads + w->head;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += 16) {
            const uint16_t *g = (const uint16_t *)a->grad + (p->start + w->i0 + r) * a->grad_row +
                                w->head * a->grad_head;
            sum = _mm512_fmadd_ps(bf16_floats(g + d),
                                  bf16_floats((const uint16_t *)a->forward_out + row * D + d), sum);
        }
        b->mean[of][r] = _mm512_reduce_add_ps(sum);
        b->lse[of][r] = a->lse[row] * LOG2_E;
    }
}

static VENEER_AMX void backward_body(void *arguments, int64_t from, int64_t to) {
    const struct attention *a = arguments;
    const int64_t D = a->size, T = (D + SIDE - 1) / SIDE, panel = T * STEP;
    struct backward *b = room(sizeof *b);
    float by[SIDE];
    for (int64_t r = 0; r < SIDE; r++) by[r] = a->scale;
    b->a = a, b->T = T, b->most = larger(PANELS, smaller(MANY, 2 * MANY / T) / PANELS * PANELS);
    amx_shapes(16, 0);
    for (int64_t task = from; task < to; task++) {
        const struct place p = place_of(a, task);
        const int64_t chunks = (p.J + SIDE - 1) / SIDE, all = chunks * panel;
        uint16_t *laid = room(
                     2 * (3 * all + (2 + 4 * b->most) * panel + (2 * PANELS + 1) * BLOCK * STEP)),
                 *next = laid + 3 * all;
        uint16_t *rows = next, *along = rows + panel;
        b->keys = laid, b->values = laid + all, b->turned = laid + 2 * all;
        b->queries = along + panel, b->grads = b->queries + b->most * panel,
        b->queries_along = b->grads + b->most * panel;
        b->grads_along = b->queries_along + b->most * panel,
        b->shares = b->grads_along + b->most * panel;
        b->given = b->shares + BLOCK * PANELS * STEP, b->pairs = b->given + BLOCK * PANELS * STEP;
        b->scores = room(4 * (2 * all + b->most * panel + 2 * BLOCK * STEP)),
        b->products = b->scores + BLOCK * STEP;
        b->grad_q = b->products + BLOCK * STEP, b->grad_k = b->grad_q + b->most * panel,
        b->grad_v = b->grad_k + all;
        memset(b->grad_k, 0, (size_t)(2 * all * 4));
        for (int64_t c = 0; c < chunks; c++) {
            lay_keys(&p, 0, c * SIDE, laid + c * panel);
            lay_keys(&p, 1, c * SIDE, laid + all + c * panel);
            pair(laid + c * panel, T, along);
            turn(along, 2 * T, laid + 2 * all + c * panel);
        }
        for (int64_t first = 0; (b->count = panels_of(&p, first, b->most, b->panels)) > 0;
             first += b->count) {
            for (int64_t of = 0; of < b->count; of++) lay_panel(b, &p, of, rows);
            backward_panels(b);
            for (int64_t of = 0; of < b->count; of++) {
                const struct panel *w = b->panels + of;
                write_turned(b->grad_q + of * panel, D, w->n, by,
                             (uint16_t *)a->out + ((p.start + w->i0) * a->heads + w->head) * D,
                             a->heads * D);
            }
        }
        for (int64_t j = 0; j < p.J; j++) {
            float *k = (j < a->before ? a->grad_before_k : a->grad_k) + place_of_gradient(&p, j);
            float *v = (j < a->before ? a->grad_before_v : a->grad_v) + place_of_gradient(&p, j);
            for (int64_t d = 0; d < D; d += 16) {
                const int64_t at = j / SIDE * panel + d / SIDE * STEP + j % SIDE * SIDE + d % SIDE;
                _mm512_storeu_ps(k + d, _mm512_mul_ps(_mm512_loadu_ps(b->grad_k + at),
                                                      _mm512_set1_ps(a->scale)));
                _mm512_storeu_ps(v + d, _mm512_loadu_ps(b->grad_v + at));
            }
        }
        free(laid), free(b->scores);
    }
    _tile_release();
    free(b);
}

int attention_tiles_forward(struct attention *a) {
    if (!veneer_has_amx()) return 0;
    veneer_parallel(forward_body, a, a->docs * a->kv_heads * a->splits, 1);
    return 1;
}

int attention_tiles_backward(struct attention *a) {
    if (!veneer_has_amx()) return 0;
    veneer_parallel(backward_body, a, a->docs * a->kv_heads * a->splits, 1);
    return 1;
}

#else

int attention_tiles_forward(struct attention *a) {
    (void)a;
    return 0;
}

int attention_tiles_backward(struct attention *a) {
    (void)a;
    return 0;
}

#endif
