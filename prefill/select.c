/* select.c - ranking tokens by attention mass and comparing rankings over layers.
 *
 * The one idea: everything after the window scores is exact integer work or short
 * f64 sums in a fixed order, so that equal scores give equal selections on every
 * machine. Which layers and rows to look at is the engine's business. */
#include "select.h"

#include <math.h>
#include <stdlib.h>

#include "mem.h"

void select_pool(const double *x, uint32_t m, uint32_t kernel, enum pool_kind kind, double *out)
{
    uint32_t r = kernel / 2;

    for (uint32_t j = 0; j < m; j++) {
        uint32_t lo = j > r ? j - r : 0;
        uint32_t hi = m - 1 - j > r ? j + r : m - 1;
        double acc = x[lo];

        for (uint32_t c = lo + 1; c <= hi; c++)
            acc = kind == POOL_AVG ? acc + x[c] : fmax(acc, x[c]);
        out[j] = kind == POOL_AVG ? acc / kernel : acc;
    }
}

/* fmax() would swallow a NaN, so look before pooling. */
static int widen(const float *mass, uint32_t m, double *out, struct larder_err *e)
{
    for (uint32_t j = 0; j < m; j++) {
        if (!isfinite(mass[j]))
            return larder_fail(e, LARDER_ENUMERIC,
                               "attention score of token %u is not finite; nothing was kept", j);
        out[j] = mass[j];
    }
    return 0;
}

int select_head_scores(const float *mass, uint32_t n_heads, uint32_t n_kv_heads, uint32_t m,
                       uint32_t kernel, enum pool_kind kind, double *score, struct larder_err *e)
{
    uint32_t n_group = n_heads / n_kv_heads;
    double *buf = mem_alloc(2 * (uint64_t)m, sizeof *buf);
    int rc = 0;

    if (!buf)
        return larder_fail(e, LARDER_ENOMEM, "no memory to rank %u tokens", m);
    for (uint64_t i = 0; i < (uint64_t)n_kv_heads * m; i++)
        score[i] = 0;
    for (uint32_t h = 0; h < n_heads && !rc; h++) {
        double *to = score + (uint64_t)(h / n_group) * m;

        rc = widen(mass + (uint64_t)h * m, m, buf, e);
        if (rc)
            break;
        select_pool(buf, m, kernel, kind, buf + m);
        for (uint32_t j = 0; j < m; j++)
            to[j] += buf[m + j];
    }
    mem_free(buf);
    return rc;
}

void select_token_scores(const double *head_score, uint32_t n_kv_heads, uint32_t m, double *score)
{
    for (uint32_t j = 0; j < m; j++) {
        double s = 0;

        for (uint32_t g = 0; g < n_kv_heads; g++)
            s += head_score[(uint64_t)g * m + j];
        score[j] = s;
    }
}

struct scored {
    double score;
    uint32_t index;
};

static int by_score(const void *a, const void *b)
{
    const struct scored *x = a, *y = b;

    if (x->score != y->score)
        return x->score > y->score ? -1 : 1;
    return x->index < y->index ? -1 : 1;
}

int select_order(const double *score, uint32_t m, uint32_t *order, struct larder_err *e)
{
    struct scored *s = mem_alloc(m, sizeof *s);

    if (!s)
        return larder_fail(e, LARDER_ENOMEM, "no memory to sort %u scores", m);
    for (uint32_t j = 0; j < m; j++) {
        if (!isfinite(score[j])) {
            mem_free(s);
            return larder_fail(e, LARDER_ENUMERIC,
                               "score of token %u is not finite; nothing was kept", j);
        }
        s[j] = (struct scored){score[j], j};
    }
    qsort(s, m, sizeof *s, by_score);
    for (uint32_t j = 0; j < m; j++)
        order[j] = s[j].index;
    mem_free(s);
    return 0;
}

void select_rank(const uint32_t *order, uint32_t m, uint32_t *rank)
{
    for (uint32_t p = 0; p < m; p++)
        rank[order[p]] = p + 1;
}

static int by_index(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

void select_top(const uint32_t *order, uint32_t k, uint32_t *keep)
{
    for (uint32_t i = 0; i < k; i++)
        keep[i] = order[i];
    qsort(keep, k, sizeof *keep, by_index);
}

/* Sum over layers of the squared distance of a token's ranks from their mean. */
static double spread(const uint32_t *const *rank, uint32_t n_layers, uint32_t j)
{
    double mean = 0, acc = 0;

    for (uint32_t l = 0; l < n_layers; l++)
        mean += rank[l][j];
    mean /= n_layers;
    for (uint32_t l = 0; l < n_layers; l++)
        acc += (rank[l][j] - mean) * (rank[l][j] - mean);
    return acc;
}

double select_variance(const uint32_t *const *rank, uint32_t n_layers, uint32_t m, uint32_t k,
                       uint32_t *ret_union)
{
    uint32_t n_union = 0;
    double acc = 0;

    for (uint32_t j = 0; j < m; j++) {
        uint32_t l = 0;

        while (l < n_layers && rank[l][j] > k)
            l++;
        if (l == n_layers)
            continue;
        acc += spread(rank, n_layers, j);
        n_union++;
    }
    if (ret_union)
        *ret_union = n_union;
    return n_union ? acc / ((double)n_layers * n_union) : 0;
}

double select_ratio(double value, double first)
{
    if (first > 0)
        return value / first;
    return value > 0 ? INFINITY : 0;
}
