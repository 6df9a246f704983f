/* One step on a CPU: GWT-Adam in one pass over weights, gradients and moments, a tile at a time.
 *
 * A tile is a range of coefficients of some hundred elements, which stays in the first cache between stages. Each stage
 * is a plain loop over floats that compilers vectorize: sums of blocks (level.inc), moments, updates of elements
 * (level.inc), weights. float32 arrays are read and written in place, and updates are added to such weights directly.
 * Other dtypes add a stage that converts them (dtypes.h, codes.h), so a stage is compiled per level or per dtype, but
 * not per pair of both. With W = 2**level neighbours in block k of gradient g,
 *
 *     mean = sum(g) / W        m = b1*m + (1-b1)*sqrt(W)*mean        v = b2*v + (1-b2)*W*mean*mean
 *     p_i = p_i*keep - step_size * (g_i - mean + m/sqrt(W)) / (sqrt(v) + eps)
 *
 * and for the folded rule, with r_i = detail * (g_i - mean),
 *
 *     m = b1*m + (1-b1)*mean   v = b2*v + (1-b2)*sum(g*g)/W
 *     p_i = p_i*keep - step_size * (m + r_i) / (sqrt(v + r_i*r_i) + eps)
 *
 * (docs/algorithm.md); level 0 is Adam. Lion, Adafactor and GWT-Muon's two stages, of the files in rules/, are passes
 * likewise. Arithmetic is in float without fused multiply-add, so results do not depend on the width of vectors.
 * Stochastic rounding is that of formats/stochastic.py and int8.py, bit for bit. Tiles are independent: threads may
 * take ranges of them. Nothing allocates or fails; the caller has checked everything. */
#if defined(__GNUC__) && !defined(__clang__) /* clang refuses an option of that name */
/* No memcpy in place of loops that read main memory: it took twice the time. */
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

#include "step.h"

#include <math.h>
#include <string.h>

#include "codes.h"
#include "dtypes.h"
#include "levels.h"
#include "random.h"
#include "vectors.h"

/* Length of a tile's arrays: arrays a multiple of 4 KiB apart would evict each other from the first cache. */
enum { SPACED = LARGEST + 144 };

/* Scratch of a tile between stages; incomplete blocks are padded with zeros. */
typedef struct {
    float g[SPACED], update[SPACED], signs[SPACED];      /* of elements; what Lion takes signs of */
    float sum[SPACED], square[SPACED];                   /* of blocks, from here on */
    float m[SPACED], v[SPACED];                          /* unless stored in float32 */
    float mean[SPACED], offset[SPACED], gain[SPACED];
    uint64_t words[LARGEST / 2 + 2 * (LONGS + 1)];       /* random, up to whole vectors */
    uint32_t bits[SPACED];                               /* random, if collected from several runs of a shard */
} tile;

/* Blocks of a tile in one row, whose elements are contiguous in memory. */
typedef struct {
    int64_t element; /* index of the first */
    int held;        /* number of elements in memory, without padding of the last block */
    int padded;
} run;

static run run_of(const gwt_step *s, int64_t k, int64_t stop)
{
    const int64_t w = (int64_t)1 << s->level, per_row = (s->width + w - 1) >> s->level;
    const int64_t row = s->rows == 1 ? 0 : k / per_row, block = k - row * per_row;
    const int64_t blocks = stop - k < per_row - block ? stop - k : per_row - block;
    const int64_t left = s->width - block * w, padded = blocks * w;
    return (run){row * s->width + block * w, (int)(left < padded ? left : padded), (int)padded};
}

/* Sum n floats, or their squares, in an order that does not depend on the width of vectors. */
static inline ALWAYS double sum_in_lanes(const float *restrict x, int n, int squared)
{
    enum { LANES = 16 };
    double part[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; ++lane)
            part[lane] += squared ? (double)x[i + lane] * (double)x[i + lane] : (double)x[i + lane];
    for (int lane = 0; lane < n - i; ++lane)
        part[lane] += squared ? (double)x[i + lane] * (double)x[i + lane] : (double)x[i + lane];
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane)
            part[lane] += part[lane + half];
    return part[0];
}

