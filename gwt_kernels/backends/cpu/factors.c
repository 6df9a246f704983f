/* Adafactor's sums over one tensor, cut into panels of rows for the threads.
 *
 * Panels do not depend on the number of threads, and their sums are added in order, so that results do not either. */
#include "step.h"

#include <stdlib.h>

enum { PANEL = 1 << 16 }; /* approximate elements of a panel */
enum { SHARE = 1 << 15 }; /* fewest elements for which another thread pays */

typedef struct {
    const gwt_step *s;
    const float *means; /* of the row factors of each matrix, for the sum of quotients */
    float *kept;        /* squares of all coefficients, or NULL */
    int64_t matrices, per_matrix, panel_rows;
    float *rows, *columns; /* sums of squares: of rows, and of each panel's columns */
    double *quotients;     /* of each panel */
} panels;

static panels cut(const gwt_step *s, int64_t matrices, float *kept)
{
    panels own = {.s = s, .kept = kept, .matrices = matrices};
    const int64_t width = s->columns << s->level;
    own.panel_rows = PANEL / width > 1 ? PANEL / width : 1;
    own.per_matrix = (s->matrix_rows + own.panel_rows - 1) / own.panel_rows;
    return own;
}

static void work_on(void *context, int64_t i)
{
    const panels *own = context;
    const int64_t matrix = i / own->per_matrix, rows = own->s->matrix_rows;
    const int64_t first = i % own->per_matrix * own->panel_rows;
    const int64_t stop = first + own->panel_rows < rows ? first + own->panel_rows : rows;
    if (own->quotients)
        own->quotients[i] = sum_divided(own->s, matrix * rows + first, matrix * rows + stop, own->kept,
                                        (double)own->means[matrix]);
    else
        sum_squares(own->s, matrix * rows + first, matrix * rows + stop, own->kept, own->rows,
                    own->columns + i * own->s->columns);
}

static void run(panels *own, int threads)
{
    const int64_t useful = own->matrices * own->s->matrix_rows * (own->s->columns << own->s->level) / SHARE;
    share_out(work_on, own, own->matrices * own->per_matrix, useful < threads ? (int)useful : threads, threads);
}

/* Sums of squares of the approximation over each row and each column of all matrices. Return nonzero if memory runs
 * out. */
EXPORT int gwt_sum_squares(gwt_step *s, const void *const *grad, const char *numbers, int64_t matrices, float *kept,
                           float *rows, float *columns, int threads)
{
    panels own = cut(s, matrices, kept);
    renew(s, grad, numbers, 0, 1);
    own.rows = rows;
    own.columns = calloc((size_t)(matrices * own.per_matrix * s->columns) + 1, sizeof *own.columns);
    if (own.columns == NULL)
        return -1;
    run(&own, threads);
    for (int64_t matrix = 0; matrix < matrices; ++matrix)
        for (int64_t column = 0; column < s->columns; ++column) {
            const float *part = own.columns + matrix * own.per_matrix * s->columns + column;
            double total = 0;
            for (int64_t panel = 0; panel < own.per_matrix; ++panel)
                total += (double)part[panel * s->columns];
            columns[matrix * s->columns + column] = (float)total;
        }
    free(own.columns);
    return 0;
}

/* The sum of squares of the approximation, each divided by its row factor over their mean and by its column factor. */
EXPORT int gwt_sum_divided(gwt_step *s, const void *const *grad, const char *numbers, int64_t matrices, float *kept,
                           const float *means, double *sum, int threads)
{
    panels own = cut(s, matrices, kept);
    own.means = means;
    renew(s, grad, numbers, 0, 1);
    const int64_t count = matrices * own.per_matrix;
    own.quotients = calloc((size_t)count + 1, sizeof *own.quotients);
    if (own.quotients == NULL)
        return -1;
    run(&own, threads);
    *sum = 0;
    for (int64_t i = 0; i < count; ++i)
        *sum += own.quotients[i];
    free(own.quotients);
    return 0;
}
