/* Products with a small rank, in bf16: see kernels/rank.py. One side has R columns, a few dozen; a library's matrix
   product is made for squarer shapes. Every result is summed in float32, in an order that no thread count changes.
   R and the widths are multiples of 16; pairs are laid out as bf16.h says, from factors as they are trained.
   Dropout is part of them: x is seen through its mask, which is computed where it is laid out (kernels/dropout.py). */
#include "parallel.h"
#include "rank.h"

#if defined(__x86_64__)

/* narrow: the side of R columns, its rows `apart` values from each other. factor: W (K, N), or, `across`, W^T (N, K);
   float32, or bf16 where `half`. */
struct rank {
    const uint16_t *x;
    const void *factor;
    uint16_t *narrow;
    float *grad;
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
        rank_down(&a->mask, a->x + row * a->width, row, a->pairs, a->narrow + row * a->apart, a->apart, n, a->width, a->rank, a->scale);
    }
}

/* x (rows, width) += scale * narrow (rows, R) W. */
static VENEER_BF16 void up_body(void *arguments, int64_t from, int64_t to) {
    const struct rank *a = arguments;
    for (int64_t block = from; block < to; block++) {
        const int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        for (int64_t c = 0; c < a->width; c += COLUMNS)
            rank_up(&a->mask, a->narrow + row * a->apart, a->apart, a->pairs, (uint16_t *)a->x + row * a->width, row, n, a->width, c,
                    rank_columns(a->width, c), a->rank, a->scale);
    }
}

/* grad (R, width) = scale * narrow^T x; pairs (R, rows / 2) of narrow^T, rows even. Items are blocks of columns. */
static VENEER_BF16 void gradient_body(void *arguments, int64_t from, int64_t to) {
    const struct rank *a = arguments;
    enum { DEPTH = 32 }; /* pairs of rows at a time: 8 KiB, which stay in the first cache */
    uint32_t packed[DEPTH * COLUMNS];
    for (int64_t block = from; block < to; block++) {
        int64_t c = block * COLUMNS, wide = rank_columns(a->width, c);
        for (int64_t pair = 0; pair < a->rows / 2; pair += DEPTH) {
            int64_t depth = a->rows / 2 - pair < DEPTH ? a->rows / 2 - pair : DEPTH;
            for (int64_t k = 0; k < depth; k++) {
                const uint16_t *first = a->x + 2 * (pair + k) * a->width + c, *second = first + a->width;
                for (int64_t i = 0; i < wide; i += 16) {
                    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(first + i)));
                    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(second + i)));
                    if (a->mask.keys) {
                        low = _mm512_maskz_mov_epi32(kept(&a->mask, 2 * (pair + k), c + i), low);
                        high = _mm512_maskz_mov_epi32(kept(&a->mask, 2 * (pair + k) + 1, c + i), high);
                    }
                    _mm512_storeu_si512(packed + k * COLUMNS + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
                }
            }
            bf16_product(a->pairs + pair, a->rows / 2, 1, packed, COLUMNS, a->grad + c, a->width, a->rank, wide, depth, pair > 0);
        }
        if (a->scale != 1.0f)
            for (int64_t r = 0; r < a->rank; r++)
                for (int64_t i = 0; i < wide; i++) a->grad[r * a->width + c + i] *= a->scale;
    }
}

/* narrow -> pairs (R, rows / 2). */
static VENEER_BF16 void pack_narrow(struct rank *a) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)(a->rows / 2)));
    a->pairs = words(a->rank * (a->rows / 2));
    for (int64_t r = 0; r < a->rank; r += 16)
        for (int64_t m = 0; m < a->rows; m += 2) {
            const uint16_t *first = a->narrow + m * a->apart + r;
            _mm512_i32scatter_epi32(a->pairs + r * (a->rows / 2) + m / 2, places, bf16_words(first, first + a->apart), 4);
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
    veneer_parallel(gradient_body, a, (a->width + COLUMNS - 1) / COLUMNS, 1);
    free(a->pairs);
    free(a->mask.rows);
}

#endif
