/* Included by gguf.c once for each set of instructions: NAME(x) gives the functions their names, TARGET their compiler
   option. A block is unpacked into codes of 8 bits, with a scale and an offset for every 16 of them:
       value = scale * code + offset      (offset -0.0 where the format has none: it changes no value, no sign) */

#define INLINE static inline __attribute__((always_inline)) TARGET

/* 16 codes from 16 bytes: the low or the high nibble of each. */
INLINE b16v NAME(nibbles)(const uint8_t *p, int high) {
    c16v bytes;
    memcpy(&bytes, p, 16);
    return (b16v)(high ? bytes >> 4 : bytes & 15);
}

/* Bit `from` of 16 bytes, moved to bit `to`. */
INLINE b16v NAME(bits)(const uint8_t *p, int from, int to, int mask) {
    c16v bytes;
    memcpy(&bytes, p, 16);
    return (b16v)(((bytes >> from) & (uint8_t)mask) << to);
}

/* Bits 0 to 15 of `word`, one a code, moved to bit 4. */
INLINE b16v NAME(spread)(uint32_t word) {
    const c16v bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8_t a = (uint8_t)word, b = (uint8_t)(word >> 8);
    c16v bytes = {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
    return (b16v)((bytes & bit) != 0) & 16;
}

/* The 6-bit scale and minimum number j of a K block's 12 bytes. */
INLINE void NAME(scale_min)(const uint8_t *s, int j, int *scale, int *minimum) {
    if (j < 4) {
        *scale = s[j] & 63;
        *minimum = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        *minimum = (s[j + 4] >> 4) | (s[j] >> 6) << 4;
    }
}

/* codes[size / 16], scale[size / 16], offset[size / 16] of one block. */
INLINE void NAME(unpack)(int kind, const uint8_t *p, b16v *codes, float *scale, float *offset) {
    switch (kind) {
    case Q4_0:
    case Q4_1: {
        int one = kind == Q4_1;
        scale[0] = scale[1] = half(p);
        offset[0] = offset[1] = one ? half(p + 2) : -0.0f;
        codes[0] = NAME(nibbles)(p + 2 + 2 * one, 0) - (int8_t)(one ? 0 : 8);
        codes[1] = NAME(nibbles)(p + 2 + 2 * one, 1) - (int8_t)(one ? 0 : 8);
        break;
    }
    case Q5_0:
    case Q5_1: {
        int one = kind == Q5_1;
        uint32_t high;
        p += one ? 4 : 2;
        memcpy(&high, p, 4);
        scale[0] = scale[1] = half(p - (one ? 4 : 2));
        offset[0] = offset[1] = one ? half(p - 2) : -0.0f;
        codes[0] = (NAME(nibbles)(p + 4, 0) | NAME(spread)(high)) - (int8_t)(one ? 0 : 16);
        codes[1] = (NAME(nibbles)(p + 4, 1) | NAME(spread)(high >> 16)) - (int8_t)(one ? 0 : 16);
        break;
    }
    case Q8_0:
        scale[0] = scale[1] = half(p);
        offset[0] = offset[1] = -0.0f;
        memcpy(codes, p + 2, 32);
        break;
    case Q4_K:
    case Q5_K: {
        float d = half(p), least = half(p + 2);
        const uint8_t *low = p + (kind == Q4_K ? 16 : 48);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            int s, m;
            NAME(scale_min)(p + 4, j, &s, &m);
            scale[2 * j] = scale[2 * j + 1] = d * (float)s;
            offset[2 * j] = offset[2 * j + 1] = -(least * (float)m);
            for (int k = 0; k < 2; k++) {
                b16v code = NAME(nibbles)(low + 32 * (j / 2) + 16 * k, j % 2);
                codes[2 * j + k] = kind == Q4_K ? code : code | NAME(bits)(p + 16 + 16 * k, j, 4, 1);
            }
        }
        break;
    }
    case Q6_K: {
        float d = half(p + 208);
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            int part = j / 8, quarter = j % 8 / 2, k = j % 2; /* 128 values, 32 values, 16 values */
            b16v low = NAME(nibbles)(p + 64 * part + 32 * (quarter % 2) + 16 * k, quarter / 2);
            codes[j] = (low | NAME(bits)(p + 128 + 32 * part + 16 * k, 2 * quarter, 4, 3)) - 32;
            scale[j] = d * (float)(int8_t)p[192 + j];
            offset[j] = -0.0f;
        }
        break;
    }
    }
}

/* W values at once: what a register holds. */
typedef float NAME(fv) __attribute__((vector_size(4 * W)));
typedef int32_t NAME(iv) __attribute__((vector_size(4 * W)));
typedef uint32_t NAME(uv) __attribute__((vector_size(4 * W)));
typedef uint16_t NAME(hv) __attribute__((vector_size(2 * W)));
typedef int8_t NAME(bv) __attribute__((vector_size(W)));

