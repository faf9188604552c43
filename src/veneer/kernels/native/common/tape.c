/* Replays the calls of a tape, which Python recorded (kernels/tape/tape.py). */
#include "packed_rows.h"
#include "parallel.h"
#include "updates.h"
#include <stddef.h>
#include <string.h>

/* Functions that a tape may call, and how. kernels/tape/tape.py names them in the same order.
 * P(i): argument i as a pointer; I(i): as an int; a[i]: as it is. */
#define STEP_FUNCTIONS(X)                                                                          \
    X(FEW_ROWS, veneer_few_rows(P(0), I(1)))                                                       \
    X(FEW_ROWS_UPDATED, veneer_few_rows_updated(P(0), I(1)))                                       \
    X(STEP_NORM, (veneer_step_norm(P(0), I(1), I(2)), 0))                                          \
    X(STEP_ROTATE, (veneer_step_rotate(P(0), I(1), I(2)), 0))                                      \
    X(STEP_GATE, (veneer_step_gate(P(0), I(1), I(2)), 0))                                          \
    X(PAGED_ATTENTION, veneer_paged_attention(P(0), I(1), I(2)))                                   \
    X(NF4_PRODUCT, veneer_nf4_product(P(0), a[1], a[2], a[3], P(4), a[5], P(6), P(7), I(8), I(9))) \
    X(PACKED_ROWS, veneer_packed_rows(P(0), I(1)))                                                 \
    X(STEP_EMBED, (veneer_step_embed(P(0), I(1), I(2)), 0))                                        \
    X(STEP_ANGLES, (veneer_step_angles(P(0)), 0))                                                  \
    X(STEP_CAP, (veneer_step_cap(P(0), I(1), I(2)), 0))                                            \
    X(STEP_COPY, (veneer_step_copy(P(0), I(1), I(2)), 0))                                          \
    X(EXPERT_ROUTE, (veneer_expert_route(P(0)), 0))                                                \
    X(EXPERT_SORT, (veneer_expert_sort(P(0)), 0))                                                  \
    X(EXPERT_PRODUCT, veneer_expert_product(P(0), I(1)))                                           \
    X(EXPERT_SUM, (veneer_expert_sum(P(0)), 0))                                                    \
    X(STATE_WINDOW, (veneer_state_window(P(0), I(1), I(2)), 0))                                    \
    X(STATE_SPACE, (veneer_state_space(P(0), I(1), I(2)), 0))                                      \
    X(STATE_DELTA, (veneer_state_delta(P(0), I(1), I(2)), 0))

int veneer_few_rows(const void *, int);
int veneer_paged_attention(const void *, int, int);
int veneer_nf4_product(const void *, int64_t, int64_t, int64_t, const void *, int64_t, const void *,
                       void *, int, int);
void veneer_step_norm(const void *, int, int), veneer_step_rotate(const void *, int, int);
void veneer_step_gate(const void *, int, int), veneer_step_embed(const void *, int, int);
void veneer_step_angles(const void *), veneer_step_cap(const void *, int, int);
void veneer_step_copy(const void *, int, int);
void veneer_expert_route(const void *), veneer_expert_sort(const void *);
int veneer_expert_product(const void *, int);
void veneer_expert_sum(const void *);
void veneer_state_window(const void *, int, int), veneer_state_space(const void *, int, int);
void veneer_state_delta(const void *, int, int);

#if defined(__x86_64__)

#define LAYER_FUNCTIONS(X)                                                                         \
    X(PRODUCT, veneer_product(P(0)))                                                               \
    X(RANK_DOWN, (veneer_rank_down(P(0)), 0))                                                      \
    X(RANK_UP, (veneer_rank_up(P(0)), 0))                                                          \
    X(RANK_GRADIENT, (veneer_rank_gradient(P(0)), 0))                                              \
    X(BLOCK_NORM_FORWARD, (veneer_block_norm_forward(P(0)), 0))                                    \
    X(BLOCK_NORM_BACKWARD, (veneer_block_norm_backward(P(0)), 0))                                  \
    X(BLOCK_GATE_FORWARD, (veneer_block_gate_forward(P(0)), 0))                                    \
    X(BLOCK_GATE_BACKWARD, (veneer_block_gate_backward(P(0)), 0))                                  \
    X(BLOCK_HEADS, (veneer_block_heads(P(0)), 0))                                                  \
    X(BLOCK_HEADS_JOINED, (veneer_block_heads_joined(P(0)), 0))                                    \
    X(ATTENTION_FORWARD, (veneer_attention_forward(P(0)), 0))                                      \
    X(ATTENTION_BACKWARD, (veneer_attention_backward(P(0)), 0))                                    \
    X(ATTENTION_SUMMED, (veneer_attention_summed(P(0)), 0))                                        \
    X(ATTENTION_SHARED, (veneer_attention_shared(P(0)), 0))                                        \
    X(ZEROS, (veneer_zeros(P(0)), 0))                                                              \
    X(GATE_FORWARD, (veneer_gate_forward(P(0), a[1], I(2)), 0))

