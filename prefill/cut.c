/* cut.c - ranks of tokens over layers, and the decision to cut.
 *
 * The one idea: a token's rank is its place by score summed over the KV heads. A fixed cut
 * takes the ranks of one layer; an adaptive one waits until the ranks of the best tokens
 * vary little over the last layers, compared with the first ones that were tested. */
#include "cut.h"

#include <math.h>

#include "mem.h"
#include "select.h"
#include "select_ops.h"

/* Rows that never leave because of their place: the policy's first and last ones, and for a
 * prefill that goes on with what passes, the row whose logits are wanted. */
static uint32_t n_last(const struct policy *p)
{
    return p->n_obs || policy_is_two_pass(p) ? p->n_obs : 1;
}

static bool alloc(struct cut *c, uint32_t n_layers)
{
    uint32_t n = policy_is_adaptive(c->policy) ? c->policy->l_obs : 0;

    c->token = backend_buffer_new(c->b, c->m, sizeof *c->token);
    c->order = mem_alloc(c->b->ops->select ? 0 : c->m, sizeof *c->order);
    c->rank = backend_buffer_new(c->b, (uint64_t)n * c->m, sizeof *c->rank);
    c->ring = mem_alloc(n, sizeof *c->ring);
    c->trace = mem_alloc(n_layers, sizeof *c->trace);
    for (uint32_t i = 0; c->rank && c->ring && i < n; i++)
        c->ring[i] = c->rank + (uint64_t)i * c->m;
    return c->token && c->order && c->rank && c->ring && c->trace;
}

int cut_init(struct cut *c, struct backend *b, const struct policy *p, uint32_t n,
             uint32_t n_select, struct larder_err *e)
{
    uint32_t stay = p->sink + n_last(p);

    *c = (struct cut){.b = b, .policy = p, .n_kv_heads = b->p->geom.n_kv_heads, .lo = p->sink};
    if (p->cut == CUT_OFF || p->cut == CUT_DECAY || n <= stay)
        return 0;
    c->m = n - stay;
    c->n_pass = (n_select < n ? n_select : n) - stay;
    if (!alloc(c, b->p->geom.n_layers))
        return larder_fail(e, LARDER_ENOMEM, "no memory to rank %u tokens", c->m);
    return 0;
}

void cut_done(struct cut *c)
{
    if (c->b) {
        backend_buffer_free(c->b, c->token);
        backend_buffer_free(c->b, c->rank);
    }
    mem_free(c->order);
    mem_free(c->ring);
    mem_free(c->trace);
    *c = (struct cut){0};
}

bool cut_is_candidate(const struct cut *c, uint32_t layer)
{
    const struct policy *p = c->policy;

    if (!c->m)
        return false;
    if (policy_is_adaptive(p))
        return layer + p->l_obs > p->l_min;
    return layer == p->layer;
}

/* rank: NULL where the order is enough. */
static int rank_tokens(struct cut *c, const double *score, uint32_t n, uint32_t *rank,
                       struct larder_err *e)
{
    int rc = backend_view(c->b, score, VIEW_READ, e);

    if (rc)
        return rc;
    for (uint32_t j = 0; j < c->m; j++) {
        double s = 0;

        for (uint32_t g = 0; g < c->n_kv_heads; g++)
            s += score[(uint64_t)g * n + c->lo + j];
        c->token[j] = s;
    }
    rc = select_order(c->token, c->m, c->order, e);
    if (!rc && rank)
        select_rank(c->order, c->m, rank);
    return rc;
}

/* The same where the scores are. */
static int rank_there(struct cut *c, const double *score, uint32_t n, uint32_t *rank,
                      struct larder_err *e)
{
    const struct token_rank x = {.score = score,
                                 .n_heads = c->n_kv_heads,
                                 .ld = n,
                                 .lo = c->lo,
                                 .m = c->m,
                                 .token = c->token,
                                 .rank = rank};

    return c->b->ops->select->rank(c->b, &x, e);
}

static int variance(const struct cut *c, double *ret, struct larder_err *e)
{
    const struct select_ops *s = c->b->ops->select;
    const struct rank_variance x = {c->rank, c->policy->l_obs, c->m, c->n_pass};

    if (s)
        return s->variance(c->b, &x, ret, e);
    *ret = select_variance(c->ring, x.n_layers, x.m, x.k, NULL);
    return 0;
}

/* One step of the adaptive choice. */
static int test_layer(struct cut *c, uint32_t layer, bool *ret_cut, struct larder_err *e)
{
    const struct policy *p = c->policy;
    struct variance_point v = {.layer = layer, .ratio = 1};
    int rc;

    if (layer < p->l_min)
        return 0;
    rc = variance(c, &v.value, e);
    if (rc)
        return rc;
    if (layer == p->l_min)
        c->first_variance = v.value;
    else
        v.ratio = select_ratio(v.value, c->first_variance);
    c->trace[c->n_trace++] = v;
    *ret_cut = v.ratio < p->tau;
    return 0;
}

int cut_look(struct cut *c, uint32_t layer, const double *score, uint32_t n, bool *ret_cut,
             struct larder_err *e)
{
    bool adaptive = policy_is_adaptive(c->policy);
    uint32_t *rank = adaptive ? c->rank + (uint64_t)(layer % c->policy->l_obs) * c->m : NULL;
    int rc =
        c->b->ops->select ? rank_there(c, score, n, rank, e) : rank_tokens(c, score, n, rank, e);

    *ret_cut = !adaptive;
    return rc || !adaptive ? rc : test_layer(c, layer, ret_cut, e);
}

/* Tokens that pass, ascending. */
static int best_tokens(const struct cut *c, uint32_t *rows, struct larder_err *e)
{
    const struct select_ops *s = c->b->ops->select;
    const struct top_rows t = {.score = c->token,
                               .n_heads = 1,
                               .ld = c->m,
                               .n = c->m,
                               .hi = c->m,
                               .count = &c->n_pass,
                               .index = rows};

    if (s)
        return s->top(c->b, &t, e);
    select_top(c->order, c->n_pass, rows);
    return 0;
}

int cut_rows(const struct cut *c, uint32_t n, uint32_t *rows, uint32_t *ret_n, struct larder_err *e)
{
    uint32_t at = c->lo + c->n_pass;
    int rc = best_tokens(c, rows + c->lo, e);

    if (rc)
        return rc;
    for (uint32_t i = 0; i < c->lo; i++)
        rows[i] = i;
    for (uint32_t i = c->lo; i < at; i++)
        rows[i] += c->lo;
    for (uint32_t i = c->lo + c->m; i < n; i++)
        rows[at++] = i;
    *ret_n = at;
    return 0;
}

uint32_t cut_decay_rows(const struct policy *p, uint32_t layer, uint32_t n_layers,
                        uint32_t n_context, uint32_t n_least)
{
    double share = (1 - p->decay) * (cos(M_PI * layer / n_layers) + 1) / 2 + p->decay;
    uint32_t rows = (uint32_t)(n_context * share);

    return n_context > n_least && share < 1 && rows > n_least ? rows : n_context;
}
