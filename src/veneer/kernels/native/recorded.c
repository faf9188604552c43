/* Calls that Python made once, made again in their order: see kernels/tape/recorded.py. What each is
   given, structs and the memory behind them, lies where it lay then. */
#include "packed_rows.h"
#include "parallel.h"
#include "updates.h"
#include <stddef.h>

enum { MOST_GIVEN = 9 };

/* kernels/tape/recorded.py names the functions in this order. */
enum {
    FEW_ROWS,
    FEW_ROWS_UPDATED,
    STEP_NORM,
    STEP_ROTATE,
    STEP_GATE,
    PAGED_ATTENTION,
    NF4_PRODUCT,
    PACKED_ROWS,
    STEP_INPUTS
};

struct recorded_call {
    int64_t function, given[MOST_GIVEN];
};

int veneer_few_rows(const void *, int);
void veneer_step_norm(const void *, int64_t, int, int);
void veneer_step_rotate(const void *, int64_t, int, int);
void veneer_step_gate(const void *, int64_t, int, int);
int veneer_paged_attention(const void *, int, int);
int veneer_nf4_product(const void *, int64_t, int64_t, int64_t, const void *, int64_t, void *, int,
                       int);
void veneer_step_inputs(const void *);

static int made(const struct recorded_call *call) {
    const int64_t *g = call->given;
#define P(i) ((void *)(intptr_t)g[i])
#define I(i) ((int)g[i])
    switch (call->function) {
    case FEW_ROWS:
        return veneer_few_rows(P(0), I(1));
    case FEW_ROWS_UPDATED:
        return veneer_few_rows_updated(P(0), I(1));
    case STEP_NORM:
        veneer_step_norm(P(0), g[1], I(2), I(3));
        return 0;
    case STEP_ROTATE:
        veneer_step_rotate(P(0), g[1], I(2), I(3));
        return 0;
    case STEP_GATE:
        veneer_step_gate(P(0), g[1], I(2), I(3));
        return 0;
    case PAGED_ATTENTION:
        return veneer_paged_attention(P(0), I(1), I(2));
    case NF4_PRODUCT:
        return veneer_nf4_product(P(0), g[1], g[2], g[3], P(4), g[5], P(6), I(7), I(8));
    case PACKED_ROWS:
        return veneer_packed_rows(P(0), I(1));
    case STEP_INPUTS:
        veneer_step_inputs(P(0));
        return 0;
    default:
        return -1;
    }
#undef P
#undef I
}

enum { AHEAD = 16 }; /* calls that are looked at */

/* Whether a product over x, into y, may be made before these updates: they add to what is there,
   reading the same x. Each of these places begins a piece of memory of its own. */
static int may_follow(const struct few_rows_updated *updates, const void *x, const void *y) {
    if (updates->x != x || updates->down == y) return 0;
    for (int64_t i = 0; i < updates->count; i++)
        if (updates->parts[i].w != NULL || updates->parts[i].y == y) return 0;
    return 1;
}

/* Whether call `at`, a product, may be made together with the one at 0, before all that stands
 * between them. */
static int may_come_first(const struct recorded_call *calls, int64_t at) {
    const struct packed_rows *first = (void *)(intptr_t)calls->given[0],
                             *own = (void *)(intptr_t)calls[at].given[0];
    if (calls[at].given[1] != calls->given[1] || !packed_like(first, own, (int)calls->given[1]))
        return 0;
    for (int64_t i = 0; i < at; i++) {
        const void *given = (void *)(intptr_t)calls[i].given[0];
        const struct packed_rows *other = given;
        const int apart = calls[i].function == PACKED_ROWS
                              ? other->x == own->x && other->y != own->y
                              : may_follow(given, own->x, own->y);
        if (!apart) return 0;
    }
    return 1;
}

/* The product at 0 and those behind it that are like it: a layer's q, k and v, or gate and up. Sets
 * their bits in done. */
static int made_together(const struct recorded_call *calls, int64_t count, uint32_t *done) {
    const struct packed_rows *found[MOST_TOGETHER];
    int64_t size = 0;
    for (int64_t at = 0; at < count && at < AHEAD && size < MOST_TOGETHER; at++) {
        if (calls[at].function != PACKED_ROWS && calls[at].function != FEW_ROWS_UPDATED) break;
        if (calls[at].function != PACKED_ROWS || *done >> at & 1 ||
            (at > 0 && !may_come_first(calls, at)))
            continue;
        found[size++] = (void *)(intptr_t)calls[at].given[0];
        *done |= (uint32_t)1 << at;
    }
    return size > 1 ? packed_together(found, size, (int)calls->given[1]) : made(calls);
}

/* said: by the first call that fails; 0: none did. */
struct all_calls {
    const struct recorded_call *calls;
    int64_t count;
    int said;
};

static void make_all(void *data) {
    struct all_calls *all = data;
    uint32_t done = 0; /* of this call and those behind it */
    for (int64_t i = 0; i < all->count && all->said == 0; i++, done >>= 1) {
        const struct recorded_call *call = all->calls + i;
        if (done & 1) continue;
        all->said =
            call->function == PACKED_ROWS ? made_together(call, all->count - i, &done) : made(call);
    }
}

/* What the first call that fails says; 0: none did. */
int veneer_recorded(const struct recorded_call *calls, int64_t count) {
    struct all_calls all = {calls, count, 0};
    veneer_together(make_all, &all);
    return all.said;
}