static double sum_of_squares(const float *restrict x, int n)
{
    return sum_in_lanes(x, n, 1);
}

static double sum_of(const float *restrict x, int n)
{
    return sum_in_lanes(x, n, 0);
}

/* -- reading ----------------------------------------------------------------------------------------------- */

static void load_half_floats(float *restrict to, const uint16_t *restrict from, int n)
{
    int i = 0;
#ifdef HAS_HALVES
    for (; i + FLOATS <= n; i += FLOATS)
        *(floats *)(to + i) = load_halves(from + i);
#endif
    for (; i < n; ++i)
        to[i] = of_half(from[i]);
}

static void load(float *restrict to, const void *from, int64_t first, int n, int type)
{
    const float *restrict floats = (const float *)from + first;
    const uint16_t *restrict halves = (const uint16_t *)from + first;
    if (type == FLOAT32)
        for (int i = 0; i < n; ++i)
            to[i] = floats[i];
    else if (type == BFLOAT16)
        for (int i = 0; i < n; ++i)
            to[i] = of_bfloat16(halves[i]);
    else
        load_half_floats(to, halves, n);
}

/* Return the gradients of n blocks from k on: in place, or loaded into the tile. */
static const float *gradients(const gwt_step *s, int64_t k, int n, tile *t)
{
    const run all = run_of(s, k, k + n);
    if (s->g_type == FLOAT32 && all.held == n << s->level)
        return (const float *)s->g + all.element;
    float *g = t->g;
    for (int64_t at = k; at < k + n;) {
        const run r = run_of(s, at, k + n);
        load(g, s->g, r.element, r.held, s->g_type);
        memset(g + r.held, 0, (size_t)(r.padded - r.held) * sizeof *g);
        g += r.padded;
        at += r.padded >> s->level;
    }
    return t->g;
}

/* Return the weights of n blocks from k on if updates can be added in place, without an extra stage; else NULL. */
static float *weights(const gwt_step *s, int64_t k, int n)
{
    const run all = run_of(s, k, k + n);
    const int at_once = s->p_type == FLOAT32 && !s->observed && all.held == n << s->level;
    return at_once ? (float *)s->p + all.element : NULL;
}

/* Point to the moments of n coefficients from k on: in place, or loaded into the tile. */
static void moments(const gwt_step *s, int64_t k, int n, tile *t, float **m, float **v)
{
    const int64_t quantum = k / quantum_of(s->level);
    if (s->m_type == FLOAT32) {
        *m = s->m ? (float *)s->m + k : NULL;
        *v = s->v ? (float *)s->v + k : NULL;
        return;
    }
    *m = t->m;
    *v = t->v;
    if (s->m_type == INT8)
        decode(t->m, t->v, (const int8_t *)s->m + k, s->v ? (const uint8_t *)s->v + k : NULL, s->m_scales + quantum,
               s->v_scales + quantum, n, s->level);
    else {
        load(t->m, s->m, k, n, s->m_type);
        if (s->v)
            load(t->v, s->v, k, n, s->m_type);
    }
}

/* Draw bits for n elements of a shard from `first` on, `size` bytes each: 2 for a weight, 4 for a coefficient, with the
 * lower half for exp_avg. Words are in memory in their order, since the machine is little-endian. */
static const void *draw_bits(tile *t, int size, int64_t first, int n, const gwt_span *span, uint32_t purpose,
                             const gwt_step *s)
{
    const int per_call = 16 / size;
    for (int done = 0; done < n;) {
        const int64_t place = (first + done) % span->run, left = span->run - place;
        const int64_t index = span->first + (first + done) / span->run * span->pitch + place;
        const int own = left < n - done ? (int)left : n - done, skipped = (int)(index % per_call);
        const int calls = (skipped + own + per_call - 1) / per_call;
        const char *drawn = (const char *)t->words + skipped * size;
        draw(t->words, (uint64_t)(index / per_call), calls, s->step, purpose, s->key);
        if (own == n)
            return drawn;
        memcpy((char *)t->bits + done * size, drawn, (size_t)(own * size));
        done += own;
    }
    return t->bits;
}

