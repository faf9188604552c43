/* Blocks of a .gguf file as whole numbers in bf16, and the scales beside them: what gguf_tiles.c multiplies. Of 16 rows
   of W, `row_bytes` apart; 128 bytes behind the last one's end may be read.
   Layout of the blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h */

#define GGUF __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")))
#define GGUF_INLINE static inline __attribute__((always_inline)) GGUF

enum { TILE = 1024 }; /* bytes: a step of 16 rows of W, or of x; 16 by 16 sums */

INLINE int in_mixed_order(const int kind) { return kind == Q4_0 || kind == Q4_1; }

/* Tiles of codes that a step has. */
INLINE int parts_of(const int kind) { return kind == Q8_0 ? 2 : 1; }

INLINE int64_t row_bytes_of(int64_t kind, int64_t width) {
    switch (kind) {
    case Q4_0: return width / 32 * 18;
    case Q4_1: return width / 32 * 20;
    case Q8_0: return width / 32 * 34;
    default: return width / 256 * 144;
    }
}

/* Bytes from a row's begin to the codes of a step. */
INLINE int64_t codes_at(const int kind, int64_t step) {
    switch (kind) {
    case Q4_0: return step * 18 + 2;
    case Q4_1: return step * 20 + 4;
    case Q8_0: return step * 34 + 2;
    default: return step / 8 * 144 + 16 + step % 8 / 2 * 32;
    }
}

/* Bytes to the header of a step: of the block that it is in. */
INLINE int64_t header_at(const int kind, int64_t step) {
    if (kind == Q4_K) return step / 8 * 144;
    return codes_at(kind, step) - (kind == Q4_1 ? 4 : 2);
}

/* Which value of a step stands at each place of its codes: pairs come out of words of 32 bits. */
GGUF_INLINE __m512i order_of(const int kind) {
    uint16_t order[32];
    for (int i = 0; i < 32; i++) {
        const int second = i % 2, quarter = i / 8;
        order[i] = (uint16_t)(in_mixed_order(kind) ? 4 * (i % 8 / 2) + quarter / 2 + 2 * second + 16 * (quarter % 2)
                                                    : 4 * (i % 16 / 2) + 2 * second + i / 16);
    }
    return _mm512_loadu_si512(order);
}

/* How far words of 32 bits are turned to the right, so that one code comes to stand at bit 3, another at bit 19. */
GGUF_INLINE __m512i turns_of(const int kind, const int high) {
    if (in_mixed_order(kind)) return _mm512_setr_epi32(29, 29, 29, 29, 1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9);
    if (high) return _mm512_setr_epi32(1, 1, 1, 1, 1, 1, 1, 1, 9, 9, 9, 9, 9, 9, 9, 9);
    return _mm512_setr_epi32(29, 29, 29, 29, 29, 29, 29, 29, 5, 5, 5, 5, 5, 5, 5, 5);
}

/* 32 codes in the mantissas of bf16 numbers whose other bits are those of `bits`. */
GGUF_INLINE __m512i codes_of(__m512i bytes, __m512i turns, __m512i bits) {
    return _mm512_ternarylogic_epi32(_mm512_rorv_epi32(bytes, turns), _mm512_set1_epi16(0x78), bits, 0x6a); /* (a & b) ^ c */
}

/* A step of 16 rows of W. */
GGUF_INLINE void decode(const int kind, const uint8_t *rows, int64_t row_bytes, int64_t step, uint8_t *out) {
    const __m512i low = turns_of(kind, kind == Q4_K && step % 2), high = turns_of(kind, 1);
    const __m512i one = _mm512_set1_epi16(0x3f80), sixteen = _mm512_set1_epi16(0x41c0); /* the sign's bit turned over */
    const uint8_t *p = rows + codes_at(kind, step);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++, p += row_bytes, out += 64) {
        const __m512i bytes = in_mixed_order(kind) ? _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p))
                                                   : _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
        _mm512_store_si512(out, codes_of(bytes, low, one));
        if (kind == Q8_0) _mm512_store_si512(out + TILE, codes_of(bytes, high, sixteen));
    }
}

/* The fp16 numbers in the low halves of 16 words, and in the high ones. */
GGUF_INLINE __m512 low_halves(__m512i words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }
GGUF_INLINE __m512 high_halves(__m512i words) { return low_halves(_mm512_srli_epi32(words, 16)); }

