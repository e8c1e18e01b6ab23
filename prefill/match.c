/* match.c - attention matching of one layer.
 *
 * The one idea: with queries fixed, both fits are least squares whose matrices are products of
 * probabilities with themselves. Probabilities are computed again for each pass, a few hundred
 * queries at a time in panels that stay in cache, so nothing of size queries x rows exists.
 * Rows are fitted in groups of consecutive chunks against the replay of those chunks alone,
 * with the first rows, which everything attends to, in every normaliser: what a chunk's rows
 * are asked for is asked by its own replay. So all costs grow with the document, none with its
 * square. */
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
static void score_group(const struct match *m, uint32_t g, const struct match_group *u)
{
    const float *square = m->square + ((uint64_t)g * m->n_blocks + u->block) * m->max_group;
    float *score = m->score + (uint64_t)g * m->r->n_doc + u->row;

    for (uint32_t j = 0; j < u->n_rows; j++) {
        double sum = 0;

        for (uint32_t i = 0; i < u->n_blocks; i++)
            sum += square[(uint64_t)i * m->max_group + j];
        score[j] = (float)(sum / m->n_queries);
    }
}

static void score_item(void *arg, uint32_t g, uint32_t worker)
{
    const struct match *m = arg;

    (void)worker;
    for (uint32_t i = 0; i < m->n_groups; i++)
        score_group(m, g, &m->group[i]);
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

void match_parts(const struct match *m, struct replay_part *part, uint32_t *ret_n,
                 uint32_t *ret_queries)
{
    for (uint32_t i = 0; i < m->n_groups; i++) {
        const struct match_group *u = &m->group[i];

        part[i] = (struct replay_part){u->row, u->n_rows, m->block[u->block].row,
                                       u->n_queries / m->n_group};
    }
    *ret_n = m->n_groups;
    *ret_queries = m->n_queries;
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

static bool alloc_plan(struct match *m)
{
    uint32_t n_blocks = 0;

    for (uint32_t c = 0; c < m->r->n_chunks; c++)
        n_blocks += blocks_of(m, m->r->chunk[c].n);
    m->block = mem_alloc(n_blocks, sizeof *m->block);
    m->group = mem_alloc(m->r->n_chunks, sizeof *m->group);
    return m->block && m->group;
}

static bool alloc(struct match *m)
{
    const struct kv_geom *geom = &m->b->p->geom;
    uint32_t pad = mul_padded(geom->head_dim);
    uint64_t n = (uint64_t)geom->n_kv_heads * m->r->n_doc;
    uint64_t queries = (uint64_t)geom->n_kv_heads * m->n_queries;

    m->per_worker =
        MATCH_ROWS * (uint64_t)(geom->head_dim + mul_padded(m->max_group) + 2 * MUL_WIDE);
    m->scratch = mem_aligned(m->per_worker * m->b->n_threads, sizeof *m->scratch);
    m->square =
        mem_aligned((uint64_t)geom->n_kv_heads * m->n_blocks * m->max_group, sizeof *m->square);
    m->lse = mem_aligned(queries, sizeof *m->lse);
    m->mass = mem_aligned(queries, sizeof *m->mass);
    m->y = mem_aligned(queries * pad, sizeof *m->y);
    m->score = mem_aligned(n, sizeof *m->score);
    return m->scratch && m->square && m->lse && m->mass && m->y && m->score;
}

int match_open(struct match **ret, struct backend *b, const struct replay *r, uint32_t span,
               struct larder_err *e)
{
    struct match *m = mem_zalloc(1, sizeof *m);

    if (m) {
        *m = (struct match){.b = b,
                            .mul = mul_pick(),
                            .r = r,
                            .n_group = b->p->geom.n_heads / b->p->geom.n_kv_heads};
        if (alloc_plan(m)) {
            make_groups(m, span);
            for (uint32_t i = 0; i < m->n_groups; i++)
                if (m->group[i].n_rows > m->max_group)
                    m->max_group = m->group[i].n_rows;
            if (alloc(m)) {
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
    mem_free(m->score);
    mem_free(m);
}
