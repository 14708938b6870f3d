/* Tiles of dense weights for the library's matmul: portable C. */
#include <string.h>

#include "linear.h"

#define INLINE static inline __attribute__((always_inline))
enum { LANES = 32 };

/* LANES floats of one row parameter; rows from `count` on are 0. */
INLINE void load_rows(const arb_layer *layer, int64_t block, int slot, int64_t row, int count, float *to) {
    float unit;
    const void *values = arb_row_parameters(layer, block, slot, arb_slots(layer), &unit);
    const int type = (int)layer->scale_type;
    if (type == ARB_INT8) unit *= 127.0f; /* arb_load divides by it */
    for (int lane = 0; lane < LANES; lane++) to[lane] = lane < count ? arb_load(values, row + lane, type) * unit : 0;
}

/* 32 columns of the plane for LANES rows. */
INLINE void load_words(const uint32_t *plane, int64_t n, int word, int words, int shift, int count, uint32_t *to) {
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t low = lane < count ? plane[word * n + lane] : 0;
        uint32_t high = shift && lane < count && word + 1 < words ? plane[(word + 1) * n + lane] : 0;
        to[lane] = shift ? low >> shift | high << (32 - shift) : low;
    }
}

/* 32 column scales from `column` on. */
INLINE void load_columns(const void *scales, int column, int count, int type, float *to) {
    for (int i = 0; i < 32; i++) to[i] = scales && i < count ? arb_load(scales, column + i, type) : 1.0f;
}

/* One column of LANES rows; the last three arguments are constants at every call. */
INLINE void decode_column(const uint32_t *restrict signs, const uint32_t *restrict groups, int bit,
                          const float (*restrict scale)[LANES], const float (*restrict mean)[LANES], float small, float large,
                          float *restrict to, int second, int grouped, int has_mean) {
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t bits, big = grouped ? groups[lane] >> bit & 1 : 0;
        float at_small = scale[0][lane] * small, at_large = grouped ? scale[1][lane] * large : 0;
        float value = big ? at_large : at_small;
        memcpy(&bits, &value, sizeof bits);
        bits ^= (~signs[lane] >> bit) << 31;
        memcpy(&value, &bits, sizeof bits);
        if (has_mean) value += grouped ? (big ? mean[1][lane] : mean[0][lane]) : mean[0][lane];
        to[lane] = second ? to[lane] + value : value;
    }
}

/* Values of a section's columns, `values` [columns][LANES]; the second order adds to the first. */
INLINE void decode_section(const arb_layer *layer, const arb_section *section, int64_t block, int64_t row, int count,
                           float (*values)[LANES], int second, int grouped, int has_mean) {
    const int64_t n = layer->rows;
    const int type = (int)layer->scale_type;
    float scale[2][LANES], mean[2][LANES];
    for (int group = 0; group < (grouped ? 2 : 1); group++) {
        load_rows(layer, block, section->slot[group], row, count, scale[group]);
        if (has_mean) load_rows(layer, block, section->mean[group], row, count, mean[group]);
    }
    for (int word = 0; 32 * word < section->width; word++) {
        uint32_t signs[LANES], groups[LANES];
        float small[32], large[32];
        load_words(section->signs + row, n, word, section->sign_words, section->sign_shift, count, signs);
        if (grouped) load_words(section->groups + row, n, word, section->group_words, section->group_shift, count, groups);
        int first = section->zeroed > 32 * word ? section->zeroed - 32 * word : 0;
        int last = section->width - 32 * word < 32 ? section->width - 32 * word : 32;
        load_columns(section->scales[0], 32 * word, last, type, small);
        if (grouped) load_columns(section->scales[1], 32 * word, last, type, large);
        for (int bit = first; bit < last; bit++)
            decode_column(signs, groups, bit, scale, mean, small[bit], large[bit], values[32 * word + bit], second, grouped,
                          has_mean);
    }
}

INLINE void decode_any(const arb_layer *layer, const arb_section *section, int64_t block, int64_t row, int count,
                       float (*values)[LANES], int second) {
    int has_mean = section->mean[0] >= 0;
    if (section->groups && has_mean)
        decode_section(layer, section, block, row, count, values, second, 1, 1);
    else if (section->groups)
        decode_section(layer, section, block, row, count, values, second, 1, 0);
    else if (has_mean)
        decode_section(layer, section, block, row, count, values, second, 0, 1);
    else
        decode_section(layer, section, block, row, count, values, second, 0, 0);
}

INLINE void store_bfloat16(const float *values, int count, uint16_t *to) {
    uint16_t rounded[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t bits;
        memcpy(&bits, values + lane, sizeof bits);
        rounded[lane] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    if (count == LANES)
        memcpy(to, rounded, sizeof rounded);
    else
        memcpy(to, rounded, count * sizeof *to);
}

INLINE void decode_block(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block, int64_t start,
                         int64_t stop, void *out, int type) {
    const int64_t width = stop - start;
    for (int64_t row = start; row < stop; row += LANES) {
        int count = stop - row < LANES ? (int)(stop - row) : LANES;
        for (int64_t i = plan->first[block]; i < plan->first[block + 1]; i++) {
            const arb_section *section = plan->section + i;
            const int second = section->salient && section->slot[0] > layer->groups;
            _Alignas(64) float values[SECTION][LANES];
            if (second) continue; /* decoded with the first order, which comes right before */
            decode_any(layer, section, block, row, count, values, 0);
            if (section->salient) decode_any(layer, section + 1, block, row, count, values, 1);
            for (int column = section->zeroed; column < section->width; column++) {
                int64_t to = (int64_t)order[section->position + column] * width + row - start;
                if (type == ARB_BFLOAT16)
                    store_bfloat16(values[column], count, (uint16_t *)out + to);
                else if (count == LANES)
                    memcpy((float *)out + to, values[column], sizeof values[column]);
                else
                    memcpy((float *)out + to, values[column], count * sizeof(float));
            }
        }
    }
}

static void plain(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block, int64_t start,
                  int64_t stop, void *out, int type) {
    decode_block(layer, plan, order, block, start, stop, out, type);
}

arb_decode_function *arb_decode_of(int isa) {
#ifdef ARB_X86
    if (isa == ARB_AVX512) return arb_decode_avx512;
    if (isa == ARB_AVX2) return arb_decode_avx2;
#endif
    (void)isa;
    return plain;
}
