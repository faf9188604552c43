/* Which instructions this processor has: decided when called, never when compiled. */
#include "amx.h"

#if defined(VENEER_AMX_COMPILED)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if !defined(VENEER_SOURCES)
#define VENEER_SOURCES ""
#endif

/* The digest of the C sources that this library was built from (kernels/sources.py). */
const char *veneer_sources(void) { return VENEER_SOURCES; }

/* 5: every one; 4: no tiles; 3: AVX-512 without bf16 products and byte permutes; 2: AVX2 with FMA;
 * 0: plain C. */
static int most = 5;

/* Use no more than this level, whatever the processor has (bindings/library.py: MAX_ISA). */
void veneer_limit(int level) { most = level; }

/* 3: AVX-512 with the 16-bit and byte permutes; 2: AVX2 with FMA; 0: neither. */
int veneer_level(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (most >= 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 3;
    if (most >= 2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 2;
#endif
    return 0;
}

/* 1 where four floats or more are multiplied and added in one instruction: AVX2 with FMA, NEON. */
int veneer_has_vectors(void) {
#if defined(__aarch64__)
    return most >= 2;
#else
    return veneer_level() >= 2;
#endif
}

/* 1 on ARM where the processor multiplies bf16 pairs itself (BFDOT). */
int veneer_has_bfdot(void) {
#if defined(__aarch64__) && defined(__linux__)
    enum { BF16_PAIRS = 1 << 14 }; /* HWCAP2_BF16 */
    return most >= 4 && (getauxval(AT_HWCAP2) & BF16_PAIRS) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return most >= 4 && !sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, NULL, 0) && found;
#else
    return 0;
#endif
}

/* 1 on x86 where the processor multiplies bf16 pairs itself. */
int veneer_has_bf16(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return most >= 4 && veneer_level() == 3 && __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

/* 1 where it picks bytes out of 128 with one instruction (VBMI). */
int veneer_has_byte_permutes(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return most >= 4 && __builtin_cpu_supports("avx512vbmi") != 0;
#else
    return 0;
#endif
}

#if defined(VENEER_AMX_COMPILED)
/* Whether the processor has tiles and bf16 products of them, the system keeps their registers (bits
   17 and 18 of XCR0), and this process may use them: Linux gives the 8 KiB that a thread's tiles
   take only to those that ask. */
static int ask_for_tiles(void) {
#if defined(VENEER_TILES_IN_C) /* by a test */
    return veneer_has_bf16();
#endif
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d, low, high;
    if (!veneer_has_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) ||
        !(d >> 22 & 1))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}
#endif

/* 1 where bf16 products are made of tiles (AMX). The system is asked once. */
int veneer_has_amx(void) {
#if defined(VENEER_AMX_COMPILED)
    static int found = -1;
    if (most < 5) return 0;
    int known = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (known < 0) {
        known = ask_for_tiles();
        __atomic_store_n(&found, known, __ATOMIC_RELAXED);
    }
    return known;
#else
    return 0;
#endif
}
