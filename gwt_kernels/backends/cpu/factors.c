/* Adafactor's step of a bucket, one tensor after another: rules/adafactor.py.
 *
 * The second moment of a tensor is a factor a row and a factor a column of its matrices, updated by sums of squares
 * over all of the tensor, and the update is clipped by its own norm. So a step takes three passes: sums of squares, the
 * sum of their quotients by the new factors, and the update. Sums are those of panels of rows, which do not depend on
 * the number of threads, added in order, so that results do not either. */
#include "step.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PANEL = 1 << 16 }; /* approximate elements of a panel */
/* The level from which writing the squares and reading them is quicker than reading gradients again. */
enum { KEPT_FROM = 2 };

/* A tensor's factors and options, the same fields as FACTORS of adafactor.py. */
typedef struct {
    float *row, *col; /* [matrices, matrix_rows], NULL for a tensor of one dimension; [matrices, columns] */
    int64_t matrices, columns, matrix_rows;
    double rest2, eps, clip_threshold;            /* of AdafactorNumbers */
    double rate, scale, weight_decay, least_rms;  /* least_rms is negative if weights do not multiply the rate */
} gwt_factors;

enum { SQUARES, QUOTIENTS, APPLY };

typedef struct {
    const gwt_step *s;
    int pass;
    int64_t per_matrix, panel_rows, panels;
    gwt_sums sums;
    float *columns;  /* sums of squares of each panel's columns */
    double *results; /* of each panel: of its weights' squares, or of quotients */
    double *means;   /* of the row factors of each matrix */
} job;

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static void work_on(void *context, int64_t i)
{
    const job *own = context;
    const gwt_step *s = own->s;
    if (own->pass == APPLY) {
        double unasked[SUMS] = {0};
        const int64_t first = i * tiles_of_item(s);
        update_tiles(s, first, least(first + tiles_of_item(s), tiles_of(s)), unasked);
        return;
    }
    const int64_t matrix = i / own->per_matrix, start = i % own->per_matrix * own->panel_rows;
    const int64_t first = matrix * s->matrix_rows + start;
    const int64_t stop = first + least(own->panel_rows, s->matrix_rows - start);
    own->results[i] = own->pass == SQUARES ? sum_squares(s, first, stop, &own->sums, own->columns + i * s->columns)
                                           : sum_divided(s, first, stop, &own->sums, own->means[matrix]);
}

static void pass_over(job *own, int pass, int threads)
{
    const gwt_step *s = own->s;
    const int64_t useful = s->rows * s->width / SHARE, count = (tiles_of(s) + tiles_of_item(s) - 1) / tiles_of_item(s);
    own->pass = pass;
    share_out(work_on, own, pass == APPLY ? count : own->panels, (int)least(useful, threads), threads);
}

static double total(const double *x, int64_t n)
{
    double all = 0;
    for (int64_t i = 0; i < n; ++i)
        all += x[i];
    return all;
}

/* Factors after this step: their average with the mean of squares over `n`, plus eps. Write them, and return their
 * mean. */
static double average_factors(const gwt_factors *f, const float *old, float *sums, int64_t count, double n)
{
    double all = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double factor = (double)old[i] * (1 - f->rest2) + ((double)sums[i] / n + f->eps) * f->rest2;
        sums[i] = (float)factor;
        all += factor;
    }
    return all / (double)count;
}

/* Add up the columns of a matrix's panels in order; all begin with those of the first. */
static void add_columns(const job *own, int64_t matrix, float *columns)
{
    const float *part = own->columns + matrix * own->per_matrix * own->s->columns;
    for (int64_t column = 0; column < own->s->columns; ++column) {
        double all = 0;
        for (int64_t panel = 0; panel < own->per_matrix; ++panel)
            all += (double)part[panel * own->s->columns + column];
        columns[column] = (float)all;
    }
}

/* The panels of a tensor, whose sums are in `floats` and `doubles`, if these are not NULL. Write how long those have to
 * be to `sizes`. */
