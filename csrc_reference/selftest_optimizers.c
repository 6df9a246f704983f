/* Drives the oracle's Lion, Muon, Adafactor and Adam-mini over shapes, levels and wavelets, in buffers of the exact
 * size. */
#include "gwt_reference_optimizers.h"
#include "selftest.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { LION, MUON, ADAFACTOR, VECTOR, ADAM_MINI, OPTIMIZERS, SLOTS = 3 };

typedef struct {
    int optimizer, variant; /* 0 or 1: of what an optimizer does in two ways */
    int64_t batch, rows, width, columns;
    gwt_common_options common;
} setting;

static const gwt_newton_schulz_options iteration = {3.4445, -4.775, 2.0315, 1e-7, 5, 0};

/* The elements of each slot of state; 0 for none. */
static void sizes(const setting *s, int64_t n[SLOTS])
{
    const int64_t rows = s->batch * s->rows;
    n[0] = rows * s->columns;
    n[1] = n[2] = 0;
    if (s->optimizer == ADAFACTOR)
        n[1] = rows, n[2] = s->batch * s->columns;
    if (s->optimizer == VECTOR)
        n[1] = s->columns;
    if (s->optimizer == ADAM_MINI)
        n[1] = s->variant ? s->batch : rows;
    if (s->variant && (s->optimizer == ADAFACTOR || s->optimizer == VECTOR))
        n[0] = 0; /* no first moment */
}

static int take_step(const setting *s, int64_t step, double *p, const double *g, double *state[SLOTS])
{
    const int64_t rows = s->batch * s->rows;
    const int second = s->variant;
    if (s->optimizer == LION) {
        const gwt_lion_options o = {s->common, 0.9, 0.99, 0.75};
        return gwt_lion_step_d(p, g, state[0], rows, s->width, &o);
    }
    if (s->optimizer == MUON) {
        gwt_muon_options o = {s->common, 0.9, 0.75, iteration, !second, second, second};
        o.newton_schulz.add_eps = second;
        return gwt_muon_step_d(p, g, state[0], s->batch, s->rows, s->width, &o);
    }
    if (s->optimizer == ADAM_MINI) {
        const gwt_adam_mini_options o = {s->common, step, 0.9, 0.999, 1e-8, second && s->rows ? s->rows : 1};
        return gwt_adam_mini_step_d(p, g, state[0], state[1], rows, s->width, &o);
    }
    const gwt_adafactor_options o = {s->common, step,  second ? NAN : 0.9, 1e-30,  1e-3,   1,
                                     -0.8,      second, 0,                 0,      !second};
    if (s->optimizer == VECTOR)
        return gwt_adafactor_step_d(p, g, state[0], NULL, NULL, state[1], 1, 1, s->width, &o);
    return gwt_adafactor_step_d(p, g, state[0], state[1], state[2], NULL, s->batch, s->rows, s->width, &o);
}

/* Exactly `n` elements, so that the sanitizer sees one step too far; NULL for none. */
static double *filled(int64_t n, double value)
{
    if (n == 0)
        return NULL;
    double *buffer = malloc((size_t)n * sizeof(double));
    CHECK(buffer);
    for (int64_t i = 0; i < n; ++i)
        buffer[i] = value;
    return buffer;
}

/* Three steps stay finite and move the weights; at learning rate 0 they stay, bit for bit; ascending along -g is
 * descending along g, and leaves the opposite first moment. */
