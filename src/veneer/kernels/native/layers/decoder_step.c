/* What stands between the products of a decoder layer, each in one call: see
   kernels/decoding/decoder_step.py for what it computes.

   Written once in plain C whose loops the compiler turns into registers, compiled for each set of
   instructions. Values are rounded to the model's type where the model rounds them, sums are
   float32 in an order that no set of instructions changes: all of them give the same bits. Rows are
   independent. */
#include "activations.h"
#include "levels.h"
#include "row_values.h"
#include <math.h>

enum { LANES = 16, CAP_RUN = 4096 };

/* (weight + offset) * x / sqrt(mean(x^2) + epsilon). weight: NULL, no norm. The normal values are
   rounded before they are multiplied, unless is_wide. is_centred: x - mean(x) in place of x, and
   bias, which may be NULL, is added; is_wide is set too. */
struct norm {
    const void *weight, *bias;
    int64_t is_wide, is_centred;
    float epsilon, offset;
};

struct step_norm {
    const void *x, *delta; /* delta: NULL, or what is added to x first, behind its norm `after` */
    void *sum, *out;       /* (rows, width); sum: x + delta, if there is a delta; out: its norm */
    int64_t rows, width;
    struct norm norm, after;
    float scale; /* of what is added to x */
};

struct step_rotate {
    void *q, *k;           /* (rows, heads, a head), changed in place */
    const void *cos, *sin; /* (rows, rotated): of the firsts of the pairs, then of their seconds */
    int64_t rows, q_row, k_row, q_head, k_head; /* values from one to the next */
    int64_t q_heads, k_heads, rotated;
    int64_t is_wide;    /* cos and sin are float32 beside bf16 heads, which are rounded once */
    int64_t neighbours; /* a pair is 2 i and 2 i + 1; otherwise i and i + rotated / 2 */
};

struct step_gate {
    const void *gate, *up; /* up: NULL, all values are 1 */
    void *out;
    int64_t rows, gate_row, gates, up_row, width, activation; /* gates: 1 for a row, or width */
};

struct step_copy {
    const void *x; /* (rows, groups, width), with gaps */
    void *out;     /* the same without gaps in a row */
    int64_t rows, row, groups, group, width, out_row;
};

struct step_cap {
    void *x;             /* (rows, width), changed in place */
    const void *factors; /* (width), of x before scale; NULL, none */
    int64_t rows, width;
    float scale, cap; /* cap: 0, none */
};

/* Rows of a table of angles by position. */
struct step_angles {
    const int64_t *spans; /* (rows, 5): the fourth is the row's position (paged_attention.c) */
    const char *cos_table, *sin_table;
    char *cos, *sin;
    int64_t rows, row_bytes;
};

/* Rows of a table by id, times scale. */
struct step_embed {
    const int64_t *ids;
    const void *table;
    void *h;
    int64_t rows, width, narrow; /* narrow: the table is bf16 */
    float scale;
};

void veneer_step_angles(const struct step_angles *a) {
    const size_t row_bytes = (size_t)a->row_bytes;
    for (int64_t row = 0; row < a->rows; row++) {
        const int64_t position = a->spans[5 * row + 3];
        memcpy(a->cos + row * a->row_bytes, a->cos_table + position * a->row_bytes, row_bytes);
        memcpy(a->sin + row * a->row_bytes, a->sin_table + position * a->row_bytes, row_bytes);
    }
}

INLINE float mean_of(const int bf16, const void *x, int64_t width) {
    const int64_t whole = width / LANES * LANES;
    float sums[LANES] = {0}, total = 0.0f;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int l = 0; l < LANES; l++) sums[l] += value_at(bf16, x, i + l);
    for (int64_t i = whole; i < width; i++) sums[i - whole] += value_at(bf16, x, i);
    for (int l = 0; l < LANES; l++) total += sums[l];
    return total / (float)width;
}

