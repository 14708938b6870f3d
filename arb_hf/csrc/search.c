/* Errors of all candidate partitions of a block: how many columns are salient, which threshold splits the groups.
 *
 * Entry points arb_salient_errors, arb_split_errors, arb_output_errors and arb_sort_magnitudes.
 *
 * A candidate is judged by plain residual binarization (BR): a group of `count` values is replaced by mean +- mean
 * deviation, in `order` rounds. With the mean mu and the deviation D = sum |w - mu| of n values, the error of a round is
 *
 *     sum (w - mu -+ D / n)^2 = sum w^2 - n mu^2 - D^2 / n - (number of w equal to mu) (D / n)^2
 *
 * where the last term is there because the sign of 0 is 0: such a value is replaced by mu itself. What is subtracted from
 * the energy sum w^2 is called the gain.
 *
 * All sums are double and run over one row at a time; rows are taken in tiles of LANES, one row per vector lane, and
 * tiles are added in their order. So results depend neither on the instruction set (no product is fused with a sum) nor
 * on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tiles.h"

/* ---- salient columns ------------------------------------------------------------------------------------------- */

/* Adds to errors[l] what BR in two rounds leaves of columns [first, last) of lane l, whose sum is sums[l]. */
ARB_INLINE void add_part_error(const double *tile, int64_t first, int64_t last, const double *sums, double *errors) {
    double count = (double)(last - first);
    double mean[LANES], above[LANES], below[LANES], at[LANES];
    double deviation[LANES] = {0}, balance[LANES] = {0}, energy[LANES] = {0}, second[LANES] = {0}, nonzero[LANES] = {0};
    /* First round: mean deviation; `balance` is how many more values are above the mean than below. */
    for (int l = 0; l < LANES; l++) mean[l] = sums[l] / count;
    for (int64_t j = first; j < last; j++) {
        const double *value = tile + j * LANES;
        for (int l = 0; l < LANES; l++) {
            double centred = value[l] - mean[l];
            deviation[l] += fabs(centred);
            balance[l] += (centred > 0 ? 1.0 : 0.0) - (centred < 0 ? 1.0 : 0.0);
        }
    }
    /* The three values of the first round, moved by the mean of what they leave: -scale * balance / count. That mean is the
     * second round's, so what is left of these values is centred. */
    for (int l = 0; l < LANES; l++) {
        double scale = deviation[l] / count;
        at[l] = mean[l] - scale * balance[l] / count;
        above[l] = at[l] + scale;
        below[l] = at[l] - scale;
    }
    for (int64_t j = first; j < last; j++) {
        const double *value = tile + j * LANES;
        for (int l = 0; l < LANES; l++) {
            double level = value[l] > mean[l] ? above[l] : at[l];
            double left = value[l] - (value[l] < mean[l] ? below[l] : level);
            energy[l] += left * left;
            second[l] += fabs(left);
            nonzero[l] += left != 0 ? 1.0 : 0.0;
        }
    }
    /* Second round: sum (|left| - scale)^2, where zeros stay zeros. */
    for (int l = 0; l < LANES; l++) {
        double scale = second[l] / count;
        errors[l] += energy[l] + scale * (scale * nonzero[l] - 2 * second[l]);
    }
}

/* errors[i]: of the tile's rows, when columns 0 .. i are one part and the rest is the other. */
ARB_INLINE void salient_tile(const double *tile, int64_t columns, int64_t candidates, double *errors) {
    double first[LANES] = {0}, rest[LANES] = {0};
    for (int64_t j = 0; j < columns; j++)
        for (int l = 0; l < LANES; l++) rest[l] += tile[j * LANES + l];
    for (int64_t i = 0; i < candidates; i++) {
        double error[LANES] = {0}, sum = 0;
        for (int l = 0; l < LANES; l++) { /* column i goes over to the first part */
            first[l] += tile[i * LANES + l];
            rest[l] -= tile[i * LANES + l];
        }
        add_part_error(tile, 0, i + 1, first, error);
        add_part_error(tile, i + 1, columns, rest, error);
        for (int l = 0; l < LANES; l++) sum += error[l];
        errors[i] = sum;
    }
}

ARB_DISPATCH(salient_tile, (const double *tile, int64_t columns, int64_t candidates, double *errors),
             (tile, columns, candidates, errors))

/* errors[i]: the error when the first i + 1 columns of `ranked` [rows, columns] are salient; candidates < columns.
 * Returns 0, or -1 without memory. */
