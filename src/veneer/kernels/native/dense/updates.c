/* Updates of a small rank on some rows of y: y += scale * (x A^T) B^T, many at once, behind a
   product with dense W.

   x A^T is rounded to the values' type. Factors lie as they are read (factors.h), so no sum runs
   across lanes: each goes along the width or the rank in an order that neither the rows beside it
   nor the number of threads changes. updates_body.h holds the code, written once and compiled here
   for each set of instructions; updates_tiles.c the one for tiles. Each factor is read once, as
   memory gives it: what comes next is asked for meanwhile, and while the product before them keeps
   memory waiting, that too. A thread that finds nothing left of the product goes on with its
   updates' x A^T, and adds to y when the others are done. */
#include "updates.h"
#include "factors.h"
#include <stddef.h>
#include <stdlib.h>

enum {
    VECTORS = 4,     /* of a block of outs */
    CHAINS = 4,      /* sums of a rank: every fourth word each, so that none waits for the last */
    CHUNK = 64, /* rows of an update that go together: what they read and write stays in the second
                   cache */
    SOON = 64,  /* lines asked for ahead */
    EACH = 4,   /* updates a thread from which on one thread takes all of an update */
};

typedef float f16v __attribute__((vector_size(64)));
typedef uint32_t u16v __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32)));

INLINE uint32_t word_at(const char *from, int bytes) {
    uint32_t word = 0;
    memcpy(&word, from, (size_t)bytes);
    return word;
}

/* The first `count` of 16 floats. */
INLINE void put_some(char *to, f16v floats, int64_t count, const int type) {
    f4v parts[4];
    memcpy(parts, &floats, 64);
    for (int i = 0; i < 4; i++, count -= 4, to += type == FEW_FP32 ? 16 : 8)
        if (count > 0) put_floats(to, parts[i], count < 4 ? count : 4, type);
}

/* scale * sums, added to values of y that stand side by side; rounded as bf16_of_float. */
INLINE void add_whole(char *y, const int type, float scale, f16v sums) {
    f16v own;
    if (type == FEW_FP32) {
        memcpy(&own, y, 64);
        own = sums * scale + own;
        memcpy(y, &own, 64);
        return;
    }
    v16h halves;
    memcpy(&halves, y, 32);
    own = sums * scale + (f16v)(__builtin_convertvector(halves, u16v) << 16);
    const u16v bits = (u16v)own;
    halves = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, v16h);
    memcpy(y, &halves, 32);
}

/* What a vector of sums is, added to y. */
INLINE void add_sums(const struct update *u, const int type, int64_t row, int64_t out, f16v sums) {
    const int size = type == FEW_FP32 ? 4 : 2;
    char *y = u->y + (row * u->outs + out) * size;
    if (u->outs - out >= 16) {
        add_whole(y, type, u->scale, sums);
        return;
    }
    f4v parts[4];
    memcpy(parts, &sums, 64);
    for (int i = 0; i < 4; i++, out += 4, y += 4 * size) {
        const int64_t count = u->outs - out < 4 ? u->outs - out : 4;
        if (count > 0)
            put_floats(y, parts[i] * u->scale + some_floats(y, count, type), count, type);
    }
}

/* Products of a word with words, by multiplying and adding. */
INLINE f16v times_plus(f16v sums, f16v b, float a) {
#if defined(__aarch64__)
    f4v own[4], of_b[4];
    memcpy(own, &sums, 64);
    memcpy(of_b, &b, 64);
    UNROLLED(4, i, 4) own[i] = (f4v)FUSED_128(of_b[i], vdupq_n_f32(a), own[i]);
    memcpy(&sums, own, 64);
    return sums;
#else
    return sums + b * a;
#endif
}

#define HALVES(sums, a, b, part) times_plus(sums, (f16v)((b)part), float_of_bits((a)part))
#define MULTIPLIED(sums, a, b, type)                                                               \
    ((type) == FEW_FP32 ? times_plus(sums, (f16v)(b), float_of_bits(a))                            \
                        : HALVES(HALVES(sums, a, b, << 16), a, b, &0xffff0000u))

#if defined(__x86_64__)
#include <immintrin.h>

#define NAME(x) x##_pairs
#define TARGET FOR_AVX512_BF16
#define ROWS 4
#define MULTIPLY(sums, a, b, type)                                                                 \
    (f16v) _mm512_dpbf16_ps((__m512)(sums), (__m512bh)_mm512_set1_epi32((int)(a)), (__m512bh)(b))
#include "updates_body.h"

#define NAME(x) x##_avx512
#define TARGET FOR_AVX512
#define ROWS 4
#define MULTIPLY MULTIPLIED
#include "updates_body.h"

#define NAME(x) x##_avx2
#define TARGET FOR_AVX2
#define ROWS 1
#define MULTIPLY MULTIPLIED
#include "updates_body.h"
#endif

#define NAME(x) x##_plain
#define TARGET
#define ROWS 1
#define MULTIPLY MULTIPLIED
#include "updates_body.h"

