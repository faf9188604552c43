/* Dense weights to 4 bits: the largest magnitude of each block, then for each element the number of
 * thresholds below it. */
#include "nf4.h"
#include "parallel.h"

struct call {
    const void *x;
    int type, level;
    int64_t count, block;
    const float *thresholds; /* 15 ascending, then +inf */
    const int32_t *codes;    /* number of thresholds below -> code */
    uint8_t *packed;
    float *absmax;
};

/* 1e-38 is below the smallest normal number: a block that small reads back as zero. */
#define SMALLEST 1e-38f

INLINE int code_of(const struct call *c, float scaled) {
    int below = 0;
    for (int i = 0; i < 15; i++) below += scaled > c->thresholds[i];
    return c->codes[below];
}

/* The bits of |x| order as integers do, with infinity and NaN at the top: one maximum finds both.
 */
static float largest_plain(const struct call *c, int64_t start, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = start; i < start + count; i++) {
        uint32_t bits = bits_of_float(load_as(c->x, i, c->type)) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return float_of_bits(most);
}

/* A whole block multiplies with the reciprocal, a short last one divides and stores no less than
 * SMALLEST. */
static void block_plain(const struct call *c, int64_t number) {
    int64_t start = number * c->block, left = c->count - start,
            count = left < c->block ? left : c->block;
    float absmax = largest_plain(c, start, count), scale = absmax > SMALLEST ? absmax : SMALLEST;
    int whole = count == c->block;
    float reciprocal = 1.0f / scale;
    c->absmax[number] = whole ? absmax : absmax > SMALLEST || absmax != absmax ? absmax : SMALLEST;
    for (int64_t i = 0; i < count; i += 2) {
        uint32_t nibbles[2]; /* of any codes: what they should not be still shifts */
        for (int part = 0; part < 2; part++) {
            float value = i + part < count ? load_as(c->x, start + i + part, c->type) : 0.0f;
            float scaled = whole ? value * reciprocal : value / scale;
            scaled = scaled > 1.0f ? 1.0f : scaled < -1.0f ? -1.0f : scaled;
            nibbles[part] = (uint32_t)code_of(c, scaled);
        }
        c->packed[(start + i) / 2] = (uint8_t)(nibbles[0] << 4 | nibbles[1]);
    }
}

#if X86

AVX512 INLINE __m512 load_16(const void *x, int64_t i, int type) {
    if (type == FP32) return _mm512_loadu_ps((const float *)x + i);
    __m256i words = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + i));
    if (type == FP16) return _mm512_cvtph_ps(words);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

AVX512 INLINE void blocks_512(const struct call *c, int64_t first, int64_t last, int type) {
    const __m512 thresholds = _mm512_loadu_ps(c->thresholds), one = _mm512_set1_ps(1),
                 minus = _mm512_set1_ps(-1);
    const __m512i codes = _mm512_loadu_si512(c->codes), magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t number = first; number < last; number++) {
        int64_t start = number * c->block, stop = start + c->block;
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = start; i < stop; i += 16)
            most = _mm512_max_epu32(
                most, _mm512_and_si512(_mm512_castps_si512(load_16(c->x, i, type)), magnitude));
        float absmax = float_of_bits(_mm512_reduce_max_epu32(most));
        c->absmax[number] = absmax;
        const __m512 reciprocal = _mm512_set1_ps(1.0f / (absmax > SMALLEST ? absmax : SMALLEST));
        for (int64_t i = start; i < stop; i += 16) {
            __m512 x = _mm512_mul_ps(load_16(c->x, i, type), reciprocal);
            x = _mm512_max_ps(_mm512_min_ps(x, one), minus);
            /* binary search in a register: thresholds[n + 7], [n + 3], [n + 1], [n] */
            __m512i n = _mm512_maskz_set1_epi32(
                _mm512_cmp_ps_mask(x, _mm512_set1_ps(c->thresholds[7]), _CMP_GT_OQ), 8);
            for (int step = 4; step; step >>= 1) {
                __m512 t = _mm512_permutexvar_ps(_mm512_add_epi32(n, _mm512_set1_epi32(step - 1)),
                                                 thresholds);
                n = _mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(x, t, _CMP_GT_OQ), n,
                                          _mm512_set1_epi32(step));
            }
            n = _mm512_permutexvar_epi32(n, codes);
            __m512i bytes = _mm512_or_si512(_mm512_slli_epi64(n, 4), _mm512_srli_epi64(n, 32));
            _mm_storel_epi64((__m128i *)(c->packed + i / 2), _mm512_cvtepi64_epi8(bytes));
        }
    }
}

