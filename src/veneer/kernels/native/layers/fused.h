/* What fused.c and block.c share: norms, gates and rotations of a row, in bf16 with float32 inside.
 */
#ifndef VENEER_FUSED_H
#define VENEER_FUSED_H

#include "activations.h"
#include "bf16.h"
#include <math.h>
#include <string.h>

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

/* Writes out = (weight + offset) * x / root mean square, and returns 1 / root mean square. The
   normal values are rounded before they are multiplied, unless is_wide. */
VENEER_INLINE float norm_row_of(const int is_wide, const uint16_t *x, const uint16_t *weight,
                                uint16_t *out, int64_t width, float epsilon, float offset) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        __m512 v = load(x + i, rest(width - i));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + epsilon);
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 m = rest(width - i);
        const __m512 normal = _mm512_mul_ps(load(x + i, m), _mm512_set1_ps(scale));
        const __m512 by = _mm512_add_ps(load(weight + i, m), _mm512_set1_ps(offset));
        store(out + i, m, _mm512_mul_ps(is_wide ? normal : rounded(normal), by));
    }
    return scale;
}

VENEER_INLINE float norm_row(const uint16_t *x, const uint16_t *weight, uint16_t *out,
                             int64_t width, float epsilon, float offset, int64_t is_wide) {
    return is_wide ? norm_row_of(1, x, weight, out, width, epsilon, offset)
                   : norm_row_of(0, x, weight, out, width, epsilon, offset);
}

/* out: the gradient of x, with the one that x has `beside` it, if any. out may be g. */
VENEER_INLINE void norm_row_gradient(const uint16_t *x, const uint16_t *weight, const uint16_t *g,
                                     float s, const uint16_t *beside, uint16_t *out, int64_t width,
                                     float offset) {
    const __m512 scale = _mm512_set1_ps(s), more = _mm512_set1_ps(offset);
    __m512 dot = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 m = rest(width - i);
        const __m512 by = _mm512_add_ps(load(weight + i, m), more);
        dot = _mm512_fmadd_ps(_mm512_mul_ps(load(g + i, m), by), load(x + i, m), dot);
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / (float)width * s * s);
    for (int64_t i = 0; i < width; i += 16) {
        __mmask16 m = rest(width - i);
        const __m512 by = _mm512_add_ps(load(weight + i, m), more);
        __m512 inner = _mm512_mul_ps(load(g + i, m), by);
        __m512 found = _mm512_mul_ps(scale, _mm512_fnmadd_ps(load(x + i, m), mean, inner));
        if (beside) found = _mm512_add_ps(rounded(found), load(beside + i, m));
        store(out + i, m, found);
    }
}

VENEER_INLINE float mean_of_row(const uint16_t *x, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, load(x + i, rest(width - i)));
    return _mm512_reduce_add_ps(sum) / (float)width;
}

/* LayerNorm: writes out = (weight + offset) * (x - mean) / deviation + bias, and returns
   1 / deviation. bias may be NULL. Rounded once. */
VENEER_INLINE float layer_norm_row(const uint16_t *x, const uint16_t *weight, const uint16_t *bias,
                                   uint16_t *out, int64_t width, float epsilon, float offset) {
    const __m512 mean = _mm512_set1_ps(mean_of_row(x, width));
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 m = rest(width - i);
        const __m512 v = _mm512_maskz_sub_ps(m, load(x + i, m), mean);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + epsilon);
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 m = rest(width - i);
        const __m512 normal =
            _mm512_mul_ps(_mm512_sub_ps(load(x + i, m), mean), _mm512_set1_ps(scale));
        const __m512 by = _mm512_add_ps(load(weight + i, m), _mm512_set1_ps(offset));
        __m512 y = _mm512_mul_ps(normal, by);
        if (bias) y = _mm512_add_ps(y, load(bias + i, m));
        store(out + i, m, y);
    }
    return scale;
}