/* 1 / sqrt(mean((x - mean)^2) + epsilon). */
INLINE float inverse_root(const int bf16, const void *x, float mean, int64_t width, float epsilon) {
    const int64_t whole = width / LANES * LANES;
    float squares[LANES] = {0}, total = 0.0f;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int l = 0; l < LANES; l++) {
            const float v = value_at(bf16, x, i + l) - mean;
            squares[l] += v * v;
        }
    for (int64_t i = whole; i < width; i++) {
        const float v = value_at(bf16, x, i) - mean;
        squares[i - whole] += v * v;
    }
    for (int l = 0; l < LANES; l++) total += squares[l];
    return 1.0f / sqrtf(total / (float)width + epsilon);
}

INLINE void norm_row(const int bf16, const int is_wide, const struct norm *norm, const void *x,
                     const void *beside, float branch_scale, void *out, int64_t width) {
    const float mean = norm->is_centred ? mean_of(bf16, x, width) : 0.0f, offset = norm->offset;
    const float scale = inverse_root(bf16, x, mean, width, norm->epsilon);
    for (int64_t i = 0; i < width; i++) {
        const float normal = (value_at(bf16, x, i) - mean) * scale;
        const float weight = value_at(bf16, norm->weight, i);
        const float product = (is_wide ? normal : rounded(bf16, normal)) * (weight + offset);
        const float y = norm->bias == 0 ? product : product + value_at(bf16, norm->bias, i);
        put(bf16, out, i,
            beside == 0
                ? y
                : value_at(bf16, beside, i) + rounded(bf16, rounded(bf16, y) * branch_scale));
    }
}

/* Writes the norm of x to out; beside: NULL, or out = beside + branch_scale * norm. */
INLINE void norm_row_of(const int bf16, const struct norm *norm, const void *x, const void *beside,
                        float branch_scale, void *out, int64_t width) {
    if (norm->is_wide) norm_row(bf16, 1, norm, x, beside, branch_scale, out, width);
    else norm_row(bf16, 0, norm, x, beside, branch_scale, out, width);
}

INLINE void norm_rows(const int bf16, const struct step_norm *a, int64_t from, int64_t to) {
    const int64_t width = a->width;
    for (int64_t row = from; row < to; row++) {
        const void *x = row_of(bf16, a->x, row, width), *delta = row_of(bf16, a->delta, row, width);
        void *sum = (void *)row_of(bf16, a->sum, row, width);
        if (a->delta != 0 && a->after.weight != 0) {
            norm_row_of(bf16, &a->after, delta, x, a->scale, sum, width);
            x = sum;
        } else if (a->delta != 0) {
            for (int64_t i = 0; i < width; i++)
                put(bf16, sum, i,
                    value_at(bf16, x, i) + rounded(bf16, value_at(bf16, delta, i) * a->scale));
            x = sum;
        }
        if (a->norm.weight != 0)
            norm_row_of(bf16, &a->norm, x, 0, 1.0f, (void *)row_of(bf16, a->out, row, width),
                        width);
    }
}

/* `wide`: the angles are float32. Products of bf16 angles are rounded before they are added. */
INLINE void rotate_head(const int bf16, const int wide, const int neighbours, void *x,
                        const void *cos, const void *sin, int64_t half) {
    const int narrow = bf16 && !wide;
    for (int64_t i = 0; i < half; i++) {
        const int64_t first = neighbours ? 2 * i : i, second = neighbours ? 2 * i + 1 : i + half;
        const float one = value_at(bf16, x, first), other = value_at(bf16, x, second);
        const float a = rounded(narrow, one * value_at(narrow, cos, i)),
                    b = rounded(narrow, -other * value_at(narrow, sin, i));
        const float c = rounded(narrow, other * value_at(narrow, cos, i + half)),
                    d = rounded(narrow, one * value_at(narrow, sin, i + half));
        put(bf16, x, first, a + b);
        put(bf16, x, second, c + d);
    }
}

/* Rotates the heads of a row, `apart` values from each other. */
INLINE void rotate_heads(const int bf16, const int wide, const int neighbours,
                         const struct step_rotate *a, char *x, int64_t heads, int64_t apart,
                         int64_t row) {
    const int narrow = bf16 && !wide;
    for (int64_t h = 0; h < heads; h++)
        rotate_head(bf16, wide, neighbours, x + h * apart * (bf16 ? 2 : 4),
                    row_of(narrow, a->cos, row, a->rotated),
                    row_of(narrow, a->sin, row, a->rotated), a->rotated / 2);
}

