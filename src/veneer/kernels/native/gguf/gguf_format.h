/* Blocks of a .gguf file: their kinds, sizes, and numbers in them.
   Layout: ggml's ggml-common.h and quantize_row_*_ref, https://github.com/ggml-org/ggml */
#ifndef VENEER_GGUF_FORMAT_H
#define VENEER_GGUF_FORMAT_H

#include <stdint.h>
#include <string.h>

/* ggml's numbers */
enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

#define FOR_EACH_KIND(X) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q4_K) X(Q5_K) X(Q6_K)

struct format {
    int size, bytes; /* values and bytes of a block */
};

static inline struct format format_of(int kind) {
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

#endif
