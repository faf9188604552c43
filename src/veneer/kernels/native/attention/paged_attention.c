/* Attention of a decoding step over keys and values in blocks: see kernels/attention/paged.py for
   what it computes.

   A step's rows are tokens of spans, each span those of one sequence: a single one, or a chunk of a
   prompt. A table names a sequence's blocks, those of its trained prefix (the front, whose last
   block may be filled in part) before its own. keys     (blocks, K, D, SLOTS) floats, or (blocks,
   K, D / 2, SLOTS) pairs of bf16 neighbours along D values   (blocks, K, SLOTS, E) floats, or
   (blocks, K, SLOTS / 2, E) pairs of bf16 neighbours along the slots so a register holds the keys
   of a block's tokens side by side, and no sum runs across its lanes.

   A unit is what one task reads blocks for: rows of one chunk of a prompt, or single rows; what the
   tables of these begin with in common is read once. A row's keys are taken in chunks of CHUNK
   blocks, counted from the table's beginning, one after another; how rows are put together, split
   and spread over threads changes no bit of a row. */
#include "bits.h"
#include "levels.h"
#include <math.h>
#include <stdlib.h>
#undef INLINE

enum { SLOTS = 16, CHUNK = 8, QUERIES = 32, WHOLE = 4 };
enum {
    TABLE,
    FRONT_BLOCKS,
    FRONT,
    START,
    STOP,
    SPAN
}; /* columns of a span: kernels/attention/paged.py has them too */

/* Strides in values; the innermost one is 1. kernels/bindings/paged_calls.py has the same fields in
 * this order. */
struct paged_attention {
    const int32_t *tables;
    const int64_t *spans; /* (count, SPAN) */
    const void *q, *k, *v;
    void *keys, *values, *out;
    const float *sinks; /* (H) or NULL */
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    int64_t count, heads, kv_heads, size, value_size, window;
    float scale, softcap; /* 0: none */
};

struct seen {
    int64_t low, high; /* slots of its table */
};

struct lanes {
    int64_t from, to; /* of a block's slots */
};

struct block {
    const uint32_t *values, *soon; /* soon: the next head's keys */
    int64_t first, last; /* words of it that some row sees: what lies behind may be no number */
};

struct unit {
    int64_t span, first, row, rows,
        singles; /* first: of the span's rows. singles: each row is a span of its own */
    int64_t shared, chunks, task, part;
};

struct scratch {
    void *all;
    uint32_t *q, *shares;
    float *scores, *part, *state;
    struct seen *seen;
};

struct run {
    const struct paged_attention *a;
    struct unit *units;
    int64_t tasks, split, whole, next, failed; /* whole: a task is all heads of a unit */
    float *parts;                              /* split: (unit, head, chunk, M, 2 + E) */
    int64_t *left; /* split: chunks of a unit and head that are not done */
};

