/* What few_rows.c computes for others: products of a few rows, several at once. */
#ifndef VENEER_FEW_ROWS_H
#define VENEER_FEW_ROWS_H

#include "bits.h"
#include "levels.h"

/* Types of x, W, bias and y. FEW_WIDENED: W is bf16, the others are float32. A value of W becomes
   float32 when it is read. */
enum { FEW_FP32 = 0, FEW_BF16 = 1, FEW_WIDENED = 2 };

#define ALONE (1 << 15) /* values of W that are not worth a second thread, where rows are few */
#define TURNS 8         /* runs of a thread: memory is not equally quick for both */
#define FEW 64          /* rows up to which reading W takes the time */
#define LONG 2          /* runs of a thread then: memory brings a long one sooner than short ones */
#define UPDATE_BLOCK                                                                               \
    64 /* outs of an update's B that lie side by side; bindings/dense_calls.py has it too */

/* Rows [first, first + count) of a packed W to `out`, one behind the other, in the type of x. */
typedef void (*row_decoder)(const void *packed, int64_t first, int64_t count, void *out);

/* y (rows, outs) = x W^T + bias. W (outs, width), or what decode makes of w; bias (outs) or NULL;
   the rows of x lie `apart` values from one another. narrow: W is bf16 and the rest float32. */
struct piece {
    const void *x, *w, *bias;
    void *y;
    int64_t rows, width, outs, apart;
    row_decoder decode;
    int64_t narrow;
};

/* The pieces, which do not meet in y; all read rows of one x, of the same width and as far apart.
   `most` caps the instructions (5: tiles, 4: bf16 pairs, 3, 2, 0), for tests. behind: NULL, or what
   goes on from all of y. 1: no memory for rows of a packed W, or for x on tiles. */
int veneer_pieces(const struct piece *of, int64_t count, int type, int most, struct behind *behind);

/* The same on tiles: bf16, where veneer_few_level says 5. */
int veneer_tiled_pieces(const struct piece *of, int64_t count, struct behind *behind);

/* 5: tiles, and 4: products of bf16 pairs, of that type alone; 3 AVX-512, 2 AVX2, 0 plain C; `most`
 * at most. */
int veneer_few_level(int type, int most);

/* The types of x, bias and y, and of W. */
INLINE int type_of_values(const int type) { return type == FEW_WIDENED ? FEW_FP32 : type; }
INLINE int type_of_weight(const int type) { return type == FEW_WIDENED ? FEW_BF16 : type; }
INLINE int few_bytes(const int type) { return type == FEW_FP32 ? 4 : 2; }

typedef float f4v __attribute__((vector_size(16)));
typedef uint32_t u4v __attribute__((vector_size(16)));
typedef uint16_t h4v __attribute__((vector_size(8)));

INLINE f4v some_floats(const void *from, int64_t count, const int type) {
    f4v found = {};
    h4v halves = {};
    if (type == FEW_FP32) {
        memcpy(&found, from, (size_t)(4 * count));
        return found;
    }
    memcpy(&halves, from, (size_t)(2 * count));
    return (f4v)(__builtin_convertvector(halves, u4v) << 16);
}

/* Rounded as bf16_of_float. */
INLINE void put_floats(void *to, f4v floats, int64_t count, const int type) {
    if (type == FEW_FP32) {
        if (count == 4) memcpy(to, &floats, 16);
        else memcpy(to, &floats, (size_t)(4 * count));
        return;
    }
    u4v bits = (u4v)floats;
    h4v rounded = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, h4v);
    if (count == 4) memcpy(to, &rounded, 8);
    else memcpy(to, &rounded, (size_t)(2 * count));
}

#endif
