/* match_stats.c - what the queries of a layer say about the document's rows, on the host.
 *
 * The one idea: probabilities are computed a few hundred queries at a time in panels that stay in
 * cache; of each block of queries only sums are kept. */
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "match_int.h"

void match_queries(const struct match *m, uint32_t g, const struct match_block *k, float *q)
{
    uint32_t d = m->b->p->geom.head_dim, h = g * m->n_group + k->head;

    ref_scale(m->x.q, m->b->elem, (h * m->x.stride + m->r->n_doc + k->row) * d,
              (uint64_t)k->rows * d, (float)(1 / sqrt(d)), q);
}

void match_logits(const struct match *m, const float *q, uint32_t rows, const float *panels,
                  uint32_t n, float *x, uint64_t x_row, uint64_t x_panel)
{
    uint32_t d = m->b->p->geom.head_dim;

    m->mul(&(struct mul){.a = q,
                         .a_row = d,
                         .a_k = 1,
                         .a_panel = MUL_WIDE * d,
                         .b = panels,
                         .b_k = MUL_WIDE,
                         .b_panel = MUL_WIDE * d,
                         .c = x,
                         .c_row = x_row,
                         .c_panel = x_panel,
                         .m = rows,
                         .n = mul_padded(n),
                         .k = d});
}

/* Keys of a group's normaliser, by whole panels of 16: the first rows, where the group does not
 * have them, then its own. Columns of the logits. */
struct span {
    uint32_t low;        /* row of the first panel of the group, */
    uint32_t at;         /* its column, */
    uint32_t from, wide; /* the column of the group's first row; of all */
    uint32_t n_sinks;    /* columns 0..n_sinks */
};

static struct span span_of(const struct match_group *u)
{
    struct span s = {.low = u->row / MUL_WIDE * MUL_WIDE};

    s.n_sinks = u->row < REPLAY_SINKS ? u->row : REPLAY_SINKS;
    s.at = s.n_sinks ? MUL_WIDE : 0;
    s.from = s.at + u->row - s.low;
    s.wide = s.at + mul_padded(u->row + u->n_rows - s.low);
    return s;
}

/* Logits of a row become probabilities; how much of them is the group's is returned. */
static float normalise(float *x, const struct span *s, uint32_t n, float *ret_lse)
{
    float *p = x + s->from, max = cpu_max(p, n), sum, sinks = 0, scale;

    if (s->n_sinks)
        max = fmaxf(max, cpu_max(x, s->n_sinks));
    sum = cpu_softmax_exp(p, n, n, max);
    if (s->n_sinks)
        sinks = cpu_softmax_exp(x, s->n_sinks, s->n_sinks, max);
    *ret_lse = max + logf(sum + sinks);
    scale = 1 / (sum + sinks);
    for (uint32_t j = 0; j < n; j++)
        p[j] *= scale;
    return sum * scale;
}

/* What one block of queries says about the rows of its group. */
static void stats_item(void *arg, uint32_t item, uint32_t worker)
{
    struct match *m = arg;
    uint32_t g = item / m->n_blocks, d = m->b->p->geom.head_dim, pad = mul_padded(d);
    const struct match_block *k = &m->block[item % m->n_blocks];
    const struct match_group *u = &m->group[k->group];
    struct span s = span_of(u);
    uint64_t at = (uint64_t)g * m->n_queries + k->query;
    float *q = m->scratch + worker * m->per_worker, *x = q + (uint64_t)MATCH_ROWS * d;
    float *square = m->square + (uint64_t)item * m->max_group;

    match_queries(m, g, k, q);
    if (s.n_sinks)
        match_logits(m, q, k->rows, m->doc[g].k, MUL_WIDE, x, s.wide, MUL_WIDE);
    match_logits(m, q, k->rows, m->doc[g].k + (uint64_t)s.low * d, s.wide - s.at, x + s.at, s.wide,
                 MUL_WIDE);
    memset(square, 0, u->n_rows * sizeof *square);
    for (uint32_t i = 0; i < k->rows; i++) {
        float *p = x + (uint64_t)i * s.wide;

        m->mass[at + i] = normalise(p, &s, u->n_rows, &m->lse[at + i]);
        p += s.from;
        for (uint32_t j = 0; j < u->n_rows; j++)
            square[j] += p[j] * p[j];
    }
    m->mul(&(struct mul){.a = x + s.from,
                         .a_row = s.wide,
                         .a_k = 1,
                         .a_panel = MUL_WIDE * s.wide,
                         .b = m->doc[g].v + (uint64_t)u->row * pad,
                         .b_k = pad,
                         .b_panel = MUL_WIDE,
                         .c = m->y + at * pad,
                         .c_row = pad,
                         .c_panel = MUL_WIDE,
                         .m = k->rows,
                         .n = pad,
                         .k = u->n_rows});
}

/* Sums over the blocks of a group, in their order. */
static void score_group(const struct match *m, uint32_t g, const struct match_group *u,
                        double *score)
{
    const float *square = m->square + ((uint64_t)g * m->n_blocks + u->block) * m->max_group;

    for (uint32_t j = 0; j < u->n_rows; j++) {
        double sum = 0;

        for (uint32_t i = 0; i < u->n_blocks; i++)
            sum += square[(uint64_t)i * m->max_group + j];
        score[j] = (float)(sum / m->n_queries);
    }
}

int match_stats(struct match *m, double *score, struct larder_err *e)
{
    const struct kv_geom *geom = &m->b->p->geom;
    struct ref_source doc = {m->x.k, m->v, m->b->elem, m->r->n_doc, m->x.stride, NULL};
    uint64_t n = (uint64_t)geom->n_kv_heads * m->r->n_doc;
    int rc;

    ref_gather_free(m->doc, geom->n_kv_heads);
    m->doc = NULL;
    rc = ref_gather(geom, &doc, &m->doc, e);
    if (rc)
        return rc;
    m->b->ops->parallel(m->b, geom->n_kv_heads * m->n_blocks, stats_item, m);
    memset(score, 0, n * sizeof *score);
    for (uint32_t g = 0; g < geom->n_kv_heads; g++)
        for (uint32_t i = 0; i < m->n_groups; i++)
            score_group(m, g, &m->group[i], score + (uint64_t)g * m->r->n_doc + m->group[i].row);
    for (uint64_t i = 0; i < n; i++)
        if (!isfinite(score[i]))
            return larder_fail(e, LARDER_ENUMERIC,
                               "the score of token %llu is not finite; nothing was kept",
                               (unsigned long long)(i % m->r->n_doc));
    return 0;
}
