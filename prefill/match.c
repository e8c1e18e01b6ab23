/* match.c - attention matching of one layer.
 *
 * The one idea: with queries fixed, both fits are least squares whose matrices are products of
 * probabilities with themselves. Probabilities are computed again for each pass, a few hundred
 * queries at a time in panels that stay in cache, so nothing of size queries x rows exists.
 * Rows are fitted in groups of consecutive chunks against the replay of those chunks alone:
 * what a chunk's rows are asked for is asked by its own replay, and a group's matrix
 * does not grow with the document. */
#include "match.h"

#include <math.h>
#include <string.h>

#include "cpu.h"
#include "match_int.h"
#include "mem.h"

/* ---- queries, statistics */

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

/* What one block of queries says about all rows of the document. */
static void stats_item(void *arg, uint32_t item, uint32_t worker)
{
    struct match *m = arg;
    uint32_t g = item / m->n_blocks, d = m->b->p->geom.head_dim, pad = mul_padded(d);
    const struct match_block *k = &m->block[item % m->n_blocks];
    const struct match_group *u = &m->group[k->group];
    uint64_t wide = mul_padded(m->r->n_doc), at = (uint64_t)g * m->n_queries + k->query;
    float *q = m->scratch + worker * m->per_worker, *x = q + (uint64_t)MATCH_ROWS * d;
    float *square = m->square + (uint64_t)item * m->r->n_doc;
    uint32_t n = m->r->n_doc;

    match_queries(m, g, k, q);
    match_logits(m, q, k->rows, m->doc[g].k, n, x, wide, MUL_WIDE);
    memset(square, 0, n * sizeof *square);
    for (uint32_t i = 0; i < k->rows; i++) {
        float *p = x + i * wide, max = cpu_max(p, n), mass = 0;
        float sum = cpu_softmax_exp(p, n, n, max);

        m->lse[at + i] = max + logf(sum);
        for (uint32_t j = 0; j < n; j++) {
            p[j] /= sum;
            square[j] += p[j] * p[j];
        }
        for (uint32_t j = u->row; j < u->row + u->n_rows; j++)
            mass += p[j];
        m->mass[at + i] = mass;
    }
    m->mul(&(struct mul){.a = x + u->row,
                         .a_row = wide,
                         .a_k = 1,
                         .a_panel = MUL_WIDE * wide,
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

/* Sums over blocks, in their order. */
static void score_item(void *arg, uint32_t g, uint32_t worker)
{
    struct match *m = arg;
    uint32_t n = m->r->n_doc;

    (void)worker;
    for (uint32_t j = 0; j < n; j++) {
        double sum = 0;

        for (uint32_t i = 0; i < m->n_blocks; i++)
            sum += m->square[((uint64_t)g * m->n_blocks + i) * n + j];
        m->score[(uint64_t)g * n + j] = (float)(sum / m->n_queries);
    }
}

int match_layer(struct match *m, const struct replay_rows *x, const void *v,
                const float **ret_score, struct larder_err *e)
{
    const struct kv_geom *geom = &m->b->p->geom;
    struct ref_source doc = {x->k, v, m->b->elem, m->r->n_doc, x->stride, NULL};
    uint64_t n = (uint64_t)geom->n_kv_heads * m->r->n_doc;
    int rc;

    ref_gather_free(m->doc, geom->n_kv_heads);
    m->doc = NULL;
    rc = ref_gather(geom, &doc, &m->doc, e);
    if (rc)
        return rc;
    m->x = *x;
    m->b->ops->parallel(m->b, geom->n_kv_heads * m->n_blocks, stats_item, m);
    m->b->ops->parallel(m->b, geom->n_kv_heads, score_item, m);
    for (uint64_t i = 0; i < n; i++)
        if (!isfinite(m->score[i]))
            return larder_fail(e, LARDER_ENUMERIC,
                               "the score of token %llu is not finite; nothing was kept",
                               (unsigned long long)(i % m->r->n_doc));
    *ret_score = m->score;
    return 0;
}

/* ---- plan */

static uint32_t blocks_of(const struct match *m, uint32_t rows)
{
    return m->n_group * ((rows + MATCH_ROWS - 1) / MATCH_ROWS);
}

/* Chunks into groups of at least `span` document rows; a short rest joins the last group. */
static void make_groups(struct match *m, uint32_t span)
{
    const struct replay *r = m->r;
    struct match_group *u = NULL;

    for (uint32_t c = 0; c < r->n_chunks; c++) {
        uint32_t left = r->n_doc - r->chunk[c].start;

        if (!u || (span && u->n_rows >= span && left >= span / 2)) {
            u = &m->group[m->n_groups++];
            /* rows before the first chunk are nobody's else */
            *u = (struct match_group){.row = c ? r->chunk[c].start : 0, .block = m->n_blocks};
        }
        u->n_rows = r->chunk[c].end - u->row;
        for (uint32_t h = 0; h < m->n_group; h++) {
            for (uint32_t row = 0; row < r->chunk[c].n; row += MATCH_ROWS) {
                uint32_t rows = r->chunk[c].n - row;
                struct match_block *k = &m->block[m->n_blocks++];

                *k = (struct match_block){m->n_groups - 1, h, r->chunk[c].first + row,
                                          rows < MATCH_ROWS ? rows : MATCH_ROWS, m->n_queries};
                m->n_queries += k->rows;
                u->n_queries += k->rows;
                u->n_blocks++;
            }
        }
    }
}

static bool alloc(struct match *m)
{
    const struct kv_geom *geom = &m->b->p->geom;
    uint32_t n_blocks = 0, pad = mul_padded(geom->head_dim);
    uint64_t n = (uint64_t)geom->n_kv_heads * m->r->n_doc, queries;

    for (uint32_t c = 0; c < m->r->n_chunks; c++)
        n_blocks += blocks_of(m, m->r->chunk[c].n);
    queries = (uint64_t)geom->n_kv_heads * m->n_group * m->r->n_rows;
    m->per_worker = MATCH_ROWS * (uint64_t)(geom->head_dim + mul_padded(m->r->n_doc));
    m->block = mem_alloc(n_blocks, sizeof *m->block);
    m->group = mem_alloc(m->r->n_chunks, sizeof *m->group);
    m->scratch = mem_aligned(m->per_worker * m->b->n_threads, sizeof *m->scratch);
    m->square = mem_aligned((uint64_t)geom->n_kv_heads * n_blocks * m->r->n_doc, sizeof *m->square);
    m->lse = mem_aligned(queries, sizeof *m->lse);
    m->mass = mem_aligned(queries, sizeof *m->mass);
    m->y = mem_aligned(queries * pad, sizeof *m->y);
    m->score = mem_aligned(n, sizeof *m->score);
    return m->block && m->group && m->scratch && m->square && m->lse && m->mass && m->y && m->score;
}

int match_open(struct match **ret, struct backend *b, const struct replay *r,
               const struct match_opts *o, struct larder_err *e)
{
    struct match *m = mem_zalloc(1, sizeof *m);

    if (m) {
        *m = (struct match){.b = b,
                            .mul = mul_pick(),
                            .r = r,
                            .o = *o,
                            .n_group = b->p->geom.n_heads / b->p->geom.n_kv_heads};
        if (alloc(m)) {
            make_groups(m, o->span);
            *ret = m;
            return 0;
        }
    }
    match_close(m);
    return larder_fail(e, LARDER_ENOMEM, "no memory to match %u rows", r->n_doc);
}

void match_close(struct match *m)
{
    if (!m)
        return;
    ref_gather_free(m->doc, m->b->p->geom.n_kv_heads);
    mem_free(m->block);
    mem_free(m->group);
    mem_free(m->scratch);
    mem_free(m->square);
    mem_free(m->lse);
    mem_free(m->mass);
    mem_free(m->y);
    mem_free(m->score);
    mem_free(m);
}
