/* Dropout by a hash of row and column: kernels/dense/dropout.py says what is computed and is equal
   to the bit. One pass, the mask never stored. Written in plain C that compilers turn into vectors,
   for each set of instructions. */
#include "bits.h"
#include "levels.h"

enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { ROWS = 64, COLUMNS = 64 }; /* of a block: the columns' keys are computed once for its rows */

struct dropout {
    const void *x;
    void *out;
    const int64_t *rows; /* keys below 2^32 */
    int64_t width;
    uint32_t row_key, column_key, threshold;
    float kept; /* 1 - share */
    int type;
};

/* lowbias32, Wellons 2018. */
INLINE uint32_t mix(uint32_t value) {
    value = (value ^ (value >> 16)) * 0x7FEB352Du;
    value = (value ^ (value >> 15)) * 0x846CA68Bu;
    return value ^ (value >> 16);
}

INLINE void drop(const struct dropout *a, int64_t from, int64_t to) {
    uint32_t row[ROWS], column[COLUMNS];
    for (int64_t block = from; block < to; block += ROWS) {
        int64_t rows = to - block < ROWS ? to - block : ROWS;
        for (int64_t r = 0; r < rows; r++) row[r] = mix((uint32_t)a->rows[block + r] + a->row_key);
        for (int64_t start = 0; start < a->width; start += COLUMNS) {
            int64_t columns = a->width - start < COLUMNS ? a->width - start : COLUMNS;
            for (int64_t i = 0; i < COLUMNS; i++)
                column[i] = mix((uint32_t)(start + i) * 0x85EBCA6Bu + a->column_key);
            for (int64_t r = 0; r < rows; r++) {
                int64_t place = (block + r) * a->width + start;
                if (a->type == FLOAT32) {
                    const float *x = (const float *)a->x + place;
                    float *out = (float *)a->out + place;
                    for (int64_t i = 0; i < columns; i++) {
                        float value = x[i] / a->kept;
                        out[i] = mix(row[r] ^ column[i]) >= a->threshold ? value : 0.0f;
                    }
                } else {
                    const uint16_t *x = (const uint16_t *)a->x + place;
                    uint16_t *out = (uint16_t *)a->out + place;
                    for (int64_t i = 0; i < columns; i++) {
                        float wide = float_of_bits((uint32_t)x[i] << 16) / a->kept;
                        uint16_t value = wide == wide ? bf16_of_float(wide) : 0x7FC0;
                        out[i] = mix(row[r] ^ column[i]) >= a->threshold ? value : 0;
                    }
                }
            }
        }
    }
}

LOOPS(drop_rows, drop(a, from, to))

/* out (count, width) of x, both contiguous; they may be the same. */
void veneer_dropout(struct dropout *a, int64_t count) {
    veneer_parallel(LOOP_OF(drop_rows, veneer_level()), a, count, 1 + (1 << 14) / (a->width + 1));
}