INLINE void rotate_rows_of(const int bf16, const int wide, const int neighbours,
                           const struct step_rotate *a, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) {
        rotate_heads(bf16, wide, neighbours, a, (char *)row_of(bf16, a->q, row, a->q_row),
                     a->q_heads, a->q_head, row);
        rotate_heads(bf16, wide, neighbours, a, (char *)row_of(bf16, a->k, row, a->k_row),
                     a->k_heads, a->k_head, row);
    }
}

INLINE void rotate_rows(const int bf16, const struct step_rotate *a, int64_t from, int64_t to) {
    if (a->is_wide && a->neighbours) rotate_rows_of(bf16, 1, 1, a, from, to);
    else if (a->is_wide) rotate_rows_of(bf16, 1, 0, a, from, to);
    else if (a->neighbours) rotate_rows_of(bf16, 0, 1, a, from, to);
    else rotate_rows_of(bf16, 0, 0, a, from, to);
}

INLINE void copy_rows(const int bf16, const struct step_copy *a, int64_t from, int64_t to) {
    const int64_t bytes = bf16 ? 2 : 4;
    for (int64_t row = from; row < to; row++)
        for (int64_t g = 0; g < a->groups; g++)
            memcpy((char *)a->out + (row * a->out_row + g * a->width) * bytes,
                   (const char *)a->x + (row * a->row + g * a->group) * bytes,
                   (size_t)(a->width * bytes));
}

/* GELU by its formula with tanh is x * sigmoid(t): t = 2 sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE float gelu_argument(float x) {
    const float most = 16.0f; /* beyond it the sigmoid is 0 or 1 */
    x = x < most ? x : most;
    x = x > -most ? x : -most;
    return x * (x * x * (1.5957691216057308f * 0.044715f) + 1.5957691216057308f);
}

/* The share of a normal distribution below x, to 1e-7. Source: Abramowitz and Stegun 1964, 7.1.26.
 */
INLINE float normal_share(float x) {
    const float z = float_of_bits(bits_of_float(x) & 0x7fffffffu) * 0.70710678118654752f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float above = 0.5f * p * t * exp_of_minus(z * z);
    return x < 0.0f ? above : 1.0f - above;
}

INLINE void gate_rows_of(const int bf16, const int activation, const struct step_gate *a,
                         int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) {
        const void *gate = row_of(bf16, a->gate, row, a->gate_row),
                   *up = a->up == 0 ? 0 : row_of(bf16, a->up, row, a->up_row);
        void *out = (void *)row_of(bf16, a->out, row, a->width);
        for (int64_t i = 0; i < a->gates; i++) {
            const float x = value_at(bf16, gate, i);
            const float y = activation == SILU        ? x * sigmoid(x)
                            : activation == SIGMOID   ? sigmoid(x)
                            : activation == GELU_TANH ? x * sigmoid(gelu_argument(x))
                            : activation == GELU_ERF  ? x * normal_share(x)
                            : x < 0.0f                ? 0.0f
                            : activation == RELU      ? x
                                                      : x * x;
            put(bf16, out, i, y);
        }
        if (a->gates < a->width) {
            const float only = value_at(bf16, out, 0);
            for (int64_t i = 0; i < a->width; i++)
                put(bf16, out, i, up == 0 ? only : only * value_at(bf16, up, i));
            continue;
        }
        for (int64_t i = 0; up != 0 && i < a->width; i++)
            put(bf16, out, i, value_at(bf16, out, i) * value_at(bf16, up, i));
    }
}

INLINE void gate_rows(const int bf16, const struct step_gate *a, int64_t from, int64_t to) {
    if (a->activation == SILU) gate_rows_of(bf16, SILU, a, from, to);
    else if (a->activation == GELU_TANH) gate_rows_of(bf16, GELU_TANH, a, from, to);
    else if (a->activation == GELU_ERF) gate_rows_of(bf16, GELU_ERF, a, from, to);
    else if (a->activation == RELU) gate_rows_of(bf16, RELU, a, from, to);
    else if (a->activation == SIGMOID) gate_rows_of(bf16, SIGMOID, a, from, to);
    else gate_rows_of(bf16, RELU_SQUARED, a, from, to);
}