ARB_EXPORT int arb_salient_errors(const float *ranked, int64_t rows, int64_t columns, int64_t candidates, int64_t isa,
                                  double *errors) {
    int64_t tiles = tile_count(rows);
    double *partial = malloc(sizeof(double) * (size_t)(tiles * candidates));
    int failed = 0;
    if (partial == NULL) return -1;
#pragma omp parallel reduction(| : failed)
    {
        double *tile = malloc(sizeof(double) * (size_t)(columns * LANES));
        failed |= tile == NULL;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; t++) {
            if (tile == NULL) continue;
            load_tile(ranked, rows, columns, t, tile);
            salient_tile_of[isa](tile, columns, candidates, partial + t * candidates);
        }
        free(tile);
    }
    add_tiles(partial, tiles, candidates, errors);
    free(partial);
    return failed ? -1 : 0;
}

/* ---- group splits ---------------------------------------------------------------------------------------------- */

/* A threshold splits a row by magnitude. In ascending order the small magnitudes are one run of positions, and prefix sums
 * give count, mean and deviation of both groups after a few binary searches, without a pass over the values. */

/* One row in ascending order, and its prefix sums: sum[p] = value[0] + ... + value[p - 1]. From `count` up to `width`,
 * a power of two, `value` is infinite. */
typedef struct {
    int64_t count, width;
    double *value, *sum;
} SortedRow;

/* The positions [low, high) of a row (the small-magnitude group), or all others (the large-magnitude group). */
typedef struct {
    int64_t low, high;
    int large;
} Group;

typedef struct {
    double count, sum;
} Part;

/* found[i]: the number of values below x[i]. All searches take a step together: alone, each would wait for its loads. */
ARB_INLINE void locate(const double *value, int64_t width, const double *x, int64_t count, int64_t *found) {
    for (int64_t i = 0; i < count; i++) found[i] = 0;
    for (int64_t step = width / 2; step > 0; step /= 2)
        for (int64_t i = 0; i < count; i++) found[i] += step & -(int64_t)(value[found[i] + step - 1] < x[i]);
    for (int64_t i = 0; i < count; i++) found[i] += value[found[i]] < x[i];
}

ARB_DISPATCH(locate, (const double *value, int64_t width, const double *x, int64_t count, int64_t *found),
             (value, width, x, count, found))

/* The first position after those equal to x, which start at p if there are any. */
static inline int64_t past_equals(SortedRow row, double x, int64_t p) {
    while (p < row.count && row.value[p] == x) p++;
    return p;
}

/* Number and sum of the members of a group at positions below p. */
static inline Part members_below(SortedRow row, Group group, int64_t p) {
    int64_t inside = p < group.low ? group.low : p > group.high ? group.high : p;
    Part part = {(double)(inside - group.low), row.sum[inside] - row.sum[group.low]};
    if (group.large) part = (Part){(double)p - part.count, row.sum[p] - part.sum};
    return part;
}

/* Sum of |value - x| over the members between two positions, and how many of them equal x, which is at position p. */
static inline Part deviation(SortedRow row, Group group, int64_t first, int64_t last, double x, int64_t p) {
    int64_t q = past_equals(row, x, p);
    p = p < first ? first : p > last ? last : p;
    q = q < first ? first : q > last ? last : q;
    /* Positions first <= p <= q <= last: members below x, equal to it, above it. */
    Part from = members_below(row, group, first), below = members_below(row, group, p);
    Part upto = members_below(row, group, q), to = members_below(row, group, last);
    double left = (below.count - from.count) * x - (below.sum - from.sum);
    double right = (to.sum - upto.sum) - (to.count - upto.count) * x;
    return (Part){upto.count - below.count, left + right};
}

/* Where BR's first round puts a group: its mean, the mean deviation, and the members above and equal to the mean. */
typedef struct {
    double count, mean, scale, above, equal;
} Round;

/* p is the mean's position. */
static inline Round first_round(SortedRow row, Group group, double mean, int64_t p) {
    Part all = members_below(row, group, row.count), below = members_below(row, group, p);
    Part upto = members_below(row, group, past_equals(row, mean, p));
    double above = all.count - upto.count;
    /* Sum of |value - mean|: sum - count * mean of those above, plus count * mean - sum of those below. */
    double total = all.sum - upto.sum - above * mean + below.count * mean - below.sum;
    return (Round){all.count, mean, all.count > 0 ? total / all.count : 0, above, upto.count - below.count};
}

