/* Calls that Python made for one layer, made for another one, whose values lie elsewhere: see
 * kernels/tape/repeated.py. */
#include "parallel.h"
#include <stddef.h>
#include <string.h>

enum { MOST_BYTES = 2048 }; /* of a struct */

/* kernels/tape/repeated.py names the functions in this order. */
enum {
    PRODUCT,
    RANK_DOWN,
    RANK_UP,
    RANK_GRADIENT,
    BLOCK_NORM_FORWARD,
    BLOCK_NORM_BACKWARD,
    BLOCK_GATE_FORWARD,
    BLOCK_GATE_BACKWARD,
    BLOCK_HEADS,
    ATTENTION_FORWARD,
    ATTENTION_BACKWARD,
    ATTENTION_SUMMED,
    ATTENTION_SHARED,
    ZEROS,
    SILU_GATE_FORWARD
};

/* at: where its struct of so many bytes begins; count: what is given beside it; places: so many
 * addresses in it. */
struct repeated_call {
    int64_t function, at, bytes, count, places;
};

/* An address `at` so many bytes from the struct's begin: `from` so many bytes behind one of the
 * bases. */
struct place {
    int64_t at, base, from;
};

#if defined(__x86_64__)

int veneer_product(void *);
void veneer_rank_down(void *);
void veneer_rank_up(void *);
void veneer_rank_gradient(void *);
void veneer_block_norm_forward(void *);
void veneer_block_norm_backward(void *);
void veneer_block_gate_forward(void *);
void veneer_block_gate_backward(void *);
void veneer_block_heads(void *);
void veneer_attention_forward(void *);
void veneer_attention_backward(void *);
void veneer_attention_summed(void *);
void veneer_attention_shared(void *);
void veneer_zeros(void *);
void veneer_silu_gate_forward(void *, int64_t);

static int made(int64_t function, void *given, int64_t count) {
    switch (function) {
    case PRODUCT:
        return veneer_product(given);
    case RANK_DOWN:
        veneer_rank_down(given);
        return 0;
    case RANK_UP:
        veneer_rank_up(given);
        return 0;
    case RANK_GRADIENT:
        veneer_rank_gradient(given);
        return 0;
    case BLOCK_NORM_FORWARD:
        veneer_block_norm_forward(given);
        return 0;
    case BLOCK_NORM_BACKWARD:
        veneer_block_norm_backward(given);
        return 0;
    case BLOCK_GATE_FORWARD:
        veneer_block_gate_forward(given);
        return 0;
    case BLOCK_GATE_BACKWARD:
        veneer_block_gate_backward(given);
        return 0;
    case BLOCK_HEADS:
        veneer_block_heads(given);
        return 0;
    case ATTENTION_FORWARD:
        veneer_attention_forward(given);
        return 0;
    case ATTENTION_BACKWARD:
        veneer_attention_backward(given);
        return 0;
    case ATTENTION_SUMMED:
        veneer_attention_summed(given);
        return 0;
    case ATTENTION_SHARED:
        veneer_attention_shared(given);
        return 0;
    case ZEROS:
        veneer_zeros(given);
        return 0;
    case SILU_GATE_FORWARD:
        veneer_silu_gate_forward(given, count);
        return 0;
    default:
        return -1;
    }
}

struct repeated {
    const struct repeated_call *calls;
    int64_t count;
    const char *structs;
    const struct place *places;
    const int64_t *bases;
    int said;
};

static void make_all(void *arguments) {
    struct repeated *all = arguments;
    const struct place *places = all->places;
    _Alignas(64) char given[MOST_BYTES];
    for (const struct repeated_call *call = all->calls; call < all->calls + all->count;
         places += call++->places) {
        if (call->bytes > MOST_BYTES) {
            all->said = -1;
            return;
        }
        memcpy(given, all->structs + call->at, (size_t)call->bytes);
        for (int64_t i = 0; i < call->places; i++) {
            const int64_t address = all->bases[places[i].base] + places[i].from;
            memcpy(given + places[i].at, &address, sizeof address);
        }
        all->said = made(call->function, given, call->count);
        if (all->said != 0) return;
    }
}

/* What the first call that fails says; 0: none did. */
int veneer_repeated(const struct repeated_call *calls, int64_t count, const char *structs,
                    const struct place *places, const int64_t *bases) {
    struct repeated all = {calls, count, structs, places, bases, 0};
    veneer_together(make_all, &all);
    return all.said;
}

#else

int veneer_repeated(const struct repeated_call *calls, int64_t count, const char *structs,
                    const struct place *places, const int64_t *bases) {
    (void)calls, (void)count, (void)structs, (void)places, (void)bases;
    return -1;
}

#endif
