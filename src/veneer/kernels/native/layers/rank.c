/* Products with a small rank, in bf16: see kernels/dense/rank.py. One side has R columns, a few
   dozen; a library's matrix product is made for squarer shapes. Every result is summed in float32,
   in an order that no thread count changes. R and the widths are multiples of 16; pairs are laid
   out as bf16.h says, from factors as they are trained. Dropout is part of them: x is seen through
   its mask, which is computed where it is laid out (kernels/dense/dropout.py). */
#include "parallel.h"
#include "rank.h"

#if defined(__x86_64__)

/* narrow: the side of R columns, its rows `apart` values from each other. factor: W (K, N), or,
   `across`, W^T (N, K); float32, or bf16 where `half`. */
struct rank {
    const uint16_t *x;
    const void *factor;
    uint16_t *narrow;
    float *grads[MOST_LAYERS]; /* a gradient's factors, of `ranks`, `count` of them */
    int64_t ranks[MOST_LAYERS], count, transposed, add;
    int64_t rows, width, rank, apart, across, half;
    float scale;
    struct mask mask;
    uint32_t *pairs; /* C's own */
};

static void pack(struct rank *a, int64_t K, int64_t N) {
    a->pairs = words(K / 2 * N);
    rank_pairs(a->factor, a->across, a->half, K, N, a->pairs, N);
}

/* narrow (rows, R) = scale * x (rows, width) W. Items are blocks of rows. */
static VENEER_BF16 void down_body(void *arguments, int64_t from, int64_t to) {
    const struct rank *a = arguments;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        rank_down(&a->mask, a->x + row * a->width, row, a->pairs, a->narrow + row * a->apart,
                  a->apart, n, a->width, a->rank, a->scale);
    }
}

/* x (rows, width) += scale * narrow (rows, R) W. */
static VENEER_BF16 void up_body(void *arguments, int64_t from, int64_t to) {
    const struct rank *a = arguments;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        for (int64_t c = 0; c < a->width; c += COLUMNS)
            rank_up(&a->mask, a->narrow + row * a->apart, a->apart, a->pairs,
                    (uint16_t *)a->x + row * a->width, row, n, a->width, c,
                    rank_columns(a->width, c), a->rank, a->scale);
    }
}

/* 32 columns of a row; what the mask drops is 0. */
VENEER_INLINE __m512i row_columns(const struct rank *a, int64_t row, int64_t column) {
    __mmask32 stay = ~(__mmask32)0;
    if (a->mask.keys)
        stay = (__mmask32)kept(&a->mask, row, column + 16) << 16 | kept(&a->mask, row, column);
    return _mm512_maskz_loadu_epi16(stay, a->x + row * a->width + column);
}

/* The last 16 of a row whose width is no multiple of 32, as words. */
VENEER_INLINE __m512i row_rest(const struct rank *a, int64_t row, int64_t column) {
    const __mmask16 stay = a->mask.keys ? kept(&a->mask, row, column) : 0xFFFF;
    return _mm512_maskz_cvtepu16_epi32(
        stay, _mm256_loadu_si256((const __m256i *)(a->x + row * a->width + column)));
}

/* `depth` pairs of rows, columns [c, c + wide) -> to (depth, COLUMNS); with zeros behind an odd
   number of rows. Within 32 columns the pairs stand as unpacking leaves them: the first four of
   each eight, then the others. What the next block of columns reads is asked for. */
static VENEER_BF16 void pack_rows(const struct rank *a, int64_t row, int64_t depth, int64_t c,
                                  int64_t wide, uint32_t *to) {
    const int64_t ahead = c + wide < a->width ? COLUMNS : 0;
    for (int64_t k = 0; k < depth; k++, row += 2, to += COLUMNS) {
        const int64_t both = row + 1 < a->rows;
        int64_t i = 0;
        for (; i + 32 <= wide; i += 32) {
            const uint16_t *next = a->x + row * a->width + c + i + ahead;
            const __m512i first = row_columns(a, row, c + i),
                          second = both ? row_columns(a, row + 1, c + i) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + i, _mm512_unpacklo_epi16(first, second));
            _mm512_storeu_si512(to + i + 16, _mm512_unpackhi_epi16(first, second));
            _mm_prefetch(next, _MM_HINT_T1);
            _mm_prefetch(next + a->width, _MM_HINT_T1);
        }
        if (i < wide) {
            const __m512i first = row_rest(a, row, c + i),
                          second = both ? row_rest(a, row + 1, c + i) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + i, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
    }
}

