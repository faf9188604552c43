/* Floats as the bits that they are, and as bf16. */
#ifndef VENEER_BITS_H
#define VENEER_BITS_H

#include <stdint.h>
#include <string.h>

#include "unroll.h"

#define INLINE static inline __attribute__((always_inline))

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Nearest bf16, ties to even; for finite values and infinities. */
INLINE uint16_t bf16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#endif
