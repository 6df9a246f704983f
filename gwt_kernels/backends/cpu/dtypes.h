/* Conversion between float32 and 16 bits: nearest, stochastic, and split into weight and error-correction bits. */
#ifndef GWT_DTYPES_H
#define GWT_DTYPES_H

#include <stdint.h>
#include <string.h>

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

/* Select without a branch, so that loops are vectorized. */
static inline uint32_t choose(int condition, uint32_t yes, uint32_t no)
{
    const uint32_t mask = 0u - (uint32_t)condition;
    return (yes & mask) | (no & ~mask);
}

static inline float of_bfloat16(uint16_t h)
{
    return float_of((uint32_t)h << 16);
}

static inline float of_half(uint16_t h)
{
    const uint32_t size = h & 0x7FFF, sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t normal = (size << 13) + choose(size >= 0x7C00, 0x70000000, 0x38000000);
    const uint32_t small = bits_of((float)(int32_t)size * 0x1p-24f); /* exact, without denormal floats */
    return float_of(choose(size < 0x400, small, normal) | sign);
}

/* Round to the nearest, ties to even. */
static inline uint16_t to_half(float x)
{
    const uint32_t raw = bits_of(x), size = raw & 0x7FFFFFFF;
    const uint32_t normal = ((size + 0xFFF + (size >> 13 & 1)) >> 13) - (112 << 10);
    /* Adding 1/2, whose last place is 2**-24, leaves units of 2**-24 in the lower bits. */
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

/* Round stochastically. Finite numbers beyond the largest become that; infinity and NaN stay. */
static inline uint16_t to_bfloat16_at_random(float x, uint32_t bits)
{
    const uint32_t raw = bits_of(x), size = raw & 0x7FFFFFFF;
    const uint32_t rounded = (raw + choose(size < 0x7F7F0000, bits, 0)) >> 16;
    return (uint16_t)choose(size > 0x7F800000, 0x7FC0, rounded);
}

static inline uint16_t to_half_at_random(float x, uint32_t bits)
{
    const uint32_t raw = bits_of(x), size = raw & 0x7FFFFFFF;
    /* The 13 dropped bits round up if they exceed the random ones. */
    const uint32_t within = size < 0x477FE000 ? size : 0x477FE000;
    const uint32_t normal = (within + 0x1FFF - (112u << 23) - (bits >> 3)) >> 13;
    /* Below 2**-14 the last place is fixed: drop 16 bits of units of 2**-16 of it, rounded up. */
    const float parts = float_of(size < 0x38800000 ? size : 0x38800000) * 0x1p40f;
    const int32_t whole = (int32_t)parts;
    const uint32_t small = ((uint32_t)(whole + ((float)whole < parts)) + 0xFFFF - bits) >> 16;
    const uint32_t finite = choose(size < 0x38800000, small, normal);
    const uint32_t large = choose(size > 0x7F800000, 0x7E00, 0x7C00);
    return (uint16_t)(choose(size < 0x7F800000, finite, large) | (raw >> 16 & 0x8000));
}

/* Return the float32 of a bfloat16 weight and its error-correction bits, a signed number. */
static inline float joined(uint16_t weight, int16_t low)
{
    return float_of(((uint32_t)weight << 16) + (uint32_t)(int32_t)low);
}

/* Replace every NaN by one whose lower bits are 0: others would carry into a number's bits. */
static inline uint32_t one_nan(uint32_t raw)
{
    return choose((raw & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, raw);
}

#endif
