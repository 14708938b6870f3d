/* The binary matmul: the parts that its instruction sets share. The packed format is that of arb_hf/format/packing.py.
 *
 * A layer is cut into sections: at most SECTION stored columns of one block whose weights share their scales. Ordinary
 * columns make sections of one sign plane; salient columns make two, one for each order. A group bitmap splits the sum
 * of a section in two. With s the signs, g the group bits (as +-1, + the large group) and t = s * -g,
 *
 *     small group:  sum of s * x = (sum_s x + sum_t x) / 2        large group: (sum_s x - sum_t x) / 2
 *
 * so that every sum runs over all columns with plain +-1 weights, four columns a table lookup. Salient columns stay in the
 * words of ordinary sections with activations of zero.
 */
#ifndef ARB_HF_LINEAR_H
#define ARB_HF_LINEAR_H

#include <stddef.h>
#include <stdint.h>

#include "native.h"

enum { SECTION = 128, NIBBLES = SECTION / 4 };

/* Types of activations and scales; arb_hf/kernels/cpu.py knows the same numbers. */
enum { ARB_FLOAT16 = 0, ARB_BFLOAT16 = 1, ARB_FLOAT32 = 2, ARB_INT8 = 3 };

/* One layer's packed tensors; field order is known to arb_hf/kernels/cpu.py. Absent tensors are NULL. */
typedef struct {
    int64_t rows, columns, salient_columns, block_size;
    int64_t groups, salient_groups, scale_type;
    const uint32_t *weight, *second_plane;
    const uint8_t *salient;
    const void *row_parameters;
    const uint32_t *salient_group_plane;
    const uint16_t *row_absmax;
    const void *column_scales, *salient_column_scales;
} arb_layer;

typedef struct {
    const uint32_t *signs, *groups;      /* first word, row 0; groups is NULL with one group */
    int32_t sign_shift, group_shift;     /* bit of that word which is the section's first column */
    int32_t sign_words, group_words;     /* words of the plane from there on */
    int32_t width;                       /* columns */
    int32_t zeroed;                      /* leading columns that belong to a salient section */
    int32_t salient;                     /* of salient columns */
    int32_t slot[2], mean[2];            /* row parameters of each group; mean[0] is -1 without means */
    int64_t position;                    /* stored column of the first one */
    const void *scales[2];               /* column scales of each group from the first column on, or NULL */
} arb_section;

/* The sections of all blocks; those of block b are first[b] .. first[b + 1] - 1. */
typedef struct {
    int64_t blocks, sections;
    int64_t *first;
    arb_section *section;
} arb_plan;

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

/* The largest magnitude of a table entry, a sum of four activations: 7 bits below a signed byte, less the rounding. */
#define ARB_LARGEST_SUM 16376.0f

/* What an instruction set provides. */
typedef struct {
    /* One token's activations x (of x_type) in stored order, as float32. */
    void (*reorder)(const arb_layer *layer, const void *x, int x_type, float *stored);
    /* Tables of the sections of block, from stored activations. */
    void (*build)(const arb_layer *layer, const arb_plan *plan, int64_t block, const float *stored, arb_tables *tables);
    /* y [tokens, stride] for rows start .. stop - 1 from tables [tokens, sections]; y is float32 and overwritten. */
    void (*multiply)(const arb_layer *layer, const arb_plan *plan, const arb_tables *tables, int64_t tokens,
                     int64_t start, int64_t stop, float *y, int64_t stride);
} arb_kernels;

extern const arb_kernels arb_kernels_plain;
void arb_reorder_plain(const arb_layer *layer, const void *x, int x_type, float *stored);
#ifdef ARB_X86
extern const arb_kernels arb_kernels_avx2, arb_kernels_avx512;
#endif

/* Dense weights of one block, rows start .. stop - 1: out [columns, stop - start] of type (bfloat16 or float32), column
 * order[k] from stored column k. */
typedef void arb_decode_function(const arb_layer *layer, const arb_plan *plan, const int32_t *order, int64_t block,
                                 int64_t start, int64_t stop, void *out, int type);
arb_decode_function *arb_decode_of(int isa);
#ifdef ARB_X86
arb_decode_function arb_decode_avx2, arb_decode_avx512;
#endif

float arb_half_to_float(uint16_t half);
float arb_load(const void *values, int64_t index, int type);

/* Row parameters of one slot: row 0 of [rows], and what to multiply them by. */
static inline const void *arb_row_parameters(const arb_layer *layer, int64_t block, int slot, int64_t slots, float *unit) {
    static const int sizes[] = {2, 2, 4, 1};
    int64_t at = block * slots + slot;
    *unit = layer->scale_type == ARB_INT8 ? arb_half_to_float(layer->row_absmax[at]) / 127.0f : 1.0f;
    return (const char *)layer->row_parameters + at * layer->rows * sizes[layer->scale_type];
}

static inline int64_t arb_slots(const arb_layer *layer) {
    int64_t scales = layer->groups + 2 * layer->salient_groups;
    return layer->column_scales ? scales : scales + layer->groups + layer->salient_groups;
}

#endif
