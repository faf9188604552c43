/* The updates of updates.c on AMX tiles, bf16. A tile of a factor is a step of its words, read as
   they lie, 16 ranks or outs wide; one of x or of x A^T 16 rows. Two sums take the steps along the
   width in turn and are added at the end, for one row as for any number: the same bits. Tiles that
   would go behind a row of x are copied.

   A single row is multiplied by vectors, which memory is quicker for: the first values of a step's
   words are summed, the second ones, and both added to what was there, as a tile does it, with what
   is smaller than a float's exponents reaches taken for zero. */
#include "amx.h"
#include "factors.h"

#if defined(VENEER_AMX_COMPILED)

enum { TILE = 256, NEXT = 1024 };

/* Tiles 0 and 1: sums of the first rows, of even and of odd steps; 2 and 3: of those behind; 4, 5:
 * these rows of x; 6: A. */
VENEER_AMX_INLINE void shapes_of(int64_t one, int64_t two, int64_t lanes) {
    const uint8_t m = (uint8_t)one, n = (uint8_t)(two ? two : 1);
    const uint16_t wide = (uint16_t)(4 * lanes);
    const struct tiles shapes = {
        1, 0, {0}, {wide, wide, wide, wide, 64, 64, wide}, {m, m, n, n, m, n, STEP}};
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&shapes);
}

/* Values too small for a float's exponent are zeros, as they are to tiles. Returns what was set
 * before. */
VENEER_AMX_INLINE uint32_t small_to_zero(void) {
    const uint32_t before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    __asm__ volatile("" ::: "memory");
    return before;
}

VENEER_AMX_INLINE void set_back(uint32_t before) {
    __asm__ volatile("" ::: "memory");
    _mm_setcsr(before);
}

/* A row's sums, rounded, to its first `some` ranks. */
VENEER_AMX_INLINE void put_down(__m512 sums, int64_t some, char *to) {
    _mm256_mask_storeu_epi16(to, (__mmask16)((1u << some) - 1), (__m256i)_mm512_cvtneps_pbh(sums));
}

/* Up to 32 rows from `row` on. two: whether there are more than 16. */
VENEER_AMX_INLINE void down_group(const int two, const struct update *u, int64_t row, int64_t rows,
                                  int64_t group, const uint32_t *last, struct ahead *soon) {
    const int64_t lanes = lanes_of(u->rank, group), whole = u->width / 32, apart = 2 * u->apart,
                  across = 4 * lanes;
    const char *x = u->x + row * apart, *second = x + 16 * apart;
    const uint32_t *A = u->A + group * LANES * filled_words(FEW_BF16, u->width);
    float sums[4][TILE];
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
        _tile_zero(2);
        _tile_zero(3);
    }
#define ONE(sum, other, of_x, of_second, wide)                                                     \
    do {                                                                                           \
        _tile_loadd(6, A, across);                                                                 \
        _tile_loadd(4, of_x, wide);                                                                \
        _tile_dpbf16ps(sum, 4, 6);                                                                 \
        if (two) {                                                                                 \
            _tile_loadd(5, of_second, wide);                                                       \
            _tile_dpbf16ps(other, 5, 6);                                                           \
        }                                                                                          \
        A += STEP * lanes;                                                                         \
    } while (0)
    int64_t k = 0;
    for (; k + 2 <= whole; k += 2) {
        if (soon != NULL) bring(soon, 2 * lanes);
        ONE(0, 2, x + 64 * k, second + 64 * k, apart);
        ONE(1, 3, x + 64 * k + 64, second + 64 * k + 64, apart);
    }
    if (soon != NULL) bring(soon, (whole % 2 + (last != NULL)) * lanes);
    if (whole % 2) {
        ONE(0, 2, x + 64 * k, second + 64 * k, apart);
        if (last != NULL) ONE(1, 3, last, last + TILE, 64);
    } else if (last != NULL) ONE(0, 2, last, last + TILE, 64);
#undef ONE
    _tile_stored(0, sums[0], across);
    _tile_stored(1, sums[1], across);
    if (two) {
        _tile_stored(2, sums[2], across);
        _tile_stored(3, sums[3], across);
    }
    __asm__ volatile("" ::: "memory");
    const int64_t left = u->rank - group * LANES, some = left < lanes ? left : lanes;
    const __mmask16 mask = (__mmask16)((1u << some) - 1);
    char *to = u->down + 2 * (row * u->rank + group * LANES);
    for (int64_t r = 0; r < rows; r++, to += 2 * u->rank) {
        const int64_t at = r % 16 * lanes;
        const float *even = sums[r / 16 * 2] + at, *odd = sums[r / 16 * 2 + 1] + at;
        put_down(_mm512_add_ps(_mm512_maskz_loadu_ps(mask, even), _mm512_maskz_loadu_ps(mask, odd)),
                 some, to);
    }
}

