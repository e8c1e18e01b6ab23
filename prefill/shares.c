/* shares.c - a table of shares: measured by one threshold over all heads, read by interpolation;
 * and the name that it and what stands beside it give a policy. */
#include "shares.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "mem.h"

int shares_new(struct shares **ret, uint32_t n_heads, struct larder_err *e)
{
    struct shares *s = mem_zalloc(1, sizeof *s);

    if (s)
        s->share = mem_alloc((uint64_t)SHARES_MAX_BUDGETS * n_heads, sizeof *s->share);
    if (!s || !s->share) {
        mem_free(s);
        return larder_fail(e, LARDER_ENOMEM, "no memory for a table of shares");
    }
    s->n_heads = n_heads;
    *ret = s;
    return 0;
}

void shares_free(struct shares *s)
{
    if (!s)
        return;
    mem_free(s->share);
    mem_free(s);
}

static int set_id(struct shares *s, struct larder_err *e)
{
    return profile_id(s->n_heads, s->n_budgets, s->budget, s->share, &s->window, s->id, e);
}

int shares_set_window(struct shares *s, const struct profile_window *w, struct larder_err *e)
{
    s->window = *w;
    return set_id(s, e);
}

int shares_add(struct shares *s, double budget, const float *share, struct larder_err *e)
{
    if (s->n_budgets == SHARES_MAX_BUDGETS)
        return larder_fail(e, LARDER_ETOOBIG, "more than %u budgets in a table of shares",
                           SHARES_MAX_BUDGETS);
    if (!((float)budget > 0 && budget <= 1) ||
        (s->n_budgets && (float)budget <= s->budget[s->n_budgets - 1]))
        return larder_fail(e, LARDER_EINVAL,
                           "budgets of a table of shares ascend and lie between 0 and 1");
    for (uint32_t i = 0; i < s->n_heads; i++)
        if (!(share[i] >= 0 && share[i] <= 1))
            return larder_fail(e, LARDER_EINVAL, "share %u of budget %g is not between 0 and 1", i,
                               budget);
    memcpy(s->share + (uint64_t)s->n_budgets * s->n_heads, share, s->n_heads * sizeof *share);
    s->budget[s->n_budgets++] = (float)budget;
    return set_id(s, e);
}

int shares_name_in(const struct shares *s, struct policy *p, struct larder_err *e)
{
    if (*p->profile && !s && !policy_needs_profile(p)) /* it would take the defaults instead */
        return larder_fail(e, LARDER_EPOLICY,
                           "policy: profile=%s, but the model has none; leave it out or calibrate "
                           "the model",
                           p->profile);
    if (!s || !strcmp(p->profile, s->id))
        return 0;
    if (!*p->profile && !policy_depends_on(p, &s->window))
        return 0;
    if (*p->profile)
        return larder_fail(e, LARDER_EPOLICY,
                           "policy: profile=%s is not the model's, which is %s; leave it out or "
                           "calibrate the model again",
                           p->profile, s->id);
    memcpy(p->profile, s->id, sizeof p->profile);
    return 0;
}

/* Between the two budgets around `budget`; a budget of 1 keeps everything. */
static double one_share(const struct shares *s, double budget, uint32_t head)
{
    uint32_t i = 0;
    double lo, hi, a, b;

    while (i < s->n_budgets && s->budget[i] < budget)
        i++;
    if (!i)
        return s->share[head] * budget / s->budget[0];
    lo = s->budget[i - 1];
    a = s->share[(uint64_t)(i - 1) * s->n_heads + head];
    hi = i < s->n_budgets ? s->budget[i] : 1;
    b = i < s->n_budgets ? s->share[(uint64_t)i * s->n_heads + head] : 1;
    return hi > lo ? a + (b - a) * (budget - lo) / (hi - lo) : b;
}

void shares_at(const struct shares *s, double budget, double *out)
{
    for (uint32_t h = 0; h < s->n_heads; h++)
        out[h] = one_share(s, budget, h);
}

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return (x < y) - (x > y);
}

int shares_measure(const float *const *score, uint32_t n_heads, uint32_t n, uint32_t sink,
                   double budget, float *out, struct larder_err *e)
{
    uint32_t first = sink < n ? sink : n;
    uint64_t per_head = n - first, all = per_head * n_heads;
    double want = budget * (double)n * n_heads - (double)first * n_heads;
    uint64_t k = want > 0 ? (uint64_t)want : 0;
    float *x = mem_alloc(all, sizeof *x), threshold;

    if (!x)
        return larder_fail(e, LARDER_ENOMEM, "no memory to measure shares over %u tokens", n);
    for (uint32_t h = 0; h < n_heads; h++)
        memcpy(x + h * per_head, score[h] + first, per_head * sizeof *x);
    qsort(x, all, sizeof *x, descending);
    threshold = k < all ? x[k] : -INFINITY;
    for (uint32_t h = 0; h < n_heads; h++) {
        uint32_t kept = first;

        for (uint32_t j = first; j < n; j++)
            kept += score[h][j] > threshold;
        out[h] = (float)kept / (float)n;
    }
    mem_free(x);
    return 0;
}
