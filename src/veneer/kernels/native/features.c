/* Which instructions this processor has: decided when called, never when compiled. */

/* 3: AVX-512 with the 16-bit and byte permutes; 2: AVX2 with FMA; 0: neither. */
int veneer_level(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return 3;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 2;
#endif
    return 0;
}

/* 1 where the processor multiplies bf16 pairs itself. */
int veneer_has_bf16(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

/* 1 where it picks bytes out of 128 with one instruction (VBMI). */
int veneer_has_byte_permutes(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vbmi") != 0;
#else
    return 0;
#endif
}
