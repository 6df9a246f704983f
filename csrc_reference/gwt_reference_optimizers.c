/* Lion, Adafactor and Adam-mini. */
#include "gwt_reference_work.h"

#include <math.h>

static int is_decay(double beta)
{
    return beta >= 0 && beta < 1;
}

static double larger_of(double a, double b)
{
    return b > a ? b : a;
}

int gwt_lion_step_d(double *p, const double *g, double *exp_avg, int64_t rows, int64_t width,
                    const gwt_lion_options *options)
{
    if (!options)
        return GWT_NULL_POINTER;
    const gwt_lion_options o = *options;
    gwt_work w;
    int status = gwt_check_work(&w, rows, width, &o.common);
    if (status != GWT_OK)
        return status;
    if (!is_decay(o.beta1) || !is_decay(o.beta2) || !gwt_finite_from(0, o.detail_scale))
        return GWT_BAD_OPTION;
    if (w.elements == 0)
        return GWT_OK;
    if (!p || !g || !exp_avg)
        return GWT_NULL_POINTER;
    status = gwt_begin_work(&w, g, &o.common);
    if (status != GWT_OK)
        return status;

    for (int64_t k = 0; k < w.coarse; ++k) {
        const double a = w.coeffs[k];
        w.coeffs[k] = o.beta1 * exp_avg[k] + (1 - o.beta1) * a;
        exp_avg[k] = o.beta2 * exp_avg[k] + (1 - o.beta2) * a;
    }
    for (int64_t k = w.coarse; k < w.packed; ++k)
        w.coeffs[k] *= o.detail_scale;
    gwt_back_to_weights(&w);
    for (int64_t i = 0; i < w.elements; ++i)
        if (!isnan(w.update[i]))
            w.update[i] = (w.update[i] > 0) - (w.update[i] < 0);
    gwt_apply(p, &w, o.common.lr, o.common.weight_decay, o.common.lr * gwt_scale_of(&o.common));
    gwt_end_work(&w);
    return GWT_OK;
}

static double rms_of(const double *x, int64_t n)
{
    double squares = 0;
    for (int64_t i = 0; i < n; ++i)
        squares += x[i] * x[i];
    return sqrt(squares / (double)n);
}

/* EMAs of the row and column means of A*A + eps1 of one matrix [rows, columns], and its denominators. */
static void factor(const double *a, double *row, double *col, double *denominators, int64_t rows, int64_t columns,
                   double beta2, double eps1)
{
    double mean_of_rows = 0;
    for (int64_t r = 0; r < rows; ++r) {
        double sum = 0;
        for (int64_t k = 0; k < columns; ++k)
            sum += a[r * columns + k] * a[r * columns + k] + eps1;
        row[r] = beta2 * row[r] + (1 - beta2) * (sum / (double)columns);
        mean_of_rows += row[r] / (double)rows;
    }
    for (int64_t k = 0; k < columns; ++k) {
        double sum = 0;
        for (int64_t r = 0; r < rows; ++r)
            sum += a[r * columns + k] * a[r * columns + k] + eps1;
        col[k] = beta2 * col[k] + (1 - beta2) * (sum / (double)rows);
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; ++k)
            denominators[r * columns + k] = sqrt(row[r] / mean_of_rows) * sqrt(col[k]);
}

static int check_adafactor(const gwt_adafactor_options *o)
{
    const int good = o->step >= 1 && (isnan(o->beta1) || is_decay(o->beta1)) && gwt_finite_from(0, o->eps1)
                     && gwt_finite_from(0, o->eps2) && o->clip_threshold > 0 && isfinite(o->clip_threshold)
                     && o->decay_rate <= 0 && isfinite(o->decay_rate) && !(o->warmup_init && !o->relative_step);
    return good ? GWT_OK : GWT_BAD_OPTION;
}

static double adafactor_rate(const gwt_adafactor_options *o, const double *p, int64_t elements)
{
    const double t = (double)o->step;
    double lr = o->common.lr;
    if (o->relative_step) {
        const double largest = o->warmup_init ? 1e-6 * t : 1e-2;
        lr = largest < 1 / sqrt(t) ? largest : 1 / sqrt(t);
    }
    return o->scale_parameter ? lr * larger_of(o->eps2, rms_of(p, elements)) : lr;
}

