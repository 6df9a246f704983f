/* The public face of the C oracle: the wavelet transform, GWT-Adam and FOAM written out literally, for tests to
 * compare every fast implementation against. gwt_reference_optimizers.h has the optimizers beyond these.
 *
 * GWT-Adam is the algorithm of arXiv 2501.07237 with the norm-growth limiter of Fira (arXiv 2410.01623); FOAM
 * is the folded rule of arXiv 2512.07112.
 *
 * Layout. A tensor is `rows` rows of `width` contiguous elements, row-major; an N-D tensor is its last
 * dimension as `width` and the product of the others as `rows`. Its coefficients at level L are packed one
 * band after the other, coarse to fine, in PyWavelets' order and sign:
 *
 *     [ A | D_L | D_(L-1) | ... | D_1 ]      A is [rows, n_L], D_l is [rows, n_l], each contiguous,
 *
 * where n_0 = width and n_l = ceil(n_(l-1) / 2): an odd length is padded with one zero on its right
 * (PyWavelets' mode="zero"). With level 0 the coefficients are the tensor itself. With a gwt_wavelet of f taps
 * n_l = (n_(l-1) + f - 1) / 2 rounded down, and with GWT_LEVEL_ROW they are [ A | D ], one column and `width`.
 *
 * Precision. A function that ends in _d computes in double. One that ends in _f holds its data in float and
 * does all arithmetic on it in float; only scalars (bias correction, the norm of the limiter) are worked out
 * in double and rounded once where they meet the data.
 *
 * Buffers must not overlap. A tensor without elements (rows or width 0) is valid: nothing is read or written,
 * its pointers may be NULL, and, if its width is 0, every level from 0 to 62 is accepted.
 * There is no global state; calls on different buffers may run at the same time. */
#ifndef GWT_REFERENCE_H
#define GWT_REFERENCE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What the functions below return. After anything but GWT_OK no buffer has been changed. Where several
 * things are wrong, the code of one of them is returned. */
enum {
    GWT_OK = 0,
    GWT_BAD_SHAPE = 1,     /* a negative size, or more bytes than the address space holds */
    GWT_BAD_LEVEL = 2,     /* negative, or deeper than the width allows: 2**level >= 2 * width */
    GWT_BAD_OPTION = 3,    /* an option outside the range stated where it is declared */
    GWT_NULL_POINTER = 4,  /* a NULL pointer where there are elements to read or write */
    GWT_OUT_OF_MEMORY = 5  /* the working memory could not be had */
};

/* In place of a level: every row is one block, of W = width, which need be no power of two. The approximation of
 * a row is its sum over sqrt(W); its details are the row less its mean, in place of coefficients in some
 * orthonormal basis of their space. Where W = 2**L, all that is divided by one number a row is the same as at
 * level L. */
enum { GWT_LEVEL_ROW = 1000 };

/* How a row goes on beyond its ends at every level, on a row a b c: the names of PyWavelets' modes. */
enum {
    GWT_BOUNDARY_ZERO = 0,      /* 0 0 | a b c | 0 0 */
    GWT_BOUNDARY_CONSTANT = 1,  /* a a | a b c | c c */
    GWT_BOUNDARY_SYMMETRIC = 2, /* b a | a b c | c b */
    GWT_BOUNDARY_REFLECT = 3,   /* c b | a b c | b a */
    GWT_BOUNDARY_PERIODIC = 4   /* b c | a b c | a b */
};

/* A discrete wavelet in place of Haar with zeros beyond the ends: four filters of the same length, as
 * PyWavelets' Wavelet.filter_bank has them. */
typedef struct {
    int64_t taps;         /* of each filter; even, 2 to 256 */
    const double *dec_lo; /* approximation k of x is the sum over j of dec_lo[j] * x[2 * k + 1 - j] */
    const double *dec_hi; /* likewise the detail */
    const double *rec_lo; /* x[i] is the sum over k of rec_lo[i + taps - 2 - 2 * k] * a[k], and the same of d */
    const double *rec_hi;
    int32_t boundary;
} gwt_wavelet;

/* How a gradient becomes an update, at every level but 0. With W = 2**L, blocks of W neighbours (a row is
 * padded with zeros on its right), and mean_k the mean over block k, padding included, so always a W-th of the
 * sum, GWT_RULE_FOAM is, for every element i of block k (a row, of W = width, with GWT_LEVEL_ROW),
 *
 *     m_k = beta1 * m_k + (1 - beta1) * mean_k(g)        v_k = beta2 * v_k + (1 - beta2) * mean_k(g * g)
 *     r_i = res_scale * (g_i - mean_k(g))                u_i = (m_k + r_i) / (sqrt(v_k + r_i * r_i) + eps) */
enum {
    GWT_RULE_GWT = 0, /* moments of the Haar approximation, which scale the details too; may be limited */
    GWT_RULE_FOAM = 1 /* moments of block means, a denominator per element; no limiter */
};