/* 4 words of a row, of 16 rows, across: words[i] of all rows. */
GGUF_INLINE void headers(const int kind, const uint8_t *p, int64_t row_bytes, __m512i words[4]) {
    /* where the headers of four steps stand in 64 bytes; of Q8_0 in two times 64 */
    const __m512i at = kind == Q4_1   ? _mm512_setr_epi32(0, 5, 10, 15, 16, 21, 26, 31, 0, 0, 0, 0, 0, 0, 0, 0)
                       : kind == Q4_0 ? _mm512_setr_epi32(0, 4, 9, 13, 16, 20, 25, 29, 0, 0, 0, 0, 0, 0, 0, 0)
                                      : _mm512_setr_epi32(0, 8, 16, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512i four[4];
#define AT(i) (p + (i) * row_bytes)
#define TWO(i, j) _mm512_castsi512_si256(_mm512_permutex2var_epi32(_mm512_loadu_si512(AT(i)), at, _mm512_loadu_si512(AT(j))))
#define ONE(i) _mm512_castsi512_si128(_mm512_permutex2var_epi32(_mm512_loadu_si512(AT(i)), at, _mm512_loadu_si512(AT(i) + 68)))
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        if (in_mixed_order(kind)) {
            four[i] = _mm512_inserti64x4(_mm512_castsi256_si512(TWO(i, i + 4)), TWO(i + 8, i + 12), 1);
            continue;
        }
        const int packed = kind == Q4_K;
        four[i] = _mm512_castsi128_si512(packed ? _mm_loadu_si128((const __m128i *)AT(i)) : ONE(i));
        four[i] = _mm512_inserti32x4(four[i], packed ? _mm_loadu_si128((const __m128i *)AT(i + 4)) : ONE(i + 4), 1);
        four[i] = _mm512_inserti32x4(four[i], packed ? _mm_loadu_si128((const __m128i *)AT(i + 8)) : ONE(i + 8), 2);
        four[i] = _mm512_inserti32x4(four[i], packed ? _mm_loadu_si128((const __m128i *)AT(i + 12)) : ONE(i + 12), 3);
    }
#undef AT
#undef TWO
#undef ONE
    const __m512i a = _mm512_unpacklo_epi32(four[0], four[1]), b = _mm512_unpackhi_epi32(four[0], four[1]);
    const __m512i c = _mm512_unpacklo_epi32(four[2], four[3]), d = _mm512_unpackhi_epi32(four[2], four[3]);
    words[0] = _mm512_unpacklo_epi64(a, c), words[1] = _mm512_unpackhi_epi64(a, c);
    words[2] = _mm512_unpacklo_epi64(b, d), words[3] = _mm512_unpackhi_epi64(b, d);
}

/* Four bits of each word from `at` on, and two of another's from `above` on. */
GGUF_INLINE __m512 six_bits(__m512i word, int at, __m512i other, int above) {
    const __m512i four = _mm512_and_si512(_mm512_srli_epi32(word, (unsigned)at), _mm512_set1_epi32(15));
    const __m512i two = _mm512_and_si512(_mm512_srli_epi32(other, (unsigned)above), _mm512_set1_epi32(3));
    return _mm512_cvtepi32_ps(_mm512_or_si512(four, _mm512_slli_epi32(two, 4)));
}

/* Of four steps of 16 rows of W, from a multiple of four on: what sums of products, and of x, are multiplied with. */
GGUF_INLINE void scales_of(const int kind, const uint8_t *rows, int64_t row_bytes, int64_t step, __m512 scale[4], __m512 offset[4]) {
    const __m512 sixteen = _mm512_set1_ps(16);
    __m512i words[4];
    headers(kind, rows + header_at(kind, step), row_bytes, words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        if (kind == Q4_K) {
            const int later = step % 8 >= 4, at = 8 * i;
            const __m512 s = later ? six_bits(words[3], at, words[1], at + 6) : six_bits(words[1], at, words[1], at + 4);
            const __m512 m = later ? six_bits(words[3], at + 4, words[2], at + 6) : six_bits(words[2], at, words[2], at + 4);
            scale[i] = _mm512_mul_ps(_mm512_mul_ps(low_halves(words[0]), s), sixteen);
            offset[i] = _mm512_fnmsub_ps(high_halves(words[0]), m, scale[i]);
        } else if (kind == Q4_1) {
            scale[i] = _mm512_mul_ps(low_halves(words[i]), sixteen);
            offset[i] = _mm512_sub_ps(high_halves(words[i]), scale[i]);
        } else { /* words hold the header of every second step in their high halves */
            const __m512 own = i % 2 ? high_halves(words[i]) : low_halves(words[i]);
            scale[i] = _mm512_mul_ps(own, sixteen);
            offset[i] = _mm512_mul_ps(own, _mm512_set1_ps(kind == Q4_0 ? -24 : -400));
        }
    }
}
