/* 4-bit weights to fp32, bf16 or fp16. A block's table is scaled and rounded once (16 roundings for
   64 elements), then every nibble is a lookup in a register: the same bits as rounding each
   product. */
#include "nf4.h"
#include "parallel.h"

static void decode_plain(const struct nf4_weights *w, int64_t start, int64_t count, void *out,
                         int type) {
    for (int64_t i = 0; i < count;) {
        int64_t at = start + i, block = at / w->block, stop = (block + 1) * w->block - start;
        float scale = nf4_scale(w, block);
        if (stop > count) stop = count;
        for (; i < stop; i++) {
            int64_t element = start + i;
            int nibble = element & 1 ? w->packed[element >> 1] & 15 : w->packed[element >> 1] >> 4;
            store_as(out, i, w->table[nibble] * scale, type);
        }
    }
}

#if X86

#define WORDS_OF(byte) byte, 128, byte, 128
#define WORDS_OF_4(byte) WORDS_OF(byte), WORDS_OF(byte + 1), WORDS_OF(byte + 2), WORDS_OF(byte + 3)
static const uint8_t TWO_WORDS[64] = {WORDS_OF_4(0), WORDS_OF_4(4), WORDS_OF_4(8), WORDS_OF_4(12)};
static const uint16_t UPPER_HALVES[32] = {
    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, /* and again */
    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

/* Of each byte two words, b >> 4 and b: the permute reads their lower five bits, and the table
 * stands in it twice. */
AVX512 INLINE void decode_32_words(__m512i table, const uint8_t *packed, uint16_t *out) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)packed));
    const __m512i words = _mm512_shuffle_epi8(bytes, _mm512_loadu_si512(TWO_WORDS));
    const __m512i index = _mm512_srlv_epi16(words, _mm512_set1_epi32(4));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}

AVX512 INLINE void decode_16_floats(__m512 table, const uint8_t *packed, float *out) {
    __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)packed));
    __m512i index = _mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32));
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(index, table));
}

AVX512 INLINE void blocks_512(const struct nf4_weights *w, int64_t first, int64_t last, void *out,
                              int type) {
    const __m512 table = _mm512_loadu_ps(w->table);
    const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    const __m512i upper = _mm512_loadu_si512(UPPER_HALVES);
    const int64_t size = w->block;
    for (int64_t block = first; block < last; block++) {
        __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(nf4_scale(w, block)));
        const uint8_t *packed = w->packed + block * size / 2;
        int64_t place = (block - first) * size;
        if (type == FP32) {
            for (int64_t i = 0; i < size; i += 16)
                decode_16_floats(scaled, packed + i / 2, (float *)out + place + i);
            continue;
        }
        __m512i twice;
        if (type == BF16) {
            __m512i bits = _mm512_castps_si512(scaled);
            __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
            bits = _mm512_add_epi32(_mm512_add_epi32(bits, half), odd);
            twice = _mm512_permutexvar_epi16(upper, bits);
        } else {
            const __m256i words =
                _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            twice = _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
        }
        for (int64_t i = 0; i < size; i += 32)
            decode_32_words(twice, packed + i / 2, (uint16_t *)out + place + i);
    }
}

AVX512 static void blocks_512_fp32(const struct nf4_weights *w, int64_t a, int64_t b, void *o) {
    blocks_512(w, a, b, o, FP32);
}
AVX512 static void blocks_512_bf16(const struct nf4_weights *w, int64_t a, int64_t b, void *o) {
    blocks_512(w, a, b, o, BF16);
}
AVX512 static void blocks_512_fp16(const struct nf4_weights *w, int64_t a, int64_t b, void *o) {
    blocks_512(w, a, b, o, FP16);
}

/* Indices in order: 16 bytes become 32 nibbles, two registers of 16. */
AVX2 INLINE void nibbles_32(const uint8_t *packed, __m128i *first, __m128i *second) {
    const __m128i low = _mm_set1_epi8(15);
    __m128i b = _mm_loadu_si128((const __m128i *)packed);
    __m128i even = _mm_and_si128(_mm_srli_epi16(b, 4), low), odd = _mm_and_si128(b, low);
    *first = _mm_unpacklo_epi8(even, odd);
    *second = _mm_unpackhi_epi8(even, odd);
}