/* The first and the second values of up to 16 words, as floats, which are read from memory one by
   one: broadcasts out of a register take the units that multiply. */
VENEER_AMX_INLINE void split(const char *words, int64_t values, float first[STEP],
                             float second[STEP]) {
    const __m512i both =
        _mm512_maskz_loadu_epi16(values < 32 ? ((uint32_t)1 << values) - 1 : 0xffffffffu, words);
    _mm512_storeu_ps(first, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
    _mm512_storeu_ps(
        second, _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000u))));
    __asm__ volatile("" : "+m"(*(float (*)[STEP])first), "+m"(*(float (*)[STEP])second));
}

/* `lines` lines of a factor, NEXT bytes on, into the second cache. */
VENEER_AMX_INLINE void bring_next(const uint32_t *factor, int64_t lines) {
    for (int64_t i = 0; i < lines; i++)
        __builtin_prefetch((const char *)factor + NEXT + 64 * i, 0, 2);
}

/* Sums with the first and with the second values of a word of each lane. */
#define ADD_WORDS(even, odd, words, first, second)                                                 \
    do {                                                                                           \
        const __m512i own = words;                                                                 \
        even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(own, 16)),                    \
                               _mm512_set1_ps(first), even);                                       \
        odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(own, high)),                    \
                              _mm512_set1_ps(second), odd);                                        \
    } while (0)

/* x A^T of up to TOGETHER updates of one row, a group of ranks of each, a step of each in turn. */
VENEER_AMX_INLINE void down_single(const int lanes, const struct update *u, int64_t count,
                                   int64_t group) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    __m512 sums[TOGETHER][2];
    for (int64_t i = 0; i < count; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t value = 0; value < u->width; value += 32) {
        for (int64_t i = 0; i < count; i++) {
            const uint32_t *A =
                u[i].A + group * LANES * filled_words(FEW_BF16, u->width) + value / 2 * lanes;
            float first[STEP], second[STEP];
            __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps(),
                   *sum = &sums[i][value / 32 % 2];
            bring_next(A, lanes);
            split(u[i].x + 2 * value, u->width - value, first, second);
            UNROLLED(16, k, STEP)
                ADD_WORDS(even, odd,
                          lanes == LANES ? _mm512_loadu_si512(A + k * lanes)
                                         : _mm512_maskz_loadu_epi32(0xff, A + k * lanes),
                          first[k], second[k]);
            *sum = _mm512_add_ps(*sum, _mm512_add_ps(even, odd));
        }
    }
    const int64_t left = u->rank - group * LANES;
    for (int64_t i = 0; i < count; i++)
        put_down(_mm512_add_ps(sums[i][0], sums[i][1]), left < lanes ? left : lanes,
                 u[i].down + 2 * group * LANES);
}

VENEER_AMX void veneer_tiled_downs(const struct update *u, int64_t count, struct ahead *soon) {
    const int64_t rest = u->width % 32;
    const uint32_t before = small_to_zero();
    int64_t shaped = 0;
    if (u->rows == 1) {
        for (int64_t group = 0; group < groups_of(u->rank); group++) {
            if (lanes_of(u->rank, group) == LANES) down_single(LANES, u, count, group);
            else down_single(HALF, u, count, group);
        }
        set_back(before);
        return;
    }
    for (int64_t row = 0; row < u->rows; row += 32, soon = NULL) {
        const int64_t rows = u->rows - row < 32 ? u->rows - row : 32, one = rows < 16 ? rows : 16;
        uint32_t behind[2 * TILE];
        if (rest) {
            const __mmask32 mask = ((uint32_t)1 << rest) - 1;
            for (int64_t r = 0; r < rows; r++)
                _mm512_storeu_si512(behind + 16 * r,
                                    _mm512_maskz_loadu_epi16(
                                        mask, u->x + 2 * ((row + r) * u->apart + u->width - rest)));
            __asm__ volatile("" ::: "memory");
        }
        for (int64_t group = 0; group < groups_of(u->rank); group++) {
            const int64_t lanes = lanes_of(u->rank, group), shape = rows * LANES + lanes;
            if (shape != shaped) shapes_of(one, rows - one, lanes), shaped = shape;
            if (rows > 16) down_group(1, u, row, rows, group, rest ? behind : NULL, soon);
            else down_group(0, u, row, rows, group, rest ? behind : NULL, soon);
        }
    }
    _tile_release();
    set_back(before);
}

