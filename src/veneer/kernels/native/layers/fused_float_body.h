/* Included by fused_float.c once for each set of instructions, behind float_vectors.h. */

/* The first `count` of a register's values, zeros behind. */
INLINE NAME(fv) NAME(first)(const float *from, int64_t count) {
    NAME(fv) x = {};
    if (count >= W) memcpy(&x, from, sizeof x);
    else memcpy(&x, from, (size_t)count * sizeof(float));
    return x;
}

INLINE void NAME(put)(float *to, NAME(fv) x, int64_t count) {
    if (count >= W) memcpy(to, &x, sizeof x);
    else memcpy(to, &x, (size_t)count * sizeof(float));
}

static TARGET void NAME(norm_forward)(void *arguments, int64_t from, int64_t to) {
    const struct norm *a = arguments;
    for (int64_t row = from; row < to; row++) {
        const float *x = a->x + row * a->width;
        NAME(fv) squares = {};
        for (int64_t i = 0; i < a->width; i += W) {
            const NAME(fv) v = NAME(first)(x + i, a->width - i);
            squares += v * v;
        }
        const float scale = 1.0f / sqrtf(NAME(sum)(squares) / (float)a->width + a->epsilon);
        a->scale[row] = scale;
        for (int64_t i = 0; i < a->width; i += W) {
            const int64_t left = a->width - i;
            NAME(put)(a->out + row * a->width + i,
                      NAME(first)(x + i, left) * scale *
                          (NAME(first)(a->weight + i, left) + a->offset),
                      left);
        }
    }
}

static TARGET void NAME(norm_backward)(void *arguments, int64_t from, int64_t to) {
    const struct norm *a = arguments;
    for (int64_t row = from; row < to; row++) {
        const float *x = a->x + row * a->width, *g = a->grad + row * a->width,
                    scale = a->scale[row];
        NAME(fv) dot = {};
        for (int64_t i = 0; i < a->width; i += W) {
            const int64_t left = a->width - i;
            dot += NAME(first)(g + i, left) * (NAME(first)(a->weight + i, left) + a->offset) *
                   NAME(first)(x + i, left);
        }
        const float mean = NAME(sum)(dot) / (float)a->width * scale * scale;
        for (int64_t i = 0; i < a->width; i += W) {
            const int64_t left = a->width - i;
            const NAME(fv) inner =
                NAME(first)(g + i, left) * (NAME(first)(a->weight + i, left) + a->offset);
            NAME(put)(a->out + row * a->width + i,
                      (inner - NAME(first)(x + i, left) * mean) * scale, left);
        }
    }
}

INLINE NAME(fv) NAME(sigmoid)(NAME(fv) x) {
    const NAME(iv) negative = x < 0.0f;
    const NAME(fv) below = (NAME(fv))((NAME(iv))x | INT32_MIN); /* -|x| */
    const NAME(fv) e = NAME(exp)(below), one = NAME(all)(1.0f);
    const NAME(fv) above = (NAME(fv))(((NAME(iv))e & negative) | ((NAME(iv))one & ~negative));
    return above / (one + e);
}

INLINE NAME(fv) NAME(within)(NAME(fv) x) {
    const NAME(iv) above = x > GELU_MOST, below = x < -GELU_MOST;
    return (NAME(fv))(((NAME(iv))x & ~(above | below)) | ((NAME(iv))NAME(all)(GELU_MOST) & above) |
                      ((NAME(iv))NAME(all)(-GELU_MOST) & below));
}

/* Of GELU, as in fused.h: the argument of its sigmoid, and the gate times the slope of that. */
INLINE NAME(fv) NAME(gelu_place)(NAME(fv) gate) {
    const NAME(fv) x = NAME(within)(gate);
    return x * (x * x * GELU_CUBIC + GELU_LINEAR);
}

INLINE NAME(fv) NAME(gelu_run)(NAME(fv) gate) {
    const NAME(fv) x = NAME(within)(gate);
    return x * (x * x * (3.0f * GELU_CUBIC) + GELU_LINEAR);
}

/* Items are runs of 16 values. */
#define GATES(name, PLACE, RUN)                                                                    \
    static TARGET void NAME(name##_forward)(void *arguments, int64_t from, int64_t to) {           \
        const struct gate *a = arguments;                                                          \
        for (int64_t i = from * 16; i < to * 16; i += W) {                                         \
            const NAME(fv) gate = NAME(load)(a->gate + i), place = PLACE(gate);                    \
            NAME(store)(a->out + i, gate * NAME(sigmoid)(place) * NAME(load)(a->up + i));          \
        }                                                                                          \
    }                                                                                              \
    static TARGET void NAME(name##_backward)(void *arguments, int64_t from, int64_t to) {          \
        const struct gate *a = arguments;                                                          \
        for (int64_t i = from * 16; i < to * 16; i += W) {                                         \
            const NAME(fv) gate = NAME(load)(a->gate + i), g = NAME(load)(a->grad + i),            \
                           place = PLACE(gate), run = RUN(gate), s = NAME(sigmoid)(place);         \
            NAME(store)(a->grad_up + i, g * (gate * s));                                           \
            NAME(store)(a->grad_gate + i,                                                          \
                        g * NAME(load)(a->up + i) * (s * (run * (1.0f - s) + 1.0f)));              \
        }                                                                                          \
    }

