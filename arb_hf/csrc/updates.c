/* The alternating updates of ARB and of ARB-RC's second order: entry points arb_fit_arb and arb_fit_arb_rc.
 *
 * W is the matrix of a block's weights, of which one group is fitted: all sums run over the group's members. B_ij = +-1
 * are signs (0 is that of an exact 0, and of what is not in the group), and a prime marks what belongs to the second order.
 *
 * ARB, the twin of arb_hf/binarize/paper/arb.py, fits W_ij ~ a_i B_ij + m_i, with row scales a and means m. One iteration:
 *
 *     m_i  <- m_i + mean_j (W_ij - a_i B_ij - m_i)
 *     a_i  <- sum_j B_ij (W_ij - m_i) / sum_j B_ij^2
 *     B_ij <- sign(W_ij - m_i)
 *
 * Second order, W_ij ~ a_i B_ij + a'_i B'_ij + m_i:
 *
 *     m_i  <- m_i + mean_j (W_ij - a_i B_ij - a'_i B'_ij - m_i)
 *     a_i  <- sum_j B_ij (W_ij - m_i - a'_i B'_ij) / sum_j B_ij^2
 *     a'_i <- sum_j B'_ij (W_ij - m_i - a_i B_ij) / sum_j B'_ij^2
 *     (B_ij, B'_ij) <- the pair with a_i B_ij + a'_i B'_ij nearest to W_ij - m_i
 *
 * ARB-RC, the twin of arb_hf/binarize/paper/arb_rc.py, fits W_ij ~ r_i s_j B_ij, with row scales r and column scales s:
 *
 *     r_i <- sum_j s_j B_ij W_ij / sum_j (s_j B_ij)^2
 *     s_j <- sum_i r_i B_ij W_ij / sum_i (r_i B_ij)^2
 *
 * Second order, the only one here, W_ij ~ r_i s_j B_ij + r'_i s'_j B'_ij: the same with W_ij - r'_i s'_j B'_ij for W_ij, then
 * r' and s' with W_ij - r_i s_j B_ij, then
 *
 *     (B_ij, B'_ij) <- the pair with r_i s_j B_ij + r'_i s'_j B'_ij nearest to W_ij
 *
 * Both start from residual binarization: each order takes the signs and mean magnitudes of what the order before it leaves,
 * in ARB after its mean.
 *
 * Rows are taken in tiles of LANES, one row per vector lane; sums are double. What crosses rows, the sums for the column
 * scales, is added up tile by tile in their order: results do not depend on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tiles.h"

#define EPSILON 1e-8 /* added to denominators, as in the twins: rows and columns without members get scales of 0 */

/* Tiles times columns in one short pass, below which waking threads costs more than it brings. */
enum { WORTH_THREADS = 4096 };

static inline double sign_of(double x) { return (x > 0 ? 1.0 : 0.0) - (x < 0 ? 1.0 : 0.0); }

/* Signs with first * a + second * b nearest to x; of equally near ones the first in --, -+, +-, ++. Selections instead of
 * branches, so that the loops around it are vectorized. */
ARB_INLINE void nearest_pair(float x, float a, float b, double *first, double *second) {
    float best = fabsf(x + a + b), one = -1.0f, two = -1.0f, distance = fabsf(x - (b - a));
    two = distance < best ? 1.0f : two;
    best = distance < best ? distance : best;
    distance = fabsf(x - (a - b));
    one = distance < best ? 1.0f : one;
    two = distance < best ? -1.0f : two;
    best = distance < best ? distance : best;
    distance = fabsf(x - (a + b));
    one = distance < best ? 1.0f : one;
    two = distance < best ? 1.0f : two;
    *first = one;
    *second = two;
}

/* ---- ARB ------------------------------------------------------------------------------------------------------- */

/* One tile: values, members (0 or 1) and sign planes, [columns, LANES] each. */
typedef struct {
    const double *values, *member;
    double *signs[2];
} ArbTile;

