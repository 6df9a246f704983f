/* Random bits by Philox4x32-7 (Salmon et al., SC 2011): core/philox.py, bit for bit. */
#ifndef GWT_RANDOM_H
#define GWT_RANDOM_H

#include <stdint.h>

#include "vectors.h"

/* Write four words for each of n calls from `call` on, rounded up to whole vectors of calls. In c0 to c3 a word is the
 * lower half of an element; the upper half is arbitrary. */
static void draw(uint64_t *restrict words, uint64_t call, int n, uint32_t step, uint32_t purpose, uint64_t key)
{
#define LANE(i) i
#define PAIR(i) ((i) / 2 + (i) % 2 * LONGS)            /* interleaves two vectors */
#define LATER_PAIR(i) (LONGS / 2 + PAIR(i))
    const longs zero = {0}, low_half = zero + 0xFFFFFFFF;
    longs calls = (longs){EACH_LONG(LANE)} + call;
    for (int i = 0; i < n; i += LONGS, calls += LONGS) {
        longs c0 = calls, c1 = calls >> 32, c2 = zero + step, c3 = zero + purpose;
        uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
        for (int r = 0; r < 7; ++r) {
            const longs low = products(c0, zero + 0xD2511F53u), high = products(c2, zero + 0xCD9E8D57u);
            c0 = (high >> 32) ^ c1 ^ k0;
            c1 = high;
            c2 = (low >> 32) ^ c3 ^ k1;
            c3 = low;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const longs first = (c0 & low_half) | c1 << 32, second = (c2 & low_half) | c3 << 32;
        *(longs *)(words + 2 * i) = CHOOSE_LONGS(first, second, PAIR);
        *(longs *)(words + 2 * i + LONGS) = CHOOSE_LONGS(first, second, LATER_PAIR);
    }
#undef LANE
#undef PAIR
#undef LATER_PAIR
}

#endif
