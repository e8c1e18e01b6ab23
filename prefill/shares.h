/* shares.h - what a calibration measured, as a prefill uses it.
 *
 * Purpose    Heads differ by orders of magnitude in how many rows they need, and the differences
 *            are the model's, not the document's: a table that `larder calibrate` measured
 *            gives, for some budgets, the share of its rows that each head keeps. Beside it stand
 *            the numbers that window policies take where they say `auto`.
 * Units      Shares and budgets are fractions of the document, 0 to 1.
 * Ownership  shares_free() frees (NULL allowed).
 * Threads    Read-only after it was made.
 */
#ifndef LARDER_SHARES_H
#define LARDER_SHARES_H

#include <stdint.h>

#include "larder_status.h"
#include "policy.h"

#define SHARES_MAX_BUDGETS 32u

struct shares {
    uint32_t n_heads;   /* n_layers * n_kv_heads */
    uint32_t n_budgets; /* ascending, at least 1 */
    float budget[SHARES_MAX_BUDGETS];
    float *share;                 /* [n_budgets][n_heads] */
    struct profile_window window; /* pool 0: not measured */
    char id[PROFILE_ID_LEN + 1];  /* of what is in it */
};

int shares_new(struct shares **ret, uint32_t n_heads, struct larder_err *e);
void shares_free(struct shares *s);

/* Add the shares of one budget, which must be above the last one; both are kept as f32, so that
 * what is computed with is what the identity is made of. */
int shares_add(struct shares *s, double budget, const float *share, struct larder_err *e);

/* After the last budget. */
int shares_set_window(struct shares *s, const struct profile_window *w, struct larder_err *e);

/* A policy of which something depends on what was measured, and that names no profile, gets this
 * one's name, since the numbers are part of what is computed. LARDER_EPOLICY: it names another,
 * or one where there is none. Other policies stay as they are. `s` may be NULL: never
 * calibrated. */
int shares_name_in(const struct shares *s, struct policy *p, struct larder_err *e);

/* out[n_heads]: the shares of a budget; between measured ones they are interpolated, below
 * the first scaled. */
void shares_at(const struct shares *s, double budget, double *out);

/* The shares that one threshold over all heads gives: score[n_heads][n], the first `sink` rows
 * of each head always kept. out[n_heads]. */
int shares_measure(const float *const *score, uint32_t n_heads, uint32_t n, uint32_t sink,
                   double budget, float *out, struct larder_err *e);

#endif