static void check_steps(const setting *s)
{
    const int64_t n = s->batch * s->rows * s->width;
    int64_t slots[SLOTS];
    sizes(s, slots);
    double *p[3], *state[3][SLOTS];
    setting as[3] = {*s, *s, *s};
    as[1].common.maximize = 1;
    as[2].common.lr = 0;
    for (int copy = 0; copy < 3; ++copy) {
        p[copy] = filled(n, 1);
        for (int k = 0; k < SLOTS; ++k)
            state[copy][k] = filled(slots[k], 0);
    }
    for (int64_t step = 1; step <= 3; ++step) {
        double *g = filled(n, 0), *reversed = filled(n, 0);
        for (int64_t i = 0; i < n; ++i) {
            g[i] = noise();
            reversed[i] = -g[i];
        }
        for (int copy = 0; copy < 3; ++copy)
            CHECK(take_step(&as[copy], step, p[copy], copy == 1 ? reversed : g, state[copy]) == GWT_OK);
        free(reversed);
        free(g);
    }
    int64_t moved = 0; /* a weight may come back to 1 by chance */
    for (int64_t i = 0; i < n; ++i) {
        CHECK(isfinite(p[0][i]) && p[1][i] == p[0][i] && p[2][i] == 1);
        moved += p[0][i] != 1;
    }
    CHECK(2 * moved >= n);
    for (int k = 0; k < SLOTS; ++k)
        for (int64_t i = 0; i < slots[k]; ++i)
            CHECK(isfinite(state[0][k][i]) && state[1][k][i] == state[0][k][i] && state[2][k][i] == state[0][k][i]);
    for (int copy = 0; copy < 3; ++copy) {
        for (int k = 0; k < SLOTS; ++k)
            free(state[copy][k]);
        free(p[copy]);
    }
}

/* Blocks as long as a level's and rows as blocks are one where a row is one block of 2**L. */
static void check_rows_as_blocks(int optimizer)
{
    enum { ROWS = 3, WIDTH = 8, N = ROWS * WIDTH };
    double p[2][N], memory[2][SLOTS][N], g[N];
    memset(p, 0, sizeof p);
    memset(memory, 0, sizeof memory);
    for (int64_t step = 1; step <= 3; ++step) {
        for (int i = 0; i < N; ++i)
            g[i] = noise();
        for (int way = 0; way < 2; ++way) {
            double *state[SLOTS] = {memory[way][0], memory[way][1], memory[way][2]};
            const setting s = {optimizer, 0, 1, optimizer == VECTOR ? 1 : ROWS, WIDTH, 1,
                               {way ? GWT_LEVEL_ROW : 3, 0, 0.01, 0.1, 0.5, NULL}};
            CHECK(take_step(&s, step, p[way], g, state) == GWT_OK);
        }
    }
    for (int i = 0; i < N; ++i)
        CHECK(fabs(p[0][i] - p[1][i]) <= 1e-13);
}

