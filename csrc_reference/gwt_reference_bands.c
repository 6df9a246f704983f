/* Sizes, their checks and the layout of packed coefficients, and the two builds of the transform. */
#include "gwt_reference_bands.h"

#include <math.h>
#include <stdlib.h>

enum { MAX_LEVEL = 62, MAX_TAPS = 256 };

static int64_t half_up(int64_t n)
{
    return n / 2 + n % 2;
}

int gwt_finite_from(double lowest, double value)
{
    return value >= lowest && isfinite(value);
}

int64_t gwt_haar_length(int64_t width, int level)
{
    if (width < 0 || level < 0 || level > MAX_LEVEL)
        return -1;
    for (int l = 0; l < level; ++l)
        width = half_up(width);
    return width;
}

int gwt_detail_bands(const gwt_bands *b)
{
    return b->level == GWT_LEVEL_ROW ? 1 : b->level;
}

int64_t gwt_detail_columns(const gwt_bands *b, int l)
{
    if (b->level == GWT_LEVEL_ROW || b->width == 0)
        return b->width;
    if (!b->wavelet)
        return gwt_haar_length(b->width, l);
    int64_t n = b->width;
    for (int done = 0; done < l; ++done)
        n = (n + b->wavelet->taps - 1) / 2;
    return n;
}

int64_t gwt_approximation_columns(const gwt_bands *b)
{
    if (b->level == GWT_LEVEL_ROW)
        return b->width > 0;
    return gwt_detail_columns(b, b->level);
}

/* The columns of A, D_L, ..., D_(finest) side by side; with finest = L + 1, those of A alone. */
static int64_t columns_down_to(int finest, const gwt_bands *b)
{
    int64_t columns = gwt_approximation_columns(b);
    for (int l = gwt_detail_bands(b); l >= finest; --l)
        columns += gwt_detail_columns(b, l);
    return columns;
}

int64_t gwt_packed_columns(const gwt_bands *b)
{
    return columns_down_to(1, b);
}

int64_t gwt_detail_offset(const gwt_bands *b, int l)
{
    return b->rows * columns_down_to(l + 1, b);
}

int64_t gwt_scratch_elements(const gwt_bands *b)
{
    /* A band is no longer than the row or the filter, whichever is longer. */
    return b->wavelet ? 2 * (b->width + b->wavelet->taps) : b->width;
}

static int check_wavelet(const gwt_bands *b)
{
    const gwt_wavelet *w = b->wavelet;
    if (!w)
        return GWT_OK;
    if (w->taps < 2 || w->taps > MAX_TAPS || w->taps % 2 || w->boundary < GWT_BOUNDARY_ZERO
        || w->boundary > GWT_BOUNDARY_PERIODIC || b->level == GWT_LEVEL_ROW)
        return GWT_BAD_OPTION;
    return w->dec_lo && w->dec_hi && w->rec_lo && w->rec_hi ? GWT_OK : GWT_NULL_POINTER;
}

int gwt_check_bands(const gwt_bands *b, size_t element)
{
    if (b->rows < 0 || b->width < 0)
        return GWT_BAD_SHAPE;
    const int by_levels = b->level != GWT_LEVEL_ROW;
    if (by_levels && (b->level < 0 || b->level > MAX_LEVEL))
        return GWT_BAD_LEVEL;
    /* 2**level >= 2 * width, where neither side can overflow. */
    if (by_levels && b->width > 0 && b->level > 0 && ((int64_t)1 << (b->level - 1)) >= b->width)
        return GWT_BAD_LEVEL;
    const int bad = check_wavelet(b);
    if (bad != GWT_OK)
        return bad;
    /* A level pads by less than a filter's taps, so no sum of columns, nor twice the width and the taps,
     * overflows once `width` passes. */
    const int64_t most = (int64_t)(PTRDIFF_MAX / element);
    if (b->width > most - MAX_LEVEL * (b->wavelet ? MAX_TAPS : 1))
        return GWT_BAD_SHAPE;
    const int64_t columns = gwt_packed_columns(b);
    if (columns > 0 && b->rows > most / columns)
        return GWT_BAD_SHAPE;
    return GWT_OK;
}

int64_t gwt_length(int64_t width, int level, const gwt_wavelet *wavelet)
{
    const gwt_bands b = {0, width, level, wavelet};
    return gwt_check_bands(&b, sizeof(double)) == GWT_OK ? gwt_approximation_columns(&b) : -1;
}

int64_t gwt_coefficient_count(int64_t rows, int64_t width, int level, const gwt_wavelet *wavelet)
{
    const gwt_bands b = {rows, width, level, wavelet};
    return gwt_check_bands(&b, sizeof(double)) == GWT_OK ? rows * gwt_packed_columns(&b) : -1;
}

/* The place in a row of n elements of what stands at i, which may be beyond its ends; -1 for a zero. */
static int64_t place_of(int64_t i, int64_t n, int32_t boundary)
{
    if (i >= 0 && i < n)
        return i;
    int64_t period;
    switch (boundary) {
    case GWT_BOUNDARY_CONSTANT:
        return i < 0 ? 0 : n - 1;
    case GWT_BOUNDARY_SYMMETRIC:
        i = (i % (2 * n) + 2 * n) % (2 * n);
        return i < n ? i : 2 * n - 1 - i;
    case GWT_BOUNDARY_REFLECT:
        period = n > 1 ? 2 * n - 2 : 1;
        i = (i % period + period) % period;
        return i < n ? i : period - i;
    case GWT_BOUNDARY_PERIODIC:
        return (i % n + n) % n;
    default:
        return -1;
    }
}

#define REAL float
#define NAME(base) base##_f
#include "gwt_reference_transform.inc"
#undef REAL
#undef NAME

#define REAL double
#define NAME(base) base##_d
#include "gwt_reference_transform.inc"
#undef REAL
#undef NAME
