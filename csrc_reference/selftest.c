/* Drives the oracle over many shapes and every level, in buffers of the exact size, under sanitizers.
 *
 * What the numbers should be is the business of tests/csrc_reference/; here are only the properties that need no
 * second implementation. Prints the number of configurations; exits 1 at the first that fails. */
#include "selftest.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static long configurations = 0;

static gwt_adamw_options usual_options(int level)
{
    const gwt_adamw_options o = {1,     0.01, 0.9,          0.999, 1e-6, 0.1, 0.25, 1.01,
                                 level, 0,    GWT_RULE_GWT, 1,     0.75, NULL};
    return o;
}

#define REAL float
#define NAME(base) base##_f
#define ROUNDING FLT_EPSILON
#include "selftest_real.inc"
#undef REAL
#undef NAME
#undef ROUNDING

#define REAL double
#define NAME(base) base##_d
#define ROUNDING DBL_EPSILON
#include "selftest_real.inc"
#undef REAL
#undef NAME
#undef ROUNDING

static void check_sizes(void)
{
    CHECK(gwt_haar_length(13, 0) == 13 && gwt_haar_length(13, 1) == 7 && gwt_haar_length(13, 3) == 2);
    CHECK(gwt_haar_length(0, 62) == 0 && gwt_haar_length(INT64_MAX, 62) == 2);
    CHECK(gwt_haar_length(-1, 0) == -1 && gwt_haar_length(8, -1) == -1 && gwt_haar_length(8, 63) == -1);
    CHECK(gwt_coefficient_count(2, 13, 3, NULL) == 2 * (2 + 2 + 4 + 7));
    CHECK(gwt_coefficient_count(INT64_MAX, 2, 1, NULL) == -1);
    CHECK(gwt_coefficient_count(1, 8, 4, NULL) == -1 && gwt_coefficient_count(1, 8, 3, NULL) == 8);
    CHECK(gwt_coefficient_count(2, 13, GWT_LEVEL_ROW, NULL) == 2 * (1 + 13));
    CHECK(gwt_length(13, GWT_LEVEL_ROW, NULL) == 1 && gwt_length(0, GWT_LEVEL_ROW, NULL) == 0);
    CHECK(gwt_length(13, 2, &daubechies) == 5 && gwt_coefficient_count(2, 13, 2, &daubechies) == 2 * (5 + 5 + 8));
    CHECK(gwt_length(0, 2, &daubechies) == 0 && gwt_length(13, GWT_LEVEL_ROW, &daubechies) == -1);
}

int main(void)
{
    static const int64_t wide[] = {64, 65, 100, 127, 128, 129, 257, 1000};
    check_sizes();
    for (int64_t rows = 0; rows <= 3; ++rows) {
        for (int64_t width = 0; width <= 40; ++width) {
            check_width_f(rows, width);
            check_width_d(rows, width);
        }
        for (size_t i = 0; i < sizeof wide / sizeof *wide; ++i) {
            check_width_f(rows, wide[i]);
            check_width_d(rows, wide[i]);
        }
    }
    check_refusals_f();
    check_refusals_d();
    printf("%ld configurations passed\n", configurations);
    printf("%ld of the other optimizers passed\n", check_optimizers());
    return 0;
}
