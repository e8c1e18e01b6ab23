/* observe.c - scores of one layer: the choice of the observation, and the short ones.
 *
 * The one idea: a score is a formula over what one layer has at hand, so each is one
 * function. Sums are f64. What looks at whole attention rows is in observe_attention.c,
 * what reads the output matrix in observe_outputs.c. */
#include "observe.h"

#include <math.h>
#include <string.h>

#include "mem.h"
#include "select.h"
#include "select_ops.h"

#define UNSEEN (-1e30) /* below any score, also when it is multiplied by a worth */

static int no_memory(struct larder_err *e, const struct layer_view *x)
{
    return larder_fail(e, LARDER_ENOMEM, "no memory to score %u tokens", x->n);
}

static uint64_t row_at(const struct layer_view *x, uint32_t head, uint32_t row)
{
    return ((uint64_t)head * x->stride + row) * x->b->p->geom.head_dim;
}

/* ---- attention of the last w rows, probe included */

static struct window_mass mass_of(const struct layer_view *x, uint32_t n, uint32_t w, float *mass)
{
    return (struct window_mass){x->q, x->k, n, x->stride, w, model_sliding(x->b->p, x->layer),
                                mass};
}

/* Rows that the layer's window hides from all that comes after the document go last. */
static uint32_t n_unseen(const struct layer_view *x)
{
    uint32_t n = sliding_from(model_sliding(x->b->p, x->layer), x->n_ctx);

    return n < x->n ? n : x->n;
}

/* All of it where q and k are. */
static int window_there(const struct layer_view *x, const struct policy *p, uint32_t w,
                        double *score, struct larder_err *e)
{
    const struct window_score s = {.of = mass_of(x, x->n + x->n_probe, w, NULL),
                                   .pool_kernel = p->pool_kernel,
                                   .pool = p->pool,
                                   .share = 1.0 / w / observe_group(x),
                                   .n_unseen = n_unseen(x),
                                   .unseen = UNSEEN,
                                   .score = score,
                                   .ld = x->n};

    return x->b->ops->select->window(x->b, &s, e);
}

static int window(const struct layer_view *x, const struct policy *p, uint32_t w, double *score,
                  struct larder_err *e)
{
    const struct kv_geom *geom = &x->b->p->geom;
    uint32_t n = x->n + x->n_probe, m = n - w;
    float *mass = mem_alloc((uint64_t)geom->n_heads * m, sizeof *mass);
    double *pooled = mem_alloc((uint64_t)geom->n_kv_heads * m, sizeof *pooled);
    struct window_mass of = mass_of(x, n, w, mass);
    double share = 1.0 / w / observe_group(x);
    int rc = mass && pooled ? 0 : no_memory(e, x);

    if (!rc)
        rc = x->b->ops->window(x->b, &of, e);
    if (!rc)
        rc = select_head_scores(mass, geom->n_heads, geom->n_kv_heads, m, p->pool_kernel, p->pool,
                                pooled, e);
    for (uint32_t g = 0; g < geom->n_kv_heads && !rc; g++)
        for (uint32_t j = 0; j < m; j++)
            score[(uint64_t)g * x->n + j] = pooled[(uint64_t)g * m + j] * share;
    mem_free(mass);
    mem_free(pooled);
    return rc;
}

/* TOVA: one ranking for all heads. */
static int last(const struct layer_view *x, double *score, struct larder_err *e)
{
    const struct kv_geom *geom = &x->b->p->geom;
    uint32_t m = x->n - 1;
    float *mass = mem_alloc((uint64_t)geom->n_heads * m, sizeof *mass);
    struct window_mass of = mass_of(x, x->n, 1, mass);
    int rc = mass ? 0 : no_memory(e, x);

    if (!rc)
        rc = x->b->ops->window(x->b, &of, e);
    for (uint32_t j = 0; j < m && !rc; j++) {
        double sum = 0;

        for (uint32_t h = 0; h < geom->n_heads; h++)
            sum += mass[(uint64_t)h * m + j];
        for (uint32_t g = 0; g < geom->n_kv_heads; g++)
            score[(uint64_t)g * x->n + j] = sum / geom->n_heads;
    }
    mem_free(mass);
    return rc;
}

/* ---- keys alone */

static double key_norm(const struct layer_view *x, uint32_t g, uint32_t j)
{
    uint64_t at = row_at(x, g, j);
    double sum = 0;

    for (uint32_t i = 0; i < x->b->p->geom.head_dim; i++) {
        double k = observe_element(x, x->k, at + i);

        sum += k * k;
    }
    return sqrt(sum);
}

static int norms(const struct layer_view *x, double *score)
{
    for (uint32_t g = 0; g < x->b->p->geom.n_kv_heads; g++)
        for (uint32_t j = 0; j < x->n; j++)
            score[(uint64_t)g * x->n + j] = -key_norm(x, g, j);
    return 0;
}

/* The mean direction of a head's keys. */
static void mean_direction(const struct layer_view *x, uint32_t g, double *mean)
{
    uint32_t d = x->b->p->geom.head_dim;

    memset(mean, 0, d * sizeof *mean);
    for (uint32_t j = 0; j < x->n; j++) {
        double share = 1 / fmax(key_norm(x, g, j), 1e-12) / x->n;

        for (uint32_t i = 0; i < d; i++)
            mean[i] += observe_element(x, x->k, row_at(x, g, j) + i) * share;
    }
}

