/* Values of rows that are bf16 or float32, in loops that the compiler turns into registers. */
#ifndef VENEER_ROW_VALUES_H
#define VENEER_ROW_VALUES_H

#include "bits.h"
#include "unroll.h"

INLINE float value_at(const int bf16, const void *from, int64_t i) {
    return bf16 ? float_of_bits((uint32_t)((const uint16_t *)from)[i] << 16)
                : ((const float *)from)[i];
}

/* Nearest bf16 as a float. */
INLINE float rounded(const int bf16, float x) {
    const uint32_t bits = bits_of_float(x);
    return bf16 ? float_of_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u) : x;
}

INLINE void put(const int bf16, void *to, int64_t i, float x) {
    if (bf16) ((uint16_t *)to)[i] = bf16_of_float(x);
    else ((float *)to)[i] = x;
}

INLINE const void *row_of(const int bf16, const void *all, int64_t row, int64_t width) {
    return (const char *)all + row * width * (bf16 ? 2 : 4);
}

/* e^-|x| to 2 units in the last place; beyond 87 what it is there. By integers, which compilers
 * keep in registers. */
INLINE float exp_of_minus(float x) {
    const uint32_t most = 0x42ae0000u, own = bits_of_float(x) & 0x7fffffffu; /* 87 */
    x = -float_of_bits(own < most ? own : most);
    const float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * float_of_bits((uint32_t)((int32_t)n + 127) << 23);
}

INLINE float sigmoid(float x) {
    const float e = exp_of_minus(x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

#endif
