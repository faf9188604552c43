/* bf16 values in quads, as ARM's BFMMLA multiplies them: of 8 lines (rows of x, columns of W), for
   every four values of k, the four of each line. Lines of x and of W give 8 by 8 sums. */
#ifndef VENEER_QUADS_H
#define VENEER_QUADS_H

#if defined(__aarch64__)
#include "few_rows.h"

enum {
    LINES = 8,
    QUADS = 4 * LINES, /* values */
};

INLINE int64_t quads_of(int64_t width) { return (width + 3) / 4; }

/* Lines of `width` values, each one behind the other; NULL stands for zeros, as what is beyond
   `width` does. */
INLINE void lines_to_quads(const uint16_t *const from[LINES], int64_t width, uint16_t *to) {
    int64_t k = 0, whole = 1;
    for (int64_t i = 0; i < LINES; i++) whole &= from[i] != NULL;
    for (; whole && k + 8 <= width; k += 8, to += 2 * QUADS)
        UNROLLED(4, i, 4) {
            const uint64x2_t one = vreinterpretq_u64_u16(vld1q_u16(from[2 * i] + k)),
                             two = vreinterpretq_u64_u16(vld1q_u16(from[2 * i + 1] + k));
            vst1q_u16(to + 8 * i, vreinterpretq_u16_u64(vzip1q_u64(one, two)));
            vst1q_u16(to + QUADS + 8 * i, vreinterpretq_u16_u64(vzip2q_u64(one, two)));
        }
    for (; k < width; k += 4, to += QUADS)
        for (int64_t i = 0; i < LINES; i++)
            for (int64_t j = 0; j < 4; j++)
                to[4 * i + j] = from[i] != NULL && k + j < width ? from[i][k + j] : 0;
}

/* One value of k in a row, of lines side by side: four rows -> the quads of `count` lines. NULL
   stands for zeros, as lines beyond `count` do. */
INLINE void rows_to_quads(const uint16_t *const from[4], int64_t count, uint16_t *to) {
    uint16x8x4_t rows;
    UNROLLED(4, j, 4) {
        uint16_t some[LINES] = {0};
        if (from[j] != NULL && count < LINES) memcpy(some, from[j], (size_t)(2 * count));
        rows.val[j] = vld1q_u16(from[j] != NULL && count >= LINES ? from[j] : some);
    }
    vst4q_u16(to, rows);
}

/* Sums of 8 lines of x by 8 of w over `quads` quads: sums[line of x][columns 0 to 3, 4 to 7]. */
INLINE FOR_BFDOT void multiply_quads(const uint16_t *x, const uint16_t *w, int64_t quads,
                                     f4v (*sums)[2]) {
    float32x4_t own[4][4]; /* of two lines of each: 00, 01, 10, 11 */
    UNROLLED(4, i, 4)
        UNROLLED(4, j, 4) own[i][j] = vdupq_n_f32(0);
    for (; quads > 0; quads--, x += QUADS, w += QUADS) {
        bfloat16x8_t of_x[4], of_w[4];
        UNROLLED(4, i, 4) {
            of_x[i] = vreinterpretq_bf16_u16(vld1q_u16(x + 8 * i));
            of_w[i] = vreinterpretq_bf16_u16(vld1q_u16(w + 8 * i));
        }
        UNROLLED(4, i, 4)
            UNROLLED(4, j, 4) own[i][j] = vbfmmlaq_f32(own[i][j], of_x[i], of_w[j]);
    }
    UNROLLED(4, i, 4)
        UNROLLED(2, j, 2) {
            const float64x2_t one = vreinterpretq_f64_f32(own[i][2 * j]),
                              two = vreinterpretq_f64_f32(own[i][2 * j + 1]);
            sums[2 * i][j] = (f4v)vzip1q_f64(one, two);
            sums[2 * i + 1][j] = (f4v)vzip2q_f64(one, two);
        }
}
#endif
#endif
