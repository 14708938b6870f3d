/* The binary matmul with AVX-512 VBMI and VNNI.
 *
 * 16 rows are the 32-bit lanes of a register. A byte permutation looks up 64 entries at once: for each row, four groups of
 * four columns, entry 16 * position + nibble. Sums of four activations have 15 bits, in two tables (high and low seven
 * bits) whose entries a dot product with (128, 128, 128, 128) and (1, 1, 1, 1) adds to 32-bit sums. The sums are exact.
 */
#define TARGET ARB_TARGET_AVX512

#include "linear_avx512.h"

#ifdef ARB_X86
#include <math.h>

/* Rows at once: as many tiles of 16 as keep all sums in registers. */
enum { TILES = 4 };

/* How many rows ahead planes and row parameters are prefetched; measured from cold caches. */
enum { AHEAD = 128 };

#define PREFETCH(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)

/* As arb_reorder: of 16 columns at a time, the salient ones are packed together; then, in a second pass, the others. */
TARGET static void reorder(const arb_layer *layer, const void *x, int x_type, float *stored) {
    for (int64_t start = 0; start < layer->columns; start += layer->block_size) {
        int64_t stop = start + layer->block_size < layer->columns ? start + layer->block_size : layer->columns;
        float *to = stored + start;
        for (int pass = 0; pass < 2; pass++)
            for (int64_t column = start; column < stop; column += 16) {
                __mmask16 inside = first_lanes(stop - column);
                uint32_t salient = layer->salient[column / 8];
                if (stop - column > 8) salient |= (uint32_t)layer->salient[column / 8 + 1] << 8;
                __mmask16 wanted = inside & (__mmask16)(pass ? ~salient : salient);
                _mm512_mask_compressstoreu_ps(to, wanted, load(x, column, x_type, inside));
                to += _mm_popcnt_u32(wanted);
            }
    }
}

/* Activations of a section times the column scales of a group, as integers; returns their unit. */
TARGET static float quantize(const arb_section *section, int group, int scale_type, const float *stored, int16_t *quantized) {
    __m512 values[SECTION / 16], largest = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    const void *scales = section->scales[group];
    int count = (section->width + 15) / 16;
    for (int i = 0; i < count; i++) {
        __mmask16 mask = first_lanes(section->width - 16 * i) & (__mmask16)~first_lanes(section->zeroed - 16 * i);
        __m512 x = _mm512_maskz_loadu_ps(mask, stored + section->position + 16 * i);
        values[i] = scales ? _mm512_mul_ps(x, load(scales, 16 * i, scale_type, mask)) : x;
        /* Magnitudes of four activations: each lane of a group of four gets their sum. */
        __m512 size = _mm512_abs_ps(values[i]);
        size = _mm512_add_ps(size, _mm512_permute_ps(size, 0xb1));
        size = _mm512_add_ps(size, _mm512_permute_ps(size, 0x4e));
        largest = _mm512_max_ps(largest, size);
        sum = _mm512_add_ps(sum, size);
    }
    /* Infinities and NaN make every sum of the section NaN. */
    float most = _mm512_reduce_max_ps(largest), all = _mm512_reduce_add_ps(sum);
    int finite = all - all == 0;
    __m512 inverse = _mm512_set1_ps(finite && most > 0 ? ARB_LARGEST_SUM / most : 0);
    for (int i = 0; i < SECTION / 16; i++) {
        __m512i q = _mm512_setzero_si512();
        if (i < count && finite) q = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], inverse));
        _mm256_store_si256((__m256i *)(quantized + 16 * i), _mm512_cvtepi32_epi16(q));
    }
    /* int8 scales were loaded as their codes. */
    return finite ? most / ARB_LARGEST_SUM / (scales && scale_type == ARB_INT8 ? 127.0f : 1.0f) : NAN;
}

