/* match.h - refit what is kept so that it answers for what is dropped.
 *
 * Purpose    For each KV head: how much every document row matters to the queries of a replay;
 *            then, for the rows that are kept, a bias per row that restores the attention mass of
 *            the dropped ones, and new values that restore the attention's output.
 * Source     Attention Matching, arXiv 2602.16284, with the queries of a KVzip replay
 *            (arXiv 2505.23416) as reference queries, a ridge towards the original values, and
 *            keys quantised before the fit.
 * Shapes     n document rows, m = n_group * replay rows queries per KV head, t kept rows.
 * Units      Sums over queries are means where the ridge says so: ridge * m.
 * Ownership  match_open() allocates for one document, match_close() frees (NULL allowed).
 *            match_layer() keeps what it computed until the next call.
 * Threads    The backend's; results do not depend on them.
 * Errors     LARDER_ENOMEM, LARDER_ENUMERIC (the fit stays singular with the largest ridge, or
 *            an input is not finite).
 */
#ifndef LARDER_MATCH_H
#define LARDER_MATCH_H

#include "backend.h"
#include "replay.h"
#include "select_ops.h"

struct match;

struct match_opts {
    enum kv_dtype precision; /* that keys will be stored in: KV_BF16, KV_INT8, KV_INT4 */
    bool with_bias;
};

/* span: document rows that are fitted together, or 0: all. */
int match_open(struct match **ret, struct backend *b, const struct replay *r, uint32_t span,
               struct larder_err *e);
void match_close(struct match *m);

/* Statistics of a layer: v as x->k, [n_kv_heads][stride][head_dim]. *ret_score: [n_kv_heads][n],
 * the mean over all queries of the squared probability of a row; valid until the next call. */
int match_layer(struct match *m, const struct replay_rows *x, const void *v,
                const float **ret_score, struct larder_err *e);

/* Rows that are scored together, and by whom, for a backend that scores (select_ops.h): *ret_n of
 * part[chunks of the replay]; *ret_queries queries of a KV head ask in all. */
void match_parts(const struct match *m, struct replay_part *part, uint32_t *ret_n,
                 uint32_t *ret_queries);

/* Fit the rows keep[t] (ascending) of a KV head: v[t][head_dim] and bias[t] (all zero without
 * with_bias; exactly representable in bf16). */
int match_fit(struct match *m, const struct match_opts *o, uint32_t kv_head, const uint32_t *keep,
              uint32_t t, float *v, float *bias, struct larder_err *e);

#endif