static int64_t tasks_of(const struct run *run, const struct unit *u, int64_t heads) {
    return run->whole ? 1 : heads * (run->split ? u->chunks : 1);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t slot_of(const int64_t *span, int64_t place) {
    return place < span[FRONT] ? place : place + span[FRONT_BLOCKS] * SLOTS - span[FRONT];
}

/* What row i of a span sees. */
static struct seen seen_by(const struct paged_attention *a, const int64_t *span, int64_t i) {
    const int64_t last = span[FRONT] + span[START] + i;
    const int64_t low = a->window && last + 1 > a->window ? last + 1 - a->window : 0;
    return (struct seen){slot_of(span, low), slot_of(span, last) + 1};
}

static struct lanes lanes_of(const int64_t *span, const struct seen *seen, int64_t block) {
    const int64_t high = block < span[FRONT_BLOCKS] ? least(seen->high, span[FRONT]) : seen->high;
    return (struct lanes){seen->low > block * SLOTS ? seen->low - block * SLOTS : 0,
                          least(high - block * SLOTS, SLOTS)};
}

/* Keys and values of rows i to i + n - 1 of a span into their blocks; `row`: the first one's among
 * the step's. */
static inline void write_rows(int pairs, const struct paged_attention *a, const int64_t *span,
                              int64_t row, int64_t i, int64_t n, int64_t head) {
    const int64_t words = a->size / (1 + pairs), E = a->value_size;
    for (; n > 0; n--, i++, row++) {
        const int64_t slot = slot_of(span, span[FRONT] + span[START] + i), t = slot % SLOTS;
        const int64_t at = a->tables[span[TABLE] + slot / SLOTS] * a->kv_heads + head;
        uint32_t *key = (uint32_t *)a->keys + at * words * SLOTS + t;
        uint32_t *value =
            (uint32_t *)a->values + (at * (SLOTS / (1 + pairs)) + t / (1 + pairs)) * E;
        const char *k = (const char *)a->k + (row * a->k_row + head * a->k_head) * (pairs ? 2 : 4);
        const char *v = (const char *)a->v + (row * a->v_row + head * a->v_head) * (pairs ? 2 : 4);
        for (int64_t d = 0; d < words; d++) memcpy(key + d * SLOTS, k + 4 * d, 4);
        if (!pairs) {
            memcpy(value, v, (size_t)E * 4);
            continue;
        }
        /* The first of a pair clears what another text left in the second's place. */
        const uint16_t *own = (const uint16_t *)v;
        if (t % 2 == 0)
            for (int64_t e = 0; e < E; e++) value[e] = own[e];
        else
            for (int64_t e = 0; e < E; e++) value[e] = (value[e] & 0xFFFF) | (uint32_t)own[e] << 16;
    }
}

static int take_scratch(struct run *run, struct scratch *s) {
    const struct paged_attention *a = run->a;
    const int64_t G = a->heads / a->kv_heads, M = G > QUERIES ? G : QUERIES,
                  E = (a->value_size + 2 + 15) / 16 * 16, D = (a->size + 15) / 16 * 16;
    char *at = NULL;
    if (posix_memalign(
            (void **)&at, 64,
            (size_t)(M * (D + 2 * E + 2 * CHUNK * SLOTS) * 4 + M * (int64_t)sizeof(struct seen)))) {
        run->failed = 1;
        return 0;
    }
    s->all = at;
    s->q = (uint32_t *)at, at += M * D * 4;
    s->scores = (float *)at, at += M * CHUNK * SLOTS * 4;
    s->shares = (uint32_t *)at, at += M * CHUNK * SLOTS * 4;
    s->part = (float *)at, at += M * E * 4;
    s->state = (float *)at, at += M * E * 4;
    s->seen = (struct seen *)at;
    return 1;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define OF_MORE_ROWS(call) CASE(4, call(4)) CASE(5, call(5)) CASE(6, call(6))
#define LEVEL 4
#define W 16
#define ROWS 6
#define BLOCKS 4
#define COLUMNS 4
#define NAME(x) x##_bf16
#define TARGET FOR_AVX512_BF16
#include "float_vectors.h"
#include "paged_attention_rows.h"
#define OF_MORE_ROWS(call) CASE(4, call(4)) CASE(5, call(5)) CASE(6, call(6))
#define LEVEL 3
#define W 16
#define ROWS 6
#define BLOCKS 4
#define COLUMNS 4
#define NAME(x) x##_avx512
#define TARGET FOR_AVX512
#include "float_vectors.h"
#include "paged_attention_rows.h"
#define OF_MORE_ROWS(call) CASE(4, call(4)) CASE(5, call(5))
#define LEVEL 2
#define W 8
#define ROWS 5
#define BLOCKS 1
#define COLUMNS 2
#define NAME(x) x##_avx2
#define TARGET FOR_AVX2
#include "float_vectors.h"
#include "paged_attention_rows.h"
#endif
#define LEVEL 0
#define W 4
#if defined(__aarch64__) /* 32 registers */
#define OF_MORE_ROWS(call) CASE(4, call(4)) CASE(5, call(5))
#define ROWS 5
#else
#define OF_MORE_ROWS(call)
#define ROWS 3
#endif
#define BLOCKS 1
#define COLUMNS 4
#define NAME(x) x##_plain
#define TARGET
#include "float_vectors.h"
#include "paged_attention_rows.h"

int veneer_has_bf16(void);

static veneer_body body_of(int pairs, int most) {
    int level = veneer_level();
    level = level > most ? most : level;
#if defined(__x86_64__) && defined(__GNUC__)
    if (pairs && level >= 3 && most >= 4 && veneer_has_bf16()) return attend_pairs_bf16;
    if (level >= 3) return pairs ? attend_pairs_avx512 : attend_floats_avx512;
    if (level >= 2) return pairs ? attend_pairs_avx2 : attend_floats_avx2;
#endif
    return pairs ? attend_pairs_plain : attend_floats_plain;
}

static int64_t blocks_of(const int64_t *span) {
    return span[FRONT_BLOCKS] + (span[STOP] + SLOTS - 1) / SLOTS;
}

/* Chunks that two tables begin with in common, neither's last one among them: that is where their
 * rows are written. */
static int64_t common_chunks(const struct paged_attention *a, const int64_t *one,
                             const int64_t *other) {
    const int64_t most =
        least(slot_of(one, one[FRONT] + one[START]), slot_of(other, other[FRONT] + other[START])) /
        SLOTS;
    int64_t b = 0;
    if (one[FRONT] != other[FRONT] || one[FRONT_BLOCKS] != other[FRONT_BLOCKS]) return 0;
    while (b < most && a->tables[one[TABLE] + b] == a->tables[other[TABLE] + b]) b++;
    return b / CHUNK;
}

static int64_t units_of(const struct paged_attention *a, struct unit *units, int64_t *work) {
    const int64_t G = a->heads / a->kv_heads, most = QUERIES / G > 1 ? QUERIES / G : 1;
    int64_t num = 0, row = 0;
    *work = 0;
    for (int64_t n = 0; n < a->count; n++) {
        const int64_t *span = a->spans + n * SPAN;
        const int64_t rows = span[STOP] - span[START],
                      chunks = (blocks_of(span) + CHUNK - 1) / CHUNK;
        *work += rows * blocks_of(span);
        struct unit *last = units + num - 1;
        if (rows == 1 && num && last->singles && last->rows < most) {
            const int64_t common = common_chunks(a, a->spans + last->span * SPAN, span);
            const int64_t shared = last->rows == 1 ? common : least(common, last->shared);
            if (shared > 0) {
                last->rows++, row++, last->shared = shared;
                last->chunks = chunks > last->chunks ? chunks : last->chunks;
                continue;
            }
        }
        for (int64_t i = 0; i < rows; i += most) {
            const int64_t own = least(rows - i, most);
            const int64_t slots = slot_of(span, span[FRONT] + span[START] + i + own - 1) + 1;
            units[num++] = (struct unit){
                n, i, row, own, rows == 1, 0, (slots + CHUNK * SLOTS - 1) / (CHUNK * SLOTS), 0, 0};
            row += own;
        }
    }
    return num;
}

struct writing {
    const struct paged_attention *a;
    int pairs;
};

/* Items are spans times key heads; those of single rows are written by the tasks that read them. */
static void write_body(void *arguments, int64_t from, int64_t to) {
    const struct writing *w = arguments;
    int64_t row = 0;
    for (int64_t n = 0; n < w->a->count; n++) {
        const int64_t *span = w->a->spans + n * SPAN, rows = span[STOP] - span[START];
        for (int64_t head = 0; head < w->a->kv_heads; head++) {
            const int64_t item = n * w->a->kv_heads + head;
            if (rows > 1 && item >= from && item < to)
                write_rows(w->pairs, w->a, span, row, 0, rows, head);
        }
        row += rows;
    }
}

/* pairs: bf16, else float32. most: caps the instructions (4, 3, 2, 0), for tests. 1: no memory. */
int veneer_paged_attention(const struct paged_attention *a, int pairs, int most) {
    const int64_t K = a->kv_heads, G = a->heads / K, E = a->value_size;
    int64_t rows = 0, many = 0, work;
    for (int64_t n = 0; n < a->count; n++) {
        const int64_t own = a->spans[n * SPAN + STOP] - a->spans[n * SPAN + START];
        rows += own, many += own > 1;
    }
    if (rows == 0) return 0;
    struct run run = {.a = a, .units = malloc((size_t)rows * sizeof(struct unit))};
    if (run.units == NULL) return 1;
    if (many) {
        struct writing writing = {a, pairs};
        veneer_parallel(write_body, &writing, a->count * K, rows > 64 ? 1 : a->count * K);
    }
    const int64_t num = units_of(a, run.units, &work);
    int64_t longest = 1, part = 0;
    for (int64_t n = 0; n < num; n++)
        longest = run.units[n].chunks > longest ? run.units[n].chunks : longest;
    run.split = longest > 1 && num * K < 2 * veneer_threads();
    run.whole = num >= WHOLE * veneer_threads();
    for (int64_t n = 0; n < num; n++) {
        struct unit *u = run.units + n;
        u->task = run.tasks, u->part = part;
        run.tasks += tasks_of(&run, u, K);
        part += K * u->chunks * u->rows * G * (E + 2);
    }
    if (run.split) {
        run.parts = malloc((size_t)part * sizeof(float));
        run.left = malloc((size_t)(num * K) * sizeof(int64_t));
        for (int64_t i = 0; run.left != NULL && i < num * K; i++)
            run.left[i] = run.units[i / K].chunks;
        run.failed = run.parts == NULL || run.left == NULL;
    }
    /* Some 5 thousand products of a query with a block's keys and values are worth a thread that
     * waits awake. */
    if (!run.failed) veneer_parallel(body_of(pairs, most), &run, work * a->heads, 16);
    free(run.units), free(run.parts), free(run.left);
    return (int)run.failed;
}
