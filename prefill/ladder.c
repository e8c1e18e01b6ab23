/* ladder.c - budgets side by side, and the choice among them.
 *
 * The one idea: a fit's cost grows with the square of the budget. Up to a quarter of the rows the
 * budgets together cost little more than the largest alone, so they share one replay; larger
 * ones share another, and all rows have their own, made only for a document that needs them. */
#include "ladder.h"

#include "cache.h"
#include "mem.h"

#define MAX_RUNGS 4u

/* Percent of the document's rows, by replay. */
static const struct flight {
    uint32_t n;
    double budget[MAX_RUNGS];
} flights[] = {{4, {3.125, 6.25, 12.5, 25}}, {2, {37.5, 50}}, {1, {100}}};
#define N_FLIGHTS (sizeof flights / sizeof flights[0])

struct ladder {
    const struct engine_sink *outer; /* the caller's, or NULL */
    uint32_t n;                      /* budgets that the document can have */
    struct policy policy[MAX_RUNGS];
    struct cache cache[MAX_RUNGS];
    struct engine_sink sink[MAX_RUNGS];
    struct engine_result result[MAX_RUNGS];
};

static void ladder_done(struct ladder *l)
{
    for (uint32_t i = 0; i < l->n; i++) {
        cache_done(&l->cache[i]);
        engine_result_done(&l->result[i]);
    }
}

/* A short document's smallest budgets do not even hold the rows that always stay. */
static bool holds(const struct policy *p, uint32_t n)
{
    uint32_t rows;

    return !policy_rows(p, &p->rows, n, &rows, NULL);
}

/* The first rung speaks for all when it comes to progress. */
static int on_layer(void *arg, uint32_t layer, const struct kept_rows *heads, struct larder_err *e)
{
    struct ladder *l = arg;

    return cache_add(&l->cache[0], layer, heads, e);
}

static int on_progress(void *arg, const char *pass, uint32_t layer, uint32_t n_layers)
{
    const struct engine_sink *outer = ((struct ladder *)arg)->outer;

    return outer && outer->progress ? outer->progress(outer->arg, pass, layer, n_layers) : 0;
}

static int ladder_init(struct ladder *l, struct backend *b, uint32_t n, const struct policy *policy,
                       const struct flight *f, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < f->n && !rc; i++) {
        struct policy p = *policy;

        p.rows = f->budget[i] < 100 ? (struct row_budget){ROWS_SHARE, f->budget[i]}
                                    : (struct row_budget){ROWS_ALL, 0};
        p.select = p.rows;
        if (!holds(&p, n))
            continue;
        rc = cache_init(&l->cache[l->n], b, true, e);
        l->sink[l->n] = l->n ? (struct engine_sink){&l->cache[l->n], cache_add, NULL}
                             : (struct engine_sink){l, on_layer, on_progress};
        l->policy[l->n++] = p;
    }
    return rc;
}

/* The first rung within max_kl, or the last where nothing is certified; l->n: none. */
static uint32_t choose(const struct ladder *l, double max_kl)
{
    uint32_t i = 0;

    if (!l->result[l->n - 1].certificate.n_probes)
        return l->policy[l->n - 1].rows.kind == ROWS_ALL ? l->n - 1 : l->n;
    while (i < l->n && l->result[i].certificate.kl > max_kl)
        i++;
    return i;
}

/* Compute what the flight has, and hand on the rung that will do; *ret_done: there was one. */
static int climb(struct ladder *l, struct backend *b, const struct engine_doc *doc, double max_kl,
                 struct engine_result *ret, bool *ret_done, struct larder_err *e)
{
    uint32_t i;
    int rc = engine_prefill_each(b, doc, l->policy, l->sink, l->n, l->result, e);

    if (rc)
        return rc;
    i = choose(l, max_kl);
    ret->certificate = l->result[l->n - 1].certificate; /* the best that was seen so far */
    if (i == l->n)
        return 0;
    rc = cache_deliver(&l->cache[i], l->outer, e);
    if (rc)
        return rc;
    *ret = l->result[i];
    l->result[i] = (struct engine_result){.sel_layer = -1};
    *ret_done = true;
    return 0;
}

static int try_flight(struct backend *b, const struct engine_doc *doc, const struct policy *policy,
                      const struct engine_sink *sink, const struct flight *f,
                      struct engine_result *ret, bool *ret_done, struct larder_err *e)
{
    struct ladder *l = mem_zalloc(1, sizeof *l);
    int rc;

    if (!l)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a ladder of budgets");
    l->outer = sink;
    rc = ladder_init(l, b, doc->n, policy, f, e);
    if (!rc && l->n)
        rc = climb(l, b, doc, policy->max_kl, ret, ret_done, e);
    ladder_done(l);
    mem_free(l);
    return rc;
}

int ladder_prefill(struct backend *b, const struct engine_doc *doc, const struct policy *policy,
                   const struct engine_sink *sink, struct engine_result *ret, struct larder_err *e)
{
    bool done = false;
    int rc = 0;

    for (size_t i = 0; i < N_FLIGHTS && !rc && !done; i++)
        rc = try_flight(b, doc, policy, sink, &flights[i], ret, &done, e);
    if (rc || done)
        return rc;
    return larder_fail(e, LARDER_EBUDGET,
                       "even all rows diverge by %.4f from the full cache, and max_kl is %g; raise "
                       "max_kl or store rows with more bits (precision=int8 or bf16)",
                       ret->certificate.kl, policy->max_kl);
}
