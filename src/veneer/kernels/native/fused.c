/* Chains of elementwise operations on bf16 rows, each in one pass with float32 inside: see kernels/fused.py and loss.py
   for what they compute. One row never depends on another, so threads take rows. */
#include "bf16.h"
#include "parallel.h"
#include <math.h>

#if defined(__x86_64__)

struct norm {
    const uint16_t *x, *weight, *grad;
    uint16_t *out;
    float *scale; /* one a row: 1 / root mean square */
    int64_t width;
    float epsilon;
};

/* The last lanes of a row whose width is no multiple of 16. */
static inline __mmask16 rest(int64_t left) { return left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1); }

VENEER_INLINE __m512 load(const uint16_t *x, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x)), 16));
}

VENEER_INLINE void store(uint16_t *to, __mmask16 m, __m512 x) { _mm256_mask_storeu_epi16(to, m, (__m256i)_mm512_cvtneps_pbh(x)); }

/* Rounded to bf16 and back: where the model itself rounds between two operations. */
VENEER_INLINE __m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

static VENEER_BF16 void norm_forward_body(void *arguments, int64_t from, int64_t to) {
    const struct norm *a = arguments;
    for (int64_t row = from; row < to; row++) {
        const uint16_t *x = a->x + row * a->width;
        uint16_t *out = a->out + row * a->width;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < a->width; i += 16) {
            __m512 v = load(x + i, rest(a->width - i));
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)a->width + a->epsilon);
        a->scale[row] = scale;
        for (int64_t i = 0; i < a->width; i += 16) {
            __mmask16 m = rest(a->width - i);
            store(out + i, m, _mm512_mul_ps(rounded(_mm512_mul_ps(load(x + i, m), _mm512_set1_ps(scale))), load(a->weight + i, m)));
        }
    }
}

static VENEER_BF16 void norm_backward_body(void *arguments, int64_t from, int64_t to) {
    const struct norm *a = arguments;
    for (int64_t row = from; row < to; row++) {
        const uint16_t *x = a->x + row * a->width, *g = a->grad + row * a->width;
        uint16_t *out = a->out + row * a->width;
        __m512 scale = _mm512_set1_ps(a->scale[row]), dot = _mm512_setzero_ps();
        for (int64_t i = 0; i < a->width; i += 16) {
            __mmask16 m = rest(a->width - i);
            dot = _mm512_fmadd_ps(_mm512_mul_ps(load(g + i, m), load(a->weight + i, m)), load(x + i, m), dot);
        }
        float s = a->scale[row];
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / (float)a->width * s * s);
        for (int64_t i = 0; i < a->width; i += 16) {
            __mmask16 m = rest(a->width - i);
            __m512 inner = _mm512_mul_ps(load(g + i, m), load(a->weight + i, m));
            store(out + i, m, _mm512_mul_ps(scale, _mm512_fnmadd_ps(load(x + i, m), mean, inner)));
        }
    }
}

void veneer_rms_norm_forward(struct norm *a, int64_t rows) { veneer_parallel(norm_forward_body, a, rows, 16); }
void veneer_rms_norm_backward(struct norm *a, int64_t rows) { veneer_parallel(norm_backward_body, a, rows, 16); }

struct gate {
    const uint16_t *gate, *up, *grad;
    uint16_t *out, *grad_gate, *grad_up;
};

VENEER_INLINE __m512 sigmoid(__m512 x) {
    __m512 e = exp_floats(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.0f)));
    return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

/* Items are runs of 16 values; the last one may be shorter and is the caller's to avoid. */
static VENEER_BF16 void gate_forward_body(void *arguments, int64_t from, int64_t to) {
    const struct gate *a = arguments;
    for (int64_t i = from * 16; i < to * 16; i += 16) {
        __m512 x = bf16_floats(a->gate + i);
        bf16_store(a->out + i, _mm512_mul_ps(rounded(_mm512_mul_ps(x, sigmoid(x))), bf16_floats(a->up + i)));
    }
}

static VENEER_BF16 void gate_backward_body(void *arguments, int64_t from, int64_t to) {
    const struct gate *a = arguments;
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t i = from * 16; i < to * 16; i += 16) {
        __m512 x = bf16_floats(a->gate + i), g = bf16_floats(a->grad + i), s = sigmoid(x);
        __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
        bf16_store(a->grad_up + i, _mm512_mul_ps(g, _mm512_mul_ps(x, s)));
        bf16_store(a->grad_gate + i, _mm512_mul_ps(_mm512_mul_ps(g, bf16_floats(a->up + i)), slope));
    }
}

