/* Calls that Python made once, made again in their order: see kernels/recorded.py. What each is given, structs and the
   memory behind them, lies where it lay then. */
#include "parallel.h"

enum { MOST_GIVEN = 9 };

/* kernels/recorded.py names the functions in this order. */
enum { FEW_ROWS, FEW_ROWS_UPDATED, STEP_NORM, STEP_ROTATE, STEP_GATE, PAGED_ATTENTION, NF4_PRODUCT, PACKED_ROWS };

struct recorded_call {
    int64_t function, given[MOST_GIVEN];
};

int veneer_few_rows(const void *, int);
int veneer_few_rows_updated(const void *, int);
void veneer_step_norm(const void *, int64_t, int, int);
void veneer_step_rotate(const void *, int64_t, int, int);
void veneer_step_gate(const void *, int64_t, int, int);
int veneer_paged_attention(const void *, int, int);
int veneer_nf4_product(const void *, int64_t, int64_t, int64_t, const void *, int64_t, void *, int, int);
int veneer_packed_rows(const void *, int);

static int made(const struct recorded_call *call) {
    const int64_t *g = call->given;
#define P(i) ((void *)(intptr_t)g[i])
#define I(i) ((int)g[i])
    switch (call->function) {
    case FEW_ROWS: return veneer_few_rows(P(0), I(1));
    case FEW_ROWS_UPDATED: return veneer_few_rows_updated(P(0), I(1));
    case STEP_NORM: veneer_step_norm(P(0), g[1], I(2), I(3)); return 0;
    case STEP_ROTATE: veneer_step_rotate(P(0), g[1], I(2), I(3)); return 0;
    case STEP_GATE: veneer_step_gate(P(0), g[1], I(2), I(3)); return 0;
    case PAGED_ATTENTION: return veneer_paged_attention(P(0), I(1), I(2));
    case NF4_PRODUCT: return veneer_nf4_product(P(0), g[1], g[2], g[3], P(4), g[5], P(6), I(7), I(8));
    case PACKED_ROWS: return veneer_packed_rows(P(0), I(1));
    default: return -1;
    }
#undef P
#undef I
}

/* What the first call that fails says; 0: none did. */
int veneer_recorded(const struct recorded_call *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const int said = made(calls + i);
        if (said != 0) return said;
    }
    return 0;
}
