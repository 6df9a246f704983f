/* What one step on a CPU takes, and the functions of the files in C; the mathematics is in step.c. */
#ifndef GWT_STEP_H
#define GWT_STEP_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { FLOAT32, BFLOAT16, FLOAT16, INT8 };
enum { NEAREST, STOCHASTIC, SPLIT };
enum { WEIGHTS, MOMENTS }; /* what random bits are for */

/* What is summed up over a tensor: squares of (m / (sqrt(v) + eps)), of gradients, of block means and of updates. */
enum { NORM, GRADIENTS, MEANS, UPDATES, SUMS };

/* Where the elements of a shard lie in the whole tensor: in runs, `pitch` elements apart. */
typedef struct {
    int64_t first, run, pitch;
} gwt_span;

/* One tensor and its options, field by field the FIELDS of step.py. */
typedef struct {
    void *p;
    const void *g;
    void *m, *v;                    /* exp_avg and exp_avg_sq, [rows, ceil(width / W)] */
    int16_t *low;                   /* SPLIT: the low halves of the weights */
    float *m_scales, *v_scales;     /* INT8: one for each quantum of coefficients */
    float *norm;                    /* the limiter's previous one, replaced; NULL for no limiter */
    int64_t rows, width;            /* of p and g; one row where blocks may run on from row to row */
    gwt_span weights, coefficients; /* where these lie in the whole tensor, for random bits */
    uint64_t key;
    int32_t p_type, g_type, m_type, rounding, level, folded, observed;
    /* From here on: what is another in another step, but for the gradient. */
    uint32_t step;
    float beta1, rest1, beta2, rest2, eps, keep, factor, per_sum, per_root, gamma;
    float limit;     /* divisor of the update; the limiter's, once it has decided */
    float step_size; /* over the limit, from full_step */
    double full_step;
    double sums[SUMS]; /* UPDATES of what was added to the weights; the first by the limiter, others if observed */
} gwt_step;

/* Tiles of a tensor; each is independent of the others. */
int64_t tiles_of(const gwt_step *s);
/* Elements of each tile but the last. */
int64_t tile_elements(const gwt_step *s);
/* Add to `sums` those of tiles `first` to before `stop`: of the limiter, and of all else while they are updated. */
void sum_tiles(const gwt_step *s, int64_t first, int64_t stop, double *sums);
void update_tiles(const gwt_step *s, int64_t first, int64_t stop, double *sums);

/* Call work(context, i) for all i below `count`, each once, by `useful` ones of `threads` threads. Each begins with a
 * range of its own, and then helps the others. */
typedef void gwt_work(void *context, int64_t i);
void share_out(gwt_work *work, void *context, int64_t count, int useful, int threads);

#endif
