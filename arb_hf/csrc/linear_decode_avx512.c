/* Tiles of dense weights with AVX-512: a column of 32 rows at a time, the rows in the lanes of two registers. */
#include "linear_avx512.h"

#ifdef ARB_X86

/* Some of these processors convert to bfloat16 in one instruction; the others never reach it. */
#undef INLINE
#undef TARGET
#define TARGET ARB_TARGET_AVX512BF16
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { PARTS = 2 }; /* registers of 16 rows: together they fill a cache line of bfloat16 */
enum { CONVERTED_BFLOAT16 = -1 }; /* beside the types of native.h: bfloat16 by that instruction */

typedef struct {
    __m512 scale[2][PARTS], mean[2][PARTS]; /* of each group */
    float by[2][32];                        /* column scales of a word of columns, of each group */
    __m512i signs[PARTS], groups[PARTS];    /* that word */
} part_state;

INLINE void load_section(const arb_layer *layer, const arb_section *section, int64_t block, int64_t row,
                         const __mmask16 *mask, part_state *state) {
    const int64_t slots = arb_slots(layer);
    for (int group = 0; group < (section->groups ? 2 : 1); group++)
        for (int p = 0; p < PARTS; p++) {
            float unit;
            const void *from = arb_row_parameters(layer, block, section->slot[group], slots, &unit);
            __m512 scale = load(from, row + 16 * p, (int)layer->scale_type, mask[p]);
            state->scale[group][p] = _mm512_mul_ps(scale, _mm512_set1_ps(unit));
            if (section->mean[0] < 0) continue;
            from = arb_row_parameters(layer, block, section->mean[group], slots, &unit);
            __m512 mean = load(from, row + 16 * p, (int)layer->scale_type, mask[p]);
            state->mean[group][p] = _mm512_mul_ps(mean, _mm512_set1_ps(unit));
        }
}

INLINE void load_word(const arb_layer *layer, const arb_section *section, int word, int64_t row, const __mmask16 *mask,
                      part_state *state) {
    const int type = (int)layer->scale_type;
    for (int p = 0; p < PARTS; p++) {
        const uint32_t *signs = section->signs + row + 16 * p, *groups = section->groups + row + 16 * p;
        state->signs[p] = load_bits(signs, layer->rows, word, section->sign_words, section->sign_shift, mask[p]);
        if (section->groups)
            state->groups[p] = load_bits(groups, layer->rows, word, section->group_words, section->group_shift, mask[p]);
    }
    __m512 unit = _mm512_set1_ps(type == ARB_INT8 ? 1.0f / 127.0f : 1.0f);
    for (int group = 0; group < (section->groups ? 2 : 1); group++)
        for (int i = 0; i < 32; i += 16) {
            const void *from = section->scales[group];
            __mmask16 inside = first_lanes(section->width - 32 * word - i);
            __m512 scales = from ? _mm512_mul_ps(load(from, 32 * word + i, type, inside), unit) : _mm512_set1_ps(1.0f);
            _mm512_storeu_ps(state->by[group] + i, scales);
        }
}

/* Column `bit` of the word for part p; grouped and has_mean are constants at every call. */
INLINE __m512 value_of(const part_state *state, int bit, int p, int grouped, int has_mean) {
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

INLINE __m256i to_bfloat16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

INLINE void store_column(const __m512 *value, const __mmask16 *mask, void *out, int64_t at, int type) {
    if (type == CONVERTED_BFLOAT16) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]);
        _mm512_mask_storeu_epi16((uint16_t *)out + at, (__mmask32)mask[1] << 16 | mask[0], both);
        return;
    }
    for (int p = 0; p < PARTS; p++)
        if (type == ARB_BFLOAT16)
            _mm256_mask_storeu_epi16((uint16_t *)out + at + 16 * p, mask[p], to_bfloat16(value[p]));
        else
            _mm512_mask_storeu_ps((float *)out + at + 16 * p, mask[p], value[p]);
}

/* Sections of ordinary columns, or the two orders of salient ones. */
INLINE void decode_section(const arb_layer *layer, const arb_section *section, const int32_t *order, int64_t block, int64_t row,
                           const __mmask16 *mask, void *out, int64_t width, int type, int grouped, int has_mean, int salient) {
    part_state first, second;
    load_section(layer, section, block, row, mask, &first);
    if (salient) load_section(layer, section + 1, block, row, mask, &second);
    for (int word = 0; 32 * word < section->width; word++) {
        load_word(layer, section, word, row, mask, &first);
        if (salient) load_word(layer, section + 1, word, row, mask, &second);
        int bit = section->zeroed > 32 * word ? section->zeroed - 32 * word : 0;
        int last = section->width - 32 * word < 32 ? section->width - 32 * word : 32;
        for (; bit < last; bit++) {
            __m512 value[PARTS];
            for (int p = 0; p < PARTS; p++) {
                value[p] = value_of(&first, bit, p, grouped, has_mean);
                if (salient) value[p] = _mm512_add_ps(value[p], value_of(&second, bit, p, grouped, 0));
            }
            store_column(value, mask, out, order[section->position + 32 * word + bit] * width, type);
        }
    }
}

INLINE void decode_any(const arb_layer *layer, const arb_section *section, const int32_t *order, int64_t block, int64_t row,
                       const __mmask16 *mask, void *out, int64_t width, int type, int salient) {
    int has_mean = section->mean[0] >= 0;
    if (section->groups && has_mean)
        decode_section(layer, section, order, block, row, mask, out, width, type, 1, 1, salient);
    else if (section->groups)
        decode_section(layer, section, order, block, row, mask, out, width, type, 1, 0, salient);
    else if (has_mean)
        decode_section(layer, section, order, block, row, mask, out, width, type, 0, 1, salient);
    else
        decode_section(layer, section, order, block, row, mask, out, width, type, 0, 0, salient);
}

INLINE void decode_typed(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block, int64_t start,
                         int64_t stop, char *out, int type) {
    const int size = type == ARB_FLOAT32 ? 4 : 2;
    for (int64_t row = start; row < stop; row += 16 * PARTS) {
        __mmask16 mask[PARTS];
        for (int p = 0; p < PARTS; p++) mask[p] = first_lanes(stop - row - 16 * p);
        for (int64_t i = plan->first[block]; i < plan->first[block + 1]; i++) {
            const arb_section *section = plan->section + i;
            void *to = out + (row - start) * size;
            if (!section->salient) {
                decode_any(layer, section, order, block, row, mask, to, stop - start, type, 0);
            } else {
                decode_any(layer, section, order, block, row, mask, to, stop - start, type, 1);
                i++; /* the second order is done */
            }
        }
    }
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
