/* 8-bit quantized moments with a scale per block (quantum) of values: formats/int8.py, bit for bit. */
#ifndef GWT_CODES_H
#define GWT_CODES_H

#include <math.h>
#include <stdint.h>

#include "dtypes.h"

enum { QUANTUM = 128 };

/* Return the largest magnitude; a NaN is larger than any number. */
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

/* Write the quantized values (codes) of one block and return its scale: formats/int8.py. A rule without a second
 * moment has no v_codes. */
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
        /* Conversion to unsigned: vectors convert to signed integers only. */
        const int beyond = exact >= 0x1p31f;
        const int32_t below = (int32_t)(exact - (float)beyond * 0x1p31f);
        const uint32_t z = (uint32_t)below + ((uint32_t)beyond << 31);
        int32_t c = (int32_t)sqrtf(sqrtf(exact));
        c -= (int32_t)(fourth_power(c) - z) > 0; /* roots are rounded; compared differences are small */
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
        if (v_codes)
            v_scales[i / q] = encode_second(v + i, v_codes + i, words + i, own);
    }
}

static void decode_first(float *restrict m, const int8_t *restrict codes, float scale, int n)
{
    for (int i = 0; i < n; ++i) {
        const float c = codes[i];
        m[i] = c * fabsf(c) * (float)(1.0 / 16129) * scale;
    }
}

static void decode_second(float *restrict v, const uint8_t *restrict codes, float scale, int n)
{
    for (int i = 0; i < n; ++i) {
        const float square = (float)codes[i] * (float)codes[i] * (float)(1.0 / 65025);
        v[i] = square * square * scale;
    }
}

static void decode(float *m, float *v, const int8_t *m_codes, const uint8_t *v_codes, const float *m_scales,
                   const float *v_scales, int n, int level)
{
    const int q = quantum_of(level);
    for (int i = 0; i < n; i += q) {
        const int own = q < n - i ? q : n - i;
        decode_first(m + i, m_codes + i, m_scales[i / q], own);
        if (v_codes)
            decode_second(v + i, v_codes + i, v_scales[i / q], own);
    }
}

#endif
