/* select.h - from window attention mass to tokens and rows (notes: PRUNING 2-6, 11).
 *
 * Purpose    POOL, AGG, RANK, the variance of ranks over layers, and top-k, as pure
 *            functions over host arrays; the engine decides when to call them.
 * Units      m is the number of rankable (prefix) tokens; ranks run from 1 (most attended) to m.
 * Order      Every sort is by score descending, then index ascending: a selection depends on
 *            its scores and nothing else. All sums are f64.
 * Ownership  The caller owns every array.
 * Threads    No state.
 * Errors     LARDER_ENUMERIC for a score that is not finite, LARDER_ENOMEM.
 */
#ifndef LARDER_SELECT_H
#define LARDER_SELECT_H

#include <stdint.h>

#include "larder_status.h"
#include "policy.h"

/* out[j] over x[0..m): avg divides by `kernel` even at the borders (padding counts), max
 * looks at existing neighbours only. `kernel` is odd. */
void select_pool(const double *x, uint32_t m, uint32_t kernel, enum pool_kind kind, double *out);

/* mass [n_heads][m] -> score [n_kv_heads][m]: pooled per query head, then summed over the
 * query heads of each KV head. */
int select_head_scores(const float *mass, uint32_t n_heads, uint32_t n_kv_heads, uint32_t m,
                       uint32_t kernel, enum pool_kind kind, double *score, struct larder_err *e);

/* head_score [n_kv_heads][m] -> score [m], the sum over KV heads. */
void select_token_scores(const double *head_score, uint32_t n_kv_heads, uint32_t m, double *score);

/* order[p]: the token of rank p + 1. */
int select_order(const double *score, uint32_t m, uint32_t *order, struct larder_err *e);

/* rank[order[p]] = p + 1. */
void select_rank(const uint32_t *order, uint32_t m, uint32_t *rank);

/* The first k of `order`, ascending, into keep[0..k). */
void select_top(const uint32_t *order, uint32_t k, uint32_t *keep);

/* Mean over layers and over the union of their top-k tokens of (rank - mean rank)^2.
 * rank: n_layers vectors [m]; 0 when the union is empty (k = 0). */
double select_variance(const uint32_t *const *rank, uint32_t n_layers, uint32_t m, uint32_t k,
                       uint32_t *ret_union);

/* value relative to the first tested layer's; a first value of 0 makes every later layer
 * either equal (0: select) or infinitely worse. */
double select_ratio(double value, double first);

#endif
