/* Tiles for the binarizing code: LANES rows of a matrix as double, column by column, one row per vector lane; and the
 * choice of the instruction set that their loops are compiled for. */
#ifndef ARB_HF_TILES_H
#define ARB_HF_TILES_H

#include <stdint.h>
#include <string.h>

#include "native.h"

enum { LANES = 32 };

/* The loops are plain C. Inlined into functions that carry a target attribute they are vectorized for that target:
 * ARB_DISPATCH(f, parameters, arguments) makes f_of[isa] from the ARB_INLINE function f. */
#ifdef ARB_X86
#define ARB_DISPATCH(name, parameters, arguments)                                   \
    static void name##_plain parameters { name arguments; }                         \
    ARB_TARGET_AVX2 static void name##_avx2 parameters { name arguments; }          \
    ARB_TARGET_AVX512 static void name##_avx512 parameters { name arguments; }      \
    static void (*const name##_of[])parameters = {name##_plain, name##_avx2, name##_avx512};
#else
#define ARB_DISPATCH(name, parameters, arguments)           \
    static void name##_plain parameters { name arguments; } \
    static void (*const name##_of[])parameters = {name##_plain};
#endif

static inline int64_t tile_count(int64_t rows) { return (rows + LANES - 1) / LANES; }

/* Rows of tile t: LANES, or what is left for the last one. */
static inline int64_t tile_lanes(int64_t rows, int64_t t) {
    return rows - t * LANES < LANES ? rows - t * LANES : LANES;
}

/* Tile t of a matrix [rows, columns]; rows past the last are zero. */
static inline void load_tile(const float *matrix, int64_t rows, int64_t columns, int64_t t, double *tile) {
    int64_t first = t * LANES, count = tile_lanes(rows, t);
    if (count < LANES) memset(tile, 0, sizeof(double) * (size_t)(columns * LANES));
    for (int64_t l = 0; l < count; l++)
        for (int64_t j = 0; j < columns; j++) tile[j * LANES + l] = matrix[(first + l) * columns + j];
}

static inline void store_tile(const double *tile, int64_t rows, int64_t columns, int64_t t, float *matrix) {
    for (int64_t l = 0; l < tile_lanes(rows, t); l++)
        for (int64_t j = 0; j < columns; j++) matrix[(t * LANES + l) * columns + j] = (float)tile[j * LANES + l];
}

/* The sum of LANES numbers, by halves: in the same order for every instruction set. Overwrites them. */
static inline double sum_lanes(double *lane) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lane[l] += lane[l + half];
    return lane[0];
}

/* total[i] = the sum of partial[t, i] over the tiles, in their order. */
static inline void add_tiles(const double *partial, int64_t tiles, int64_t width, double *total) {
    memset(total, 0, sizeof(double) * (size_t)width);
    for (int64_t t = 0; t < tiles; t++)
        for (int64_t i = 0; i < width; i++) total[i] += partial[t * width + i];
}

#endif