/* Every refusal leaves its buffers as they were. */
static void check_refusals(void)
{
    enum { ROWS = 2, WIDTH = 5, N = ROWS * WIDTH };
    const gwt_common_options common = {1, 0, 0.1, 0.1, 1, NULL};
    const gwt_lion_options lion = {common, 0.9, 0.99, 1};
    const gwt_muon_options muon = {common, 0.9, 1, iteration, 1, 0, 0};
    const gwt_adafactor_options adafactor = {common, 1, 0.9, 1e-30, 1e-3, 1, -0.8, 0, 0, 0, 1};
    const gwt_adam_mini_options mini = {common, 1, 0.9, 0.999, 1e-8, 1};
    double *p = filled(N, 3), *g = filled(N, 3), *state[SLOTS];
    for (int k = 0; k < SLOTS; ++k)
        state[k] = filled(N, 3);

#define REFUSES(type, good, call, code, field, value)                                           \
    do {                                                                                        \
        type o = good;                                                                          \
        o.field = value;                                                                        \
        CHECK((call) == code);                                                                  \
    } while (0)
#define LION_REFUSES(code, field, value)                                                        \
    REFUSES(gwt_lion_options, lion, gwt_lion_step_d(p, g, state[0], ROWS, WIDTH, &o), code, field, value)
#define MUON_REFUSES(code, field, value)                                                        \
    REFUSES(gwt_muon_options, muon, gwt_muon_step_d(p, g, state[0], 1, ROWS, WIDTH, &o), code, field, value)
#define ADAFACTOR_REFUSES(code, field, value)                                                   \
    REFUSES(gwt_adafactor_options, adafactor,                                                   \
            gwt_adafactor_step_d(p, g, state[0], state[1], state[2], NULL, 1, ROWS, WIDTH, &o), code, field, value)
#define MINI_REFUSES(code, field, value)                                                        \
    REFUSES(gwt_adam_mini_options, mini,                                                        \
            gwt_adam_mini_step_d(p, g, state[0], state[1], ROWS, WIDTH, &o), code, field, value)
#define ALL_REFUSE(code, field, value)                                                          \
    LION_REFUSES(code, field, value);                                                           \
    MUON_REFUSES(code, field, value);                                                           \
    ADAFACTOR_REFUSES(code, field, value);                                                      \
    MINI_REFUSES(code, field, value)
    ALL_REFUSE(GWT_BAD_LEVEL, common.level, -1);
    ALL_REFUSE(GWT_BAD_LEVEL, common.level, 4);
    ALL_REFUSE(GWT_BAD_LEVEL, common.level, 999);
    ALL_REFUSE(GWT_BAD_OPTION, common.lr, NAN);
    ALL_REFUSE(GWT_BAD_OPTION, common.weight_decay, -1);
    ALL_REFUSE(GWT_BAD_OPTION, common.scale, INFINITY);
    LION_REFUSES(GWT_BAD_OPTION, beta1, 1);
    LION_REFUSES(GWT_BAD_OPTION, beta2, -1);
    LION_REFUSES(GWT_BAD_OPTION, detail_scale, NAN);
    MUON_REFUSES(GWT_BAD_OPTION, momentum, 1);
    MUON_REFUSES(GWT_BAD_OPTION, detail_scale, -1);
    MUON_REFUSES(GWT_BAD_OPTION, adjust, 3);
    MUON_REFUSES(GWT_BAD_OPTION, adjust, -1);
    MUON_REFUSES(GWT_BAD_OPTION, newton_schulz.a, NAN);
    MUON_REFUSES(GWT_BAD_OPTION, newton_schulz.eps, -1);
    MUON_REFUSES(GWT_BAD_OPTION, newton_schulz.steps, -1);
    MUON_REFUSES(GWT_BAD_OPTION, newton_schulz.steps, 100);
    ADAFACTOR_REFUSES(GWT_BAD_OPTION, step, 0);
    ADAFACTOR_REFUSES(GWT_BAD_OPTION, beta1, 1);
    ADAFACTOR_REFUSES(GWT_BAD_OPTION, eps1, -1);
    ADAFACTOR_REFUSES(GWT_BAD_OPTION, eps2, NAN);
    ADAFACTOR_REFUSES(GWT_BAD_OPTION, clip_threshold, 0);
    ADAFACTOR_REFUSES(GWT_BAD_OPTION, decay_rate, 0.8);
    ADAFACTOR_REFUSES(GWT_BAD_OPTION, warmup_init, 1);
    MINI_REFUSES(GWT_BAD_OPTION, step, 0);
    MINI_REFUSES(GWT_BAD_OPTION, beta2, 1);
    MINI_REFUSES(GWT_BAD_OPTION, eps, -1);
    MINI_REFUSES(GWT_BAD_OPTION, rows_per_group, 0);
    MINI_REFUSES(GWT_BAD_SHAPE, rows_per_group, 3);

    const int64_t huge = (int64_t)1 << 57;
#define ADAFACTOR(code, ...) CHECK(gwt_adafactor_step_d(p, g, __VA_ARGS__) == code)
    CHECK(gwt_lion_step_d(p, g, NULL, ROWS, WIDTH, &lion) == GWT_NULL_POINTER);
    CHECK(gwt_lion_step_d(p, g, state[0], ROWS, WIDTH, NULL) == GWT_NULL_POINTER);
    CHECK(gwt_lion_step_d(p, g, state[0], -1, WIDTH, &lion) == GWT_BAD_SHAPE);
    CHECK(gwt_lion_step_d(p, g, state[0], 1, huge, &lion) == GWT_OUT_OF_MEMORY);
    CHECK(gwt_muon_step_d(p, g, NULL, 1, ROWS, WIDTH, &muon) == GWT_NULL_POINTER);
    CHECK(gwt_muon_step_d(p, g, state[0], 1, ROWS, WIDTH, NULL) == GWT_NULL_POINTER);
    CHECK(gwt_muon_step_d(p, g, state[0], -1, -ROWS, WIDTH, &muon) == GWT_BAD_SHAPE);
    CHECK(gwt_muon_step_d(p, g, state[0], INT64_MAX, 2, WIDTH, &muon) == GWT_BAD_SHAPE);
    CHECK(gwt_muon_step_d(p, g, state[0], 1, huge / 8, 8, &muon) == GWT_OUT_OF_MEMORY);
    CHECK(gwt_newton_schulz_d(g, p, 1, 1, huge, &iteration) == GWT_OUT_OF_MEMORY);
    CHECK(gwt_newton_schulz_d(g, NULL, 1, ROWS, WIDTH, &iteration) == GWT_NULL_POINTER);
    CHECK(gwt_newton_schulz_d(g, p, 1, ROWS, WIDTH, NULL) == GWT_NULL_POINTER);
    CHECK(gwt_newton_schulz_d(g, p, 1, ROWS, -1, &iteration) == GWT_BAD_SHAPE);
    ADAFACTOR(GWT_NULL_POINTER, NULL, state[1], state[2], NULL, 1, ROWS, WIDTH, &adafactor);
    ADAFACTOR(GWT_NULL_POINTER, state[0], state[1], NULL, NULL, 1, ROWS, WIDTH, &adafactor);
    ADAFACTOR(GWT_NULL_POINTER, state[0], NULL, NULL, NULL, 1, 1, WIDTH, &adafactor);
    ADAFACTOR(GWT_BAD_SHAPE, state[0], NULL, NULL, state[1], 1, ROWS, WIDTH, &adafactor);
    ADAFACTOR(GWT_NULL_POINTER, state[0], state[1], state[2], NULL, 1, ROWS, WIDTH, NULL);
    ADAFACTOR(GWT_OUT_OF_MEMORY, state[0], state[1], state[2], NULL, 1, 1, huge, &adafactor);
    CHECK(gwt_adam_mini_step_d(p, NULL, state[0], state[1], ROWS, WIDTH, &mini) == GWT_NULL_POINTER);
    CHECK(gwt_adam_mini_step_d(p, g, state[0], state[1], ROWS, WIDTH, NULL) == GWT_NULL_POINTER);
    CHECK(gwt_adam_mini_step_d(p, g, state[0], state[1], 1, huge, &mini) == GWT_OUT_OF_MEMORY);

    for (int i = 0; i < N; ++i) {
        CHECK(p[i] == 3 && g[i] == 3);
        for (int k = 0; k < SLOTS; ++k)
            CHECK(state[k][i] == 3);
    }
    for (int k = 0; k < SLOTS; ++k)
        free(state[k]);
    free(g);
    free(p);
}

