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
    const int64_t *keys; /* dropout's, of the rows; NULL: x is seen whole */
    uint32_t row_key, column_key, threshold;
    uint32_t *pairs, *hashes; /* C's own: of the rows, then of the columns */
};

/* As dropout.c: lowbias32, Wellons 2018. */
static uint32_t mix(uint32_t value) {
    value = (value ^ (value >> 16)) * 0x7FEB352Du;
    value = (value ^ (value >> 15)) * 0x846CA68Bu;
    return value ^ (value >> 16);
}

static void hash(struct rank *a) {
    if (!a->keys) return;
    a->hashes = words(a->rows + a->width);
    for (int64_t r = 0; r < a->rows; r++) a->hashes[r] = mix((uint32_t)a->keys[r] + a->row_key);
    for (int64_t c = 0; c < a->width; c++) a->hashes[a->rows + c] = mix((uint32_t)c * 0x85EBCA6Bu + a->column_key);
}

/* Which of 16 columns of a row stay. */
VENEER_INLINE __mmask16 kept(const struct rank *a, int64_t row, int64_t column) {
    const __m512i columns = _mm512_loadu_si512(a->hashes + a->rows + column);
    __m512i value = _mm512_xor_si512(columns, _mm512_set1_epi32((int)a->hashes[row]));
    value = _mm512_mullo_epi32(_mm512_xor_si512(value, _mm512_srli_epi32(value, 16)), _mm512_set1_epi32(0x7FEB352D));
    value = _mm512_mullo_epi32(_mm512_xor_si512(value, _mm512_srli_epi32(value, 15)), _mm512_set1_epi32((int)0x846CA68Bu));
    return _mm512_cmpge_epu32_mask(_mm512_xor_si512(value, _mm512_srli_epi32(value, 16)), _mm512_set1_epi32((int)a->threshold));
}

/* Rows [row, row + n) of x with zeros where they are dropped. */
static VENEER_BF16 void drop(const struct rank *a, int64_t row, int64_t n, uint16_t *to) {
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c < a->width; c += 16) {
            const __m256i x = _mm256_loadu_si256((const __m256i *)(a->x + (row + r) * a->width + c));
            _mm256_storeu_si256((__m256i *)(to + r * a->width + c), _mm256_maskz_mov_epi16(kept(a, row + r, c), x));
        }
}

static void pack(struct rank *a, int64_t K, int64_t N) {
    a->pairs = words(K / 2 * N);
    rank_pairs(a->factor, a->across, a->half, K, N, a->pairs, N);
}

/* narrow (rows, R) = scale * x (rows, width) W. Items are blocks of rows. */
static VENEER_BF16 void down_body(void *arguments, int64_t from, int64_t to) {
    const struct rank *a = arguments;
    uint16_t *dropped = a->keys ? (uint16_t *)words(BLOCK * a->width / 2) : NULL;
    for (int64_t block = from; block < to; block++) {
        int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        const uint16_t *x = dropped ? dropped : a->x + row * a->width;
        if (dropped) drop(a, row, n, dropped);
        rank_down(x, a->pairs, a->narrow + row * a->apart, a->apart, n, a->width, a->rank, a->scale);
    }
    free(dropped);
}

/* x (rows, width) += scale * narrow (rows, R) W. */
static VENEER_BF16 void up_body(void *arguments, int64_t from, int64_t to) {
    const struct rank *a = arguments;
    float sums[BLOCK * COLUMNS];
    for (int64_t block = from; block < to; block++) {
        int64_t row = block * BLOCK, n = rank_rows(block, a->rows);
        for (int64_t c = 0; c < a->width; c += COLUMNS) {
            int64_t wide = a->width - c < COLUMNS ? a->width - c : COLUMNS;
            bf16_product((const uint32_t *)(a->narrow + row * a->apart), a->apart / 2, 1, a->pairs + c, a->width, sums, COLUMNS, n, wide,
                         a->rank / 2, 0);
            for (int64_t r = 0; r < n; r++)
                for (int64_t i = 0; i < wide; i += 16) {
                    uint16_t *to_add = (uint16_t *)a->x + (row + r) * a->width + c + i;
                    __m512 sum = _mm512_loadu_ps(sums + r * COLUMNS + i);
                    if (a->keys) sum = _mm512_maskz_mov_ps(kept(a, row + r, c + i), sum);
                    bf16_store(to_add, _mm512_fmadd_ps(sum, _mm512_set1_ps(a->scale), bf16_floats(to_add)));
                }
        }
    }
}

/* grad (R, width) = scale * narrow^T x; pairs (R, rows / 2) of narrow^T, rows even. Items are blocks of columns. */
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
                    if (a->keys) {
                        low = _mm512_maskz_mov_epi32(kept(a, 2 * (pair + k), c + i), low);
                        high = _mm512_maskz_mov_epi32(kept(a, 2 * (pair + k) + 1, c + i), high);
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
    hash(a);
    veneer_parallel(down_body, a, rank_blocks(a->rows), 1);
    free(a->pairs);
    free(a->hashes);
}

void veneer_rank_up(struct rank *a) {
    pack(a, a->rank, a->width);
    hash(a);
    veneer_parallel(up_body, a, rank_blocks(a->rows), 1);
    free(a->pairs);
    free(a->hashes);
}

void veneer_rank_gradient(struct rank *a) {
    pack_narrow(a);
    hash(a);
    veneer_parallel(gradient_body, a, (a->width + COLUMNS - 1) / COLUMNS, 1);
    free(a->pairs);
    free(a->hashes);
}

#endif
