/* The binary matmul with AVX2.
 *
 * 32 rows at a time. A word of 32 columns of each row is transposed to eight registers of nibbles, one row in each byte; a
 * byte shuffle looks up the sum of a nibble's four activations for 32 rows, first its low byte, then its high byte. Entries
 * have 13 bits, so that the eight sums of a word add up in 16 bits; words are added in 32 bits. The sums are exact.
 */
#define TARGET ARB_TARGET_AVX2

#include "linear_avx2.h"

#ifdef ARB_X86
#include <math.h>

/* The largest sum of four activations: eight of them fit 16 bits. 4095, less what rounding four numbers may add. */
static const float LARGEST = 4092.0f;

/* Activations of a section times the column scales of a group, as integers; returns their unit. */
TARGET static float quantize(const arb_section *section, int group, int scale_type, const float *stored, int16_t *quantized) {
    _Alignas(32) float values[SECTION] = {0};
    const void *scales = section->scales[group];
    for (int i = 0; i < section->width; i += 8) {
        __m256 x = load_some(stored + section->position, i, ARB_FLOAT32, section->width - i);
        if (scales) x = _mm256_mul_ps(x, load_some(scales, i, scale_type, section->width - i));
        _mm256_store_ps(values + i, x);
    }
    for (int i = 0; i < section->zeroed; i++) values[i] = 0;
    /* Magnitudes of four activations: each lane of a group of four gets their sum. */
    __m256 largest = _mm256_setzero_ps(), sum = largest, magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int i = 0; i < SECTION; i += 8) {
        __m256 size = _mm256_and_ps(_mm256_load_ps(values + i), magnitude);
        size = _mm256_add_ps(size, _mm256_permute_ps(size, 0xb1));
        size = _mm256_add_ps(size, _mm256_permute_ps(size, 0x4e));
        largest = _mm256_max_ps(largest, size);
        sum = _mm256_add_ps(sum, size);
    }
    /* Infinities and NaN make every sum of the section NaN. */
    float most = fmaxf(largest[0], largest[4]), all = sum[0] + sum[4];
    int finite = all - all == 0;
    __m256 inverse = _mm256_set1_ps(finite && most > 0 ? LARGEST / most : 0);
    for (int i = 0; i < SECTION; i += 8) {
        __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(values + i), inverse));
        if (!finite) q = _mm256_setzero_si256();
        q = _mm256_permute4x64_epi64(_mm256_packs_epi32(q, q), 0xd8); /* packed in 128-bit lanes: back in order */
        _mm_storeu_si128((__m128i *)(quantized + i), _mm256_castsi256_si128(q));
    }
    /* int8 scales were loaded as their codes. */
    return finite ? most / LARGEST / (scales && scale_type == ARB_INT8 ? 127.0f : 1.0f) : NAN;
}

/* Low and high bytes of the sums +-q0 +-q1 +-q2 +-q3, entry by nibble. */
INLINE void build_nibble(const int16_t *q, int8_t table[2][16]) {
    const __m256i bits = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), one = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        __m256i set = _mm256_and_si256(_mm256_srli_epi16(bits, i), one); /* bit i of the nibble, which is the lane */
        __m256i sign = _mm256_sub_epi16(_mm256_add_epi16(set, set), one);
        sum = _mm256_add_epi16(sum, _mm256_sign_epi16(_mm256_set1_epi16(q[i]), sign));
    }
    __m256i low = _mm256_and_si256(sum, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(sum, 8);
    __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8); /* 16 low bytes, 16 high bytes */
    _mm256_storeu_si256((__m256i *)table, both);
}

TARGET static void build(const arb_layer *layer, const arb_plan *plan, int64_t block, const float *stored, arb_tables *tables) {
    for (int64_t i = plan->first[block]; i < plan->first[block + 1]; i++) {
        const arb_section *section = plan->section + i;
        int groups = section->groups ? 2 : 1;
        for (int group = 0; group < (layer->column_scales ? groups : 1); group++) {
            int16_t quantized[SECTION];
            tables[i].factor[group] = quantize(section, group, (int)layer->scale_type, stored, quantized) / (float)groups;
            for (int nibble = 0; 4 * nibble < section->width; nibble++)
                build_nibble(quantized + 4 * nibble, tables[i].table.nibbles[group][nibble]);
            tables[i].total = 0;
            for (int k = 0; k < SECTION; k++) tables[i].total += quantized[k];
        }
    }
}

