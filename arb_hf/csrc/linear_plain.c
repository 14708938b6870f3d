/* The binary matmul in portable C. The other instruction sets do the same, many rows at a time. */
#include <math.h>

#include "linear.h"

/* Activations of a section times the column scales of a group, as integers; returns their unit. */
static float quantize(const arb_section *section, int group, int scale_type, const float *stored, int16_t *quantized) {
    float values[SECTION] = {0}, largest = 0, sum = 0;
    const void *scales = section->scales[group];
    for (int i = section->zeroed; i < section->width; i++)
        values[i] = stored[section->position + i] * (scales ? arb_load(scales, i, scale_type) : 1.0f);
    /* The unit is such that the largest sum of four, with any signs, fits a table entry. */
    for (int i = 0; i < SECTION; i += 4) {
        float four = fabsf(values[i]) + fabsf(values[i + 1]) + fabsf(values[i + 2]) + fabsf(values[i + 3]);
        largest = four > largest ? four : largest;
        sum += four;
    }
    /* Infinities and NaN make every sum of the section NaN. */
    int finite = sum - sum == 0;
    float inverse = finite && largest > 0 ? ARB_LARGEST_SUM / largest : 0;
    for (int i = 0; i < SECTION; i++) quantized[i] = finite ? (int16_t)lrintf(values[i] * inverse) : 0;
    return finite ? largest / ARB_LARGEST_SUM : NAN;
}

/* One table per group if the groups have column scales of their own, else one for both. */
static void build_section(const arb_layer *layer, const arb_section *section, const float *stored, arb_tables *tables) {
    int groups = section->groups ? 2 : 1;
    for (int group = 0; group < (layer->column_scales ? groups : 1); group++) {
        int16_t quantized[SECTION];
        tables->factor[group] = quantize(section, group, layer->scale_type, stored, quantized) / (float)groups;
        for (int nibble = 0; nibble < NIBBLES; nibble++)
            for (int bits = 0; bits < 16; bits++) { /* a set bit is a weight of +1, a clear one of -1 */
                int sum = 0;
                for (int i = 0; i < 4; i++) sum += (bits >> i & 1) ? quantized[4 * nibble + i] : -quantized[4 * nibble + i];
                tables->table.sums[group][nibble][bits] = (int16_t)sum;
            }
        tables->total = 0;
        for (int i = 0; i < SECTION; i++) tables->total += quantized[i];
    }
}

static void build(const arb_layer *layer, const arb_plan *plan, int64_t block, const float *stored, arb_tables *tables) {
    for (int64_t i = plan->first[block]; i < plan->first[block + 1]; i++)
        build_section(layer, plan->section + i, stored, tables + i);
}

/* The sum of up to 32 activations with the signs of a word's bits. */
static int32_t look_up(const int16_t (*table)[16], uint32_t word, int nibbles) {
    int32_t sum = 0;
    for (int i = 0; i < nibbles; i++) sum += table[i][word >> 4 * i & 15];
    return sum;
}

/* What a section adds to y[row]. */
static float row_of_section(const arb_layer *layer, const arb_section *section, const arb_tables *tables, int64_t block,
                            int64_t row) {
    const int16_t(*small)[16] = tables->table.sums[0], (*large)[16] = tables->table.sums[layer->column_scales ? 1 : 0];
    int32_t sums[2] = {0, 0}, counted = 0;
    int has_mean = section->mean[0] >= 0;
    for (int word = 0; 32 * word < section->width; word++) {
        int left = (section->width - 32 * word + 3) / 4, nibbles = left < 8 ? left : 8;
        uint32_t s = arb_bits(section->signs + row, layer->rows, word, section->sign_words, section->sign_shift);
        if (!section->groups) {
            sums[0] += look_up(small + 8 * word, s, nibbles);
            continue;
        }
        /* The identity of linear.h: s ^ g are the bits of t. Its half is in the tables' factors. */
        uint32_t g = arb_bits(section->groups + row, layer->rows, word, section->group_words, section->group_shift);
        sums[0] += look_up(small + 8 * word, s, nibbles) + look_up(small + 8 * word, s ^ g, nibbles);
        sums[1] += look_up(large + 8 * word, s, nibbles) - look_up(large + 8 * word, s ^ g, nibbles);
        /* A mean multiplies the plain sum of its group: (sum of x -+ sum of g * x) / 2. */
        if (has_mean) counted += look_up(small + 8 * word, g, nibbles);
    }
    float y = 0;
    int64_t slots = arb_slots(layer);
    int32_t totals[2] = {section->groups ? tables->total - counted : tables->total, tables->total + counted};
    for (int group = 0; group < (section->groups ? 2 : 1); group++) {
        float unit, factor = tables->factor[layer->column_scales ? group : 0];
        float step = layer->scale_type == ARB_INT8 ? 127.0f : 1.0f; /* arb_load divides by it */
        const void *scales = arb_row_parameters(layer, block, section->slot[group], slots, &unit);
        y += factor * (float)sums[group] * (arb_load(scales, row, (int)layer->scale_type) * step * unit);
        if (!has_mean) continue;
        const void *means = arb_row_parameters(layer, block, section->mean[group], slots, &unit);
        y += factor * (float)totals[group] * (arb_load(means, row, (int)layer->scale_type) * step * unit);
    }
    return y;
}

static void multiply(const arb_layer *layer, const arb_plan *plan, const arb_tables *tables, int64_t tokens, int64_t start,
                     int64_t stop, float *y, int64_t stride) {
    for (int64_t token = 0; token < tokens; token++, tables += plan->sections, y += stride) {
        for (int64_t row = start; row < stop; row++) y[row] = 0;
        for (int64_t block = 0; block < plan->blocks; block++)
            for (int64_t i = plan->first[block]; i < plan->first[block + 1]; i++)
                for (int64_t row = start; row < stop; row++)
                    y[row] += row_of_section(layer, plan->section + i, tables + i, block, row);
    }
}

const arb_kernels arb_kernels_plain = {arb_reorder, build, multiply};
