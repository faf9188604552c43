/* GGUF blocks to numbers. gguf_unpack.h and gguf_rows.h hold the code, written once in the
   compiler's vector types; it is compiled here for each set of instructions and chosen when called.
   The products of a scale and a code are exact in float32 and every type is rounded at most once
   before it becomes the output type, so all of them give the same bits as the plain reference in
   kernels/packed/gguf.py. Layout of the blocks: ggml's ggml-common.h and quantize_row_*_ref,
   https://github.com/ggml-org/ggml */
#include "gguf_format.h"
#include "levels.h"

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct rows {
    int kind, type;
    const uint8_t *blocks;
    int64_t columns;
    void *out; /* (rows, columns) of `type` */
};

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define LEVEL 3
#define W 16
#define NAME(x) x##_avx512
#define TARGET FOR_SET(AVX512_SET ",f16c")
#include "gguf_unpack.h"
#include "gguf_rows.h"
#include "gguf_end.h"
#define LEVEL 2
#define W 8
#define NAME(x) x##_avx2
#define TARGET FOR_SET(AVX2_SET ",f16c")
#include "gguf_unpack.h"
#include "gguf_rows.h"
#include "gguf_end.h"
#endif
#define LEVEL 0
#define W 4
#define NAME(x) x##_plain
#define TARGET
#include "gguf_unpack.h"
#include "gguf_rows.h"
#include "gguf_end.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define BF16 FOR_SET(AVX512_SET ",avx512bf16,f16c")
#define BF16_INLINE static inline __attribute__((always_inline)) BF16
/* Blocks whose scales are read at once; bytes that memory should bring before. */
enum { TOGETHER = 16, AHEAD = 2048 };

/* The processor's own rounding to bf16 takes what is below float32's normal numbers for 0: no sum
   of an fp16 and a multiple of one is. Products of a scale and a code are exact, so it does not
   matter that they are not rounded. */
BF16_INLINE __m256i table_of(__m512 codes, const float *scale, const float *offset) {
    return (__m256i)_mm512_cvtneps_pbh(
        _mm512_fmadd_ps(codes, _mm512_set1_ps(*scale), _mm512_set1_ps(*offset)));
}

/* 16 bytes, the codes of 32 values: of the first 16 their low halves. The lookup reads 4 bits of a
 * word. */
BF16_INLINE void look_up(__m256i low, __m256i high, const uint8_t *p, uint16_t *first,
                         uint16_t *second) {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    _mm256_storeu_si256((__m256i *)first, _mm256_permutexvar_epi16(words, low));
    _mm256_storeu_si256((__m256i *)second,
                        _mm256_permutexvar_epi16(_mm256_srli_epi16(words, 4), high));
}

/* The fp16 numbers in the low halves of 16 words. */
BF16_INLINE __m512 halves(__m512i words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }

/* Scales and offsets of `count` blocks, 16 or fewer, `bytes` apart. */
BF16_INLINE void scales_of(const uint8_t *p, int64_t count, int bytes, int with_offset,
                           float *scale, float *offset) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 mask = (__mmask16)((1u << count) - 1);
    const __m512i at = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(bytes));
    const __m512i words = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, at, p, 1);
    _mm512_storeu_ps(scale, halves(words));
    _mm512_storeu_ps(offset,
                     with_offset ? halves(_mm512_srli_epi32(words, 16)) : _mm512_set1_ps(-0.0f));
}

/* Blocks of Q4_0, Q4_1 or Q8_0 to bf16. Codes of 4 bits are looked up among 16 values that are
 * rounded once. */
