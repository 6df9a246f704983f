/* Tables of the functions that level.inc compiles for each level. */
#ifndef GWT_LEVELS_H
#define GWT_LEVELS_H

#include <math.h>

#include "step.h"
#include "vectors.h"

/* Largest and usual number of elements of a tile. While the processor works on a short tile, it prefetches the next. */
enum { LARGEST = 1024, TILE = 512 };

/* Inlined with a constant `adds`: otherwise loops are not vectorized and take three times as long. */
#define ALWAYS __attribute__((always_inline))
#define PUT(to, added)                                                                                           \
    do {                                                                                                         \
        if (adds)                                                                                                \
            (to) = (to)*keep + (added);                                                                          \
        else                                                                                                     \
            (to) = (added);                                                                                      \
    } while (0)

#define LEVEL 1
#include "level.inc"
#define LEVEL 2
#include "level.inc"
#define LEVEL 3
#include "level.inc"
#define LEVEL 4
#include "level.inc"
#define LEVEL 5
#include "level.inc"
#define LEVEL 6
#include "level.inc"
#define LEVEL 7
#include "level.inc"
#define LEVEL 8
#include "level.inc"
#define LEVEL 9
#include "level.inc"
#define LEVEL 10
#include "level.inc"

typedef void fold_of(const float *x, float *sums, int n);
typedef void fold_both_of(const float *g, float factor, float *sums, float *squares, int n);
typedef void spread_of(const gwt_step *, const float *, const float *, const float *, float *, int);
typedef void spread_folded_of(const gwt_step *, const float *, const float *, const float *, const float *, float *,
                              int);

static fold_of *const fold_at[] = {0, fold_1, fold_2, fold_3};
static fold_both_of *const fold_both_at[] = {0, fold_both_1, fold_both_2, fold_both_3};
#define EACH_LEVEL(name) {0, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6, name##_7, name##_8, \
                          name##_9, name##_10}
static spread_of *const spread_at[2][11] = {EACH_LEVEL(spread), EACH_LEVEL(spread_on)};
static spread_of *const spread_momentum_at[11] = EACH_LEVEL(spread_momentum);
static spread_folded_of *const spread_folded_at[2][11] = {EACH_LEVEL(spread_folded), EACH_LEVEL(spread_folded_on)};

/* Sum n blocks, eight elements at a time. */
static void fold(const float *x, float *sums, int n, int level)
{
    float part[2][LARGEST / 8];
    for (int turn = 0; level > 3; turn ^= 1) {
        level -= 3;
        fold_3(x, part[turn], n << level);
        x = part[turn];
    }
    fold_at[level](x, sums, n);
}

static void fold_both(const float *g, float factor, float *sums, float *squares, int n, int level)
{
    float part[2][LARGEST / 8];
    if (level <= 3) {
        fold_both_at[level](g, factor, sums, squares, n);
        return;
    }
    fold_both_3(g, factor, part[0], part[1], n << (level - 3));
    fold(part[0], sums, n, level - 3);
    fold(part[1], squares, n, level - 3);
}

#endif
