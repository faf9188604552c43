/* Products of rows of x with blocks of a .gguf file on AMX tiles. */
#ifndef VENEER_GGUF_TILES_H
#define VENEER_GGUF_TILES_H

#include "bits.h"

/* `outs` rows of blocks, bias or NULL; y (rows, outs). */
struct gguf_weight {
    const uint8_t *blocks;
    const uint16_t *bias;
    uint16_t *y;
    int64_t outs;
};

/* y = x (rows, width) W^T + bias of each of `count` weights, bf16; blocks of ggml's kind. */
struct gguf_product {
    const void *x;
    const struct gguf_weight *weights;
    int64_t count, rows, width, kind;
};

/* Groups of rows of W that threads take from `next` on, a `share`th of what is left and one more: long runs first, since
   memory brings these sooner, and short ones last, so that nobody waits. */
struct gguf_runs {
    int64_t groups, share, next;
};

/* The threads that are worth it, of `most`, where one takes `grain` groups at least. */
INLINE int64_t gguf_set_out(struct gguf_runs *runs, int64_t grain, int64_t most) {
    const int64_t useful = runs->groups / grain, threads = useful < 2 ? 1 : useful < most ? useful : most;
    runs->next = 0, runs->share = threads > 1 ? 2 * threads : 1;
    return threads;
}

/* Where the next run ends, and where it begins in *start; 0: none is left. */
INLINE int64_t gguf_take_run(struct gguf_runs *runs, int64_t *start) {
    int64_t next = __atomic_load_n(&runs->next, __ATOMIC_RELAXED);
    while (next < runs->groups) {
        const int64_t share = 1 + (runs->groups - next) / runs->share, stop = share < runs->groups - next ? next + share : runs->groups;
        *start = next;
        if (__atomic_compare_exchange_n(&runs->next, &next, stop, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return stop;
    }
    return 0;
}

/* Where veneer_few_level says 5. 1: no memory. */
int gguf_tiled_product(const struct gguf_product *of);

/* Where it says 4, or more. */
int gguf_vector_product(const struct gguf_product *of);

#endif