/* To 2 units in the last place: near 0 by a polynomial, elsewhere by e^-2|x|. Source of the
   polynomial: Cephes, tanhf. */
INLINE float tanh_of(float x) {
    const float square = x * x, e = exp_of_minus(2.0f * x);
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const float far = (1.0f - e) / (1.0f + e);
    return square < 0.390625f ? p * square * x + x : x < 0.0f ? -far : far;
}

/* Items are runs of CAP_RUN values, so that threads share a single row of many logits. */
INLINE void cap_runs(const int bf16, const struct step_cap *a, int64_t from, int64_t to) {
    const int64_t count = a->rows * a->width, last = to * CAP_RUN < count ? to * CAP_RUN : count;
    for (int64_t i = from * CAP_RUN, of_row; a->factors != 0 && i < last; i += of_row) {
        const int64_t column = i % a->width, rest = a->width - column;
        of_row = rest < last - i ? rest : last - i;
        for (int64_t n = 0; n < of_row; n++)
            put(bf16, a->x, i + n,
                value_at(bf16, a->x, i + n) * value_at(bf16, a->factors, column + n));
    }
    for (int64_t i = from * CAP_RUN; i < last; i++) {
        float x = rounded(bf16, value_at(bf16, a->x, i) * a->scale);
        if (a->cap > 0.0f) x = rounded(bf16, tanh_of(rounded(bf16, x / a->cap))) * a->cap;
        put(bf16, a->x, i, x);
    }
}

INLINE void embed_rows(const int bf16, const struct step_embed *a, int64_t from, int64_t to) {
    const int halves = bf16 || a->narrow;
    for (int64_t row = from; row < to; row++) {
        void *h = (void *)row_of(bf16, a->h, row, a->width);
        const void *values = row_of(halves, a->table, a->ids[row], a->width);
        for (int64_t i = 0; i < a->width; i++)
            put(bf16, h, i, value_at(halves, values, i) * a->scale);
    }
}

#define OF_BOTH_TYPES(body)                                                                        \
    LOOPS(body##_float, body(0, a, from, to))                                                      \
    LOOPS(body##_bf16, body(1, a, from, to))
OF_BOTH_TYPES(norm_rows)
OF_BOTH_TYPES(rotate_rows)
OF_BOTH_TYPES(gate_rows)
OF_BOTH_TYPES(copy_rows)
OF_BOTH_TYPES(cap_runs)
OF_BOTH_TYPES(embed_rows)

#define RUN_ITEMS(body, items, least)                                                              \
    const int own = veneer_level(), level = most < own ? most : own;                               \
    veneer_parallel(bf16 ? LOOP_OF(body##_bf16, level) : LOOP_OF(body##_float, level), a, items,   \
                    least)
#define RUN(body, values) RUN_ITEMS(body, a->rows, 1 + 32768 / (1 + (values)))

/* most: caps the instructions (3, 2, 0), for tests. */
void veneer_step_norm(struct step_norm *a, int bf16, int most) { RUN(norm_rows, a->width); }
void veneer_step_rotate(struct step_rotate *a, int bf16, int most) {
    RUN(rotate_rows, (a->q_heads + a->k_heads) * a->rotated);
}
void veneer_step_gate(struct step_gate *a, int bf16, int most) {
    RUN(gate_rows, 4 * a->width); /* each takes a division */
}
void veneer_step_copy(struct step_copy *a, int bf16, int most) {
    RUN(copy_rows, a->groups * a->width);
}
void veneer_step_cap(struct step_cap *a, int bf16, int most) {
    RUN_ITEMS(cap_runs, (a->rows * a->width + CAP_RUN - 1) / CAP_RUN, 2);
}
void veneer_step_embed(struct step_embed *a, int bf16, int most) { RUN(embed_rows, a->width); }
