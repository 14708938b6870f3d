/* The binary matmul: what an instruction set provides, and what their kernels share. Above: matmul.c; below: layer.h.
 *
 * For a few tokens, y = W x goes by lookup tables. A group bitmap splits the sum of a section in two. With s the signs,
 * g the group bits (as +-1, + the large group) and t = s * -g,
 *
 *     small group:  sum of s * x = (sum_s x + sum_t x) / 2        large group: (sum_s x - sum_t x) / 2
 *
 * so that every sum runs over all columns with plain +-1 weights, four columns a table lookup. Salient columns stay in the
 * words of ordinary sections with activations of zero.
 *
 * For many tokens, tiles of the weight are decoded to dense numbers for the matmul of another library.
 */
#ifndef ARB_HF_LINEAR_H
#define ARB_HF_LINEAR_H

#include "layer.h"

/* For kernels: a source defines TARGET, the instruction set that its functions are compiled for, before its includes. */
#define INLINE ARB_INLINE TARGET

enum { NIBBLES = SECTION / 4 };

/* What one token makes of one section: tables of the sums of four activations, one kind an instruction set. */
typedef struct {
    _Alignas(64) union {
        int8_t bytes[2][NIBBLES / 4][2][64]; /* group, lookup of 16 columns, high and low half, position and nibble */
        int8_t nibbles[2][NIBBLES][2][16];   /* group, four columns, high and low half, nibble */
        int16_t sums[2][NIBBLES][16];        /* group, four columns, nibble */
    } table;
    float factor[2]; /* unit of each group's sums, times the half of the identity above where there are two groups */
    int32_t total;   /* sum of the activations, in units of group 0 */
} arb_tables;

/* The largest sum of four activations in tables whose entries are a signed byte and 7 bits more: 16383, less what the
 * rounding of four numbers may add. */
#define ARB_LARGEST_SUM 16376.0f

/* A matmul by lookup tables. */
typedef struct {
    /* As arb_reorder. */
    void (*reorder)(const arb_layer *layer, const void *x, int x_type, float *stored);
    /* Tables of the sections of block, from stored activations. */
    void (*build)(const arb_layer *layer, const arb_plan *plan, int64_t block, const float *stored, arb_tables *tables);
    /* y [tokens, stride] for rows start .. stop - 1 from tables [tokens, sections]; y is float32 and overwritten. */
    void (*multiply)(const arb_layer *layer, const arb_plan *plan, const arb_tables *tables, int64_t tokens,
                     int64_t start, int64_t stop, float *y, int64_t stride);
} arb_kernels;

/* Dense weights of one block, rows start .. stop - 1: out [columns, stop - start] of type (bfloat16 or float32), column
 * order[k] from stored column k. */
typedef void arb_decode_function(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block,
                                 int64_t start, int64_t stop, void *out, int type);

extern const arb_kernels arb_kernels_plain;
arb_decode_function arb_decode_plain;
#ifdef ARB_X86
extern const arb_kernels arb_kernels_avx2, arb_kernels_avx512;
arb_decode_function arb_decode_avx2, arb_decode_avx512;
#endif

#endif