/* Codes W * part to W * part + W - 1. */
INLINE NAME(fv) NAME(floats)(b16v codes, int part) {
    NAME(iv) wide;
#if LEVEL == 3 /* the compiler's own widening goes through single bytes */
    (void)part;
    wide = (NAME(iv))_mm512_cvtepi8_epi32((__m128i)codes);
#elif LEVEL == 2
    __m128i half = part ? _mm_unpackhi_epi64((__m128i)codes, (__m128i)codes) : (__m128i)codes;
    wide = (NAME(iv))_mm256_cvtepi8_epi32(half);
#else
    NAME(bv) few;
    memcpy(&few, (const char *)&codes + W * part, W);
    wide = __builtin_convertvector(few, NAME(iv));
#endif
    return __builtin_convertvector(wide, NAME(fv));
}

INLINE void NAME(store)(NAME(fv) value, int type, void *out, int64_t at) {
    NAME(uv) w = (NAME(uv))value;
    NAME(hv) packed;
    if (type == FLOAT32) {
        memcpy((float *)out + at, &value, 4 * W);
        return;
    }
    if (type == BFLOAT16) {
        packed = __builtin_convertvector((w + 0x7FFF + ((w >> 16) & 1)) >> 16, NAME(hv));
    } else { /* fp16, to nearest even, subnormals and infinity included: https://github.com/Maratyszcza/FP16 */
        NAME(fv) base = (NAME(fv))(w & 0x7FFFFFFF) * 0x1.0p+112f * 0x1.0p-110f;
        NAME(uv) twice = w + w, sign = w & 0x80000000u, bias = twice & 0xFF000000u;
        bias += (NAME(uv))(bias < 0x71000000u) & (0x71000000u - bias);
        NAME(uv) bits = (NAME(uv))((NAME(fv))((bias >> 1) + 0x07800000u) + base);
        NAME(uv) result = ((bits >> 13) & 0x7C00) + (bits & 0x0FFF), is_nan = (NAME(uv))(twice > 0xFF000000u);
        packed = __builtin_convertvector((sign >> 16) | (is_nan & 0x7E00) | (~is_nan & result), NAME(hv));
    }
    memcpy((uint16_t *)out + at, &packed, 2 * W);
}

#define GROUPS(kind) ((kind) >= Q4_K ? 16 : 2)

/* With `kind` and `type` known when compiled, the switches vanish. */
INLINE void NAME(dequantise_kind)(int kind, int type, const struct rows *call, int64_t start, int64_t stop) {
    const int size = 16 * GROUPS(kind), bytes = format_of(kind).bytes;
    const int64_t per_row = call->columns / size;
    const uint8_t *p = call->blocks + start * per_row * bytes;
    int64_t at = start * call->columns;
    for (int64_t block = 0; block < (stop - start) * per_row; block++, p += bytes) {
        b16v codes[16];
        float scale[16], offset[16];
        NAME(unpack)(kind, p, codes, scale, offset);
        for (int g = 0; g < GROUPS(kind); g++)
            for (int part = 0; part < 16 / W; part++, at += W)
                NAME(store)(NAME(floats)(codes[g], part) * scale[g] + offset[g], type, call->out, at);
    }
}

#define OF_KIND(kind, function, ...) \
    case kind: function(kind, __VA_ARGS__); break;
#define OF_ANY_KIND(kind, function, ...)                                                              \
    switch (kind) {                                                                                   \
        OF_KIND(Q4_0, function, __VA_ARGS__) OF_KIND(Q4_1, function, __VA_ARGS__)                     \
        OF_KIND(Q5_0, function, __VA_ARGS__) OF_KIND(Q5_1, function, __VA_ARGS__)                     \
        OF_KIND(Q8_0, function, __VA_ARGS__) OF_KIND(Q4_K, function, __VA_ARGS__)                     \
        OF_KIND(Q5_K, function, __VA_ARGS__) OF_KIND(Q6_K, function, __VA_ARGS__)                     \
    }

static TARGET void NAME(dequantise)(void *arguments, int64_t start, int64_t stop) {
    const struct rows *call = arguments;
    switch (call->type) {
    case FLOAT32: OF_ANY_KIND(call->kind, NAME(dequantise_kind), FLOAT32, call, start, stop) break;
    case BFLOAT16: OF_ANY_KIND(call->kind, NAME(dequantise_kind), BFLOAT16, call, start, stop) break;
    case FLOAT16: OF_ANY_KIND(call->kind, NAME(dequantise_kind), FLOAT16, call, start, stop) break;
    }
}

#undef INLINE
#undef GROUPS
#undef OF_KIND
#undef OF_ANY_KIND
