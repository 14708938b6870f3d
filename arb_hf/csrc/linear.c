/* The binary matmul: sections, threads and entry points. Instruction sets are in linear_*.c. */
#include "linear.h"

#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

float arb_half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    float value;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + (112u << 23));
    } else { /* subnormal: a multiple of 2^-24 */
        value = (float)rest * 0x1p-24f;
        return sign ? -value : value;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

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
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float arb_load(const void *values, int64_t index, int type) {
    uint32_t bits;
    float value;
    switch (type) {
    case ARB_FLOAT16: return arb_half_to_float(((const uint16_t *)values)[index]);
    case ARB_FLOAT32: return ((const float *)values)[index];
    case ARB_INT8: return (float)((const int8_t *)values)[index] / 127.0f;
    default:
        bits = (uint32_t)((const uint16_t *)values)[index] << 16;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
}

static void store(void *values, int64_t at, const float *from, int64_t count, int type) {
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

static const arb_kernels *kernels_of(int isa) {
#ifdef ARB_X86
    if (isa == ARB_AVX512) return &arb_kernels_avx512;
    if (isa == ARB_AVX2) return &arb_kernels_avx2;
#endif
    (void)isa;
    return &arb_kernels_plain;
}

static int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t count_salient(const arb_layer *layer, int64_t start, int64_t stop) {
    int64_t count = 0; /* start is a multiple of 32 */
    for (int64_t byte = start / 8; byte < (stop + 7) / 8; byte++) {
        int64_t left = stop - 8 * byte;
        count += __builtin_popcount(layer->salient[byte] & (left < 8 ? (1 << left) - 1 : 255));
    }
    return count;
}

static const void *offset(const void *values, int64_t index, int type) {
    static const int sizes[] = {2, 2, 4, 1};
    return values ? (const char *)values + index * sizes[type] : NULL;
}

static int64_t words_of(int64_t columns) { return (columns + 31) / 32; }

/* Scales of an ordinary or salient section: list row 0 .. of column_scales, then of salient_column_scales. */
static const void *scales_of(const arb_layer *layer, int row, int64_t position, int64_t salient_position) {
    if (!layer->column_scales) return NULL;
    if (row < layer->groups) return offset(layer->column_scales, row * layer->columns + position, layer->scale_type);
    row -= (int)layer->groups;
    return offset(layer->salient_column_scales, row * layer->salient_columns + salient_position, layer->scale_type);
}

static arb_section ordinary_section(const arb_layer *layer, int64_t start, int64_t stop, int64_t salient_stop) {
    int64_t word = start / 32;
    int means = (int)(layer->groups + 2 * layer->salient_groups);
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

/* order 0 or 1; the section's columns start at stored column start, salient column number. */
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
        .sign_words = (int32_t)(packed ? minimum(all - number / 32, SECTION / 32 + 1) : words_of(width)),
        .group_words = (int32_t)minimum(all - number / 32, SECTION / 32 + 1),
        .width = (int32_t)width,
        .salient = 1,
        .slot = {(int)layer->groups + order, (int)layer->groups + 2 + order},
        .mean = {layer->column_scales || order ? -1 : means, means + 1},
        .position = start,
        .scales = {scales_of(layer, order, start, number), large ? scales_of(layer, 2 + order, start, number) : NULL},
    };
    return section;
}

/* Returns 0, or -1: out of memory, -2: the bitmap does not hold as many salient columns as the layer says. */
static int make_plan(const arb_layer *layer, arb_plan *plan) {
    int64_t m = layer->columns, blocks = (m + layer->block_size - 1) / layer->block_size;
    if (count_salient(layer, 0, m) != layer->salient_columns) return -2;
    int64_t chunks = (minimum(layer->block_size, m) + SECTION - 1) / SECTION;
    plan->blocks = blocks;
    plan->first = malloc((blocks + 1) * sizeof(int64_t) + blocks * 3 * chunks * sizeof(arb_section));
    if (!plan->first) return -1;
    plan->section = (arb_section *)(plan->first + blocks + 1);
    int64_t number = 0, count = 0;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = block * layer->block_size, stop = minimum(start + layer->block_size, m);
        int64_t salient = count_salient(layer, start, stop), salient_stop = start + salient;
        plan->first[block] = count;
        for (int64_t at = start; at < salient_stop; at += SECTION)
            for (int order = 0; order < 2; order++)
                plan->section[count++] =
                    salient_section(layer, order, at, number + at - start, minimum(SECTION, salient_stop - at));
        if (salient_stop < stop)
            for (int64_t at = start + salient / 32 * 32; at < stop; at += SECTION)
                plan->section[count++] = ordinary_section(layer, at, minimum(at + SECTION, stop), salient_stop);
        number += salient;
    }
    plan->first[blocks] = plan->sections = count;
    return 0;
}

/* Weights times tokens below which another thread costs more than it brings. */
enum { THREAD_WORK = 1 << 18 };

/* y [tokens, rows] = x [tokens, columns] @ W^T, both of type x_type and contiguous.
 * The result does not depend on threads. Returns 0, -1 or -2 as make_plan. */
ARB_EXPORT int arb_linear(const arb_layer *layer, const void *x, int x_type, void *y, int64_t tokens, int threads, int isa) {
    const arb_kernels *kernels = kernels_of(isa);
    int64_t n = layer->rows, m = layer->columns, padded = (n + 15) / 16 * 16;
    arb_plan plan;
    int status = make_plan(layer, &plan);
    if (status) return status;
    size_t table_bytes = (size_t)(tokens * plan.sections) * sizeof(arb_tables);
    size_t stored_bytes = (size_t)(tokens * (m + 64)) * sizeof(float), y_bytes = (size_t)(tokens * padded) * sizeof(float);
    char *scratch = NULL;
    if (posix_memalign((void **)&scratch, 64, table_bytes + stored_bytes + y_bytes + 64)) {
        free(plan.first);
        return -1;
    }
    arb_tables *tables = (arb_tables *)scratch;
    float *sums = (float *)(scratch + table_bytes), *stored = sums + tokens * padded;
    int64_t tiles = padded / 16, useful = n * m * tokens / THREAD_WORK + 1;
    threads = (int)minimum(threads < 1 ? 1 : threads, minimum(useful, tiles));
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
        int64_t worker = 0, workers = 1;
#ifdef _OPENMP
        worker = omp_get_thread_num();
        workers = omp_get_num_threads();
#endif
        for (int64_t token = worker; token < tokens; token += workers)
            kernels->reorder(layer, offset(x, token * m, x_type), x_type, stored + token * (m + 64));
#ifdef _OPENMP
#pragma omp barrier
#endif
        for (int64_t part = worker; part < tokens * plan.blocks; part += workers) {
            int64_t token = part / plan.blocks;
            kernels->build(layer, &plan, part % plan.blocks, stored + token * (m + 64), tables + token * plan.sections);
        }
#ifdef _OPENMP
#pragma omp barrier
#endif
        int64_t start = tiles * worker / workers * 16, stop = minimum(tiles * (worker + 1) / workers * 16, n);
        kernels->multiply(layer, &plan, tables, tokens, start, stop, sums, padded);
        for (int64_t token = 0; token < tokens; token++)
            store(y, token * n + start, sums + token * padded + start, stop - start, x_type);
    }
    free(scratch);
    free(plan.first);
    return 0;
}

