/* Tiles of dense weights with AVX2: a column of 32 rows at a time, the rows in the lanes of four registers. */
#include "linear_avx2.h"

#ifdef ARB_X86

enum { PARTS = ROWS / 8 };

typedef struct {
    __m256 scale[2][PARTS], mean[2][PARTS]; /* of each group */
    float by[2][32];                        /* column scales of a word of columns, of each group */
    __m256i signs[PARTS], groups[PARTS];    /* that word */
} part_state;

INLINE void load_section(const arb_layer *layer, const arb_section *section, int64_t block, int64_t row, int count,
                         part_state *state) {
    const int64_t slots = arb_slots(layer);
    for (int group = 0; group < (section->groups ? 2 : 1); group++)
        for (int p = 0; p < PARTS; p++) {
            float unit;
            const void *from = arb_row_parameters(layer, block, section->slot[group], slots, &unit);
            __m256 scale = load_some(from, row + 8 * p, (int)layer->scale_type, count - 8 * p);
            state->scale[group][p] = _mm256_mul_ps(scale, _mm256_set1_ps(unit));
            if (section->mean[0] < 0) continue;
            from = arb_row_parameters(layer, block, section->mean[group], slots, &unit);
            __m256 mean = load_some(from, row + 8 * p, (int)layer->scale_type, count - 8 * p);
            state->mean[group][p] = _mm256_mul_ps(mean, _mm256_set1_ps(unit));
        }
}

INLINE void load_word(const arb_layer *layer, const arb_section *section, int word, int64_t row, int count, part_state *state) {
    const int type = (int)layer->scale_type;
    load_words(section->signs + row, layer->rows, word, section->sign_words, section->sign_shift, count, state->signs);
    if (section->groups)
        load_words(section->groups + row, layer->rows, word, section->group_words, section->group_shift, count, state->groups);
    __m256 unit = _mm256_set1_ps(type == ARB_INT8 ? 1.0f / 127.0f : 1.0f);
    for (int group = 0; group < (section->groups ? 2 : 1); group++)
        for (int i = 0; i < 32; i += 8) {
            const void *from = section->scales[group];
            __m256 scales = _mm256_set1_ps(1.0f);
            if (from) scales = _mm256_mul_ps(load_some(from, 32 * word + i, type, section->width - 32 * word - i), unit);
            _mm256_storeu_ps(state->by[group] + i, scales);
        }
}

/* Column `bit` of the word for part p; grouped and has_mean are constants at every call. */
INLINE __m256 value_of(const part_state *state, int bit, int p, int grouped, int has_mean) {
    const __m256 top = _mm256_castsi256_ps(_mm256_set1_epi32((int32_t)0x80000000));
    const __m128i to_top = _mm_cvtsi32_si128(31 - bit);
    __m256 value = _mm256_mul_ps(state->scale[0][p], _mm256_set1_ps(state->by[0][bit])), large = _mm256_setzero_ps();
    if (grouped) {
        large = _mm256_castsi256_ps(_mm256_sll_epi32(state->groups[p], to_top));
        value = _mm256_blendv_ps(value, _mm256_mul_ps(state->scale[1][p], _mm256_set1_ps(state->by[1][bit])), large);
    }
    __m256 sign = _mm256_castsi256_ps(_mm256_sll_epi32(state->signs[p], to_top));
    value = _mm256_xor_ps(value, _mm256_andnot_ps(sign, top)); /* flips the sign where the bit is clear */
    if (!has_mean) return value;
    return _mm256_add_ps(value, grouped ? _mm256_blendv_ps(state->mean[0][p], state->mean[1][p], large) : state->mean[0][p]);
}

INLINE __m256i round_bfloat16(__m256 value) {
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

INLINE void store_column(const __m256 *value, int count, void *out, int64_t at, int type) {
    _Alignas(32) char buffer[ROWS * sizeof(float)];
    const int size = type == ARB_BFLOAT16 ? 2 : 4;
    char *to = (char *)out + at * size, *direct = count == ROWS ? to : buffer;
    for (int p = 0; p < PARTS; p += type == ARB_BFLOAT16 ? 2 : 1)
        if (type == ARB_BFLOAT16) {
            __m256i both = _mm256_packus_epi32(round_bfloat16(value[p]), round_bfloat16(value[p + 1]));
            _mm256_storeu_si256((__m256i *)(direct + 16 * p), _mm256_permute4x64_epi64(both, 0xd8));
        } else {
            _mm256_storeu_ps((float *)direct + 8 * p, value[p]);
        }
    if (count < ROWS) memcpy(to, buffer, count * size);
}

/* Sections of ordinary columns, or the two orders of salient ones. */
INLINE void decode_section(const arb_layer *layer, const arb_section *section, const int32_t *order, int64_t block, int64_t row,
                           int count, void *out, int64_t width, int type, int grouped, int has_mean, int salient) {
    part_state first, second;
    load_section(layer, section, block, row, count, &first);
    if (salient) load_section(layer, section + 1, block, row, count, &second);
    for (int word = 0; 32 * word < section->width; word++) {
        load_word(layer, section, word, row, count, &first);
        if (salient) load_word(layer, section + 1, word, row, count, &second);
        int bit = section->zeroed > 32 * word ? section->zeroed - 32 * word : 0;
        int last = section->width - 32 * word < 32 ? section->width - 32 * word : 32;
        for (; bit < last; bit++) {
            __m256 value[PARTS];
            for (int p = 0; p < PARTS; p++) {
                value[p] = value_of(&first, bit, p, grouped, has_mean);
                if (salient) value[p] = _mm256_add_ps(value[p], value_of(&second, bit, p, grouped, 0));
            }
            store_column(value, count, out, order[section->position + 32 * word + bit] * width, type);
        }
    }
}

INLINE void decode_any(const arb_layer *layer, const arb_section *section, const int32_t *order, int64_t block, int64_t row,
                       int count, void *out, int64_t width, int type, int salient) {
    int has_mean = section->mean[0] >= 0;
    if (section->groups && has_mean)
        decode_section(layer, section, order, block, row, count, out, width, type, 1, 1, salient);
    else if (section->groups)
        decode_section(layer, section, order, block, row, count, out, width, type, 1, 0, salient);
    else if (has_mean)
        decode_section(layer, section, order, block, row, count, out, width, type, 0, 1, salient);
    else
        decode_section(layer, section, order, block, row, count, out, width, type, 0, 0, salient);
}

INLINE void decode_typed(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block, int64_t start,
                         int64_t stop, char *out, int type) {
    const int size = type == ARB_BFLOAT16 ? 2 : 4;
    for (int64_t row = start; row < stop; row += ROWS) {
        int count = stop - row < ROWS ? (int)(stop - row) : ROWS;
        for (int64_t i = plan->first[block]; i < plan->first[block + 1]; i++) {
            const arb_section *section = plan->section + i;
            void *to = out + (row - start) * size;
            if (!section->salient) {
                decode_any(layer, section, order, block, row, count, to, stop - start, type, 0);
            } else {
                decode_any(layer, section, order, block, row, count, to, stop - start, type, 1);
                i++; /* the second order is done */
            }
        }
    }
}

TARGET void arb_decode_avx2(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block, int64_t start,
                              int64_t stop, void *out, int type) {
    if (type == ARB_BFLOAT16)
        decode_typed(layer, plan, order, block, start, stop, out, ARB_BFLOAT16);
    else
        decode_typed(layer, plan, order, block, start, stop, out, ARB_FLOAT32);
}
#endif
