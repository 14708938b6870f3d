/* Number formats, the stored order of columns, and the cutting of a layer into sections. */
#include "layer.h"

#include <stdlib.h>

/* ---- number formats -------------------------------------------------------------------------------------------- */

/* 1 sign, 5 exponent (bias 15) and 10 mantissa bits; a float has 1, 8 (bias 127) and 23. */
float arb_half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    float value;
    if (rest >= 0x7c00) { /* infinity and NaN keep their mantissa */
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + (112u << 23)); /* 112: the difference of the biases */
    } else { /* subnormal: a multiple of 2^-24 */
        value = (float)rest * 0x1p-24f;
        return sign ? -value : value;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounds to nearest, ties to even, as the processors' own conversions do. */
static uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00; /* rounds to 65536 or more */
    if (bits < 0x38800000) {                      /* subnormal: adding 0.5 leaves the multiple of 2^-24 in the low bits */
        float magnitude;
        memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, sizeof bits);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits - (112u << 23)) >> 13);
}

static uint16_t float_to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN: a quiet one */
    return arb_round_bfloat16(value);
}

float arb_load(const void *values, int64_t index, int type) {
    uint32_t bits;
    float value;
    switch (type) {
    case ARB_FLOAT16: return arb_half_to_float(((const uint16_t *)values)[index]);
    case ARB_FLOAT32: return ((const float *)values)[index];
    case ARB_INT8: return (float)((const int8_t *)values)[index] / 127.0f;
    default: /* bfloat16 is the upper half of a float */
        bits = (uint32_t)((const uint16_t *)values)[index] << 16;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
}

void arb_store(void *values, int64_t at, const float *from, int64_t count, int type) {
    if (type == ARB_FLOAT32) {
        memcpy((float *)values + at, from, count * sizeof(float));
    } else {
        uint16_t *to = (uint16_t *)values + at;
        if (type == ARB_FLOAT16)
            for (int64_t i = 0; i < count; i++) to[i] = float_to_half(from[i]);
        else
            for (int64_t i = 0; i < count; i++) to[i] = float_to_bfloat16(from[i]);
    }
}

/* ---- stored order ---------------------------------------------------------------------------------------------- */

static int is_salient(const arb_layer *layer, int64_t column) { return layer->salient[column / 8] >> column % 8 & 1; }

void arb_stored_order(const arb_layer *layer, int32_t *order) {
    for (int64_t start = 0; start < layer->columns; start += layer->block_size) {
        int64_t stop = arb_minimum(start + layer->block_size, layer->columns);
        for (int salient = 1; salient >= 0; salient--)
            for (int64_t column = start; column < stop; column++)
                if (is_salient(layer, column) == salient) *order++ = (int32_t)column;
    }
}

void arb_reorder(const arb_layer *layer, const void *x, int x_type, float *stored) {
    for (int64_t start = 0; start < layer->columns; start += layer->block_size) {
        int64_t stop = arb_minimum(start + layer->block_size, layer->columns);
        for (int salient = 1; salient >= 0; salient--)
            for (int64_t column = start; column < stop; column++)
                if (is_salient(layer, column) == salient) *stored++ = arb_load(x, column, x_type);
    }
}

static int64_t count_salient(const arb_layer *layer, int64_t start, int64_t stop) {
    int64_t count = 0; /* start is a multiple of 32 */
    for (int64_t byte = start / 8; byte < (stop + 7) / 8; byte++) {
        int64_t left = stop - 8 * byte; /* columns from this byte on: those past the last do not count */
        count += __builtin_popcount(layer->salient[byte] & (left < 8 ? (1 << left) - 1 : 255));
    }
    return count;
}

/* ---- sections -------------------------------------------------------------------------------------------------- */

static int64_t words_of(int64_t columns) { return (columns + 31) / 32; }

/* Column scales from a section's first column on. `row` counts the rows of column_scales [groups, columns], then those of
 * salient_column_scales [.., salient_columns], which number the salient columns of the whole layer. */
static const void *scales_of(const arb_layer *layer, int row, int64_t position, int64_t salient_position) {
    int type = (int)layer->scale_type;
    if (!layer->column_scales) return NULL;
    if (row < layer->groups) return arb_offset(layer->column_scales, row * layer->columns + position, type);
    row -= (int)layer->groups;
    return arb_offset(layer->salient_column_scales, row * layer->salient_columns + salient_position, type);
}

/* Stored columns start .. stop - 1; start is a multiple of 32, and the block's salient columns end at salient_stop. */
static arb_section ordinary_section(const arb_layer *layer, int64_t start, int64_t stop, int64_t salient_stop) {
    int64_t word = start / 32;
    int means = (int)(layer->groups + 2 * layer->salient_groups); /* the first slot of means */
    arb_section section = {
        .signs = layer->weight + word * layer->rows,
        .groups = layer->groups == 2 ? layer->second_plane + word * layer->rows : NULL,
        .sign_words = (int32_t)words_of(stop - start),
        .group_words = (int32_t)words_of(stop - start),
        .width = (int32_t)(stop - start),
        .zeroed = (int32_t)(salient_stop > start ? salient_stop - start : 0),
        .slot = {0, 1},
        .mean = {layer->column_scales ? -1 : means, means + 1},
        .position = start,
        .scales = {scales_of(layer, 0, start, 0), layer->groups == 2 ? scales_of(layer, 1, start, 0) : NULL},
    };
    return section;
}

/* `width` salient columns from stored column start on, which is number `number` of the layer's salient columns; order 0
 * or 1. Planes that hold salient columns only are numbered without gaps between blocks: sections of them need not start
 * at a word. With one group, the second signs are in such a plane (`packed`). */
static arb_section salient_section(const arb_layer *layer, int order, int64_t start, int64_t number, int64_t width) {
    int64_t n = layer->rows, all = words_of(layer->salient_columns);
    int large = layer->salient_groups == 2, packed = order == 1 && layer->groups == 1;
    int means = (int)(2 * layer->groups + 2 * layer->salient_groups);
    const uint32_t *plane = order == 0 ? layer->weight : layer->second_plane;
    arb_section section = {
        .signs = plane + (packed ? number / 32 : start / 32) * n,
        .groups = large ? layer->salient_group_plane + number / 32 * n : NULL,
        .sign_shift = packed ? (int32_t)(number % 32) : 0,
        .group_shift = (int32_t)(number % 32),
        .sign_words = (int32_t)(packed ? arb_minimum(all - number / 32, SECTION / 32 + 1) : words_of(width)),
        .group_words = (int32_t)arb_minimum(all - number / 32, SECTION / 32 + 1),
        .width = (int32_t)width,
        .salient = 1,
        .slot = {(int)layer->groups + order, (int)layer->groups + 2 + order},
        .mean = {layer->column_scales || order ? -1 : means, means + 1}, /* the first order carries the mean */
        .position = start,
        .scales = {scales_of(layer, order, start, number), large ? scales_of(layer, 2 + order, start, number) : NULL},
    };
    return section;
}

int arb_plan_new(const arb_layer *layer, arb_plan *plan) {
    int64_t m = layer->columns, blocks = (m + layer->block_size - 1) / layer->block_size;
    if (count_salient(layer, 0, m) != layer->salient_columns) return -2;
    /* A chunk of SECTION columns of a block makes at most one ordinary section and two salient ones. */
    int64_t chunks = (arb_minimum(layer->block_size, m) + SECTION - 1) / SECTION;
    plan->blocks = blocks;
    plan->first = malloc((blocks + 1) * sizeof(int64_t) + blocks * 3 * chunks * sizeof(arb_section));
    if (!plan->first) return -1;
    plan->section = (arb_section *)(plan->first + blocks + 1);
    int64_t number = 0, count = 0; /* salient columns, sections so far */
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = block * layer->block_size, stop = arb_minimum(start + layer->block_size, m);
        int64_t salient = count_salient(layer, start, stop), salient_stop = start + salient;
        plan->first[block] = count;
        for (int64_t at = start; at < salient_stop; at += SECTION)
            for (int order = 0; order < 2; order++)
                plan->section[count++] =
                    salient_section(layer, order, at, number + at - start, arb_minimum(SECTION, salient_stop - at));
        if (salient_stop < stop) /* from the word in which the ordinary columns begin */
            for (int64_t at = start + salient / 32 * 32; at < stop; at += SECTION)
                plan->section[count++] = ordinary_section(layer, at, arb_minimum(at + SECTION, stop), salient_stop);
        number += salient;
    }
    plan->first[blocks] = plan->sections = count;
    return 0;
}

void arb_plan_free(arb_plan *plan) { free(plan->first); }
