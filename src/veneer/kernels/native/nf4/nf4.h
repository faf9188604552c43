/* 4-bit weights: a table of 16 values times one scale a block. Layout: docs of quant/nf4.py. */
#ifndef VENEER_NF4_H
#define VENEER_NF4_H

#include "bits.h"
#include <math.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")))
#define AVX512BF16                                                                                 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c")))
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define X86 0
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#define NEON 1
#else
#define NEON 0
#endif

enum { FP32 = 0, BF16 = 1, FP16 = 2 };

/* Element i of the flat weight: nibble i of `packed` (even: high half of byte i / 2) into `table`,
   times the scale of block i / block (a power of two, as is nested_block). Nested: that scale is
   nested_table[scale] * nested_scales[number / nested_block] + offset. */
struct nf4_weights {
    const uint8_t *packed;
    const void *scales;        /* float, or uint8_t where nested */
    const float *table;        /* 16 */
    const float *nested_table; /* 256, NULL where not nested */
    const float *nested_scales;
    int64_t count, block, nested_block;
    float offset;
};

int veneer_level(void);
int veneer_has_vectors(void);
int veneer_has_bf16(void);
int veneer_has_byte_permutes(void);

/* The best level that both the caller (asked, -1: any) and the processor allow: 4 AVX-512 with bf16
   products and byte permutes, 3, 2 (on ARM: NEON), 0. */
INLINE int nf4_level(int asked) {
    int have = NEON ? 2 * veneer_has_vectors() : veneer_level();
    if (have == 3 && veneer_has_bf16() && veneer_has_byte_permutes()) have = 4;
    return asked < 0 || asked > have ? have : asked;
}

/* Two roundings, never one: -ffp-contract=off. */
INLINE float nf4_scale(const struct nf4_weights *w, int64_t block) {
    if (w->nested_table == NULL) return ((const float *)w->scales)[block];
    float part = w->nested_table[((const uint8_t *)w->scales)[block]] *
                 w->nested_scales[block >> __builtin_ctzll((uint64_t)w->nested_block)];
    return part + w->offset;
}

INLINE float float_of_bf16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

INLINE float float_of_fp16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31,
             fraction = half & 0x3ff;
    if (exponent == 0) { /* zero or subnormal: fraction * 2^-24 */
        float value = (float)fraction * 5.9604644775390625e-08f;
        return sign ? -value : value;
    }
    if (exponent == 31) return float_of_bits(sign | 0x7f800000 | (fraction << 13));
    return float_of_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
}

/* Nearest fp16, ties to even. */
INLINE uint16_t fp16_of_float(float value) {
    uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x7f800000) return (uint16_t)(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to 2^16 or more */
    if (bits < 0x38800000) { /* below 2^-14: a multiple of 2^-24, and adding 0.5 rounds to one */
        float shifted = float_of_bits(bits) + 0.5f;
        return (uint16_t)(sign | (bits_of_float(shifted) & 0xffff));
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
}

INLINE void store_as(void *out, int64_t place, float value, int type) {
    if (type == FP32) ((float *)out)[place] = value;
    else ((uint16_t *)out)[place] = type == BF16 ? bf16_of_float(value) : fp16_of_float(value);
}

INLINE float load_as(const void *from, int64_t place, int type) {
    if (type == FP32) return ((const float *)from)[place];
    uint16_t half = ((const uint16_t *)from)[place];
    return type == BF16 ? float_of_bf16(half) : float_of_fp16(half);
}

/* Elements [start, start + count) of the flat weight into out, on the calling thread. */
void nf4_decode(const struct nf4_weights *w, int64_t start, int64_t count, void *out, int type,
                int level);

#endif
