/* Dense weights in portable C: a vector is an array of 32 floats, which compilers turn into what the processor has. */
#define TARGET

#include "linear.h"

enum { LANES_OF_VECTOR = 32 };
typedef struct {
    float lane[LANES_OF_VECTOR];
} vector;
typedef struct {
    uint32_t lane[LANES_OF_VECTOR];
} words;
typedef int row_set; /* how many there are */

#include "linear_decode.h"

INLINE row_set first_rows(int64_t count) { return (int)arb_minimum(count, DECODE_ROWS); }

INLINE void load_parameters(const void *values, int64_t row, int type, float unit, row_set rows, vector to[PARTS]) {
    if (type == ARB_INT8) unit *= 127.0f; /* arb_load divides by it */
    for (int l = 0; l < DECODE_ROWS; l++) to[0].lane[l] = l < rows ? arb_load(values, row + l, type) * unit : 0;
}

INLINE void load_plane(const uint32_t *plane, int64_t n, int word, int plane_words, int shift, row_set rows, words to[PARTS]) {
    for (int l = 0; l < DECODE_ROWS; l++) to[0].lane[l] = l < rows ? arb_bits(plane + l, n, word, plane_words, shift) : 0;
}

INLINE void load_columns(const void *scales, int64_t column, int64_t count, int type, float to[32]) {
    for (int i = 0; i < 32; i++) to[i] = i < count ? arb_load(scales, column + i, type) : 1.0f;
}

INLINE vector value_of(const decode_state *state, int bit, int p, int grouped, int has_mean) {
    vector result;
    for (int l = 0; l < DECODE_ROWS; l++) {
        uint32_t bits, large = grouped ? state->groups[p].lane[l] >> bit & 1 : 0;
        float at_small = state->scale[0][p].lane[l] * state->by[0][bit];
        float at_large = grouped ? state->scale[1][p].lane[l] * state->by[1][bit] : 0;
        float value = large ? at_large : at_small;
        memcpy(&bits, &value, sizeof bits);
        bits ^= (~state->signs[p].lane[l] >> bit) << 31; /* flips the sign where the bit is clear */
        memcpy(&value, &bits, sizeof value);
        if (has_mean) value += large ? state->mean[1][p].lane[l] : state->mean[0][p].lane[l];
        result.lane[l] = value;
    }
    return result;
}

INLINE vector sum_of(vector a, vector b) {
    for (int l = 0; l < DECODE_ROWS; l++) a.lane[l] += b.lane[l];
    return a;
}

INLINE void store_column(const vector value[PARTS], row_set rows, void *out, int64_t at, int type) {
    uint16_t rounded[DECODE_ROWS];
    const void *from = value[0].lane;
    const int64_t size = arb_size(type);
    if (type == ARB_BFLOAT16) {
        for (int l = 0; l < DECODE_ROWS; l++) rounded[l] = arb_round_bfloat16(value[0].lane[l]);
        from = rounded;
    }
    char *to = (char *)out + at * size;
    if (rows == DECODE_ROWS)
        memcpy(to, from, DECODE_ROWS * size); /* a constant size: no call */
    else
        memcpy(to, from, rows * size);
}

void arb_decode_plain(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block, int64_t start,
                      int64_t stop, void *out, int type) {
    if (type == ARB_BFLOAT16)
        decode_typed(layer, plan, order, block, start, stop, out, ARB_BFLOAT16);
    else
        decode_typed(layer, plan, order, block, start, stop, out, ARB_FLOAT32);
}
