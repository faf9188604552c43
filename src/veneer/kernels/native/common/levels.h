/* Sets of instructions that a function is compiled for, and the one that runs on a processor. */
#ifndef VENEER_LEVELS_H
#define VENEER_LEVELS_H

#include "parallel.h"

#define AVX2_SET "avx2,fma"
#define AVX512_SET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"
#define FOR_SET(set) __attribute__((target(set)))
#define FOR_AVX2 FOR_SET(AVX2_SET)
#define FOR_AVX512 FOR_SET(AVX512_SET)
#define FOR_AVX512_BF16 FOR_SET(AVX512_SET ",avx512bf16")
#define FOR_BFDOT FOR_SET("arch=armv8.2-a+bf16")

/* One case of a switch, for ladders over numbers of rows that are known when compiled. */
#define CASE(value, ...)                                                                           \
    case value: __VA_ARGS__; break;

int veneer_level(void); /* 3 AVX-512, 2 AVX2, 0 plain C */

/* sum + a * b of four floats: rounded once on 64-bit ARM, where NEON computes it in one
   instruction, else twice. So what is compiled for no set of instructions (its names end in _plain)
   is what runs on ARM, with the registers of NEON. */
#if defined(__aarch64__)
#include <arm_neon.h>
#define FUSED_128(a, b, sum) vfmaq_f32((float32x4_t)(sum), (float32x4_t)(a), (float32x4_t)(b))
#else
#define FUSED_128(a, b, sum) ((sum) + (a) * (b))
#endif

/* LOOPS compiles `loop(..., a, from, to)` for each set, as the body of a parallel loop; LOOP_OF is
   the one for a level. */
#define LOOP(name, target, ...)                                                                    \
    target static void name(void *a, int64_t from, int64_t to) { __VA_ARGS__; }
#if defined(__x86_64__) && defined(__GNUC__)
#define LOOPS(name, ...)                                                                           \
    LOOP(name##_plain, , __VA_ARGS__)                                                              \
    LOOP(name##_avx2, FOR_AVX2, __VA_ARGS__)                                                       \
    LOOP(name##_avx512, FOR_AVX512, __VA_ARGS__)
#define LOOP_OF(name, level)                                                                       \
    ((level) >= 3 ? name##_avx512 : (level) >= 2 ? name##_avx2 : name##_plain)
#else
#define LOOPS(name, ...) LOOP(name##_plain, , __VA_ARGS__)
#define LOOP_OF(name, level) ((void)(level), name##_plain)
#endif

#endif
