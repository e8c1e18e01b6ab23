/* match_int.h - private to match*.c: a layer's statistics and how queries are cut into blocks.
 *
 * Shapes     Queries of a KV head are numbered block by block: chunk, then query head of the
 *            group, then row. A group is a run of chunks and so a run of blocks.
 */
#ifndef LARDER_MATCH_INT_H
#define LARDER_MATCH_INT_H

#include "match.h"
#include "mul.h"
#include "ref.h"
#include "select_ops.h"

#define MATCH_ROWS 64u /* queries of a block */

struct match_block {
    uint32_t group;
    uint32_t head; /* query head within its KV head's group */
    uint32_t row;  /* first replay row */
    uint32_t rows;
    uint32_t query; /* number of its first query */
};

/* Document rows that are fitted together, and the queries they are fitted to. */
struct match_group {
    uint32_t row, n_rows;
    uint32_t block, n_blocks;
    uint32_t n_queries;
};

struct match {
    struct backend *b;
    const struct replay *r;
    uint32_t n_group; /* query heads of a KV head */
    struct match_block *block;
    uint32_t n_blocks;
    struct match_group *group;
    uint32_t n_groups, max_group; /* and the rows of the largest */
    uint32_t n_queries;           /* of a KV head */
    /* of the present layer */
    struct replay_rows x; /* a copy: fits come after the call that gave it */
    const void *v;
    /* where a backend matches */
    struct replay_part *part; /* [n_groups] */
    struct replay_ask ask;    /* whose sums [n_heads][replay rows][2] stay there */
    /* where the host does */
    mul_fn *mul;
    struct ref_keys *doc; /* [n_kv_heads] */
    float *lse;     /* [n_kv_heads][n_queries]: log of the sum over the first rows and group */
    float *mass;    /* [n_kv_heads][n_queries]: probability of the group's rows */
    float *y;       /* [n_kv_heads][n_queries][padded head_dim]: their output */
    float *square;  /* [n_kv_heads][n_blocks][max_group]: sums of squared probabilities */
    float *scratch; /* [n_threads][per_worker] */
    uint64_t per_worker;
};

/* By the host: match_layer(); and, of match_fit(), v[t][head_dim] and bias[t] of a KV head's
 * keep[t]. */
int match_stats(struct match *m, double *score, struct larder_err *e);
int match_fit_head(struct match *m, const struct match_opts *o, uint32_t kv_head,
                   const uint32_t *keep, uint32_t t, float *v, float *bias, struct larder_err *e);

/* The block's queries, scaled: q[rows][head_dim]. */
void match_queries(const struct match *m, uint32_t g, const struct match_block *k, float *q);

/* x = q · keys in panels [n / 16][head_dim][16]; x with any strides, whole panels written. */
void match_logits(const struct match *m, const float *q, uint32_t rows, const float *panels,
                  uint32_t n, float *x, uint64_t x_row, uint64_t x_panel);

#endif
