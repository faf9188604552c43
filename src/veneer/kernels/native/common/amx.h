/* bf16 products on AMX tiles: what bf16.h's bf16_product takes where veneer_has_amx() says so. A
   tile of B is 16 rows of pairs and 16 columns, as B lies; a tile of A 16 rows and 16 pairs. Each
   value of C is summed over the pairs in their order, 16 by 16, whichever rows and columns are
   computed beside it. */
#ifndef VENEER_AMX_H
#define VENEER_AMX_H

#include "across.h"

#if defined(__x86_64__) && defined(__linux__)
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define VENEER_AMX_COMPILED
#endif
#endif

#if defined(VENEER_AMX_COMPILED)
#include <immintrin.h>
#include <stdint.h>

#define VENEER_AMX                                                                                 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define VENEER_AMX_INLINE static inline __attribute__((always_inline)) VENEER_AMX

/* What _tile_loadconfig reads: palette 1, then bytes of a row and rows for each tile. */
struct tiles {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* Tiles 0 to 3: sums of m rows; 4, 5: of A and B, 16 pairs; 6, 7: the same of the last `rest`
 * pairs. Clears all. */
VENEER_AMX_INLINE void amx_shapes(int64_t m, int64_t rest) {
    const uint8_t rows = (uint8_t)m, pairs = (uint8_t)(rest ? rest : 16);
    const struct tiles shapes = {1,
                                 0,
                                 {0},
                                 {64, 64, 64, 64, 64, 64, (uint16_t)(4 * pairs), 64},
                                 {rows, rows, rows, rows, rows, 16, rows, pairs}};
    __asm__ volatile("" ::: "memory"); /* the instruction's wrapper does not say what it reads */
    _tile_loadconfig(&shapes);
}

/* What is done for each of T sums: tiles are named by literals. */
#define AMX_EACH(DO)                                                                               \
    do {                                                                                           \
        DO(0);                                                                                     \
        if (T > 1) {                                                                               \
            DO(1);                                                                                 \
        }                                                                                          \
        if (T > 2) {                                                                               \
            DO(2);                                                                                 \
        }                                                                                          \
        if (T > 3) {                                                                               \
            DO(3);                                                                                 \
        }                                                                                          \
    } while (0)

/* T tiles of C, below each other or side by side; C [+]= A B over K2 pairs. Shapes are set. */
VENEER_AMX_INLINE void amx_tiles(const int T, const int below, const uint32_t *A, int64_t am,
                                 const uint32_t *B, int64_t ldb, float *C, int64_t ldc, int64_t K2,
                                 int add) {
    const int64_t next_a = below ? 16 * am : 0, next_b = below ? 0 : 16,
                  next_c = below ? 16 * ldc : 16;
#define AMX_LOAD(i) _tile_loadd(i, C + i * next_c, 4 * ldc)
#define AMX_ZERO(i) _tile_zero(i)
#define AMX_STORE(i) _tile_stored(i, C + i * next_c, 4 * ldc)
#define AMX_STEP(i)                                                                                \
    if (below || i == 0) _tile_loadd(4, A + i * next_a + k, 4 * am);                               \
    if (!below || i == 0) _tile_loadd(5, B + k * ldb + i * next_b, 4 * ldb);                       \
    _tile_dpbf16ps(i, 4, 5)
#define AMX_LAST(i)                                                                                \
    if (below || i == 0) _tile_loadd(6, A + i * next_a + k, 4 * am);                               \
    if (!below || i == 0) _tile_loadd(7, B + k * ldb + i * next_b, 4 * ldb);                       \
    _tile_dpbf16ps(i, 6, 7)
    if (add) AMX_EACH(AMX_LOAD);
    else AMX_EACH(AMX_ZERO);
    int64_t k = 0;
    for (; k + 16 <= K2; k += 16) AMX_EACH(AMX_STEP);
    if (k < K2) AMX_EACH(AMX_LAST);
    AMX_EACH(AMX_STORE);
}

/* C (M, N) [+]= A B, A's pairs next to each other in a row; the shapes are those of M % 16 rows
 * where M < 16. */
VENEER_AMX_INLINE void amx_rows(const uint32_t *A, int64_t am, const uint32_t *B, int64_t ldb,
                                float *C, int64_t ldc, int64_t M, int64_t N, int64_t K2, int add) {
    for (int64_t n = 0; n < N; n += 64) {
        const int64_t wide = (N - n) / 16;
        for (int64_t m = 0; m < M;) {
            const uint32_t *a = A + m * am;
            float *c = C + m * ldc + n;
            if (wide >= 4) amx_tiles(4, 0, a, am, B + n, ldb, c, ldc, K2, add), m += 16;
            else if (wide == 3) amx_tiles(3, 0, a, am, B + n, ldb, c, ldc, K2, add), m += 16;
            else if (wide == 2) amx_tiles(2, 0, a, am, B + n, ldb, c, ldc, K2, add), m += 16;
            else if (M - m >= 48) /* one chain of sums would wait for itself */
                amx_tiles(3, 1, a, am, B + n, ldb, c, ldc, K2, add), m += 48;
            else if (M - m >= 32) amx_tiles(2, 1, a, am, B + n, ldb, c, ldc, K2, add), m += 32;
            else amx_tiles(1, 0, a, am, B + n, ldb, c, ldc, K2, add), m += 16;
        }
    }
}

/* As bf16_product; M and N as there. */
static VENEER_AMX __attribute__((noinline, unused)) void
amx_product(const uint32_t *A, int64_t am, int64_t ak, const uint32_t *B, int64_t ldb, float *C,
            int64_t ldc, int64_t M, int64_t N, int64_t K2, int add) {
    const int64_t full = M / 16 * 16;
    if (ak == 1) {
        if (full) {
            amx_shapes(16, K2 % 16);
            amx_rows(A, am, B, ldb, C, ldc, full, N, K2, add);
        }
        if (full < M) {
            amx_shapes(M - full, K2 % 16);
            amx_rows(A + full * am, am, B, ldb, C + full * ldc, ldc, M - full, N, K2, add);
        }
    } else { /* am is 1, M a multiple of 16 */
        uint32_t turned[16 * 16];
        for (int64_t k = 0; k < K2; k += 16) {
            const int64_t pairs = K2 - k < 16 ? K2 - k : 16;
            if (k == 0 || pairs < 16) amx_shapes(16, pairs % 16);
            for (int64_t m = 0; m < M; m += 16) {
                words_across(A + m + k * ak, ak, pairs, turned);
                __asm__ volatile("" ::: "memory");
                amx_rows(turned, 16, B + k * ldb, ldb, C + m * ldc, ldc, 16, N, pairs,
                         add || k > 0);
            }
        }
    }
    _tile_release();
    __asm__ volatile("" ::: "memory");
}

#endif
#endif