int veneer_product(void *);
void veneer_rank_down(void *), veneer_rank_up(void *), veneer_rank_gradient(void *);
void veneer_block_norm_forward(void *), veneer_block_norm_backward(void *);
void veneer_block_gate_forward(void *), veneer_block_gate_backward(void *);
void veneer_block_heads(void *), veneer_block_heads_joined(void *), veneer_zeros(void *);
void veneer_attention_forward(void *), veneer_attention_backward(void *);
void veneer_attention_summed(void *), veneer_attention_shared(void *);
void veneer_gate_forward(void *, int64_t, int);

#else
#define LAYER_FUNCTIONS(X)
#endif

#define NAME(name, call) name,
#define CASE(name, call)                                                                           \
    case name: return call;
#define P(i) ((void *)(intptr_t)a[i])
#define I(i) ((int)a[i])

enum { STEP_FUNCTIONS(NAME) LAYER_FUNCTIONS(NAME) };
enum { MOST_ARGUMENTS = 10, UNKNOWN = -1 };

struct tape_call {
    int64_t function, arguments[MOST_ARGUMENTS];
};

/* An address `at` bytes behind the first struct, to be replaced by that of `offset` bytes behind
 * bases[base]. */
struct tape_address {
    int64_t at, base, offset;
};

/* structs: NULL, or where the first arguments of calls are counted from. */
struct tape {
    struct tape_call *calls;
    int64_t num_calls;
    char *structs;
    const struct tape_address *addresses;
    int64_t num_addresses;
    const int64_t *bases;
    int64_t error; /* of the first call that fails; 0: none did */
};

static int make(const struct tape_call *call) {
    const int64_t *a = call->arguments;
    switch (call->function) {
        STEP_FUNCTIONS(CASE)
        LAYER_FUNCTIONS(CASE)
    default: return UNKNOWN;
    }
}

static const void *struct_of(const struct tape_call *call) {
    return (const void *)(intptr_t)call->arguments[0];
}

enum { AHEAD = 16 }; /* calls that are looked at */

/* Whether a product over x, into y, may be made before these updates: they add to what is there,
   reading the same x. Each of these places begins a piece of memory of its own. */
static int may_precede(const struct few_rows_updated *updates, const void *x, const void *y) {
    if (updates->x != x || updates->down == y) return 0;
    for (int64_t i = 0; i < updates->count; i++)
        if (updates->parts[i].w != NULL || updates->parts[i].y == y) return 0;
    return 1;
}

/* Whether call `at`, a product, may be made together with the one at 0, before all calls between
 * them. */
static int may_come_first(const struct tape_call *calls, int64_t at) {
    const struct packed_rows *first = struct_of(calls), *own = struct_of(calls + at);
    const int level = (int)calls->arguments[1];
    if (calls[at].arguments[1] != level || !packed_like(first, own, level)) return 0;
    for (int64_t i = 0; i < at; i++) {
        const struct packed_rows *other = struct_of(calls + i);
        const int apart = calls[i].function == PACKED_ROWS
                              ? other->x == own->x && other->y != own->y
                              : may_precede(struct_of(calls + i), own->x, own->y);
        if (!apart) return 0;
    }
    return 1;
}

/* Computes the product at 0 and those behind it that are like it: a layer's q, k and v, or gate and
 * up. Sets their bits in done. */
static int make_together(const struct tape_call *calls, int64_t count, uint32_t *done) {
    const struct packed_rows *products[MOST_TOGETHER];
    int64_t size = 0;
    for (int64_t at = 0; at < count && at < AHEAD && size < MOST_TOGETHER; at++) {
        if (calls[at].function == FEW_ROWS_UPDATED) continue;
        if (calls[at].function != PACKED_ROWS) break;
        if (*done >> at & 1 || (at > 0 && !may_come_first(calls, at))) continue;
        products[size++] = struct_of(calls + at);
        *done |= (uint32_t)1 << at;
    }
    return size > 1 ? packed_together(products, size, (int)calls->arguments[1]) : make(calls);
}

static void replay(void *data) {
    struct tape *tape = data;
    uint32_t done = 0; /* bits of this call and those behind it */
    for (int64_t i = 0; i < tape->num_addresses; i++) {
        const struct tape_address *place = tape->addresses + i;
        const int64_t address = tape->bases[place->base] + place->offset;
        memcpy(tape->structs + place->at, &address, sizeof address);
    }
    for (int64_t i = 0; i < tape->num_calls && tape->structs != NULL; i++)
        tape->calls[i].arguments[0] += (intptr_t)tape->structs;
    for (int64_t i = 0; i < tape->num_calls && tape->error == 0; i++, done >>= 1) {
        const struct tape_call *call = tape->calls + i;
        if (done & 1) continue;
        tape->error = call->function == PACKED_ROWS
                          ? make_together(call, tape->num_calls - i, &done)
                          : make(call);
    }
}

/* Returns what the first call that fails returns; 0: none did. */
int veneer_replay(struct tape *tape) {
    veneer_together(replay, tape);
    return (int)tape->error;
}