/* KeyDiff: minus the cosine to the mean direction. */
static int directions(const struct layer_view *x, double *score, struct larder_err *e)
{
    uint32_t d = x->b->p->geom.head_dim;
    double *mean = mem_alloc(d, sizeof *mean);

    if (!mean)
        return no_memory(e, x);
    for (uint32_t g = 0; g < x->b->p->geom.n_kv_heads; g++) {
        double square = 0;

        mean_direction(x, g, mean);
        for (uint32_t i = 0; i < d; i++)
            square += mean[i] * mean[i];
        for (uint32_t j = 0; j < x->n; j++) {
            double dot = 0;

            for (uint32_t i = 0; i < d; i++)
                dot += observe_element(x, x->k, row_at(x, g, j) + i) * mean[i];
            score[(uint64_t)g * x->n + j] =
                -dot / (fmax(key_norm(x, g, j), 1e-8) * fmax(sqrt(square), 1e-8));
        }
    }
    mem_free(mean);
    return 0;
}

static int positions(const struct layer_view *x, double *score)
{
    for (uint32_t g = 0; g < x->b->p->geom.n_kv_heads; g++)
        for (uint32_t j = 0; j < x->n; j++)
            score[(uint64_t)g * x->n + j] = j;
    return 0;
}

/* GemFilter: inner products of the last row's queries with every key. */
static int products(const struct layer_view *x, const struct policy *p, double *score,
                    struct larder_err *e)
{
    uint32_t d = x->b->p->geom.head_dim, group = observe_group(x), n = x->n;
    double *z = mem_alloc(n, sizeof *z);

    if (!z)
        return no_memory(e, x);
    for (uint32_t g = 0; g < x->b->p->geom.n_kv_heads; g++) {
        memset(z, 0, n * sizeof *z);
        for (uint32_t h = g * group; h < (g + 1) * group; h++)
            for (uint32_t j = 0; j < n; j++)
                for (uint32_t i = 0; i < d; i++)
                    z[j] += observe_element(x, x->q, row_at(x, h, n - 1) + i) *
                            observe_element(x, x->k, row_at(x, g, j) + i);
        select_pool(z, n, p->pool_kernel, POOL_AVG, score + (uint64_t)g * n);
    }
    mem_free(z);
    return 0;
}

/* ---- the choice */

static int score_all(const struct layer_view *x, const struct policy *p, double *score,
                     struct larder_err *e)
{
    switch (p->obs) {
    case OBS_TAIL:
        return window(x, p, p->n_obs, score, e);
    case OBS_PROBE:
        return window(x, p, x->n_probe, score, e);
    case OBS_KEYS:
        return directions(x, score, e);
    case OBS_EXPECTED:
        return observe_expected(x, p, score, e);
    case OBS_LAST:
        return last(x, score, e);
    case OBS_NORM:
        return norms(x, score);
    case OBS_ALL:
        return observe_all(x, score, e);
    case OBS_RECENT:
        return positions(x, score);
    case OBS_DEFENSIVE:
        return observe_defensive(x, p, score, e);
    case OBS_DOT:
        return products(x, p, score, e);
    case OBS_NONE:
    case OBS_REPLAY:
    case OBS_REPLAY_PLUS:
    case N_OBS:
        break;
    }
    return larder_fail(e, LARDER_EINTERNAL, "observation %d has no score", (int)p->obs);
}

static void put_unseen_last(const struct layer_view *x, double *score)
{
    uint32_t n = n_unseen(x);

    for (uint32_t g = 0; g < x->b->p->geom.n_kv_heads; g++)
        for (uint32_t j = 0; j < n; j++)
            score[(uint64_t)g * x->n + j] = UNSEEN;
}

/* The window's mass is the backend's work; all else is computed here. */
static int look(const struct layer_view *x, const struct policy *p, struct larder_err *e)
{
    int rc;

    if (p->obs == OBS_TAIL || p->obs == OBS_PROBE || p->obs == OBS_LAST)
        return 0;
    rc = backend_view(x->b, x->q, VIEW_READ, e);
    if (!rc)
        rc = backend_view(x->b, x->k, VIEW_READ, e);
    return rc ? rc : backend_view(x->b, x->v, VIEW_READ, e);
}

int observe_layer(const struct layer_view *x, const struct policy *p, double *score,
                  struct larder_err *e)
{
    int rc;

    /* whoever chooses among those says which is not finite */
    if (x->b->ops->select && (p->obs == OBS_TAIL || p->obs == OBS_PROBE))
        return window_there(x, p, p->obs == OBS_TAIL ? p->n_obs : x->n_probe, score, e);
    rc = backend_view(x->b, score, VIEW_WRITE, e);
    if (!rc)
        rc = look(x, p, e);
    if (!rc)
        rc = score_all(x, p, score, e);
    if (!rc)
        put_unseen_last(x, score);
    for (uint32_t g = 0; g < x->b->p->geom.n_kv_heads && !rc; g++)
        for (uint32_t j = p->sink; j < x->n - p->n_obs && !rc; j++)
            if (!isfinite(score[(uint64_t)g * x->n + j]))
                rc = larder_fail(e, LARDER_ENUMERIC,
                                 "score of token %u in layer %u is not finite; nothing was kept", j,
                                 x->layer);
    return rc;
}