BF16_INLINE void plain_blocks(const int kind, const uint8_t *p, int64_t count, uint16_t *out) {
    const int bytes = format_of(kind).bytes, begin = kind == Q4_1 ? 4 : 2;
    const __m512 from_zero = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 codes = kind == Q4_0 ? _mm512_sub_ps(from_zero, _mm512_set1_ps(8)) : from_zero;
    float scale[TOGETHER], offset[TOGETHER];
    for (int64_t left = count; left > 0; left -= TOGETHER) {
        const int64_t some = left < TOGETHER ? left : TOGETHER;
        for (int line = 0; line < TOGETHER * bytes; line += 64)
            __builtin_prefetch(p + AHEAD + line);
        scales_of(p, some, bytes, kind == Q4_1, scale, offset);
        __asm__ volatile(
            ""
            : "+m"(scale),
              "+m"(offset)); /* read from there: lanes of a register cost a shuffle each */
        for (int64_t i = 0; i < some; i++, p += bytes, out += 32) {
            if (kind == Q8_0) {
                const __m512 one = _mm512_set1_ps(scale[i]);
                const __m512 a = _mm512_cvtepi32_ps(
                    _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 2))));
                const __m512 b = _mm512_cvtepi32_ps(
                    _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 18))));
                _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, one),
                                                                      _mm512_mul_ps(a, one)));
            } else {
                const __m256i table = table_of(codes, scale + i, offset + i);
                look_up(table, table, p + begin, out, out + 16);
            }
        }
    }
}

/* Blocks of Q4_K, 256 values with eight scales each. */
BF16_INLINE void super_blocks(const uint8_t *p, int64_t count, uint16_t *out) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t block = 0; block < count; block++, p += 144) {
        float scale[8], offset[8];
        scales_avx512(Q4_K, p, scale, offset);
#pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2, out += 64) {
            /* 32 bytes: the low halves are the first 32 values, the high ones those behind */
            const __m256i low = table_of(codes, scale + j, offset + j),
                          high = table_of(codes, scale + j + 1, offset + j + 1);
            for (int i = 0; i < 32; i += 16)
                look_up(low, high, p + 16 + 16 * j + i, out + i, out + 32 + i);
        }
    }
}

static BF16 void dequantise_bf16(void *arguments, int64_t start, int64_t stop) {
    const struct rows *call = arguments;
    const struct format format = format_of(call->kind);
    const int64_t per_row = call->columns / format.size, count = (stop - start) * per_row;
    const uint8_t *p = call->blocks + start * per_row * format.bytes;
    uint16_t *out = (uint16_t *)call->out + start * call->columns;
    switch (call->kind) {
    case Q4_0: plain_blocks(Q4_0, p, count, out); break;
    case Q4_1: plain_blocks(Q4_1, p, count, out); break;
    case Q8_0: plain_blocks(Q8_0, p, count, out); break;
    case Q4_K: super_blocks(p, count, out); break;
    }
}
#endif

int veneer_has_bf16(void);

/* The best of what both the caller and the processor allow. */
static veneer_body body_of(int kind, int type, int most) {
    const int own = veneer_level(), level = most < own ? most : own;
#if defined(__x86_64__) && defined(__GNUC__)
    const int known = kind == Q4_0 || kind == Q4_1 || kind == Q8_0 || kind == Q4_K;
    if (level >= 3 && type == BFLOAT16 && known && veneer_has_bf16()) return dequantise_bf16;
    return level >= 3 ? dequantise_avx512 : level >= 2 ? dequantise_avx2 : dequantise_plain;
#endif
    (void)kind, (void)type, (void)level;
    return dequantise_plain;
}

/* out (rows, columns) of `type`, contiguous. `most` caps the instructions (3, 2, 0), for tests. 0,
 * or -1: unknown kind. */
int veneer_gguf_dequantise(int kind, const uint8_t *blocks, int64_t rows, int64_t columns,
                           void *out, int type, int most) {
    if (format_of(kind).size == 0 || columns % format_of(kind).size) return -1;
    struct rows call = {kind, type, blocks, columns, out};
    veneer_parallel(body_of(kind, type, most), &call, rows, 1 + (1 << 16) / (columns + 1));
    return 0;
}

/* Rows [first, first + rows) into out; kind and columns as in a valid call of
 * veneer_gguf_dequantise. */
void gguf_decode(int kind, const uint8_t *blocks, int64_t first, int64_t rows, int64_t columns,
                 void *out, int type, int most) {
    const struct format format = format_of(kind);
    struct rows call = {kind, type, blocks + first * (columns / format.size * format.bytes),
                        columns, out};
    body_of(kind, type, most)(&call, 0, rows);
}
