/* One step on a CPU: GWT-Adam in one pass over weights, gradients and moments, a tile at a time.
 *
 * A tile is a run of coefficients, those of some hundred elements, and everything about it stays in the nearest
 * caches from stage to stage: read, fold to means, update the moments, spread to the elements, round, write. Each
 * stage is a plain loop over floats that a compiler makes vectors of, and is chosen by level, rule and dtypes for
 * the whole tile; so one function serves them all. With W = 2**level neighbours in block k of gradient g,
 *
 *     mean = sum(g) / W        m = b1*m + (1-b1)*sqrt(W)*mean        v = b2*v + (1-b2)*W*mean*mean
 *     p_i = p_i*keep - step_size * (g_i - mean + m/sqrt(W)) / (sqrt(v) + eps)
 *
 * and for the folded rule, with r_i = g_i - mean,
 *
 *     m = b1*m + (1-b1)*mean   v = b2*v + (1-b2)*sum(g*g)/W
 *     p_i = p_i*keep - step_size * (m + r_i) / (sqrt(v + r_i*r_i) + eps)
 *
 * (docs/algorithm.md); level 0 is Adam. All arithmetic is float's; what random bits decide is decided as in
 * gwt_kernels/torch_backend/rounding.py and quantized.py, bit for bit. Tiles are independent: threads may take
 * ranges of them. Nothing here allocates or fails; the caller has checked everything. */
#if defined(__GNUC__) && !defined(__clang__) /* which refuses an option of that name */
/* No memcpy for what comes from far: it took twice the time. */
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* Elements of a tile at the most, and where nothing asks for more: memory is read ahead by the processor while it
 * works on the tile before, if that is short, and waited for if it is long. */
enum { LARGEST = 1024, TILE = 256 };
enum { QUANTUM = 128, SUMS = 4 };
enum { FLOAT32, BFLOAT16, FLOAT16, INT8 };
enum { NEAREST, STOCHASTIC, SPLIT };
enum { WEIGHTS, MOMENTS }; /* what random bits are for */

/* Where the elements of a shard lie in the whole tensor: in runs, `pitch` elements apart. */
typedef struct {
    int64_t first, run, pitch;
} gwt_span;

/* What a step takes, field by field the CStep of step.py. */
typedef struct {
    void *p;
    const void *g;
    void *m, *v;                    /* exp_avg and exp_avg_sq, [rows, ceil(width / W)] */
    int16_t *low;                   /* SPLIT: the low halves of the weights */
    float *m_scales, *v_scales;     /* INT8: one for each quantum of coefficients */
    double *sums;                   /* [tiles, SUMS], written where it is asked for */
    int64_t rows, width;            /* of p and g; one row where blocks may run on from row to row */
    gwt_span weights, coefficients; /* where these lie in the whole tensor, for random bits */
    uint64_t key;
    uint32_t step;
    int32_t p_type, g_type, m_type, rounding, level, folded, observed;
    float beta1, rest1, beta2, rest2, eps, keep, step_size, factor, per_sum, per_root;
} gwt_step;

/* The length of an array of a tile: arrays a multiple of 4 KiB apart would drive each other from the first cache, at
 * half again the time of a step. */
enum { SPACED = LARGEST + 144 };

/* A tile's numbers as floats, blocks padded with zeros. */
typedef struct {
    float g[SPACED], p[SPACED], a[SPACED], b[SPACED];       /* of elements */
    float mean[SPACED], m[SPACED], v[SPACED], gain[SPACED]; /* of coefficients */
    uint32_t words[LARGEST];                                /* random ones */
    double energy;                                          /* sum(g*g), where the step is observed */
} tile;

/* Blocks of a tile that lie in one row, so that their elements are neighbours in memory. */
typedef struct {
    int64_t element; /* the first */
    int held;        /* elements; the others that pad the last block to its full width are not there */
    int padded;
} run;

static inline uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Without a branch, which would cost the vectors. */
static inline uint32_t choose(int condition, uint32_t yes, uint32_t no)
{
    const uint32_t mask = 0u - (uint32_t)condition;
    return (yes & mask) | (no & ~mask);
}

