/* GGUF blocks to numbers. gguf_rows.h holds the code, written once in the compiler's vector
   types; it is compiled here for each set of instructions and chosen when called. The products of a scale and a code
   are exact in float32 and every type is rounded at most once before it becomes the output type, so all of them give
   the same bits as the plain reference in kernels/gguf.py.
   Layout of the blocks: ggml's ggml-common.h and quantize_row_*_ref, https://github.com/ggml-org/ggml */
#include "parallel.h"
#include <string.h>


enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 }; /* ggml's numbers */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct format {
    int size, bytes; /* values and bytes of a block */
};

static struct format format_of(int kind) {
    switch (kind) {
    case Q4_0: return (struct format){32, 18};
    case Q4_1: return (struct format){32, 20};
    case Q5_0: return (struct format){32, 22};
    case Q5_1: return (struct format){32, 24};
    case Q8_0: return (struct format){32, 34};
    case Q4_K: return (struct format){256, 144};
    case Q5_K: return (struct format){256, 176};
    case Q6_K: return (struct format){256, 210};
    default: return (struct format){0, 0};
    }
}

struct rows {
    int kind, type;
    const uint8_t *blocks;
    int64_t columns;
    void *out; /* (rows, columns) of `type` */
};

typedef int8_t b16v __attribute__((vector_size(16)));
typedef uint8_t c16v __attribute__((vector_size(16)));

static inline uint16_t load16(const uint8_t *p) {
    uint16_t value;
    memcpy(&value, p, 2);
    return value;
}

/* fp16 to fp32, exact: https://github.com/Maratyszcza/FP16 */
static inline float half(const uint8_t *p) {
    uint32_t w = (uint32_t)load16(p) << 16, sign = w & 0x80000000u, twice = w + w, bits;
    float normal, small, value;
    uint32_t shifted = (twice >> 4) + (0xE0u << 23), low = (twice >> 17) | (126u << 23);
    memcpy(&normal, &shifted, 4);
    memcpy(&small, &low, 4);
    value = twice < (1u << 27) ? small - 0.5f : normal * 0x1.0p-112f;
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define LEVEL 3
#define W 16
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#include "gguf_rows.h"
#undef NAME
#undef TARGET
#undef LEVEL
#undef W
#define LEVEL 2
#define W 8
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "gguf_rows.h"
#undef NAME
#undef TARGET
#undef LEVEL
#undef W
#endif
#define LEVEL 0
#define W 4
#define NAME(x) x##_plain
#define TARGET
#include "gguf_rows.h"
#undef NAME
#undef TARGET
#undef LEVEL
#undef W

int veneer_level(void);

static int chosen(int most) {
    int level = veneer_level();
    return most < level ? most : level;
}

#if defined(__x86_64__) && defined(__GNUC__)
#define PICK(function, level) (level >= 3 ? function##_avx512 : level >= 2 ? function##_avx2 : function##_plain)
#else
#define PICK(function, level) ((void)level, function##_plain)
#endif

/* out (rows, columns) of `type`, contiguous. `most` caps the instructions (3, 2, 0), for tests. 0, or -1: unknown kind. */
int veneer_gguf_dequantise(int kind, const uint8_t *blocks, int64_t rows, int64_t columns, void *out, int type, int most) {
    if (format_of(kind).size == 0 || columns % format_of(kind).size) return -1;
    struct rows call = {kind, type, blocks, columns, out};
    int level = chosen(most);
    veneer_parallel(PICK(dequantise, level), &call, rows, 1 + (1 << 16) / (columns + 1));
    return 0;
}

/* Rows [first, first + rows) into out; kind and columns as in a valid call of veneer_gguf_dequantise. */
void gguf_decode(int kind, const uint8_t *blocks, int64_t first, int64_t rows, int64_t columns, void *out, int type, int most) {
    const struct format format = format_of(kind);
    struct rows call = {kind, type, blocks + first * (columns / format.size * format.bytes), columns, out};
    const int level = chosen(most);
    PICK(dequantise, level)(&call, 0, rows);
}