/* -- writing ----------------------------------------------------------------------------------------------- */

static void round_first(const float *restrict m, uint16_t *restrict to, int n, const uint32_t *restrict words)
{
    for (int i = 0; i < n; ++i)
        to[i] = to_bfloat16_at_random(m[i], words[i] & 0xFFFF);
}

static void round_second(const float *restrict v, uint16_t *restrict to, int n, const uint32_t *restrict words)
{
    for (int i = 0; i < n; ++i)
        to[i] = to_bfloat16_at_random(v[i], words[i] >> 16);
}

static void store_moments(const gwt_step *s, int64_t k, int n, tile *t)
{
    const int64_t quantum = k / quantum_of(s->level);
    if (s->m_type == FLOAT32)
        return;
    const uint32_t *words = draw_bits(t, sizeof *words, k, n, &s->coefficients, MOMENTS, s);
    if (s->m_type == INT8) {
        encode(t->m, t->v, (int8_t *)s->m + k, s->v ? (uint8_t *)s->v + k : NULL, s->m_scales + quantum,
               s->v_scales + quantum, n, words, s->level);
        return;
    }
    round_first(t->m, (uint16_t *)s->m + k, n, words);
    if (s->v)
        round_second(t->v, (uint16_t *)s->v + k, n, words);
}

static void add_to_floats(float *restrict p, const float *restrict update, float keep, int n)
{
    for (int i = 0; i < n; ++i)
        p[i] = p[i] * keep + update[i];
}

static void add_to_bfloats(uint16_t *restrict p, const float *restrict update, float keep, int n)
{
    for (int i = 0; i < n; ++i)
        p[i] = to_bfloat16(of_bfloat16(p[i]) * keep + update[i]);
}

static void add_to_halves(uint16_t *restrict p, const float *restrict update, float keep, int n)
{
    int i = 0;
#ifdef HAS_HALVES
    for (; i + FLOATS <= n; i += FLOATS) {
        const floats sum = load_halves(p + i) * keep + *(const floats *)(update + i);
        store_halves(p + i, sum);
    }
#endif
    for (; i < n; ++i)
        p[i] = to_half(of_half(p[i]) * keep + update[i]);
}

static void add_to_bfloats_at_random(uint16_t *restrict p, const float *restrict update, float keep, int n,
                                     const uint16_t *restrict bits)
{
    for (int i = 0; i < n; ++i)
        p[i] = to_bfloat16_at_random(of_bfloat16(p[i]) * keep + update[i], bits[i]);
}

static void add_to_halves_at_random(uint16_t *restrict p, const float *restrict update, float keep, int n,
                                    const uint16_t *restrict bits, float *restrict wide)
{
    load_half_floats(wide, p, n);
    for (int i = 0; i < n; ++i)
        p[i] = to_half_at_random(wide[i] * keep + update[i], bits[i]);
}

static void add_to_split(uint16_t *restrict p, int16_t *restrict low, const float *restrict update, float keep, int n)
{
    for (int i = 0; i < n; ++i) {
        const uint32_t raw = one_nan(bits_of(joined(p[i], low[i]) * keep + update[i]));
        low[i] = (int16_t)raw;
        p[i] = (uint16_t)((raw + 0x8000) >> 16);
    }
}

