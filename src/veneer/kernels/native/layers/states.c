/* The states of single tokens, each read in one slot and written to another: see
   kernels/decoding/state_step.py for what is computed.

   Written once in plain C, compiled for each set of instructions. Values are rounded to the model's
   type where a kernel ends; sums are float32 of LANES parts, in an order that no set of
   instructions changes. Rows and heads are independent. */
#include "levels.h"
#include "row_values.h"
#include <math.h>

/* kernels/bindings/state_calls.py knows MOST_WIDTH too. */
enum { LANES = 16, RUN = 64, COLUMNS = 64, MOST_WIDTH = 512 };

struct state_window {
    const void *x;               /* (rows, channels) */
    const void *before, *behind; /* the same; NULL, or factors of x and of the output */
    const void *weight, *bias;   /* (channels, taps); NULL, or (channels) */
    void *stored;                /* (slots, channels, length) */
    const int64_t *read, *written; /* (rows), slots */
    void *out;                   /* (rows, channels) */
    int64_t rows, x_row, before_row, behind_row, slots, channels, length, taps, has_silu;
};

struct state_space {
    float *stored;         /* (slots, heads, size, width) */
    const void *x, *b, *c; /* (rows, heads, size); (rows, groups, width), of heads / groups heads */
    const void *step;      /* (rows, heads) */
    const void *gate;      /* (rows, heads, size): NULL, or the output is multiplied by its SiLU */
    const void *log_rate, *skip, *bias; /* (heads), float32 or narrow: bf16 */
    const int64_t *read, *written;      /* (rows), slots */
    void *out;                          /* (rows, heads, size) */
    int64_t rows, x_row, b_row, c_row, step_row, gate_row, slots, heads, size, groups, width;
    int64_t narrow;
};

/* S = exp(-exp(log_rate) softplus(step + bias)) S', S += k (b (v - k^T S))^T, out = q^T S. */
struct state_delta {
    float *stored; /* (slots, heads, size, width) */
    const void *step, *strength; /* (rows, groups, heads / groups); b = most sigmoid(strength) */
    const void *x;               /* (rows, q and k of each group, v of each head), side by side */
    const void *log_rate, *bias; /* (heads), float32 or narrow: bf16 */
    const int64_t *read, *written; /* (rows), slots */
    void *out;                     /* (rows, heads, width) */
    int64_t rows, step_row, step_group, strength_row, strength_group, x_row;
    int64_t slots, heads, groups, size, width, narrow;
    float most, epsilon;
};

INLINE char *slot_of(const int bf16, void *stored, int64_t slot, int64_t values) {
    return (char *)stored + slot * values * (bf16 ? 2 : 4);
}

/* `count` channels from `first` on of a row; sums and outputs lie in registers. */
INLINE void window_run(const int bf16, const int64_t length, const int64_t taps,
                       const struct state_window *a, int64_t row, int64_t first, int64_t count) {
    const int64_t values = a->channels * length, unseen = length - (taps - 1);
    const char *old = slot_of(bf16, a->stored, a->read[row], values);
    char *state = slot_of(bf16, a->stored, a->written[row], values);
    const void *x = row_of(bf16, a->x, row, a->x_row);
    const void *before = a->before == 0 ? 0 : row_of(bf16, a->before, row, a->before_row);
    const void *behind = a->behind == 0 ? 0 : row_of(bf16, a->behind, row, a->behind_row);
    void *out = (void *)row_of(bf16, a->out, row, a->channels);
    float newest[RUN], sums[RUN];
    for (int64_t i = 0; i < count; i++) {
        const float own = value_at(bf16, x, first + i);
        newest[i] = before == 0 ? own : rounded(bf16, own * value_at(bf16, before, first + i));
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = (first + i) * length;
        float sum = 0.0f;
        for (int64_t t = 0; t < taps - 1; t++)
            sum += value_at(bf16, a->weight, (first + i) * taps + t) *
                   value_at(bf16, old, at + unseen + t);
        sum += value_at(bf16, a->weight, (first + i) * taps + taps - 1) * newest[i];
        sums[i] = sum;
        for (int64_t t = 0; t < length - 1; t++)
            put(bf16, state, at + t, value_at(bf16, old, at + t + 1));
        if (length > 0) put(bf16, state, at + length - 1, newest[i]);
    }
    for (int64_t i = 0; i < count; i++) {
        float y = sums[i];
        if (a->bias != 0) y += value_at(bf16, a->bias, first + i);
        y = rounded(bf16, y);
        if (a->has_silu) y = rounded(bf16, y * sigmoid(y));
        put(bf16, out, first + i, behind == 0 ? y : y * value_at(bf16, behind, first + i));
    }
}