/* As norm_row_gradient. */
VENEER_INLINE void layer_norm_row_gradient(const uint16_t *x, const uint16_t *weight,
                                           const uint16_t *g, float s, const uint16_t *beside,
                                           uint16_t *out, int64_t width, float offset) {
    const __m512 scale = _mm512_set1_ps(s), mean = _mm512_set1_ps(mean_of_row(x, width));
    const __m512 more = _mm512_set1_ps(offset);
    __m512 dot = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 m = rest(width - i);
        const __m512 by = _mm512_add_ps(load(weight + i, m), more);
        const __m512 inner = _mm512_mul_ps(load(g + i, m), by);
        dot = _mm512_fmadd_ps(inner, _mm512_maskz_sub_ps(m, load(x + i, m), mean), dot);
        sum = _mm512_add_ps(sum, inner);
    }
    const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / (float)width * s * s);
    const __m512 less = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)width);
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 m = rest(width - i);
        const __m512 by = _mm512_add_ps(load(weight + i, m), more);
        const __m512 inner = _mm512_sub_ps(_mm512_mul_ps(load(g + i, m), by), less);
        const __m512 centred = _mm512_sub_ps(load(x + i, m), mean);
        __m512 found = _mm512_mul_ps(scale, _mm512_fnmadd_ps(centred, along, inner));
        if (beside) found = _mm512_add_ps(rounded(found), load(beside + i, m));
        store(out + i, m, found);
    }
}

VENEER_INLINE __m512 sigmoid(__m512 x) {
    __m512 e =
        exp_floats(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.0f)));
    return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

/* SiLU and GELU by its formula with tanh are gate * sigmoid(t): t = gate for SiLU, and for GELU
   t = 2 sqrt(2 / pi) (gate + 0.044715 gate^3), as (1 + tanh(t / 2)) / 2 = sigmoid(t). */
#define GELU_LINEAR 1.5957691216057308f
#define GELU_CUBIC (GELU_LINEAR * 0.044715f)
#define GELU_MOST 16.0f /* beyond it the sigmoid is 0 or 1; so no cube leaves float32 */

VENEER_INLINE __m512 within(__m512 x) {
    return _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-GELU_MOST)), _mm512_set1_ps(GELU_MOST));
}

/* The share of a normal distribution below x, to 1e-7; *power: e^(-x^2 / 2). Source: Abramowitz and
   Stegun 1964, 7.1.26. */
VENEER_INLINE __m512 normal_share(__m512 x, __m512 *power) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678118654752f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
    __m512 p = _mm512_set1_ps(1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
    *power = exp_floats(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z)));
    const __m512 half = _mm512_mul_ps(_mm512_set1_ps(0.5f), *power);
    const __m512 above = _mm512_mul_ps(_mm512_mul_ps(p, t), half);
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_sub_ps(one, above), negative, above);
}

/* Factor of the gate in its activation; *power: of GELU by its definition, as in normal_share. */
VENEER_INLINE __m512 activation_share(const int activation, __m512 gate, __m512 *power) {
    if (activation == SILU) return sigmoid(gate);
    if (activation == GELU_ERF) return normal_share(gate, power);
    if (activation == RELU_SQUARED) return _mm512_max_ps(gate, _mm512_setzero_ps());
    if (activation == RELU)
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_GT_OQ),
                                   _mm512_set1_ps(1.0f));
    const __m512 x = within(gate);
    return sigmoid(_mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(GELU_CUBIC),
                                                    _mm512_set1_ps(GELU_LINEAR))));
}

/* 16 values of up; without it each is 1. */
VENEER_INLINE __m512 up_values(const uint16_t *up, int64_t at) {
    return up ? bf16_floats(up + at) : _mm512_set1_ps(1.0f);
}

/* The gate, for ReLU without what is negative: -inf times 0 would be NaN. A NaN stays. */
VENEER_INLINE __m512 reached(const int activation, __m512 gate) {
    const int is_relu = activation == RELU || activation == RELU_SQUARED;
    return is_relu ? _mm512_max_ps(_mm512_setzero_ps(), gate) : gate;
}

/* activation(gate) * up, rounded where models round. */
VENEER_INLINE __m512 gated(const int activation, __m512 gate, __m512 up) {
    __m512 power;
    gate = reached(activation, gate);
    const __m512 share = activation_share(activation, gate, &power);
    return _mm512_mul_ps(rounded(_mm512_mul_ps(gate, share)), up);
}

/* grad_up: NULL, or where the gradient of up is written. */
VENEER_INLINE void gated_gradient(const int activation, __m512 gate, __m512 up, __m512 g,
                                  uint16_t *grad_gate, uint16_t *grad_up) {
    const __m512 one = _mm512_set1_ps(1.0f);
    gate = reached(activation, gate);
    __m512 power, slope, run = gate; /* gate * the slope of t */
    const __m512 s = activation_share(activation, gate, &power);
    if (activation == GELU_TANH) {
        const __m512 x = within(gate);
        run = _mm512_mul_ps(x,
                            _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(3.0f * GELU_CUBIC),
                                            _mm512_set1_ps(GELU_LINEAR)));
    }
    if (activation == GELU_ERF)
        slope = _mm512_fmadd_ps(_mm512_mul_ps(gate, power), _mm512_set1_ps(0.3989422804f), s);
    else if (activation == RELU) slope = s;
    else if (activation == RELU_SQUARED) slope = _mm512_add_ps(s, s);
    else slope = _mm512_mul_ps(s, _mm512_fmadd_ps(run, _mm512_sub_ps(one, s), one));
    if (grad_up) bf16_store(grad_up, _mm512_mul_ps(g, _mm512_mul_ps(gate, s)));
    bf16_store(grad_gate, _mm512_mul_ps(_mm512_mul_ps(g, up), slope));
}