/* Words of 32 rows to nibbles: to[i] has nibble i of row 8 * (k / 4) + 4 * L + k % 4 in byte k of its 128-bit lane L. */
INLINE void nibbles_of(const __m256i words[4], __m256i to[8]) {
    const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                            0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i four = _mm256_set1_epi8(15);
    __m256i v[4], pair[4], byte[4];
    /* A 4 x 4 transpose in each 128-bit lane, which is four rows. First, bytes of the same place side by side: 32 bits. */
    for (int i = 0; i < 4; i++) v[i] = _mm256_shuffle_epi8(words[i], gather);
    /* Then those of the four registers: byte[i] has byte i of all 32 rows. */
    for (int i = 0; i < 2; i++) {
        pair[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        pair[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        byte[2 * i] = _mm256_unpacklo_epi64(pair[i], pair[2 + i]);
        byte[2 * i + 1] = _mm256_unpackhi_epi64(pair[i], pair[2 + i]);
    }
    for (int i = 0; i < 4; i++) {
        to[2 * i] = _mm256_and_si256(byte[i], four);
        to[2 * i + 1] = _mm256_and_si256(_mm256_srli_epi16(byte[i], 4), four);
    }
}

/* sums += the table's sums of a word's nibbles: even, then odd rows of each half (see in_row_order). */
INLINE void look_up(const __m256i nibbles[8], const int8_t (*table)[2][16], int count, __m256i sums[4]) {
    const __m256i even = _mm256_set1_epi32(1), odd = _mm256_set1_epi32(1 << 16);
    __m256i half[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    /* Low and high bytes side by side are sums in 16 bits: half[0] of rows 0 .. 15, half[1] of rows 16 .. 31. */
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        if (i >= count) break;
        const __m128i *entries = (const __m128i *)table[i];
        __m256i low = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(entries)), nibbles[i]);
        __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(entries + 1)), nibbles[i]);
        half[0] = _mm256_add_epi16(half[0], _mm256_unpacklo_epi8(low, high));
        half[1] = _mm256_add_epi16(half[1], _mm256_unpackhi_epi8(low, high));
    }
    /* A product with (1, 0) or (0, 1) widens every second sum to 32 bits. */
    for (int i = 0; i < 4; i++) sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(half[i / 2], i % 2 ? odd : even));
}

/* The sums of rows 8 * i .. 8 * i + 7, as float32. */
INLINE __m256 in_row_order(const __m256i sums[4], int i) {
    __m256i even = sums[i / 2 * 2], odd = sums[i / 2 * 2 + 1];
    return _mm256_cvtepi32_ps(i % 2 ? _mm256_unpackhi_epi32(even, odd) : _mm256_unpacklo_epi32(even, odd));
}

/* y [ROWS] += factor * sums * row parameters. */
INLINE void add_rows(const arb_layer *layer, int64_t block, int slot, int64_t row, int count, const __m256 sums[4], float factor,
                     float *y) {
    float unit;
    const void *values = arb_row_parameters(layer, block, slot, arb_slots(layer), &unit);
    __m256 by = _mm256_set1_ps(factor * unit);
    for (int i = 0; i < 4; i++) {
        __m256 rows = load_some(values, row + 8 * i, (int)layer->scale_type, count - 8 * i);
        _mm256_storeu_ps(y + 8 * i, _mm256_fmadd_ps(_mm256_mul_ps(sums[i], by), rows, _mm256_loadu_ps(y + 8 * i)));
    }
}

/* Adds to y a section's part of `count` rows. by_column (the layer has column scales, so that each group has tables of its
 * own) and grouped are constants at every call. In linear.h's words, sign_sum is sum_s; other_sum, looked up with the bits
 * s ^ g, is sum_t, and `counted`, looked up with g, the sum over the group bits that the means need. */
