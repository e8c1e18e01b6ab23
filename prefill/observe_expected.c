/* observe_expected.c - Expected Attention: what queries to come would look at.
 *
 * The one idea: if queries before rotation are normally distributed, and the next ones sit
 * at the positions after the document, the expectation of exp(q . k) has a closed form in
 * the mean and covariance of the queries seen and the mean rotation of those positions.
 * Rotated queries are turned back, so nothing is projected twice. */
#include "observe.h"

#include <math.h>
#include <string.h>

#include "fast.h"
#include "mem.h"
#include "ref.h"

#define FUTURE 512u /* positions that the mean rotation is taken over */

/* y += a x: element by element, so that every instruction set gives the same bits. */
FAST static void axpy(double a, const double *x, uint32_t n, double *y)
{
    for (uint32_t i = 0; i < n; i++)
        y[i] += a * x[i];
}

struct work {
    const struct layer_view *x;
    uint32_t sink;   /* rows that neither ask nor count */
    double *cs;      /* [n][head_dim]: cos and sin of each row's position */
    double *turn;    /* [head_dim]: mean cos and sin of the positions to come */
    double *scratch; /* per worker */
    uint64_t per_worker;
    double *prob; /* [n_heads][n] */
};

/* cos and sin of a position, dims / 2 each. The attention factor stays in the queries: turned by
 * angles alone they keep it, as the keys do. */
static void angles(const struct layer_view *x, double pos, double weight, double *to)
{
    const struct rope *rope = model_rope(x->b->p, x->n_ctx);
    uint32_t half = x->b->p->rope_dims / 2;

    for (uint32_t i = 0; i < half; i++) {
        double angle = pos * rope->freq[i];

        to[i] += cos(angle) * weight;
        to[half + i] += sin(angle) * weight;
    }
}

/* Rotate-half by c and s, which need not be of one angle; sign -1 turns back. */
static void rotate(const double *x, uint32_t n, uint32_t dims, const double *cs, double sign,
                   double *out)
{
    uint32_t half = dims / 2;

    for (uint32_t i = 0; i < half; i++) {
        double a = x[i], b = x[i + half], s = sign * cs[half + i];

        out[i] = a * cs[i] - b * s;
        out[i + half] = b * cs[i] + a * s;
    }
    for (uint32_t i = dims; i < n; i++)
        out[i] = x[i];
}

static void query(const struct work *w, uint32_t head, uint32_t row, double *buf, double *out)
{
    const struct model_params *p = w->x->b->p;
    uint32_t d = p->geom.head_dim;
    uint64_t at = ((uint64_t)head * w->x->stride + row) * d;

    for (uint32_t i = 0; i < d; i++)
        buf[i] = observe_element(w->x, w->x->q, at + i);
    rotate(buf, d, p->rope_dims, w->cs + (uint64_t)row * d, -1, out);
}

/* Mean mu [d] and population covariance cov [d][d] of a head's queries before rotation. */
static void statistics(const struct work *w, uint32_t head, double *mu, double *cov, double *buf)
{
    uint32_t d = w->x->b->p->geom.head_dim, n = w->x->n;
    double *q = buf + d, share = 1.0 / (n - w->sink);

    memset(mu, 0, d * sizeof *mu);
    memset(cov, 0, (uint64_t)d * d * sizeof *cov);
    for (uint32_t t = w->sink; t < n; t++) {
        query(w, head, t, buf, q);
        axpy(share, q, d, mu);
    }
    for (uint32_t t = w->sink; t < n; t++) {
        query(w, head, t, buf, q);
        for (uint32_t i = 0; i < d; i++)
            q[i] -= mu[i];
        for (uint32_t i = 0; i < d; i++)
            axpy(share * q[i], q, d, cov + (uint64_t)i * d);
    }
}

/* mu = R mu, cov = R cov R' */
static void turn(const struct work *w, double *mu, double *cov, double *buf)
{
    uint32_t d = w->x->b->p->geom.head_dim, dims = w->x->b->p->rope_dims;

    rotate(mu, d, dims, w->turn, 1, buf);
    memcpy(mu, buf, d * sizeof *mu);
    for (int pass = 0; pass < 2; pass++) { /* rows, then columns of the symmetric product */
        for (uint32_t i = 0; i < d; i++) {
            rotate(cov + (uint64_t)i * d, d, dims, w->turn, 1, buf);
            memcpy(cov + (uint64_t)i * d, buf, d * sizeof *buf);
        }
        for (uint32_t i = 0; i < d; i++) {
            for (uint32_t j = 0; j < i; j++) {
                double x = cov[(uint64_t)i * d + j];

                cov[(uint64_t)i * d + j] = cov[(uint64_t)j * d + i];
                cov[(uint64_t)j * d + i] = x;
            }
        }
    }
}