/* Rotates the first `turned` dimensions of a head: dimension i with turned / 2 + i, or 2 i with
   2 i + 1 (neighbours). cos and sin (rows, turned): the first half belongs to the first dimensions
   of the pairs, the second half to the second ones; float32 if is_wide, else bf16. NULL: nothing is
   rotated. */
struct rotation {
    const void *cos, *sin;
    int64_t turned, neighbours, is_wide;
};

VENEER_INLINE __m512 angles(const int is_wide, const void *from, int64_t i, __mmask16 m) {
    return is_wide ? _mm512_maskz_loadu_ps(m, (const float *)from + i)
                   : load((const uint16_t *)from + i, m);
}

/* Pairs i to i + 15 of a head. */
VENEER_INLINE void load_pairs(const int neighbours, const uint16_t *x, int64_t half, int64_t i,
                              __mmask16 m, __m512 *first, __m512 *second) {
    if (neighbours) {
        const __m512i words = _mm512_maskz_loadu_epi32(m, x + 2 * i);
        *first = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        *second = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(~0xFFFF)));
    } else {
        *first = load(x + i, m);
        *second = load(x + half + i, m);
    }
}

VENEER_INLINE void store_pairs(const int neighbours, uint16_t *to, int64_t half, int64_t i,
                               __mmask16 m, __m512 first, __m512 second) {
    if (neighbours) {
        _mm512_mask_storeu_epi32(to + 2 * i, m, bf16_pairs(first, second));
    } else {
        store(to + i, m, first);
        store(to + half + i, m, second);
    }
}

VENEER_INLINE __m512 product(const int is_wide, __m512 x, __m512 y) {
    const __m512 found = _mm512_mul_ps(x, y);
    return is_wide ? found : rounded(found);
}

VENEER_INLINE void rotate_row_of(const int w, const int neighbours, const uint16_t *x,
                                 const struct rotation *r, int64_t row, uint16_t *out,
                                 int64_t heads, int64_t size, int64_t back) {
    const int64_t half = r->turned / 2, at = row * r->turned;
    for (int64_t i = 0; i < half; i += 16) {
        const __mmask16 m = rest(half - i);
        const __m512 first_cos = angles(w, r->cos, at + i, m),
                     second_cos = angles(w, r->cos, at + half + i, m);
        const __m512 first_sin = angles(w, r->sin, at + i, m),
                     second_sin = angles(w, r->sin, at + half + i, m);
        for (int64_t h = 0; h < heads; h++) {
            __m512 first, second;
            load_pairs(neighbours, x + h * size, half, i, m, &first, &second);
            const __m512 to_first = product(w, second, back ? second_sin : first_sin);
            const __m512 to_second = product(w, first, back ? first_sin : second_sin);
            const __m512 own_first = product(w, first, first_cos),
                         own_second = product(w, second, second_cos);
            store_pairs(neighbours, out + h * size, half, i, m,
                        back ? _mm512_add_ps(own_first, to_first)
                             : _mm512_sub_ps(own_first, to_first),
                        back ? _mm512_sub_ps(own_second, to_second)
                             : _mm512_add_ps(own_second, to_second));
        }
    }
    for (int64_t h = 0; out != x && r->turned < size && h < heads; h++)
        memcpy(out + h * size + r->turned, x + h * size + r->turned,
               (size_t)(size - r->turned) * 2);
}

/* x (heads, size) turned by the angles of this row, or back. Rounded where models round: after each
   product, or once where angles are float32 (is_wide). out may be x. */
VENEER_INLINE void rotate_row(const uint16_t *x, const struct rotation *r, int64_t row,
                              uint16_t *out, int64_t heads, int64_t size, int64_t back) {
    if (r->is_wide && r->neighbours) rotate_row_of(1, 1, x, r, row, out, heads, size, back);
    else if (r->is_wide) rotate_row_of(1, 0, x, r, row, out, heads, size, back);
    else if (r->neighbours) rotate_row_of(0, 1, x, r, row, out, heads, size, back);
    else rotate_row_of(0, 0, x, r, row, out, heads, size, back);
}

#endif
#endif
