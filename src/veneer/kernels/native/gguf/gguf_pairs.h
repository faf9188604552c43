/* Included by gguf_vectors.c, behind gguf_codes.h: pairs of codes of 16 rows of W, each pair in a
   register, as bf16 numbers. Bytes are turned over four at a time, as they lie: each four are two
   pairs, or four. */

/* Four words of 16 rows each: words[i] of all of them. */
GGUF_INLINE void across(const uint8_t *p, int64_t row_bytes, __m512i words[4]) {
    __m512i four[4];
#define AT(i) _mm_loadu_si128((const __m128i *)row_at(p, row_bytes, i))
    UNROLLED(4, i, 4) {
        four[i] = _mm512_inserti32x4(_mm512_castsi128_si512(AT(i)), AT(i + 4), 1);
        four[i] = _mm512_inserti32x4(_mm512_inserti32x4(four[i], AT(i + 8), 2), AT(i + 12), 3);
    }
#undef AT
    turned_over(four, words);
}

/* The bytes of 32 values of 16 rows, across: of their codes, and of what stands apart from these.
 */
struct bytes {
    __m512i codes[8], above[8];
};

/* (a & mask) | (b & ~mask) */
GGUF_INLINE __m512i chosen(__m512i a, __m512i b, int mask) {
    return _mm512_ternarylogic_epi32(a, _mm512_set1_epi32(mask), b, 0xe2);
}

/* own: which 32 of 256 values; p: where their block begins, of small ones the first of four. */
GGUF_INLINE void read_bytes(const int kind, const uint8_t *p, int64_t row_bytes, const int own,
                            struct bytes *to) {
    if (kind == Q6_K) {
        across(p + own / 4 * 64 + own % 2 * 32, row_bytes, to->codes);
        across(p + own / 4 * 64 + own % 2 * 32 + 16, row_bytes, to->codes + 4);
        across(p + 128 + own / 4 * 32, row_bytes, to->above);
        across(p + 128 + own / 4 * 32 + 16, row_bytes, to->above + 4);
        return;
    }
    const uint8_t *codes = p + codes_at(kind, own);
    across(codes, row_bytes, to->codes);
    if (!in_mixed_order(kind)) across(codes + 16, row_bytes, to->codes + 4);
    if (kind == Q5_K) {
        across(p + 16, row_bytes, to->above);
        across(p + 32, row_bytes, to->above + 4);
    }
    if (kind == Q5_0 || kind == Q5_1) { /* bits of values 2 apart, 16 apart: of the first 16 values,
                                           and of those behind */
        __m512i words[4];
        across(codes - 4, row_bytes, words);
        const __m512i bits = words[0];
        to->above[0] = chosen(bits, _mm512_slli_epi32(bits, 14), 0xffff);
        to->above[1] = chosen(_mm512_srli_epi32(bits, 16), _mm512_srli_epi32(bits, 2), 0xffff);
    }
}

/* Bit `from` moved to bit `to`. */
GGUF_INLINE __m512i moved(__m512i words, const int from, const int to) {
    return from > to ? _mm512_srli_epi32(words, (unsigned)(from - to))
                     : _mm512_slli_epi32(words, (unsigned)(to - from));
}

/* (words & mask) | bits */
GGUF_INLINE __m512i with_bits(__m512i words, int mask, __m512i bits) {
    return _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(mask), bits, 0xea);
}

/* A byte of each word, 8 bits with a sign, as a bf16 number in the upper half of 32. */
GGUF_INLINE __m512i number(__m512i words, const int byte) {
    return _mm512_castps_si512(_mm512_cvtepi32_ps(
        _mm512_srai_epi32(_mm512_slli_epi32(words, (unsigned)(24 - 8 * byte)), 24)));
}

/* Pair `pair` of codes of 16 rows, in the order of `order_of`. */
GGUF_INLINE __m512i codes_of(const int kind, const struct bytes *from, const int own,
                             const int pair) {
    const int place = place_of(kind), mask = 0x00010001 * (15 << place), byte = pair / 8;
    const __m512i one = _mm512_set1_epi32(0x3f803f80);
    if (kind == Q8_0) {
        const __m512i words = from->codes[pair % 8];
        return chosen(_mm512_srli_epi32(number(words, byte), 16), number(words, byte + 2), 0xffff);
    }
    if (in_mixed_order(kind)) {
        const __m512i code =
            with_bits(moved(from->codes[pair % 4], pair / 4 * 4, place), mask, one);
        const __m512i fifth = moved(from->above[pair / 4 % 2], pair % 4 * 4 + byte, 6);
        return bits_of(kind) == 4 ? code : with_bits(fifth, 0x00400040, code);
    }
    const int high = kind == Q6_K ? own % 4 / 2 : own % 2;
    const __m512i code =
        with_bits(moved(from->codes[pair % 8], 4 * high + 8 * byte, place), mask, one);
    if (kind == Q5_K)
        return with_bits(moved(from->above[pair % 8], own + 8 * byte, 6), 0x00400040, code);
    if (kind == Q6_K)
        return with_bits(moved(from->above[pair % 8], own % 4 * 2 + 8 * byte, 5), 0x00600060, code);
    return code;
}
