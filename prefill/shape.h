/* shape.h - from scores to rows: how many each head keeps, and which.
 *
 * Purpose    The second axis of a policy. Counts and rows are two steps: a shape says how
 *            many rows each head keeps, shape_take() which ones. What a shape compares are
 *            the heads it is given: those of one layer, or those of all layers.
 * Units      Counts are rows. A head has n rows; those before `lo` and from `hi` on always stay.
 * Order      Score descending, then head and row ascending: a choice depends on its scores
 *            and nothing else. Budgets larger than what there is give what there is.
 * Ownership  The caller owns every array.
 * Threads    No state.
 * Errors     LARDER_ENUMERIC for a score that is not finite, LARDER_ENOMEM.
 */
#ifndef LARDER_SHAPE_H
#define LARDER_SHAPE_H

#include <stdint.h>

#include "larder_status.h"
#include "policy.h"

struct scored_head {
    uint32_t n, lo, hi;
    const double *score; /* [n]; only lo..hi-1 is read */
    const double *worth; /* [n] or NULL: what a row's value adds to the output (CriticalKV) */
};

/* Rows that n_heads heads of n rows keep together when none has a budget of its own: kvpress
 * counts what is dropped, so a share is rounded in favour of keeping. */
uint64_t shape_total(const struct row_budget *b, uint32_t n, uint32_t n_heads);

/* The same number for all. */
void shape_uniform(const struct scored_head *h, uint32_t n_heads, uint32_t rows, uint32_t *count);

/* All rows compete for `total` places; each head is sure of its best `sure` rows. */
int shape_compete(const struct scored_head *h, uint32_t n_heads, uint64_t total, uint32_t sure,
                  uint32_t *count, struct larder_err *e);

/* Rows of a layer: linearly fewer from the first layer to the last, `rows` on average; the
 * same everywhere, rounded half to even, where that cannot hold the window. */
uint32_t shape_pyramid(double rows, uint32_t n, uint32_t window, uint32_t n_layers, uint32_t layer);

/* `total` places in proportion to share[n_heads] >= 0, as far as the heads have rows. */
void shape_shares(const struct scored_head *h, uint32_t n_heads, const double *share,
                  uint64_t total, uint32_t *count);

/* As many whole heads as `total` holds, largest share first; the others keep the rows that
 * always stay. */
int shape_heads(const struct scored_head *h, uint32_t n_heads, const double *share, uint64_t total,
                uint32_t *count, struct larder_err *e);

/* The rows of one head, ascending, into keep[count]: the best, or, where the head has a
 * worth, half of them (at least `sure`) by score and the others by score times worth. */
int shape_take(const struct scored_head *h, uint32_t count, uint32_t sure, uint32_t *keep,
               struct larder_err *e);

#endif
