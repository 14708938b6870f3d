/* Which instruction set this processor and its operating system offer: entry point arb_cpu_isa. */
#include "native.h"

ARB_EXPORT int arb_cpu_isa(void) {
#ifdef ARB_X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                 __builtin_cpu_supports("avx512vnni");
    return avx512 ? ARB_AVX512 : avx2 ? ARB_AVX2 : ARB_PLAIN;
#else
    return ARB_PLAIN;
#endif
}
