/* match.c - attention matching: which rows are fitted to which queries, and where.
 *
 * The one idea: with queries fixed, both fits are least squares whose matrices are products of
 * probabilities with themselves. Probabilities are computed again for each pass, so nothing of
 * size queries x rows exists. Rows are fitted in groups of consecutive chunks against the replay
 * of those chunks alone, with the first rows, which everything attends to, in every normaliser:
 * what a chunk's rows are asked for is asked by its own replay. So all costs grow with the
 * document, none with its square. */
#include "match.h"

#include <string.h>

#include "engine.h"
#include "half.h"
#include "match_int.h"
#include "mem.h"

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

static bool alloc_plan(struct match *m)
{
    uint32_t n_blocks = 0;

    for (uint32_t c = 0; c < m->r->n_chunks; c++)
        n_blocks += blocks_of(m, m->r->chunk[c].n);
    m->block = mem_alloc(n_blocks, sizeof *m->block);
    m->group = mem_alloc(m->r->n_chunks, sizeof *m->group);
    return m->block && m->group;
}

/* What a backend that matches is told, and what it keeps. */
static bool alloc_there(struct match *m)
{
    uint64_t rows = (uint64_t)m->b->p->geom.n_heads * m->r->n_rows;

    m->part = mem_alloc(m->n_groups, sizeof *m->part);
    m->ask.sums = backend_buffer_new(m->b, rows, 2 * sizeof *m->ask.sums);
    if (!m->part || !m->ask.sums)
        return false;
    for (uint32_t i = 0; i < m->n_groups; i++) {
        const struct match_group *u = &m->group[i];

        m->part[i] = (struct replay_part){u->row, u->n_rows, m->block[u->block].row,
                                          u->n_queries / m->n_group};
    }
    return true;
}

static bool alloc(struct match *m)
{
    const struct kv_geom *geom = &m->b->p->geom;
    uint32_t pad = mul_padded(geom->head_dim);
    uint64_t queries = (uint64_t)geom->n_kv_heads * m->n_queries;

    m->per_worker =
        MATCH_ROWS * (uint64_t)(geom->head_dim + mul_padded(m->max_group) + 2 * MUL_WIDE);
    m->scratch = mem_aligned(m->per_worker * m->b->n_threads, sizeof *m->scratch);
    m->square =
        mem_aligned((uint64_t)geom->n_kv_heads * m->n_blocks * m->max_group, sizeof *m->square);
    m->lse = mem_aligned(queries, sizeof *m->lse);
    m->mass = mem_aligned(queries, sizeof *m->mass);
    m->y = mem_aligned(queries * pad, sizeof *m->y);
    return m->scratch && m->square && m->lse && m->mass && m->y;
}

int match_open(struct match **ret, struct backend *b, const struct replay *r, uint32_t span,
               struct larder_err *e)
{
    struct match *m = mem_zalloc(1, sizeof *m);

    if (m) {
        *m = (struct match){.b = b,
                            .r = r,
                            .mul = mul_pick(),
                            .n_group = b->p->geom.n_heads / b->p->geom.n_kv_heads};
        if (alloc_plan(m)) {
            make_groups(m, span);
            for (uint32_t i = 0; i < m->n_groups; i++)
                if (m->group[i].n_rows > m->max_group)
                    m->max_group = m->group[i].n_rows;
            if (b->ops->select ? alloc_there(m) : alloc(m)) {
                *ret = m;
                return 0;
            }
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
    mem_free(m->part);
    backend_buffer_free(m->b, m->ask.sums);
    mem_free(m);
}

/* ---- a layer */

static int look(struct match *m, double *score, struct larder_err *e)
{
    int rc = backend_view(m->b, m->x.q, VIEW_READ, e);

    if (!rc)
        rc = backend_view(m->b, m->x.k, VIEW_READ, e);
    if (!rc)
        rc = backend_view(m->b, m->v, VIEW_READ, e);
    return rc ? rc : backend_view(m->b, score, VIEW_WRITE, e);
}

static int stats_there(struct match *m, double *score, struct larder_err *e)
{
    m->ask = (struct replay_ask){.q = m->x.q,
                                 .k = m->x.k,
                                 .stride = (uint32_t)m->x.stride,
                                 .n_doc = m->r->n_doc,
                                 .part = m->part,
                                 .n_parts = m->n_groups,
                                 .square = true,
                                 .n_queries = m->n_queries,
                                 .score = score,
                                 .sums = m->ask.sums,
                                 .n_replay = m->r->n_rows};
    return m->b->ops->select->replay(m->b, &m->ask, e);
}

int match_layer(struct match *m, const struct replay_rows *x, const void *v, double *score,
                struct larder_err *e)
{
    int rc;

    m->x = *x;
    m->v = v;
    if (m->b->ops->select)
        return stats_there(m, score, e);
    rc = look(m, score, e);
    return rc ? rc : match_stats(m, score, e);
}

static int fit_there(struct match *m, const struct match_opts *o, const struct kept_rows *heads,
                     float *k, float *v, float *bias, struct larder_err *e)
{
    const struct fit_rows x = {.ask = &m->ask,
                               .v = m->v,
                               .precision = o->precision,
                               .with_bias = o->with_bias,
                               .heads = heads,
                               .to_k = k,
                               .to_v = v,
                               .bias = bias};

    return m->b->ops->select->fit(m->b, &x, e);
}

static void widen(const void *x, enum kv_dtype t, uint64_t n, float *to)
{
    for (uint64_t i = 0; i < n; i++)
        to[i] = t == KV_F32 ? ((const float *)x)[i] : bf16_to_f32(((const uint16_t *)x)[i]);
}

int match_fit(struct match *m, const struct match_opts *o, const struct kept_rows *heads, float *k,
              float *v, float *bias, struct larder_err *e)
{
    uint64_t at = 0, d = m->b->p->geom.head_dim;
    int rc = 0;

    if (m->b->ops->select)
        return fit_there(m, o, heads, k, v, bias, e);
    for (uint32_t g = 0; g < m->b->p->geom.n_kv_heads && !rc; g++) {
        const struct kept_rows *h = &heads[g];

        widen(h->k, h->dtype, h->n_rows * d, k + at * d);
        widen(h->v, h->dtype, h->n_rows * d, v + at * d);
        rc = match_fit_head(m, o, g, h->position, h->n_rows, v + at * d, bias + at, e);
        at += h->n_rows;
    }
    return rc;
}