static run run_of(const gwt_step *s, int64_t k, int64_t stop)
{
    const int64_t w = (int64_t)1 << s->level, per_row = (s->width + w - 1) >> s->level;
    const int64_t row = k / per_row, block = k % per_row;
    const int64_t blocks = stop - k < per_row - block ? stop - k : per_row - block;
    const int64_t left = s->width - block * w, padded = blocks * w;
    return (run){row * s->width + block * w, (int)(left < padded ? left : padded), (int)padded};
}

/* -- dtypes ---------------------------------------------------------------------------------------------- */

static inline float of_half(uint16_t h)
{
    const uint32_t size = h & 0x7FFF, sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t normal = (size << 13) + choose(size >= 0x7C00, 0x70000000, 0x38000000);
    const uint32_t small = bits_of((float)(int32_t)size * 0x1p-24f); /* exact, and without denormal floats */
    return float_of(choose(size < 0x400, small, normal) | sign);
}

/* To the nearest, of two the even one. */
static inline uint16_t to_half(float x)
{
    const uint32_t raw = bits_of(x), size = raw & 0x7FFFFFFF;
    const uint32_t normal = ((size + 0xFFF + (size >> 13 & 1)) >> 13) - (112 << 10);
    /* Adding 1/2 leaves units of 2**-24, its float's last place, in the lower bits. */
    const uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3F000000;
    const uint32_t large = choose(size > 0x7F800000, 0x7E00, 0x7C00);
    const uint32_t finite = choose(size < 0x38800000, small, normal);
    return (uint16_t)(choose(size < 0x477FF000, finite, large) | (raw >> 16 & 0x8000));
}