INLINE void add_section(const arb_layer *layer, const arb_section *section, const arb_tables *tables, int64_t block, int64_t row,
                        int count, float *y, int by_column, int grouped) {
    const int8_t(*table)[NIBBLES][2][16] = tables->table.nibbles;
    const int has_mean = !by_column && section->mean[0] >= 0;
    __m256i sign_sum[2][4], other_sum[2][4], counted[4], zero = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) sign_sum[0][i] = sign_sum[1][i] = other_sum[0][i] = other_sum[1][i] = counted[i] = zero;
    for (int word = 0; 32 * word < section->width; word++) {
        __m256i s[4], g[4], nibbles[8];
        int some = (section->width - 32 * word + 3) / 4;
        load_words(section->signs + row, layer->rows, word, section->sign_words, section->sign_shift, count, s);
        nibbles_of(s, nibbles);
        for (int group = 0; group <= (grouped && by_column); group++)
            look_up(nibbles, table[group] + 8 * word, some, sign_sum[group]);
        if (!grouped) continue;
        load_words(section->groups + row, layer->rows, word, section->group_words, section->group_shift, count, g);
        for (int i = 0; i < 4; i++) s[i] = _mm256_xor_si256(s[i], g[i]); /* bits of t */
        nibbles_of(s, nibbles);
        for (int group = 0; group <= by_column; group++) look_up(nibbles, table[group] + 8 * word, some, other_sum[group]);
        if (!has_mean) continue;
        nibbles_of(g, nibbles);
        look_up(nibbles, table[0] + 8 * word, some, counted);
    }
    const __m256 total = _mm256_set1_ps((float)tables->total);
    for (int group = 0; group < (grouped ? 2 : 1); group++) {
        float factor = tables->factor[by_column ? group : 0];
        __m256 sums[4], columns[4];
        for (int i = 0; i < 4; i++) {
            __m256 sign = in_row_order(sign_sum[by_column ? group : 0], i);
            __m256 other = in_row_order(other_sum[by_column ? group : 0], i), large = in_row_order(counted, i);
            sums[i] = !grouped ? sign : group ? _mm256_sub_ps(sign, other) : _mm256_add_ps(sign, other);
            columns[i] = !grouped ? total : group ? _mm256_add_ps(total, large) : _mm256_sub_ps(total, large);
        }
        add_rows(layer, block, section->slot[group], row, count, sums, factor, y);
        if (has_mean) add_rows(layer, block, section->mean[group], row, count, columns, factor, y);
    }
}

INLINE void multiply_typed(const arb_layer *layer, const arb_plan *plan, const arb_tables *tables, int64_t tokens, int64_t start,
                           int64_t stop, float *y, int64_t stride, int by_column) {
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t row = start; row < stop; row++) y[token * stride + row] = 0;
    /* Tokens innermost: the words of a block's rows stay in the cache. */
    for (int64_t block = 0; block < plan->blocks; block++)
        for (int64_t row = start; row < stop; row += ROWS)
            for (int64_t token = 0; token < tokens; token++) {
                int count = stop - row < ROWS ? (int)(stop - row) : ROWS;
                float sums[ROWS] = {0}, *to = y + token * stride + row;
                memcpy(sums, to, count * sizeof *to);
                for (int64_t i = plan->first[block]; i < plan->first[block + 1]; i++) {
                    const arb_section *section = plan->section + i;
                    const arb_tables *table = tables + token * plan->sections + i;
                    if (section->groups)
                        add_section(layer, section, table, block, row, count, sums, by_column, 1);
                    else
                        add_section(layer, section, table, block, row, count, sums, by_column, 0);
                }
                memcpy(to, sums, count * sizeof *to);
            }
}

TARGET static void multiply(const arb_layer *layer, const arb_plan *plan, const arb_tables *tables, int64_t tokens, int64_t start,
                            int64_t stop, float *y, int64_t stride) {
    if (layer->column_scales)
        multiply_typed(layer, plan, tables, tokens, start, stop, y, stride, 1);
    else
        multiply_typed(layer, plan, tables, tokens, start, stop, y, stride, 0);
}

const arb_kernels arb_kernels_avx2 = {arb_reorder, build, multiply};
#endif
