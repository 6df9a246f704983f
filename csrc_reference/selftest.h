/* What the files of the self-test share: checks, and what selftest_inputs.c has. */
#ifndef SELFTEST_H
#define SELFTEST_H

#include "gwt_reference.h"

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);           \
            exit(1);                                                                            \
        }                                                                                       \
    } while (0)

/* A reproducible number in [-1, 1), by a 64-bit linear congruential generator (Knuth's MMIX constants). */
double noise(void);

/* The deepest level that rows of this width have. */
int deepest(int64_t width);

/* Daubechies' wavelet of four taps, "db2", zeros beyond the ends. */
extern const gwt_wavelet daubechies;

/* Drives Lion, Muon, Adafactor and Adam-mini; returns the number of configurations. */
long check_optimizers(void);

#endif
