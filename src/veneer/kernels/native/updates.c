/* Updates of a small rank on some rows of y: y += scale * (x A^T) B^T, many at once, behind a product with dense W.

   x A^T is a product of a few rows (few_rows.c), rounded to the values' type. B lies as it is read: BLOCK outs side by
   side, word after word along its rank, a word two bf16 neighbours or one float; ranks are even, filled up with zeros.
   So no sum runs across lanes; each goes along the rank in its order, whatever the rows beside it. updates_body.h holds
   the code, written once and compiled here for each set of instructions. */
#include "few_rows.h"
#include "updates.h"
#include <stddef.h>

enum { BLOCK = UPDATE_BLOCK, VECTORS = 4, AHEAD = 4, MOST_PARTS = 16, MOST_UPDATES = 128 }; /* kernels/dense_calls.py knows the last two */

/* y (rows, outs) += scale * down B^T; down (rows, words), B (ceil(outs / BLOCK), words, BLOCK) words. */
struct up {
    const uint32_t *down, *B;
    void *y;
    int64_t rows, words, outs;
    float scale;
};

struct ups {
    const struct up *of;
    int64_t count;
    int type;
};

typedef float f16v __attribute__((vector_size(64)));
typedef uint32_t u16v __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32)));

INLINE int64_t blocks_of(const struct up *up) { return (up->outs + BLOCK - 1) / BLOCK; }
INLINE int64_t cost_of(const struct up *up) { return up->words * (up->rows + 3); }

/* Where the block begins that memory should bring next: AHEAD on, of the next update where this one ends before. */
INLINE const uint32_t *soon_read(const struct ups *all, const struct up *up, int64_t block) {
    int64_t next = block + AHEAD;
    while (next >= blocks_of(up) && up + 1 < all->of + all->count) next -= blocks_of(up++);
    return up->B + next * up->words * BLOCK;
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
INLINE void add_sums(const struct up *up, const int type, int64_t row, int64_t out, f16v sums) {
    const int size = type == FEW_FP32 ? 4 : 2;
    char *y = (char *)up->y + (row * up->outs + out) * size;
    if (up->outs - out >= 16) {
        add_whole(y, type, up->scale, sums);
        return;
    }
    f4v parts[4];
    memcpy(parts, &sums, 64);
    for (int i = 0; i < 4; i++, out += 4, y += 4 * size) {
        const int64_t count = up->outs - out < 4 ? up->outs - out : 4;
        if (count > 0) put_floats(y, parts[i] * up->scale + some_floats(y, count, type), count, type);
    }
}

/* Products of a word with words, by multiplying and adding. */
#define HALVES(sums, a, b, part) ((sums) + (f16v)((b)part) * float_of_bits((a)part))
#define MULTIPLIED(sums, a, b, type)                                        \
    ((type) == FEW_FP32 ? (sums) + (f16v)(b) * float_of_bits(a)             \
                        : HALVES(HALVES(sums, a, b, << 16), a, b, & 0xffff0000u))

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#define AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")))

#define NAME(x) x##_pairs
#define TARGET AVX512BF16
#define ROWS 4
#define MULTIPLY(sums, a, b, type) (f16v) _mm512_dpbf16_ps((__m512)(sums), (__m512bh)_mm512_set1_epi32((int)(a)), (__m512bh)(b))
#include "updates_body.h"

#define NAME(x) x##_avx512
#define TARGET AVX512
#define ROWS 4
#define MULTIPLY MULTIPLIED
#include "updates_body.h"

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define ROWS 1
#define MULTIPLY MULTIPLIED
#include "updates_body.h"
#endif

#define NAME(x) x##_plain
#define TARGET
#define ROWS 1
#define MULTIPLY MULTIPLIED
#include "updates_body.h"

static void add_ups(const struct up *of, int64_t count, int type, int most) {
    const int level = veneer_few_level(type, most);
    int64_t cost = 0;
    for (int64_t i = 0; i < count; i++) cost += blocks_of(of + i) * cost_of(of + i);
    veneer_body body = add_plain;
#if defined(__x86_64__)
    if (level >= 4) body = add_pairs;
    else if (level == 3) body = add_avx512;
    else if (level == 2) body = add_avx2;
#else
    (void)level;
#endif
    struct ups all = {of, count, type};
    veneer_parallel_dealt(body, &all, cost, ALONE / BLOCK, TURNS);
}

int veneer_few_rows_updated(const struct few_rows_updated *call, int most) {
    const int size = call->type == FEW_FP32 ? 4 : 2;
    struct piece of[MOST_PARTS + MOST_UPDATES];
    struct up up[MOST_UPDATES], ups[MOST_UPDATES];
    int64_t turns[MOST_UPDATES], pieces = 0, updates = 0;
    char *down = call->down;
    for (const struct few_rows_updated_part *part = call->parts; part < call->parts + call->count; part++) {
        if (part->w != NULL)
            of[pieces++] = (struct piece){call->x, part->w, part->bias, part->y, call->rows, call->width, part->outs, call->apart, NULL};
        for (int64_t i = 0; i < part->count; i++) {
            const struct few_rows_update *u = part->updates + i;
            const char *x = (const char *)call->x + u->first * call->apart * size;
            char *y = (char *)part->y + u->first * part->outs * size;
            of[pieces++] = (struct piece){x, u->A, NULL, down, u->rows, call->width, u->rank, call->apart, NULL};
            turns[updates] = u->turn;
            up[updates++] = (struct up){(const uint32_t *)down, u->B, y, u->rows, u->rank * size / 4, part->outs, u->scale};
            down += u->rows * u->rank * size;
        }
    }
    if (pieces > 0 && veneer_pieces(of, pieces, call->type, most)) return 1;
    for (int64_t turn = 0, done = 0, now = 0; done < updates; turn++, done += now) {
        now = 0;
        for (int64_t i = 0; i < updates; i++)
            if (turns[i] == turn) ups[now++] = up[i];
        add_ups(ups, now, call->type, most);
    }
    return 0;
}
