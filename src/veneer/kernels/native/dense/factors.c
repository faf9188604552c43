/* Factors of updates as factors.h says they lie, out of the tensors that an adapter holds: one call
 * for all its layers. */
#include "factors.h"

/* A (rank, width) and B (outs, rank) of type `from` to words of type `to`, one behind the other;
 * ranks become even. */
struct factors {
    const void *A, *B;
    void *to_A, *to_B;
    int64_t rank, width, outs;
    int from, to;
};

enum { CHUNK = 32 }; /* words of a row that are turned at a time */

INLINE float value_at(const int type, const void *from, int64_t i) {
    return type == FEW_FP32 ? ((const float *)from)[i]
                            : float_of_bits((uint32_t)((const uint16_t *)from)[i] << 16);
}

/* Values [start, start + count). */
INLINE void copy(const int from, const int to, const void *values, int64_t start, int64_t count,
                 void *out) {
    for (int64_t i = 0; i < count; i++) {
        if (to == FEW_FP32) ((float *)out)[i] = value_at(from, values, start + i);
        else ((uint16_t *)out)[i] = bf16_of_float(value_at(from, values, start + i));
    }
}

/* Rows [first, first + rows) of a factor (., length), to `words` words each, `side` rows side by
 * side. */
INLINE void turn(const int from, const int to, const void *factor, int64_t length, int64_t first,
                 int64_t rows, int64_t words, const int side, uint32_t *out) {
    const int64_t pair = to == FEW_FP32 ? 1 : 2;
    _Alignas(64) char some[UPDATE_BLOCK][4 * CHUNK] = {{0}};
    for (int64_t start = 0; start < words; start += CHUNK) {
        const int64_t wide = words - start < CHUNK ? words - start : CHUNK,
                      left = length - start * pair;
        const int64_t values = left < 0 ? 0 : left < wide * pair ? left : wide * pair;
        for (int64_t row = 0; row < rows; row++) {
            if (values < wide * pair) memset(some[row], 0, sizeof some[row]);
            copy(from, to, factor, (first + row) * length + start * pair, values, some[row]);
        }
        for (int64_t word = 0; word < wide; word++)
            for (int row = 0; row < side; row++)
                memcpy(out + (start + word) * side + row, some[row] + 4 * word, 4);
    }
}

INLINE void lay_out(const int from, const int to, const struct factors *given) {
    const int64_t rank = given->rank, even = rank + rank % 2,
                  words = filled_words(to, given->width);
    uint32_t *A = given->to_A, *B = given->to_B;
    for (int64_t group = 0; group < groups_of(even); group++, A += LANES * words) {
        const int64_t first = group * LANES, rows = rank - first < LANES ? rank - first : LANES;
        if (lanes_of(even, group) == LANES)
            turn(from, to, given->A, given->width, first, rows, words, LANES, A);
        else turn(from, to, given->A, given->width, first, rows, words, HALF, A);
    }
    for (int64_t first = 0; first < given->outs;
         first += UPDATE_BLOCK, B += UPDATE_BLOCK * words_of(to, even)) {
        const int64_t rows =
            given->outs - first < UPDATE_BLOCK ? given->outs - first : UPDATE_BLOCK;
        turn(from, to, given->B, rank, first, rows, words_of(to, even), UPDATE_BLOCK, B);
    }
}

INLINE void lay_out_some(const struct factors *all, int64_t start, int64_t stop) {
    for (const struct factors *given = all + start; given < all + stop; given++) {
        if (given->to == FEW_FP32 && given->from == FEW_FP32) lay_out(FEW_FP32, FEW_FP32, given);
        else if (given->to == FEW_FP32) lay_out(FEW_BF16, FEW_FP32, given);
        else if (given->from == FEW_FP32) lay_out(FEW_FP32, FEW_BF16, given);
        else lay_out(FEW_BF16, FEW_BF16, given);
    }
}

LOOPS(lay_out_factors, lay_out_some(a, from, to))

void veneer_lay_out_factors(const struct factors *of, int64_t count) {
    veneer_parallel_dealt(LOOP_OF(lay_out_factors, veneer_level()), (void *)of, count, 1, TURNS);
}
