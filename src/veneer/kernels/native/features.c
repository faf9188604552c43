/* Which instructions this processor has: decided when called, never when compiled. */

/* 4: every one; 3: AVX-512 without bf16 products and byte permutes; 2: AVX2 with FMA; 0: plain C. */
static int most = 4;

/* Use no more than this level, whatever the processor has (kernels/native.py: MAX_ISA). */
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

/* 1 where the processor multiplies bf16 pairs itself. */
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
