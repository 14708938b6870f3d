/* Loads that the AVX2 sources share; they may be of any length and start anywhere. */
#ifndef ARB_HF_LINEAR_AVX2_H
#define ARB_HF_LINEAR_AVX2_H

#include "linear.h"

#ifdef ARB_X86
#include <immintrin.h>

enum { ROWS = 32 }; /* at a time: four registers of 32-bit words */

/* Eight values of a scale type as float32; int8 codes as they are. */
INLINE __m256 load(const void *values, int64_t index, int type) {
    switch (type) {
    case ARB_FLOAT16: return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)values + index)));
    case ARB_FLOAT32: return _mm256_loadu_ps((const float *)values + index);
    case ARB_INT8: {
        __m128i codes = _mm_loadl_epi64((const __m128i *)((const int8_t *)values + index));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    }
    default: {
        __m128i bits = _mm_loadu_si128((const __m128i *)((const uint16_t *)values + index));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    }
}

/* `count` of up to 8 values, the others 0. */
INLINE __m256 load_some(const void *values, int64_t index, int type, int64_t count) {
    _Alignas(32) char padded[32] = {0};
    if (count >= 8) return load(values, index, type);
    if (count > 0) memcpy(padded, arb_offset(values, index, type), count * arb_size(type));
    return load(padded, 0, type);
}

/* 32 bits of a plane, as arb_bits, for `count` of ROWS rows; the other rows are 0. */
INLINE void load_words(const uint32_t *plane, int64_t n, int word, int words, int shift, int count, __m256i to[4]) {
    uint32_t buffer[2][ROWS];
    const uint32_t *low = plane + word * n, *high = word + 1 < words ? plane + (word + 1) * n : NULL;
    if (count < ROWS) { /* nothing is read past the last row */
        memset(buffer, 0, sizeof buffer);
        memcpy(buffer[0], low, count * sizeof *low);
        if (high && shift) memcpy(buffer[1], high, count * sizeof *high);
        low = buffer[0], high = high ? buffer[1] : NULL;
    }
    for (int i = 0; i < 4; i++) to[i] = _mm256_loadu_si256((const __m256i *)low + i);
    if (!shift) return;
    __m128i right = _mm_cvtsi32_si128(shift), left = _mm_cvtsi32_si128(32 - shift);
    for (int i = 0; i < 4; i++) {
        to[i] = _mm256_srl_epi32(to[i], right);
        if (high) to[i] = _mm256_or_si256(to[i], _mm256_sll_epi32(_mm256_loadu_si256((const __m256i *)high + i), left));
    }
}

#endif
#endif
