/* Rows of int8 codes times a few tokens: entry point arb_int8_linear, for heads of tens of thousands of rows.
 *
 * The time goes into reading the codes, so each is read once for up to TOKENS tokens. A row's sum does not depend on which
 * thread makes it, nor on the tokens beside its own.
 */
#include <stdlib.h>

#include "layer.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef ARB_X86
#include <immintrin.h>
#endif

/* Tokens at a time; columns that are padded with zeros so that no activation is read past the last one. */
enum { TOKENS = 4, PADDING = 16 };

/* Codes times tokens below which another thread costs more than it brings. */
enum { THREAD_WORK = 1 << 18 };

/* sums[t] of one row of codes and `tokens` tokens x [tokens, stride], padded with zeros to a multiple of PADDING. */
typedef void arb_row_function(const int8_t *codes, int64_t width, const float *x, int64_t stride, int tokens, float *sums);

/* LANES partial sums each token, added by halves in the end: the compiler may use vectors, and the order is fixed. */
enum { LANES = 16 };

static float sum_of_lanes(float *lane) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lane[l] += lane[l + half];
    return lane[0];
}

static void row_plain(const int8_t *codes, int64_t width, const float *x, int64_t stride, int tokens, float *sums) {
    for (int t = 0; t < tokens; t++) {
        float lane[LANES] = {0};
        const float *token = x + t * stride;
        int64_t j = 0;
        for (; j + LANES <= width; j += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += (float)codes[j + l] * token[j + l];
        for (; j < width; j++) lane[j % LANES] += (float)codes[j] * token[j];
        sums[t] = sum_of_lanes(lane);
    }
}

#ifdef ARB_X86

/* Eight of up to 8 codes as float32, the others 0. */
ARB_INLINE ARB_TARGET_AVX2 __m256 eight(const int8_t *codes, int64_t count) {
    int64_t some = 0;
    if (count >= 8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
    if (count > 0) memcpy(&some, codes, (size_t)count);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(some)));
}

ARB_INLINE ARB_TARGET_AVX2 void row_of_avx2(const int8_t *codes, int64_t width, const float *x, int64_t stride, int tokens,
                                            float *sums) {
    __m256 sum[TOKENS][2];
    for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = _mm256_setzero_ps();
    for (int64_t j = 0; j < width; j += 16) {
        __m256 low = eight(codes + j, width - j), high = eight(codes + j + 8, width - j - 8);
        for (int t = 0; t < tokens; t++) {
            sum[t][0] = _mm256_fmadd_ps(low, _mm256_loadu_ps(x + t * stride + j), sum[t][0]);
            sum[t][1] = _mm256_fmadd_ps(high, _mm256_loadu_ps(x + t * stride + j + 8), sum[t][1]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        __m256 both = _mm256_add_ps(sum[t][0], sum[t][1]);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        sums[t] = _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
    }
}

ARB_TARGET_AVX2 static void row_avx2(const int8_t *codes, int64_t width, const float *x, int64_t stride, int tokens,
                                     float *sums) {
    switch (tokens) { /* constants, so that the sums stay in registers */
    case 1: row_of_avx2(codes, width, x, stride, 1, sums); break;
    case 2: row_of_avx2(codes, width, x, stride, 2, sums); break;
    case 3: row_of_avx2(codes, width, x, stride, 3, sums); break;
    default: row_of_avx2(codes, width, x, stride, 4, sums);
    }
}

/* Two halves of 32 columns, so that additions do not wait for each other. */
ARB_INLINE ARB_TARGET_AVX512 void row_of_avx512(const int8_t *codes, int64_t width, const float *x, int64_t stride,
                                                int tokens, float *sums) {
    __m512 sum[TOKENS][2];
    for (int t = 0; t < tokens; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    int64_t j = 0;
    for (; j + 32 <= width; j += 32) {
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + j))));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + j + 16))));
        for (int t = 0; t < tokens; t++) {
            sum[t][0] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x + t * stride + j), sum[t][0]);
            sum[t][1] = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + t * stride + j + 16), sum[t][1]);
        }
    }
    for (; j < width; j += 16) {
        __mmask16 mask = width - j >= 16 ? 0xffff : (__mmask16)((1u << (width - j)) - 1);
        __m512 some = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, codes + j)));
        for (int t = 0; t < tokens; t++) sum[t][0] = _mm512_fmadd_ps(some, _mm512_loadu_ps(x + t * stride + j), sum[t][0]);
    }
    for (int t = 0; t < tokens; t++) sums[t] = _mm512_reduce_add_ps(_mm512_add_ps(sum[t][0], sum[t][1]));
}

ARB_TARGET_AVX512 static void row_avx512(const int8_t *codes, int64_t width, const float *x, int64_t stride, int tokens,
                                         float *sums) {
    switch (tokens) {
    case 1: row_of_avx512(codes, width, x, stride, 1, sums); break;
    case 2: row_of_avx512(codes, width, x, stride, 2, sums); break;
    case 3: row_of_avx512(codes, width, x, stride, 3, sums); break;
    default: row_of_avx512(codes, width, x, stride, 4, sums);
    }
}

#endif

static arb_row_function *row_function_of(int isa) {
#ifdef ARB_X86
    if (isa == ARB_AVX512) return row_avx512;
    if (isa == ARB_AVX2) return row_avx2;
#endif
    (void)isa;
    return row_plain;
}

/* y [tokens, rows] = x [tokens, width] @ (codes * row_absmax / 127)^T, both of type x_type and contiguous; codes [rows,
 * width], row_absmax float16 [rows]. The result does not depend on threads. Returns 0, or -1: out of memory. */
ARB_EXPORT int arb_int8_linear(const int8_t *codes, const uint16_t *row_absmax, int64_t rows, int64_t width, const void *x,
                               int x_type, void *y, int64_t tokens, int threads, int isa) {
    arb_row_function *row_function = row_function_of(isa);
    int64_t stride = (width + PADDING - 1) / PADDING * PADDING;
    /* Threads share the rows in tiles of 64: no two of them write to one cache line of y. */
    enum { TILE = 64 };
    int64_t tiles = (rows + TILE - 1) / TILE, useful = rows * width * tokens / THREAD_WORK + 1;
    threads = (int)arb_minimum(threads < 1 ? 1 : threads, arb_minimum(useful, tiles));
    float *padded = NULL;
    if (posix_memalign((void **)&padded, 64, (size_t)(tokens * stride + 1) * sizeof(float))) return -1;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < stride; j++) padded[t * stride + j] = j < width ? arb_load(x, t * width + j, x_type) : 0.0f;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
#endif
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t start = tile * TILE, stop = arb_minimum(start + TILE, rows);
        float results[TOKENS][TILE], sums[TOKENS];
        for (int64_t first = 0; first < tokens; first += TOKENS) {
            int count = (int)arb_minimum(TOKENS, tokens - first);
            for (int64_t row = start; row < stop; row++) {
                row_function(codes + row * width, width, padded + first * stride, stride, count, sums);
                float unit = arb_half_to_float(row_absmax[row]) / 127.0f;
                for (int t = 0; t < count; t++) results[t][row - start] = sums[t] * unit;
            }
            for (int t = 0; t < count; t++) arb_store(y, (first + t) * rows + start, results[t], stop - start, x_type);
        }
    }
    free(padded);
    return 0;
}