/* Items are runs of RUN channels of a row. */
INLINE void windows_of(const int bf16, const int64_t length, const int64_t taps,
                       const struct state_window *a, int64_t from, int64_t to) {
    const int64_t runs = (a->channels + RUN - 1) / RUN;
    for (int64_t item = from; item < to; item++) {
        const int64_t first = item % runs * RUN, rest = a->channels - first;
        window_run(bf16, length, taps, a, item / runs, first, rest < RUN ? rest : RUN);
    }
}

INLINE void windows(const int bf16, const struct state_window *a, int64_t from, int64_t to) {
    if (a->length == 3 && a->taps == 3) windows_of(bf16, 3, 3, a, from, to);
    else if (a->length == 4 && a->taps == 4) windows_of(bf16, 4, 4, a, from, to);
    else windows_of(bf16, a->length, a->taps, a, from, to);
}

/* The softplus of torch: x itself above 20. */
INLINE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

/* Items are heads of a row. */
INLINE void spaces(const int bf16, const struct state_space *a, int64_t from, int64_t to) {
    const int64_t whole = a->width / LANES * LANES, values = a->size * a->width;
    const int narrow = a->narrow != 0;
    float b[MOST_WIDTH], c[MOST_WIDTH];
    for (int64_t item = from; item < to; item++) {
        const int64_t row = item / a->heads, head = item % a->heads;
        const int64_t group = head / (a->heads / a->groups) * a->width;
        const void *x = row_of(bf16, a->x, row, a->x_row);
        const void *gate = a->gate == 0 ? 0 : row_of(bf16, a->gate, row, a->gate_row);
        const float *restrict old = a->stored + (a->read[row] * a->heads + head) * values;
        float *restrict state = a->stored + (a->written[row] * a->heads + head) * values;
        const float step =
            softplus(rounded(bf16, value_at(bf16, row_of(bf16, a->step, row, a->step_row), head) +
                                       value_at(narrow, a->bias, head)));
        const float decay = expf(-expf(value_at(narrow, a->log_rate, head)) * step);
        const float skip = value_at(narrow, a->skip, head);
        for (int64_t n = 0; n < a->width; n++) {
            b[n] = step * value_at(bf16, row_of(bf16, a->b, row, a->b_row), group + n);
            c[n] = value_at(bf16, row_of(bf16, a->c, row, a->c_row), group + n);
        }
        for (int64_t p = 0; p < a->size; p++, old += a->width, state += a->width) {
            const int64_t at = head * a->size + p;
            const float own = value_at(bf16, x, at);
            float sums[LANES] = {0}, y = 0.0f;
            for (int64_t n = 0; n < whole; n += LANES)
                for (int l = 0; l < LANES; l++) {
                    const float s = old[n + l] * decay + own * b[n + l];
                    state[n + l] = s;
                    sums[l] += s * c[n + l];
                }
            for (int64_t n = whole; n < a->width; n++) {
                const float s = old[n] * decay + own * b[n];
                state[n] = s;
                sums[n - whole] += s * c[n];
            }
            for (int l = 0; l < LANES; l++) y += sums[l];
            y += own * skip;
            if (gate != 0) {
                const float z = value_at(bf16, gate, at);
                y *= z * sigmoid(z);
            }
            put(bf16, a->out, row * a->heads * a->size + at, y);
        }
    }
}

/* scale * x / sqrt(sum(x^2) + epsilon). */
INLINE void to_length(const int bf16, const void *from, int64_t first, int64_t size, float epsilon,
                      float scale, float *to) {
    const int64_t whole = size / LANES * LANES;
    float squares[LANES] = {0}, total = 0.0f;
    for (int64_t i = 0; i < size; i++) to[i] = value_at(bf16, from, first + i);
    for (int64_t i = 0; i < whole; i += LANES)
        for (int l = 0; l < LANES; l++) squares[l] += to[i + l] * to[i + l];
    for (int64_t i = whole; i < size; i++) squares[i - whole] += to[i] * to[i];
    for (int l = 0; l < LANES; l++) total += squares[l];
    scale /= sqrtf(total + epsilon);
    for (int64_t i = 0; i < size; i++) to[i] *= scale;
}