/* Per lane: the number of members, mean and scales. Means, scales and residuals are floats: weights from bfloat16 have
 * exact ties, which the published code decides by the rounding of just these steps. */
typedef struct {
    double count[LANES];
    float mean[LANES], scale[2][LANES];
} ArbState;

/* What the first `orders` orders leave of a value. */
ARB_INLINE float arb_left(const ArbTile *tile, const ArbState *s, int64_t orders, int64_t at, int l) {
    float value = (float)tile->values[at];
    if (orders == 0) return value;
    float level = s->scale[0][l] * (float)tile->signs[0][at];
    if (orders == 2) level += s->scale[1][l] * (float)tile->signs[1][at];
    return value - (level + s->mean[l]);
}

/* Order o of residual binarization: the mean of what is left, the signs around it, and the mean magnitude. */
ARB_INLINE void arb_start(const ArbTile *tile, ArbState *s, int64_t columns, int64_t o) {
    double total[LANES] = {0}, deviation[LANES] = {0};
    float centre[LANES];
    for (int64_t j = 0; j < columns; j++)
        for (int l = 0; l < LANES; l++)
            total[l] += tile->member[j * LANES + l] * arb_left(tile, s, o, j * LANES + l, l);
    for (int l = 0; l < LANES; l++) centre[l] = (float)(total[l] / s->count[l]);
    for (int64_t j = 0; j < columns; j++)
        for (int l = 0; l < LANES; l++) {
            float left = arb_left(tile, s, o, j * LANES + l, l) - centre[l];
            deviation[l] += tile->member[j * LANES + l] * fabsf(left);
            tile->signs[o][j * LANES + l] = tile->member[j * LANES + l] * sign_of(left);
        }
    for (int l = 0; l < LANES; l++) {
        s->mean[l] += centre[l];
        s->scale[o][l] = (float)(deviation[l] / s->count[l]);
    }
}

/* m <- m + mean of what all orders leave. */
ARB_INLINE void arb_refit_mean(const ArbTile *tile, ArbState *s, int64_t columns, int64_t order) {
    double total[LANES] = {0};
    for (int64_t j = 0; j < columns; j++)
        for (int l = 0; l < LANES; l++)
            total[l] += tile->member[j * LANES + l] * arb_left(tile, s, order, j * LANES + l, l);
    for (int l = 0; l < LANES; l++) s->mean[l] += (float)(total[l] / s->count[l]);
}

/* a <- projection of what mean and other order leave onto the signs of order o. */
ARB_INLINE void arb_refit_scale(const ArbTile *tile, ArbState *s, int64_t columns, int64_t order, int64_t o) {
    double total[LANES] = {0}, square[LANES] = {0};
    for (int64_t j = 0; j < columns; j++)
        for (int l = 0; l < LANES; l++) {
            int64_t at = j * LANES + l;
            double sign = tile->signs[o][at]; /* 0 outside the group */
            float target = (float)tile->values[at] - s->mean[l];
            if (order == 2) target -= s->scale[1 - o][l] * (float)tile->signs[1 - o][at];
            total[l] += sign * target;
            square[l] += sign * sign;
        }
    for (int l = 0; l < LANES; l++) s->scale[o][l] = (float)(total[l] / (square[l] + EPSILON));
}

/* B <- the sign, or the nearest pair of signs; 0 outside the group. */
ARB_INLINE void arb_signs(const ArbTile *tile, const ArbState *s, int64_t columns, int64_t order) {
    for (int64_t j = 0; j < columns; j++)
        for (int l = 0; l < LANES; l++) {
            int64_t at = j * LANES + l;
            float centred = (float)tile->values[at] - s->mean[l];
            double one = sign_of(centred), two = 0;
            if (order == 2) nearest_pair(centred, s->scale[0][l], s->scale[1][l], &one, &two);
            tile->signs[0][at] = tile->member[at] * one;
            if (order == 2) tile->signs[1][at] = tile->member[at] * two;
        }
}

