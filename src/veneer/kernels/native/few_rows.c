/* y = x W^T + bias for a few rows of x and dense W, each read once: for decoding, where the time is that of reading W.
   Several W may share one x. few_rows_body.h holds the code, written once; it is compiled here for each set of
   instructions and chosen when called.

   A sum stays in one register from the first value to the last, in their order, and its lanes are added up in one fixed
   order: what a row gives depends neither on the rows beside it nor on the number of threads. */
#include "bits.h"
#include "parallel.h"
#include <stddef.h>

enum { FEW_FP32 = 0, FEW_BF16 = 1 };

/* y (rows, outs) = x W^T + bias; W (outs, width), bias (outs) or NULL. */
struct few_rows_part {
    const void *w, *bias;
    void *y;
    int64_t outs;
};

/* x (rows, width), its rows `apart` values from one another; all of one type. */
struct few_rows {
    const void *x;
    const struct few_rows_part *parts;
    int64_t count, rows, width, apart;
    int type;
};

typedef float f4v __attribute__((vector_size(16)));
typedef uint32_t u4v __attribute__((vector_size(16)));
typedef uint16_t h4v __attribute__((vector_size(8)));

INLINE int64_t few_rows_blocks(const struct few_rows_part *part) { return (part->outs + 3) / 4; }

/* The totals of one row of x, with their bias, to y: values [out, out + valid) of a row. */
INLINE void few_rows_store(const struct few_rows_part *part, const int type, int64_t row, int64_t out,
                           int64_t valid, f4v totals) {
    const int size = type == FEW_FP32 ? 4 : 2;
    char *y = (char *)part->y + (row * part->outs + out) * size;
    if (part->bias != NULL) {
        f4v bias = {};
        for (int64_t i = 0; i < valid; i++)
            bias[i] = type == FEW_FP32 ? ((const float *)part->bias)[out + i]
                                       : float_of_bits((uint32_t)((const uint16_t *)part->bias)[out + i] << 16);
        totals += bias;
    }
    if (type == FEW_FP32) {
        if (valid == 4) memcpy(y, &totals, 16);
        else memcpy(y, &totals, (size_t)(4 * valid));
        return;
    }
    u4v bits = (u4v)totals;
    h4v rounded = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, h4v); /* as bf16_of_float */
    if (valid == 4) memcpy(y, &rounded, 8);
    else memcpy(y, &rounded, (size_t)(2 * valid));
}

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#define AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")))
#define AVX2 __attribute__((target("avx2,fma")))

INLINE AVX512 f4v total_512(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    __m512 all = _mm512_add_ps((__m512)low, (__m512)high);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return (f4v)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

INLINE AVX2 f4v total_256(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return (f4v)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

INLINE AVX512 __m512 floats_512(const char *p, int type) {
    if (type == FEW_FP32) return _mm512_loadu_ps(p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

INLINE AVX512 __m512 some_512(const char *p, int64_t count, int type) {
    __mmask16 mask = (__mmask16)((1u << count) - 1);
    if (type == FEW_FP32) return _mm512_maskz_loadu_ps(mask, p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

INLINE AVX2 __m256 floats_256(const char *p, int type) {
    if (type == FEW_FP32) return _mm256_loadu_ps((const float *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

INLINE AVX2 __m256 some_256(const char *p, int64_t count, int type) {
    char own[32] = {0};
    memcpy(own, p, (size_t)(count * (type == FEW_FP32 ? 4 : 2)));
    return floats_256(own, type);
}

/* bf16 pairs, multiplied as they lie */
#define NAME(x) x##_pairs
#define TARGET AVX512BF16
#define VALUES 32
#define MOST 6
typedef __m512i value_pairs;
typedef __m512 sum_pairs;
#define LOAD(p, type) _mm512_loadu_si512(p)
#define LOAD_SOME(p, count, type) _mm512_maskz_loadu_epi16((__mmask32)(((uint32_t)1 << (count)) - 1), p)
#define MULTIPLY(sum, x, w) _mm512_dpbf16_ps(sum, (__m512bh)(x), (__m512bh)(w))
#define TOTAL total_512
#include "few_rows_body.h"
#undef NAME
#undef TARGET
#undef VALUES
#undef LOAD
#undef LOAD_SOME
#undef MULTIPLY

#define NAME(x) x##_avx512
#define TARGET AVX512
#define VALUES 16
typedef __m512 value_avx512, sum_avx512;
#define LOAD floats_512
#define LOAD_SOME some_512
#define MULTIPLY(sum, x, w) _mm512_fmadd_ps(x, w, sum)
#include "few_rows_body.h"
#undef NAME
#undef TARGET
#undef VALUES
#undef MOST
#undef LOAD
#undef LOAD_SOME
#undef MULTIPLY
#undef TOTAL

#define NAME(x) x##_avx2
#define TARGET AVX2
#define VALUES 8
#define MOST 2
typedef __m256 value_avx2, sum_avx2;
#define LOAD floats_256
#define LOAD_SOME some_256
#define MULTIPLY(sum, x, w) _mm256_fmadd_ps(x, w, sum)
#define TOTAL total_256
#include "few_rows_body.h"
#undef NAME
#undef TARGET
#undef VALUES
#undef MOST
#undef LOAD
#undef LOAD_SOME
#undef MULTIPLY
#undef TOTAL
#endif

INLINE f4v floats_128(const char *p, int type) {
    f4v found;
    h4v halves;
    if (type == FEW_FP32) {
        memcpy(&found, p, 16);
        return found;
    }
    memcpy(&halves, p, 8);
    return (f4v)(__builtin_convertvector(halves, u4v) << 16);
}

INLINE f4v some_128(const char *p, int64_t count, int type) {
    char own[16] = {0};
    memcpy(own, p, (size_t)(count * (type == FEW_FP32 ? 4 : 2)));
    return floats_128(own, type);
}

INLINE f4v total_128(f4v a, f4v b, f4v c, f4v d) {
    f4v sums[4] = {a, b, c, d}, all;
    for (int r = 0; r < 4; r++) all[r] = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
    return all;
}

#define NAME(x) x##_plain
#define TARGET
#define VALUES 4
#define MOST 2
typedef f4v value_plain, sum_plain;
#define LOAD floats_128
#define LOAD_SOME some_128
#define MULTIPLY(sum, x, w) ((sum) + (x) * (w))
#define TOTAL total_128
#include "few_rows_body.h"

int veneer_level(void);
int veneer_has_bf16(void);

/* `most` caps the instructions (4: bf16 pairs, 3, 2, 0), for tests. */
void veneer_few_rows(const struct few_rows *call, int most) {
    int level = veneer_level();
    if (level == 3 && veneer_has_bf16()) level = 4;
    if (most < level) level = most;
    if (level == 4 && call->type != FEW_BF16) level = 3;
    int64_t blocks = 0;
    for (int64_t i = 0; i < call->count; i++) blocks += few_rows_blocks(call->parts + i);
    veneer_body body = few_rows_plain;
#if defined(__x86_64__)
    if (level == 4) body = few_rows_pairs;
    else if (level == 3) body = few_rows_avx512;
    else if (level == 2) body = few_rows_avx2;
#endif
    veneer_parallel(body, (void *)call, blocks, (1 << 13) / call->width + 1);
}
