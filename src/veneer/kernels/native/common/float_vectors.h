/* Registers of float32, for code that is written once and compiled for each set of instructions:
   NAME(x) gives the functions their names, TARGET their compiler option, W the values of a
   register. */

#define INLINE static inline __attribute__((always_inline)) TARGET

typedef float NAME(fv) __attribute__((vector_size(4 * W)));
typedef int32_t NAME(iv) __attribute__((vector_size(4 * W)));

INLINE NAME(fv) NAME(load)(const float *from) {
    NAME(fv) x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void NAME(store)(float *to, NAME(fv) x) { memcpy(to, &x, sizeof x); }

INLINE NAME(fv) NAME(all)(float x) { return x - (NAME(fv)){}; }

INLINE float NAME(sum)(NAME(fv) x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}

/* e^x for x <= 0, to 2 units in the last place; below -87 what it is there. */
INLINE NAME(fv) NAME(exp)(NAME(fv) x) {
    const NAME(iv) small = x < -87.0f;
    x = (NAME(fv))(((NAME(iv))x & ~small) | ((NAME(iv))NAME(all)(-87.0f) & small));
    NAME(fv) n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    NAME(fv) r = x - n * 0.693359375f + n * 2.12194440e-4f, p = NAME(all)(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (NAME(fv))((__builtin_convertvector(n, NAME(iv)) + 127) << 23);
}

INLINE NAME(fv) NAME(tanh)(NAME(fv) x) {
    const NAME(iv) sign = (NAME(iv))x & (int32_t)0x80000000u;
    const NAME(fv) e = NAME(exp)((NAME(fv))((NAME(iv))x | (int32_t)0x80000000u) * 2.0f);
    return (NAME(fv))((NAME(iv))((1.0f - e) / (1.0f + e)) | sign);
}
