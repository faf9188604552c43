/* GGUF blocks to numbers. gguf_rows.h holds the code, written once in the compiler's vector
   types; it is compiled here for each set of instructions and chosen when called. The products of a scale and a code
   are exact in float32 and every type is rounded at most once before it becomes the output type, so all of them give
   the same bits as the plain reference in kernels/gguf.py.
   Layout of the blocks: ggml's ggml-common.h and quantize_row_*_ref, https://github.com/ggml-org/ggml */
#include "parallel.h"
#include <string.h>


enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 }; /* ggml's numbers */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct format {
    int size, bytes; /* values and bytes of a block */
};

static struct format format_of(int kind) {
    switch (kind) {
    case Q4_0: return (struct format){32, 18};
    case Q4_1: return (struct format){32, 20};
    case Q5_0: return (struct format){32, 22};
    case Q5_1: return (struct format){32, 24};
    case Q8_0: return (struct format){32, 34};
    case Q4_K: return (struct format){256, 144};
    case Q5_K: return (struct format){256, 176};
    case Q6_K: return (struct format){256, 210};
    default: return (struct format){0, 0};
    }
}

struct rows {
    int kind, type;
    const uint8_t *blocks;
    int64_t columns;
    void *out; /* (rows, columns) of `type` */
};

typedef int8_t b16v __attribute__((vector_size(16)));
typedef uint8_t c16v __attribute__((vector_size(16)));

static inline uint16_t load16(const uint8_t *p) {
    uint16_t value;
    memcpy(&value, p, 2);
    return value;
}

/* fp16 to fp32, exact: https://github.com/Maratyszcza/FP16 */
static inline float half(const uint8_t *p) {
    uint32_t w = (uint32_t)load16(p) << 16, sign = w & 0x80000000u, twice = w + w, bits;
    float normal, small, value;
    uint32_t shifted = (twice >> 4) + (0xE0u << 23), low = (twice >> 17) | (126u << 23);
    memcpy(&normal, &shifted, 4);
    memcpy(&small, &low, 4);
    value = twice < (1u << 27) ? small - 0.5f : normal * 0x1.0p-112f;
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define LEVEL 3
#define W 16
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#include "gguf_rows.h"
#undef NAME
#undef TARGET
#undef LEVEL
#undef W
#define LEVEL 2
#define W 8
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "gguf_rows.h"
#undef NAME
#undef TARGET
#undef LEVEL
#undef W
#endif
#define LEVEL 0
#define W 4
#define NAME(x) x##_plain
#define TARGET
#include "gguf_rows.h"
#undef NAME
#undef TARGET
#undef LEVEL
#undef W

#if defined(__x86_64__) && defined(__GNUC__)
#define NIBBLES __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))

/* What the 16 codes of 4 bits stand for in bf16, twice: scaled, moved and rounded as `store` does. */
static inline __attribute__((always_inline)) NIBBLES __m512i table_of(__m512 codes, float scale, float offset) {
    const __m512 values = _mm512_add_ps(_mm512_mul_ps(codes, _mm512_set1_ps(scale)), _mm512_set1_ps(offset));
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
}

static inline __attribute__((always_inline)) NIBBLES void look_up(__m512i table, __m256i codes, uint16_t *out) {
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table));
}

/* Codes of 4 bits to bf16, 32 at a time: each a lookup among 16 values that are rounded once. */
static inline __attribute__((always_inline)) NIBBLES void nibbles_kind(const int kind, const struct rows *call, int64_t start, int64_t stop) {
    const struct format format = format_of(kind);
    const int64_t per_row = call->columns / format.size;
    const uint8_t *p = call->blocks + start * per_row * format.bytes;
    const __m512 from_zero = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 codes = kind == Q4_0 ? _mm512_sub_ps(from_zero, _mm512_set1_ps(8)) : from_zero;
    const __m256i low = _mm256_set1_epi8(15);
    uint16_t *out = (uint16_t *)call->out + start * call->columns;
    for (int64_t block = 0; block < (stop - start) * per_row; block++, p += format.bytes) {
        const float scale = _cvtsh_ss(load16(p)), offset = kind == Q4_0 ? -0.0f : _cvtsh_ss(load16(p + 2));
        if (kind != Q4_K) {
            const __m128i b = _mm_loadu_si128((const __m128i *)(p + (kind == Q4_1 ? 4 : 2)));
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(b), _mm_srli_epi16(b, 4), 1);
            look_up(table_of(codes, scale, offset), _mm256_and_si256(both, low), out);
            out += 32;
            continue;
        }
#pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2, out += 64) {
            int s[2], m[2];
            scale_min_avx512(p + 4, j, s, m);
            scale_min_avx512(p + 4, j + 1, s + 1, m + 1);
            const __m256i b = _mm256_loadu_si256((const __m256i *)(p + 16 + 16 * j));
            look_up(table_of(codes, scale * (float)s[0], -(offset * (float)m[0])), _mm256_and_si256(b, low), out);
            look_up(table_of(codes, scale * (float)s[1], -(offset * (float)m[1])), _mm256_and_si256(_mm256_srli_epi16(b, 4), low), out + 32);
        }
    }
}

static NIBBLES void dequantise_nibbles(void *arguments, int64_t start, int64_t stop) {
    const struct rows *call = arguments;
    if (call->kind == Q4_0) nibbles_kind(Q4_0, call, start, stop);
    else if (call->kind == Q4_1) nibbles_kind(Q4_1, call, start, stop);
    else nibbles_kind(Q4_K, call, start, stop);
}
#endif

int veneer_level(void);

/* The best of what both the caller and the processor allow. */
static veneer_body body_of(int kind, int type, int most) {
    const int own = veneer_level(), level = most < own ? most : own;
#if defined(__x86_64__) && defined(__GNUC__)
    if (level >= 3 && type == BFLOAT16 && (kind == Q4_0 || kind == Q4_1 || kind == Q4_K)) return dequantise_nibbles;
    return level >= 3 ? dequantise_avx512 : level >= 2 ? dequantise_avx2 : dequantise_plain;
#endif
    (void)kind, (void)type, (void)level;
    return dequantise_plain;
}

/* out (rows, columns) of `type`, contiguous. `most` caps the instructions (3, 2, 0), for tests. 0, or -1: unknown kind. */
int veneer_gguf_dequantise(int kind, const uint8_t *blocks, int64_t rows, int64_t columns, void *out, int type, int most) {
    if (format_of(kind).size == 0 || columns % format_of(kind).size) return -1;
    struct rows call = {kind, type, blocks, columns, out};
    veneer_parallel(body_of(kind, type, most), &call, rows, 1 + (1 << 16) / (columns + 1));
    return 0;
}

/* Rows [first, first + rows) into out; kind and columns as in a valid call of veneer_gguf_dequantise. */
void gguf_decode(int kind, const uint8_t *blocks, int64_t first, int64_t rows, int64_t columns, void *out, int type, int most) {
    const struct format format = format_of(kind);
    struct rows call = {kind, type, blocks + first * (columns / format.size * format.bytes), columns, out};
    body_of(kind, type, most)(&call, 0, rows);
}