ARB_INLINE void arb_fit_tile(const ArbTile *tile, ArbState *s, int64_t columns, int64_t order, int64_t iterations) {
    memset(s, 0, sizeof *s);
    for (int64_t j = 0; j < columns; j++)
        for (int l = 0; l < LANES; l++) s->count[l] += tile->member[j * LANES + l];
    for (int l = 0; l < LANES; l++) s->count[l] = s->count[l] > 0 ? s->count[l] : 1; /* no members: means of 0 */
    for (int64_t o = 0; o < order; o++) arb_start(tile, s, columns, o);
    for (int64_t i = 0; i < iterations; i++) {
        arb_refit_mean(tile, s, columns, order);
        for (int64_t o = 0; o < order; o++) arb_refit_scale(tile, s, columns, order, o);
        arb_signs(tile, s, columns, order);
    }
}

/* The order as a constant, so that the loops hold no branches. */
ARB_INLINE void arb_tile(const ArbTile *tile, ArbState *s, int64_t columns, int64_t order, int64_t iterations) {
    if (order == 1)
        arb_fit_tile(tile, s, columns, 1, iterations);
    else
        arb_fit_tile(tile, s, columns, 2, iterations);
}

ARB_DISPATCH(arb_tile, (const ArbTile *tile, ArbState *s, int64_t columns, int64_t order, int64_t iterations),
             (tile, s, columns, order, iterations))

/* Fits one group (member: 0 or 1) of `values` [rows, columns]: signs [order, rows, columns], scales [order, rows],
 * means [rows]. Returns 0, or -1 without memory. */
ARB_EXPORT int arb_fit_arb(const float *values, const float *member, int64_t rows, int64_t columns, int64_t order,
                           int64_t iterations, int64_t isa, float *signs, float *scales, float *means) {
    int64_t tiles = tile_count(rows), size = columns * LANES;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    { /* rows are independent: each thread takes whole tiles through all iterations */
        double *room = malloc(sizeof(double) * 4 * (size_t)size);
        ArbTile tile = {room, room + size, {room + 2 * size, room + 3 * size}};
        ArbState state;
        failed |= room == NULL;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; t++) {
            if (room == NULL) continue;
            load_tile(values, rows, columns, t, room);
            load_tile(member, rows, columns, t, room + size);
            arb_tile_of[isa](&tile, &state, columns, order, iterations);
            int64_t lanes = tile_lanes(rows, t), row = t * LANES;
            for (int64_t o = 0; o < order; o++) {
                store_tile(tile.signs[o], rows, columns, t, signs + o * rows * columns);
                for (int64_t l = 0; l < lanes; l++) scales[o * rows + row + l] = state.scale[o][l];
            }
            for (int64_t l = 0; l < lanes; l++) means[row + l] = state.mean[l];
        }
        free(room);
    }
    return failed ? -1 : 0;
}

/* ---- ARB-RC, second order -------------------------------------------------------------------------------------- */

/* One tile: values (0 outside the group), members and the two sign planes, [columns, LANES] each; row scales. */
typedef struct {
    double *values, *member, *signs[2], *rows[2];
} RcTile;

/* The first guess for order o: signs, row scales, and each column's sum of |residual| / row scale (top) and count of
 * members in rows with a positive scale (bottom). `column` is the scale of order 0, which order 1 starts behind. */
