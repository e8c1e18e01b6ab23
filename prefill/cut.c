/* cut.c - ranks of tokens over layers, and the decision to cut.
 *
 * The one idea: a token's rank is its place by score summed over the KV heads. A fixed cut
 * takes the ranks of one layer; an adaptive one waits until the ranks of the best tokens
 * vary little over the last layers, compared with the first ones that were tested. */
#include "cut.h"

#include <math.h>

#include "mem.h"
#include "select.h"

/* Rows that never leave because of their place: the policy's first and last ones, and for a
 * prefill that goes on with what passes, the row whose logits are wanted. */
static uint32_t n_last(const struct policy *p)
{
    return p->n_obs || policy_is_two_pass(p) ? p->n_obs : 1;
}

static int alloc_ranks(struct cut *c, struct larder_err *e)
{
    uint32_t n = policy_is_adaptive(c->policy) && c->m ? c->policy->l_obs : 0;

    c->rank = mem_zalloc(n, sizeof *c->rank);
    for (uint32_t i = 0; c->rank && i < n; i++) {
        c->rank[i] = mem_alloc(c->m, sizeof **c->rank);
        if (!c->rank[i])
            return larder_fail(e, LARDER_ENOMEM, "no memory to rank %u tokens", c->m);
    }
    return c->rank ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory to rank %u tokens", c->m);
}

int cut_init(struct cut *c, const struct policy *p, uint32_t n_kv_heads, uint32_t n_layers,
             uint32_t n, uint32_t n_select, struct larder_err *e)
{
    uint32_t stay = p->sink + n_last(p);

    *c = (struct cut){.policy = p, .n_kv_heads = n_kv_heads, .lo = p->sink};
    if (p->cut == CUT_OFF || p->cut == CUT_DECAY || n <= stay)
        return 0;
    c->m = n - stay;
    c->n_pass = (n_select < n ? n_select : n) - stay;
    c->token = mem_alloc(c->m, sizeof *c->token);
    c->order = mem_alloc(c->m, sizeof *c->order);
    c->trace = mem_alloc(n_layers, sizeof *c->trace);
    if (!c->token || !c->order || !c->trace)
        return larder_fail(e, LARDER_ENOMEM, "no memory to rank %u tokens", c->m);
    return alloc_ranks(c, e);
}

void cut_done(struct cut *c)
{
    mem_free(c->token);
    mem_free(c->order);
    mem_free(c->trace);
    for (uint32_t i = 0; c->rank && c->m && policy_is_adaptive(c->policy) && i < c->policy->l_obs;
         i++)
        mem_free(c->rank[i]);
    mem_free(c->rank);
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

static int order_tokens(struct cut *c, const double *score, uint32_t n, struct larder_err *e)
{
    for (uint32_t j = 0; j < c->m; j++) {
        double s = 0;

        for (uint32_t g = 0; g < c->n_kv_heads; g++)
            s += score[(uint64_t)g * n + c->lo + j];
        c->token[j] = s;
    }
    return select_order(c->token, c->m, c->order, e);
}

/* One step of the adaptive choice. */
static bool test_layer(struct cut *c, uint32_t layer)
{
    const struct policy *p = c->policy;
    struct variance_point v = {.layer = layer, .ratio = 1};

    select_rank(c->order, c->m, c->rank[layer % p->l_obs]);
    if (layer < p->l_min)
        return false;
    v.value = select_variance((const uint32_t *const *)c->rank, p->l_obs, c->m, c->n_pass, NULL);
    if (layer == p->l_min)
        c->first_variance = v.value;
    else
        v.ratio = select_ratio(v.value, c->first_variance);
    c->trace[c->n_trace++] = v;
    return v.ratio < p->tau;
}

int cut_look(struct cut *c, uint32_t layer, const double *score, uint32_t n, bool *ret_cut,
             struct larder_err *e)
{
    int rc = order_tokens(c, score, n, e);

    if (!rc)
        *ret_cut = policy_is_adaptive(c->policy) ? test_layer(c, layer) : true;
    return rc;
}

uint32_t cut_rows(const struct cut *c, uint32_t n, uint32_t *rows)
{
    uint32_t at = c->lo + c->n_pass;

    for (uint32_t i = 0; i < c->lo; i++)
        rows[i] = i;
    select_top(c->order, c->n_pass, rows + c->lo);
    for (uint32_t i = c->lo; i < at; i++)
        rows[i] += c->lo;
    for (uint32_t i = c->lo + c->m; i < n; i++)
        rows[at++] = i;
    return at;
}

uint32_t cut_decay_rows(const struct policy *p, uint32_t layer, uint32_t n_layers,
                        uint32_t n_context, uint32_t n_least)
{
    double share = (1 - p->decay) * (cos(M_PI * layer / n_layers) + 1) / 2 + p->decay;
    uint32_t rows = (uint32_t)(n_context * share);

    return n_context > n_least && share < 1 && rows > n_least ? rows : n_context;
}
