/* Blocks of a .gguf file as whole numbers in bf16, and the scales beside them: what gguf_tiles.c
   and gguf_vectors.c multiply; how both read W's last rows, and write y. Of 16 rows of W,
   `row_bytes` apart; 128 bytes behind the last one's end may be read. Both say for which
   instructions it is compiled (GGUF). */
#include "gguf_format.h"

#define GGUF_INLINE static inline __attribute__((always_inline)) GGUF

enum {
    TILE = 1024,  /* bytes: 32 values of 16 rows of W, or of x; 16 by 16 sums */
    BEYOND = 128, /* bytes that may be read behind a row */
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* 16 rows of W from `out` on, where 16 and what is behind them may be read: as they lie, or the
 * last ones in `room`. */
static const uint8_t *readable(const struct gguf_weight *w, int64_t out, int64_t row_bytes,
                               uint8_t *room) {
    const int64_t left = (w->outs - out) * row_bytes, own = least(left, 16 * row_bytes);
    const uint8_t *rows = w->blocks + out * row_bytes;
    if (left >= 16 * row_bytes + BEYOND) return rows;
    memcpy(room, rows, (size_t)own);
    memset(room + own, 0, (size_t)(16 * row_bytes + BEYOND - own));
    return room;
}

/* y of 16 rows of W, or fewer, from `out` on, of a row of x. */
GGUF_INLINE void put(const struct gguf_weight *w, int64_t out, int64_t row, __m512 sums) {
    const __mmask16 mask = (__mmask16)((1u << least(16, w->outs - out)) - 1);
    if (w->bias != NULL) {
        const __m512i bias = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w->bias + out));
        sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(bias, 16)));
    }
    _mm256_mask_storeu_epi16(w->y + row * w->outs + out, mask, (__m256i)_mm512_cvtneps_pbh(sums));
}

/* The first 16 bytes hold the codes of a step: its second 16 values in their high halves. Else 32
 * bytes do. */
INLINE int in_mixed_order(const int kind) { return kind < Q8_0; }

/* Blocks of 256 values, eight scales and offsets of 6 bits in front. */
INLINE int has_six_bits(const int kind) { return kind == Q4_K || kind == Q5_K; }

/* Tiles of codes that a step has. */
INLINE int parts_of(const int kind) { return kind == Q8_0 ? 2 : 1; }

/* Steps that 32 values are: of Q6_K, with a scale for every 16, two, each with zeros in place of
 * the other's codes. */
INLINE int halves_of(const int kind) { return kind == Q6_K ? 2 : 1; }

INLINE int64_t row_bytes_of(int64_t kind, int64_t width) {
    const struct format format = format_of((int)kind);
    return width / format.size * format.bytes;
}

/* Bytes from a row's begin to the codes of a step, of Q6_K to their block. */
INLINE int64_t codes_at(const int kind, int64_t step) {
    switch (kind) {
    case Q4_0: return step * 18 + 2;
    case Q4_1: return step * 20 + 4;
    case Q5_0: return step * 22 + 6;
    case Q5_1: return step * 24 + 8;
    case Q8_0: return step * 34 + 2;
    case Q4_K: return step / 8 * 144 + 16 + step % 8 / 2 * 32;
    case Q5_K: return step / 8 * 176 + 48 + step % 8 / 2 * 32;
    default: return step / 16 * 210;
    }
}

/* Bytes to the header of a step: of the block that it is in. */
INLINE int64_t header_at(const int kind, int64_t step) {
    switch (kind) {
    case Q4_K: return step / 8 * 144;
    case Q5_K: return step / 8 * 176;
    case Q6_K: return step / 16 * 210;
    default: return step * row_bytes_of(kind, 32);
    }
}

/* Which value of 32 stands at each place of its codes: pairs come out of words of 32 bits. */
GGUF_INLINE __m512i order_of(const int kind) {
    uint16_t order[32];
    for (int i = 0; i < 32; i++) {
        const int second = i % 2, quarter = i / 8;
        order[i] = (uint16_t)(in_mixed_order(kind)
                                  ? 4 * (i % 8 / 2) + quarter / 2 + 2 * second + 16 * (quarter % 2)
                                  : 4 * (i % 16 / 2) + 2 * second + i / 16);
    }
    return _mm512_loadu_si512(order);
}

