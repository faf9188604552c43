/* The lanes of four registers added up, each by itself: in one order for all who compute what
 * others compute too. */
#ifndef VENEER_TOTALS_H
#define VENEER_TOTALS_H

#include "few_rows.h"
#include <immintrin.h>

/* Of each quarter of the lanes the sums of four registers. */
INLINE FOR_AVX512 __m512 quarters_512(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
            high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    return _mm512_add_ps((__m512)low, (__m512)high);
}

INLINE FOR_AVX512 f4v total_512(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 all = quarters_512(a, b, c, d);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return (f4v)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

INLINE FOR_AVX2 f4v total_256(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return (f4v)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

#endif