/* sums (R, COLUMNS) of columns [c, c + wide), in their own order again and times scale. */
static VENEER_BF16 void in_order(float *sums, int64_t rank, int64_t wide, float scale) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 by = _mm512_set1_ps(scale);
    for (int64_t r = 0; r < rank; r++, sums += COLUMNS) {
        int64_t i = 0;
        for (; i + 32 <= wide; i += 32) {
            const __m512 first = _mm512_loadu_ps(sums + i), second = _mm512_loadu_ps(sums + i + 16);
            _mm512_storeu_ps(sums + i,
                             _mm512_mul_ps(_mm512_permutex2var_ps(first, low, second), by));
            _mm512_storeu_ps(sums + i + 16,
                             _mm512_mul_ps(_mm512_permutex2var_ps(first, high, second), by));
        }
        if (i < wide) _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), by));
    }
}

VENEER_INLINE void put(float *to, __m512 x, int64_t add) {
    _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), x) : x);
}

/* sums (rank, COLUMNS) to columns [c, c + wide) of grad (rank, width), or to these rows of it
 * transposed, (width, rank). */
static VENEER_BF16 void finish(const struct rank *a, const float *sums, int64_t rank, float *grad,
                               int64_t c, int64_t wide) {
    _Alignas(64) uint32_t turned[16 * 16];
    for (int64_t r = 0; r < rank; r += 16)
        for (int64_t i = 0; i < wide; i += 16) {
            const float *from = sums + r * COLUMNS + i;
            if (a->transposed) words_across((const uint32_t *)from, COLUMNS, 16, turned);
            for (int64_t k = 0; k < 16; k++) {
                if (a->transposed)
                    put(grad + (c + i + k) * rank + r,
                        _mm512_load_ps((const float *)turned + 16 * k), a->add);
                else
                    put(grad + (r + k) * a->width + c + i, _mm512_loadu_ps(from + k * COLUMNS),
                        a->add);
            }
        }
}

/* grads [+]= scale * narrow^T x; pairs (R, rows / 2) of narrow^T. Items are blocks of columns. */
static VENEER_BF16 void gradient_body(void *arguments, int64_t from, int64_t to) {
    const struct rank *a = arguments;
    enum { DEPTH = 32 }; /* pairs of rows at a time: 8 KiB, which stay in the first cache */
    const int64_t all = (a->rows + 1) / 2;
    uint32_t packed[DEPTH * COLUMNS];
    float sums[MOST_RANK * COLUMNS];
    for (int64_t block = from; block < to; block++) {
        const int64_t c = block * COLUMNS, wide = rank_columns(a->width, c);
        for (int64_t pair = 0; pair < all; pair += DEPTH) {
            const int64_t depth = all - pair < DEPTH ? all - pair : DEPTH;
            pack_rows(a, 2 * pair, depth, c, wide, packed);
            bf16_product(a->pairs + pair, all, 1, packed, COLUMNS, sums, COLUMNS, a->rank, wide,
                         depth, pair > 0);
        }
        in_order(sums, a->rank, wide, a->scale);
        const float *own = sums;
        for (int64_t f = 0; f < a->count; own += COLUMNS * a->ranks[f++])
            finish(a, own, a->ranks[f], a->grads[f], c, wide);
    }
}

/* narrow -> pairs (R, rows / 2), the last of an odd number of rows with 0. */
static VENEER_BF16 void pack_narrow(struct rank *a) {
    const int64_t all = (a->rows + 1) / 2;
    static const uint16_t zeros[16];
    _Alignas(64) uint32_t turned[16 * 16];
    a->pairs = words(a->rank * all);
    for (int64_t pair = 0; pair < all; pair += 16) {
        const int64_t count = all - pair < 16 ? all - pair : 16;
        for (int64_t r = 0; r < a->rank; r += 16) {
            __m512i rows[16];
            UNROLLED(16, i, 16) {
                const int64_t m = 2 * (pair + i);
                const uint16_t *own = a->narrow + m * a->apart + r;
                rows[i] =
                    bf16_words(m < a->rows ? own : zeros, m + 1 < a->rows ? own + a->apart : zeros);
            }
            words_turned(rows, turned);
            words_put(turned, 16, count, a->pairs + r * all + pair, all);
        }
    }
}

void veneer_rank_down(struct rank *a) {
    pack(a, a->width, a->rank);
    mask_begin(&a->mask, a->rows, a->width);
    veneer_parallel(down_body, a, rank_blocks(a->rows), 1);
    free(a->pairs);
    free(a->mask.rows);
}

void veneer_rank_up(struct rank *a) {
    pack(a, a->rank, a->width);
    mask_begin(&a->mask, a->rows, a->width);
    veneer_parallel(up_body, a, rank_blocks(a->rows), 1);
    free(a->pairs);
    free(a->mask.rows);
}

void veneer_rank_gradient(struct rank *a) {
    pack_narrow(a);
    mask_begin(&a->mask, a->rows, a->width);
    veneer_parallel_dealt(gradient_body, a, (a->width + COLUMNS - 1) / COLUMNS, 1, 4);
    free(a->pairs);
    free(a->mask.rows);
}

#endif
