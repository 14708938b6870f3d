/* Loads that the AVX-512 sources share; masks say which lanes there are, the others are 0. */
#ifndef ARB_HF_LINEAR_AVX512_H
#define ARB_HF_LINEAR_AVX512_H

#include "linear.h"

#ifdef ARB_X86
#include <immintrin.h>

/* The first `count` of 16 lanes; none if it is negative, all if it is larger. */
INLINE __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

/* 16 values of an activation or scale type as float32; int8 codes as they are. */
INLINE __m512 load(const void *values, int64_t index, int type, __mmask16 mask) {
    switch (type) {
    case ARB_FLOAT16: return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)values + index));
    case ARB_FLOAT32: return _mm512_maskz_loadu_ps(mask, (const float *)values + index);
    case ARB_INT8: return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, (const int8_t *)values + index)));
    default: {
        __m256i bits = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)values + index);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    }
}

/* 32 bits of a plane, as arb_bits, for 16 rows. */
INLINE __m512i load_bits(const uint32_t *plane, int64_t n, int word, int words, int shift, __mmask16 mask) {
    __m512i low = _mm512_maskz_loadu_epi32(mask, plane + word * n);
    if (!shift) return low;
    __m512i high = word + 1 < words ? _mm512_maskz_loadu_epi32(mask, plane + (word + 1) * n) : _mm512_setzero_si512();
    return _mm512_shrdv_epi32(low, high, _mm512_set1_epi32(shift));
}

#endif
#endif
