/* y = x W^T + bias for a few rows of x, W in 4 bits and read once, as it is stored: for decoding,
   where the time is that of reading W. The weights are those that nf4_dequantize gives in x's type;
   products and sums are in fp32.

   A dot product does not care for order, so the nibbles stay where they lie: x is put apart once,
   in groups of `lanes` even and `lanes` odd elements, and the high halves of `lanes` bytes meet the
   first, the low halves the second.

   On ARM some rows of W are decoded to where they stay in the cache, and multiplied by few_rows.c:
   in bf16 by BFDOT where the processor has it, else by NEON in fp32. */
#include "nf4_product.h"
#include "packed_rows.h"
#include "parallel.h"
#include <stdlib.h>

/* Any shape: W's row decoded, then multiplied. */
static void rows_plain(void *data, int64_t first, int64_t last) {
    struct product *c = data;
    const float *x = c->x;
    float *row = malloc((size_t)c->width * (sizeof(float) + 2));
    uint16_t *halves = (uint16_t *)(row + c->width);
    if (row == NULL) {
        c->failed = 1;
        return;
    }
    for (int64_t out = first; out < last; out++) {
        nf4_decode(c->w, c->start + out * c->width, c->width,
                   c->type == FP32 ? (void *)row : halves, c->type, c->level);
        if (c->type != FP32)
            for (int64_t i = 0; i < c->width; i++) row[i] = load_as(halves, i, c->type);
        for (int64_t m = 0; m < c->rows; m++) {
            float sums[16] = {0}, sum = 0;
            const float *own = x + m * c->width;
            int64_t i = 0;
            for (; i + 16 <= c->width; i += 16)
                for (int j = 0; j < 16; j++) sums[j] += row[i + j] * own[i + j];
            for (; i < c->width; i++) sum += row[i] * own[i];
            for (int j = 0; j < 16; j++) sum += sums[j];
            store_sum(c, m, out, sum);
        }
    }
    free(row);
}

#if X86

AVX512 INLINE __m512 rounded_512(__m512 t, int type) {
    if (type == FP32) return t;
    if (type == FP16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    __m512i bits = _mm512_castps_si512(t),
            odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}

/* lanes 16. */
AVX512 INLINE void rows_512(const struct product *c, int64_t first, int64_t last, const int rows) {
    const struct nf4_weights *w = c->w;
    const __m512 table = _mm512_loadu_ps(w->table);
    const int64_t chunks = c->width / 64, shift = __builtin_ctzll((uint64_t)w->block / 64);
    for (int64_t out = first; out < last; out++) {
        int64_t start = c->start + out * c->width, number = start / 64;
        const uint8_t *packed = w->packed + start / 2;
        const float *x = c->x;
        __m512 even[MOST], odd[MOST];
        for (int m = 0; m < rows; m++) even[m] = odd[m] = _mm512_setzero_ps();
        for (int64_t i = 0; i < chunks; i++) {
            float scale = nf4_scale(w, (number + i) >> shift);
            __m512 entries = rounded_512(_mm512_mul_ps(table, _mm512_set1_ps(scale)), c->type);
            for (int part = 0; part < 2; part++) {
                __m512i bytes = _mm512_cvtepu8_epi32(
                    _mm_loadu_si128((const __m128i *)(packed + 32 * i + 16 * part)));
                __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), entries);
                __m512 low = _mm512_permutexvar_ps(bytes, entries);
                for (int m = 0; m < rows; m++) {
                    const float *own = x + m * c->width + 64 * i + 32 * part;
                    even[m] = _mm512_fmadd_ps(high, _mm512_loadu_ps(own), even[m]);
                    odd[m] = _mm512_fmadd_ps(low, _mm512_loadu_ps(own + 16), odd[m]);
                }
            }
        }
        for (int m = 0; m < rows; m++)
            store_sum(c, m, out, _mm512_reduce_add_ps(_mm512_add_ps(even[m], odd[m])));
    }
}

AVX2 INLINE __m256 rounded_256(__m256 t, int type) {
    if (type == FP32) return t;
    if (type == FP16) return _mm256_cvtph_ps(_mm256_cvtps_ph(t, _MM_FROUND_TO_NEAREST_INT));
    __m256i bits = _mm256_castps_si256(t),
            odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0xffff0000)));
}