/* Add updates to the weights of n blocks from k on; return the updates' sum of squares if observed. */
static double add_updates(const gwt_step *s, int64_t k, int n, tile *t)
{
    const float *update = t->update;
    double squares = 0;
    for (int64_t at = k; at < k + n;) {
        const run r = run_of(s, at, k + n);
        uint16_t *halves = (uint16_t *)s->p + r.element;
        const uint16_t *bits = s->rounding == STOCHASTIC
                                   ? draw_bits(t, sizeof *bits, r.element, r.held, &s->weights, WEIGHTS, s)
                                   : NULL;
        if (s->p_type == FLOAT32)
            add_to_floats((float *)s->p + r.element, update, s->keep, r.held);
        else if (s->rounding == SPLIT)
            add_to_split(halves, s->low + r.element, update, s->keep, r.held);
        else if (s->p_type == BFLOAT16)
            bits ? add_to_bfloats_at_random(halves, update, s->keep, r.held, bits)
                 : add_to_bfloats(halves, update, s->keep, r.held);
        else
            bits ? add_to_halves_at_random(halves, update, s->keep, r.held, bits, t->g)
                 : add_to_halves(halves, update, s->keep, r.held);
        if (s->observed)
            squares += sum_of_squares(update, r.held);
        update += r.padded;
        at += r.padded >> s->level;
    }
    return squares;
}

/* -- rules: moments in place, and the updates of elements ----------------------------------------------------- */

typedef struct {
    float m, v;
} pair;

/* Return both moments after a block with this mean. */
static inline pair averaged(float m, float v, float mean, const gwt_step *restrict s)
{
    return (pair){m * s->beta1 + mean * s->rest1, v * s->beta2 + s->rest2 * mean * mean};
}

static inline float gain_of(float v, const gwt_step *restrict s)
{
    return 1 / (sqrtf(v) + s->eps);
}

/* The published rule, per block: the update of element i will be offset - g_i * factor * gain. */
static void average(const gwt_step *restrict s, const float *restrict sum, float *restrict m, float *restrict v,
                    float *restrict means, float *restrict offset, float *restrict gain, int n)
{
    for (int k = 0; k < n; ++k) {
        const float mean = sum[k] * s->per_sum;
        const pair now = averaged(m[k], v[k], mean, s);
        m[k] = now.m;
        v[k] = now.v;
        means[k] = mean;
        gain[k] = gain_of(now.v, s) * s->step_size;
        offset[k] = (mean - now.m * s->per_root) * gain[k];
    }
}

/* Write m / (sqrt(v) + eps) of the new moments for the limiter; moments do not change. */
static void directions(const gwt_step *restrict s, const float *restrict sum, const float *restrict m,
                       const float *restrict v, float *restrict direction, int n)
{
    for (int k = 0; k < n; ++k) {
        const pair next = averaged(m[k], v[k], sum[k] * s->per_sum, s);
        direction[k] = gain_of(next.v, s) * next.m;
    }
}

/* The folded rule, per block. */
static void average_folded(const gwt_step *restrict s, const float *restrict sum, const float *restrict square,
                           float *restrict m, float *restrict v, float *restrict means, int n)
{
    for (int k = 0; k < n; ++k) {
        means[k] = sum[k] * s->per_sum;
        m[k] = m[k] * s->beta1 + means[k] * s->rest1;
        v[k] = v[k] * s->beta2 + square[k] * s->rest2;
    }
}

/* Level 0: Adam, without bias correction inside the root. */
static inline ALWAYS void adam(const gwt_step *restrict s, const float *restrict g, float *restrict m,
                               float *restrict v, float *restrict to, int n, int adds)
{
    const float keep = s->keep;
    for (int i = 0; i < n; ++i) {
        const pair now = averaged(m[i], v[i], g[i] * s->factor, s);
        m[i] = now.m;
        v[i] = now.v;
        PUT(to[i], -s->step_size * now.m / (sqrtf(now.v) + s->eps));
    }
}

/* Lion, per block: what signs are taken of will be base + detail * (g_i - mean). */
static void average_signed(const gwt_step *restrict s, const float *restrict sum, float *restrict m,
                           float *restrict means, float *restrict base, int n)
{
    for (int k = 0; k < n; ++k) {
        means[k] = sum[k] * s->per_sum;
        base[k] = m[k] * s->beta1 + means[k] * s->rest1;
        m[k] = m[k] * s->beta2 + means[k] * s->rest2;
    }
}

