/* What the steps of the optimizers beyond Adam begin and end with. */
#include "gwt_reference_work.h"

#include <stdlib.h>

int64_t gwt_all_rows(int64_t batch, int64_t rows)
{
    if (batch < 0 || rows < 0 || (rows > 0 && batch > INT64_MAX / rows))
        return -1;
    return batch * rows;
}

int gwt_check_work(gwt_work *w, int64_t rows, int64_t width, const gwt_common_options *o)
{
    const gwt_work empty = {{rows, width, o->level, o->wavelet}, 0, 0, 0, NULL, NULL, NULL, NULL};
    *w = empty;
    const int bad = gwt_check_bands(&w->bands, sizeof(double));
    if (bad != GWT_OK)
        return bad;
    w->elements = rows * width;
    w->coarse = rows * gwt_approximation_columns(&w->bands);
    w->packed = rows * gwt_packed_columns(&w->bands);
    if (!gwt_finite_from(0, o->lr) || !gwt_finite_from(0, o->weight_decay) || !gwt_finite_from(0, o->scale))
        return GWT_BAD_OPTION;
    return GWT_OK;
}

int gwt_begin_work(gwt_work *w, const double *g, const gwt_common_options *o)
{
    w->coeffs = malloc((size_t)w->packed * sizeof(double));
    w->update = malloc((size_t)w->elements * sizeof(double));
    w->denominators = malloc((size_t)w->coarse * sizeof(double));
    w->scratch = malloc((size_t)gwt_scratch_elements(&w->bands) * sizeof(double));
    if (!w->coeffs || !w->update || !w->denominators || !w->scratch) {
        gwt_end_work(w);
        return GWT_OUT_OF_MEMORY;
    }
    for (int64_t i = 0; i < w->elements; ++i)
        w->update[i] = o->maximize ? -g[i] : g[i];
    gwt_analyse_d(w->update, w->coeffs, w->scratch, &w->bands);
    return GWT_OK;
}

void gwt_back_to_weights(gwt_work *w)
{
    gwt_synthesise_d(w->coeffs, w->update, w->scratch, &w->bands);
}

void gwt_apply(double *p, const gwt_work *w, double lr, double weight_decay, double step_size)
{
    for (int64_t i = 0; i < w->elements; ++i)
        p[i] = p[i] * (1 - lr * weight_decay) - step_size * w->update[i];
}

void gwt_end_work(gwt_work *w)
{
    free(w->scratch);
    free(w->denominators);
    free(w->update);
    free(w->coeffs);
    w->scratch = w->denominators = w->update = w->coeffs = NULL;
}

double gwt_scale_of(const gwt_common_options *o)
{
    return o->level > 0 ? o->scale : 1;
}
