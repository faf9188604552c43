/* Included by paged_attention.c once for each set of instructions, behind float_vectors.h: ROWS and
   BLOCKS are the tile that the registers hold. */

#define PARTS (SLOTS / W)

typedef uint32_t NAME(uv) __attribute__((vector_size(4 * W)));
typedef uint16_t NAME(hv) __attribute__((vector_size(2 * W)));

INLINE NAME(fv) NAME(times_plus)(NAME(fv) x, NAME(fv) y, NAME(fv) sum) {
#if LEVEL >= 3
    return (NAME(fv))_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif LEVEL == 2
    return (NAME(fv))_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
    return (NAME(fv))FUSED_128(x, y, sum);
#endif
}

/* sum + one * other in every lane: a word is a float, or a pair of bf16 values whose two products
 * are added. */
INLINE NAME(fv) NAME(add_words)(const int pairs, NAME(fv) sum, NAME(uv) one, NAME(uv) other) {
    if (!pairs) return NAME(times_plus)((NAME(fv))one, (NAME(fv))other, sum);
#if LEVEL == 4
    return (NAME(fv))_mm512_dpbf16_ps((__m512)sum, (__m512bh)one, (__m512bh)other);
#else
    sum = NAME(times_plus)((NAME(fv))(one << 16), (NAME(fv))(other << 16), sum);
    return NAME(times_plus)((NAME(fv))(one & 0xFFFF0000u), (NAME(fv))(other & 0xFFFF0000u), sum);
#endif
}