AVX2 INLINE __m256 lookup_8(__m256 lower, __m256 upper, __m256i index) {
    __m256 a = _mm256_permutevar8x32_ps(lower, index), b = _mm256_permutevar8x32_ps(upper, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

AVX2 INLINE __m256i bf16_bits(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}

AVX2 INLINE void blocks_256(const struct nf4_weights *w, int64_t first, int64_t last, void *out,
                            int type) {
    const __m256 lower = _mm256_loadu_ps(w->table), upper = _mm256_loadu_ps(w->table + 8);
    const int64_t size = w->block;
    for (int64_t block = first; block < last; block++) {
        __m256 scale = _mm256_set1_ps(nf4_scale(w, block));
        __m256 a = _mm256_mul_ps(lower, scale), b = _mm256_mul_ps(upper, scale);
        const uint8_t *packed = w->packed + block * size / 2;
        int64_t place = (block - first) * size;
        __m128i words_a, words_b, one, two; /* 8 entries of 16 bits each */
        if (type == BF16) {
            __m256i both =
                _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_bits(a), bf16_bits(b)), 0xd8);
            words_a = _mm256_castsi256_si128(both), words_b = _mm256_extracti128_si256(both, 1);
        } else {
            words_a = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT),
            words_b = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
        }
        const __m128i low = _mm_set1_epi16(255);
        __m128i low_bytes =
            _mm_packus_epi16(_mm_and_si128(words_a, low), _mm_and_si128(words_b, low));
        __m128i high_bytes =
            _mm_packus_epi16(_mm_srli_epi16(words_a, 8), _mm_srli_epi16(words_b, 8));
        for (int64_t i = 0; i < size; i += 32) {
            nibbles_32(packed + i / 2, &one, &two);
            for (int part = 0; part < 2; part++) {
                __m128i index = part ? two : one;
                int64_t to = place + i + 16 * part;
                if (type == FP32) {
                    float *target = (float *)out + to;
                    _mm256_storeu_ps(target, lookup_8(a, b, _mm256_cvtepu8_epi32(index)));
                    _mm256_storeu_ps(
                        target + 8, lookup_8(a, b, _mm256_cvtepu8_epi32(_mm_srli_si128(index, 8))));
                } else {
                    uint16_t *target = (uint16_t *)out + to;
                    __m128i l = _mm_shuffle_epi8(low_bytes, index),
                            h = _mm_shuffle_epi8(high_bytes, index);
                    _mm_storeu_si128((__m128i *)target, _mm_unpacklo_epi8(l, h));
                    _mm_storeu_si128((__m128i *)(target + 8), _mm_unpackhi_epi8(l, h));
                }
            }
        }
    }
}

AVX2 static void blocks_256_fp32(const struct nf4_weights *w, int64_t a, int64_t b, void *o) {
    blocks_256(w, a, b, o, FP32);
}
AVX2 static void blocks_256_bf16(const struct nf4_weights *w, int64_t a, int64_t b, void *o) {
    blocks_256(w, a, b, o, BF16);
}
AVX2 static void blocks_256_fp16(const struct nf4_weights *w, int64_t a, int64_t b, void *o) {
    blocks_256(w, a, b, o, FP16);
}

static void (*const WHOLE_512[])(const struct nf4_weights *, int64_t, int64_t,
                                 void *) = {blocks_512_fp32, blocks_512_bf16, blocks_512_fp16};
static void (*const WHOLE_256[])(const struct nf4_weights *, int64_t, int64_t,
                                 void *) = {blocks_256_fp32, blocks_256_bf16, blocks_256_fp16};

#elif NEON

/* Four entries of a block's table in two bytes each. */
INLINE uint16x4_t halves_128(float32x4_t x, int type) {
    if (type == FP16) return vreinterpret_u16_f16(vcvt_f16_f32(x));
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
}

/* A table of 16 bytes is one register, so entries are looked up byte by byte: loads split them,
   stores put them together. */
