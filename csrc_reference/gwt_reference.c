/* What does not depend on the precision of a step (checks, the limiter), and its two builds. */
#include "gwt_reference_bands.h"

#include <math.h>
#include <stdlib.h>

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

static int check_options(const gwt_adamw_options *o, const double *limiter_norm)
{
    const int good = o->step >= 1 && gwt_finite_from(0, o->lr) && o->beta1 >= 0 && o->beta1 < 1 && o->beta2 >= 0
                     && o->beta2 < 1 && gwt_finite_from(0, o->eps) && gwt_finite_from(0, o->weight_decay)
                     && gwt_finite_from(0, o->scale) && gwt_finite_from(0, o->res_scale)
                     && (isnan(o->norm_growth_limit) || o->norm_growth_limit <= 0
                         || gwt_finite_from(1, o->norm_growth_limit));
    if (!good || (o->rule != GWT_RULE_GWT && o->rule != GWT_RULE_FOAM))
        return GWT_BAD_OPTION;
    if (o->rule == GWT_RULE_FOAM && (o->norm_growth_limit > 0 || o->wavelet))
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
