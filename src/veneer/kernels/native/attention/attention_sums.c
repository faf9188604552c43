/* Sums of the gradients that attention over packed documents leaves in shares (attention.c,
   attention_float.c): see kernels/bindings/attention_calls.py. Every value is summed in the order
   in which its shares lie, whichever thread does it. */
#include "bits.h"
#include "levels.h"
#include <stddef.h>

/* own (2, splits, rows, width) of keys, then values; more (2, rows, width), or NULL. out_k and
   out_v (rows, width), float32 where `wide`, else bf16. */
struct summed {
    const float *own, *more;
    void *out_k, *out_v;
    int64_t splits, rows, width, wide;
};

enum { SOME = 64 }; /* values at a time */

INLINE void add_row(const struct summed *a, int64_t of, int64_t row) {
    const int64_t next = a->rows * a->width;
    const float *own = a->own + of * a->splits * next + row * a->width;
    const float *more = a->more ? a->more + of * next + row * a->width : NULL;
    for (int64_t c = 0; c < a->width; c += SOME) {
        const int64_t n = a->width - c < SOME ? a->width - c : SOME;
        float sum[SOME];
        for (int64_t i = 0; i < n; i++) sum[i] = own[c + i];
        for (int64_t s = 1; s < a->splits; s++)
            for (int64_t i = 0; i < n; i++) sum[i] += own[s * next + c + i];
        for (int64_t i = 0; more && i < n; i++) sum[i] += more[c + i];
        if (a->wide) {
            memcpy((float *)(of ? a->out_v : a->out_k) + row * a->width + c, sum, (size_t)n * 4);
        } else {
            uint16_t *out = (uint16_t *)(of ? a->out_v : a->out_k) + row * a->width + c;
            for (int64_t i = 0; i < n; i++)
                out[i] = sum[i] == sum[i] ? bf16_of_float(sum[i]) : 0x7FC0;
        }
    }
}

INLINE void add_rows(const struct summed *a, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) add_row(a, 0, row), add_row(a, 1, row);
}

/* held (2, parts, heads, rows, size) -> out (2, rows, heads, size), + what was there where `add`.
 */
struct shared {
    const float *held;
    float *out;
    int64_t parts, heads, rows, size, add;
};

INLINE void share_rows(const struct shared *a, int64_t from, int64_t to) {
    const int64_t next = a->heads * a->rows * a->size;
    for (int64_t of = 0; of < 2; of++)
        for (int64_t row = from; row < to; row++)
            for (int64_t head = 0; head < a->heads; head++) {
                const float *held =
                    a->held + of * a->parts * next + (head * a->rows + row) * a->size;
                float *out = a->out + ((of * a->rows + row) * a->heads + head) * a->size;
                for (int64_t i = 0; !a->add && i < a->size; i++) out[i] = 0;
                for (int64_t p = 0; p < a->parts; p++)
                    for (int64_t i = 0; i < a->size; i++) out[i] += held[p * next + i];
            }
}

LOOPS(summed, add_rows(a, from, to))
LOOPS(shared, share_rows(a, from, to))

void veneer_attention_summed(struct summed *a) {
    veneer_parallel(LOOP_OF(summed, veneer_level()), a, a->rows, 16);
}
void veneer_attention_shared(struct shared *a) {
    veneer_parallel(LOOP_OF(shared, veneer_level()), a, a->rows, 16);
}

struct zeros {
    void *to;
    int64_t bytes;
};

void veneer_zeros(struct zeros *a) {
    if (a->bytes) memset(a->to, 0, (size_t)a->bytes);
}
