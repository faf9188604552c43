/* Blocks of a .gguf file to numbers, for code that is compiled once for each set of instructions:
   NAME(x) gives the functions their names, TARGET their compiler option, W the values of a
   register. A block is unpacked into codes of 8 bits, with a scale and an offset for every 16 of
   them: value = scale * code + offset      (offset -0.0 where the format has none: it changes no
   value, no sign) */

#define INLINE static inline __attribute__((always_inline)) TARGET

/* An fp16 number; those below fp16's normal ones too. */
INLINE float NAME(half)(const uint8_t *p) {
#if LEVEL >= 2
    return _cvtsh_ss(load16(p));
#else
    return half(p);
#endif
}

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
#if LEVEL >= 2
    const __m128i places = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    c16v bytes = (c16v)_mm_shuffle_epi8(_mm_cvtsi32_si128((int)word), places);
#else
    uint8_t a = (uint8_t)word, b = (uint8_t)(word >> 8);
    c16v bytes = {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
#endif
    return (b16v)((bytes & bit) != 0) & 16;
}

/* Eight numbers of 8 bits, with a sign or without, times one. */
INLINE void NAME(eight)(const void *p, int positive, float times, float *out) {
#if LEVEL >= 2 /* the compiler's own widening goes through single bytes */
    const __m128i bytes = _mm_loadl_epi64(p);
    const __m256i wide = positive ? _mm256_cvtepu8_epi32(bytes) : _mm256_cvtepi8_epi32(bytes);
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(times)));
#else
    for (int i = 0; i < 8; i++)
        out[i] = times * (float)(positive ? ((const uint8_t *)p)[i] : ((const int8_t *)p)[i]);
#endif
}

/* Of a block: a scale and an offset for each 32 values, of Q6_K a scale for each 16. */
INLINE void NAME(scales)(int kind, const uint8_t *p, float *scale, float *offset) {
    offset[0] = -0.0f;
    switch (kind) {
    case Q4_1:
    case Q5_1: offset[0] = NAME(half)(p + 2); /* fall through */
    case Q4_0:
    case Q5_0:
    case Q8_0: scale[0] = NAME(half)(p); break;
    case Q4_K:
    case Q5_K: { /* 6 bits each: four scales, four minima, and the rest of both in four bytes and
                    the upper bits of all */
        const float d = NAME(half)(p), least = NAME(half)(p + 2);
        uint32_t words[3], parts[4];
        memcpy(words, p + 4, 12);
        parts[0] = words[0] & 0x3f3f3f3f,
        parts[1] = (words[2] & 0x0f0f0f0f) | ((words[0] >> 2) & 0x30303030);
        parts[2] = words[1] & 0x3f3f3f3f,
        parts[3] = ((words[2] >> 4) & 0x0f0f0f0f) | ((words[1] >> 2) & 0x30303030);
        NAME(eight)(parts, 1, d, scale), NAME(eight)(parts + 2, 1, -least, offset);
        break;
    }
    case Q6_K: {
        const float d = NAME(half)(p + 208);
        NAME(eight)(p + 192, 0, d, scale), NAME(eight)(p + 200, 0, d, scale + 8);
        break;
    }
    }
}

/* Which of them values 32 j + 16 k to 32 j + 16 k + 15 have. */
#define SCALE_AT(kind, j, k) ((kind) == Q6_K ? 2 * (j) + (k) : (j))
#define OFFSET_AT(kind, j) ((kind) == Q6_K ? 0 : (j))

/* The codes of those values. */
INLINE b16v NAME(codes)(int kind, const uint8_t *p, int j, int k) {
    b16v found = {};
    switch (kind) {
    case Q4_0:
    case Q4_1:
        found = NAME(nibbles)(p + (kind == Q4_1 ? 4 : 2), k) - (int8_t)(kind == Q4_1 ? 0 : 8);
        break;
    case Q5_0:
    case Q5_1: {
        uint32_t high;
        p += kind == Q5_1 ? 4 : 2;
        memcpy(&high, p, 4);
        found = (NAME(nibbles)(p + 4, k) | NAME(spread)(high >> 16 * k)) -
                (int8_t)(kind == Q5_1 ? 0 : 16);
        break;
    }
    case Q8_0: memcpy(&found, p + 2 + 16 * k, 16); break;
    case Q4_K:
    case Q5_K:
        found = NAME(nibbles)(p + (kind == Q4_K ? 16 : 48) + 32 * (j / 2) + 16 * k, j % 2);
        if (kind == Q5_K) found |= NAME(bits)(p + 16 + 16 * k, j, 4, 1);
        break;
    case Q6_K: { /* 128 values, 32 values */
        const int part = j / 4, quarter = j % 4;
        b16v low = NAME(nibbles)(p + 64 * part + 32 * (quarter % 2) + 16 * k, quarter / 2);
        found = (low | NAME(bits)(p + 128 + 32 * part + 16 * k, 2 * quarter, 4, 3)) - 32;
    }
    }
    return found;
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
#if LEVEL == 3
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

/* All 32s of a block, each by a function of j, the scales and the offsets. */
#define OF_BLOCK(kind, p, function, ...)                                                           \
    {                                                                                              \
        float scale[16], offset[8];                                                                \
        NAME(scales)(kind, p, scale, offset);                                                      \
        if ((kind) < Q4_K) function(kind, p, 0, scale, offset, __VA_ARGS__);                       \
        else {                                                                                     \
            _Pragma("GCC unroll 8") for (int j = 0; j < 8; j++)                                    \
                function(kind, p, j, scale, offset, __VA_ARGS__);                                  \
        }                                                                                          \
    }

/* With `kind` known when compiled, the switches vanish. */
#define OF_KIND(kind, function, ...)                                                               \
    case kind: function(kind, __VA_ARGS__); break;
#define OF_ANY_KIND(kind, function, ...)                                                           \
    switch (kind) {                                                                                \
        OF_KIND(Q4_0, function, __VA_ARGS__)                                                       \
        OF_KIND(Q4_1, function, __VA_ARGS__)                                                       \
        OF_KIND(Q5_0, function, __VA_ARGS__)                                                       \
        OF_KIND(Q5_1, function, __VA_ARGS__)                                                       \
        OF_KIND(Q8_0, function, __VA_ARGS__)                                                       \
        OF_KIND(Q4_K, function, __VA_ARGS__) OF_KIND(Q5_K, function, __VA_ARGS__)                  \
            OF_KIND(Q6_K, function, __VA_ARGS__)                                                   \
    }
