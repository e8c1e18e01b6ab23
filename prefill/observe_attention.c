/* observe_attention.c - scores that look at whole attention rows.
 *
 * The one idea: probabilities are made a block of rows at a time and handed on row by row,
 * so that nothing of size n x n ever exists. Each query head is one item of work and sums
 * in row order, which makes results independent of the number of threads. The products are
 * the plain f32 ones of backend `ref`, whatever backend prefills. */
#include "observe.h"

#include <math.h>
#include <string.h>

#include "mem.h"
#include "ref.h"
#include "select.h"

struct work {
    const struct layer_view *x;
    ref_mul_fn *mul;
    uint32_t row0, n; /* all rows, probe included */
    uint32_t sliding;
    struct ref_keys *keys; /* [n_kv_heads] */
    float *scratch;        /* per worker: a block of queries and its logits */
    uint64_t per_worker;
    attention_row_fn *fn;
    void *arg;
};

/* Written so that a NaN reaches the sum instead of vanishing in a maximum. Keys before `from` are
 * not seen. */
static void soften(float *x, uint32_t from, uint32_t n)
{
    float max = -INFINITY;
    double sum = 0;

    memset(x, 0, from * sizeof *x);
    for (uint32_t j = from; j < n; j++)
        max = x[j] > max ? x[j] : max;
    for (uint32_t j = from; j < n; j++)
        sum += x[j] = expf(x[j] - max);
    for (uint32_t j = from; j < n; j++)
        x[j] = (float)(x[j] / sum);
}

/* Rows row .. row+rows-1 of head h. */
static void block(const struct work *w, uint32_t h, uint32_t row, uint32_t rows, float *q)
{
    uint32_t d = w->x->b->p->geom.head_dim, seen = row + rows;
    uint64_t ld = ref_padded(w->n);
    float *logit = q + (uint64_t)REF_BLOCK * d, scale = (float)(1 / sqrt(d));
    const float *panel = w->keys[h / observe_group(w->x)].k;
    struct ref_mul mul = {q, d, rows, panel, REF_WIDE, (uint64_t)d * REF_WIDE, d, logit, ld, seen};

    ref_scale(w->x->q, w->x->b->elem, ((uint64_t)h * w->x->stride + row) * d, (uint64_t)rows * d,
              scale, q);
    w->mul(&mul);
    for (uint32_t i = 0; i < rows; i++) {
        soften(logit + i * ld, sliding_from(w->sliding, row + i), row + i + 1);
        w->fn(w->arg, h, row + i, logit + i * ld);
    }
}

static void head_item(void *arg, uint32_t h, uint32_t worker)
{
    const struct work *w = arg;
    float *scratch = w->scratch + worker * w->per_worker;

    for (uint32_t row = w->row0; row < w->n; row += REF_BLOCK)
        block(w, h, row, w->n - row < REF_BLOCK ? w->n - row : REF_BLOCK, scratch);
}

int observe_attention(const struct layer_view *x, uint32_t row0, attention_row_fn *fn, void *arg,
                      struct larder_err *e)
{
    const struct kv_geom *geom = &x->b->p->geom;
    struct work w = {.x = x,
                     .row0 = row0,
                     .n = x->n + x->n_probe,
                     .sliding = model_sliding(x->b->p, x->layer),
                     .fn = fn,
                     .arg = arg};
    struct ref_source keys = {x->k, NULL, x->b->elem, w.n, x->stride, NULL};
    const char *isa;
    int rc = backend_view(x->b, x->q, VIEW_READ, e);

    if (!rc)
        rc = backend_view(x->b, x->k, VIEW_READ, e);
    if (!rc)
        rc = ref_gather(geom, &keys, &w.keys, e);
    if (rc)
        return rc;
    w.mul = ref_mul_pick(&isa);
    w.per_worker = REF_BLOCK * (geom->head_dim + (uint64_t)ref_padded(w.n));
    w.scratch = ref_scratch(x->b, w.per_worker);
    if (w.scratch)
        ref_for(x->b, geom->n_heads, head_item, &w);
    else
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for attention over %u tokens", w.n);
    mem_free(w.scratch);
    ref_gather_free(w.keys, geom->n_kv_heads);
    return rc;
}

