/* Dense weights of a block, 32 rows and one column at a time: what the instruction sets' versions have in common.
 *
 * Not an ordinary header: each linear_decode_*.c includes it once, in its middle. Before, it defines
 *
 *     TARGET           as for linear.h
 *     LANES_OF_VECTOR  how many rows a vector holds
 *     vector, words    floats, and 32-bit words of planes, for that many rows
 *     row_set          which of DECODE_ROWS rows there are
 *
 * and after it the functions that are only declared here. Everything is inlined into arb_decode_*, once for each form of a
 * section: arguments called constants are known to the compiler at every call, so that the loops hold no branches.
 */
#ifndef ARB_HF_LINEAR_DECODE_H
#define ARB_HF_LINEAR_DECODE_H

/* Rows at a time: in bfloat16 a cache line. They are PARTS vectors. */
enum { DECODE_ROWS = 32, PARTS = DECODE_ROWS / LANES_OF_VECTOR };

/* A word of 32 columns of one section, for DECODE_ROWS rows. */
typedef struct {
    vector scale[2][PARTS], mean[2][PARTS]; /* row parameters of each group */
    float by[2][32];                        /* column scales of each group */
    words signs[PARTS], groups[PARTS];
} decode_state;

/* The first `count` of DECODE_ROWS rows; all if there are more. */
INLINE row_set first_rows(int64_t count);

/* Row parameters `values` of the rows from `row` on, times unit; 0 where there are no rows. */
INLINE void load_parameters(const void *values, int64_t row, int type, float unit, row_set rows, vector to[PARTS]);

/* 32 bits per row of a plane, as arb_bits; 0 where there are no rows. */
INLINE void load_plane(const uint32_t *plane, int64_t n, int word, int plane_words, int shift, row_set rows, words to[PARTS]);

/* Column scales from `column` on, as float32; there are `count`, and what lies behind them is not used. */
INLINE void load_columns(const void *scales, int64_t column, int64_t count, int type, float to[32]);

/* Column `bit` of the word for part p: scale * by with the sign of the bit, plus mean, of the group that each row's group
 * bit names. grouped and has_mean are constants. */
INLINE vector value_of(const decode_state *state, int bit, int p, int grouped, int has_mean);

INLINE vector sum_of(vector a, vector b);

/* One column: out[at ..] = the values of the rows that there are, rounded to type (a constant). */
INLINE void store_column(const vector value[PARTS], row_set rows, void *out, int64_t at, int type);

/* Row parameters, once for a section. */
INLINE void load_section(const arb_layer *layer, const arb_section *section, int64_t block, int64_t row, row_set rows,
                         decode_state *state) {
    const int64_t slots = arb_slots(layer);
    const int type = (int)layer->scale_type;
    for (int group = 0; group < (section->groups ? 2 : 1); group++) {
        float unit;
        const void *scales = arb_row_parameters(layer, block, section->slot[group], slots, &unit);
        load_parameters(scales, row, type, unit, rows, state->scale[group]);
        if (section->mean[0] < 0) continue;
        const void *means = arb_row_parameters(layer, block, section->mean[group], slots, &unit);
        load_parameters(means, row, type, unit, rows, state->mean[group]);
    }
}

/* Bits and column scales, once for 32 columns. */
INLINE void load_word(const arb_layer *layer, const arb_section *section, int word, int64_t row, row_set rows,
                      decode_state *state) {
    const int64_t n = layer->rows;
    load_plane(section->signs + row, n, word, section->sign_words, section->sign_shift, rows, state->signs);
    if (section->groups)
        load_plane(section->groups + row, n, word, section->group_words, section->group_shift, rows, state->groups);
    for (int group = 0; group < (section->groups ? 2 : 1); group++) {
        const void *scales = section->scales[group];
        if (scales)
            load_columns(scales, 32 * word, section->width - 32 * word, (int)layer->scale_type, state->by[group]);
        else
            for (int i = 0; i < 32; i++) state->by[group][i] = 1.0f;
    }
}

/* A section of ordinary columns, or the two of salient ones (`section` and the next), whose orders add up. The last four
 * arguments are constants. */
INLINE void decode_section(const arb_layer *layer, const arb_section *section, const int32_t *order, int64_t block, int64_t row,
                           row_set rows, void *out, int64_t width, int type, int grouped, int has_mean, int salient) {
    decode_state first, second;
    load_section(layer, section, block, row, rows, &first);
    if (salient) load_section(layer, section + 1, block, row, rows, &second);
    for (int word = 0; 32 * word < section->width; word++) {
        load_word(layer, section, word, row, rows, &first);
        if (salient) load_word(layer, section + 1, word, row, rows, &second);
        /* Columns of this word: from the first that is not of a salient section, to the section's last. */
        int bit = section->zeroed > 32 * word ? section->zeroed - 32 * word : 0;
        int last = section->width - 32 * word < 32 ? section->width - 32 * word : 32;
        for (; bit < last; bit++) {
            vector value[PARTS];
            for (int p = 0; p < PARTS; p++) {
                value[p] = value_of(&first, bit, p, grouped, has_mean);
                if (salient) value[p] = sum_of(value[p], value_of(&second, bit, p, grouped, 0));
            }
            store_column(value, rows, out, order[section->position + 32 * word + bit] * width, type);
        }
    }
}

/* Makes constants of what the section has. */
INLINE void decode_any(const arb_layer *layer, const arb_section *section, const int32_t *order, int64_t block, int64_t row,
                       row_set rows, void *out, int64_t width, int type, int salient) {
    int has_mean = section->mean[0] >= 0;
    if (section->groups && has_mean)
        decode_section(layer, section, order, block, row, rows, out, width, type, 1, 1, salient);
    else if (section->groups)
        decode_section(layer, section, order, block, row, rows, out, width, type, 1, 0, salient);
    else if (has_mean)
        decode_section(layer, section, order, block, row, rows, out, width, type, 0, 1, salient);
    else
        decode_section(layer, section, order, block, row, rows, out, width, type, 0, 0, salient);
}

/* An arb_decode_function for one type, a constant: ARB_FLOAT32 or a name of bfloat16 (the including file may have two). */
INLINE void decode_typed(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block, int64_t start,
                         int64_t stop, char *out, int type) {
    const int size = type == ARB_FLOAT32 ? 4 : 2;
    for (int64_t row = start; row < stop; row += DECODE_ROWS) {
        const row_set rows = first_rows(stop - row);
        for (int64_t i = plan->first[block]; i < plan->first[block + 1]; i++) {
            const arb_section *section = plan->section + i;
            void *to = out + (row - start) * size;
            if (!section->salient) {
                decode_any(layer, section, order, block, row, rows, to, stop - start, type, 0);
            } else {
                decode_any(layer, section, order, block, row, rows, to, stop - start, type, 1);
                i++; /* the second order is done */
            }
        }
    }
}

#endif