/* Which of the 16 pairs of 32 values a step has, in that order. */
INLINE uint16_t pairs_of(const int kind, int64_t step) {
    return halves_of(kind) == 1 ? 0xffff : step % 2 ? 0xf0f0 : 0x0f0f;
}

/* Bits of a code, and where it stands in a word of 16 bits: at the top of a bf16 number's mantissa.
 */
INLINE int bits_of(const int kind) {
    return kind == Q6_K ? 6 : kind == Q5_0 || kind == Q5_1 || kind == Q5_K ? 5 : 4;
}
INLINE int place_of(const int kind) { return 7 - bits_of(kind); }

/* How far words of 32 bits are turned to the right, so that bit `from` of two of their bytes comes
   to stand at `to`, and 16 on: of the first and the third byte in the first half of all, of the
   others in the second. */
GGUF_INLINE __m512i turns_of(int from, int to) {
    const __m512i bytes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8);
    return _mm512_add_epi32(bytes, _mm512_set1_epi32(from - to));
}

/* The same where a quarter of all stands for the low halves of bytes, the next for their high ones.
 */
GGUF_INLINE __m512i mixed_turns_of(int to) {
    return _mm512_add_epi32(_mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12),
                            _mm512_set1_epi32(-to));
}

/* (turned words & mask) ^ bits */
GGUF_INLINE __m512i taken(__m512i bytes, __m512i turns, __m512i mask, __m512i bits) {
    return _mm512_ternarylogic_epi32(_mm512_rorv_epi32(bytes, turns), mask, bits, 0x6a);
}

GGUF_INLINE __m512i four_times(const uint8_t *p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
}
GGUF_INLINE __m512i twice(const uint8_t *p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
}

/* The fifth bits of 32 codes, one behind the other in a word, at bit 6 of each code's own. */
GGUF_INLINE __m512i fifth_bits(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    const __m512i both = _mm512_set1_epi32((int)word), low = _mm512_set1_epi32(0x01000100),
                  high = _mm512_set1_epi32(0x03020302);
    const __m512i halves = _mm512_shuffle_epi8(both, _mm512_mask_blend_epi32(0xf0f0, low, high));
    const __m512i bits = _mm512_sllv_epi16(_mm512_set1_epi16(1),
                                           _mm512_and_si512(order_of(Q5_0), _mm512_set1_epi16(15)));
    return _mm512_maskz_mov_epi16(_mm512_test_epi16_mask(halves, bits), _mm512_set1_epi16(0x40));
}

/* The codes of a step of 16 rows of W, in the mantissas of bf16 numbers whose other bits are those
 * of 1. */
GGUF_INLINE void decode(const int kind, const uint8_t *rows, int64_t row_bytes, int64_t step,
                        uint8_t *out) {
    const int place = place_of(kind),
              own = (int)(step / halves_of(kind) % 8); /* which 32 of 256 values */
    const __m512i one = _mm512_set1_epi16(0x3f80), four = _mm512_set1_epi16((short)(15 << place));
    const uint8_t *p = rows + codes_at(kind, step);
    const int half = kind == Q6_K ? own % 4 / 2 : has_six_bits(kind) ? own % 2 : 0;
    const __m512i turns = in_mixed_order(kind) ? mixed_turns_of(place) : turns_of(4 * half, place);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++, p += row_bytes, out += 64) {
        if (in_mixed_order(kind)) {
            const __m512i codes = taken(four_times(p), turns, four, one);
            _mm512_store_si512(out, bits_of(kind) == 4 ? codes
                                                       : _mm512_or_si512(codes, fifth_bits(p - 4)));
        } else if (kind == Q8_0) { /* in two parts; the sign's bit turned over */
            const __m512i bytes = twice(p), sixteen = _mm512_set1_epi16(0x41c0);
            _mm512_store_si512(out, taken(bytes, turns, four, one));
            _mm512_store_si512(out + TILE, taken(bytes, turns_of(4, place), four, sixteen));
        } else if (kind == Q4_K) {
            _mm512_store_si512(out, taken(twice(p), turns, four, one));
        } else if (kind == Q5_K) {
            const __m512i high =
                taken(twice(p - 32 - own / 2 * 32), turns_of(own, 6), _mm512_set1_epi16(0x40), one);
            _mm512_store_si512(out, taken(twice(p), turns, four, high));
        } else {
            const uint8_t *low = p + own / 4 * 64 + own % 2 * 32, *above = p + 128 + own / 4 * 32;
            const __m512i high =
                taken(twice(above), turns_of(own % 4 * 2, 5), _mm512_set1_epi16(0x60), one);
            _mm512_store_si512(out, _mm512_maskz_mov_epi32(pairs_of(kind, step),
                                                           taken(twice(low), turns, four, high)));
        }
    }
}

