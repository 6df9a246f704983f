/* What does not depend on the precision (sizes, checks, the limiter), and the two builds of the rest. */
#include "gwt_reference.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>

enum { MAX_LEVEL = 62 };

static int64_t half_up(int64_t n)
{
    return n / 2 + n % 2;
}

int64_t gwt_haar_length(int64_t width, int level)
{
    if (width < 0 || level < 0 || level > MAX_LEVEL)
        return -1;
    for (int l = 0; l < level; ++l)
        width = half_up(width);
    return width;
}

/* The columns of A, D_L, ..., D_(finest) side by side; with finest = L + 1, those of A alone. */
static int64_t columns_down_to(int finest, int64_t width, int level)
{
    int64_t columns = gwt_haar_length(width, level);
    for (int l = level; l >= finest; --l)
        columns += gwt_haar_length(width, l);
    return columns;
}

/* Where D_l begins in the packed coefficients: behind every coarser band. */
static int64_t detail_offset(int l, int64_t rows, int64_t width, int level)
{
    return rows * columns_down_to(l + 1, width, level);
}

static int check_shape(int64_t rows, int64_t width, int level, size_t element)
{
    if (rows < 0 || width < 0)
        return GWT_BAD_SHAPE;
    if (level < 0 || level > MAX_LEVEL)
        return GWT_BAD_LEVEL;
    /* 2**level >= 2 * width, where neither side can overflow. */
    if (width > 0 && level > 0 && ((int64_t)1 << (level - 1)) >= width)
        return GWT_BAD_LEVEL;
    /* A level pads by at most one column, so no sum of columns overflows once `width` passes. */
    const int64_t most = (int64_t)(PTRDIFF_MAX / element);
    if (width > most - MAX_LEVEL)
        return GWT_BAD_SHAPE;
    const int64_t columns = columns_down_to(1, width, level);
    if (columns > 0 && rows > most / columns)
        return GWT_BAD_SHAPE;
    return GWT_OK;
}

int64_t gwt_haar_coefficient_count(int64_t rows, int64_t width, int level)
{
    if (check_shape(rows, width, level, sizeof(double)) != GWT_OK)
        return -1;
    return rows * columns_down_to(1, width, level);
}

/* Level 0 has one rule: plain AdamW. */
static int is_folded(const gwt_adamw_options *o)
{
    return o->level > 0 && o->rule == GWT_RULE_FOAM;
}

/* GWT_RULE_FOAM never has one: check_options refuses it. */
static int has_limiter(const gwt_adamw_options *o)
{
    return o->level > 0 && o->norm_growth_limit > 0;
}

/* False for NaN and infinity too. */
static int finite_from(double lowest, double value)
{
    return value >= lowest && isfinite(value);
}

static int check_options(const gwt_adamw_options *o, const double *limiter_norm)
{
    const int good = o->step >= 1 && finite_from(0, o->lr) && o->beta1 >= 0 && o->beta1 < 1 && o->beta2 >= 0
                     && o->beta2 < 1 && finite_from(0, o->eps) && finite_from(0, o->weight_decay)
                     && finite_from(0, o->scale)
                     && (isnan(o->norm_growth_limit) || o->norm_growth_limit <= 0
                         || finite_from(1, o->norm_growth_limit));
    if (!good || (o->rule != GWT_RULE_GWT && o->rule != GWT_RULE_FOAM))
        return GWT_BAD_OPTION;
    if (o->rule == GWT_RULE_FOAM && o->norm_growth_limit > 0)
        return GWT_BAD_OPTION;
    if (has_limiter(o) && limiter_norm && *limiter_norm < 0)
        return GWT_BAD_OPTION;
    return GWT_OK;
}

/* The divisor that keeps the norm from growing faster than gamma a step; replaces the previous norm. */
static double limit_growth(double norm, double gamma, double *previous)
{
    double limit = 1;
    if (*previous != 0) {
        const double growth = norm / (*previous + 1e-8);
        limit = (growth < gamma ? gamma : growth) / gamma;
    }
    *previous = norm / limit;
    return limit;
}

#define REAL float
#define NAME(base) base##_f
#define SQRT sqrtf
#include "gwt_reference_real.inc"
#undef REAL
#undef NAME
#undef SQRT

#define REAL double
#define NAME(base) base##_d
#define SQRT sqrt
#include "gwt_reference_real.inc"
#undef REAL
#undef NAME
#undef SQRT
