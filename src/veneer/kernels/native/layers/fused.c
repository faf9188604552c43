/* Chains of elementwise operations on bf16 rows, each in one pass with float32 inside: see
   kernels/dense/fused.py and loss.py for what they compute. One row never depends on another, so
   threads take rows. */
#include "fused.h"
#include "parallel.h"

#if defined(__x86_64__)

struct norm {
    const uint16_t *x, *weight, *grad;
    uint16_t *out;
    float *scale; /* one a row: 1 / root mean square */
    int64_t width;
    float epsilon, offset;
    int64_t is_wide;
};

static VENEER_BF16 void norm_forward_body(void *arguments, int64_t from, int64_t to) {
    const struct norm *a = arguments;
    for (int64_t row = from; row < to; row++)
        a->scale[row] = norm_row(a->x + row * a->width, a->weight, a->out + row * a->width,
                                 a->width, a->epsilon, a->offset, a->is_wide);
}

static VENEER_BF16 void norm_backward_body(void *arguments, int64_t from, int64_t to) {
    const struct norm *a = arguments;
    for (int64_t row = from; row < to; row++) {
        const int64_t at = row * a->width;
        norm_row_gradient(a->x + at, a->weight, a->grad + at, a->scale[row], NULL, a->out + at,
                          a->width, a->offset);
    }
}

void veneer_rms_norm_forward(struct norm *a, int64_t rows) {
    veneer_parallel(norm_forward_body, a, rows, 16);
}
void veneer_rms_norm_backward(struct norm *a, int64_t rows) {
    veneer_parallel(norm_backward_body, a, rows, 16);
}

/* up: NULL, all values are 1; grad_up: NULL with it. */
struct gate {
    const uint16_t *gate, *up, *grad;
    uint16_t *out, *grad_gate, *grad_up;
};

/* Items are runs of 16 values; the last one may be shorter and is the caller's to avoid. */
#define GATES(name, activation)                                                                    \
    static VENEER_BF16 void name##_forward(void *arguments, int64_t from, int64_t to) {            \
        const struct gate *a = arguments;                                                          \
        for (int64_t i = from * 16; i < to * 16; i += 16)                                          \
            bf16_store(a->out + i,                                                                 \
                       gated(activation, bf16_floats(a->gate + i), up_values(a->up, i)));          \
    }                                                                                              \
    static VENEER_BF16 void name##_backward(void *arguments, int64_t from, int64_t to) {           \
        const struct gate *a = arguments;                                                          \
        for (int64_t i = from * 16; i < to * 16; i += 16)                                          \
            gated_gradient(activation, bf16_floats(a->gate + i), up_values(a->up, i),              \
                           bf16_floats(a->grad + i), a->grad_gate + i,                             \
                           a->grad_up ? a->grad_up + i : NULL);                                    \
    }

GATES(silu, SILU)
GATES(gelu_tanh, GELU_TANH)
GATES(gelu_erf, GELU_ERF)
GATES(relu, RELU)
GATES(relu_squared, RELU_SQUARED)

void veneer_gate_forward(struct gate *a, int64_t runs, int activation) {
    const veneer_body bodies[] = {silu_forward, gelu_tanh_forward, gelu_erf_forward, relu_forward,
                                  relu_squared_forward};
    veneer_parallel(bodies[activation], a, runs, 256);
}
void veneer_gate_backward(struct gate *a, int64_t runs, int activation) {
    const veneer_body bodies[] = {silu_backward, gelu_tanh_backward, gelu_erf_backward,
                                  relu_backward, relu_squared_backward};
    veneer_parallel(bodies[activation], a, runs, 256);
}

struct rotary {
    const uint16_t *x; /* (rows, heads, size) */
    struct rotation rotation;
    uint16_t *out;
    int64_t heads, size, back;
};

static VENEER_BF16 void rotary_body(void *arguments, int64_t from, int64_t to) {
    const struct rotary *a = arguments;
    for (int64_t row = from; row < to; row++) {
        const int64_t at = row * a->heads * a->size;
        rotate_row(a->x + at, &a->rotation, row, a->out + at, a->heads, a->size, a->back);
    }
}

void veneer_rotary(struct rotary *a, int64_t rows) { veneer_parallel(rotary_body, a, rows, 32); }

struct entropy {
    uint16_t *logits; /* (rows, V), replaced by softmax - onehot, times the slope of the soft cap */
    const int64_t *targets;
    float *loss; /* one a row */
    int64_t vocabulary;
    float softcap; /* 0: none */
};

/* z = softcap * tanh(z / softcap), rounded after each operation as torch does. */
static VENEER_BF16 void cap_row(uint16_t *z, int64_t width, float softcap) {
    const __m512 cap = _mm512_set1_ps(softcap);
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 m = rest(width - i);
        const __m512 t = rounded(tanh_floats(rounded(_mm512_div_ps(load(z + i, m), cap))));
        store(z + i, m, _mm512_mul_ps(t, cap));
    }
}

/* Factors from the gradients of capped logits z to those of the logits. */
VENEER_INLINE __m512 slope_of_cap(__m512 z, float softcap) {
    const __m512 t = _mm512_div_ps(z, _mm512_set1_ps(softcap));
    return _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.0f));
}

static VENEER_BF16 void entropy_body(void *arguments, int64_t from, int64_t to) {
    const struct entropy *a = arguments;
    for (int64_t row = from; row < to; row++) {
        uint16_t *z = a->logits + row * a->vocabulary;
        const int capped = a->softcap != 0.0f;
        if (capped) cap_row(z, a->vocabulary, a->softcap);
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < a->vocabulary; i += 16) {
            __mmask16 m = rest(a->vocabulary - i);
            top = _mm512_mask_max_ps(top, m, top, load(z + i, m));
        }
        float most = _mm512_reduce_max_ps(top);
        for (int64_t i = 0; i < a->vocabulary; i += 16) {
            __mmask16 m = rest(a->vocabulary - i);
            sum = _mm512_mask_add_ps(
                sum, m, sum, exp_floats(_mm512_sub_ps(load(z + i, m), _mm512_set1_ps(most))));
        }
        float total = _mm512_reduce_add_ps(sum);
        union {
            uint32_t word;
            float value;
        } target = {(uint32_t)z[a->targets[row]] << 16};
        a->loss[row] = logf(total) + most - target.value;
        for (int64_t i = 0; i < a->vocabulary; i += 16) {
            __mmask16 m = rest(a->vocabulary - i);
            const __m512 logits = load(z + i, m);
            __m512 e = exp_floats(_mm512_sub_ps(logits, _mm512_set1_ps(most)));
            e = _mm512_mul_ps(e, _mm512_set1_ps(1.0f / total));
            store(z + i, m, capped ? _mm512_mul_ps(e, slope_of_cap(logits, a->softcap)) : e);
        }
        /* From the float, not from the rounded share: near 1 bf16 would lose what is left to learn.
         */
        union {
            float value;
            uint32_t word;
        } share = {expf(target.value - most) / total - 1.0f};
        const float t = capped ? target.value / a->softcap : 0.0f;
        share.value *= 1.0f - t * t;
        uint32_t bits = share.word;
        z[a->targets[row]] = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
}

void veneer_entropy(struct entropy *a, int64_t rows) { veneer_parallel(entropy_body, a, rows, 1); }

#endif