ARB_INLINE void rc_start(RcTile tile, int64_t columns, int64_t o, const double *column, double *top,
                         double *bottom) {
    double total[LANES] = {0}, count[LANES] = {0}, inverse[LANES], present[LANES];
    /* Row scales: mean magnitudes of what is left. */
    for (int64_t j = 0; j < columns; j++) {
        const double *w = tile.values + j * LANES, *m = tile.member + j * LANES, *one = tile.signs[0] + j * LANES;
        double *sign = tile.signs[o] + j * LANES;
        for (int l = 0; l < LANES; l++) {
            double left = o == 0 ? w[l] : w[l] - tile.rows[0][l] * column[j] * one[l];
            total[l] += m[l] * fabs(left);
            count[l] += m[l];
            sign[l] = m[l] * sign_of(left);
        }
    }
    for (int l = 0; l < LANES; l++) {
        double scale = total[l] / (count[l] > 0 ? count[l] : 1);
        tile.rows[o][l] = scale;
        present[l] = scale > 0 ? 1.0 : 0.0;
        inverse[l] = scale > 0 ? 1 / scale : 0;
    }
    /* Column scales will be means of magnitude over row scale: this tile's part of both sums. */
    for (int64_t j = 0; j < columns; j++) {
        const double *w = tile.values + j * LANES, *m = tile.member + j * LANES, *one = tile.signs[0] + j * LANES;
        double sum[LANES], number[LANES];
        for (int l = 0; l < LANES; l++) {
            double left = o == 0 ? w[l] : w[l] - tile.rows[0][l] * column[j] * one[l];
            sum[l] = m[l] * fabs(left) * inverse[l];
            number[l] = m[l] * present[l];
        }
        top[j] = sum_lanes(sum);
        bottom[j] = sum_lanes(number);
    }
}

/* Order o: r given s, then each column's numerator and denominator of the new s given that r. This tile's rows have all
 * that their r needs, while s needs all tiles. */
ARB_INLINE void rc_refit(RcTile tile, int64_t columns, int64_t o, double *const *column, double *top,
                         double *bottom) {
    double up[LANES] = {0}, down[LANES] = {0};
    const double *own = column[o], *others = column[1 - o], *row = tile.rows[1 - o]; /* s, s', r' */
    for (int64_t j = 0; j < columns; j++) {
        const double *w = tile.values + j * LANES, *b = tile.signs[o] + j * LANES, *c = tile.signs[1 - o] + j * LANES;
        for (int l = 0; l < LANES; l++) {
            up[l] += own[j] * b[l] * (w[l] - row[l] * others[j] * c[l]); /* b is 0 outside the group */
            down[l] += own[j] * own[j] * b[l] * b[l];
        }
    }
    double *fitted = tile.rows[o];
    for (int l = 0; l < LANES; l++) fitted[l] = up[l] / (down[l] + EPSILON);
    for (int64_t j = 0; j < columns; j++) {
        const double *w = tile.values + j * LANES, *b = tile.signs[o] + j * LANES, *c = tile.signs[1 - o] + j * LANES;
        double sum[LANES], square[LANES];
        for (int l = 0; l < LANES; l++) {
            sum[l] = fitted[l] * b[l] * (w[l] - row[l] * others[j] * c[l]);
            square[l] = fitted[l] * fitted[l] * b[l] * b[l];
        }
        top[j] = sum_lanes(sum);
        bottom[j] = sum_lanes(square);
    }
}

/* (B, B') <- the nearest pairs; 0 outside the group. */
ARB_INLINE void rc_signs(RcTile tile, int64_t columns, double *const *column) {
    for (int64_t j = 0; j < columns; j++) {
        const double *w = tile.values + j * LANES, *m = tile.member + j * LANES;
        double *one = tile.signs[0] + j * LANES, *two = tile.signs[1] + j * LANES;
        double s = column[0][j], t = column[1][j];
        for (int l = 0; l < LANES; l++) {
            nearest_pair(w[l], tile.rows[0][l] * s, tile.rows[1][l] * t, &one[l], &two[l]);
            one[l] *= m[l];
            two[l] *= m[l];
        }
    }
}

/* What one pass over all tiles does. */
enum { START, REFIT, SIGNS };

ARB_INLINE void rc_step(RcTile tile, int64_t step, int64_t columns, int64_t o, double *const *column,
                        double *top, double *bottom) {
    if (step == START)
        rc_start(tile, columns, o, column[0], top, bottom);
    else if (step == REFIT)
        rc_refit(tile, columns, o, column, top, bottom);
    else
        rc_signs(tile, columns, column);
}

