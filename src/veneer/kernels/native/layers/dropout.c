/* Dropout by a hash of row and column: kernels/dense/dropout.py says what is computed and is equal
   to the bit. One pass, the mask never stored. Written in plain C that compilers turn into vectors,
   for each set of instructions. */
#include "bits.h"
#include "parallel.h"

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

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((
    target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"))) static void
drop_avx512(void *a, int64_t from, int64_t to) {
    drop(a, from, to);
}
__attribute__((target("avx2,fma"))) static void drop_avx2(void *a, int64_t from, int64_t to) {
    drop(a, from, to);
}
#endif
static void drop_plain(void *a, int64_t from, int64_t to) { drop(a, from, to); }

int veneer_level(void);

/* out (count, width) of x, both contiguous; they may be the same. */
void veneer_dropout(struct dropout *a, int64_t count) {
    veneer_body body = drop_plain;
#if defined(__x86_64__) && defined(__GNUC__)
    int level = veneer_level();
    body = level >= 3 ? drop_avx512 : level >= 2 ? drop_avx2 : drop_plain;
#endif
    veneer_parallel(body, a, count, 1 + (1 << 14) / (a->width + 1));
}