/* All sums +-q0 +-q1 +-q2 +-q3 of four positions; entry 16 * position + nibble of 64, as a high and a low byte. */
INLINE void build_lookup(const int16_t *const quantized[4], int8_t table[2][64]) {
    /* Signs of nibble i in 32-bit lane i, for the lower and the upper two columns: pairs of 16 bits. */
    const int32_t mm = -1, pm = (int32_t)0xffff0001, mp = 0x0001ffff, pp = 0x00010001;
    const __m512i lower = _mm512_setr_epi32(mm, pm, mp, pp, mm, pm, mp, pp, mm, pm, mp, pp, mm, pm, mp, pp);
    const __m512i upper = _mm512_setr_epi32(mm, mm, mm, mm, pm, pm, pm, pm, mp, mp, mp, mp, pp, pp, pp, pp);
    const __m512i transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i sums[4];
    for (int p = 0; p < 4; p++) {
        __m512i pair = _mm512_set1_epi32(((const int32_t *)quantized[p])[0]);
        sums[p] = _mm512_madd_epi16(lower, pair);
        sums[p] = _mm512_dpwssd_epi32(sums[p], upper, _mm512_set1_epi32(((const int32_t *)quantized[p])[1]));
    }
    /* Packing takes 128-bit lanes in turn, so that 32-bit lane 4 * L + p ends up with nibbles 4 * L .. 4 * L + 3 of
     * position p; the transpose puts it at 4 * p + L. */
    __m512i a = _mm512_packs_epi32(sums[0], sums[1]), b = _mm512_packs_epi32(sums[2], sums[3]);
    __m512i high = _mm512_packs_epi16(_mm512_srai_epi16(a, 7), _mm512_srai_epi16(b, 7));
    __m512i seven = _mm512_set1_epi16(127);
    __m512i low = _mm512_packus_epi16(_mm512_and_si512(a, seven), _mm512_and_si512(b, seven));
    _mm512_store_si512(table[0], _mm512_permutexvar_epi32(transpose, high));
    _mm512_store_si512(table[1], _mm512_permutexvar_epi32(transpose, low));
}

/* Lookups of ordinary sections take the low, then the high nibbles of each word's four bytes; those of salient sections,
 * which are often narrow, the 16 columns of each half word. */
TARGET static void build_section(const arb_layer *layer, const arb_section *section, const float *stored, arb_tables *tables) {
    int groups = section->groups ? 2 : 1;
    int lookups = section->salient ? (section->width + 15) / 16 : (section->width + 31) / 32 * 2;
    for (int group = 0; group < (layer->column_scales ? groups : 1); group++) {
        _Alignas(64) int16_t quantized[SECTION];
        tables->factor[group] = quantize(section, group, (int)layer->scale_type, stored, quantized) / (float)groups;
        for (int i = 0; i < lookups; i++) {
            const int16_t *from = section->salient ? quantized + 16 * i : quantized + 32 * (i / 2) + 4 * (i % 2);
            int step = section->salient ? 4 : 8;
            const int16_t *positions[4] = {from, from + step, from + 2 * step, from + 3 * step};
            build_lookup(positions, tables->table.bytes[group][i]);
        }
        if (section->mean[0] >= 0) {
            __m512i total = _mm512_setzero_si512();
            for (int i = 0; i < SECTION; i += 32)
                total = _mm512_dpwssd_epi32(total, _mm512_load_si512(quantized + i), _mm512_set1_epi16(1));
            tables->total = _mm512_reduce_add_epi32(total);
        }
    }
}

TARGET static void build(const arb_layer *layer, const arb_plan *plan, int64_t block, const float *stored, arb_tables *tables) {
    for (int64_t i = plan->first[block]; i < plan->first[block + 1]; i++)
        build_section(layer, plan->section + i, stored, tables + i);
}

