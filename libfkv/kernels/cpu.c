/* SPDX-License-Identifier: Apache-2.0 */
/* What the processor can do, and what the operating system saves of it: CPUID alone is not enough. */
#include "kernels/kernels.h"

#include <stdbool.h>

#if defined(FKV_HAVE_AVX2) || defined(FKV_HAVE_AVX512)
#include <cpuid.h>

static uint64_t xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

fkv_cpu_level fkv_cpu_best_level(void) {
    const uint64_t ymm_state = 0x6, zmm_state = 0xe6;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return FKV_CPU_REFERENCE;
    uint64_t saved = xcr0();
    bool base = (c & bit_AVX) && (c & bit_FMA) && (c & bit_F16C);
    if (!base || (saved & ymm_state) != ymm_state || !__get_cpuid_count(7, 0, &a, &b, &c, &d) ||
        !(b & bit_AVX2))
        return FKV_CPU_REFERENCE;
    fkv_cpu_level level = FKV_CPU_REFERENCE;
#ifdef FKV_HAVE_AVX2
    level = FKV_CPU_AVX2;
#endif
#ifdef FKV_HAVE_AVX512
    const unsigned need = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((b & need) == need && (saved & zmm_state) == zmm_state)
        level = FKV_CPU_AVX512;
#endif
    return level;
}

#ifdef FKV_HAVE_AVX512
bool fkv_cpu_has_avx512_vnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & bit_AVX512VNNI);
}
#endif
#else
fkv_cpu_level fkv_cpu_best_level(void) {
    return FKV_CPU_REFERENCE;
}
#endif