/* Logarithm of the expectation for row j: mu.k / sqrt(d) + k' cov k / (2 d). */
static double expectation(const struct work *w, uint32_t g, uint32_t j, const double *mu,
                          const double *cov, double *buf)
{
    uint32_t d = w->x->b->p->geom.head_dim;
    uint64_t at = ((uint64_t)g * w->x->stride + j) * d;
    double *k = buf, *y = buf + d, linear = 0, square = 0;

    memset(y, 0, d * sizeof *y);
    for (uint32_t i = 0; i < d; i++) {
        k[i] = observe_element(w->x, w->x->k, at + i);
        axpy(k[i], cov + (uint64_t)i * d, d, y);
        linear += mu[i] * k[i];
    }
    for (uint32_t i = 0; i < d; i++)
        square += y[i] * k[i];
    return linear / sqrt(d) + square / (2 * d);
}

static void head_item(void *arg, uint32_t head, uint32_t worker)
{
    const struct work *w = arg;
    uint32_t d = w->x->b->p->geom.head_dim, n = w->x->n;
    double *mu = w->scratch + worker * w->per_worker, *cov = mu + d;
    double *buf = cov + (uint64_t)d * d, *z = w->prob + (uint64_t)head * n;
    double max = -INFINITY, sum = 0;

    statistics(w, head, mu, cov, buf);
    turn(w, mu, cov, buf);
    for (uint32_t j = w->sink; j < n; j++) {
        z[j] = expectation(w, head / observe_group(w->x), j, mu, cov, buf);
        max = z[j] > max ? z[j] : max;
    }
    for (uint32_t j = w->sink; j < n; j++)
        sum += z[j] = exp(z[j] - max);
    for (uint32_t j = w->sink; j < n; j++)
        z[j] /= sum;
}

static double value_norm(const struct layer_view *x, uint32_t g, uint32_t j)
{
    uint32_t d = x->b->p->geom.head_dim;
    uint64_t at = ((uint64_t)g * x->stride + j) * d;
    double sum = 0;

    for (uint32_t i = 0; i < d; i++) {
        double v = observe_element(x, x->v, at + i);

        sum += v * v;
    }
    return sqrt(sum);
}

/* A critical policy weighs values on its own. */
static void combine(const struct work *w, const struct policy *p, double *score)
{
    uint32_t group = observe_group(w->x), n = w->x->n;

    for (uint32_t g = 0; g < w->x->b->p->geom.n_kv_heads; g++) {
        for (uint32_t j = w->sink; j < n; j++) {
            double mean = 0;

            for (uint32_t h = g * group; h < (g + 1) * group; h++)
                mean += w->prob[(uint64_t)h * n + j] / group;
            if (!p->critical)
                mean = (mean + p->eps) * value_norm(w->x, g, j);
            score[(uint64_t)g * n + j] = mean;
        }
    }
}

int observe_expected(const struct layer_view *x, const struct policy *p, double *score,
                     struct larder_err *e)
{
    const struct kv_geom *geom = &x->b->p->geom;
    uint32_t d = geom->head_dim;
    struct work w = {.x = x, .sink = p->sink};
    int rc = 0;

    w.per_worker = (uint64_t)d * d + 3 * (uint64_t)d;
    w.cs = mem_zalloc((uint64_t)x->n * d, sizeof *w.cs);
    w.turn = mem_zalloc(d, sizeof *w.turn);
    w.scratch = mem_aligned(w.per_worker * x->b->n_threads, sizeof *w.scratch);
    w.prob = mem_alloc((uint64_t)geom->n_heads * x->n, sizeof *w.prob);
    if (!w.cs || !w.turn || !w.scratch || !w.prob)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for query statistics of %u tokens", x->n);
    for (uint32_t t = 0; t < x->n && !rc; t++)
        angles(x, x->pos[t], 1, w.cs + (uint64_t)t * d);
    for (uint32_t t = 0; t < FUTURE && !rc; t++)
        angles(x, x->n_ctx + t, 1.0 / FUTURE, w.turn);
    if (!rc) {
        ref_for(x->b, geom->n_heads, head_item, &w);
        combine(&w, p, score);
    }
    mem_free(w.cs);
    mem_free(w.turn);
    mem_free(w.scratch);
    mem_free(w.prob);
    return rc;
}