static inline uint16_t to_bfloat16(float x)
{
    const uint32_t raw = bits_of(x), rounded = (raw + 0x7FFF + (raw >> 16 & 1)) >> 16;
    return (uint16_t)choose((raw & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded);
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
            to[i] = float_of((uint32_t)halves[i] << 16);
    else
        for (int i = 0; i < n; ++i)
            to[i] = of_half(halves[i]);
}

/* -- random bits: Philox4x32-7 (Salmon et al., SC 2011) ----------------------------------------------------- */

/* Four words for each of n calls from `call` on. */
static void draw(uint32_t *restrict words, uint64_t call, int n, uint32_t step, uint32_t purpose, uint64_t key)
{
    for (int i = 0; i < n; ++i) {
        uint32_t c0 = (uint32_t)(call + (uint64_t)i), c1 = (uint32_t)((call + (uint64_t)i) >> 32);
        uint32_t c2 = step, c3 = purpose, k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
        for (int r = 0; r < 7; ++r) {
            const uint64_t low = (uint64_t)c0 * 0xD2511F53u, high = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(high >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)high;
            c2 = (uint32_t)(low >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)low;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[4 * i] = c0;
        words[4 * i + 1] = c1;
        words[4 * i + 2] = c2;
        words[4 * i + 3] = c3;
    }
}

/* Bits for n elements of a shard from `first` on, `size` bytes each: 2 for a weight, 4 for a coefficient, of which
 * the lower half is exp_avg's. What comes first in a call lies first in memory: the machine is little-endian. */
static void draw_bits(void *to, int size, int64_t first, int n, const gwt_span *span, uint32_t purpose,
                      const gwt_step *s)
{
    uint32_t words[LARGEST + 8];
    const int per_call = 16 / size;
    for (int done = 0; done < n;) {
        const int64_t place = (first + done) % span->run, left = span->run - place;
        const int64_t index = span->first + (first + done) / span->run * span->pitch + place;
        const int own = left < n - done ? (int)left : n - done, skipped = (int)(index % per_call);
        const int calls = (skipped + own + per_call - 1) / per_call;
        draw(words, (uint64_t)(index / per_call), calls, s->step, purpose, s->key);
        memcpy((char *)to + done * size, (char *)words + skipped * size, (size_t)(own * size));
        done += own;
    }
}

/* -- roundings ------------------------------------------------------------------------------------------- */

/* What lies beyond the largest number becomes that; infinity stays, and NaN. */
static inline uint16_t to_bfloat16_at_random(float x, uint32_t bits)
{
    const uint32_t raw = bits_of(x), size = raw & 0x7FFFFFFF;
    const uint32_t rounded = (raw + choose(size < 0x7F7F0000, bits, 0)) >> 16;
    return (uint16_t)choose(size > 0x7F800000, 0x7FC0, rounded);
}

static inline uint16_t to_half_at_random(float x, uint32_t bits)
{
    const uint32_t raw = bits_of(x), size = raw & 0x7FFFFFFF;
    /* 13 bits fall away, and round up what they exceed. Below 2**-14 the last place is fixed. */
    const uint32_t within = choose(size < 0x477FE000, size, 0x477FE000);
    const uint32_t normal = ((within + 0x1FFF - (bits >> 3)) >> 13) - (112 << 10);
    const float units = float_of(choose(size < 0x38800000, size, 0)) * 0x1p24f;
    const int32_t whole = (int32_t)units;
    const int up = (float)(int32_t)bits < (units - (float)whole) * 65536.0f;
    const uint32_t finite = choose(size < 0x38800000, (uint32_t)(whole + up), normal);
    const uint32_t large = choose(size > 0x7F800000, 0x7E00, 0x7C00);
    return (uint16_t)(choose(size < 0x7F800000, finite, large) | (raw >> 16 & 0x8000));
}

static void round_weights(const gwt_step *s, const float *restrict x, uint16_t *restrict to, int64_t first, int n)
{
    uint16_t bits[LARGEST];
    draw_bits(bits, sizeof *bits, first, n, &s->weights, WEIGHTS, s);
    if (s->p_type == BFLOAT16)
        for (int i = 0; i < n; ++i)
            to[i] = to_bfloat16_at_random(x[i], bits[i]);
    else
        for (int i = 0; i < n; ++i)
            to[i] = to_half_at_random(x[i], bits[i]);
}

static void split(const float *restrict x, uint16_t *restrict to, int16_t *restrict low, int n)
{
    for (int i = 0; i < n; ++i) {
        const uint32_t own = bits_of(x[i]), nan = (own & 0x7FFFFFFF) > 0x7F800000;
        const uint32_t raw = choose((int)nan, 0x7FC00000, own);
        low[i] = (int16_t)raw;
        to[i] = (uint16_t)((raw + 0x8000) >> 16);
    }
}

static void join(float *restrict x, const uint16_t *restrict weight, const int16_t *restrict low, int n)
{
    for (int i = 0; i < n; ++i)
        x[i] = float_of(((uint32_t)weight[i] << 16) + (uint32_t)(int32_t)low[i]);
}

/* The largest magnitude; a NaN is larger than any number. */
static float largest(const float *x, int n)
{
    uint32_t size = 0;
#pragma omp simd reduction(max : size)
    for (int i = 0; i < n; ++i) {
        const uint32_t own = bits_of(x[i]) & 0x7FFFFFFF;
        size = own > size ? own : size;
    }
    return float_of(size);
}

static inline float fraction_of(float x, float scale)
{
    const float fraction = fabsf(x) / scale;
    return float_of(choose(fraction == fraction, bits_of(fraction), 0));
}

static inline uint32_t fourth_power(int32_t c)
{
    const uint32_t square = (uint32_t)(c * c);
    return square * square; /* modulo 2**32 */
}

/* Codes and scale of one quantum of either moment: gwt_kernels/torch_backend/quantized.py. */
static float encode_first(const float *restrict m, int8_t *restrict codes, const uint32_t *restrict words, int n)
{
    const float scale = largest(m, n);
    for (int i = 0; i < n; ++i) {
        const int32_t bits = (int32_t)(words[i] & 0xFFFF);
        const int32_t z = (int32_t)(fraction_of(m[i], scale) * (16129 * 65536.0f));
        const int32_t c = (int32_t)sqrtf((float)(z >> 16));
        const int32_t code = c + (bits * (2 * c + 1) + c * c * 65536 < z);
        codes[i] = (int8_t)(code * ((m[i] > 0) - (m[i] < 0)));
    }
    return scale;
}

static float encode_second(const float *restrict v, uint8_t *restrict codes, const uint32_t *restrict words, int n)
{
    const float scale = largest(v, n);
    for (int i = 0; i < n; ++i) {
        const uint32_t bits = words[i] >> 16;
        const float exact = fraction_of(v[i], scale) * 4228250625.0f;
        /* To 32 bits without a sign; a vector's conversion has one. */
        const int beyond = exact >= 0x1p31f;
        const int32_t below = (int32_t)(exact - (float)beyond * 0x1p31f);
        const uint32_t z = (uint32_t)below + ((uint32_t)beyond << 31);
        int32_t c = (int32_t)sqrtf(sqrtf(exact));
        c -= (int32_t)(fourth_power(c) - z) > 0; /* roots round; what is compared is small */
        const uint32_t low = fourth_power(c), gap = fourth_power(c + 1) - low;
        /* bits * gap >> 16, where the product has 42 bits */
        const uint32_t share = ((gap & 0xFFFF) * bits >> 16) + (gap >> 16) * bits;
        c += (int32_t)share < (int32_t)(z - low);
        codes[i] = (uint8_t)(c | ((c == 0) & (v[i] > 0)));
    }
    return scale;
}

static int quantum_of(int level)
{
    return QUANTUM < 1024 >> level ? QUANTUM : 1024 >> level;
}

static void encode(const float *m, const float *v, int8_t *m_codes, uint8_t *v_codes, float *m_scales,
                   float *v_scales, int n, const uint32_t *words, int level)
{
    const int q = quantum_of(level);
    for (int i = 0; i < n; i += q) {
        const int own = q < n - i ? q : n - i;
        m_scales[i / q] = encode_first(m + i, m_codes + i, words + i, own);
        v_scales[i / q] = encode_second(v + i, v_codes + i, words + i, own);
    }
}

static void decode(float *restrict m, float *restrict v, const int8_t *restrict m_codes,
                   const uint8_t *restrict v_codes, const float *m_scales, const float *v_scales, int n, int level)
{
    const int q = quantum_of(level);
    for (int i = 0; i < n; i += q) {
        const float m_scale = m_scales[i / q], v_scale = v_scales[i / q];
        const int stop = q < n - i ? i + q : n;
        for (int k = i; k < stop; ++k) {
            const float c = m_codes[k], square = (float)v_codes[k] * (float)v_codes[k] * (float)(1.0 / 65025);
            m[k] = c * fabsf(c) * (float)(1.0 / 16129) * m_scale;
            v[k] = square * square * v_scale;
        }
    }
}

static void round_moments(const float *restrict m, const float *restrict v, uint16_t *restrict m_to,
                          uint16_t *restrict v_to, int n, const uint32_t *restrict words)
{
    for (int i = 0; i < n; ++i) {
        m_to[i] = to_bfloat16_at_random(m[i], words[i] & 0xFFFF);
        v_to[i] = to_bfloat16_at_random(v[i], words[i] >> 16);
    }
}

static double squares(const float *x, int n)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; ++i)
        sum += (double)x[i] * (double)x[i];
    return sum;
}