void veneer_silu_gate_forward(struct gate *a, int64_t runs) { veneer_parallel(gate_forward_body, a, runs, 256); }
void veneer_silu_gate_backward(struct gate *a, int64_t runs) { veneer_parallel(gate_backward_body, a, runs, 256); }

struct rotary {
    const uint16_t *x, *cos, *sin; /* (rows, heads, size), (rows, size) twice */
    uint16_t *out;
    int64_t heads, size, back;
};

/* Rounded where models round: after each product. The two halves of a head are turned together. */
static VENEER_BF16 void rotary_body(void *arguments, int64_t from, int64_t to) {
    const struct rotary *a = arguments;
    const int64_t half = a->size / 2;
    for (int64_t row = from; row < to; row++) {
        const uint16_t *cos = a->cos + row * a->size, *sin = a->sin + row * a->size;
        for (int64_t i = 0; i < half; i += 16) {
            const __m512 first_cos = bf16_floats(cos + i), second_cos = bf16_floats(cos + half + i);
            const __m512 first_sin = bf16_floats(sin + i), second_sin = bf16_floats(sin + half + i);
            for (int64_t h = 0; h < a->heads; h++) {
                const uint16_t *x = a->x + (row * a->heads + h) * a->size + i;
                uint16_t *out = a->out + (row * a->heads + h) * a->size + i;
                const __m512 first = bf16_floats(x), second = bf16_floats(x + half);
                const __m512 to_first = rounded(_mm512_mul_ps(second, a->back ? second_sin : first_sin));
                const __m512 to_second = rounded(_mm512_mul_ps(first, a->back ? first_sin : second_sin));
                const __m512 own_first = rounded(_mm512_mul_ps(first, first_cos)), own_second = rounded(_mm512_mul_ps(second, second_cos));
                bf16_store(out, a->back ? _mm512_add_ps(own_first, to_first) : _mm512_sub_ps(own_first, to_first));
                bf16_store(out + half, a->back ? _mm512_sub_ps(own_second, to_second) : _mm512_add_ps(own_second, to_second));
            }
        }
    }
}

void veneer_rotary(struct rotary *a, int64_t rows) { veneer_parallel(rotary_body, a, rows, 32); }

struct entropy {
    uint16_t *logits; /* (rows, V), replaced by softmax - onehot */
    const int64_t *targets;
    float *loss; /* one a row */
    int64_t vocabulary;
};

static VENEER_BF16 void entropy_body(void *arguments, int64_t from, int64_t to) {
    const struct entropy *a = arguments;
    for (int64_t row = from; row < to; row++) {
        uint16_t *z = a->logits + row * a->vocabulary;
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < a->vocabulary; i += 16) {
            __mmask16 m = rest(a->vocabulary - i);
            top = _mm512_mask_max_ps(top, m, top, load(z + i, m));
        }
        float most = _mm512_reduce_max_ps(top);
        for (int64_t i = 0; i < a->vocabulary; i += 16) {
            __mmask16 m = rest(a->vocabulary - i);
            sum = _mm512_mask_add_ps(sum, m, sum, exp_floats(_mm512_sub_ps(load(z + i, m), _mm512_set1_ps(most))));
        }
        float total = _mm512_reduce_add_ps(sum);
        union { uint32_t word; float value; } target = {(uint32_t)z[a->targets[row]] << 16};
        a->loss[row] = logf(total) + most - target.value;
        for (int64_t i = 0; i < a->vocabulary; i += 16) {
            __mmask16 m = rest(a->vocabulary - i);
            __m512 e = exp_floats(_mm512_sub_ps(load(z + i, m), _mm512_set1_ps(most)));
            store(z + i, m, _mm512_mul_ps(e, _mm512_set1_ps(1.0f / total)));
        }
        /* From the float, not from the rounded share: near 1 bf16 would lose what is left to learn. */
        union { float value; uint32_t word; } share = {expf(target.value - most) / total - 1.0f};
        uint32_t bits = share.word;
        z[a->targets[row]] = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
}

void veneer_entropy(struct entropy *a, int64_t rows) { veneer_parallel(entropy_body, a, rows, 1); }

#endif