/* ---- all rows */

struct sums {
    uint32_t n;
    double *head;  /* [n_heads][n] */
    uint32_t row0; /* of the rows that count */
    double step;   /* how much the weight grows with each of them */
};

static void add_row(void *arg, uint32_t head, uint32_t row, const float *p)
{
    const struct sums *s = arg;
    double *to = s->head + (uint64_t)head * s->n, weight = 1 + s->step * (row - s->row0);
    uint32_t n = row < s->n ? row + 1 : s->n;

    for (uint32_t j = 0; j < n; j++)
        to[j] += weight * p[j];
}

static int sum_heads(const struct layer_view *x, struct sums *s, struct larder_err *e)
{
    s->head = mem_zalloc((uint64_t)x->b->p->geom.n_heads * s->n, sizeof *s->head);
    if (!s->head)
        return larder_fail(e, LARDER_ENOMEM, "no memory for attention over %u tokens", x->n);
    return observe_attention(x, s->row0, add_row, s, e);
}

int observe_all(const struct layer_view *x, double *score, struct larder_err *e)
{
    uint32_t group = observe_group(x), n = x->n, sliding = model_sliding(x->b->p, x->layer);
    uint32_t sees = sliding ? sliding : n; /* a row is seen by so many at most */
    struct sums s = {.n = n};
    int rc = sum_heads(x, &s, e);

    for (uint32_t g = 0; g < x->b->p->geom.n_kv_heads && !rc; g++) {
        for (uint32_t j = 0; j < n; j++) {
            double sum = 0;

            for (uint32_t h = g * group; h < (g + 1) * group; h++)
                sum += s.head[(uint64_t)h * n + j];
            score[(uint64_t)g * n + j] = sum / group / (n - j < sees ? n - j : sees);
        }
    }
    mem_free(s.head);
    return rc;
}

int observe_recent(const struct layer_view *x, uint32_t n_recent, double weight, double *score,
                   struct larder_err *e)
{
    uint32_t n = x->n - n_recent, n_heads = x->b->p->geom.n_heads;
    struct sums s = {.n = n, .row0 = n};
    int rc;

    if (n_recent > 1)
        s.step = (weight - 1) / (n_recent - 1);
    rc = sum_heads(x, &s, e);
    for (uint32_t j = 0; j < n && !rc; j++) {
        double sum = 0;

        for (uint32_t h = 0; h < n_heads; h++)
            sum += s.head[(uint64_t)h * n + j];
        score[j] = sum / n_heads / n_recent;
        if (!isfinite(score[j]))
            rc = larder_fail(e, LARDER_ENUMERIC,
                             "attention to token %u is not finite; nothing was kept", j);
    }
    mem_free(s.head);
    return rc;
}

/* ---- DefensiveKV: the worst case of the window instead of its mean */

struct worst {
    const struct policy *p;
    uint32_t m;      /* rows before the window */
    double *largest; /* [n_heads][m] over the window, of pooled rows */
    double *mean;    /* [n_heads][m] sums over the window, as they are */
    double *buf;     /* [n_heads][2 m] */
};

/* A pooled row keeps the mass of the row that it was made from. */
static void add_worst(void *arg, uint32_t head, uint32_t row, const float *p)
{
    const struct worst *w = arg;
    uint64_t at = (uint64_t)head * w->m;
    double *plain = w->buf + 2 * at, *pooled = plain + w->m, mass = 0, sum = 0;

    (void)row;
    for (uint32_t j = 0; j < w->m; j++) {
        plain[j] = p[j];
        mass += p[j];
        w->mean[at + j] += p[j];
    }
    select_pool(plain, w->m, w->p->pool_kernel, POOL_AVG, pooled);
    for (uint32_t j = 0; j < w->m; j++)
        sum += pooled[j];
    for (uint32_t j = 0; j < w->m && sum > 0; j++)
        w->largest[at + j] = fmax(w->largest[at + j], pooled[j] * mass / sum);
}