/* single: updates of one row that go together; 0: each as any other. */
struct ways {
    update_downs downs;
    update_ups ups;
    int64_t single;
};

static struct ways ways_of(int type, int most) {
    const int level = veneer_few_level(type, most);
#if defined(__x86_64__)
    if (level == 5) return (struct ways){veneer_tiled_downs, veneer_tiled_ups, TOGETHER};
    if (level == 4) return (struct ways){downs_pairs, ups_pairs, 0};
    if (level == 3) return (struct ways){downs_avx512, ups_avx512, 0};
    if (level == 2) return (struct ways){downs_avx2, ups_avx2, 0};
#else
    (void)level;
#endif
    return (struct ways){downs_plain, ups_plain, 0};
}

/* what: DOWN, UP, or both of each update by one thread. undone: NULL, or what to wait for before y
 * changes. */
struct work {
    const struct update *of;
    int64_t count;
    struct ways ways;
    int what, type;
    const int64_t *undone;
};

INLINE int64_t units_of(const struct work *all, const struct update *u) {
    return all->what == UP ? blocks_of(u->outs) : 1;
}

/* Of a unit: factors are read, then multiplied with each row. */
INLINE int64_t cost_of(const struct work *all, const struct update *u) {
    const int64_t words = words_of(all->type, u->rank),
                  down = filled_rank(u->rank) * words_of(all->type, u->width) / UPDATE_BLOCK;
    if (all->what == UP) return words * (u->rows + 3);
    return (1 + down + (all->what & UP ? words * blocks_of(u->outs) : 0)) * (u->rows + 3);
}

/* Updates from u on, before `last`, that go together. */
INLINE int64_t alike(const struct work *all, const struct update *u, const struct update *last) {
    int64_t count = 1;
    if (u->rows > 1 || all->what == UP) return count;
    for (const struct update *v = u + 1; count < all->ways.single && v < last; v++, count++)
        if (v->rows != 1 || v->rank != u->rank || v->width != u->width || v->outs != u->outs) break;
    return count;
}

/* The second half of updates [u, last), whose first half is made. */
static void make_up(const struct work *all, const struct update *u, const struct update *last,
                    struct ahead *soon) {
    for (int64_t count; u < last; u += count) {
        count = alike(all, u, last);
        all->ways.ups(u, count, 0, blocks_of(u->outs), soon);
    }
}

/* The units whose costs begin within [start, stop), all of them in a row. */
static void run(void *arguments, int64_t start, int64_t stop) {
    const struct work *all = arguments;
    const struct update *last = all->of, *halves = NULL;
    struct ahead soon = {.what = all->what, .type = all->type};
    for (int64_t before = 0; last < all->of + all->count && before < stop; last++)
        before += units_of(all, last) * cost_of(all, last);
    int64_t before = 0;
    for (const struct update *u = all->of; u < last; u++) {
        const int64_t cost = cost_of(all, u), units = units_of(all, u),
                      behind = before + units * cost;
        if (behind <= start) {
            before = behind;
            continue;
        }
        const int64_t begin = start <= before ? 0 : (start - before + cost - 1) / cost;
        const int64_t end = stop >= behind ? units : (stop - before + cost - 1) / cost;
        before = behind;
        if (begin >= end) continue;
        const int64_t count = alike(all, u, last);
        if ((u->rows > 1 || all->ways.single == 0) && (soon.last == NULL || soon.u < u)) {
            soon.u = u, soon.last = last;
            ahead_in(&soon, all->what & DOWN ? DOWN : UP,
                     all->what == UP ? begin * UPDATE_BLOCK * words_of(all->type, u->rank) : 0);
            bring(&soon, SOON);
        }
        if (all->what & DOWN) all->ways.downs(u, count, &soon);
        if (all->what == UP) all->ways.ups(u, 1, begin, end, &soon);
        if (all->what == (DOWN | UP)) {
            if (halves == NULL) halves = u;
            if (all->undone == NULL || __atomic_load_n(all->undone, __ATOMIC_ACQUIRE) == 0) {
                make_up(all, halves, u + count, &soon);
                halves = NULL;
            }
        }
        before += (count - 1) * cost, u += count - 1;
    }
    if (halves == NULL) return;
    veneer_wait(all->undone);
    make_up(all, halves, last, &soon);
}

static int64_t whole_cost(const struct work *all) {
    int64_t cost = 0;
    for (const struct update *u = all->of; u < all->of + all->count; u++)
        cost += units_of(all, u) * cost_of(all, u);
    return cost;
}

static void run_all(struct work all, int what, int64_t turns) {
    all.what = what;
    veneer_parallel_dealt(run, &all, whole_cost(&all), ALONE / UPDATE_BLOCK, turns);
}

/* The updates of the next turn that there are any of, each part's from done[part] on, TOGETHER of
   each part by turns, and of an update CHUNK rows at a time. */
