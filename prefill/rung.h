/* rung.h - one way of keeping a document's rows, among several side by side.
 *
 * Purpose    A pass costs the same whatever is kept after it. So one serves any number of policies
 *            that differ only in what follows the layers: scores (where they need no replay of
 *            their own), budget, shape, fit, precision. Each is a rung, with its own rows and,
 *            where there is a replay, its own certificate.
 * Ownership  rungs_open() allocates, rungs_close() frees (also after a failed open). Policies and
 *            sinks are borrowed until then. Rows hold until the next layer.
 * Threads    One caller; fits use the backend's.
 * Errors     LARDER_EPOLICY, LARDER_EBUDGET, LARDER_ENUMERIC, LARDER_ENOMEM, the sink's.
 */
#ifndef LARDER_RUNG_H
#define LARDER_RUNG_H

#include "engine.h"
#include "hold.h"
#include "keep.h"
#include "match.h"
#include "pack.h"

/* What a rung is opened for: shares and layers of the policy are resolved. */
struct rung_want {
    const struct policy *policy;
    const struct engine_sink *sink; /* or NULL */
};

struct rung {
    struct backend *b;
    const struct policy *policy;
    const struct engine_sink *sink; /* NULL, or without layer(): rows go nowhere */
    uint32_t n;                     /* rows of the document */
    uint32_t probes;  /* first row of the probes' copy that attends to this rung's rows */
    struct keep keep; /* keep.heads: the rows of the layer at hand */
    struct hold hold; /* where rows are chosen only at the end: those of all layers */
    struct packer packer;
    float *fit_k, *fit_v; /* [kept rows of all heads][head_dim], where rows are fitted */
    float *bias;          /* [kept rows of all heads] */
    struct certificate certificate;
};

/* A rung for each of n_wants; *ret_n: how many there are to be closed. */
int rungs_open(struct rung **ret, uint32_t *ret_n, struct backend *b, const struct rung_want *want,
               uint32_t n_wants, uint32_t n, struct larder_err *e);
void rungs_close(struct rung *r, uint32_t n_rungs);

/* Are rows refitted, and so chosen by the match's scores? Where none is dropped, only what codes
 * lose is left to stand for. */
static inline bool rung_fits(const struct rung *r)
{
    return r->policy->fit != FIT_NONE && (r->keep.n_room || r->policy->precision != KV_BF16);
}

/* Choose the rows of a layer, refit them (m is not NULL where rung_fits()) and pack them; where
 * heads of all layers compete the layer is only kept until rung_end(). Between this and
 * rung_deliver() the rows may be on their way from a backend. */
int rung_choose(struct rung *r, const struct layer_rows *x, struct match *m, struct larder_err *e);
/* Hand on what was chosen. */
int rung_deliver(struct rung *r, struct larder_err *e);
int rung_end(struct rung *r, struct larder_err *e);

/* The rows at hand as past rows [n_kv_heads]. */
void rung_past(const struct rung *r, struct past_rows *past);

#endif