/* Signs as updates; that of 0 is 0, those of infinity and NaN are NaN. */
static inline ALWAYS void take_signs(const gwt_step *restrict s, const float *restrict u, float *restrict to, int n,
                                     int adds)
{
    const float keep = s->keep, size = -s->step_size;
    for (int i = 0; i < n; ++i)
        PUT(to[i], (float)((u[i] > 0) - (u[i] < 0)) * size + u[i] * 0);
}

/* GWT-Muon before its matrix products, per block: M_i will be base + detail * (g_i - mean). */
static void average_momentum(const gwt_step *restrict s, const float *restrict sum, float *restrict m,
                             float *restrict means, float *restrict base, int n)
{
    for (int k = 0; k < n; ++k) {
        means[k] = sum[k] * s->per_sum;
        m[k] = m[k] * s->beta1 + means[k] * s->rest1;
        base[k] = m[k] * s->beta2 + means[k] * s->rest2;
    }
}

static void multiply(const float *from, float factor, float *to, int n)
{
    for (int i = 0; i < n; ++i)
        to[i] = from[i] * factor;
}

/* Return n gradients times their factor: as they are if it is 1, or in the tile. */
static const float *scaled(const gwt_step *s, const float *g, int n, tile *t)
{
    if (s->factor == 1)
        return g;
    multiply(g, s->factor, t->g, n);
    return t->g;
}

/* Lion's updates of n blocks, whose base and mean are in the tile; they are added to weights if `adds`. */
static void spread_signs(const gwt_step *s, const float *g, int n, tile *t, float *to, int adds)
{
    const float *u = t->offset; /* at level 0 */
    if (s->level) {
        spread_momentum_at[s->level](s, g, t->mean, t->offset, t->signs, n);
        u = t->signs;
    }
    adds ? take_signs(s, u, to, n << s->level, 1) : take_signs(s, u, to, n << s->level, 0);
}

/* Store the matrices of n blocks from k on, which take the place of weights. */
static void store_matrices(const gwt_step *s, int64_t k, int n, const float *restrict from)
{
    for (int64_t at = k; at < k + n;) {
        const run r = run_of(s, at, k + n);
        float *restrict floats = (float *)s->p + r.element;
        uint16_t *restrict halves = (uint16_t *)s->p + r.element;
        if (s->p_type == FLOAT32)
            for (int i = 0; i < r.held; ++i)
                floats[i] = from[i];
        else
            for (int i = 0; i < r.held; ++i)
                halves[i] = to_bfloat16(from[i]);
        from += r.padded;
        at += r.padded >> s->level;
    }
}

static void make_matrices(const gwt_step *s, int64_t k, int n, tile *t)
{
    const float *g = scaled(s, gradients(s, k, n, t), n << s->level, t);
    float *const p = weights(s, k, n), *const to = p ? p : t->update, *m, *v;
    moments(s, k, n, t, &m, &v);
    if (s->level) {
        fold(g, t->sum, n, s->level);
        average_momentum(s, t->sum, m, t->mean, t->offset, n);
        spread_momentum_at[s->level](s, g, t->mean, t->offset, to, n);
    } else
        average_momentum(s, g, m, t->mean, to, n);
    store_moments(s, k, n, t);
    if (!p)
        store_matrices(s, k, n, to);
}

/* After the products: what became of the matrices is a gradient. */
static void apply_matrices(const gwt_step *s, int64_t k, int n, tile *t)
{
    const float *restrict g = gradients(s, k, n, t);
    const float keep = s->keep, size = s->step_size;
    float *restrict const p = weights(s, k, n);
    if (p) {
        for (int i = 0; i < n << s->level; ++i)
            p[i] = p[i] * keep - g[i] * size;
        return;
    }
    multiply(g, -size, t->update, n << s->level);
    add_updates(s, k, n, t);
}

/* -- tiles ------------------------------------------------------------------------------------------------- */

