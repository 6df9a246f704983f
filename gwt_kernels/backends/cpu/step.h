/* Arguments of a step in C, and functions shared by its files; the mathematics is in step.c. */
#ifndef GWT_STEP_H
#define GWT_STEP_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { FLOAT32, BFLOAT16, FLOAT16, INT8 };
enum { NEAREST, STOCHASTIC, SPLIT };
enum { WEIGHTS, MOMENTS }; /* purposes of random bits */
/* Rules: the published one, or Adam at level 0; the folded one; Lion; Adafactor; GWT-Muon before its matrix products,
 * and after them. The first two have a v. */
enum { PUBLISHED, FOLDED, SIGNED, FACTORED, MOMENTUM, ORTHOGONAL };

/* Sums over a tensor of squares of m / (sqrt(v) + eps), of gradients, of block means and of updates. */
enum { NORM, GRADIENTS, MEANS, UPDATES, SUMS };

/* Positions of a shard's elements in the whole tensor: runs whose starts are `pitch` elements apart. */
typedef struct {
    int64_t first, run, pitch;
} gwt_span;

/* One tensor and its options; the same fields as FIELDS of step.py. */
typedef struct {
    void *p;
    const void *g;
    void *m, *v;                    /* exp_avg and exp_avg_sq, [rows, ceil(width / W)], as far as the rule has them */
    int16_t *low;                   /* SPLIT: error-correction bits of the weights */
    float *m_scales, *v_scales;     /* INT8: one per block (quantum) of coefficients */
    float *norm;                    /* the limiter's previous norm, updated; NULL for no limiter */
    const float *row_sums;          /* sum of each whole row's gradients, of the folded rule their squares' behind it;
                                     * NULL where p has whole rows */
    const float *row_factors;       /* FACTORED: [matrices, matrix_rows], NULL for 1s */
    const float *col_factors;       /* FACTORED: [matrices, columns] */
    int64_t rows, width;            /* of p and g; one row if rows are whole blocks */
    int64_t block;                  /* elements of a block: 2**level, or a whole row's, taken 2**level at a time */
    int64_t columns, matrix_rows;   /* FACTORED: blocks of a row, and rows of a matrix */
    gwt_span weights, coefficients; /* positions in the whole tensor, for random bits */
    uint64_t key;
    int32_t p_type, g_type, m_type, rounding, level, rule, observed;
    /* From here on: numbers that change from step to step. */
    uint32_t step;
    float beta1, rest1, beta2, rest2, eps, keep, factor, per_sum; /* FACTORED: beta2 as a flag, see factored.inc */
    float per_root; /* 1 / sqrt(block); of the folded rule, of SIGNED and of MOMENTUM the factor on residuals */
    float gamma;
    float limit;     /* divisor of the update, computed by the limiter if there is one */
    float step_size; /* full_step / limit */
    double full_step;
    double sums[SUMS]; /* NORM for the limiter, the others if observed */
} gwt_step;

enum { ITEM = 1 << 14 };  /* approximate elements of an item, which a thread takes at once */
enum { SHARE = 1 << 15 }; /* fewest elements for which another thread pays */

/* Number of tiles of a tensor, which are independent of each other; and of an item. */
int64_t tiles_of(const gwt_step *s);
int64_t tiles_of_item(const gwt_step *s);
/* Elements of each tile except the last. */
int64_t tile_elements(const gwt_step *s);
/* Process tiles `first` to `stop - 1` and add to `sums`: NORM only, or update the tiles and add the others. */
void sum_tiles(const gwt_step *s, int64_t first, int64_t stop, double *sums);
void update_tiles(const gwt_step *s, int64_t first, int64_t stop, double *sums);

/* Set each tensor's gradient and its numbers, which are `stride` bytes apart. */
void renew(gwt_step *steps, const void *const *grads, const char *numbers, int64_t stride, int64_t count);

/* FACTORED: where sums of squares of the approximation go. */
typedef struct {
    float *rows; /* of each row */
    float *kept; /* the squares themselves, NULL to compute them twice */
    int weighs;  /* whether those of weights are added up too */
} gwt_sums;

/* FACTORED: of rows `first` to `stop - 1`, all of one matrix, write the sums of squares of the approximation, and add
 * those of columns to `columns`; return the sum of squares of the weights if it is asked for. */
double sum_squares(const gwt_step *s, int64_t first, int64_t stop, const gwt_sums *to, float *columns);
/* Return the sum of the squares, divided by both factors, times the mean of the row factors. */
double sum_divided(const gwt_step *s, int64_t first, int64_t stop, const gwt_sums *from, double mean);

/* Call work(context, i) once for each i below `count`, on `useful` of `threads` threads. Each thread begins with its
 * own range, and then takes items of others. */
typedef void gwt_work(void *context, int64_t i);
void share_out(gwt_work *work, void *context, int64_t count, int useful, int threads);

#endif