GATES(silu, , )
GATES(gelu, NAME(gelu_place), NAME(gelu_run))
#undef GATES

/* Each product is rounded before it is added, as torch does. */
static TARGET void NAME(rotary)(void *arguments, int64_t from, int64_t to) {
    const struct rotary *a = arguments;
    const int64_t half = a->turned / 2;
    for (int64_t row = from; row < to; row++) {
        const float *cos = a->cos + row * a->turned, *sin = a->sin + row * a->turned;
        for (int64_t h = 0; h < a->heads; h++) {
            const float *x = a->x + (row * a->heads + h) * a->size;
            float *out = a->out + (row * a->heads + h) * a->size;
            for (int64_t i = 0; !a->neighbours && i < half; i += W) {
                const int64_t n = half - i;
                const NAME(fv) first = NAME(first)(x + i, n), second = NAME(first)(x + half + i, n);
                const NAME(fv) to_first = second * NAME(first)(sin + (a->back ? half : 0) + i, n);
                const NAME(fv) to_second = first * NAME(first)(sin + (a->back ? 0 : half) + i, n);
                const NAME(fv) own_first = first * NAME(first)(cos + i, n),
                               own_second = second * NAME(first)(cos + half + i, n);
                NAME(put)(out + i, a->back ? own_first + to_first : own_first - to_first, n);
                NAME(put)(out + half + i, a->back ? own_second - to_second : own_second + to_second,
                          n);
            }
            for (int64_t i = 0; a->neighbours && i < half; i++) {
                const float first = x[2 * i], second = x[2 * i + 1];
                const float to_first = second * sin[(a->back ? half : 0) + i];
                const float to_second = first * sin[(a->back ? 0 : half) + i];
                const float own_first = first * cos[i], own_second = second * cos[half + i];
                out[2 * i] = a->back ? own_first + to_first : own_first - to_first;
                out[2 * i + 1] = a->back ? own_second - to_second : own_second + to_second;
            }
            for (int64_t i = a->turned; i < a->size; i++) out[i] = x[i];
        }
    }
}

/* A register of logits, -infinity behind the last. */
INLINE NAME(fv) NAME(logits)(const float *from, int64_t count) {
    NAME(fv) z = NAME(all)(-INFINITY);
    memcpy(&z, from, (size_t)(count < W ? count : W) * sizeof(float));
    return z;
}

INLINE NAME(fv) NAME(larger)(NAME(fv) a, NAME(fv) b) {
    const NAME(iv) first = a > b;
    return (NAME(fv))(((NAME(iv))a & first) | ((NAME(iv))b & ~first));
}

static TARGET void NAME(entropy)(void *arguments, int64_t from, int64_t to) {
    const struct entropy *a = arguments;
    const int64_t width = a->vocabulary, whole = width / W * W;
    const int is_capped = a->softcap != 0.0f;
    for (int64_t row = from; row < to; row++) {
        float *z = a->logits + row * width;
        NAME(fv) top = NAME(all)(-INFINITY), sum = {};
        for (int64_t i = 0; is_capped && i < width; i += W)
            NAME(put)(z + i, NAME(tanh)(NAME(first)(z + i, width - i) / a->softcap) * a->softcap,
                      width - i);
        for (int64_t i = 0; i < whole; i += W) top = NAME(larger)(top, NAME(load)(z + i));
        if (whole < width) top = NAME(larger)(top, NAME(logits)(z + whole, width - whole));
        float most = top[0];
        for (int i = 1; i < W; i++) most = top[i] > most ? top[i] : most;
        const float target = z[a->targets[row]], t = is_capped ? target / a->softcap : 0.0f;
        for (int64_t i = 0; i < width; i += W) {
            const int64_t left = width - i;
            const NAME(fv) logits = NAME(logits)(z + i, left), e = NAME(exp)(logits - most),
                           slope = logits / (is_capped ? a->softcap : INFINITY);
            sum += e;
            NAME(put)(z + i, is_capped ? e * (1.0f - slope * slope) : e, left);
        }
        const float total = NAME(sum)(sum);
        a->loss[row] = logf(total) + most - target;
        for (int64_t i = 0; i < width; i += W)
            NAME(put)(z + i, NAME(first)(z + i, width - i) * (1.0f / total), width - i);
        z[a->targets[row]] = (expf(target - most) / total - 1.0f) * (1.0f - t * t);
    }
}

#undef INLINE
#undef NAME
#undef TARGET
#undef W
