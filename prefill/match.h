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
 * Where      With a backend that matches (select_ops.h) all of it happens there, on rows that
 *            never leave; otherwise on the host, whose code this is.
 * Ownership  match_open() allocates for one document, match_close() frees (NULL allowed).
 *            Rows that match_layer() is given are borrowed until the layer's last match_fit().
 * Threads    The backend's; results do not depend on them.
 * Errors     LARDER_ENOMEM, LARDER_ENUMERIC (the fit stays singular with the largest ridge, or
 *            an input is not finite), the backend's.
 */
#ifndef LARDER_MATCH_H
#define LARDER_MATCH_H

#include "backend.h"
#include "replay.h"

/* Ridges are multiplied by the number of queries, */
#define RIDGE_BIAS 1e-6f
#define RIDGE_VALUE 1e-5f
#define RIDGE_STEP 10.0f /* and by this where a matrix is not positive definite in f32. */
#define RIDGE_TRIES 5
#define BIAS_MIN 0.02f /* of e^bias */
#define BIAS_MAX 50.0f
#define BIAS_ROUNDS 6 /* solves that each find more rows out of bounds */

struct kept_rows;
struct match;

struct match_opts {
    enum kv_dtype precision; /* that keys will be stored in: KV_BF16, KV_INT8, KV_INT4 */
    bool with_bias;
};

/* span: document rows that are fitted together, or 0: all. */
int match_open(struct match **ret, struct backend *b, const struct replay *r, uint32_t span,
               struct larder_err *e);
void match_close(struct match *m);

/* Statistics of a layer: v as x->k, [n_kv_heads][stride][head_dim]; what rows are worth is not
 * looked at. score: [n_kv_heads][n], the mean over all queries of the squared probability of a
 * row; it stays with a backend that matches. */
int match_layer(struct match *m, const struct replay_rows *x, const void *v, double *score,
                struct larder_err *e);

/* Fit what is kept of the document's rows: heads[n_kv_heads], of the backend's element type, whose
 * positions are row numbers. To k and v [rows of all heads][head_dim]: the keys as they are, and
 * new values; to bias [rows of all heads]: zeros without with_bias, representable in bf16. */
int match_fit(struct match *m, const struct match_opts *o, const struct kept_rows *heads, float *k,
              float *v, float *bias, struct larder_err *e);

#endif
