/* What every C source of the library shares. */
#ifndef ARB_HF_NATIVE_H
#define ARB_HF_NATIVE_H

#if defined(_WIN32)
#define ARB_EXPORT __declspec(dllexport)
#else
#define ARB_EXPORT __attribute__((visibility("default")))
#endif

/* Instruction sets, in rising order; arb_hf/native.py knows the same numbers. */
enum { ARB_PLAIN = 0, ARB_AVX2 = 1, ARB_AVX512 = 2 };

#if defined(__x86_64__)
#define ARB_X86 1
/* Functions carry their instruction set themselves, so that one library holds all of them and runs anywhere. */
#define ARB_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define ARB_AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c"
#define ARB_TARGET_AVX512 __attribute__((target(ARB_AVX512_FEATURES)))
#define ARB_TARGET_AVX512BF16 __attribute__((target(ARB_AVX512_FEATURES ",avx512bf16")))
#endif

#endif
