/* Factors of updates as updates.c reads them, out of the tensors that an adapter holds: one call for all its layers. */
#include "few_rows.h"

/* A (rank, width) and B (outs, rank) of type `from` to A (even, width) and B (ceil(outs / BLOCK), words, BLOCK words) of
   type `to`, one behind the other: even is the rank or one more, a word two bf16 neighbours along the rank or one float,
   and what is filled up is zeros. */
struct factors {
    const void *A, *B;
    void *to_A, *to_B;
    int64_t rank, width, outs;
    int from, to;
};

enum { CHUNK = 32 }; /* words of a row of B that are turned at a time */

INLINE float value_at(const int type, const void *from, int64_t i) {
    return type == FEW_FP32 ? ((const float *)from)[i] : float_of_bits((uint32_t)((const uint16_t *)from)[i] << 16);
}

/* Values [start, start + count). */
INLINE void copy(const int from, const int to, const void *values, int64_t start, int64_t count, void *out) {
    for (int64_t i = 0; i < count; i++) {
        if (to == FEW_FP32) ((float *)out)[i] = value_at(from, values, start + i);
        else ((uint16_t *)out)[i] = bf16_of_float(value_at(from, values, start + i));
    }
}

/* Rows of B, as many as `outs`, to a block. */
INLINE void turn(const int from, const int to, const struct factors *given, int64_t first, int64_t outs, uint32_t *block) {
    const int64_t pair = to == FEW_FP32 ? 1 : 2, words = (given->rank + pair - 1) / pair;
    _Alignas(64) char rows[UPDATE_BLOCK][4 * CHUNK] = {{0}};
    for (int64_t start = 0; start < words; start += CHUNK) {
        const int64_t some = words - start < CHUNK ? words - start : CHUNK, left = given->rank - start * pair;
        const int64_t values = left < some * pair ? left : some * pair;
        for (int64_t out = 0; out < outs; out++) {
            memset(rows[out] + 4 * (some - 1), 0, 4);
            copy(from, to, given->B, (first + out) * given->rank + start * pair, values, rows[out]);
        }
        for (int64_t word = 0; word < some; word++)
            for (int64_t out = 0; out < UPDATE_BLOCK; out++) memcpy(block + (start + word) * UPDATE_BLOCK + out, rows[out] + 4 * word, 4);
    }
}

INLINE void lay_out(const int from, const int to, const struct factors *given) {
    const int64_t rank = given->rank, even = rank + rank % 2, size = to == FEW_FP32 ? 4 : 2;
    copy(from, to, given->A, 0, rank * given->width, given->to_A);
    memset((char *)given->to_A + rank * given->width * size, 0, (size_t)((even - rank) * given->width * size));
    for (int64_t first = 0; first < given->outs; first += UPDATE_BLOCK) {
        char *block = (char *)given->to_B + first * even * size;
        const int64_t outs = given->outs - first < UPDATE_BLOCK ? given->outs - first : UPDATE_BLOCK;
        if (even > rank) memset(block + (even - 2) * UPDATE_BLOCK * size, 0, (size_t)(2 * UPDATE_BLOCK * size));
        turn(from, to, given, first, outs, (uint32_t *)block);
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

static void lay_out_plain(void *all, int64_t start, int64_t stop) { lay_out_some(all, start, stop); }

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"))) static void
lay_out_avx512(void *all, int64_t start, int64_t stop) {
    lay_out_some(all, start, stop);
}

__attribute__((target("avx2,fma"))) static void lay_out_avx2(void *all, int64_t start, int64_t stop) {
    lay_out_some(all, start, stop);
}
#endif

int veneer_level(void);

void veneer_lay_out_factors(const struct factors *of, int64_t count) {
    veneer_body body = lay_out_plain;
#if defined(__x86_64__)
    if (veneer_level() >= 3) body = lay_out_avx512;
    else if (veneer_level() >= 2) body = lay_out_avx2;
#endif
    veneer_parallel_dealt(body, (void *)of, count, 1, TURNS);
}