/* -- stages of a tile: n coefficients from k on ------------------------------------------------------------ */

static void load_gradients(const gwt_step *s, int64_t k, int n, tile *t)
{
    float *g = t->g;
    for (int64_t at = k; at < k + n;) {
        const run r = run_of(s, at, k + n);
        load(g, s->g, r.element, r.held, s->g_type);
        memset(g + r.held, 0, (size_t)(r.padded - r.held) * sizeof *g);
        g += r.padded;
        at += r.padded >> s->level;
    }
}

/* Of what is padded, updates become zeros too. */
static void load_weights(const gwt_step *s, int64_t k, int n, tile *t)
{
    int i = 0;
    for (int64_t at = k; at < k + n;) {
        const run r = run_of(s, at, k + n);
        if (s->rounding == SPLIT)
            join(t->p + i, (const uint16_t *)s->p + r.element, s->low + r.element, r.held);
        else
            load(t->p + i, s->p, r.element, r.held, s->p_type);
        const size_t absent = (size_t)(r.padded - r.held) * sizeof *t->p;
        memset(t->p + i + r.held, 0, absent);
        memset(t->g + i + r.held, 0, absent);
        i += r.padded;
        at += r.padded >> s->level;
    }
}

static void store_weights(const gwt_step *s, int64_t k, int n, tile *t)
{
    const float *restrict p = t->p;
    for (int64_t at = k; at < k + n;) {
        const run r = run_of(s, at, k + n);
        uint16_t *restrict halves = (uint16_t *)s->p + r.element;
        if (s->rounding == SPLIT)
            split(p, halves, s->low + r.element, r.held);
        else if (s->rounding == STOCHASTIC)
            round_weights(s, p, halves, r.element, r.held);
        else if (s->p_type == FLOAT32)
            load((float *)s->p + r.element, p, 0, r.held, FLOAT32);
        else if (s->p_type == BFLOAT16)
            for (int i = 0; i < r.held; ++i)
                halves[i] = to_bfloat16(p[i]);
        else
            for (int i = 0; i < r.held; ++i)
                halves[i] = to_half(p[i]);
        p += r.padded;
        at += r.padded >> s->level;
    }
}