AVX2 INLINE __m256 lookup_8(__m256 lower, __m256 upper, __m256i index) {
    __m256 a = _mm256_permutevar8x32_ps(lower, index), b = _mm256_permutevar8x32_ps(upper, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

AVX2 INLINE float sum_8(__m256 v) {
    float lanes[8], sum = 0;
    _mm256_storeu_ps(lanes, v);
    for (int i = 0; i < 8; i++) sum += lanes[i];
    return sum;
}

/* lanes 8. */
AVX2 INLINE void rows_256(const struct product *c, int64_t first, int64_t last, const int rows) {
    const struct nf4_weights *w = c->w;
    const __m256 lower = _mm256_loadu_ps(w->table), upper = _mm256_loadu_ps(w->table + 8);
    const int64_t chunks = c->width / 64, shift = __builtin_ctzll((uint64_t)w->block / 64);
    for (int64_t out = first; out < last; out++) {
        int64_t start = c->start + out * c->width, number = start / 64;
        const uint8_t *packed = w->packed + start / 2;
        const float *x = c->x;
        __m256 even[MOST], odd[MOST];
        for (int m = 0; m < rows; m++) even[m] = odd[m] = _mm256_setzero_ps();
        for (int64_t i = 0; i < chunks; i++) {
            __m256 scale = _mm256_set1_ps(nf4_scale(w, (number + i) >> shift));
            __m256 a = rounded_256(_mm256_mul_ps(lower, scale), c->type),
                   b = rounded_256(_mm256_mul_ps(upper, scale), c->type);
            for (int part = 0; part < 4; part++) {
                __m256i bytes = _mm256_cvtepu8_epi32(
                    _mm_loadl_epi64((const __m128i *)(packed + 32 * i + 8 * part)));
                __m256 high = lookup_8(a, b, _mm256_srli_epi32(bytes, 4)),
                       low = lookup_8(a, b, bytes);
                for (int m = 0; m < rows; m++) {
                    const float *own = x + m * c->width + 64 * i + 16 * part;
                    even[m] = _mm256_fmadd_ps(high, _mm256_loadu_ps(own), even[m]);
                    odd[m] = _mm256_fmadd_ps(low, _mm256_loadu_ps(own + 8), odd[m]);
                }
            }
        }
        for (int m = 0; m < rows; m++) store_sum(c, m, out, sum_8(_mm256_add_ps(even[m], odd[m])));
    }
}

/* The number of rows is a constant in each copy, so that sums stay in registers. */
#define COPIES(TARGET, NAME)                                                                       \
    TARGET static void NAME##_any(const struct product *c, int64_t first, int64_t last) {          \
        switch (c->rows) {                                                                         \
        case 1: NAME(c, first, last, 1); break;                                                    \
        case 2: NAME(c, first, last, 2); break;                                                    \
        case 3: NAME(c, first, last, 3); break;                                                    \
        case 4: NAME(c, first, last, 4); break;                                                    \
        case 5: NAME(c, first, last, 5); break;                                                    \
        case 6: NAME(c, first, last, 6); break;                                                    \
        case 7: NAME(c, first, last, 7); break;                                                    \
        default: NAME(c, first, last, 8); break;                                                   \
        }                                                                                          \
    }
COPIES(AVX512, rows_512)
COPIES(AVX2, rows_256)

#endif

static void some_rows(void *data, int64_t first, int64_t last) {
    struct product *c = data;
#if X86
    if (c->level == 4) nf4_product_bf16(c, first, last);
    else if (c->level == 3) rows_512_any(c, first, last);
    else rows_256_any(c, first, last);
#else
    rows_plain(c, first, last);
#endif
}

/* x (rows, width), contiguous, of `type` -> y (rows, outs). bias (outs), or NULL. W: `outs` rows
   from element `start` on.
   rows <= 8. Returns 1 where there is no memory for x put apart or for a row of W. */
int veneer_nf4_product(const struct nf4_weights *w, int64_t start, int64_t outs, int64_t width,
                       const void *x, int64_t rows, const void *bias, void *y, int type,
                       int level) {
    struct product c = {w, start, outs, width, NULL, rows, bias, y, type, nf4_level(level), 0};
    if (NEON && c.level >= 2 && type != FP16) {
        const struct packed_rows of = {x, w, bias, y, rows, width, outs, start, -1, type};
        return veneer_packed_rows(&of, level < 0 ? 5 : level);
    }
    int aligned = width % 64 == 0 && w->block % 64 == 0 && start % 64 == 0;
    if (c.level == 4 && type != BF16) c.level = 3;
    int64_t lanes = c.level >= 3 ? 16 : 8;
    int plain = !X86 || !aligned || c.level < 2, all_bf16 = c.level == 4 && !plain;
    char *apart =
        malloc((size_t)(all_bf16 ? 2 * rows * bf16_apart_width(width) : 4 * rows * width));
    if (apart == NULL) return 1;
    if (plain) {
        for (int64_t i = 0; i < rows * width; i++) ((float *)apart)[i] = load_as(x, i, type);
#if X86
    } else if (all_bf16) {
        nf4_bf16_apart(x, rows, width, (uint16_t *)apart);
#endif
    } else {
        for (int64_t i = 0; i < rows * width; i += 2 * lanes)
            for (int64_t j = 0; j < lanes; j++) {
                ((float *)apart)[i + j] = load_as(x, i + 2 * j, type);
                ((float *)apart)[i + lanes + j] = load_as(x, i + 2 * j + 1, type);
            }
    }
    c.x = apart;
    veneer_parallel(plain ? rows_plain : some_rows, &c, outs, (1 << 14) / width + 1);
    free(apart);
    return c.failed;
}
