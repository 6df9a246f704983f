/* What the self-test's files drive the oracle with: random numbers, depths and a wavelet. */
#include "selftest.h"

double noise(void)
{
    static uint64_t state = 1;
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (double)(state >> 11) / 4503599627370496.0 - 1;
}

int deepest(int64_t width)
{
    int level = 0;
    while (width > 1 && ((int64_t)1 << level) < width)
        ++level;
    return level;
}

static const double dec_lo[4] = {-0.12940952255126037, 0.22414386804201339,
                                  0.83651630373780790, 0.48296291314453416};
static const double dec_hi[4] = {-0.48296291314453416, 0.83651630373780790,
                                  -0.22414386804201339, -0.12940952255126037};
static const double rec_lo[4] = {0.48296291314453416, 0.83651630373780790,
                                  0.22414386804201339, -0.12940952255126037};
static const double rec_hi[4] = {-0.12940952255126037, -0.22414386804201339,
                                  0.83651630373780790, -0.48296291314453416};
const gwt_wavelet daubechies = {4, dec_lo, dec_hi, rec_lo, rec_hi, GWT_BOUNDARY_ZERO};