/* `count` columns of a head's state, from the first that the pointers are at. Sums lie in
   registers; the columns are read from memory once, and then from the cache. */
INLINE void delta_columns(const int bf16, const int64_t count, const struct state_delta *a,
                          const float *restrict q, const float *restrict k, float decay, float b,
                          const float *restrict old, float *restrict state, const void *x,
                          int64_t v, int64_t out) {
    float sums[COLUMNS] = {0}, outs[COLUMNS] = {0};
    for (int64_t i = 0; i < a->size; i++)
        for (int64_t l = 0; l < count; l++) sums[l] += old[i * a->width + l] * k[i];
    for (int64_t l = 0; l < count; l++)
        sums[l] = (value_at(bf16, x, v + l) - sums[l] * decay) * b;
    for (int64_t i = 0; i < a->size; i++)
        for (int64_t l = 0; l < count; l++) {
            const float s = old[i * a->width + l] * decay + k[i] * sums[l];
            state[i * a->width + l] = s;
            outs[l] += s * q[i];
        }
    for (int64_t l = 0; l < count; l++) put(bf16, a->out, out + l, outs[l]);
}

/* Items are heads of a row. */
INLINE void deltas(const int bf16, const struct state_delta *a, int64_t from, int64_t to) {
    const int64_t values = a->size * a->width, share = a->heads / a->groups;
    const int64_t keys = a->groups * a->size;
    const int narrow = a->narrow != 0;
    float q[MOST_WIDTH], k[MOST_WIDTH];
    for (int64_t item = from; item < to; item++) {
        const int64_t row = item / a->heads, head = item % a->heads, group = head / share;
        const void *x = row_of(bf16, a->x, row, a->x_row);
        const float own = value_at(bf16, row_of(bf16, a->step, row, a->step_row),
                                   group * a->step_group + head % share);
        const float strength = value_at(bf16, row_of(bf16, a->strength, row, a->strength_row),
                                        group * a->strength_group + head % share);
        const float step = softplus(own + value_at(narrow, a->bias, head));
        const float decay = expf(-expf(value_at(narrow, a->log_rate, head)) * step);
        const float b = rounded(bf16, sigmoid(strength)) * a->most;
        const float *old = a->stored + (a->read[row] * a->heads + head) * values;
        float *state = a->stored + (a->written[row] * a->heads + head) * values;
        const int64_t v = 2 * keys + head * a->width, out = item * a->width;
        to_length(bf16, x, group * a->size, a->size, a->epsilon, 1.0f / sqrtf((float)a->size), q);
        to_length(bf16, x, keys + group * a->size, a->size, a->epsilon, 1.0f, k);
        int64_t l = 0;
        for (; l + COLUMNS <= a->width; l += COLUMNS)
            delta_columns(bf16, COLUMNS, a, q, k, decay, b, old + l, state + l, x, v + l, out + l);
        if (l < a->width)
            delta_columns(bf16, a->width - l, a, q, k, decay, b, old + l, state + l, x, v + l,
                          out + l);
    }
}

LOOPS(windows_float, windows(0, a, from, to))
LOOPS(windows_bf16, windows(1, a, from, to))
LOOPS(spaces_float, spaces(0, a, from, to))
LOOPS(spaces_bf16, spaces(1, a, from, to))
LOOPS(deltas_float, deltas(0, a, from, to))
LOOPS(deltas_bf16, deltas(1, a, from, to))

/* most: caps the instructions (3, 2, 0), for tests. */
void veneer_state_window(struct state_window *a, int bf16, int most) {
    const int own = veneer_level(), level = most < own ? most : own;
    veneer_parallel(bf16 ? LOOP_OF(windows_bf16, level) : LOOP_OF(windows_float, level), a,
                    a->rows * ((a->channels + RUN - 1) / RUN), 64);
}

void veneer_state_space(struct state_space *a, int bf16, int most) {
    const int own = veneer_level(), level = most < own ? most : own;
    veneer_parallel(bf16 ? LOOP_OF(spaces_bf16, level) : LOOP_OF(spaces_float, level), a,
                    a->rows * a->heads, 4);
}

void veneer_state_delta(struct state_delta *a, int bf16, int most) {
    const int own = veneer_level(), level = most < own ? most : own;
    veneer_parallel(bf16 ? LOOP_OF(deltas_bf16, level) : LOOP_OF(deltas_float, level), a,
                    a->rows * a->heads, 4);
}