/* Largest over the group, and not below the head's mean; mean attention into mean[m]. */
static double defend_head(const struct worst *w, uint32_t g, uint32_t group, double *d,
                          double *mean)
{
    double sum = 0, mass = 0;

    for (uint32_t j = 0; j < w->m; j++) {
        d[j] = mean[j] = 0;
        for (uint32_t h = g * group; h < (g + 1) * group; h++) {
            uint64_t at = (uint64_t)h * w->m + j;

            d[j] = fmax(d[j], w->largest[at]);
            mean[j] += w->mean[at] / group / w->p->n_obs;
        }
        sum += d[j];
        mass += mean[j];
    }
    for (uint32_t j = 0; j < w->m; j++)
        d[j] = d[j] < sum / w->m ? sum / w->m : d[j];
    return mass;
}

/* Rows that cover the first part of the head's mean attention come first, best first. A NaN,
 * which fmax() hides, is found here: the mean has it too. */
static int promote(double *d, const double *mean, uint32_t m, double part, double top,
                   struct larder_err *e)
{
    uint32_t *order = mem_alloc(m, sizeof *order);
    double covered = 0;
    int rc;

    if (!order)
        return larder_fail(e, LARDER_ENOMEM, "no memory to rank %u tokens", m);
    rc = select_order(mean, m, order, e);
    for (uint32_t i = 0; i < m && covered < part && !rc; i++) {
        covered += mean[order[i]];
        d[order[i]] = top + mean[order[i]];
    }
    mem_free(order);
    return rc;
}

/* Each row's worth as a share of its worth over all heads. */
static void weigh(double *score, uint32_t n, const double *worth, uint32_t n_kv, uint32_t m)
{
    for (uint32_t j = 0; j < m; j++) {
        double sum = 0;

        for (uint32_t g = 0; g < n_kv; g++)
            sum += worth[(uint64_t)g * n + j];
        for (uint32_t g = 0; g < n_kv && sum > 0; g++)
            score[(uint64_t)g * n + j] *= worth[(uint64_t)g * n + j] / sum;
    }
}

static int defend(const struct layer_view *x, const struct worst *w, const double *worth,
                  double *score, struct larder_err *e)
{
    uint32_t n_kv = x->b->p->geom.n_kv_heads, m = w->m;
    double *mean = mem_alloc((uint64_t)n_kv * m, sizeof *mean);
    double mass = 0, top = 0;
    int rc = 0;

    if (!mean)
        return larder_fail(e, LARDER_ENOMEM, "no memory to rank %u tokens", m);
    for (uint32_t g = 0; g < n_kv; g++)
        mass +=
            defend_head(w, g, observe_group(x), score + (uint64_t)g * x->n, mean + (uint64_t)g * m);
    weigh(score, x->n, worth, n_kv, m);
    for (uint32_t g = 0; g < n_kv; g++)
        for (uint32_t j = 0; j < m; j++)
            top = fmax(top, score[(uint64_t)g * x->n + j]);
    for (uint32_t g = 0; g < n_kv && !rc; g++) /* 1 - mass / n_kv: what the window holds itself */
        rc = promote(score + (uint64_t)g * x->n, mean + (uint64_t)g * m, m, 0.9 - (1 - mass / n_kv),
                     top, e);
    mem_free(mean);
    return rc;
}

int observe_defensive(const struct layer_view *x, const struct policy *p, double *score,
                      struct larder_err *e)
{
    const struct kv_geom *geom = &x->b->p->geom;
    struct worst w = {.p = p, .m = x->n - p->n_obs};
    uint64_t n = (uint64_t)geom->n_heads * w.m;
    double *worth = mem_alloc((uint64_t)geom->n_kv_heads * x->n, sizeof *worth);
    int rc = 0;

    w.largest = mem_zalloc(n, sizeof *w.largest);
    w.mean = mem_zalloc(n, sizeof *w.mean);
    w.buf = mem_alloc(2 * n, sizeof *w.buf);
    if (!worth || !w.largest || !w.mean || !w.buf)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for attention over %u tokens", x->n);
    if (!rc)
        rc = observe_worth(x, worth, e);
    if (!rc)
        rc = observe_attention(x, w.m, add_worst, &w, e);
    if (!rc)
        rc = defend(x, &w, worth, score, e);
    mem_free(worth);
    mem_free(w.largest);
    mem_free(w.mean);
    mem_free(w.buf);
    return rc;
}