/* The mean of what the first round leaves: -scale * (above - below) / count. */
static inline double shift_of(Round round) {
    return round.count > 0 ? -round.scale * (2 * round.above + round.equal - round.count) / round.count : 0;
}

/* By how much the first round lowers the energy: the formula at the head of this file. */
static inline double first_gain(Round r) {
    return r.count * (r.mean * r.mean + r.scale * r.scale) + r.equal * r.scale * r.scale;
}

/* By how much a second round lowers the energy that the first leaves. The first put values below the mean (at position p)
 * to one level and those above to another; the second measures from these levels, moved by `shift`: their positions
 * are low and high. Values equal to the mean have nothing left but the shift. */
static inline double second_gain(SortedRow row, Group group, Round round, int64_t p, int64_t low, int64_t high) {
    if (round.count == 0) return 0;
    double shift = shift_of(round), centre = round.mean + shift;
    Part left = deviation(row, group, 0, p, centre - round.scale, low);
    Part right = deviation(row, group, past_equals(row, round.mean, p), row.count, centre + round.scale, high);
    /* Values exactly at a level have a sign of 0. */
    double zeros = left.count + right.count + (shift == 0 ? round.equal : 0);
    double scale = (left.sum + right.sum + round.equal * fabs(shift)) / round.count;
    return round.count * (shift * shift + scale * scale) + zeros * scale * scale;
}

/* Room for one thread: `x` and `found` hold six numbers a candidate, `gains` one, the others two. */
typedef struct {
    float *tile;
    SortedRow row;
    double *x, *gains;
    int64_t *found, *bounds, *same;
    Group *groups;
    Round *rounds;
} Workspace;

/* The splits of all thresholds into w->groups, both groups of each; successive thresholds with the same split share it,
 * as most do when there are few columns. same[k]: the split of threshold k. Returns the number of splits.
 * limits: for every threshold the smallest double above its negative, then the threshold: below them are the values
 * <= -threshold and those < threshold, and between them the small group. */
static int64_t distinct_splits(const Workspace *w, const double *limits, int64_t candidates, int64_t isa) {
    int64_t count = 0;
    locate_of[isa](w->row.value, w->row.width, limits, 2 * candidates, w->bounds);
    for (int64_t k = 0; k < candidates; k++) {
        int64_t low = w->bounds[2 * k], high = w->bounds[2 * k + 1];
        if (high < low) high = low; /* crossed by a threshold of 0: no small group */
        Group *last = w->groups + 2 * (count - 1);
        if (count == 0 || last->low != low || last->high != high) {
            w->groups[2 * count] = (Group){low, high, 0};
            w->groups[2 * count + 1] = (Group){low, high, 1};
            count++;
        }
        w->same[k] = count - 1;
    }
    return count;
}

/* The first rounds of all groups, into w->rounds. */
static void first_rounds(const Workspace *w, int64_t groups, int64_t isa) {
    SortedRow row = w->row;
    for (int64_t i = 0; i < groups; i++) {
        Part all = members_below(row, w->groups[i], row.count);
        w->x[i] = all.count > 0 ? all.sum / all.count : 0;
    }
    locate_of[isa](row.value, row.width, w->x, groups, w->found);
    for (int64_t i = 0; i < groups; i++) w->rounds[i] = first_round(row, w->groups[i], w->x[i], w->found[i]);
}

/* Adds to each threshold's gain those of its two groups, which w->x has by split. */
static void add_by_candidate(const Workspace *w, int64_t candidates, double *gains) {
    for (int64_t k = 0; k < candidates; k++) {
        gains[k] += w->x[2 * w->same[k]];
        gains[k] += w->x[2 * w->same[k] + 1];
    }
}

/* Adds to gains[k] what `order` rounds gain in the row at hand under threshold k. */
static void add_split_gains(const Workspace *w, const double *limits, int64_t candidates, int64_t order, int64_t isa,
                            double *gains) {
    int64_t groups = 2 * distinct_splits(w, limits, candidates, isa), *found = w->found;
    first_rounds(w, groups, isa);
    for (int64_t i = 0; i < groups; i++) w->x[i] = first_gain(w->rounds[i]);
    add_by_candidate(w, candidates, gains);
    if (order == 1) return;
    double *low = w->x + groups, *high = low + groups;
    for (int64_t i = 0; i < groups; i++) {
        double centre = w->rounds[i].mean + shift_of(w->rounds[i]);
        low[i] = centre - w->rounds[i].scale;
        high[i] = centre + w->rounds[i].scale;
    }
    locate_of[isa](w->row.value, w->row.width, low, 2 * groups, found + groups);
    for (int64_t i = 0; i < groups; i++)
        w->x[i] = second_gain(w->row, w->groups[i], w->rounds[i], found[i], found[groups + i], found[2 * groups + i]);
    add_by_candidate(w, candidates, gains);
}

