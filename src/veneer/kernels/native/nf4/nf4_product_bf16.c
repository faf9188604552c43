/* The product with a few bf16 rows where the processor multiplies bf16 pairs and permutes bytes
   (AVX-512 BF16, VBMI).

   Instructions are what it costs: memory brings 64 bytes, 128 weights, in less time than they take
   to decode. Hence
   - a register holds the tables of two blocks, each 16 entries scaled and rounded once, and bit 4
   of an index says which;
   - the nibbles stay where they lie: x is put apart to meet them;
   - scales in 8 bits are decoded 64 at a time, one row of W ahead: one by one they cost a third of
   everything;
   - four rows of W at once share what is loaded of x, each from a run of its own, which the
   prefetcher follows. */
#include "nf4_product.h"
#include <stdlib.h>

#if X86

#define AHEAD 1024 /* bytes */
#define RUN 128    /* scales decoded at once, at least, so that short rows share a pass of 64 */

/* The 256 values of the outer scales' table by bytes: planes[j][i] is byte j of entry i. */
struct planes {
    uint8_t of[4][256];
};

static void split_table(const float *table, struct planes *out) {
    for (int i = 0; i < 256; i++)
        for (int j = 0; j < 4; j++) out->of[j][i] = (uint8_t)(bits_of_float(table[i]) >> (8 * j));
}

/* nf4_scale of blocks [block, block + count), bit for bit, into out, which has room for `count`
   rounded up to 64. nested_block >= 64. */
AVX512BF16 INLINE void nested_scales_512(const struct nf4_weights *w, const struct planes *planes,
                                         int64_t block, int64_t count, float *out) {
    /* unpacking works within 16 bytes: this order of the indices leaves the floats in a row */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512 offset = _mm512_set1_ps(w->offset);
    const int shift = __builtin_ctzll((uint64_t)w->nested_block);
    const uint8_t *scales = (const uint8_t *)w->scales + block;
    for (int64_t i = 0; i < count; i += 64) {
        int64_t left = count - i < 64 ? count - i : 64, at = block + i;
        __m512i index = _mm512_maskz_loadu_epi8(~(uint64_t)0 >> (64 - left), scales + i);
        index = _mm512_permutexvar_epi32(order, index);
        __mmask64 upper = _mm512_movepi8_mask(index);
        __m512i bytes[4], words[4];
        for (int j = 0; j < 4; j++) {
            const uint8_t *plane = planes->of[j];
            __m512i a = _mm512_permutex2var_epi8(_mm512_loadu_si512(plane), index,
                                                 _mm512_loadu_si512(plane + 64));
            __m512i b = _mm512_permutex2var_epi8(_mm512_loadu_si512(plane + 128), index,
                                                 _mm512_loadu_si512(plane + 192));
            bytes[j] = _mm512_mask_blend_epi8(upper, a, b);
        }
        for (int j = 0; j < 4; j += 2) {
            words[j] = _mm512_unpacklo_epi8(bytes[j], bytes[j + 1]);
            words[j + 1] = _mm512_unpackhi_epi8(bytes[j], bytes[j + 1]);
        }
        __m512i entries[4] = {
            _mm512_unpacklo_epi16(words[0], words[2]), _mm512_unpackhi_epi16(words[0], words[2]),
            _mm512_unpacklo_epi16(words[1], words[3]), _mm512_unpackhi_epi16(words[1], words[3])};
        /* 64 blocks lie under one outer scale or two */
        int64_t edge = ((at >> shift) + 1) << shift;
        const __m512 own = _mm512_set1_ps(w->nested_scales[at >> shift]);
        const __m512 next = _mm512_set1_ps(w->nested_scales[(at + left - 1) >> shift]);
        for (int j = 0; j < 4; j++) {
            int64_t before = edge - at - 16 * j;
            __mmask16 mask = before >= 16  ? 0xffff
                             : before <= 0 ? 0
                                           : (__mmask16)((1u << before) - 1);
            __m512 outer = _mm512_mask_blend_ps(mask, next, own);
            _mm512_storeu_ps(out + i + 16 * j,
                             _mm512_add_ps(_mm512_mul_ps((__m512)entries[j], outer), offset));
        }
    }
}

/* The scale of every 64 elements: of `count` such chunks from chunk `number` on. planes: NULL where
 * not nested. */
AVX512BF16 static void chunk_scales(const struct nf4_weights *w, const struct planes *planes,
                                    int64_t number, int64_t count, float *out) {
    const int shift = __builtin_ctzll((uint64_t)w->block / 64);
    if (planes != NULL && shift == 0 && w->nested_block >= 64)
        nested_scales_512(w, planes, number, count, out);
    else
        for (int64_t i = 0; i < count; i++) out[i] = nf4_scale(w, (number + i) >> shift);
}

AVX512BF16 INLINE __m512 scaled(__m512 table, float scale) {
    return _mm512_mul_ps(table, _mm512_set1_ps(scale));
}

/* Word j of `bytes` holds elements 4 j + 1, 4 j, 4 j + 3, 4 j + 2 from its lowest nibble up. */
AVX512BF16 INLINE void decode_128(__m512i bytes, __m512i tables, __m512i *out) {
    const __m512i low = _mm512_set1_epi16(15);
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    for (int k = 0; k < 4; k++) { /* (word & 15) | second */
        __m512i index = _mm512_ternarylogic_epi32(k ? _mm512_srli_epi16(bytes, 4 * k) : bytes, low,
                                                  second, 0xea);
        out[k] = _mm512_permutexvar_epi16(index, tables);
    }
}

