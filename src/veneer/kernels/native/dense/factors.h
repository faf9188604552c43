/* What updates.c and updates_tiles.c share: an update of some rows, y += scale * (x A^T) B^T, and
   how its factors lie.

   A: ranks in groups of LANES side by side, the last of HALF where no more are left, word after
   word along the width, which is filled up to whole steps. B: UPDATE_BLOCK outs side by side, word
   after word along the rank. A word is two bf16 neighbours or one float; all that is filled up is
   zeros. factors.c lays them so, kernels/bindings/dense_calls.py knows it. */
#ifndef VENEER_FACTORS_H
#define VENEER_FACTORS_H

#include "few_rows.h"

enum { LANES = 16, HALF = 8, STEP = 16 /* words */ };
enum {
    TOGETHER = 4
}; /* updates of one row that go through their factors side by side: memory is quickest for a few
      places at once */

/* x (rows, width), `apart` values from one another; down (rows, rank), rank even: what x A^T is; y
 * (rows, outs). */
struct update {
    const char *x;
    const uint32_t *A, *B;
    char *down, *y;
    int64_t rows, apart, width, rank, outs;
    float scale;
};

INLINE int64_t words_of(const int type, int64_t values) {
    return type == FEW_FP32 ? values : (values + 1) / 2;
}
INLINE int64_t filled_words(const int type, int64_t width) {
    return (words_of(type, width) + STEP - 1) / STEP * STEP;
}
INLINE int64_t groups_of(int64_t rank) { return (rank + LANES - 1) / LANES; }
INLINE int64_t lanes_of(int64_t rank, int64_t group) {
    return rank - group * LANES > HALF ? LANES : HALF;
}
INLINE int64_t filled_rank(int64_t rank) {
    return (groups_of(rank) - 1) * LANES + lanes_of(rank, groups_of(rank) - 1);
}
INLINE int64_t blocks_of(int64_t outs) { return (outs + UPDATE_BLOCK - 1) / UPDATE_BLOCK; }

enum { DOWN = 1, UP = 2 };

/* What memory should bring next: the As, the Bs or both of updates [u, last), from `at` on in one
 * of them. */
struct ahead {
    const struct update *u, *last;
    const char *at, *stop;
    int what, now, type;
};

INLINE void ahead_in(struct ahead *soon, int now, int64_t skipped) {
    const struct update *u = soon->u;
    const int64_t words = now == DOWN
                              ? filled_rank(u->rank) * filled_words(soon->type, u->width)
                              : blocks_of(u->outs) * UPDATE_BLOCK * words_of(soon->type, u->rank);
    soon->now = now, soon->at = (const char *)(now == DOWN ? u->A : u->B) + 4 * skipped,
    soon->stop = soon->at + 4 * (words - skipped);
}

/* The next `lines` lines, into the second cache. */
INLINE void bring(struct ahead *soon, int64_t lines) {
    while (lines > 0 && soon->u < soon->last) {
        const int64_t left = (soon->stop - soon->at + 63) / 64, some = left < lines ? left : lines;
        for (int64_t i = 0; i < some; i++) __builtin_prefetch(soon->at + 64 * i, 0, 2);
        soon->at += 64 * some, lines -= some;
        if (some < left) return;
        if (soon->now == DOWN && soon->what & UP) ahead_in(soon, UP, 0);
        else if (++soon->u < soon->last) ahead_in(soon, soon->what & DOWN ? DOWN : UP, 0);
    }
}

/* Of `count` updates: x A^T of all rows; y += of blocks [start, stop) of outs. Several are alike in
 * their sizes. */
typedef void (*update_downs)(const struct update *u, int64_t count, struct ahead *soon);
typedef void (*update_ups)(const struct update *u, int64_t count, int64_t start, int64_t stop,
                           struct ahead *soon);

/* On tiles, bf16. Those of one row each go TOGETHER at most, and ask for what they read themselves.
 */
void veneer_tiled_downs(const struct update *u, int64_t count, struct ahead *soon);
void veneer_tiled_ups(const struct update *u, int64_t count, int64_t start, int64_t stop,
                      struct ahead *soon);

#endif
