/* Products in float32 of one to three rows of x with blocks of a .gguf file, decoded in registers
   and never written out: the bits of few_rows.c's with W decoded, whose sums run in the same order.
   gguf_floats_body.h holds the code; it is compiled here for each set of instructions that has a
   way of its own. */
#include "gguf_format.h"
#include "few_rows.h"
#include "packed_rows.h"
#include <stddef.h>

enum { AHEAD = 1 << 12 }; /* bytes: what lies so far behind is asked for, as in few_rows.c */

struct calls {
    const struct packed_rows *const *of;
    int64_t count, row_bytes;
};

INLINE int64_t blocks_of(const struct packed_rows *call) {
    return (call->outs + 3) / 4;
} /* of four rows of W */

#if defined(__x86_64__) && defined(__GNUC__)
#include "totals.h"
#undef INLINE /* bits.h's; from here on for one set of instructions at a time */
#define LEVEL 3
#define W 16
#define NAME(x) x##_avx512
#define TARGET FOR_SET(AVX512_SET ",f16c")
#define FUSED(a, b, sum) (NAME(fv)) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(sum))
#define TOTAL(s) total_512((__m512)(s)[0], (__m512)(s)[1], (__m512)(s)[2], (__m512)(s)[3])
#include "gguf_unpack.h"
#include "gguf_floats_body.h"
#include "gguf_end.h"
#define LEVEL 2
#define W 8
#define NAME(x) x##_avx2
#define TARGET FOR_SET(AVX2_SET ",f16c")
#define FUSED(a, b, sum) (NAME(fv)) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(sum))
#define TOTAL(s) total_256((__m256)(s)[0], (__m256)(s)[1], (__m256)(s)[2], (__m256)(s)[3])
#include "gguf_unpack.h"
#include "gguf_floats_body.h"
#include "gguf_end.h"
#endif

int gguf_float_usable(const struct packed_rows *call, int most) {
    return call->kind >= 0 && call->type == FEW_FP32 && call->rows <= MOST_FLOAT_ROWS &&
           veneer_few_level(FEW_FP32, most) >= 2;
}

void gguf_float_product(const struct packed_rows *const *of, int64_t count, int most) {
#if defined(__x86_64__) && defined(__GNUC__)
    const struct format format = format_of((int)of[0]->kind);
    struct calls calls = {of, count, of[0]->width / format.size * format.bytes};
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; i++) blocks += blocks_of(of[i]);
    const veneer_body body = veneer_few_level(FEW_FP32, most) == 3 ? rows_avx512 : rows_avx2;
    veneer_parallel_dealt(body, &calls, blocks, 1 + ALONE / (4 * of[0]->width), LONG);
#else
    (void)of, (void)count, (void)most;
#endif
}
