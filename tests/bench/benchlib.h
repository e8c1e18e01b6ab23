/* benchlib.h - what every benchmark needs: a clock, and figures in order. */
#ifndef LARDER_BENCHLIB_H
#define LARDER_BENCHLIB_H

#include <stdlib.h>
#include <time.h>

static inline double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static inline int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

#endif
