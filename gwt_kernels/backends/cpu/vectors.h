/* Vectors as wide as the machine's, for operations that compilers do not vectorize: permutations, 64-bit products. */
#ifndef GWT_VECTORS_H
#define GWT_VECTORS_H

#include <math.h>
#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VECTOR 64
#define EACH_LONG(term) term(0), term(1), term(2), term(3), term(4), term(5), term(6), term(7)
#define EACH_FLOAT(term) EACH_LONG(term), term(8), term(9), term(10), term(11), term(12), term(13), term(14), term(15)
#elif defined(__AVX2__)
#define VECTOR 32
#define EACH_LONG(term) term(0), term(1), term(2), term(3)
#define EACH_FLOAT(term) EACH_LONG(term), term(4), term(5), term(6), term(7)
#else
#define VECTOR 16
#define EACH_LONG(term) term(0), term(1)
#define EACH_FLOAT(term) EACH_LONG(term), term(2), term(3)
#endif

enum { FLOATS = VECTOR / 4, LONGS = VECTOR / 8 };

/* Vectors of floats and of integers; floats and longs may be unaligned in memory. */
typedef float floats __attribute__((vector_size(VECTOR), aligned(4), may_alias));
typedef int32_t float_places __attribute__((vector_size(VECTOR)));
typedef uint32_t float_bits __attribute__((vector_size(VECTOR)));
typedef uint64_t longs __attribute__((vector_size(VECTOR), aligned(8), may_alias));
typedef int64_t long_places __attribute__((vector_size(VECTOR)));

/* Select elements of a followed by b; a macro returns the index for each lane. */
#if defined(__clang__) || __GNUC__ >= 12
#define CHOOSE_FLOATS(a, b, place) __builtin_shufflevector(a, b, EACH_FLOAT(place))
#define CHOOSE_LONGS(a, b, place) __builtin_shufflevector(a, b, EACH_LONG(place))
#else
#define CHOOSE_FLOATS(a, b, place) __builtin_shuffle(a, b, (float_places){EACH_FLOAT(place)})
#define CHOOSE_LONGS(a, b, place) __builtin_shuffle(a, b, (long_places){EACH_LONG(place)})
#endif

/* Conversion between float16 in memory and floats, rounded to the nearest, on machines that have it. */
#if VECTOR == 64 || (VECTOR == 32 && defined(__F16C__)) || (defined(__ARM_NEON) && defined(__aarch64__))
#define HAS_HALVES
static inline floats load_halves(const uint16_t *from)
{
#if VECTOR == 64
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif VECTOR == 32
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    return (floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#endif
}

/* Every NaN becomes the one NaN of its sign that dtypes.h makes. */
static inline void store_halves(uint16_t *to, floats sum)
{
    const float_bits raw = (float_bits)sum, number = (float_bits)(sum == sum);
    const floats x = (floats)((raw & number) | (((raw & 0x80000000) | 0x7FC00000) & ~number));
#if VECTOR == 64
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif VECTOR == 32
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#endif
}
#endif

/* Return correctly rounded square roots. */
static inline floats roots(floats x)
{
#if VECTOR == 64
    return (floats)_mm512_sqrt_ps((__m512)x);
#elif VECTOR == 32
    return (floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (floats)_mm_sqrt_ps((__m128)x);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (floats)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < FLOATS; ++i)
        x[i] = sqrtf(x[i]);
    return x;
#endif
}

/* Return products of the lower 32 bits of each element. */
static inline longs products(longs a, longs b)
{
#if VECTOR == 64
    return (longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif VECTOR == 32
    return (longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (longs)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

#endif