long check_optimizers(void)
{
    static const int64_t widths[] = {0, 1, 2, 3, 5, 8, 13, 16, 33};
    static const int64_t shapes[][2] = {{0, 3}, {1, 0}, {1, 1}, {1, 4}, {3, 2}}; /* batch and rows */
    long configurations = 0;
    for (size_t i = 0; i < sizeof widths / sizeof *widths; ++i) {
        const int64_t width = widths[i];
        const int last = deepest(width);
        for (int l = 0; l <= 2 * last + 2; ++l) { /* the levels of Haar, rows as blocks, the levels of db2 */
            const int level = l <= last ? l : l == last + 1 ? GWT_LEVEL_ROW : l - last - 2;
            const gwt_wavelet *wavelet = l > last + 1 ? &daubechies : NULL;
            for (size_t k = 0; k < sizeof shapes / sizeof *shapes; ++k) {
                for (int which = 0; which < 2 * OPTIMIZERS; ++which) {
                    const setting s = {which / 2, which % 2, shapes[k][0], shapes[k][1], width,
                                       gwt_length(width, level, wavelet), {level, 0, 0.01, 0.1, 0.5, wavelet}};
                    if (s.optimizer == VECTOR && s.batch * s.rows != 1)
                        continue;
                    check_steps(&s);
                    ++configurations;
                }
            }
        }
    }
    for (int optimizer = 0; optimizer < OPTIMIZERS; ++optimizer)
        check_rows_as_blocks(optimizer);
    check_refusals();
    return configurations;
}
