/* cut.h - the third axis of a policy: after which layer which tokens stop going on.
 *
 * Purpose    Looks at the scores of one layer after the other and says when to cut and what
 *            passes. It knows scores only; moving hidden states is the engine's.
 * Units      m tokens can be cut: rows lo .. lo+m-1 of those that are left. Others always pass.
 * Ownership  cut_init() allocates, cut_done() frees (also after a failed init).
 * Threads    One caller.
 * Errors     LARDER_ENOMEM, LARDER_ENUMERIC.
 */
#ifndef LARDER_CUT_H
#define LARDER_CUT_H

#include <stdbool.h>
#include <stdint.h>

#include "backend.h"
#include "policy.h"

struct variance_point {
    uint32_t layer;
    double value; /* population variance of the token ranks, mean over the union */
    double ratio; /* to the first tested layer */
};

struct cut {
    struct backend *b;           /* whose memory tokens and ranks are in */
    const struct policy *policy; /* resolved; borrowed */
    uint32_t n_kv_heads;
    uint32_t lo, m;
    uint32_t n_pass; /* of the m tokens */
    double *token;   /* [m] score over all heads, of the last look */
    uint32_t *order; /* [m] best first, likewise; not with a backend that chooses */
    uint32_t *rank;  /* ring of l_obs rank vectors, [l_obs][m], adaptive only */
    const uint32_t **ring;
    double first_variance;
    struct variance_point *trace; /* of the tested layers */
    uint32_t n_trace;
};

/* n rows of which `n_select` pass in all; *c is zero before. */
int cut_init(struct cut *c, struct backend *b, const struct policy *p, uint32_t n,
             uint32_t n_select, struct larder_err *e);
void cut_done(struct cut *c);

/* Are this layer's scores asked for? Adaptive: the first comparison, at l_min, looks back over
 * l_obs layers. */
bool cut_is_candidate(const struct cut *c, uint32_t layer);

/* score [n_kv_heads][n] of a candidate layer; *ret_cut: the cut is here. */
int cut_look(struct cut *c, uint32_t layer, const double *score, uint32_t n, bool *ret_cut,
             struct larder_err *e);

/* The rows of n that pass, ascending: lo + n_pass + those after the m. *ret_n: how many. */
int cut_rows(const struct cut *c, uint32_t n, uint32_t *rows, uint32_t *ret_n,
             struct larder_err *e);

/* CUT_DECAY, after a layer: how many of n_context rows stay. */
uint32_t cut_decay_rows(const struct policy *p, uint32_t layer, uint32_t n_layers,
                        uint32_t n_context, uint32_t n_least);

#endif