/* Batcher's odd-even merge sort of `width` (a power of two) values in every lane. */
ARB_INLINE void sort_tile(float *tile, int64_t width) {
    for (int64_t merged = 1; merged < width; merged *= 2)
        for (int64_t step = merged; step >= 1; step /= 2)
            for (int64_t start = step % merged; start + step < width; start += 2 * step)
                for (int64_t j = start; j < start + step && j + step < width; j++) {
                    if (j / (2 * merged) != (j + step) / (2 * merged)) continue; /* not in the same merged run */
                    float *a = tile + j * LANES, *b = tile + (j + step) * LANES;
                    for (int l = 0; l < LANES; l++) {
                        float x = a[l], y = b[l];
                        a[l] = x < y ? x : y;
                        b[l] = x < y ? y : x;
                    }
                }
}

ARB_DISPATCH(sort_tile, (float *tile, int64_t width), (tile, width))

static int workspace_new(int64_t columns, int64_t candidates, Workspace *w) {
    size_t width = 1, groups = 2 * (size_t)candidates;
    while (width < (size_t)columns) width *= 2;
    *w = (Workspace){
        .tile = malloc(sizeof(float) * width * LANES),
        .row = {columns, (int64_t)width, malloc(sizeof(double) * width), malloc(sizeof(double) * (width + 1))},
        .x = malloc(sizeof(double) * 3 * groups),
        .gains = malloc(sizeof(double) * groups / 2),
        .found = malloc(sizeof(int64_t) * 3 * groups),
        .bounds = malloc(sizeof(int64_t) * groups),
        .same = malloc(sizeof(int64_t) * groups / 2),
        .groups = malloc(sizeof(Group) * groups),
        .rounds = malloc(sizeof(Round) * groups),
    };
    return w->tile && w->row.value && w->row.sum && w->x && w->gains && w->found && w->bounds && w->same && w->groups &&
           w->rounds;
}

static void workspace_free(Workspace *w) {
    free(w->tile), free(w->row.value), free(w->row.sum), free(w->x), free(w->gains), free(w->found), free(w->bounds);
    free(w->same), free(w->groups), free(w->rounds);
}

/* The rows of a tile, every one in ascending order, and infinity where there are no rows or columns. */
static void sorted_tile(const float *metric, int64_t rows, int64_t t, int64_t isa, const Workspace *w) {
    for (int64_t i = 0; i < w->row.width * LANES; i++) w->tile[i] = INFINITY;
    for (int64_t l = 0; l < tile_lanes(rows, t); l++)
        for (int64_t j = 0; j < w->row.count; j++)
            w->tile[j * LANES + l] = metric[(t * LANES + l) * w->row.count + j];
    sort_tile_of[isa](w->tile, w->row.width);
}

/* Puts lane l of the sorted tile in w->row; returns its energy. */
static double take_row(const Workspace *w, int64_t l) {
    double energy = 0, *value = w->row.value, *sum = w->row.sum;
    sum[0] = 0;
    for (int64_t j = 0; j < w->row.width; j++) value[j] = w->tile[j * LANES + l];
    for (int64_t j = 0; j < w->row.count; j++) {
        sum[j + 1] = sum[j] + value[j];
        energy += value[j] * value[j];
    }
    return energy;
}

static double *new_limits(const float *thresholds, int64_t candidates) {
    double *limits = malloc(sizeof(double) * 2 * (size_t)candidates);
    for (int64_t k = 0; k < candidates && limits; k++) {
        limits[2 * k] = nextafter(-(double)thresholds[k], INFINITY);
        limits[2 * k + 1] = thresholds[k];
    }
    return limits;
}

/* errors[k]: what BR of `order` rounds leaves of `metric` [rows, columns], of both groups, split at
 * |value| >= thresholds[k]. Returns 0, or -1 without memory. */
