/* Products with a small rank, in bf16: see kernels/rank.py. One side has R columns, a few dozen; a library's matrix
   product is made for squarer shapes. Every result is summed in float32, in an order that no thread count changes.
   R and the widths are multiples of 16; `pairs` are laid out as bf16.h says. */
#include "parallel.h"
#include "rank.h"

#if defined(__x86_64__)

struct rank {
    const uint16_t *x;
    const uint32_t *pairs;
    uint16_t *out;
    float *grad;
    int64_t rows, width, rank;
    float scale;
};

/* out (rows, R) = scale * x (rows, width) W; pairs (width / 2, R). Items are blocks of rows. */
static VENEER_BF16 void down_body(void *arguments, int64_t from, int64_t to) {
    const struct rank *a = arguments;
    for (int64_t block = from; block < to; block++) {
        int64_t row = block * BLOCK;
        rank_down(a->x + row * a->width, a->pairs, a->out + row * a->rank, rank_rows(block, a->rows), a->width, a->rank, a->scale);
    }
}

/* out (rows, width) += scale * x (rows, R) W; pairs (R / 2, width). */
static VENEER_BF16 void up_body(void *arguments, int64_t from, int64_t to) {
    const struct rank *a = arguments;
    float sums[BLOCK * COLUMNS];
    for (int64_t block = from; block < to; block++) {
        int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        for (int64_t c = 0; c < a->width; c += COLUMNS) {
            int64_t wide = a->width - c < COLUMNS ? a->width - c : COLUMNS;
            bf16_product((const uint32_t *)(a->x + row * a->rank), a->rank / 2, 1, a->pairs + c, a->width, sums, COLUMNS, n, wide,
                         a->rank / 2, 0);
            for (int64_t r = 0; r < n; r++)
                for (int64_t i = 0; i < wide; i += 16) {
                    uint16_t *to_add = a->out + (row + r) * a->width + c + i;
                    __m512 sum = _mm512_loadu_ps(sums + r * COLUMNS + i);
                    bf16_store(to_add, _mm512_fmadd_ps(sum, _mm512_set1_ps(a->scale), bf16_floats(to_add)));
                }
        }
    }
}

/* grad (R, width) = scale * u^T x; pairs (R, rows / 2) of u^T, rows even. Items are blocks of columns. */
static VENEER_BF16 void gradient_body(void *arguments, int64_t from, int64_t to) {
    const struct rank *a = arguments;
    enum { DEPTH = 32 }; /* pairs of rows at a time: 8 KiB, which stay in the first cache */
    uint32_t packed[DEPTH * COLUMNS];
    for (int64_t block = from; block < to; block++) {
        int64_t c = block * COLUMNS, wide = a->width - c < COLUMNS ? a->width - c : COLUMNS;
        for (int64_t pair = 0; pair < a->rows / 2; pair += DEPTH) {
            int64_t depth = a->rows / 2 - pair < DEPTH ? a->rows / 2 - pair : DEPTH;
            for (int64_t k = 0; k < depth; k++) {
                const uint16_t *first = a->x + 2 * (pair + k) * a->width + c, *second = first + a->width;
                for (int64_t i = 0; i < wide; i += 16) {
                    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(first + i)));
                    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(second + i)));
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

void veneer_rank_down(struct rank *a) { veneer_parallel(down_body, a, rank_blocks(a->rows), 1); }
void veneer_rank_up(struct rank *a) { veneer_parallel(up_body, a, rank_blocks(a->rows), 1); }
void veneer_rank_gradient(struct rank *a) { veneer_parallel(gradient_body, a, (a->width + COLUMNS - 1) / COLUMNS, 1); }

#endif