int gwt_adafactor_step_d(double *p, const double *g, double *exp_avg, double *row, double *col, double *full,
                         int64_t batch, int64_t rows, int64_t width, const gwt_adafactor_options *options)
{
    if (!options)
        return GWT_NULL_POINTER;
    const gwt_adafactor_options o = *options;
    gwt_work w;
    int status = gwt_check_work(&w, gwt_all_rows(batch, rows), width, &o.common);
    if (status == GWT_OK)
        status = check_adafactor(&o);
    if (status == GWT_OK && full && (batch > 1 || rows > 1))
        status = GWT_BAD_SHAPE;
    if (status != GWT_OK || w.elements == 0)
        return status;
    const int has_first = !isnan(o.beta1);
    if (!p || !g || (has_first && !exp_avg) || (full ? row || col : !row || !col))
        return GWT_NULL_POINTER;
    status = gwt_begin_work(&w, g, &o.common);
    if (status != GWT_OK)
        return status;

    /* 1. The second moments of the approximation, and the denominators they make. */
    const double beta2 = 1 - pow((double)o.step, o.decay_rate);
    const int64_t columns = gwt_approximation_columns(&w.bands), matrix = rows * columns;
    for (int64_t e = 0; !full && e < batch; ++e)
        factor(w.coeffs + e * matrix, row + e * rows, col + e * columns, w.denominators + e * matrix, rows, columns,
               beta2, o.eps1);
    for (int64_t k = 0; full && k < columns; ++k) {
        full[k] = beta2 * full[k] + (1 - beta2) * (w.coeffs[k] * w.coeffs[k] + o.eps1);
        w.denominators[k] = sqrt(full[k]);
    }

    /* 2. The approximation's update, clipped by its RMS, and its average over the steps. */
    for (int64_t k = 0; k < w.coarse; ++k)
        w.coeffs[k] /= w.denominators[k];
    const double clip = larger_of(1, rms_of(w.coeffs, w.coarse) / o.clip_threshold);
    for (int64_t k = 0; k < w.coarse; ++k) {
        w.coeffs[k] /= clip;
        w.denominators[k] *= clip;
        if (has_first)
            w.coeffs[k] = exp_avg[k] = o.beta1 * exp_avg[k] + (1 - o.beta1) * w.coeffs[k];
    }

    /* 3. The details, and the weights. */
    if (o.divided)
        gwt_divide_details_d(w.coeffs, w.denominators, w.scratch, &w.bands);
    gwt_back_to_weights(&w);
    const double lr = adafactor_rate(&o, p, w.elements);
    gwt_apply(p, &w, lr, o.common.weight_decay, lr * gwt_scale_of(&o.common));
    gwt_end_work(&w);
    return GWT_OK;
}

int gwt_adam_mini_step_d(double *p, const double *g, double *exp_avg, double *exp_avg_sq, int64_t rows,
                         int64_t width, const gwt_adam_mini_options *options)
{
    if (!options)
        return GWT_NULL_POINTER;
    const gwt_adam_mini_options o = *options;
    gwt_work w;
    int status = gwt_check_work(&w, rows, width, &o.common);
    if (status != GWT_OK)
        return status;
    if (o.step < 1 || !is_decay(o.beta1) || !is_decay(o.beta2) || !gwt_finite_from(0, o.eps)
        || o.rows_per_group < 1)
        return GWT_BAD_OPTION;
    if (rows % o.rows_per_group)
        return GWT_BAD_SHAPE;
    if (w.elements == 0)
        return GWT_OK;
    if (!p || !g || !exp_avg || !exp_avg_sq)
        return GWT_NULL_POINTER;
    status = gwt_begin_work(&w, g, &o.common);
    if (status != GWT_OK)
        return status;

    const double t = (double)o.step;
    const double correction1 = 1 - pow(o.beta1, t), correction2 = 1 - pow(o.beta2, t);
    const int64_t group = o.rows_per_group * gwt_approximation_columns(&w.bands);
    for (int64_t first = 0; first < w.coarse; first += group) {
        double squares = 0;
        for (int64_t k = first; k < first + group; ++k)
            squares += w.coeffs[k] * w.coeffs[k];
        double *const v = exp_avg_sq + first / group;
        *v = o.beta2 * *v + (1 - o.beta2) * (squares / (double)group);
        const double denominator = sqrt(*v / correction2) + o.eps;
        for (int64_t k = first; k < first + group; ++k) {
            exp_avg[k] = o.beta1 * exp_avg[k] + (1 - o.beta1) * w.coeffs[k];
            w.coeffs[k] = exp_avg[k] / correction1 / denominator;
            w.denominators[k] = denominator;
        }
    }
    gwt_divide_details_d(w.coeffs, w.denominators, w.scratch, &w.bands);
    gwt_back_to_weights(&w);
    gwt_apply(p, &w, o.common.lr, o.common.weight_decay, o.common.lr * gwt_scale_of(&o.common));
    gwt_end_work(&w);
    return GWT_OK;
}
