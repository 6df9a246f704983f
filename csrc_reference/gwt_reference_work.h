/* A step of an optimizer beyond Adam, from the gradient's coefficients to the weights. */
#ifndef GWT_REFERENCE_WORK_H
#define GWT_REFERENCE_WORK_H

#include "gwt_reference_bands.h"
#include "gwt_reference_optimizers.h"

/* What a step works in. `coarse` are the elements of the approximation, which are the first of `coeffs`. */
typedef struct {
    gwt_bands bands;
    int64_t elements, coarse, packed;
    double *coeffs;
    double *update;       /* [rows, width] */
    double *denominators; /* [rows, n_L] */
    double *scratch;
} gwt_work;

/* batch * rows, or -1 where either is negative or the product overflows. */
int64_t gwt_all_rows(int64_t batch, int64_t rows);

/* Checks sizes, level, wavelet and the options that all have, without working memory. */
int gwt_check_work(gwt_work *w, int64_t rows, int64_t width, const gwt_common_options *o);

/* Takes the memory and transforms g, or -g; GWT_OK or GWT_OUT_OF_MEMORY. */
int gwt_begin_work(gwt_work *w, const double *g, const gwt_common_options *o);

/* The inverse transform of the coefficients, into w->update. */
void gwt_back_to_weights(gwt_work *w);

/* p * (1 - lr * weight_decay) - step_size * w->update. */
void gwt_apply(double *p, const gwt_work *w, double lr, double weight_decay, double step_size);

void gwt_end_work(gwt_work *w);

/* The scale, but for level 0. */
double gwt_scale_of(const gwt_common_options *o);

#endif
