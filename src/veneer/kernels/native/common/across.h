/* 16 by 16 words turned over: rows become columns. Exact, whatever the words are. */
#ifndef VENEER_ACROSS_H
#define VENEER_ACROSS_H

#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include "unroll.h"

#define ACROSS_INLINE static inline __attribute__((always_inline, target("avx512f")))

/* to (16, 16) = words x (16, 16) across; x is spoiled. */
ACROSS_INLINE void words_turned(__m512i x[16], uint32_t *to) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    UNROLLED(4, i, 4) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xDD);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xDD);
    }
    UNROLLED(4, i, 4) {
        _mm512_storeu_si512(to + 16 * i, _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88));
        _mm512_storeu_si512(to + 16 * (i + 4), _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88));
        _mm512_storeu_si512(to + 16 * (i + 8), _mm512_shuffle_i32x4(y[i], y[i + 8], 0xDD));
        _mm512_storeu_si512(to + 16 * (i + 12), _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xDD));
    }
}

/* to (16, 16) = words (K2, 16) across, K2 <= 16; their rows are ld apart. */
ACROSS_INLINE void words_across(const uint32_t *from, int64_t ld, int64_t K2, uint32_t *to) {
    __m512i x[16];
    UNROLLED(16, i, 16) x[i] = i < K2 ? _mm512_loadu_si512(from + i * ld) : _mm512_setzero_si512();
    words_turned(x, to);
}

/* The first `count` words of `rows` rows of turned (16, 16), 64-byte aligned, to rows ld apart. */
ACROSS_INLINE void words_put(const uint32_t *turned, int64_t rows, int64_t count, uint32_t *to,
                             int64_t ld) {
    const __mmask16 real = (__mmask16)((1u << count) - 1);
    for (int64_t r = 0; r < rows; r++, to += ld) {
        const __m512i own = _mm512_load_si512(turned + 16 * r);
        if (count == 16) _mm512_storeu_si512(to, own);
        else _mm512_mask_storeu_epi32(to, real, own);
    }
}

#endif
#endif