/* `streams` rows of W, `apart` rows from one another, against `rows` rows of x. scales: a row's lie
 * `stride` from the one's before. */
AVX512BF16 INLINE void rows_at_once(const struct product *c, int64_t out, int64_t apart,
                                    const float *scales, int64_t stride, const int rows,
                                    const int streams) {
    const __m512 table = _mm512_loadu_ps(c->w->table);
    const int64_t chunks = c->width / 64, pairs = chunks / 2, padded = bf16_apart_width(c->width);
    const uint16_t *x = c->x;
    const uint8_t *packed = c->w->packed + (c->start + out * c->width) / 2;
    const int64_t next = apart * c->width / 2;
    __m512 sums[4][MOST][2];
    for (int r = 0; r < streams; r++)
        for (int m = 0; m < rows; m++) sums[r][m][0] = sums[r][m][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < pairs; i++) {
        UNROLLED(4, r, streams) {
            const uint8_t *from = packed + r * next + 64 * i;
            const float *own = scales + r * stride + 2 * i;
            __m512i tables =
                        (__m512i)_mm512_cvtne2ps_pbh(scaled(table, own[1]), scaled(table, own[0])),
                    w[4];
            _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
            decode_128(_mm512_loadu_si512(from), tables, w);
            UNROLLED(8, m, rows)
                for (int k = 0; k < 4; k++)
                    sums[r][m][k & 1] = _mm512_dpbf16_ps(
                        sums[r][m][k & 1], (__m512bh)w[k],
                        (__m512bh)_mm512_loadu_si512(x + m * padded + 128 * i + 32 * k));
        }
    }
    for (int r = 0; r < streams; r++) {
        if (chunks & 1) {
            const uint8_t *from = packed + r * next + 64 * pairs;
            __m512 last = scaled(table, scales[r * stride + 2 * pairs]);
            __m512i w[4];
            decode_128(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)from)),
                       (__m512i)_mm512_cvtne2ps_pbh(last, last), w);
            for (int m = 0; m < rows; m++)
                for (int k = 0; k < 4; k++)
                    sums[r][m][k & 1] = _mm512_dpbf16_ps(
                        sums[r][m][k & 1], (__m512bh)w[k],
                        (__m512bh)_mm512_loadu_si512(x + m * padded + 128 * pairs + 32 * k));
        }
        for (int m = 0; m < rows; m++)
            store_sum(c, m, out + r * apart,
                      _mm512_reduce_add_ps(_mm512_add_ps(sums[r][m][0], sums[r][m][1])));
    }
}

/* Rows [first, last), as `streams` runs side by side; what does not divide is left: the row it
 * begins with. */
AVX512BF16 INLINE int64_t runs(const struct product *c, const struct planes *planes, float *scales,
                               int64_t first, int64_t last, const int rows, const int streams) {
    const int64_t chunks = c->width / 64, apart = (last - first) / streams,
                  batch = chunks < RUN ? RUN / chunks : 1;
    const int64_t stride = (batch * chunks + 63) / 64 * 64;
    for (int64_t i = 0; i < apart; i += batch) {
        int64_t count = apart - i < batch ? apart - i : batch;
        for (int r = 0; r < streams; r++)
            chunk_scales(c->w, planes, c->start / 64 + (first + r * apart + i) * chunks,
                         count * chunks, scales + r * stride);
        for (int64_t j = 0; j < count; j++)
            rows_at_once(c, first + i + j, apart, scales + j * chunks, stride, rows, streams);
    }
    return first + apart * streams;
}

#define CASE(ROWS, STREAMS)                                                                        \
    case ROWS:                                                                                     \
        first = runs(c, planes, scales, first, last, ROWS, STREAMS);                               \
        if (STREAMS > 1) runs(c, planes, scales, first, last, ROWS, 1);                            \
        break;

AVX512BF16 void nf4_product_bf16(void *product, int64_t first, int64_t last) {
    struct product *c = product;
    struct planes held, *planes = NULL;
    const int64_t longest = (c->width / 64 > RUN ? c->width / 64 : RUN) + 64;
    float *scales = malloc((size_t)(4 * longest) * sizeof(float));
    if (scales == NULL) {
        c->failed = 1;
        return;
    }
    if (c->w->nested_table != NULL) split_table(c->w->nested_table, planes = &held);
    switch (c->rows) { /* a constant in each copy, so that sums stay in registers */
        CASE(1, 4) CASE(2, 2) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1) CASE(7, 1) CASE(8, 1)
    }
    free(scales);
}

/* Four registers of 32 words for 128 elements: of every four in a row the second, the first, the
 * fourth, the third. */
AVX512BF16 void nf4_bf16_apart(const uint16_t *x, int64_t rows, int64_t width, uint16_t *out) {
    static const int from[4] = {1, 0, 3, 2};
    for (int64_t m = 0; m < rows; m++, x += width)
        for (int64_t i = 0; i < width; i += 128, out += 128)
            for (int64_t j = 0; j < 32; j += 8) {
                __m512i eight =
                    i + 4 * j < width ? _mm512_loadu_si512(x + i + 4 * j) : _mm512_setzero_si512();
                for (int k = 0; k < 4; k++)
                    _mm_storeu_si128(
                        (__m128i *)(out + 32 * k + j),
                        _mm512_cvtepi64_epi16(_mm512_srli_epi64(eight, (unsigned)(16 * from[k]))));
            }
}

#endif