/* Permutation indices of lookup half 0 or 1 of a word, as build_section orders them. */
INLINE __m512i indices(__m512i word, int half, int salient) {
    const __m512i nibble = _mm512_set1_epi8(15), position = _mm512_set1_epi32(0x30201000);
    if (salient) {
        const __m512i lower = _mm512_set1_epi64(0x2c2824200c080400), upper = _mm512_set1_epi64(0x3c3834301c181410);
        word = _mm512_multishift_epi64_epi8(half ? upper : lower, word);
    } else if (half) {
        word = _mm512_srli_epi32(word, 4);
    }
    return _mm512_ternarylogic_epi32(word, nibble, position, 0xea); /* word & nibble | position */
}

/* sum + 128 * (the high entries of four nibbles) + their low entries. */
INLINE __m512i look_up(__m512i sum, __m512i index, const int8_t table[2][64]) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8((char)128), _mm512_permutexvar_epi8(index, _mm512_load_si512(table[0])));
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_permutexvar_epi8(index, _mm512_load_si512(table[1])));
}

/* Row parameters of `tiles` times 16 rows. */
INLINE void load_rows(const void *values, int64_t row, int type, int tiles, __mmask16 mask, __m512 *to) {
    const int64_t size = arb_size(type);
    for (int t = 0; t < tiles; t++) {
        if (t % 2 == 0) PREFETCH((const char *)values + (row + 16 * t + AHEAD) * size); /* a cache line is two or more tiles */
        to[t] = load(values, row + 16 * t, type, mask);
    }
}

/* Adds to y a section's part of `tiles` times 16 rows. The last three arguments are constants at every call.
 *
 * In linear.h's words, sign_sum is sum_s, other_sum, looked up with the bits s ^ g, is sum_t, and `count`, looked up with
 * g, the sum over the group bits that the means need. With column scales each group has tables of its own: these sums
 * are then of the large group's, and small_sum is all of the small group's. */
INLINE void add_section(const arb_layer *layer, const arb_section *section, const arb_tables *tables, int64_t block,
                        int64_t row, int tiles, __mmask16 mask, __m512 *y, int by_column, int grouped, int salient) {
    const int64_t n = layer->rows;
    const int counted = grouped && !by_column && section->mean[0] >= 0;
    const int8_t(*small)[2][64] = tables->table.bytes[0], (*large)[2][64] = tables->table.bytes[by_column && grouped];
    __m512i zero = _mm512_setzero_si512(), sign_sum[TILES], other_sum[TILES], count[TILES], small_sum[TILES];
    for (int t = 0; t < tiles; t++) sign_sum[t] = other_sum[t] = count[t] = small_sum[t] = zero;
    int lookups = salient ? (section->width + 15) / 16 : (section->width + 31) / 32 * 2;
    for (int word = 0; 2 * word < lookups; word++) {
        __m512i s[TILES], g[TILES], other[TILES];
        for (int t = 0; t < tiles; t++) {
            const uint32_t *signs = section->signs + row + 16 * t, *groups = section->groups + row + 16 * t;
            PREFETCH(signs + word * n + AHEAD);
            if (grouped) PREFETCH(groups + word * n + AHEAD);
            s[t] = load_bits(signs, n, word, section->sign_words, salient ? section->sign_shift : 0, mask);
            if (grouped) g[t] = load_bits(groups, n, word, section->group_words, salient ? section->group_shift : 0, mask);
            if (grouped) other[t] = _mm512_xor_si512(s[t], g[t]);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            int i = 2 * word + half;
            if (salient && i >= lookups) break;
            for (int t = 0; t < tiles; t++) {
                __m512i index = indices(s[t], half, salient);
                sign_sum[t] = look_up(sign_sum[t], index, large[i]);
                if (grouped && by_column) small_sum[t] = look_up(small_sum[t], index, small[i]);
                if (!grouped) continue;
                index = indices(other[t], half, salient);
                other_sum[t] = look_up(other_sum[t], index, large[i]);
                if (by_column) small_sum[t] = look_up(small_sum[t], index, small[i]);
                if (counted) count[t] = look_up(count[t], indices(g[t], half, salient), small[i]);
            }
        }
    }
    const int64_t slots = arb_slots(layer);
    const int type = (int)layer->scale_type;
    for (int group = 0; group < (grouped ? 2 : 1); group++) {
        float unit, factor = tables->factor[by_column ? group : 0];
        const void *scales = arb_row_parameters(layer, block, section->slot[group], slots, &unit);
        __m512 by = _mm512_set1_ps(factor * unit), parameter[TILES];
        load_rows(scales, row, type, tiles, mask, parameter);
        for (int t = 0; t < tiles; t++) {
            __m512i sum = sign_sum[t];
            if (grouped && group) sum = _mm512_sub_epi32(sum, other_sum[t]);
            if (grouped && !group) sum = by_column ? small_sum[t] : _mm512_add_epi32(sum, other_sum[t]);
            y[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), by), parameter[t], y[t]);
        }
        if (by_column || section->mean[0] < 0) continue;
        const void *means = arb_row_parameters(layer, block, section->mean[group], slots, &unit);
        by = _mm512_set1_ps(factor * unit);
        load_rows(means, row, type, tiles, mask, parameter);
        for (int t = 0; t < tiles; t++) {
            __m512i sum = _mm512_set1_epi32(tables->total);
            if (grouped) sum = group ? _mm512_add_epi32(sum, count[t]) : _mm512_sub_epi32(sum, count[t]);
            y[t] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), by), parameter[t], y[t]);
        }
    }
}