static void load_moments(const gwt_step *s, int64_t k, int n, tile *t)
{
    const int64_t quantum = k / quantum_of(s->level);
    if (s->m_type == INT8) {
        decode(t->m, t->v, (const int8_t *)s->m + k, (const uint8_t *)s->v + k, s->m_scales + quantum,
               s->v_scales + quantum, n, s->level);
        return;
    }
    load(t->m, s->m, k, n, s->m_type);
    load(t->v, s->v, k, n, s->m_type);
}

static void read(const gwt_step *s, int64_t k, int n, tile *t)
{
    load_gradients(s, k, n, t);
    load_moments(s, k, n, t);
    if (s->observed)
        t->energy = squares(t->g, n << s->level);
}

static void store_moments(const gwt_step *s, int64_t k, int n, tile *t)
{
    if (s->m_type == FLOAT32) {
        load((float *)s->m + k, t->m, 0, n, FLOAT32);
        load((float *)s->v + k, t->v, 0, n, FLOAT32);
        return;
    }
    const int64_t quantum = k / quantum_of(s->level);
    draw_bits(t->words, sizeof *t->words, k, n, &s->coefficients, MOMENTS, s);
    if (s->m_type == BFLOAT16)
        round_moments(t->m, t->v, (uint16_t *)s->m + k, (uint16_t *)s->v + k, n, t->words);
    else
        encode(t->m, t->v, (int8_t *)s->m + k, (uint8_t *)s->v + k, s->m_scales + quantum,
               s->v_scales + quantum, n, t->words, s->level);
}

/* Sums of W neighbours: n of them, in `to` or in `other`, whichever is returned. */
static const float *fold(const float *from, float *to, float *other, int n, int level)
{
    for (int l = level - 1; l >= 0; --l) {
        const float *restrict pairs = from;
        float *restrict sums = to;
        for (int i = 0; i < n << l; ++i)
            sums[i] = pairs[2 * i] + pairs[2 * i + 1];
        from = to;
        to = other;
        other = (float *)from;
    }
    return from;
}

/* Each of n numbers W times, likewise. */
static const float *spread(const float *from, float *to, float *other, int n, int level)
{
    for (int l = 0; l < level; ++l) {
        const float *restrict singles = from;
        float *restrict twice = to;
        for (int i = 0; i < n << l; ++i)
            twice[2 * i] = twice[2 * i + 1] = singles[i];
        from = to;
        to = other;
        other = (float *)from;
    }
    return from;
}

/* The published rule up to the moments: means and moments in the tile, gains 1 / (sqrt(v) + eps) in t->gain. */
static void update_moments(const gwt_step *s, int64_t k, int n, tile *t)
{
    read(s, k, n, t);
    const float *restrict sums = fold(t->g, t->a, t->b, n, s->level);
    for (int i = 0; i < n; ++i) {
        const float mean = sums[i] * s->per_sum;
        t->mean[i] = mean;
        t->m[i] = t->m[i] * s->beta1 + mean * s->rest1;
        t->v[i] = t->v[i] * s->beta2 + s->rest2 * mean * mean;
        t->gain[i] = 1 / (sqrtf(t->v[i]) + s->eps);
    }
}

/* The rest of it: t->g becomes what is added to the weights. */
static void gwt_update(const gwt_step *s, int n, tile *t)
{
    for (int i = 0; i < n; ++i) {
        t->gain[i] *= s->step_size;
        t->mean[i] = (t->mean[i] - t->m[i] * s->per_root) * t->gain[i];
    }
    const float *restrict gains = spread(t->gain, t->a, t->b, n, s->level);
    for (int i = 0; i < n << s->level; ++i)
        t->g[i] = t->g[i] * s->factor * gains[i];
    const float *restrict offsets = spread(t->mean, t->a, t->b, n, s->level);
    for (int i = 0; i < n << s->level; ++i)
        t->g[i] = offsets[i] - t->g[i];
}