AVX512 static void blocks_512_fp32(const struct call *c, int64_t a, int64_t b) {
    blocks_512(c, a, b, FP32);
}
AVX512 static void blocks_512_bf16(const struct call *c, int64_t a, int64_t b) {
    blocks_512(c, a, b, BF16);
}
AVX512 static void blocks_512_fp16(const struct call *c, int64_t a, int64_t b) {
    blocks_512(c, a, b, FP16);
}

AVX2 INLINE __m256 load_8(const void *x, int64_t i, int type) {
    if (type == FP32) return _mm256_loadu_ps((const float *)x + i);
    __m128i words = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
    if (type == FP16) return _mm256_cvtph_ps(words);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

AVX2 INLINE void blocks_256(const struct call *c, int64_t first, int64_t last, int type) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t number = first; number < last; number++) {
        int64_t start = number * c->block, stop = start + c->block;
        __m256i most = _mm256_setzero_si256();
        for (int64_t i = start; i < stop; i += 8)
            most = _mm256_max_epu32(
                most, _mm256_and_si256(_mm256_castps_si256(load_8(c->x, i, type)), magnitude));
        uint32_t lanes[8], largest = 0;
        _mm256_storeu_si256((__m256i *)lanes, most);
        for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
        float absmax = float_of_bits(largest);
        c->absmax[number] = absmax;
        const __m256 reciprocal = _mm256_set1_ps(1.0f / (absmax > SMALLEST ? absmax : SMALLEST));
        for (int64_t i = start; i < stop; i += 8) {
            __m256 x = _mm256_mul_ps(load_8(c->x, i, type), reciprocal);
            x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(1)), _mm256_set1_ps(-1));
            __m256i n = _mm256_setzero_si256();
            for (int t = 0; t < 15; t++) {
                __m256 above = _mm256_cmp_ps(x, _mm256_set1_ps(c->thresholds[t]), _CMP_GT_OQ);
                n = _mm256_sub_epi32(n, _mm256_castps_si256(above));
            }
            int32_t below[8];
            _mm256_storeu_si256((__m256i *)below, n);
            for (int j = 0; j < 8; j += 2)
                c->packed[(i + j) / 2] =
                    (uint8_t)((uint32_t)c->codes[below[j]] << 4 | (uint32_t)c->codes[below[j + 1]]);
        }
    }
}

AVX2 static void blocks_256_fp32(const struct call *c, int64_t a, int64_t b) {
    blocks_256(c, a, b, FP32);
}
AVX2 static void blocks_256_bf16(const struct call *c, int64_t a, int64_t b) {
    blocks_256(c, a, b, BF16);
}
AVX2 static void blocks_256_fp16(const struct call *c, int64_t a, int64_t b) {
    blocks_256(c, a, b, FP16);
}

static void (*const WHOLE_512[])(const struct call *, int64_t,
                                 int64_t) = {blocks_512_fp32, blocks_512_bf16, blocks_512_fp16};
static void (*const WHOLE_256[])(const struct call *, int64_t,
                                 int64_t) = {blocks_256_fp32, blocks_256_bf16, blocks_256_fp16};

#endif

static void some_blocks(void *data, int64_t first, int64_t last) {
    const struct call *c = data;
    int64_t whole = c->count / c->block;
#if X86
    int64_t until = last < whole ? last : whole;
    if (c->level >= 2 && until > first) {
        (c->level >= 3 ? WHOLE_512 : WHOLE_256)[c->type](c, first, until);
        first = until;
    }
#else
    (void)whole;
#endif
    for (int64_t number = first; number < last; number++) block_plain(c, number);
}

/* x: `count` elements. A block that is not finite leaves an absmax that is not. level: -1, or the
 * highest used. */
void veneer_nf4_quantize(const void *x, int type, int64_t count, int64_t block,
                         const float *thresholds, const int32_t *codes, uint8_t *packed,
                         float *absmax, int level) {
    struct call c = {x, type, nf4_level(level), count, block, thresholds, codes, packed, absmax};
    veneer_parallel(some_blocks, &c, (count + block - 1) / block, (1 << 14) / block + 1);
}
