/* observe.h - the first axis of a policy: what gives the rows of a layer their scores.
 *
 * Purpose    One call per layer turns its queries, keys, values and input into a score for
 *            each row of each KV head. The engine, the shapes and the cuts know scores only.
 * Units      Attention is a mean: over the query heads that read a KV head, and over the rows
 *            observed from. Larger is kept first. Scores may be negative.
 * Ownership  Everything in a layer_view is borrowed; the caller owns the outputs.
 * Threads    One caller; work is spread over the backend's number of threads, and results do
 *            not depend on it.
 * Errors     LARDER_ENUMERIC for a score that is not finite, LARDER_ENOMEM, the backend's.
 */
#ifndef LARDER_OBSERVE_H
#define LARDER_OBSERVE_H

#include <stdint.h>

#include "backend.h"
#include "half.h"
#include "policy.h"

/* One layer at the moment when its q, k and v are there. */
struct layer_view {
    struct backend *b;
    uint32_t layer;
    uint32_t n;            /* rows of the document that are left, ascending positions */
    uint32_t n_probe;      /* rows after them that only ask */
    uint32_t n_ctx;        /* tokens of the document */
    uint32_t stride;       /* row capacity of q, k and v */
    const uint32_t *pos;   /* [n + n_probe] rotation positions */
    const float *hidden;   /* [n + n_probe][n_hidden], the layer's input */
    const void *q, *k, *v; /* as in backend.h, n + n_probe rows */
};

/* score [n_kv_heads][n]; rows below the policy's sink and in its window are not scored. In
 * memory of backend_buffer_new() it stays with a backend that chooses (select_ops.h). */
int observe_layer(const struct layer_view *x, const struct policy *p, double *score,
                  struct larder_err *e);

/* CUT_DECAY: score [n - n_recent], attention of the last n_recent rows to each row before them,
 * over all heads; the weight of a row grows linearly from 1 to `weight`. */
int observe_recent(const struct layer_view *x, uint32_t n_recent, double weight, double *score,
                   struct larder_err *e);

/* out [n_heads][n]: norm 1 or 2 of what a row's value adds to the output through each query
 * head's part of W_O. */
int observe_outputs(const struct layer_view *x, int norm, double *out, struct larder_err *e);

/* The mean of those over the query heads of each KV head: worth [n_kv_heads][n]. */
int observe_worth(const struct layer_view *x, double *worth, struct larder_err *e);

/* ---- for the files that observe_layer() is made of */

int observe_expected(const struct layer_view *x, const struct policy *p, double *score,
                     struct larder_err *e);
int observe_all(const struct layer_view *x, double *score, struct larder_err *e);
int observe_defensive(const struct layer_view *x, const struct policy *p, double *score,
                      struct larder_err *e);

/* Attention probabilities, row by row: p [row + 1] of query head `head`. Rows of a head come
 * in ascending order and on one thread; heads come on any. */
typedef void attention_row_fn(void *arg, uint32_t head, uint32_t row, const float *p);
int observe_attention(const struct layer_view *x, uint32_t row0, attention_row_fn *fn, void *arg,
                      struct larder_err *e);

/* Element i of q, k or v. */
static inline double observe_element(const struct layer_view *x, const void *rows, uint64_t i)
{
    return x->b->elem == KV_F32 ? ((const float *)rows)[i]
                                : bf16_to_f32(((const uint16_t *)rows)[i]);
}

/* Elements at .. at+n-1 as f32. */
static inline void observe_row(const struct layer_view *x, const void *rows, uint64_t at,
                               uint32_t n, float *out)
{
    for (uint32_t i = 0; i < n; i++)
        out[i] = (float)observe_element(x, rows, at + i);
}

static inline uint32_t observe_group(const struct layer_view *x)
{
    return x->b->p->geom.n_heads / x->b->p->geom.n_kv_heads;
}

#endif