ARB_DISPATCH(rc_step,
             (RcTile tile, int64_t step, int64_t columns, int64_t o, double *const *column, double *top, double *bottom),
             (tile, step, columns, o, column, top, bottom))

typedef struct {
    int64_t rows, columns, tiles, isa;
    double *room;      /* the tiles */
    double *sums;      /* numerators and denominators of the columns: of all tiles together, then of each tile */
    double *column[2]; /* column scales of both orders */
} RcFit;

static RcTile rc_tile(const RcFit *fit, int64_t t) {
    int64_t size = fit->columns * LANES;
    double *start = fit->room + t * (4 * size + 2 * LANES), *rows = start + 4 * size;
    return (RcTile){start, start + size, {start + 2 * size, start + 3 * size}, {rows, rows + LANES}};
}

/* One step over all tiles; the column scales of order o follow from the sums. */
static void rc_pass(const RcFit *fit, int64_t step, int64_t o) {
    int64_t columns = fit->columns;
#pragma omp parallel for schedule(static) if (fit->tiles * columns >= WORTH_THREADS)
    for (int64_t t = 0; t < fit->tiles; t++) {
        double *top = fit->sums + 2 * columns * (t + 1);
        rc_step_of[fit->isa](rc_tile(fit, t), step, columns, o, fit->column, top, top + columns);
    }
    if (step == SIGNS) return;
    double *top = fit->sums, *bottom = top + columns;
    add_tiles(top + 2 * columns, fit->tiles, 2 * columns, top);
    for (int64_t j = 0; j < columns; j++)
        fit->column[o][j] = top[j] / (step == START ? fmax(bottom[j], 1) : bottom[j] + EPSILON);
}

/* Fits one group (member: 0 or 1) of `values` [rows, columns] with two orders: signs [2, rows, columns], row scales
 * [2, rows], column scales [2, columns]. Returns 0, or -1 without memory. */
ARB_EXPORT int arb_fit_arb_rc(const float *values, const float *member, int64_t rows, int64_t columns,
                              int64_t iterations, int64_t isa, float *signs, float *row_scales, float *column_scales) {
    int64_t tiles = tile_count(rows), size = columns * LANES;
    double *room = malloc(sizeof(double) * (size_t)(tiles * (4 * size + 2 * LANES)));
    double *sums = malloc(sizeof(double) * (size_t)(2 * columns * (tiles + 2)));
    if (room == NULL || sums == NULL) {
        free(room), free(sums);
        return -1;
    }
    double *last = sums + 2 * columns * (tiles + 1); /* behind the sums: the column scales */
    RcFit fit = {rows, columns, tiles, isa, room, sums, {last, last + columns}};
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tiles; t++) {
        RcTile tile = rc_tile(&fit, t);
        load_tile(values, rows, columns, t, tile.values);
        load_tile(member, rows, columns, t, tile.member);
        for (int64_t i = 0; i < size; i++) tile.values[i] *= tile.member[i];
    }
    /* Passes over all tiles, with the column scales between them. */
    for (int64_t o = 0; o < 2; o++) rc_pass(&fit, START, o);
    for (int64_t i = 0; i < iterations; i++) {
        for (int64_t o = 0; o < 2; o++) rc_pass(&fit, REFIT, o);
        rc_pass(&fit, SIGNS, 0);
    }
    for (int64_t o = 0; o < 2; o++) {
        for (int64_t t = 0; t < tiles; t++) {
            RcTile tile = rc_tile(&fit, t);
            store_tile(tile.signs[o], rows, columns, t, signs + o * rows * columns);
            for (int64_t l = 0; l < tile_lanes(rows, t); l++)
                row_scales[o * rows + t * LANES + l] = (float)tile.rows[o][l];
        }
        for (int64_t j = 0; j < columns; j++) column_scales[o * columns + j] = (float)fit.column[o][j];
    }
    free(room), free(sums);
    return 0;
}
