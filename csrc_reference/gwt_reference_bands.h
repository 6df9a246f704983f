/* What the oracle's sources share: where the bands of packed coefficients lie, and the transform on them. */
#ifndef GWT_REFERENCE_BANDS_H
#define GWT_REFERENCE_BANDS_H

#include "gwt_reference.h"

#include <stddef.h>

/* A tensor, and how it is transformed. */
typedef struct {
    int64_t rows, width;
    int level;                  /* or GWT_LEVEL_ROW */
    const gwt_wavelet *wavelet; /* NULL: Haar, zeros beyond the ends */
} gwt_bands;

/* GWT_OK where sizes, level and wavelet are good and the coefficients, at `element` bytes, can be addressed. */
int gwt_check_bands(const gwt_bands *b, size_t element);

/* How many bands of details there are, the columns of A, those of D_l, and those of all bands. */
int gwt_detail_bands(const gwt_bands *b);
int64_t gwt_approximation_columns(const gwt_bands *b);
int64_t gwt_detail_columns(const gwt_bands *b, int l);
int64_t gwt_packed_columns(const gwt_bands *b);

/* Where D_l begins in the packed coefficients: behind every coarser band. */
int64_t gwt_detail_offset(const gwt_bands *b, int l);

/* The elements of scratch space that the functions below take: enough for the longest band of a row, twice. */
int64_t gwt_scratch_elements(const gwt_bands *b);

/* The transform and its inverse, of tensors with elements, after gwt_check_bands. */
void gwt_analyse_f(const float *x, float *coeffs, float *scratch, const gwt_bands *b);
void gwt_analyse_d(const double *x, double *coeffs, double *scratch, const gwt_bands *b);
void gwt_synthesise_f(const float *coeffs, float *x, float *scratch, const gwt_bands *b);
void gwt_synthesise_d(const double *coeffs, double *x, double *scratch, const gwt_bands *b);

/* Divides every band of details by the denominators [rows, n_L] of the approximation above it: d_L, and each
 * finer band's are those of the coarser one, repeated twice and cut to its length. */
void gwt_divide_details_f(float *coeffs, const float *denominators, float *scratch, const gwt_bands *b);
void gwt_divide_details_d(double *coeffs, const double *denominators, double *scratch, const gwt_bands *b);

/* True for a number of at least `lowest`; false for NaN and infinity too. */
int gwt_finite_from(double lowest, double value);

#endif
