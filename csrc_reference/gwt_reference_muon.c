/* Muon and its Newton-Schulz iteration. */
#include "gwt_reference_work.h"

#include <math.h>
#include <stdlib.h>

static int good_iteration(const gwt_newton_schulz_options *o)
{
    return isfinite(o->a) && isfinite(o->b) && isfinite(o->c) && gwt_finite_from(0, o->eps) && o->steps >= 0
           && o->steps < 100;
}

/* c = a b, or a b^T where `transposed`; a is [n, k], c [n, m]. */
static void multiply(double *c, const double *a, const double *b, int64_t n, int64_t k, int64_t m, int transposed)
{
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < m; ++j) {
            double sum = 0;
            for (int64_t l = 0; l < k; ++l)
                sum += a[i * k + l] * (transposed ? b[j * k + l] : b[l * m + j]);
            c[i * m + j] = sum;
        }
    }
}

/* The elements of memory for one matrix: two of its size and two Gram matrices. */
static int64_t iteration_elements(int64_t rows, int64_t width)
{
    const int64_t n = rows < width ? rows : width, m = rows < width ? width : rows;
    return 2 * n * m + 2 * n * n;
}

/* One matrix, o and x may be the same; x is brought to n rows of m, n <= m. */
static void iterate(const double *x, double *o, double *memory, int64_t rows, int64_t width,
                    const gwt_newton_schulz_options *s)
{
    const int tall = rows > width;
    const int64_t n = tall ? width : rows, m = tall ? rows : width;
    double *const y = memory, *const product = y + n * m;
    double *const gram = product + n * m, *const square = gram + n * n;

    double squares = 0;
    for (int64_t i = 0; i < n * m; ++i)
        squares += x[i] * x[i];
    const double norm = sqrt(squares);
    const double divisor = s->add_eps ? norm + s->eps : norm < s->eps ? s->eps : norm;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < m; ++j)
            y[i * m + j] = (tall ? x[j * n + i] : x[i * m + j]) / divisor;

    for (int32_t step = 0; step < s->steps; ++step) {
        multiply(gram, y, y, n, m, n, 1);
        multiply(square, gram, gram, n, n, n, 0);
        for (int64_t i = 0; i < n * n; ++i)
            gram[i] = s->b * gram[i] + s->c * square[i];
        multiply(product, gram, y, n, n, m, 0);
        for (int64_t i = 0; i < n * m; ++i)
            y[i] = s->a * y[i] + product[i];
    }
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < m; ++j)
            o[tall ? j * n + i : i * m + j] = y[i * m + j];
}

/* The bytes of matrix memory; 0 where they cannot be counted. */
static size_t iteration_bytes(int64_t rows, int64_t width)
{
    const int64_t most = (int64_t)(PTRDIFF_MAX / sizeof(double) / 4);
    return width > 0 && rows > most / width ? 0 : (size_t)iteration_elements(rows, width) * sizeof(double);
}

int gwt_newton_schulz_d(const double *x, double *o, int64_t batch, int64_t rows, int64_t width,
                        const gwt_newton_schulz_options *options)
{
    if (!options)
        return GWT_NULL_POINTER;
    const gwt_bands b = {gwt_all_rows(batch, rows), width, 0, NULL};
    const int bad = gwt_check_bands(&b, sizeof(double));
    if (bad != GWT_OK)
        return bad;
    if (!good_iteration(options))
        return GWT_BAD_OPTION;
    if (b.rows == 0 || width == 0)
        return GWT_OK;
    if (!x || !o)
        return GWT_NULL_POINTER;
    const size_t bytes = iteration_bytes(rows, width);
    double *memory = bytes ? malloc(bytes) : NULL;
    if (!memory)
        return GWT_OUT_OF_MEMORY;
    for (int64_t e = 0; e < batch; ++e)
        iterate(x + e * rows * width, o + e * rows * width, memory, rows, width, options);
    free(memory);
    return GWT_OK;
}

int gwt_muon_step_d(double *p, const double *g, double *momentum_buffer, int64_t batch, int64_t rows,
                    int64_t width, const gwt_muon_options *options)
{
    if (!options)
        return GWT_NULL_POINTER;
    const gwt_muon_options o = *options;
    gwt_work w;
    int status = gwt_check_work(&w, gwt_all_rows(batch, rows), width, &o.common);
    if (status != GWT_OK)
        return status;
    if (!(o.momentum >= 0 && o.momentum < 1) || !gwt_finite_from(0, o.detail_scale)
        || o.adjust < GWT_ADJUST_ORIGINAL || o.adjust > GWT_ADJUST_SPECTRAL_UNCLAMPED
        || !good_iteration(&o.newton_schulz))
        return GWT_BAD_OPTION;
    if (w.elements == 0)
        return GWT_OK;
    if (!p || !g || !momentum_buffer)
        return GWT_NULL_POINTER;
    const size_t bytes = iteration_bytes(rows, width);
    double *memory = bytes ? malloc(bytes) : NULL;
    status = memory ? gwt_begin_work(&w, g, &o.common) : GWT_OUT_OF_MEMORY;
    if (status != GWT_OK)
        goto done;

    /* The momentum of the approximation; the details pass through. */
    const double rest = o.summed ? 1 : 1 - o.momentum;
    const double detail_scale = o.summed ? o.detail_scale / (1 - o.momentum) : o.detail_scale;
    for (int64_t k = 0; k < w.coarse; ++k) {
        const double a = w.coeffs[k];
        momentum_buffer[k] = o.momentum * momentum_buffer[k] + rest * a;
        w.coeffs[k] = o.nesterov ? o.momentum * momentum_buffer[k] + rest * a : momentum_buffer[k];
    }
    for (int64_t k = w.coarse; k < w.packed; ++k)
        w.coeffs[k] *= detail_scale;
    gwt_back_to_weights(&w);

    for (int64_t e = 0; e < batch; ++e) {
        double *matrix = w.update + e * rows * width;
        iterate(matrix, matrix, memory, rows, width, &o.newton_schulz);
    }
    const double tallness = (double)rows / (double)width;
    const double larger = (double)(rows > width ? rows : width);
    const double adjust = o.adjust == GWT_ADJUST_SPECTRAL_UNCLAMPED ? sqrt(tallness)
        : o.adjust == GWT_ADJUST_ORIGINAL ? sqrt(tallness > 1 ? tallness : 1) : 0.2 * sqrt(larger);
    gwt_apply(p, &w, o.common.lr, o.common.weight_decay, o.common.lr * o.common.scale * adjust);
    gwt_end_work(&w);

done:
    free(memory);
    return status;
}
