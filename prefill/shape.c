/* shape.c - budgets over heads, and the rows of one head.
 *
 * The one idea: a head keeps the first `count` rows of its own order, whatever decided the
 * count. Heads that compete are ranked row by row, but since each head's rows enter that
 * ranking in the head's own order, only the counts need to leave it. */
#include "shape.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>

#include "mem.h"
#include "select.h"

/* CriticalKV: a score of nothing is still worth a little. */
#define CRITICAL_EPS 1e-4

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* Rows that always stay. */
static uint32_t n_forced(const struct scored_head *h)
{
    return h->lo + h->n - h->hi;
}

static int no_memory(struct larder_err *e)
{
    return larder_fail(e, LARDER_ENOMEM, "no memory to choose rows");
}

/* ---- counts */

uint64_t shape_total(const struct row_budget *b, uint32_t n, uint32_t n_heads)
{
    uint64_t all = (uint64_t)n * n_heads;

    if (b->kind == ROWS_SHARE) {
        double removed = 1 - b->value / 100;

        return all - (uint64_t)((double)all * removed);
    }
    return (uint64_t)policy_rows_exact(b, n) * n_heads;
}

void shape_uniform(const struct scored_head *h, uint32_t n_heads, uint32_t rows, uint32_t *count)
{
    for (uint32_t i = 0; i < n_heads; i++)
        count[i] = least(h[i].n, rows);
}

struct entry {
    double score;
    uint32_t head, row;
};

static int by_score(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;

    if (x->score != y->score)
        return x->score > y->score ? -1 : 1;
    if (x->head != y->head)
        return x->head < y->head ? -1 : 1;
    return x->row < y->row ? -1 : 1;
}

/* The rows of head i that are not sure of their place, best first, into to[]; the number of
 * sure ones into *ret_sure. */
static int contestants(const struct scored_head *h, uint32_t i, uint32_t sure, struct entry *to,
                       uint32_t *ret_sure, struct larder_err *e)
{
    uint32_t m = h->hi - h->lo, forced = n_forced(h);
    uint32_t skip = sure > forced ? least(sure - forced, m) : 0;
    uint32_t *order = mem_alloc(m, sizeof *order);
    int rc = order ? select_order(h->score + h->lo, m, order, e) : no_memory(e);

    for (uint32_t j = skip; j < m && !rc; j++) {
        uint32_t row = h->lo + order[j];

        *to++ = (struct entry){h->score[row], i, row};
    }
    mem_free(order);
    *ret_sure = forced + skip;
    return rc;
}

int shape_compete(const struct scored_head *h, uint32_t n_heads, uint64_t total, uint32_t sure,
                  uint32_t *count, struct larder_err *e)
{
    uint64_t n = 0, all = 0, given = 0;
    struct entry *pool;
    int rc = 0;

    for (uint32_t i = 0; i < n_heads; i++)
        all += h[i].hi - h[i].lo;
    pool = mem_alloc(all, sizeof *pool);
    if (!pool)
        return no_memory(e);
    for (uint32_t i = 0; i < n_heads && !rc; i++) {
        rc = contestants(&h[i], i, sure, pool + n, &count[i], e);
        n += h[i].n - count[i];
        given += count[i];
    }
    if (!rc)
        qsort(pool, n, sizeof *pool, by_score);
    for (uint64_t j = 0; j < n && given < total && !rc; j++, given++)
        count[pool[j].head]++;
    mem_free(pool);
    return rc;
}

uint32_t shape_pyramid(double rows, uint32_t n, uint32_t window, uint32_t n_layers, uint32_t layer)
{
    double min = rows / 20, max = 2 * rows - min; /* 20: the paper's beta */

    if (max >= (double)n - window) {
        max = (double)n - window;
        min = 2 * rows - max;
    }
    if (max > n || min > max || min < window || n_layers < 2)
        return (uint32_t)rint(rows);
    return (uint32_t)rint(max - layer * ((max - min) / (n_layers - 1)));
}

static double clamped(const struct scored_head *h, double rows)
{
    return fmin(fmax(rows, n_forced(h)), h->n);
}

/* Rows of all heads when a share of 1 is worth `scale` rows. */
static double filled(const struct scored_head *h, uint32_t n_heads, const double *share,
                     double scale)
{
    double sum = 0;

    for (uint32_t i = 0; i < n_heads; i++)
        sum += clamped(&h[i], share[i] * scale);
    return sum;
}

