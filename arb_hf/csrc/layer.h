/* One packed layer as the C code sees it: its tensors, their number formats, and how its columns are cut into sections.
 *
 * arb_hf/format describes the packed format, which the C code only reads. Two facts matter everywhere here: columns are
 * stored block by block, the salient ones of a block before its ordinary ones ("stored order"); and in a plane of bits,
 * word w of a row has its columns 32 w .. 32 w + 31, and rows are the contiguous axis.
 */
#ifndef ARB_HF_LAYER_H
#define ARB_HF_LAYER_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "native.h"

/* ---- number formats -------------------------------------------------------------------------------------------- */

/* Types of activations, scales and results; arb_hf/kernels/cpu.py knows the same numbers. */
enum { ARB_FLOAT16 = 0, ARB_BFLOAT16 = 1, ARB_FLOAT32 = 2, ARB_INT8 = 3 };

/* Bytes of one number of a type. */
static inline int64_t arb_size(int type) {
    static const int8_t sizes[] = {[ARB_FLOAT16] = 2, [ARB_BFLOAT16] = 2, [ARB_FLOAT32] = 4, [ARB_INT8] = 1};
    return sizes[type];
}

/* Where values[index] lies; NULL for an absent tensor. */
static inline const void *arb_offset(const void *values, int64_t index, int type) {
    return values ? (const char *)values + index * arb_size(type) : NULL;
}

/* Round to the nearest bfloat16, of two equally near ones to the even one. Not for NaN: the sum may overflow. */
static inline uint16_t arb_round_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float arb_half_to_float(uint16_t half);

/* values[index] as float32; an int8 code stands for code / 127. */
float arb_load(const void *values, int64_t index, int type);

/* values[at ..] = from[0 .. count - 1], rounded to type (not int8). */
void arb_store(void *values, int64_t at, const float *from, int64_t count, int type);

/* ---- the layer ------------------------------------------------------------------------------------------------- */

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

/* Row parameters per block: the scales, and one mean a group in a layer without column scales. */
static inline int64_t arb_slots(const arb_layer *layer) {
    int64_t scales = layer->groups + 2 * layer->salient_groups;
    return layer->column_scales ? scales : scales + layer->groups + layer->salient_groups;
}

/* Row parameters of one slot: row 0 of [rows], and what to multiply them by. */
static inline const void *arb_row_parameters(const arb_layer *layer, int64_t block, int slot, int64_t slots, float *unit) {
    int64_t at = block * slots + slot;
    *unit = layer->scale_type == ARB_INT8 ? arb_half_to_float(layer->row_absmax[at]) / 127.0f : 1.0f;
    return (const char *)layer->row_parameters + at * layer->rows * arb_size((int)layer->scale_type);
}

/* 32 bits of one row of a plane with n rows, from bit `shift` of word `word` on; the plane has `words` words. */
static inline uint32_t arb_bits(const uint32_t *plane, int64_t n, int word, int words, int shift) {
    uint32_t low = plane[word * n], high = shift && word + 1 < words ? plane[(word + 1) * n] : 0;
    return shift ? low >> shift | high << (32 - shift) : low;
}

/* order[k] = the original column at stored position k. */
void arb_stored_order(const arb_layer *layer, int32_t *order);

/* One token's activations x (of x_type) in stored order, as float32. */
void arb_reorder(const arb_layer *layer, const void *x, int x_type, float *stored);

/* ---- sections -------------------------------------------------------------------------------------------------- */

/* A section is at most SECTION stored columns of one block whose weights share their scales. Ordinary columns make
 * sections of one sign plane; salient columns make two, one for each order, next to each other. Sections of ordinary
 * columns start at a word, so the first of them may begin with columns that are salient: `zeroed` of them, which count
 * as zero there. */
enum { SECTION = 128 };

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

/* Returns 0, or -1: out of memory, -2: the bitmap does not hold as many salient columns as the layer says. */
int arb_plan_new(const arb_layer *layer, arb_plan *plan);
void arb_plan_free(arb_plan *plan);

static inline int64_t arb_minimum(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