/* scale * sums, added to the first `outs` values of y, at most 16. */
VENEER_AMX_INLINE void add_to(char *y, __m512 scale, __m512 sums, int64_t outs) {
    const __mmask16 mask = outs < 16 ? (__mmask16)((1u << outs) - 1) : 0xffff;
    const __m512 own = _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, y)), 16));
    _mm256_mask_storeu_epi16(y, mask,
                             (__m256i)_mm512_cvtneps_pbh(_mm512_fmadd_ps(sums, scale, own)));
}

/* A block of outs of one row. */
VENEER_AMX_INLINE void up_row(const struct update *u, int64_t block, int64_t outs) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    const __m512 scale = _mm512_set1_ps(u->scale);
    const uint32_t *B = u->B + block * (u->rank / 2) * UPDATE_BLOCK;
    char *y = u->y + 2 * block * UPDATE_BLOCK;
    bring_next(B, 4 * (u->rank / 2));
    __m512 sums[4];
    UNROLLED(4, v, 4) sums[v] = _mm512_setzero_ps();
    for (int64_t rank = 0; rank < u->rank; rank += 32) {
        const int64_t words = u->rank - rank < 32 ? (u->rank - rank) / 2 : STEP;
        float first[STEP], second[STEP];
        __m512 even[4], odd[4];
        split(u->down + 2 * rank, u->rank - rank, first, second);
        UNROLLED(4, v, 4) even[v] = odd[v] = _mm512_setzero_ps();
        for (int64_t k = 0; k < words; k++, B += UPDATE_BLOCK)
            UNROLLED(4, v, 4)
                ADD_WORDS(even[v], odd[v], _mm512_loadu_si512(B + 16 * v), first[k], second[k]);
        UNROLLED(4, v, 4) sums[v] = _mm512_add_ps(sums[v], _mm512_add_ps(even[v], odd[v]));
    }
    UNROLLED(4, v, 4)
        if (outs > 16 * v) add_to(y + 32 * v, scale, sums[v], outs - 16 * v);
}

VENEER_AMX void veneer_tiled_ups(const struct update *u, int64_t count, int64_t start, int64_t stop,
                                 struct ahead *soon) {
    const int64_t words = u->rank / 2, wide = 2 * u->outs;
    const __m512 scale = _mm512_set1_ps(u->scale);
    const uint32_t before = small_to_zero();
    float sums[16 * UPDATE_BLOCK];
    int64_t shaped = 0;
    for (int64_t block = start; block < stop; block++) {
        const uint32_t *B = u->B + block * words * UPDATE_BLOCK;
        const int64_t left = u->outs - block * UPDATE_BLOCK,
                      outs = left < UPDATE_BLOCK ? left : UPDATE_BLOCK;
        char *y = u->y + 2 * block * UPDATE_BLOCK;
        if (u->rows == 1) {
            for (int64_t i = 0; i < count; i++) up_row(u + i, block, outs);
            continue;
        }
        bring(soon, 4 * words);
        for (int64_t row = 0; row < u->rows; row += 16) {
            const int64_t rows = u->rows - row < 16 ? u->rows - row : 16;
            if (rows != shaped) amx_shapes(rows, words % 16), shaped = rows;
            amx_tiles(4, 0, (const uint32_t *)u->down + row * words, words, B, UPDATE_BLOCK, sums,
                      UPDATE_BLOCK, words, 0);
            __asm__ volatile("" ::: "memory");
            for (int64_t r = 0; r < rows; r++, y += wide)
                for (int64_t out = 0; out < outs; out += 16)
                    add_to(y + 2 * out, scale, _mm512_loadu_ps(sums + r * UPDATE_BLOCK + out),
                           outs - out);
        }
    }
    if (shaped) _tile_release();
    set_back(before);
}

#else

void veneer_tiled_downs(const struct update *u, int64_t count, struct ahead *soon) {
    (void)u, (void)count, (void)soon;
}
void veneer_tiled_ups(const struct update *u, int64_t count, int64_t start, int64_t stop,
                      struct ahead *soon) {
    (void)u, (void)count, (void)start, (void)stop, (void)soon;
}

#endif