/* Number of coefficients of a tile: whole blocks of quantized values. */
static int at_once(const gwt_step *s)
{
    const int least = s->m_type == INT8 ? quantum_of(s->level) : 1;
    return TILE >> s->level > least ? TILE >> s->level : least;
}

static int64_t all_coefficients(const gwt_step *s)
{
    const int64_t w = (int64_t)1 << s->level;
    return s->rows * ((s->width + w - 1) >> s->level);
}

/* Whether rows are blocks: tiles then. */
static int is_by_row(const gwt_step *s)
{
    return s->row_sums != NULL || s->block != (int64_t)1 << s->level;
}

int64_t tiles_of(const gwt_step *s)
{
    return is_by_row(s) ? s->rows : (all_coefficients(s) + at_once(s) - 1) / at_once(s);
}

int64_t tile_elements(const gwt_step *s)
{
    return is_by_row(s) ? (s->width > 1 ? s->width : 1) : (int64_t)at_once(s) << s->level;
}

#include "rows.inc"
#include "factored.inc"

void sum_tiles(const gwt_step *s, int64_t first, int64_t stop, double *sums)
{
    tile t;
    float *m, *v;
    const int64_t all = all_coefficients(s), most = at_once(s);
    for (int64_t i = first; i < stop; ++i) {
        if (is_by_row(s)) {
            sum_of_row(s, i, &t, sums);
            continue;
        }
        const int64_t k = i * most;
        const int n = (int)(most < all - k ? most : all - k);
        fold(gradients(s, k, n, &t), t.sum, n, s->level);
        moments(s, k, n, &t, &m, &v);
        directions(s, t.sum, m, v, t.offset, n);
        sums[NORM] += sum_of_squares(t.offset, n);
    }
}

void update_tiles(const gwt_step *s, int64_t first, int64_t stop, double *sums)
{
    tile t;
    float *m, *v;
    const int64_t all = all_coefficients(s), most = at_once(s);
    for (int64_t i = first; i < stop; ++i) {
        if (is_by_row(s)) {
            update_row(s, i, &t, sums);
            continue;
        }
        const int64_t k = i * most;
        const int n = (int)(most < all - k ? most : all - k);
        if (s->rule >= MOMENTUM) {
            s->rule == MOMENTUM ? make_matrices(s, k, n, &t) : apply_matrices(s, k, n, &t);
            continue;
        }
        const float *g = gradients(s, k, n, &t);
        float *const p = weights(s, k, n), *const to = p ? p : t.update;
        const int adds = p != NULL;
        const double factor = s->factor;
        const double squares = s->observed ? sum_of_squares(g, n << s->level) * factor * factor : 0;
        moments(s, k, n, &t, &m, &v);
        if (s->rule == FACTORED) {
            update_factored(s, k, n, g, m, &t, to, adds);
        } else if (s->rule == SIGNED) {
            g = scaled(s, g, n << s->level, &t);
            if (s->level)
                fold(g, t.sum, n, s->level);
            average_signed(s, s->level ? t.sum : g, m, t.mean, t.offset, n);
            spread_signs(s, g, n, &t, to, adds);
        } else if (s->level == 0) {
            adds ? adam(s, g, m, v, to, n, 1) : adam(s, g, m, v, to, n, 0);
        } else if (s->rule == FOLDED) {
            fold_both(g, s->factor, t.sum, t.square, n, s->level);
            average_folded(s, t.sum, t.square, m, v, t.mean, n);
            spread_folded_at[adds][s->level](s, g, t.mean, m, v, to, n);
        } else {
            fold(g, t.sum, n, s->level);
            average(s, t.sum, m, v, t.mean, t.offset, t.gain, n);
            spread_at[adds][s->level](s, g, t.offset, t.gain, to, n);
        }
        if (s->observed) {
            sums[GRADIENTS] += squares;
            sums[MEANS] += s->level ? sum_of_squares(t.mean, n) * (1 << s->level) : squares;
        }
        store_moments(s, k, n, &t);
        if (!adds)
            sums[UPDATES] += add_updates(s, k, n, &t);
    }
}
