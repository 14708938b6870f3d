/* Dense weights with AVX-512: 32 rows in the lanes of two registers. */
/* Some of these processors convert to bfloat16 in one instruction; the others never reach it. */
#define TARGET ARB_TARGET_AVX512BF16

#include "linear_avx512.h"

#ifdef ARB_X86

enum { LANES_OF_VECTOR = 16 };
typedef __m512 vector;
typedef __m512i words;
typedef struct {
    __mmask16 mask[2]; /* of each part */
} row_set;

#include "linear_decode.h"

enum { CONVERTED_BFLOAT16 = -1 }; /* beside the types of layer.h: bfloat16 by that instruction */

INLINE row_set first_rows(int64_t count) { return (row_set){{first_lanes(count), first_lanes(count - 16)}}; }

INLINE void load_parameters(const void *values, int64_t row, int type, float unit, row_set rows, vector to[PARTS]) {
    for (int p = 0; p < PARTS; p++)
        to[p] = _mm512_mul_ps(load(values, row + 16 * p, type, rows.mask[p]), _mm512_set1_ps(unit));
}

INLINE void load_plane(const uint32_t *plane, int64_t n, int word, int plane_words, int shift, row_set rows, words to[PARTS]) {
    for (int p = 0; p < PARTS; p++) to[p] = load_bits(plane + 16 * p, n, word, plane_words, shift, rows.mask[p]);
}

INLINE void load_columns(const void *scales, int64_t column, int64_t count, int type, float to[32]) {
    const __m512 unit = _mm512_set1_ps(type == ARB_INT8 ? 1.0f / 127.0f : 1.0f);
    for (int i = 0; i < 32; i += 16)
        _mm512_storeu_ps(to + i, _mm512_mul_ps(load(scales, column + i, type, first_lanes(count - i)), unit));
}

INLINE vector value_of(const decode_state *state, int bit, int p, int grouped, int has_mean) {
    const __m512i top = _mm512_set1_epi32((int32_t)0x80000000);
    __m512 value = _mm512_mul_ps(state->scale[0][p], _mm512_set1_ps(state->by[0][bit]));
    __mmask16 large = 0;
    if (grouped) {
        large = _mm512_test_epi32_mask(state->groups[p], _mm512_set1_epi32((int32_t)(1u << bit)));
        value = _mm512_mask_mul_ps(value, large, state->scale[1][p], _mm512_set1_ps(state->by[1][bit]));
    }
    __m512i sign = _mm512_sll_epi32(state->signs[p], _mm_cvtsi32_si128(31 - bit));
    /* Flip the sign where the bit is clear: value ^ (~sign & top). */
    value = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(value), sign, top, 0xd2));
    if (!has_mean) return value;
    return _mm512_add_ps(value, grouped ? _mm512_mask_mov_ps(state->mean[0][p], large, state->mean[1][p]) : state->mean[0][p]);
}

INLINE vector sum_of(vector a, vector b) { return _mm512_add_ps(a, b); }

/* As arb_round_bfloat16. */
INLINE __m256i round_bfloat16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

INLINE void store_column(const vector value[PARTS], row_set rows, void *out, int64_t at, int type) {
    if (type == CONVERTED_BFLOAT16) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]);
        _mm512_mask_storeu_epi16((uint16_t *)out + at, (__mmask32)rows.mask[1] << 16 | rows.mask[0], both);
        return;
    }
    for (int p = 0; p < PARTS; p++)
        if (type == ARB_BFLOAT16)
            _mm256_mask_storeu_epi16((uint16_t *)out + at + 16 * p, rows.mask[p], round_bfloat16(value[p]));
        else
            _mm512_mask_storeu_ps((float *)out + at + 16 * p, rows.mask[p], value[p]);
}

TARGET void arb_decode_avx512(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block, int64_t start,
                              int64_t stop, void *out, int type) {
    if (type == ARB_BFLOAT16 && __builtin_cpu_supports("avx512bf16"))
        decode_typed(layer, plan, order, block, start, stop, out, CONVERTED_BFLOAT16);
    else if (type == ARB_BFLOAT16)
        decode_typed(layer, plan, order, block, start, stop, out, ARB_BFLOAT16);
    else
        decode_typed(layer, plan, order, block, start, stop, out, ARB_FLOAT32);
}
#endif
