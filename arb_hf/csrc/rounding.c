/* Rounding columns to their levels one after the other, each one's step handed on to the columns after it: the inner loop
 * of refinement="full", entry point arb_round_columns. Matrices are columns first: the n weights of a column lie together.
 *
 * Rows do not depend on each other: WIDTH of them at a time go through all columns of a panel.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "tiles.h"

/* Rows at a time; then the most columns of a panel, row parameters, and levels of a column. */
enum { WIDTH = 128, PANEL = 32, SLOTS = 10, LEVELS = 8 };

/* The arguments of arb_round_columns. */
typedef struct {
    int64_t n, k, slots, first, last;
    const float *targets, *present, *coupling, *rows, *levels;
    const uint8_t *known;
    const int64_t *counts;
    uint8_t *codes;
    float *dense, *steps;
} Rounding;

/* `count` of WIDTH numbers, the others 0. */
static inline void load_row(const float *from, int64_t count, float *to) {
    memcpy(to, from, sizeof(float) * (size_t)count);
    memset(to + count, 0, sizeof(float) * (size_t)(WIDTH - count));
}

/* The level nearest to its target of every weight of column j, the first of equally near ones; and its code. */
ARB_INLINE void nearest_level(const Rounding *r, int64_t j, float rows[][WIDTH], const float *target, float *value,
                              int32_t *code) {
    float best[WIDTH], level[WIDTH];
    for (int i = 0; i < WIDTH; i++) best[i] = INFINITY, value[i] = 0, code[i] = r->known[j * LEVELS];
    for (int64_t l = 0; l < r->counts[j]; l++) {
        const float *weight = r->levels + (j * LEVELS + l) * r->slots;
        int32_t name = r->known[j * LEVELS + l];
        /* Level l of every row: a sum of row parameters, most of which do not count. */
        memset(level, 0, sizeof level);
        for (int64_t s = 0; s < r->slots; s++) {
            float w = weight[s];
            if (w == 0) continue;
            for (int i = 0; i < WIDTH; i++) level[i] += w * rows[s][i];
        }
        /* Selections, not branches: vectorized. */
        for (int i = 0; i < WIDTH; i++) {
            float distance = fabsf(level[i] - target[i]);
            int closer = distance < best[i];
            best[i] = closer ? distance : best[i];
            value[i] = closer ? level[i] : value[i];
            code[i] = closer ? name : code[i];
        }
    }
}

/* All columns of the panel, for rows start .. start + WIDTH - 1. */
ARB_INLINE void round_chunk(const Rounding *r, int64_t start) {
    float rows[SLOTS][WIDTH], target[PANEL][WIDTH], now[WIDTH], value[WIDTH], step[WIDTH];
    int32_t code[WIDTH];
    int64_t n = r->n, count = n - start < WIDTH ? n - start : WIDTH, columns = r->last - r->first;
    for (int64_t s = 0; s < r->slots; s++) load_row(r->rows + s * n + start, count, rows[s]);
    for (int64_t j = 0; j < columns; j++) load_row(r->targets + (r->first + j) * n + start, count, target[j]);
    for (int64_t j = 0; j < columns; j++) {
        int64_t column = r->first + j;
        nearest_level(r, column, rows, target[j], value, code);
        if (r->present) load_row(r->present + column * n + start, count, now);
        const float *from = r->present ? now : target[j];
        for (int i = 0; i < WIDTH; i++) step[i] = value[i] - from[i];
        /* The columns after this one in the panel make up for its step. Later panels are the caller's. */
        for (int64_t q = j + 1; r->coupling && q < columns; q++) {
            float c = r->coupling[column * r->k + r->first + q];
            for (int i = 0; i < WIDTH; i++) target[q][i] += c * step[i];
        }
        memcpy(r->dense + column * n + start, value, sizeof(float) * (size_t)count);
        memcpy(r->steps + j * n + start, step, sizeof(float) * (size_t)count);
        for (int64_t i = 0; i < count; i++) r->codes[column * n + start + i] = (uint8_t)code[i];
    }
}

ARB_DISPATCH(round_chunk, (const Rounding *r, int64_t start), (r, start))

/* Columns first .. last - 1 of `targets` [k, n] take the nearest of their levels: codes and dense [k, n].
 *
 * Level l of column j is sum_s levels[j, l, s] * rows[s], its code known[j, l]; counts[j] of the LEVELS are used.
 * A step is the level less `present` [k, n], or less the target where there is none (a null pointer), and moves the
 * targets of the later columns by coupling [k, k] (null: by nothing), here only of those before `last`. steps
 * [last - first, n]. Returns 0, or -1 for a panel, slots or counts beyond the limits above. */
ARB_EXPORT int arb_round_columns(const float *targets, const float *present, const float *coupling, const float *rows,
                                 const float *levels, const uint8_t *known, const int64_t *counts, int64_t k, int64_t n,
                                 int64_t slots, int64_t first, int64_t last, int64_t isa, uint8_t *codes, float *dense,
                                 float *steps) {
    if (first < 0 || last > k || last - first > PANEL || slots > SLOTS) return -1;
    for (int64_t j = first; j < last; j++)
        if (counts[j] < 1 || counts[j] > LEVELS) return -1;
    Rounding r = {n, k, slots, first, last, targets, present, coupling, rows, levels, known, counts, codes, dense, steps};
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < n; start += WIDTH) round_chunk_of[isa](&r, start);
    return 0;
}
