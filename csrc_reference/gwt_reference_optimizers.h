/* The oracle's optimizers beyond Adam, written out literally in double: Lion, Muon, Adafactor and Adam-mini, each
 * with its state on the approximation coefficients of the gradient.
 *
 * Conventions are those of gwt_reference.h: codes, layout, empty tensors, buffers that do not overlap, nothing
 * changed after anything but GWT_OK. A tensor is `rows` rows of `width` elements, and a batch of matrices
 * [batch, rows, width] where an optimizer works on matrices. With n_L the columns of the approximation, every
 * state begins as zeros; `exp_avg` and `momentum_buffer` are [rows, n_L], of approximation coefficients: those of
 * Haar are sqrt(W) times the block means. Weight decay comes first: p * (1 - lr * weight_decay). */
#ifndef GWT_REFERENCE_OPTIMIZERS_H
#define GWT_REFERENCE_OPTIMIZERS_H

#include "gwt_reference.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How every optimizer of this file transforms a gradient, and what each does to the weights. */
typedef struct {
    int32_t level;              /* 0: the gradient itself; or GWT_LEVEL_ROW */
    int32_t maximize;           /* not 0: ascend */
    double lr;                  /* finite, at least 0, as the next two */
    double weight_decay;
    double scale;               /* factor on the update; ignored at level 0, but not by Muon */
    const gwt_wavelet *wavelet; /* NULL: Haar, zeros beyond the ends */
} gwt_common_options;

/* Lion (arXiv 2302.06675). With A the approximation and D the details of the gradient, and IDWT the inverse,
 *
 *     u = sign(IDWT(beta1 * m + (1 - beta1) * A, detail_scale * D))       sign(0) = 0
 *     m = beta2 * m + (1 - beta2) * A
 *     p = p * (1 - lr * weight_decay) - lr * scale * u */
typedef struct {
    gwt_common_options common;
    double beta1, beta2; /* in [0, 1) */
    double detail_scale; /* finite, at least 0 */
} gwt_lion_options;

int gwt_lion_step_d(double *p, const double *g, double *exp_avg, int64_t rows, int64_t width,
                    const gwt_lion_options *options);

/* Newton-Schulz iteration with the quintic a*x + b*x**3 + c*x**5 on the singular values, after division by the
 * Frobenius norm: by the larger of norm and eps (torch.optim.Muon), or by norm + eps. A matrix of more rows than
 * columns is transposed for it. */
typedef struct {
    double a, b, c;  /* finite */
    double eps;      /* finite, at least 0; with 0, and a matrix of zeros, the result is NaN */
    int32_t steps;   /* 0 to 99 */
    int32_t add_eps; /* not 0: norm + eps */
} gwt_newton_schulz_options;

/* x [batch, rows, width], read; o, of the same shape, written. */
int gwt_newton_schulz_d(const double *x, double *o, int64_t batch, int64_t rows, int64_t width,
                        const gwt_newton_schulz_options *options);

enum { GWT_ADJUST_ORIGINAL = 0, GWT_ADJUST_MATCH_RMS_ADAMW = 1, GWT_ADJUST_SPECTRAL_UNCLAMPED = 2 };

/* Muon, as torch.optim.Muon has it at level 0 and scale 1:
 *
 *     m = momentum * m + (1 - momentum) * A
 *     M = IDWT(momentum * m + (1 - momentum) * A with nesterov, else m; detail_scale * D)
 *     p = p * (1 - lr * weight_decay) - lr * scale * adjust * NewtonSchulz(M)
 *
 * where adjust is sqrt(max(1, rows / width)), 0.2 * sqrt(max(rows, width)) or sqrt(rows / width). With `summed` the buffer is a sum,
 * m = momentum * m + A, and M is that above over (1 - momentum): the iteration sees the difference in eps alone. */
typedef struct {
    gwt_common_options common;
    double momentum;     /* in [0, 1) */
    double detail_scale; /* finite, at least 0 */
    gwt_newton_schulz_options newton_schulz;
    int32_t nesterov;
    int32_t adjust;
    int32_t summed;
} gwt_muon_options;

int gwt_muon_step_d(double *p, const double *g, double *momentum_buffer, int64_t batch, int64_t rows,
                    int64_t width, const gwt_muon_options *options);

/* Adafactor (arXiv 1804.04235). With b2 = 1 - step**decay_rate, R and C EMAs (b2) of the means of A*A + eps1 over
 * columns and over rows of each matrix, mean(R) over its rows, and V an EMA (b2) of A*A + eps1 where the tensor
 * has one dimension,
 *
 *     d = sqrt(R / mean(R)) * sqrt(C), or sqrt(V)          u = A / d
 *     clip = max(1, rms(u) / clip_threshold), over the whole tensor
 *     M = beta1 * M + (1 - beta1) * u / clip, or u / clip
 *     p = p * (1 - lr * weight_decay) - lr * scale * IDWT(M, D')
 *
 * where D' = D as published: its details are never divided; or, with `divided`, D over clip and over the
 * denominators d above it, repeated as in GWT-Adam. With relative_step, lr is replaced by the smaller of
 * 1 / sqrt(step) and 1e-2, or 1e-6 * step with warmup_init; with scale_parameter lr is multiplied by
 * max(eps2, rms(p)). */
typedef struct {
    gwt_common_options common;
    int64_t step;          /* at least 1 */
    double beta1;          /* in [0, 1), or NaN: no first moment */
    double eps1, eps2;     /* finite, at least 0 */
    double clip_threshold; /* finite, above 0 */
    double decay_rate;     /* finite, at most 0 */
    int32_t scale_parameter;
    int32_t relative_step;
    int32_t warmup_init;   /* wants relative_step */
    int32_t divided;
} gwt_adafactor_options;

/* exp_avg [batch, rows, n_L], or NULL without beta1. A tensor of two dimensions or more has row [batch, rows] and
 * col [batch, n_L], and NULL for full; one of fewer has full [n_L], NULL for both, and batch and rows 1. */
int gwt_adafactor_step_d(double *p, const double *g, double *exp_avg, double *row, double *col, double *full,
                         int64_t batch, int64_t rows, int64_t width, const gwt_adafactor_options *options);

/* Adam-mini (arXiv 2406.16793): one second moment a group of rows_per_group rows, 1 for rows, all of them for a
 * tensor, rows / heads for heads. With v an EMA (beta2) of the mean of A*A over the group,
 *
 *     m = beta1 * m + (1 - beta1) * A        d = sqrt(v / (1 - beta2**step)) + eps
 *     p = p * (1 - lr * weight_decay) - lr * scale * IDWT(m / (1 - beta1**step) / d, D / d) */
typedef struct {
    gwt_common_options common;
    int64_t step;           /* at least 1 */
    double beta1, beta2;    /* in [0, 1) */
    double eps;             /* finite, at least 0 */
    int64_t rows_per_group; /* at least 1, divides rows */
} gwt_adam_mini_options;

/* exp_avg_sq [rows / rows_per_group] */
int gwt_adam_mini_step_d(double *p, const double *g, double *exp_avg, double *exp_avg_sq, int64_t rows,
                         int64_t width, const gwt_adam_mini_options *options);

#ifdef __cplusplus
}
#endif

#endif
