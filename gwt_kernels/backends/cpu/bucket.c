/* The step of a whole bucket: tensors are cut into items for the threads. The limiter needs the sum over a tensor
 * before any of its weights change, so limited tensors take two passes.
 *
 * Limited tensors are processed in lots, so that the second pass reads from the caches. Sums are added item by item in
 * order: the same for any number of threads. Memory is only read forwards, since prefetching halves the time. */
#include "step.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { LOT = 1 << 20 }; /* fewest elements of a lot; they fit the outer caches */

enum { SUM, UPDATE };

typedef struct {
    const gwt_step *steps;
    const int64_t *starts; /* the first item of each tensor, and the number of items */
    int64_t count;
    double (*sums)[SUMS]; /* of each item; NULL if not needed */
    int pass;
    int all; /* sums of all tensors, not only of limited ones */
} job;

int64_t tiles_of_item(const gwt_step *s)
{
    const int64_t most = ITEM / tile_elements(s);
    return most > 1 ? most : 1;
}

static int64_t items_of(const gwt_step *s)
{
    return (tiles_of(s) + tiles_of_item(s) - 1) / tiles_of_item(s);
}

static int is_limited(const gwt_step *s)
{
    return s->norm != NULL;
}

static void work_on(void *context, int64_t item)
{
    const job *own = context;
    int64_t low = 0, high = own->count; /* search for the item's tensor */
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (own->starts[middle] <= item)
            low = middle;
        else
            high = middle;
    }
    const gwt_step *s = &own->steps[low];
    const int64_t first = (item - own->starts[low]) * tiles_of_item(s), all = tiles_of(s);
    const int64_t stop = first + tiles_of_item(s) < all ? first + tiles_of_item(s) : all;
    double unasked[SUMS] = {0}, *sums = own->sums ? own->sums[item] : unasked;
    if (own->pass == UPDATE)
        update_tiles(s, first, stop, sums);
    else if (own->all || is_limited(s))
        sum_tiles(s, first, stop, sums);
}

static void pass_over(job *own, int pass, int threads, int64_t elements)
{
    const int64_t useful = elements / SHARE;
    own->pass = pass;
    share_out(work_on, own, own->starts[own->count], useful < threads ? (int)useful : threads, threads);
}

static void add_up(const job *own, gwt_step *steps, int first, int stop)
{
    for (int64_t i = 0; i < own->count; ++i)
        for (int sum = first; sum < stop; ++sum) {
            steps[i].sums[sum] = 0;
            for (int64_t item = own->starts[i]; item < own->starts[i + 1]; ++item)
                steps[i].sums[sum] += own->sums[item][sum];
        }
}

/* Fira's limiter, as in rules/limiter.py: a previous norm of 0 means none yet. */
static void limit(gwt_step *s)
{
    const float norm = (float)sqrt(s->sums[NORM]), previous = *s->norm, growth = norm / (previous + 1e-8f);
    s->limit = previous == 0 ? 1 : (growth < s->gamma ? s->gamma : growth) / s->gamma;
    *s->norm = norm / s->limit;
}

static int run_lot(gwt_step *steps, int64_t count, int64_t *starts, int threads, int updates)
{
    int64_t elements = 0;
    int limited = !updates, observed = 0;
    starts[0] = 0;
    for (int64_t i = 0; i < count; ++i) {
        elements += steps[i].rows * steps[i].width;
        limited |= is_limited(&steps[i]);
        observed |= steps[i].observed;
        starts[i + 1] = starts[i] + items_of(&steps[i]);
    }
    job own = {steps, starts, count, NULL, SUM, !updates};
    if (limited || observed) {
        own.sums = calloc((size_t)starts[count] + 1, sizeof *own.sums);
        if (own.sums == NULL)
            return -1;
    }
    if (limited) {
        pass_over(&own, SUM, threads, elements);
        add_up(&own, steps, NORM, NORM + 1);
    }
    if (updates) {
        for (int64_t i = 0; i < count; ++i) {
            if (is_limited(&steps[i]))
                limit(&steps[i]);
            steps[i].step_size = (float)(steps[i].full_step / (double)steps[i].limit);
        }
        pass_over(&own, UPDATE, threads, elements);
        if (observed)
            add_up(&own, steps, NORM + 1, SUMS);
    }
    free(own.sums);
    return 0;
}

/* Update all tensors, or only sum NORM. Return nonzero if memory runs out, after which nothing more is updated. */
static int run_all(gwt_step *steps, int64_t count, int threads, int updates)
{
    int64_t *starts = malloc(((size_t)count + 1) * sizeof *starts);
    int failed = starts == NULL;
    for (int64_t first = 0, stop; first < count && !failed; first = stop) {
        int64_t elements = 0;
        for (stop = first; stop < count && elements < LOT; ++stop)
            elements += is_limited(&steps[stop]) && updates ? steps[stop].rows * steps[stop].width : 0;
        failed = run_lot(steps + first, stop - first, starts, threads, updates);
    }
    free(starts);
    return failed;
}

void renew(gwt_step *steps, const void *const *grads, const char *numbers, int64_t stride, int64_t count)
{
    const size_t first = offsetof(gwt_step, step), stop = offsetof(gwt_step, sums);
    for (int64_t i = 0; i < count; ++i) {
        steps[i].g = grads[i];
        memcpy((char *)(steps + i) + first, numbers + i * stride, stop - first);
    }
}

EXPORT const int64_t gwt_step_size = sizeof(gwt_step);

EXPORT int gwt_update(gwt_step *steps, const void *const *grads, const char *numbers, int64_t stride, int64_t count,
                      int threads)
{
    renew(steps, grads, numbers, stride, count);
    return run_all(steps, count, threads, 1);
}

EXPORT int gwt_sum(gwt_step *steps, const void *const *grads, const char *numbers, int64_t stride, int64_t count,
                   int threads)
{
    renew(steps, grads, numbers, stride, count);
    return run_all(steps, count, threads, 0);
}
