/* What fused.c and block.c share: norms, gates and rotations of a row, in bf16 with float32 inside.
 */
#ifndef VENEER_FUSED_H
#define VENEER_FUSED_H

#include "bf16.h"
#include <math.h>

#if defined(__x86_64__)

/* The last lanes of a row whose width is no multiple of 16. */
static inline __mmask16 rest(int64_t left) {
    return left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1);
}

VENEER_INLINE __m512 load(const uint16_t *x, __mmask16 m) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x)), 16));
}

VENEER_INLINE void store(uint16_t *to, __mmask16 m, __m512 x) {
    _mm256_mask_storeu_epi16(to, m, (__m256i)_mm512_cvtneps_pbh(x));
}

/* Rounded to bf16 and back: where the model itself rounds between two operations. */
VENEER_INLINE __m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

/* out = weight * x / root mean square; 1 / that. */
VENEER_INLINE float norm_row(const uint16_t *x, const uint16_t *weight, uint16_t *out,
                             int64_t width, float epsilon) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        __m512 v = load(x + i, rest(width - i));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + epsilon);
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 m = rest(width - i);
        store(out + i, m,
              _mm512_mul_ps(rounded(_mm512_mul_ps(load(x + i, m), _mm512_set1_ps(scale))),
                            load(weight + i, m)));
    }
    return scale;
}

/* out: the gradient of x, with the one that x has `beside` it, if any. out may be g. */
VENEER_INLINE void norm_row_gradient(const uint16_t *x, const uint16_t *weight, const uint16_t *g,
                                     float s, const uint16_t *beside, uint16_t *out,
                                     int64_t width) {
    const __m512 scale = _mm512_set1_ps(s);
    __m512 dot = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 m = rest(width - i);
        dot = _mm512_fmadd_ps(_mm512_mul_ps(load(g + i, m), load(weight + i, m)), load(x + i, m),
                              dot);
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / (float)width * s * s);
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 m = rest(width - i);
        __m512 inner = _mm512_mul_ps(load(g + i, m), load(weight + i, m));
        __m512 found = _mm512_mul_ps(scale, _mm512_fnmadd_ps(load(x + i, m), mean, inner));
        if (beside) found = _mm512_add_ps(rounded(found), load(beside + i, m));
        store(out + i, m, found);
    }
}

VENEER_INLINE __m512 sigmoid(__m512 x) {
    __m512 e =
        exp_floats(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.0f)));
    return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

/* silu(gate) * up, rounded where models round. */
VENEER_INLINE __m512 gated(__m512 gate, __m512 up) {
    return _mm512_mul_ps(rounded(_mm512_mul_ps(gate, sigmoid(gate))), up);
}

VENEER_INLINE void gated_gradient(__m512 gate, __m512 up, __m512 g, uint16_t *grad_gate,
                                  uint16_t *grad_up) {
    const __m512 one = _mm512_set1_ps(1.0f), s = sigmoid(gate);
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(gate, _mm512_sub_ps(one, s), one));
    bf16_store(grad_up, _mm512_mul_ps(g, _mm512_mul_ps(gate, s)));
    bf16_store(grad_gate, _mm512_mul_ps(_mm512_mul_ps(g, up), slope));
}

/* x (heads, size) turned by cos and sin (size), or back; rounded where models round: after each
   product. The two halves of a head are turned together. out may be x. */
VENEER_INLINE void rotate_row(const uint16_t *x, const uint16_t *cos, const uint16_t *sin,
                              uint16_t *out, int64_t heads, int64_t size, int64_t back) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const __m512 first_cos = bf16_floats(cos + i), second_cos = bf16_floats(cos + half + i);
        const __m512 first_sin = bf16_floats(sin + i), second_sin = bf16_floats(sin + half + i);
        for (int64_t h = 0; h < heads; h++) {
            const __m512 first = bf16_floats(x + h * size + i),
                         second = bf16_floats(x + h * size + half + i);
            uint16_t *to = out + h * size + i;
            const __m512 to_first = rounded(_mm512_mul_ps(second, back ? second_sin : first_sin));
            const __m512 to_second = rounded(_mm512_mul_ps(first, back ? first_sin : second_sin));
            const __m512 own_first = rounded(_mm512_mul_ps(first, first_cos)),
                         own_second = rounded(_mm512_mul_ps(second, second_cos));
            bf16_store(to, back ? _mm512_add_ps(own_first, to_first)
                                : _mm512_sub_ps(own_first, to_first));
            bf16_store(to + half, back ? _mm512_sub_ps(own_second, to_second)
                                       : _mm512_add_ps(own_second, to_second));
        }
    }
}

#endif
#endif
