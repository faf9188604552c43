/* AMX tiles in plain C, included before each kernel's source (kernels/bindings/test_sanitized.py):
   code for tiles then runs where a processor has none, and the sanitizers see what it loads and
   stores. Shapes that the processor would refuse end the process.

   TDPBF16PS as Intel's manual gives it (volume 2): even and odd values of a row each summed in
   order, then both, then all that was there before; without denormals. It needs AVX-512 for speed
   alone. */
#ifndef TILES_IN_C_H
#define TILES_IN_C_H
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define VENEER_TILES_IN_C
#define NOINLINE __attribute__((noinline, unused)) /* inlined, they take compilers a while */

struct tiles_in_c {
    uint8_t rows[8];
    uint16_t bytes[8];
    uint32_t words[8][16][16];
};
__attribute__((weak)) _Thread_local struct tiles_in_c in_c;

static NOINLINE void tile_must(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "runtime error: tiles: %s\n", what);
    abort();
}

static NOINLINE void tile_loadconfig_in_c(const void *given) {
    const uint8_t *bytes = given;
    tile_must(bytes[0] == 1, "the palette is not 1");
    memset(&in_c, 0, sizeof in_c);
    for (int t = 0; t < 8; t++) {
        memcpy(in_c.bytes + t, bytes + 16 + 2 * t, 2);
        in_c.rows[t] = bytes[48 + t];
        tile_must(in_c.rows[t] <= 16 && in_c.bytes[t] <= 64 &&
                      (in_c.rows[t] == 0) == (in_c.bytes[t] == 0),
                  "a shape");
    }
}

static NOINLINE void tile_loadd_in_c(int t, const void *from, int64_t stride) {
    tile_must(in_c.rows[t] > 0, "loaded without a shape");
    memset(in_c.words[t], 0, sizeof in_c.words[t]);
    for (int r = 0; r < in_c.rows[t]; r++)
        memcpy(in_c.words[t][r], (const char *)from + r * stride, in_c.bytes[t]);
}

static NOINLINE void tile_stored_in_c(int t, void *to, int64_t stride) {
    tile_must(in_c.rows[t] > 0, "stored without a shape");
    for (int r = 0; r < in_c.rows[t]; r++)
        memcpy((char *)to + r * stride, in_c.words[t][r], in_c.bytes[t]);
}

static NOINLINE void tile_zero_in_c(int t) {
    tile_must(in_c.rows[t] > 0, "cleared without a shape");
    memset(in_c.words[t], 0, sizeof in_c.words[t]);
}

__attribute__((target("avx512f"), noinline, unused)) static void tile_dpbf16ps_in_c(int c, int a,
                                                                                    int b) {
    tile_must(in_c.rows[c] == in_c.rows[a] && in_c.bytes[c] == in_c.bytes[b] &&
                  in_c.bytes[a] == 4 * in_c.rows[b],
              "shapes of a product");
    tile_must(c != a && c != b && a != b && in_c.rows[c] > 0 && in_c.rows[b] > 0,
              "tiles of a product");
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040); /* denormals are zeros, and become zeros */
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    for (int m = 0; m < in_c.rows[c]; m++) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < in_c.rows[b]; k++) {
            const __m512i x = _mm512_set1_epi32((int)in_c.words[a][m][k]),
                          w = _mm512_loadu_si512(in_c.words[b][k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                                  _mm512_castsi512_ps(_mm512_and_si512(w, high)), odd);
        }
        _mm512_storeu_ps(in_c.words[c][m], _mm512_add_ps(_mm512_loadu_ps(in_c.words[c][m]),
                                                         _mm512_add_ps(even, odd)));
    }
    _mm_setcsr(before);
}

static NOINLINE void tile_release_in_c(void) { memset(&in_c, 0, sizeof in_c); }

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_loadconfig tile_loadconfig_in_c
#define _tile_loadd tile_loadd_in_c
#define _tile_stream_loadd tile_loadd_in_c
#define _tile_stored tile_stored_in_c
#define _tile_zero tile_zero_in_c
#define _tile_dpbf16ps tile_dpbf16ps_in_c
#define _tile_release tile_release_in_c
#endif
#endif
