/* select_ops.h - scoring, choosing and moving rows where K and V are.
 *
 * Purpose    A backend whose K and V are far from the host's memory does with them there what
 *            select.h, shape.h and replay.h say, so that only what is kept leaves. A backend
 *            without this table (backend_ops.select NULL) leaves it to the host's code.
 * Shapes     score: [n_heads][ld], f64. Index lists of several heads follow one another.
 * Memory     As in backend.h. Scores, ranks and lists in memory of backend_buffer_new() stay
 *            where they are until somebody looks (backend_view()); what goes into memory of
 *            backend_staging_new() is on its way to the host when the call returns. Of a buffer
 *            that a call writes to, it loses what the call does not write.
 * Order      Score descending, then the lower row first. Sums are f64 and take the host's order,
 *            but for a variance over many tokens, which is summed in blocks of a fixed size.
 * Threads    One caller.
 * Errors     LARDER_ENUMERIC names the first row whose score is not finite; the backend's.
 */
#ifndef LARDER_SELECT_OPS_H
#define LARDER_SELECT_OPS_H

#include "backend.h"
#include "policy.h"

struct kept_rows; /* engine.h */

/* Window attention mass, pooled per query head, summed over those of each KV head, times share. */
struct window_score {
    struct window_mass of; /* mass is not used */
    uint32_t pool_kernel;
    enum pool_kind pool;
    double share;
    uint32_t n_unseen; /* the first rows, which score `unseen` */
    double unseen;
    double *score; /* [n_kv_heads][ld], of which n - w are written */
    uint64_t ld;
};

/* Tokens lo .. lo+m-1 over all heads. */
struct token_rank {
    const double *score;
    uint32_t n_heads;
    uint64_t ld;
    uint32_t lo, m;
    double *token;  /* [m] sums over the heads */
    uint32_t *rank; /* [m], 1: the best; or NULL */
};

/* select_variance(): of n_layers rank vectors that follow one another. */
struct rank_variance {
    const uint32_t *rank; /* [n_layers][m] */
    uint32_t n_layers, m, k;
};

/* Rows of each head, ascending: those below lo and from hi on, and the best of the others. */
struct top_rows {
    const double *score;
    uint32_t n_heads;
    uint64_t ld;
    uint32_t n, lo, hi;
    const uint32_t *count; /* [n_heads], of all rows that are kept */
    uint32_t *index;       /* the lists */
};

/* to[] = from[head][index[]], head after head. */
struct gather {
    const void *from; /* [n_heads][stride] rows */
    uint64_t stride;
    uint32_t n_heads, row_bytes;
    const uint32_t *count; /* [n_heads] rows that go */
    const uint32_t *index; /* their lists; NULL: rows 0.. of each head */
    void *to;              /* `from`: rows move down in place */
};

/* Rows of the document that are normalised together, with the first rows of all, and the replay
 * rows (after the document's) that ask for them. */
struct replay_part {
    uint32_t row, n_rows;
    uint32_t first, n;
};

/* replay_score(): the largest probability; or, `square`, match_layer()'s score: the mean square
 * over n_queries, of replay rows that do not see each other. */
struct replay_ask {
    const void *q, *k; /* [heads][stride][head_dim]: rows of the document, then of the replay */
    uint32_t stride, n_doc;
    const struct replay_part *part;
    uint32_t n_parts;
    bool square;
    uint32_t n_queries;
    const float *worth, *length; /* replay.h; or NULL */
    double *score;               /* [n_kv_heads][n_doc]; 0 for rows of no part */
    float *sums;                 /* `square`: what fits need, or NULL: [n_heads][n_replay][2], of */
    uint32_t n_replay; /* each row the log of its sum, and the share of the part's rows in it */
};

/* match_fit(): rows `heads` of the document, in memory of backend_buffer_new(). */
struct fit_rows {
    const struct replay_ask *ask; /* whose sums are there */
    const void *v;                /* as ask->k */
    enum kv_dtype precision;
    bool with_bias;
    const struct kept_rows *heads; /* [n_kv_heads] */
    float *to_k, *to_v;            /* [rows of all heads][head_dim] */
    float *bias;                   /* [rows of all heads]; not written without with_bias */
};

/* packer_layer(): rows of the KV heads become tiles (packed.h), of each head K's and then V's,
 * head after head. Rows anywhere in memory of backend_buffer_new(). */
struct pack_rows {
    enum kv_dtype to;              /* KV_INT8 or KV_INT4 */
    const struct kept_rows *heads; /* [n_kv_heads] of KV_F32 or KV_BF16 */
    uint8_t *tiles;
    uint32_t *bad; /* [n_kv_heads]: not 0 where an element is not finite or a scale overflows f16 */
};

struct select_ops {
    int (*window)(struct backend *b, const struct window_score *x, struct larder_err *e);
    int (*rank)(struct backend *b, const struct token_rank *x, struct larder_err *e);
    int (*variance)(struct backend *b, const struct rank_variance *x, double *ret,
                    struct larder_err *e);
    int (*top)(struct backend *b, const struct top_rows *x, struct larder_err *e);
    int (*gather)(struct backend *b, const struct gather *x, struct larder_err *e);
    int (*replay)(struct backend *b, const struct replay_ask *x, struct larder_err *e);
    int (*pack)(struct backend *b, const struct pack_rows *x, struct larder_err *e);
    int (*fit)(struct backend *b, const struct fit_rows *x, struct larder_err *e);
};

#endif