/* The fp16 numbers in the low halves of 16 words, and in the high ones. */
GGUF_INLINE __m512 low_halves(__m512i words) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
}
GGUF_INLINE __m512 high_halves(__m512i words) { return low_halves(_mm512_srli_epi32(words, 16)); }

/* four[i]: 4 words each of row i and of every fourth behind it. words[i]: those of all 16 rows. */
GGUF_INLINE void turned_over(const __m512i four[4], __m512i words[4]) {
    const __m512i a = _mm512_unpacklo_epi32(four[0], four[1]),
                  b = _mm512_unpackhi_epi32(four[0], four[1]);
    const __m512i c = _mm512_unpacklo_epi32(four[2], four[3]),
                  d = _mm512_unpackhi_epi32(four[2], four[3]);
    words[0] = _mm512_unpacklo_epi64(a, c), words[1] = _mm512_unpackhi_epi64(a, c);
    words[2] = _mm512_unpacklo_epi64(b, d), words[3] = _mm512_unpackhi_epi64(b, d);
}

/* Row i. Addresses made out of few others: the compiler would keep those of all 16 rows. */
INLINE const uint8_t *row_at(const uint8_t *p, int64_t row_bytes, const int i) {
    const uint8_t *four = p + i / 4 * 4 * row_bytes;
    __asm__("" : "+r"(four));
    return four + i % 4 * row_bytes;
}