static job cut(const gwt_step *s, const gwt_factors *f, float *floats, double *doubles, size_t sizes[2])
{
    job own = {.s = s};
    const int64_t width = f->columns << s->level, rows = f->matrices * f->matrix_rows;
    own.panel_rows = PANEL / width > 1 ? PANEL / width : 1;
    own.per_matrix = (f->matrix_rows + own.panel_rows - 1) / own.panel_rows;
    own.panels = f->matrices * own.per_matrix;
    const int64_t of_columns = (own.panels + f->matrices) * f->columns;
    const int64_t kept = s->level >= KEPT_FROM ? rows * f->columns : 0;
    sizes[0] = (size_t)(rows + of_columns + kept);
    sizes[1] = (size_t)(own.panels + f->matrices);
    if (floats == NULL || doubles == NULL)
        return own;
    own.sums = (gwt_sums){floats, kept ? floats + rows + of_columns : NULL, f->least_rms >= 0};
    own.columns = floats + rows;
    own.results = doubles;
    own.means = doubles + own.panels;
    memset(own.columns, 0, (size_t)of_columns * sizeof *floats);
    return own;
}

static void step_one(gwt_step *s, const gwt_factors *f, job *own, int threads)
{
    const int64_t rows = f->matrices * s->matrix_rows, columns = f->matrices * s->columns;
    float *const new_row = own->sums.rows, *const new_col = own->columns + own->panels * s->columns;
    pass_over(own, SQUARES, threads);
    const double weights = total(own->results, own->panels), count = (double)(s->rows * s->width);
    for (int64_t matrix = 0; matrix < f->matrices; ++matrix) {
        float *const col = new_col + matrix * s->columns, *const row = new_row + matrix * s->matrix_rows;
        add_columns(own, matrix, col);
        average_factors(f, f->col + matrix * s->columns, col, s->columns, (double)s->matrix_rows);
        if (f->row)
            own->means[matrix] =
                average_factors(f, f->row + matrix * s->matrix_rows, row, s->matrix_rows, (double)s->columns);
    }
    s->row_factors = f->row ? new_row : NULL;
    s->col_factors = new_col;
    pass_over(own, QUOTIENTS, threads);
    const double quotients = total(own->results, own->panels) / (double)(rows * s->columns);
    double clip = sqrt(quotients) / f->clip_threshold, rate = f->rate;
    clip = clip < 1 ? 1 : clip; /* NaN stays */
    if (f->least_rms >= 0) {
        const double rms = sqrt(weights / count);
        rate *= rms < f->least_rms ? f->least_rms : rms;
    }
    s->keep = (float)(1 - rate * f->weight_decay);
    s->step_size = (float)(rate * f->scale);
    for (int64_t i = 0; f->row && i < rows; ++i) {
        f->row[i] = new_row[i];
        new_row[i] = (float)sqrt((double)new_row[i] / own->means[i / s->matrix_rows]);
    }
    for (int64_t i = 0; i < columns; ++i) {
        f->col[i] = new_col[i];
        new_col[i] = (float)(sqrt((double)new_col[i]) * clip);
    }
    pass_over(own, APPLY, threads);
}

EXPORT const int64_t gwt_factors_size = sizeof(gwt_factors);

/* Update all tensors. Return nonzero, before anything changes, if memory runs out. */
EXPORT int gwt_factored(gwt_step *steps, const void *const *grads, const char *numbers, int64_t stride, int64_t count,
                        const gwt_factors *factors, int threads)
{
    size_t most[2] = {1, 1}, sizes[2];
    renew(steps, grads, numbers, stride, count);
    for (int64_t i = 0; i < count; ++i) {
        cut(&steps[i], &factors[i], NULL, NULL, sizes);
        for (int kind = 0; kind < 2; ++kind)
            most[kind] = sizes[kind] > most[kind] ? sizes[kind] : most[kind];
    }
    float *floats = malloc(most[0] * sizeof *floats);
    double *doubles = malloc(most[1] * sizeof *doubles);
    const int failed = floats == NULL || doubles == NULL;
    for (int64_t i = 0; i < count && !failed; ++i) {
        steps[i].columns = factors[i].columns;
        steps[i].matrix_rows = factors[i].matrix_rows;
        job own = cut(&steps[i], &factors[i], floats, doubles, sizes);
        step_one(&steps[i], &factors[i], &own, threads);
    }
    free(floats);
    free(doubles);
    return failed;
}