INLINE void blocks_128(const struct nf4_weights *w, int64_t first, int64_t last, void *out,
                       const int type) {
    const int64_t size = w->block, bytes = type == FP32 ? 4 : 2;
    uint8_t *to = out;
    for (int64_t block = first; block < last; block++) {
        const uint8_t *packed = w->packed + block * size / 2;
        const float scale = nf4_scale(w, block);
        float floats[16];
        uint16_t halves[16];
        UNROLLED(4, i, 4) {
            const float32x4_t x = vmulq_n_f32(vld1q_f32(w->table + 4 * i), scale);
            if (type == FP32) vst1q_f32(floats + 4 * i, x);
            else vst1_u16(halves + 4 * i, halves_128(x, type));
        }
        const uint8x16x4_t of_4 = type == FP32 ? vld4q_u8((uint8_t *)floats) : (uint8x16x4_t){};
        const uint8x16x2_t of_2 = type == FP32 ? (uint8x16x2_t){} : vld2q_u8((uint8_t *)halves);
        for (int64_t i = 0; i < size; i += 32) {
            const uint8x16_t both = vld1q_u8(packed + i / 2), even = vshrq_n_u8(both, 4),
                             odd = vandq_u8(both, vdupq_n_u8(15));
            const uint8x16_t indices[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
            UNROLLED(2, part, 2) {
                uint8x16x4_t four;
                uint8x16x2_t two;
                UNROLLED(4, j, 4) four.val[j] = vqtbl1q_u8(of_4.val[j], indices[part]);
                UNROLLED(2, j, 2) two.val[j] = vqtbl1q_u8(of_2.val[j], indices[part]);
                if (type == FP32) vst4q_u8(to, four);
                else vst2q_u8(to, two);
                to += 16 * bytes;
            }
        }
    }
}

static void whole_128(const struct nf4_weights *w, int64_t first, int64_t last, void *out,
                      int type) {
    if (type == FP32) blocks_128(w, first, last, out, FP32);
    else if (type == BF16) blocks_128(w, first, last, out, BF16);
    else blocks_128(w, first, last, out, FP16);
}

#endif

void nf4_decode(const struct nf4_weights *w, int64_t start, int64_t count, void *out, int type,
                int level) {
#if X86 || NEON
    int64_t first = (start + w->block - 1) / w->block, last = (start + count) / w->block;
    if (level >= 2 && last > first) {
        int64_t before = first * w->block - start, whole = (last - first) * w->block;
        int64_t bytes = type == FP32 ? 4 : 2;
        decode_plain(w, start, before, out, type);
#if X86
        (level >= 3 ? WHOLE_512 : WHOLE_256)[type](w, first, last, (char *)out + before * bytes);
#else
        whole_128(w, first, last, (char *)out + before * bytes, type);
#endif
        decode_plain(w, last * w->block, count - before - whole,
                     (char *)out + (before + whole) * bytes, type);
        return;
    }
#endif
    (void)level;
    decode_plain(w, start, count, out, type);
}

struct call {
    const struct nf4_weights *w;
    int64_t start, count;
    char *out;
    int type, level;
};

/* Runs of whole blocks: [first, last) counts blocks from the one that holds `start`. */
static void some_blocks(void *data, int64_t first, int64_t last) {
    const struct call *c = data;
    int64_t size = c->w->block, origin = c->start / size;
    int64_t from = (origin + first) * size, to = (origin + last) * size;
    if (from < c->start) from = c->start;
    if (to > c->start + c->count) to = c->start + c->count;
    int64_t bytes = c->type == FP32 ? 4 : 2;
    nf4_decode(c->w, from, to - from, c->out + (from - c->start) * bytes, c->type, c->level);
}

/* Elements [start, start + count) into out. level: -1, or the highest that may be used. */
void veneer_nf4_dequantize(const struct nf4_weights *w, int64_t start, int64_t count, void *out,
                           int type, int level) {
    struct call c = {w, start, count, out, type, nf4_level(level)};
    if (count <= 0) return;
    int64_t blocks = (start + count - 1) / w->block - start / w->block + 1;
    veneer_parallel(some_blocks, &c, blocks, (1 << 16) / w->block + 1);
}