static void stored_order(const arb_layer *layer, int32_t *order) {
    for (int64_t start = 0; start < layer->columns; start += layer->block_size) {
        int64_t stop = minimum(start + layer->block_size, layer->columns);
        for (int salient = 1; salient >= 0; salient--)
            for (int64_t column = start; column < stop; column++)
                if ((layer->salient[column / 8] >> column % 8 & 1) == salient) *order++ = (int32_t)column;
    }
}

/* out [columns, stop - start], of type bfloat16 or float32 and contiguous: the transpose of rows start .. stop - 1 of the
 * dense weight, columns in their original order. Returns 0, -1 or -2 as make_plan. */
ARB_EXPORT int arb_decode(const arb_layer *layer, int64_t start, int64_t stop, void *out, int type, int threads, int isa) {
    arb_plan plan;
    int status = make_plan(layer, &plan);
    if (status) return status;
    int32_t *order = malloc(layer->columns * sizeof(int32_t));
    if (!order) {
        free(plan.first);
        return -1;
    }
    stored_order(layer, order);
    arb_decode_function *decode = arb_decode_of(isa);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
#endif
    for (int64_t block = 0; block < plan.blocks; block++) decode(layer, &plan, order, block, start, stop, out, type);
    free(order);
    free(plan.first);
    return 0;
}
