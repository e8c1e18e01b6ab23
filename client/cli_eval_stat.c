/* cli_eval_stat.c - shares with intervals, medians, rank correlation.
 *
 * The one idea: the questions about one document are not independent, so what is resampled
 * are documents, each a pair of counts. A generator of our own makes an interval the same on
 * every machine. */
#include "cli_eval_stat.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "mem.h"

/* ---- shares */

double stat_share(const struct stat_pair *p, size_t n)
{
    double part = 0, whole = 0;

    for (size_t i = 0; i < n; i++) {
        part += p[i].part;
        whole += p[i].whole;
    }
    return whole > 0 ? part / whole : NAN;
}

/* splitmix64: any seed, also 0, will do. */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double drawn_share(const struct stat_pair *p, size_t n, uint64_t *state)
{
    struct stat_pair sum = {0, 0};

    for (size_t i = 0; i < n; i++) {
        const struct stat_pair *one = &p[next_random(state) % n];

        sum.part += one->part;
        sum.whole += one->whole;
    }
    return stat_share(&sum, 1);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

int stat_bootstrap(const struct stat_pair *p, size_t n, uint64_t seed, double *ret_low,
                   double *ret_high, struct larder_err *e)
{
    double *drawn = mem_alloc(STAT_RESAMPLES, sizeof *drawn);
    size_t n_drawn = 0;

    if (!drawn)
        return larder_fail(e, LARDER_ENOMEM, "no memory for an interval");
    for (size_t i = 0; i < STAT_RESAMPLES && n; i++) {
        double s = drawn_share(p, n, &seed);

        if (!isnan(s)) /* no document that was drawn has an answer to keep */
            drawn[n_drawn++] = s;
    }
    qsort(drawn, n_drawn, sizeof *drawn, ascending);
    *ret_low = n_drawn ? drawn[n_drawn / 40] : NAN;
    *ret_high = n_drawn ? drawn[39 * n_drawn / 40] : NAN;
    mem_free(drawn);
    return 0;
}

/* ---- means */

void stat_add(struct stat_mean *m, double x)
{
    if (isnan(x))
        return;
    m->sum += x;
    m->n++;
}

double stat_mean(const struct stat_mean *m)
{
    return m->n ? m->sum / (double)m->n : NAN;
}

double stat_median(double *x, size_t n)
{
    qsort(x, n, sizeof *x, ascending);
    return n ? x[(n - 1) / 2] : NAN;
}

/* ---- rank correlation */

struct placed {
    double value;
    size_t at;
};

static int by_value(const void *a, const void *b)
{
    return ascending(&((const struct placed *)a)->value, &((const struct placed *)b)->value);
}

/* Ranks of x; `sorted` is room. */
static void rank(const double *x, size_t n, struct placed *sorted, double *ret)
{
    for (size_t i = 0; i < n; i++)
        sorted[i] = (struct placed){x[i], i};
    qsort(sorted, n, sizeof *sorted, by_value);
    for (size_t i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && sorted[end].value == sorted[i].value;)
            end++;
        for (size_t j = i; j < end; j++)
            ret[sorted[j].at] = 0.5 * (double)(i + end - 1);
    }
}

static double correlation(const double *x, const double *y, size_t n)
{
    double mean = 0.5 * (double)(n - 1); /* of ranks, with and without equals */
    double xy = 0, xx = 0, yy = 0;

    for (size_t i = 0; i < n; i++) {
        xy += (x[i] - mean) * (y[i] - mean);
        xx += (x[i] - mean) * (x[i] - mean);
        yy += (y[i] - mean) * (y[i] - mean);
    }
    return xx > 0 && yy > 0 ? xy / sqrt(xx * yy) : NAN;
}

int stat_spearman(const double *x, const double *y, size_t n, double *ret, struct larder_err *e)
{
    struct placed *sorted = mem_alloc(n, sizeof *sorted);
    double *ranks = mem_alloc(2 * (uint64_t)n, sizeof *ranks);
    bool room = sorted && ranks;

    if (room && n >= 3) {
        rank(x, n, sorted, ranks);
        rank(y, n, sorted, ranks + n);
    }
    if (room)
        *ret = n >= 3 ? correlation(ranks, ranks + n, n) : NAN;
    mem_free(sorted);
    mem_free(ranks);
    return room ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for %zu ranks", n);
}