/* The folded rule, all of it, likewise. */
static void foam_update(const gwt_step *s, int64_t k, int n, tile *t)
{
    const int elements = n << s->level;
    read(s, k, n, t);
    for (int i = 0; i < elements; ++i) {
        t->g[i] *= s->factor;
        t->p[i] = t->g[i] * t->g[i];
    }
    const float *restrict sums = fold(t->g, t->a, t->b, n, s->level);
    for (int i = 0; i < n; ++i) {
        t->mean[i] = sums[i] * s->per_sum;
        t->m[i] = t->m[i] * s->beta1 + t->mean[i] * s->rest1;
    }
    const float *restrict energies = fold(t->p, t->a, t->b, n, s->level);
    for (int i = 0; i < n; ++i)
        t->v[i] = t->v[i] * s->beta2 + energies[i] * s->rest2;
    const float *restrict means = spread(t->mean, t->a, t->b, n, s->level);
    for (int i = 0; i < elements; ++i)
        t->g[i] -= means[i];
    const float *restrict vs = spread(t->v, t->a, t->b, n, s->level);
    for (int i = 0; i < elements; ++i)
        t->p[i] = sqrtf(vs[i] + t->g[i] * t->g[i]) + s->eps;
    const float *restrict ms = spread(t->m, t->a, t->b, n, s->level);
    for (int i = 0; i < elements; ++i)
        t->g[i] = (t->g[i] + ms[i]) / t->p[i] * -s->step_size;
}

/* Level 0: Adam, without bias correction inside the root; likewise. */
static void adam_update(const gwt_step *s, int64_t k, int n, tile *t)
{
    read(s, k, n, t);
    for (int i = 0; i < n; ++i) {
        const float g = t->g[i] * s->factor;
        t->mean[i] = g;
        t->m[i] = t->m[i] * s->beta1 + g * s->rest1;
        t->v[i] = t->v[i] * s->beta2 + s->rest2 * g * g;
        t->g[i] = -s->step_size * t->m[i] / (sqrtf(t->v[i]) + s->eps);
    }
}

/* -- what the caller calls --------------------------------------------------------------------------------- */

EXPORT const int64_t gwt_step_size = sizeof(gwt_step);

/* Coefficients of a tile: whole blocks, and whole quanta of codes. */
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

EXPORT int64_t gwt_tiles(const gwt_step *s)
{
    return (all_coefficients(s) + at_once(s) - 1) / at_once(s);
}

/* For the limiter, of tiles `first` to before `stop`: sums[i][0] = sum((m / (sqrt(v) + eps))**2). */
EXPORT void gwt_sum(const gwt_step *s, int64_t first, int64_t stop)
{
    tile t;
    const int64_t all = all_coefficients(s), most = at_once(s);
    for (int64_t i = first; i < stop; ++i) {
        const int64_t k = i * most;
        const int n = (int)(most < all - k ? most : all - k);
        update_moments(s, k, n, &t);
        for (int j = 0; j < n; ++j)
            t.gain[j] *= t.m[j];
        s->sums[SUMS * i] = squares(t.gain, n);
    }
}

/* The step on these tiles; where it is observed, sums[i][1:] are those of squares of gradients, of the means and
 * of what was added to the weights. */
EXPORT void gwt_update_weights(const gwt_step *s, int64_t first, int64_t stop)
{
    tile t;
    const int64_t all = all_coefficients(s), most = at_once(s);
    for (int64_t i = first; i < stop; ++i) {
        const int64_t k = i * most;
        const int n = (int)(most < all - k ? most : all - k), elements = n << s->level;
        double *sums = s->sums + SUMS * i;
        if (s->level == 0)
            adam_update(s, k, n, &t);
        else if (s->folded)
            foam_update(s, k, n, &t);
        else
            update_moments(s, k, n, &t);
        if (s->observed) {
            sums[1] = t.energy;
            sums[2] = squares(t.mean, n);
        }
        if (s->level && !s->folded)
            gwt_update(s, n, &t);
        store_moments(s, k, n, &t);
        load_weights(s, k, n, &t);
        for (int j = 0; j < elements; ++j)
            t.p[j] = t.p[j] * s->keep + t.g[j];
        if (s->observed)
            sums[3] = squares(t.g, elements);
        store_weights(s, k, n, &t);
    }
}
