/* What every C source of the library shares: export, instruction sets, inlining. It includes nothing.
 *
 * Who needs whom, from the bottom:
 *
 *     native.h                        this file
 *     layer.h, layer.c                a packed layer: number formats, its tensors, how it is cut into sections
 *     linear.h                        what an instruction set provides for the matmul
 *     linear_avx2.h, linear_avx512.h  loads of one instruction set
 *     linear_decode.h                 the shared part of linear_decode_*.c
 *     linear_*.c                      the kernels, a file for each instruction set
 *     matmul.c                        entry points arb_linear and arb_decode
 *
 *     int8.c                          entry point arb_int8_linear; of the files above it needs number formats only
 *
 *     tiles.h                         tiles of rows for the binarizing code, which knows nothing of packed layers
 *     search.c, updates.c, rounding.c its entry points
 *
 *     cpu.c                           entry point arb_cpu_isa
 */
#ifndef ARB_HF_NATIVE_H
#define ARB_HF_NATIVE_H

#if defined(_WIN32)
#define ARB_EXPORT __declspec(dllexport)
#else
#define ARB_EXPORT __attribute__((visibility("default")))
#endif

/* Always inlined: the function is compiled for the instruction set of its caller. */
#define ARB_INLINE static inline __attribute__((always_inline))

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
