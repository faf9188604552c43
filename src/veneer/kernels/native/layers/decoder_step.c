/* What stands between the products of a decoder layer, each in one call: see
   kernels/decoding/decoder_step.py for what it computes.

   Written once in plain C whose loops the compiler turns into registers, compiled for each set of
   instructions. Values are rounded to the model's type where the model rounds them, sums are
   float32 in an order that no set of instructions changes: all of them give the same bits. Rows are
   independent. */
#include "bits.h"
#include "levels.h"
#include <math.h>

enum { LANES = 16 };

struct step_norm {
    const void *x, *delta, *weight; /* delta: NULL, or what is added to x first */
    void *sum, *out;                /* (rows, width); sum: x + delta, where there is a delta */
    int64_t rows, width;
    float epsilon;
};

struct step_rotate {
    void *q, *k;           /* (rows, heads, size), changed in place */
    const void *cos, *sin; /* (rows, size) */
    int64_t rows, q_heads, k_heads, size;
};

struct step_gate {
    const void *gate, *up;
    void *out;
    int64_t rows, width;
};

/* What the first layer takes, rows of tables: all sizes in bytes. */
struct step_inputs {
    const int64_t *ids,
        *spans; /* spans: (rows, 5), of each the fourth is its row's place (paged_attention.c) */
    const char *table, *cos_table, *sin_table;
    char *h, *cos, *sin;
    int64_t rows, width, size;
};

void veneer_step_inputs(const struct step_inputs *a) {
    for (int64_t row = 0; row < a->rows; row++) {
        const int64_t place = a->spans[5 * row + 3];
        memcpy(a->h + row * a->width, a->table + a->ids[row] * a->width, (size_t)a->width);
        memcpy(a->cos + row * a->size, a->cos_table + place * a->size, (size_t)a->size);
        memcpy(a->sin + row * a->size, a->sin_table + place * a->size, (size_t)a->size);
    }
}

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

INLINE void norm_rows(const int bf16, const struct step_norm *a, int64_t from, int64_t to) {
    const int64_t width = a->width, whole = width / LANES * LANES;
    for (int64_t row = from; row < to; row++) {
        const void *x = row_of(bf16, a->x, row, width), *delta = row_of(bf16, a->delta, row, width);
        void *sum = (void *)row_of(bf16, a->sum, row, width),
             *out = (void *)row_of(bf16, a->out, row, width);
        float squares[LANES] = {0}, total = 0.0f;
        if (a->delta != 0) {
            for (int64_t i = 0; i < width; i++)
                put(bf16, sum, i, value_at(bf16, x, i) + value_at(bf16, delta, i));
            x = sum;
        }
        for (int64_t i = 0; i < whole; i += LANES)
            for (int l = 0; l < LANES; l++)
                squares[l] += value_at(bf16, x, i + l) * value_at(bf16, x, i + l);
        for (int64_t i = whole; i < width; i++)
            squares[i - whole] += value_at(bf16, x, i) * value_at(bf16, x, i);
        for (int l = 0; l < LANES; l++) total += squares[l];
        const float scale = 1.0f / sqrtf(total / (float)width + a->epsilon);
        for (int64_t i = 0; i < width; i++)
            put(bf16, out, i,
                value_at(bf16, a->weight, i) * rounded(bf16, value_at(bf16, x, i) * scale));
    }
}

INLINE void rotate_head(const int bf16, void *x, const void *cos, const void *sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float one = value_at(bf16, x, i), other = value_at(bf16, x, i + half);
        const float a = rounded(bf16, one * value_at(bf16, cos, i)),
                    b = rounded(bf16, -other * value_at(bf16, sin, i));
        const float c = rounded(bf16, other * value_at(bf16, cos, i + half)),
                    d = rounded(bf16, one * value_at(bf16, sin, i + half));
        put(bf16, x, i, a + b);
        put(bf16, x, i + half, c + d);
    }
}

INLINE void rotate_rows(const int bf16, const struct step_rotate *a, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) {
        const void *cos = row_of(bf16, a->cos, row, a->size),
                   *sin = row_of(bf16, a->sin, row, a->size);
        for (int64_t h = 0; h < a->q_heads; h++)
            rotate_head(bf16, (void *)row_of(bf16, a->q, row * a->q_heads + h, a->size), cos, sin,
                        a->size / 2);
        for (int64_t h = 0; h < a->k_heads; h++)
            rotate_head(bf16, (void *)row_of(bf16, a->k, row * a->k_heads + h, a->size), cos, sin,
                        a->size / 2);
    }
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

INLINE void gate_rows(const int bf16, const struct step_gate *a, int64_t from, int64_t to) {
    for (int64_t i = from * a->width; i < to * a->width; i++) {
        const float x = value_at(bf16, a->gate, i), e = exp_of_minus(x);
        put(bf16, a->out, i,
            rounded(bf16, x * (x < 0.0f ? e : 1.0f) / (1.0f + e)) * value_at(bf16, a->up, i));
    }
}

#define OF_BOTH_TYPES(body)                                                                        \
    LOOPS(body##_float, body(0, a, from, to))                                                      \
    LOOPS(body##_bf16, body(1, a, from, to))
OF_BOTH_TYPES(norm_rows)
OF_BOTH_TYPES(rotate_rows)
OF_BOTH_TYPES(gate_rows)

#define RUN(body, values)                                                                          \
    const int own = veneer_level(), level = most < own ? most : own;                               \
    veneer_parallel(bf16 ? LOOP_OF(body##_bf16, level) : LOOP_OF(body##_float, level), a, a->rows, \
                    1 + 32768 / (1 + (values)))

/* most: caps the instructions (3, 2, 0), for tests. */
void veneer_step_norm(struct step_norm *a, int bf16, int most) { RUN(norm_rows, a->width); }
void veneer_step_rotate(struct step_rotate *a, int bf16, int most) {
    RUN(rotate_rows, (a->q_heads + a->k_heads) * a->size);
}
void veneer_step_gate(struct step_gate *a, int bf16, int most) {
    RUN(gate_rows, 4 * a->width); /* each takes a division */
}