ARB_EXPORT int arb_split_errors(const float *metric, int64_t rows, int64_t columns, const float *thresholds,
                                int64_t candidates, int64_t order, int64_t isa, double *errors) {
    int64_t tiles = tile_count(rows);
    double *partial = malloc(sizeof(double) * (size_t)(tiles * candidates)), *limits = new_limits(thresholds, candidates);
    int failed = 0;
    if (partial == NULL || limits == NULL) {
        free(partial), free(limits);
        return -1;
    }
#pragma omp parallel reduction(| : failed)
    {
        Workspace w;
        int ready = workspace_new(columns, candidates, &w);
        failed |= !ready;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; t++) {
            if (!ready) continue;
            double energy = 0, *of_tile = partial + t * candidates;
            memset(w.gains, 0, sizeof(double) * (size_t)candidates);
            sorted_tile(metric, rows, t, isa, &w);
            for (int64_t l = 0; l < tile_lanes(rows, t); l++) {
                energy += take_row(&w, l);
                add_split_gains(&w, limits, candidates, order, isa, w.gains);
            }
            for (int64_t k = 0; k < candidates; k++) of_tile[k] = energy - w.gains[k];
        }
        workspace_free(&w);
    }
    add_tiles(partial, tiles, candidates, errors);
    free(partial), free(limits);
    return failed ? -1 : 0;
}

/* ---- group splits by output error (ARB-X) ------------------------------------------------------------------------ */

/* The residual of a row is x - sum_p level_p plane_p, where x is the row, planes 0 and 1 are the members and the signs of
 * the small-magnitude group, and 2 and 3 those of the large one. Its output error, residual^T S residual with S the second
 * moment of the layer's inputs, is a quadratic form of the levels; its coefficients are gram[u][v] = u^T S v for the
 * planes and x (which comes last). From one threshold to the next few entries of the planes change. With product[v] =
 * S v at hand, each change costs one row of S. */
enum { PLANES = 4, VECTORS = 5, NOWHERE = -1 };

typedef struct {
    int64_t width;
    const double *second_moment;
    double *product[VECTORS], *x;
    double gram[VECTORS][VECTORS];
    int *group, *sign; /* of every column that is split */
} OutputRow;

/* Adds `amount` to one entry of a vector, so that products and gram follow. */
ARB_INLINE void change_entry(OutputRow *row, int vector, int64_t column, double amount) {
    const double *moment = row->second_moment + column * row->width;
    double *product = row->product[vector];
    /* (u + a e)^T S v = u^T S v + a (S v)_column, on both sides of the diagonal; on it, twice, and a^2 S_column,column. */
    for (int v = 0; v < VECTORS; v++) {
        row->gram[vector][v] += amount * row->product[v][column];
        row->gram[v][vector] += amount * row->product[v][column];
    }
    row->gram[vector][vector] += amount * amount * moment[column];
    for (int64_t j = 0; j < row->width; j++) product[j] += amount * moment[j];
}

/* Lets planes and products follow from one threshold's rounds to those of the next. */
ARB_INLINE void follow(OutputRow *row, const int64_t *columns, int64_t count, float threshold, const Round *rounds) {
    for (int64_t i = 0; i < count; i++) {
        int64_t column = columns[i];
        double value = row->x[column];
        int group = fabs(value) >= threshold, old = row->group[i];
        int sign = (value > rounds[group].mean) - (value < rounds[group].mean);
        if (group != old) { /* out of the old group's planes, into the new one's members */
            if (old != NOWHERE) {
                change_entry(row, 2 * old, column, -1);
                if (row->sign[i]) change_entry(row, 2 * old + 1, column, -row->sign[i]);
            }
            change_entry(row, 2 * group, column, 1);
            row->sign[i] = 0;
        }
        if (sign != row->sign[i]) change_entry(row, 2 * group + 1, column, sign - row->sign[i]);
        row->group[i] = group;
        row->sign[i] = sign;
    }
}

static inline double output_error(const OutputRow *row, const Round *rounds) {
    double level[VECTORS] = {-rounds[0].mean, -rounds[0].scale, -rounds[1].mean, -rounds[1].scale, 1}, error = 0;
    for (int u = 0; u < VECTORS; u++)
        for (int v = 0; v < VECTORS; v++) error += level[u] * level[v] * row->gram[u][v];
    return error;
}