/* The settings of one step on one tensor. Only their ranges are limited; nothing has a default. */
typedef struct {
    int64_t step;              /* t: 1 for the first step; at least 1 */
    double lr;                 /* learning rate; finite, at least 0 */
    double beta1;              /* decay of the first moment; in [0, 1) */
    double beta2;              /* decay of the second moment; in [0, 1) */
    double eps;                /* added to sqrt(v), which is not bias-corrected; finite, at least 0 */
    double weight_decay;       /* decoupled: p shrinks by lr * weight_decay first; finite, at least 0 */
    double scale;              /* factor on the update; finite, at least 0; ignored at level 0 */
    double norm_growth_limit;  /* gamma; finite, at least 1; NaN, 0 or less: no limiter, as GWT_RULE_FOAM wants
                                * it; ignored at level 0 of GWT_RULE_GWT */
    int32_t level;             /* L: 0 is plain AdamW (no transform, no scale, no limiter); or GWT_LEVEL_ROW */
    int32_t maximize;          /* not 0: ascend, that is, take -g for g */
    int32_t rule;              /* GWT_RULE_GWT or GWT_RULE_FOAM; level 0 is the same for both */
    int32_t correct_bias;      /* not 0: the update times sqrt(1 - beta2**t) / (1 - beta1**t) */
    double res_scale;          /* factor on the residuals of GWT_RULE_FOAM alone; finite, at least 0 */
    const gwt_wavelet *wavelet; /* NULL: Haar, zeros beyond the ends, as GWT_RULE_FOAM and GWT_LEVEL_ROW want it */
} gwt_adamw_options;

/* n_level, the columns of the approximation of a row of `width` elements: `width` halved `level` times, each
 * time rounded up. -1 where `width` is negative or `level` is outside 0 to 62. */
int64_t gwt_haar_length(int64_t width, int level);

/* The columns of the approximation of a row, and how many elements the packed coefficients of a [rows, width]
 * tensor hold: rows * (n_L + n_L + ... + n_1). -1 where gwt_dwt_d would refuse them. */
int64_t gwt_length(int64_t width, int level, const gwt_wavelet *wavelet);
int64_t gwt_coefficient_count(int64_t rows, int64_t width, int level, const gwt_wavelet *wavelet);

/* The forward transform of every row, one level after the other: for Haar a = (left + right) / sqrt(2) and
 * d = (left - right) / sqrt(2) of each pair of neighbours, the next level taking a.
 *
 *   x        [rows, width], read
 *   coeffs   gwt_coefficient_count(rows, width, level, wavelet) elements, written: packed as above
 *   level    0 to 62, or GWT_LEVEL_ROW
 *   wavelet  NULL: Haar, zeros beyond the ends, as GWT_LEVEL_ROW wants it
 *
 * Returns GWT_OK or any of the codes above; the memory is for one row. */
int gwt_dwt_f(const float *x, float *coeffs, int64_t rows, int64_t width, int level, const gwt_wavelet *wavelet);
int gwt_dwt_d(const double *x, double *coeffs, int64_t rows, int64_t width, int level, const gwt_wavelet *wavelet);

/* The inverse transform of every row: for Haar left = (a + d) / sqrt(2) and right = (a - d) / sqrt(2), each level
 * cut to the length it had on the way down.
 *
 *   coeffs  packed as gwt_dwt writes it, read
 *   x       [rows, width], written
 *
 * Returns GWT_OK or any of the codes above; the memory is for one row. */
int gwt_idwt_f(const float *coeffs, float *x, int64_t rows, int64_t width, int level, const gwt_wavelet *wavelet);
int gwt_idwt_d(const double *coeffs, double *x, int64_t rows, int64_t width, int level, const gwt_wavelet *wavelet);

/* One step on one tensor, in place: the weights become
 *
 *     p * (1 - lr * weight_decay) - lr * sqrt(1 - beta2**t) / (1 - beta1**t) * scale / limit * u,
 *
 * where `limit` is 1 unless there is a limiter, and u is the update of the rule; without correct_bias the root
 * and what it is divided by are not there.
 *
 *   p             [rows, width], the weights, updated
 *   g             [rows, width], the gradient, read
 *   exp_avg       [rows, n_L], the first moment m of the approximation (GWT_RULE_GWT) or of the block means
 *                 (GWT_RULE_FOAM), updated; zeros before the first step
 *   exp_avg_sq    [rows, n_L], its second moment v, updated; zeros before the first step
 *   limiter_norm  one number, updated: the norm of the limited update of the approximation at the previous
 *                 step; 0 stands for "none yet", and so does a previous norm that really was 0. Double in
 *                 both builds, where the norm is accumulated. NULL is allowed where there is no limiter.
 *                 A negative one is GWT_BAD_OPTION; NaN spreads to the whole tensor, as it does in torch.
 *
 * With eps 0 a coefficient whose v is 0 gives 0/0 = NaN, by the definition of the update.
 *
 * Returns GWT_OK or any of the codes above. Works in about twice the memory of the tensor itself; GWT_RULE_FOAM
 * in once that. */
int gwt_adamw_step_f(float *p, const float *g, float *exp_avg, float *exp_avg_sq, double *limiter_norm,
                     int64_t rows, int64_t width, const gwt_adamw_options *options);
int gwt_adamw_step_d(double *p, const double *g, double *exp_avg, double *exp_avg_sq, double *limiter_norm,
                     int64_t rows, int64_t width, const gwt_adamw_options *options);

#ifdef __cplusplus
}
#endif

#endif