static int64_t next_turn(const struct few_rows_updated *call, int64_t *done, char **down,
                         struct update *to) {
    const int size = call->type == FEW_FP32 ? 4 : 2;
    int64_t turn = INT64_MAX, found = 0;
    for (int64_t p = 0; p < call->count; p++)
        if (done[p] < call->parts[p].count && call->parts[p].updates[done[p]].turn < turn)
            turn = call->parts[p].updates[done[p]].turn;
    for (int64_t p = 0, left = call->count; left > 0; p = (p + 1) % call->count) {
        const struct few_rows_updated_part *part = call->parts + p;
        const int64_t stop = done[p] + TOGETHER;
        left =
            done[p] < part->count && part->updates[done[p]].turn == turn ? call->count : left - 1;
        for (; done[p] < stop && done[p] < part->count && part->updates[done[p]].turn == turn;
             done[p]++) {
            const struct few_rows_update *u = part->updates + done[p];
            for (int64_t row = 0; row < u->rows; row += CHUNK) {
                const int64_t rows = u->rows - row < CHUNK ? u->rows - row : CHUNK,
                              first = u->first + row;
                const char *x = (const char *)call->x + first * call->apart * size;
                char *y = (char *)part->y + first * part->outs * size;
                to[found++] =
                    (struct update){x,           u->A,        u->B,    *down,      y,       rows,
                                    call->apart, call->width, u->rank, part->outs, u->scale};
                *down += rows * u->rank * size;
            }
        }
    }
    return found;
}

/* What updates read, in their order: an A, and its B, which lies behind it where factors.c laid
 * them out. */
static void read_by(const struct update *u, int64_t count, const int type, struct stretch *to,
                    struct behind *behind) {
    behind->reads = to;
    for (const struct update *last = u + count; u < last; u++) {
        const int64_t lines = filled_rank(u->rank) * filled_words(type, u->width) / STEP;
        *to++ = (struct stretch){(const char *)u->A, lines};
        *to++ = (struct stretch){(const char *)u->B, blocks_of(u->outs) * UPDATE_BLOCK *
                                                         words_of(type, u->rank) / STEP};
        behind->lines += to[-2].lines + to[-1].lines;
    }
}

/* The product of a part with x. */
static struct piece piece_of(const struct few_rows_updated *call,
                             const struct few_rows_updated_part *part) {
    const int size = call->type == FEW_FP32 ? 4 : 2;
    return (struct piece){(const char *)call->x + part->first * call->apart * size,
                          part->w,
                          part->bias,
                          (char *)part->y + part->first * part->outs * size,
                          part->rows > 0 ? part->rows : call->rows,
                          call->width,
                          part->outs,
                          call->apart,
                          NULL,
                          part->narrow};
}

/* Room for `updates` of a call; `of` and `done`: a piece and a number for each of its parts. */
static int compute(const struct few_rows_updated *call, int most, struct piece *of, int64_t *done,
                   struct update *all, int64_t updates) {
    int64_t pieces = 0;
    for (int64_t p = 0; p < call->count; p++) {
        if (call->parts[p].w != NULL) of[pieces++] = piece_of(call, call->parts + p);
        done[p] = 0;
    }
    if (updates == 0) return pieces > 0 && veneer_pieces(of, pieces, call->type, most, NULL);
    struct stretch *reads = (struct stretch *)(all + updates);
    const int64_t turns = call->rows > FEW ? TURNS : LONG, many = EACH * veneer_threads();
    char *down = call->down;
    int failed = 0;
    for (int64_t left = updates; left > 0 && !failed; pieces = 0) {
        struct behind behind = {.body = run, .runs = turns * veneer_threads()};
        struct work work = {all,
                            next_turn(call, done, &down, all),
                            ways_of(call->type, most),
                            DOWN | UP,
                            call->type,
                            NULL};
        left -= work.count;
        if (pieces > 0 && work.count >= many) {
            behind.arguments = &work, behind.count = whole_cost(&work),
            work.undone = &behind.undone;
            if (call->rows <= FEW) read_by(all, work.count, call->type, reads, &behind);
            failed = veneer_pieces(of, pieces, call->type, most, &behind);
            continue;
        }
        if (pieces > 0) failed = veneer_pieces(of, pieces, call->type, most, NULL);
        if (failed) break;
        if (work.count >= many) {
            run_all(work, DOWN | UP, turns);
        } else {
            run_all(work, DOWN, turns);
            run_all(work, UP, turns);
        }
    }
    return failed;
}

int veneer_few_rows_updated(const struct few_rows_updated *call, int most) {
    int64_t updates = 0;
    for (const struct few_rows_updated_part *part = call->parts; part < call->parts + call->count;
         part++)
        for (int64_t i = 0; i < part->count; i++)
            updates += (part->updates[i].rows + CHUNK - 1) / CHUNK;
    const size_t of_parts = (size_t)call->count * (sizeof(struct piece) + sizeof(int64_t));
    struct update *all =
        malloc((size_t)updates * (sizeof *all + 2 * sizeof(struct stretch)) + of_parts);
    if (all == NULL) return 1;
    struct piece *of = (struct piece *)((struct stretch *)(all + updates) + 2 * updates);
    const int failed = compute(call, most, of, (int64_t *)(of + call->count), all, updates);
    free(all);
    return failed;
}