/* The scale at which the heads hold `total`, to the last bit that matters. */
static double scale_for(const struct scored_head *h, uint32_t n_heads, const double *share,
                        double total)
{
    double low = 0, high = 1;

    for (int i = 0; i < 64 && filled(h, n_heads, share, high) < total; i++)
        high *= 2;
    for (int i = 0; i < 100; i++) {
        double mid = (low + high) / 2;

        if (filled(h, n_heads, share, mid) < total)
            low = mid;
        else
            high = mid;
    }
    return high;
}

/* One more row for the head that rounding down took most from. */
static bool round_up_one(const struct scored_head *h, uint32_t n_heads, const double *share,
                         double scale, uint32_t *count)
{
    uint32_t best = n_heads;
    double most = 0;

    for (uint32_t i = 0; i < n_heads; i++) {
        double lost = clamped(&h[i], share[i] * scale) - count[i];

        if (count[i] < h[i].n && lost > most) {
            most = lost;
            best = i;
        }
    }
    if (best < n_heads)
        count[best]++;
    return best < n_heads;
}

void shape_shares(const struct scored_head *h, uint32_t n_heads, const double *share,
                  uint64_t total, uint32_t *count)
{
    double scale = scale_for(h, n_heads, share, (double)total);
    uint64_t given = 0;

    for (uint32_t i = 0; i < n_heads; i++) {
        count[i] = (uint32_t)clamped(&h[i], share[i] * scale);
        given += count[i];
    }
    while (given < total && round_up_one(h, n_heads, share, scale, count))
        given++;
}

int shape_heads(const struct scored_head *h, uint32_t n_heads, const double *share, uint64_t total,
                uint32_t *count, struct larder_err *e)
{
    uint32_t *order = mem_alloc(n_heads, sizeof *order);
    int rc = order ? select_order(share, n_heads, order, e) : no_memory(e);
    uint64_t given = 0;

    for (uint32_t i = 0; i < n_heads && !rc; i++) {
        count[i] = n_forced(&h[i]);
        given += count[i];
    }
    for (uint32_t i = 0; i < n_heads && !rc; i++) {
        const struct scored_head *x = &h[order[i]];

        if (given + x->hi - x->lo > total)
            break; /* a smaller share never goes before a larger one */
        count[order[i]] = x->n;
        given += x->hi - x->lo;
    }
    mem_free(order);
    return rc;
}

/* ---- rows */

/* order[0..m) with its first `fixed` entries as they are, the others by score times worth. */
static int order_by_worth(const struct scored_head *h, uint32_t *order, uint32_t m, uint32_t fixed,
                          struct larder_err *e)
{
    uint32_t rest = m - fixed;
    struct entry *s = mem_alloc(rest, sizeof *s);

    if (!s)
        return no_memory(e);
    for (uint32_t j = 0; j < rest; j++) {
        uint32_t row = h->lo + order[fixed + j];

        s[j] = (struct entry){(h->score[row] + CRITICAL_EPS) * h->worth[row], 0, order[fixed + j]};
        if (!isfinite(s[j].score)) {
            mem_free(s);
            return larder_fail(e, LARDER_ENUMERIC,
                               "worth of token %u is not finite; nothing was kept", row);
        }
    }
    qsort(s, rest, sizeof *s, by_score);
    for (uint32_t j = 0; j < rest; j++)
        order[fixed + j] = s[j].row;
    mem_free(s);
    return 0;
}

int shape_take(const struct scored_head *h, uint32_t count, uint32_t sure, uint32_t *keep,
               struct larder_err *e)
{
    uint32_t m = h->hi - h->lo, forced = n_forced(h), k = count - forced;
    uint32_t first = count / 2 > sure ? count / 2 : sure;
    uint32_t *order = mem_alloc(m, sizeof *order);
    int rc;

    assert(count >= forced && count <= h->n);
    rc = order ? select_order(h->score + h->lo, m, order, e) : no_memory(e);
    if (!rc && h->worth) /* rows that always stay are the first of the head's order */
        rc = order_by_worth(h, order, m, first > forced ? least(first - forced, m) : 0, e);
    if (!rc) {
        for (uint32_t i = 0; i < h->lo; i++)
            keep[i] = i;
        select_top(order, k, keep + h->lo);
        for (uint32_t i = 0; i < k; i++)
            keep[h->lo + i] += h->lo;
        for (uint32_t i = h->hi; i < h->n; i++)
            keep[count - (h->n - i)] = i;
    }
    mem_free(order);
    return rc;
}