/* Adds to errors[k] the output error of one row x under threshold k, whose rounds are number same[k]. */
ARB_INLINE void add_output_errors(OutputRow *row, const float *x, const int64_t *columns, int64_t count,
                                  const float *thresholds, int64_t candidates, const int64_t *same, const Round *rounds,
                                  double *errors) {
    memset(row->gram, 0, sizeof row->gram);
    for (int v = 0; v < VECTORS; v++) memset(row->product[v], 0, sizeof(double) * (size_t)row->width);
    /* x enters like any change, entry by entry; then planes follow the thresholds, which rise. */
    for (int64_t j = 0; j < row->width; j++) row->x[j] = x[j];
    for (int64_t j = 0; j < row->width; j++) change_entry(row, PLANES, j, row->x[j]);
    for (int64_t i = 0; i < count; i++) row->group[i] = NOWHERE, row->sign[i] = 0;
    for (int64_t k = 0; k < candidates; k++) {
        follow(row, columns, count, thresholds[k], rounds + 2 * same[k]);
        errors[k] += output_error(row, rounds + 2 * same[k]);
    }
}

ARB_DISPATCH(add_output_errors,
             (OutputRow * row, const float *x, const int64_t *columns, int64_t count, const float *thresholds,
              int64_t candidates, const int64_t *same, const Round *rounds, double *errors),
             (row, x, columns, count, thresholds, candidates, same, rounds, errors))

static int output_row_new(int64_t width, const double *second_moment, OutputRow *row) {
    double *room = malloc(sizeof(double) * (VECTORS + 1) * (size_t)width);
    int *codes = malloc(sizeof(int) * 2 * (size_t)width);
    *row = (OutputRow){.width = width, .second_moment = second_moment, .x = room, .group = codes};
    if (room == NULL || codes == NULL) return 0;
    row->sign = codes + width;
    for (int v = 0; v < VECTORS; v++) row->product[v] = room + (v + 1) * width;
    return 1;
}

/* errors[k]: output error under `second_moment` [width, width], symmetric, of `block` [rows, width] when its `columns`
 * [count], also given as `metric` [rows, count], are replaced by first-order BR of both groups, split at thresholds[k]
 * (ascending). Returns 0, or -1 without memory. */
ARB_EXPORT int arb_output_errors(const float *block, const float *metric, const int64_t *columns, int64_t rows,
                                 int64_t width, int64_t count, const float *thresholds, int64_t candidates,
                                 const double *second_moment, int64_t isa, double *errors) {
    int64_t tiles = tile_count(rows);
    double *partial = calloc((size_t)(tiles * candidates), sizeof(double)), *limits = new_limits(thresholds, candidates);
    int failed = 0;
    if (partial == NULL || limits == NULL) {
        free(partial), free(limits);
        return -1;
    }
#pragma omp parallel reduction(| : failed)
    {
        Workspace w;
        OutputRow row;
        int ready = workspace_new(count, candidates, &w) & output_row_new(width, second_moment, &row);
        failed |= !ready;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; t++) {
            if (!ready) continue;
            sorted_tile(metric, rows, t, isa, &w);
            for (int64_t l = 0; l < tile_lanes(rows, t); l++) {
                take_row(&w, l);
                first_rounds(&w, 2 * distinct_splits(&w, limits, candidates, isa), isa);
                add_output_errors_of[isa](&row, block + (t * LANES + l) * width, columns, count, thresholds, candidates,
                                          w.same, w.rounds, partial + t * candidates);
            }
        }
        workspace_free(&w);
        free(row.x), free(row.group);
    }
    add_tiles(partial, tiles, candidates, errors);
    free(partial), free(limits);
    return failed ? -1 : 0;
}

/* ---- order statistics ------------------------------------------------------------------------------------------ */

/* Sorts non-negative floats in place, as unsigned integers: their bits have the same order. A radix sort in three passes
 * of 11 bits; `spare` has room for `count` numbers. */
ARB_EXPORT int arb_sort_magnitudes(uint32_t *values, int64_t count, uint32_t *spare) {
    enum { DIGITS = 2048 };
    for (int shift = 0; shift < 32; shift += 11) {
        int64_t start[DIGITS] = {0}, next = 0;
        for (int64_t i = 0; i < count; i++) start[values[i] >> shift & (DIGITS - 1)]++;
        for (int d = 0; d < DIGITS; d++) { /* from counts to each digit's first place */
            int64_t size = start[d];
            start[d] = next;
            next += size;
        }
        for (int64_t i = 0; i < count; i++) spare[start[values[i] >> shift & (DIGITS - 1)]++] = values[i];
        uint32_t *swap = values;
        values = spare;
        spare = swap;
    }
    /* Three swaps: `spare` is the caller's `values` now. */
    if (count > 0) memcpy(spare, values, sizeof(uint32_t) * (size_t)count);
    return 0;
}