/* 4 words of a row, of 16 rows, across. Of small blocks, those that hold the headers of four. */
GGUF_INLINE void headers(const int kind, const uint8_t *p, int64_t row_bytes, __m512i words[4]) {
    /* where they stand in 64 bytes and, from 16 on, in those `later` */
    const __m512i at =
        kind == Q4_1   ? _mm512_setr_epi32(0, 5, 10, 15, 16, 21, 26, 31, 0, 0, 0, 0, 0, 0, 0, 0)
        : kind == Q4_0 ? _mm512_setr_epi32(0, 4, 9, 13, 16, 20, 25, 29, 0, 0, 0, 0, 0, 0, 0, 0)
        : kind == Q5_0 ? _mm512_setr_epi32(0, 5, 16, 21, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        : kind == Q5_1 ? _mm512_setr_epi32(0, 6, 16, 22, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
                       : _mm512_setr_epi32(0, 8, 16, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    const int64_t later = row_bytes_of(kind, 64);
    __m512i four[4];
#define AT(i) row_at(p, row_bytes, i)
#define TWO(i, j)                                                                                  \
    _mm512_castsi512_si256(                                                                        \
        _mm512_permutex2var_epi32(_mm512_loadu_si512(AT(i)), at, _mm512_loadu_si512(AT(j))))
#define ONE(i)                                                                                     \
    _mm512_castsi512_si128(_mm512_permutex2var_epi32(_mm512_loadu_si512(AT(i)), at,                \
                                                     _mm512_loadu_si512(AT(i) + later)))
    UNROLLED(4, i, 4) {
        if (bits_of(kind) == 4 &&
            in_mixed_order(kind)) { /* two rows' headers come out of one load each */
            four[i] =
                _mm512_inserti64x4(_mm512_castsi256_si512(TWO(i, i + 4)), TWO(i + 8, i + 12), 1);
            continue;
        }
        const int packed = has_six_bits(kind);
        four[i] = _mm512_castsi128_si512(packed ? _mm_loadu_si128((const __m128i *)AT(i)) : ONE(i));
        four[i] = _mm512_inserti32x4(
            four[i], packed ? _mm_loadu_si128((const __m128i *)AT(i + 4)) : ONE(i + 4), 1);
        four[i] = _mm512_inserti32x4(
            four[i], packed ? _mm_loadu_si128((const __m128i *)AT(i + 8)) : ONE(i + 8), 2);
        four[i] = _mm512_inserti32x4(
            four[i], packed ? _mm_loadu_si128((const __m128i *)AT(i + 12)) : ONE(i + 12), 3);
    }
#undef AT
#undef TWO
#undef ONE
    turned_over(four, words);
}

/* Four bits of each word from `at` on, and two of another's from `above` on. */
GGUF_INLINE __m512 six_bits(__m512i word, int at, __m512i other, int above) {
    const __m512i four =
        _mm512_and_si512(_mm512_srli_epi32(word, (unsigned)at), _mm512_set1_epi32(15));
    const __m512i two =
        _mm512_and_si512(_mm512_srli_epi32(other, (unsigned)above), _mm512_set1_epi32(3));
    return _mm512_cvtepi32_ps(_mm512_or_si512(four, _mm512_slli_epi32(two, 4)));
}

/* Of four steps of Q6_K. */
GGUF_INLINE void small_scales_of(const uint8_t *rows, int64_t row_bytes, int64_t step,
                                 __m512 scale[4], __m512 offset[4]) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)row_bytes));
    const uint8_t *p = rows + header_at(Q6_K, step);
    const __m512i four = _mm512_i32gather_epi32(at, p + 192 + step % 16, 1);
    const __m512 each =
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_i32gather_epi32(at, p + 208, 1)));
    UNROLLED(4, i, 4) {
        const __m512i own = _mm512_srai_epi32(_mm512_slli_epi32(four, (unsigned)(24 - 8 * i)), 24);
        const __m512 both = _mm512_mul_ps(each, _mm512_cvtepi32_ps(own));
        scale[i] = _mm512_mul_ps(both, _mm512_set1_ps(64));
        offset[i] = _mm512_mul_ps(both, _mm512_set1_ps(-96)); /* 32 are taken from each code */
    }
}

/* Of four steps of 16 rows of W, from a multiple of four on: what sums of products, and of x, are
   multiplied with. plain: codes of 8 bits are themselves. */
GGUF_INLINE void scales_of(const int kind, const int plain, const uint8_t *rows, int64_t row_bytes,
                           int64_t step, __m512 scale[4], __m512 offset[4]) {
    const __m512 most = _mm512_set1_ps((float)(1 << bits_of(kind))); /* a code that adds 1 */
    __m512i words[4];
    if (kind == Q6_K) {
        small_scales_of(rows, row_bytes, step, scale, offset);
        return;
    }
    headers(kind, rows + header_at(kind, step), row_bytes, words);
    UNROLLED(4, i, 4) {
        if (has_six_bits(kind)) {
            const int later = step % 8 >= 4, at = 8 * i;
            const __m512 s = later ? six_bits(words[3], at, words[1], at + 6)
                                   : six_bits(words[1], at, words[1], at + 4);
            const __m512 m = later ? six_bits(words[3], at + 4, words[2], at + 6)
                                   : six_bits(words[2], at, words[2], at + 4);
            scale[i] = _mm512_mul_ps(_mm512_mul_ps(low_halves(words[0]), s), most);
            offset[i] = _mm512_fnmsub_ps(high_halves(words[0]), m, scale[i]);
        } else if (kind == Q4_1 || kind == Q5_1) {
            scale[i] = _mm512_mul_ps(low_halves(words[i]), most);
            offset[i] = _mm512_sub_ps(high_halves(words[i]), scale[i]);
        } else { /* words hold the header of every second step in their high halves */
            const __m512 own = i % 2 ? high_halves(words[i]) : low_halves(words[i]);
            scale[i] = plain && kind == Q8_0 ? own : _mm512_mul_ps(own, most);
            offset[i] = _mm512_mul_ps(own, _mm512_set1_ps(plain && kind == Q8_0 ? 0
                                                          : kind == Q4_0        ? -24
                                                          : kind == Q5_0        ? -48
                                                                                : -400));
        }
    }
}
