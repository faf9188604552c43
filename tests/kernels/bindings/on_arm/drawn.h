/* Numbers for programs that compare compiled kernels with plain C: drawn, read, and counted where
   they are wrong. */
#ifndef VENEER_TEST_DRAWN_H
#define VENEER_TEST_DRAWN_H

#include "few_rows.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

int veneer_has_vectors(void);
int veneer_has_bfdot(void);

static int bad, cases;

static inline float drawn(void) { return (float)rand() / (float)RAND_MAX - 0.5f; }

static inline float value(const void *at, int64_t i, int type) {
    return type == FEW_FP32 ? ((const float *)at)[i]
                            : float_of_bits((uint32_t)((const uint16_t *)at)[i] << 16);
}

/* NaN lies behind them, for what reads too far. */
static inline void *values(int64_t count, int type) {
    const size_t bytes = (size_t)(4 * count + 64);
    float *at = memset(malloc(bytes), 0xff, bytes);
    for (int64_t i = 0; i < count; i++)
        if (type == FEW_FP32) at[i] = drawn();
        else ((uint16_t *)at)[i] = bf16_of_float(drawn());
    return at;
}

/* Counts what is off by more than a rounding of each sum, and in bf16 one of the result. size: the
   sum of all magnitudes. */
static inline void compare(float found, double sum, double size, int type) {
    cases++;
    bad += !(fabs(found - sum) <= size * 1e-6 + (type == FEW_FP32 ? 0 : fabs(sum) / 256));
}

static inline int report(void) {
    printf("%d of %d wrong, NEON %d, BFDOT %d\n", bad, cases, veneer_has_vectors(),
           veneer_has_bfdot());
    return bad != 0;
}

#endif