INLINE void NAME(put_words)(const int pairs, void *to, NAME(fv) x) {
    if (!pairs) {
        memcpy(to, &x, sizeof x);
        return;
    }
#if LEVEL == 4
    __m256i packed = (__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
    NAME(uv) w = (NAME(uv))x;
    NAME(hv) packed = __builtin_convertvector((w + 0x7FFF + ((w >> 16) & 1)) >> 16, NAME(hv));
#endif
    memcpy(to, &packed, sizeof packed);
}

INLINE float NAME(exp_one)(float x) { return NAME(exp)(NAME(all)(x))[0]; }

/* x, or c * tanh(x / c). */
INLINE NAME(fv) NAME(capped)(NAME(fv) x, float cap) {
    return cap == 0.0f ? x : cap * NAME(tanh)(x / cap);
}

/* scores (R, SLOTS * B): R queries of `words` words with B blocks of keys, (words, SLOTS) each.
   soon: the blocks of values that are read next, about as long, or NULL. */
INLINE void NAME(score_tile)(const int pairs, const int R, const int B, const uint32_t *q,
                             int64_t words, const uint32_t *const *keys, float *scores,
                             const struct block *soon) {
    NAME(fv) sum[ROWS][BLOCKS][PARTS];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            for (int p = 0; p < PARTS; p++) sum[r][b][p] = NAME(all)(0.0f);
    for (int64_t d = 0; d < words; d++) {
        NAME(uv) key[BLOCKS][PARTS];
        for (int b = 0; b < B; b++) memcpy(key[b], keys[b] + d * SLOTS, 4 * SLOTS);
        for (int b = 0; b < B && soon != NULL; b++) __builtin_prefetch(soon[b].values + d * SLOTS);
        for (int r = 0; r < R; r++) {
            NAME(uv) one = q[r * words + d] - (NAME(uv)){};
            for (int b = 0; b < B; b++)
                for (int p = 0; p < PARTS; p++)
                    sum[r][b][p] = NAME(add_words)(pairs, sum[r][b][p], one, key[b][p]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            memcpy(scores + r * CHUNK * SLOTS + b * SLOTS, sum[r][b], 4 * SLOTS);
}

/* sums (R, W * C) of the blocks' rows of values, `wide` words each, by R rows of shares. words:
 * those that are seen. */
INLINE void NAME(value_tile)(const int pairs, const int R, const int C, const uint32_t *shares,
                             const struct block *blocks, int64_t num, int64_t wide, float *sums,
                             int64_t apart, int64_t lanes, int64_t ahead) {
    const int64_t row = CHUNK * SLOTS / (1 + pairs), own = SLOTS / (1 + pairs);
    NAME(fv) sum[ROWS][COLUMNS];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = NAME(all)(0.0f);
    for (int64_t b = 0; b < num; b++)
        for (int64_t t = blocks[b].first; t < blocks[b].last; t++) {
            NAME(uv) value[COLUMNS] = {};
            for (int64_t line = 0; line < ahead; line++)
                __builtin_prefetch(blocks[b].soon + t * wide + line * SLOTS);
            if (lanes) memcpy(value, blocks[b].values + t * wide, 4 * (size_t)lanes);
            else memcpy(value, blocks[b].values + t * wide, 4 * W * (size_t)C);
            for (int r = 0; r < R; r++) {
                NAME(uv) share = shares[r * row + b * own + t] - (NAME(uv)){};
                for (int c = 0; c < C; c++)
                    sum[r][c] = NAME(add_words)(pairs, sum[r][c], share, value[c]);
            }
        }
    for (int r = 0; r < R; r++)
        memcpy(sums + r * apart, sum[r], 4 * (size_t)(lanes ? lanes : W * C));
}

#define OF_ROWS(call)                                                                              \
    switch (rows) {                                                                                \
    case 1: call(1); break;                                                                        \
    case 2: call(2); break;                                                                        \
    case 3:                                                                                        \
        call(3);                                                                                   \
        break;                                                                                     \
        OF_MORE_ROWS(call)                                                                         \
    }

/* The scores of one query as shares of the largest, their words in place of (and largest, sum)
 * before its sums. */
INLINE void NAME(shares_of)(const int pairs, const struct paged_attention *a, float *scores,
                            int64_t num, const struct lanes *lanes, uint32_t *shares, float *part) {
    NAME(fv) top = NAME(all)(-INFINITY), total = NAME(all)(0.0f);
    NAME(iv) lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    for (int64_t b = 0; b < num; b++)
        for (int p = 0; p < PARTS; p++) {
            float *own = scores + b * SLOTS + p * W;
            NAME(fv) x = NAME(capped)(NAME(load)(own) * a->scale, a->softcap);
            if (lanes[b].from > 0 || lanes[b].to < SLOTS) {
                NAME(iv)
                at = lane + p * W,
                seen = (at >= (int32_t)lanes[b].from) & (at < (int32_t)lanes[b].to);
                x = (NAME(fv))(((NAME(iv))x & seen) | ((NAME(iv))NAME(all)(-INFINITY) & ~seen));
            }
            memcpy(own, &x, sizeof x);
            NAME(iv) more = ~(x <= top); /* also of what is no number */
            top = (NAME(fv))(((NAME(iv))x & more) | ((NAME(iv))top & ~more));
        }
    float most = top[0], sum = 0.0f;
    for (int i = 1; i < W; i++) most = top[i] <= most ? most : top[i];
    if (most == -INFINITY) {
        memset(shares, 0, (size_t)(num * SLOTS / (1 + pairs)) * 4);
    } else {
        for (int64_t b = 0; b < num; b++)
            for (int p = 0; p < PARTS; p++) {
                NAME(fv) x = NAME(load)(scores + b * SLOTS + p * W);
                NAME(fv) share = (NAME(fv))((NAME(iv))NAME(exp)(x - most) & ~(x == -INFINITY));
                total += share;
                NAME(put_words)(pairs, (char *)shares + (b * SLOTS + p * W) * (pairs ? 2 : 4),
                                share);
            }
        for (int i = 0; i < W; i++) sum += total[i];
    }
    part[0] = most, part[1] = sum;
}

/* One chunk of one table for `rows` rows that follow one another, and one key head: part (rows * G,
 * 2 + E). */
INLINE void NAME(chunk)(const int pairs, const struct paged_attention *a, const int64_t *span,
                        const struct seen *seen, int64_t num_rows, int64_t head, int64_t c,
                        const uint32_t *q, const struct scratch *s, float *part) {
    const int64_t G = a->heads / a->kv_heads, M = num_rows * G, words = a->size / (1 + pairs),
                  E = a->value_size;
    int64_t low = seen[0].low, high = seen[0].high;
    for (int64_t r = 1; r < num_rows; r++) {
        low = seen[r].low < low ? seen[r].low : low;
        high = seen[r].high > high ? seen[r].high : high;
    }
    int64_t b0 = low / SLOTS, b1 = (high + SLOTS - 1) / SLOTS;
    b0 = b0<c * CHUNK ? c * CHUNK : b0, b1 = b1>(c + 1) * CHUNK ? (c + 1) * CHUNK : b1;
    const int64_t num = b1 - b0;
    if (num <= 0) {
        for (int64_t m = 0; m < M; m++) {
            memset(part + m * (E + 2), 0, (size_t)(E + 2) * 4);
            part[m * (E + 2)] = -INFINITY;
        }
        return;
    }
    const uint32_t *keys[CHUNK];
    struct block blocks[CHUNK];
    for (int64_t b = 0; b < num; b++) {
        const int64_t at = a->tables[span[TABLE] + b0 + b] * a->kv_heads + head;
        keys[b] = (const uint32_t *)a->keys + at * words * SLOTS;
        blocks[b] = (struct block){(const uint32_t *)a->values + at * E * (SLOTS / (1 + pairs)),
                                   keys[b] + words * SLOTS, SLOTS, 0};
    }
    for (int64_t m = 0; m < M;) {
        const int64_t rows = M - m < ROWS ? M - m : ROWS;
        for (int64_t b = 0; b < num;) {
            const int64_t many = BLOCKS > 1 && num - b >= BLOCKS ? BLOCKS : 1;
#define TILE(R)                                                                                    \
    if (BLOCKS > 1 && many > 1)                                                                    \
        NAME(score_tile)(pairs, R, BLOCKS, q + m * words, words, keys + b,                         \
                         s->scores + (m * CHUNK + b) * SLOTS, m ? NULL : blocks + b);              \
    else                                                                                           \
        NAME(score_tile)(pairs, R, 1, q + m * words, words, keys + b,                              \
                         s->scores + (m * CHUNK + b) * SLOTS, m ? NULL : blocks + b)
            OF_ROWS(TILE)
#undef TILE
            b += many;
        }
        m += rows;
    }
    for (int64_t r = 0; r < num_rows; r++) {
        struct lanes lanes[CHUNK];
        for (int64_t b = 0; b < num; b++) {
            lanes[b] = lanes_of(span, seen + r, b0 + b);
            if (lanes[b].from >= lanes[b].to) continue;
            int64_t first = lanes[b].from / (1 + pairs), last = (lanes[b].to + pairs) / (1 + pairs);
            blocks[b].first = first < blocks[b].first ? first : blocks[b].first;
            blocks[b].last = last > blocks[b].last ? last : blocks[b].last;
        }
        for (int64_t m = r * G; m < (r + 1) * G; m++)
            NAME(shares_of)(pairs, a, s->scores + m * CHUNK * SLOTS, num, lanes,
                            s->shares + m * (CHUNK * SLOTS / (1 + pairs)), part + m * (E + 2));
    }
    for (int64_t m = 0; m < M;) {
        const int64_t rows = M - m < ROWS ? M - m : ROWS;
        const uint32_t *shares = s->shares + m * (CHUNK * SLOTS / (1 + pairs));
        float *sums = part + m * (E + 2) + 2;
        for (int64_t e = 0; e < E;) {
            const int64_t wide = E - e >= W * COLUMNS ? W * COLUMNS : E - e >= W ? W : 0;
            struct block some[CHUNK];
            for (int64_t b = 0; b < num; b++)
                some[b] = (struct block){blocks[b].values + e, blocks[b].soon, blocks[b].first,
                                         blocks[b].last};
            /* Lines of the next head's keys, which are as many as these values have. */
            const int64_t ahead = m || e || head + 1 == a->kv_heads ? 0 : (E + SLOTS - 1) / SLOTS;
#define TILE(R)                                                                                    \
    if (wide == W * COLUMNS)                                                                       \
        NAME(value_tile)(pairs, R, COLUMNS, shares, some, num, E, sums + e, E + 2, 0, ahead);      \
    else if (wide) NAME(value_tile)(pairs, R, 1, shares, some, num, E, sums + e, E + 2, 0, ahead); \
    else NAME(value_tile)(pairs, R, 1, shares, some, num, E, sums + e, E + 2, E - e, ahead)
            OF_ROWS(TILE)
#undef TILE
            e += wide ? wide : E - e;
        }
        m += rows;
    }
}

/* Functions of their own: four calls would be four copies. */
#if LEVEL < 4
static TARGET __attribute__((noinline)) void
NAME(chunk_floats)(const struct paged_attention *a, const int64_t *span, const struct seen *seen,
                   int64_t rows, int64_t head, int64_t c, const uint32_t *q,
                   const struct scratch *s, float *part) {
    NAME(chunk)(0, a, span, seen, rows, head, c, q, s, part);
}
#endif

static TARGET __attribute__((noinline)) void
NAME(chunk_pairs)(const struct paged_attention *a, const int64_t *span, const struct seen *seen,
                  int64_t rows, int64_t head, int64_t c, const uint32_t *q, const struct scratch *s,
                  float *part) {
    NAME(chunk)(1, a, span, seen, rows, head, c, q, s, part);
}

#if LEVEL < 4
#define CHUNK_OF(pairs) (pairs ? NAME(chunk_pairs) : NAME(chunk_floats))
#else
#define CHUNK_OF(pairs) NAME(chunk_pairs)
#endif

/* state (M, 2 + E) and the chunk behind it: both relative to the larger of their largest scores. */
INLINE void NAME(join)(float *state, const float *part, int64_t M, int64_t E) {
    for (int64_t m = 0; m < M; m++, state += E + 2, part += E + 2) {
        if (part[0] == -INFINITY) continue;
        if (state[0] == -INFINITY) {
            memcpy(state, part, (size_t)(E + 2) * 4);
            continue;
        }
        const float most = state[0] >= part[0] ? state[0] : part[0];
        const float old = NAME(exp_one)(state[0] - most), new = NAME(exp_one)(part[0] - most);
        state[0] = most;
        for (int64_t e = 1; e < E + 2; e++) state[e] = state[e] * old + part[e] * new;
    }
}

INLINE void NAME(finish)(const int pairs, const struct paged_attention *a, int64_t row,
                         int64_t head, float *state) {
    const int64_t G = a->heads / a->kv_heads, E = a->value_size;
    for (int64_t h = head * G; h < (head + 1) * G; h++, state += E + 2) {
        float total = state[1], factor = 1.0f;
        if (a->sinks != NULL) {
            const float most = state[0] >= a->sinks[h] ? state[0] : a->sinks[h];
            factor = NAME(exp_one)(state[0] - most);
            total = total * factor + NAME(exp_one)(a->sinks[h] - most);
        }
        factor /= total;
        char *out = (char *)a->out + (row * a->heads + h) * E * (pairs ? 2 : 4);
        int64_t e = 0;
        for (; e + W <= E; e += W)
            NAME(put_words)(pairs, out + e * (pairs ? 2 : 4), NAME(load)(state + 2 + e) * factor);
        if (e < E) {
            float few[W] = {0}, packed[W];
            memcpy(few, state + 2 + e, (size_t)(E - e) * 4);
            NAME(put_words)(pairs, packed, NAME(load)(few) * factor);
            memcpy(out + e * (pairs ? 2 : 4), packed, (size_t)(E - e) * (pairs ? 2 : 4));
        }
    }
}

/* One chunk of a unit: rows of one sequence, or single rows, the chunks that their tables have in
 * common at once. */
INLINE void NAME(unit_chunk)(const int pairs, const struct paged_attention *a, const struct unit *u,
                             int64_t head, int64_t c, const uint32_t *q, const struct seen *seen,
                             const struct scratch *s, float *part) {
    const int64_t G = a->heads / a->kv_heads, words = a->size / (1 + pairs);
    const int64_t *span = a->spans + u->span * SPAN;
    if (!u->singles || c < u->shared) {
        CHUNK_OF(pairs)(a, span, seen, u->rows, head, c, q, s, part);
        return;
    }
    for (int64_t r = 0; r < u->rows; r++, span += SPAN) {
        if ((seen[r].high - 1) / (CHUNK * SLOTS) == c)
            write_rows(pairs, a, span, u->row + r, 0, 1, head);
        CHUNK_OF(pairs)(a, span, seen + r, 1, head, c, q + r * G * words, s,
                        part + r * G * (a->value_size + 2));
    }
}

/* One key head of a unit; split: one chunk of it, which is the last one that is done where it adds
 * all up. */
INLINE void NAME(of_head)(const int pairs, struct run *run, const struct unit *u, int64_t head,
                          int64_t chunk, const struct scratch *s) {
    const struct paged_attention *a = run->a;
    const int64_t G = a->heads / a->kv_heads, K = a->kv_heads, E = a->value_size,
                  words = a->size / (1 + pairs), bytes = pairs ? 2 : 4;
    const int64_t M = u->rows * G, size = M * (E + 2);
    for (int64_t m = 0; m < M; m++)
        memcpy(s->q + m * words,
               (const char *)a->q +
                   ((u->row + m / G) * a->q_row + (head * G + m % G) * a->q_head) * bytes,
               (size_t)words * 4);
    if (run->split) {
        float *parts = run->parts + u->part + head * u->chunks * size;
        NAME(unit_chunk)(pairs, a, u, head, chunk, s->q, s->seen, s, parts + chunk * size);
        if (__atomic_sub_fetch(&run->left[(u - run->units) * K + head], 1, __ATOMIC_ACQ_REL))
            return;
        for (int64_t c = 1; c < u->chunks; c++) NAME(join)(parts, parts + c * size, M, E);
        for (int64_t r = 0; r < u->rows; r++)
            NAME(finish)(pairs, a, u->row + r, head, parts + r * G * (E + 2));
        return;
    }
    for (int64_t c = 0; c < u->chunks; c++) {
        NAME(unit_chunk)(pairs, a, u, head, c, s->q, s->seen, s, c ? s->part : s->state);
        if (c) NAME(join)(s->state, s->part, M, E);
    }
    for (int64_t r = 0; r < u->rows; r++)
        NAME(finish)(pairs, a, u->row + r, head, s->state + r * G * (E + 2));
}

INLINE void NAME(tasks)(const int pairs, struct run *run) {
    const struct paged_attention *a = run->a;
    const int64_t K = a->kv_heads;
    struct scratch s;
    if (!take_scratch(run, &s)) return;
    for (int64_t task; (task = __atomic_fetch_add(&run->next, 1, __ATOMIC_RELAXED)) < run->tasks;) {
        const struct unit *u = run->units;
        while (task >= u->task + tasks_of(run, u, K)) u++;
        const int64_t own = task - u->task;
        for (int64_t r = 0; r < u->rows; r++)
            s.seen[r] = u->singles ? seen_by(a, a->spans + (u->span + r) * SPAN, 0)
                                   : seen_by(a, a->spans + u->span * SPAN, u->first + r);
        for (int64_t head = run->whole ? 0 : own % K; head < (run->whole ? K : own % K + 1); head++)
            NAME(of_head)(pairs, run, u, head, own / K, &s);
    }
    free(s.all);
}

/* Tasks are taken one by one, as threads are done with theirs: not the run that is handed over. */
#if LEVEL < 4
static TARGET void NAME(attend_floats)(void *run, int64_t from, int64_t to) {
    (void)from, (void)to;
    NAME(tasks)(0, run);
}
#endif

static TARGET void NAME(attend_pairs)(void *run, int64_t from, int64_t to) {
    (void)from, (void)to;
    NAME(tasks)(1, run);
}

#undef INLINE
#undef PARTS
#undef OF_ROWS
#undef CHUNK_OF
#undef OF_MORE_ROWS
#undef NAME
#undef TARGET
#undef LEVEL
#undef W
#undef ROWS
#undef BLOCKS
#undef COLUMNS
