/* Dense weights with AVX2: 32 rows in the lanes of four registers. */
#define TARGET ARB_TARGET_AVX2

#include "linear_avx2.h"

#ifdef ARB_X86

enum { LANES_OF_VECTOR = 8 };
typedef __m256 vector;
typedef __m256i words;
typedef int row_set; /* how many there are */

#include "linear_decode.h"

_Static_assert((int)DECODE_ROWS == (int)ROWS, "load_words takes ROWS rows");

INLINE row_set first_rows(int64_t count) { return (int)arb_minimum(count, DECODE_ROWS); }

INLINE void load_parameters(const void *values, int64_t row, int type, float unit, row_set rows, vector to[PARTS]) {
#pragma GCC unroll 1 /* load_some is long, and is inlined for every form of a section */
    for (int p = 0; p < PARTS; p++)
        to[p] = _mm256_mul_ps(load_some(values, row + 8 * p, type, rows - 8 * p), _mm256_set1_ps(unit));
}

INLINE void load_plane(const uint32_t *plane, int64_t n, int word, int plane_words, int shift, row_set rows, words to[PARTS]) {
    load_words(plane, n, word, plane_words, shift, rows, to);
}

INLINE void load_columns(const void *scales, int64_t column, int64_t count, int type, float to[32]) {
    const __m256 unit = _mm256_set1_ps(type == ARB_INT8 ? 1.0f / 127.0f : 1.0f);
    for (int i = 0; i < 32; i += 8)
        _mm256_storeu_ps(to + i, _mm256_mul_ps(load_some(scales, column + i, type, count - i), unit));
}

INLINE vector value_of(const decode_state *state, int bit, int p, int grouped, int has_mean) {
    const __m256 top = _mm256_castsi256_ps(_mm256_set1_epi32((int32_t)0x80000000));
    const __m128i to_top = _mm_cvtsi32_si128(31 - bit);
    __m256 value = _mm256_mul_ps(state->scale[0][p], _mm256_set1_ps(state->by[0][bit])), large = _mm256_setzero_ps();
    if (grouped) { /* a blend looks at each lane's top bit only */
        large = _mm256_castsi256_ps(_mm256_sll_epi32(state->groups[p], to_top));
        value = _mm256_blendv_ps(value, _mm256_mul_ps(state->scale[1][p], _mm256_set1_ps(state->by[1][bit])), large);
    }
    __m256 sign = _mm256_castsi256_ps(_mm256_sll_epi32(state->signs[p], to_top));
    value = _mm256_xor_ps(value, _mm256_andnot_ps(sign, top)); /* flips the sign where the bit is clear */
    if (!has_mean) return value;
    return _mm256_add_ps(value, grouped ? _mm256_blendv_ps(state->mean[0][p], state->mean[1][p], large) : state->mean[0][p]);
}

INLINE vector sum_of(vector a, vector b) { return _mm256_add_ps(a, b); }

/* As arb_round_bfloat16, in the lower half of each lane. */
INLINE __m256i round_bfloat16(__m256 value) {
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

INLINE void store_column(const vector value[PARTS], row_set rows, void *out, int64_t at, int type) {
    _Alignas(32) char buffer[DECODE_ROWS * sizeof(float)];
    const int64_t size = arb_size(type);
    char *to = (char *)out + at * size, *direct = rows == DECODE_ROWS ? to : buffer;
    for (int p = 0; p < PARTS; p += type == ARB_BFLOAT16 ? 2 : 1)
        if (type == ARB_BFLOAT16) { /* packing takes 128-bit lanes in turn: the permutation puts rows back in order */
            __m256i both = _mm256_packus_epi32(round_bfloat16(value[p]), round_bfloat16(value[p + 1]));
            _mm256_storeu_si256((__m256i *)(direct + 16 * p), _mm256_permute4x64_epi64(both, 0xd8));
        } else {
            _mm256_storeu_ps((float *)direct + 8 * p, value[p]);
        }
    if (rows < DECODE_ROWS) memcpy(to, buffer, rows * size);
}

TARGET void arb_decode_avx2(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block, int64_t start,
                            int64_t stop, void *out, int type) {
    if (type == ARB_BFLOAT16)
        decode_typed(layer, plan, order, block, start, stop, out, ARB_BFLOAT16);
    else
        decode_typed(layer, plan, order, block, start, stop, out, ARB_FLOAT32);
}
#endif
