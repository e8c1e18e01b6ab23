/* cli_eval_stat.h - the few statistics of `larder eval`.
 *
 * Purpose    Shares, means, intervals and rank correlations over small samples.
 * Units      What cannot be said (no data, no spread) is NAN.
 * Ownership  Nothing is kept; inputs are borrowed, except where they are sorted in place.
 * Threads    No state: the same input and seed give the same numbers everywhere.
 * Errors     LARDER_ENOMEM.
 */
#ifndef LARDER_CLI_EVAL_STAT_H
#define LARDER_CLI_EVAL_STAT_H

#include <stddef.h>
#include <stdint.h>

#include "larder_status.h"

/* A part of a whole: of one document, the questions kept right of those that were right. */
struct stat_pair {
    double part, whole;
};

/* Sum of the parts by the sum of the wholes. */
double stat_share(const struct stat_pair *p, size_t n);

/* 95 % interval of stat_share() over pairs drawn with replacement. */
#define STAT_RESAMPLES 10000
int stat_bootstrap(const struct stat_pair *p, size_t n, uint64_t seed, double *ret_low,
                   double *ret_high, struct larder_err *e);

/* Numbers that come one by one; NANs are passed over. */
struct stat_mean {
    double sum;
    size_t n;
};
void stat_add(struct stat_mean *m, double x);
double stat_mean(const struct stat_mean *m);

/* Sorts x; the lower one of two in the middle. */
double stat_median(double *x, size_t n);

/* Spearman's rank correlation, equal values sharing the mean of their ranks. Under three pairs, or
 * where one side is constant, there is none. */
int stat_spearman(const double *x, const double *y, size_t n, double *ret, struct larder_err *e);

#endif