INLINE void add_block(const arb_layer *layer, const arb_plan *plan, const arb_tables *tables, int64_t block, int64_t row,
                      int tiles, __mmask16 mask, float *y, int by_column) {
    __m512 sums[TILES]; /* in registers over all sections of the block */
    for (int t = 0; t < tiles; t++) sums[t] = _mm512_maskz_loadu_ps(mask, y + row + 16 * t);
    for (int64_t i = plan->first[block]; i < plan->first[block + 1]; i++) {
        const arb_section *section = plan->section + i;
        if (section->groups) {
            if (section->salient)
                add_section(layer, section, tables + i, block, row, tiles, mask, sums, by_column, 1, 1);
            else
                add_section(layer, section, tables + i, block, row, tiles, mask, sums, by_column, 1, 0);
        } else {
            if (section->salient)
                add_section(layer, section, tables + i, block, row, tiles, mask, sums, by_column, 0, 1);
            else
                add_section(layer, section, tables + i, block, row, tiles, mask, sums, by_column, 0, 0);
        }
    }
    for (int t = 0; t < tiles; t++) _mm512_mask_storeu_ps(y + row + 16 * t, mask, sums[t]);
}

INLINE void multiply_rows(const arb_layer *layer, const arb_plan *plan, const arb_tables *tables, int64_t tokens,
                          int64_t start, int64_t stop, float *y, int64_t stride, int by_column) {
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t row = start; row < stop; row++) y[token * stride + row] = 0;
    /* Tokens innermost: the words of a block's rows stay in the cache. */
    for (int64_t block = 0; block < plan->blocks; block++) {
        int64_t row = start;
        for (; row + 16 * TILES <= stop; row += 16 * TILES)
            for (int64_t token = 0; token < tokens; token++)
                add_block(layer, plan, tables + token * plan->sections, block, row, TILES, 0xffff, y + token * stride, by_column);
        for (; row < stop; row += 16)
            for (int64_t token = 0; token < tokens; token++)
                add_block(layer, plan, tables + token * plan->sections, block, row, 1, first_lanes(stop - row),
                          y + token * stride, by_column);
    }
}

TARGET static void multiply(const arb_layer *layer, const arb_plan *plan, const arb_tables *tables, int64_t tokens,
                            int64_t start, int64_t stop, float *y, int64_t stride) {
    if (layer->column_scales)
        multiply_rows(layer, plan, tables, tokens, start, stop, y, stride, 1);
    else
        multiply_rows(layer, plan, tables, tokens, start, stop, y, stride, 0);
}

const arb_kernels arb_kernels_avx512 = {reorder, build, multiply};
#endif
