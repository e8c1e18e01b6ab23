/* replay.c - chunks, their prompts, and the scores of one layer.
 *
 * The one idea: replay rows pass the layers beside the document's rows, so scores are made
 * while a layer's keys are there anyway and never need the cache of all layers. A block of
 * replay rows meets only the keys of its own normaliser; n x n logits never exist. */
#include "replay.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "cpu.h"
#include "mem.h"

#define OVERLAP 8u /* tokens before a chunk that its prompt quotes */
#define ROWS 32u   /* replay rows of an item */
#define MIN_CHUNK 32u

static const char first_prompt[] = "Repeat the previous context exactly.";
static const char next_prompt[] = "Repeat the part of the previous context exactly, starting with";

/* ---- the plan */

/* Token ids around a repeated chunk, and those that a document begins with. */
struct prompt {
    uint32_t *first, *next, *tail, *head;
    size_t n_first, n_next, n_tail, n_head;
};

static void prompt_done(struct prompt *p)
{
    mem_free(p->first);
    mem_free(p->next);
    mem_free(p->tail);
    mem_free(p->head);
}

static int make_prompt(const struct model *m, const struct template *tmpl, struct prompt *p,
                       struct larder_err *e)
{
    const struct tokenizer *t = model_tokenizer(m);
    const char *head = tmpl ? tmpl->ask_head : "\n\n";
    const char *tail = tmpl && *tmpl->ask_tail ? tmpl->ask_tail : "\n";
    int rc;

    if (!t)
        return 0;
    rc = template_join(t, head, first_prompt, &p->first, &p->n_first, e);
    if (!rc)
        rc = template_join(t, head, next_prompt, &p->next, &p->n_next, e);
    if (!rc && tmpl)
        rc = template_head(tmpl, t, &p->head, &p->n_head, e);
    return rc ? rc : template_join(t, tail, "", &p->tail, &p->n_tail, e);
}

/* Tokens at the start that are the chat form's and not the document's: nobody asks for them. */
static uint32_t head_of(const struct prompt *p, const uint32_t *ids, uint32_t n)
{
    if (!p->n_head || p->n_head >= n || memcmp(ids, p->head, p->n_head * sizeof *ids))
        return 0;
    return (uint32_t)p->n_head;
}

/* Tokens of a chunk such that its replay ends within the model's positions. */
static int fit_chunk(const struct model *m, uint32_t n, const struct prompt *p, uint32_t *chunk,
                     struct larder_err *e)
{
    uint32_t n_positions = model_params(m)->n_positions;
    size_t around =
        (p->n_first > p->n_next + OVERLAP ? p->n_first : p->n_next + OVERLAP) + p->n_tail;
    uint32_t left = n_positions > n ? n_positions - n : 0;
    uint32_t least = n < MIN_CHUNK ? n : MIN_CHUNK;

    if (left < around + least)
        return larder_fail(e, LARDER_ETOOLONG,
                           "a replay needs %zu positions behind the document's %u tokens, the "
                           "model has %u; use obs=keys or split the document",
                           around + least, n, n_positions);
    if (*chunk > left - around)
        *chunk = (uint32_t)(left - around) / MIN_CHUNK * MIN_CHUNK;
    if (!*chunk)
        *chunk = least;
    return 0;
}

static void append(struct replay *r, uint32_t *at, const uint32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++, (*at)++) {
        r->ids[r->n_rows + *at] = ids[i];
        r->pos[r->n_rows + *at] = r->n_doc + *at;
    }
}

static void add_chunk(struct replay *r, const struct prompt *p, const uint32_t *ids, uint32_t start,
                      uint32_t end)
{
    uint32_t n = 0, before = start < OVERLAP ? start : OVERLAP;

    if (r->n_chunks) {
        append(r, &n, p->next, p->n_next);
        append(r, &n, ids + start - before, before);
    } else {
        append(r, &n, p->first, p->n_first);
    }
    append(r, &n, p->tail, p->n_tail);
    append(r, &n, ids + start, end - start);
    r->chunk[r->n_chunks++] = (struct replay_chunk){start, end, r->n_rows, n};
    r->n_rows += n;
    r->max_rows = n > r->max_rows ? n : r->max_rows;
}

static int fill(struct replay *r, const struct prompt *p, const uint32_t *ids, uint32_t n,
                uint32_t chunk, struct larder_err *e)
{
    uint64_t n_chunks = (n + (uint64_t)chunk - 1) / chunk;
    uint64_t most = n + n_chunks * (p->n_first + p->n_next + OVERLAP + p->n_tail);

    r->chunk = mem_alloc(n_chunks, sizeof *r->chunk);
    r->ids = mem_alloc(most, sizeof *r->ids);
    r->pos = mem_alloc(most, sizeof *r->pos);
    if (!r->chunk || !r->ids || !r->pos)
        return larder_fail(e, LARDER_ENOMEM, "no memory to replay %u tokens", n);
    for (uint32_t at = head_of(p, ids, n); at < n; at += chunk)
        add_chunk(r, p, ids, at, n - at < chunk ? n : at + chunk);
    return 0;
}

int replay_plan(struct replay **ret, const struct model *m, const struct template *tmpl,
                const uint32_t *ids, uint32_t n, uint32_t chunk, struct larder_err *e)
{
    struct replay *r = mem_zalloc(1, sizeof *r);
    struct prompt p = {0};
    int rc = r ? make_prompt(m, tmpl, &p, e)
               : larder_fail(e, LARDER_ENOMEM, "no memory to replay %u tokens", n);

    if (!rc) {
        r->n_doc = n;
        rc = fit_chunk(m, n, &p, &chunk, e);
    }
    if (!rc)
        rc = fill(r, &p, ids, n, chunk, e);
    prompt_done(&p);
    if (rc) {
        replay_free(r);
        return rc;
    }
    *ret = r;
    return 0;
}

void replay_thin(struct replay *r, const uint32_t *ids, const bool *chosen)
{
    uint32_t at = 0;

    r->max_rows = 0;
    for (uint32_t c = 0; c < r->n_chunks; c++) {
        struct replay_chunk *k = &r->chunk[c];

        k->first = at;
        for (uint32_t i = k->start; i < k->end; i++) {
            if (!chosen[i])
                continue;
            r->ids[at] = ids[i];
            r->pos[at] = r->n_doc + at - k->first;
            at++;
        }
        k->n = at - k->first;
        r->max_rows = k->n > r->max_rows ? k->n : r->max_rows;
    }
    r->n_rows = at;
}

void replay_free(struct replay *r)
{
    if (!r)
        return;
    mem_free(r->chunk);
    mem_free(r->ids);
    mem_free(r->pos);
    mem_free(r);
}

/* ---- scores */

struct scoring {
    struct backend *b;
    mul_fn *mul;
    const struct replay *r;
    const struct replay_rows *x;
    struct ref_keys *doc;         /* [n_kv_heads], keys of the document */
    struct ref_keys *own;         /* the chunk's replay rows */
    const struct replay_chunk *c; /* of this round */
    float *scratch;
    uint64_t per_worker;
    float *best; /* [n_threads][n_kv_heads][n_doc] */
    atomic_bool bad;
};

/* The keys of a normaliser: whole panels of 16, of which a range counts. */
struct span {
    const float *k;
    uint32_t from, to; /* keys that count, relative to k */
    uint32_t at;       /* column of k's first key in the logits */
};

/* Sinks (where the chunk does not hold them), the chunk, the replay rows up to the last. */
static uint32_t spans_of(const struct scoring *s, uint32_t g, uint32_t last, struct span out[3])
{
    uint32_t d = s->b->p->geom.head_dim, n = 0, at = 0;
    uint32_t low = s->c->start / MUL_WIDE * MUL_WIDE;
    uint32_t sinks = s->c->start < REPLAY_SINKS ? s->c->start : REPLAY_SINKS;

    if (sinks) {
        out[n++] = (struct span){s->doc[g].k, 0, sinks, at};
        at += MUL_WIDE;
    }
    out[n++] =
        (struct span){s->doc[g].k + (uint64_t)low * d, s->c->start - low, s->c->end - low, at};
    at += mul_padded(s->c->end - low);
    out[n++] = (struct span){s->own[g].k, 0, last, at};
    return n;
}

static void queries(const struct scoring *s, uint32_t h, uint32_t row, uint32_t rows, float *q)
{
    uint32_t d = s->b->p->geom.head_dim;

    ref_scale(s->x->q, s->b->elem, (h * s->x->stride + s->r->n_doc + s->c->first + row) * d,
              (uint64_t)rows * d, (float)(1 / sqrt(d)), q);
}

/* Row `row` of the chunk, query head h: its logits become probabilities, those of the chunk's
 * rows go into best[]. */
static void take_row(struct scoring *s, float *x, const struct span *span, uint32_t n_spans,
                     uint32_t row, uint32_t h, float *best)
{
    const struct span *chunk = &span[n_spans - 2];
    float max = -INFINITY, sum = 0, *p = x + chunk->at + chunk->from, scale;
    const float *worth = s->x->worth ? s->x->worth + (uint64_t)h * s->r->n_doc + s->c->start : NULL;
    uint32_t n = s->c->end - s->c->start;

    for (uint32_t i = 0; i < n_spans; i++) {
        uint32_t to = i + 1 == n_spans ? row + 1 : span[i].to;

        max = fmaxf(max, cpu_max(x + span[i].at + span[i].from, to - span[i].from));
    }
    for (uint32_t i = 0; i < n_spans; i++) {
        uint32_t to = i + 1 == n_spans ? row + 1 : span[i].to;

        sum += cpu_softmax_exp(x + span[i].at + span[i].from, to - span[i].from, to - span[i].from,
                               max);
    }
    scale = (s->x->length ? s->x->length[s->c->first + row] : 1) / sum;
    if (!isfinite(scale)) /* the comparison below would swallow it */
        atomic_store(&s->bad, true);
    for (uint32_t j = 0; j < n; j++) {
        float y = p[j] * scale * (worth ? worth[j] : 1);

        best[j] = y > best[j] ? y : best[j];
    }
}

/* Item: a block of replay rows of one query head. */
static void score_item(void *arg, uint32_t item, uint32_t worker)
{
    struct scoring *s = arg;
    const struct kv_geom *geom = &s->b->p->geom;
    uint32_t d = geom->head_dim, h = item % geom->n_heads,
             g = h / (geom->n_heads / geom->n_kv_heads);
    uint32_t row = item / geom->n_heads * ROWS, rows = s->c->n - row < ROWS ? s->c->n - row : ROWS;
    float *q = s->scratch + worker * s->per_worker, *x = q + ROWS * (uint64_t)d;
    float *best = s->best + ((uint64_t)worker * geom->n_kv_heads + g) * s->r->n_doc + s->c->start;
    struct span span[3];
    uint32_t n_spans = spans_of(s, g, row + rows, span);
    uint32_t wide = span[n_spans - 1].at + mul_padded(span[n_spans - 1].to);

    queries(s, h, row, rows, q);
    for (uint32_t i = 0; i < n_spans; i++)
        s->mul(&(struct mul){.a = q,
                             .a_row = d,
                             .a_k = 1,
                             .a_panel = MUL_WIDE * d,
                             .b = span[i].k,
                             .b_k = MUL_WIDE,
                             .b_panel = MUL_WIDE * d,
                             .c = x + span[i].at,
                             .c_row = wide,
                             .c_panel = MUL_WIDE,
                             .m = rows,
                             .n = mul_padded(span[i].to),
                             .k = d});
    for (uint32_t i = 0; i < rows; i++)
        take_row(s, x + (uint64_t)i * wide, span, n_spans, row + i, h, best);
}

static int score_chunk(struct scoring *s, struct larder_err *e)
{
    const struct kv_geom *geom = &s->b->p->geom;
    uint64_t row0 = (s->r->n_doc + (uint64_t)s->c->first) * geom->head_dim;
    struct ref_source own = {(const uint8_t *)s->x->k + row0 * kv_dtype_bytes(s->b->elem),
                             NULL,
                             s->b->elem,
                             s->c->n,
                             s->x->stride,
                             NULL};
    int rc = ref_gather(geom, &own, &s->own, e);

    if (rc)
        return rc;
    s->b->ops->parallel(s->b, (s->c->n + ROWS - 1) / ROWS * geom->n_heads, score_item, s);
    ref_gather_free(s->own, geom->n_kv_heads);
    s->own = NULL;
    return 0;
}

/* The maximum over workers, which does not depend on who computed what. */
static int collect(struct scoring *s, float *score, struct larder_err *e)
{
    uint64_t n = (uint64_t)s->b->p->geom.n_kv_heads * s->r->n_doc;

    if (atomic_load(&s->bad))
        return larder_fail(e, LARDER_ENUMERIC, "a replay score is not finite; nothing was kept");
    memcpy(score, s->best, n * sizeof *score);
    for (uint32_t w = 1; w < s->b->n_threads; w++)
        for (uint64_t j = 0; j < n; j++)
            if (s->best[w * n + j] > score[j])
                score[j] = s->best[w * n + j];
    return 0;
}

int replay_score(struct backend *b, const struct replay *r, const struct replay_rows *x,
                 float *score, struct larder_err *e)
{
    const struct kv_geom *geom = &b->p->geom;
    struct ref_source doc = {x->k, NULL, b->elem, r->n_doc, x->stride, NULL};
    struct scoring s = {.b = b, .mul = mul_pick(), .r = r, .x = x};
    uint64_t wide = (uint64_t)mul_padded(r->n_doc) + 2 * MUL_WIDE + mul_padded(r->max_rows);
    int rc = ref_gather(geom, &doc, &s.doc, e);

    if (rc)
        return rc;
    s.per_worker = ROWS * (geom->head_dim + wide);
    s.scratch = mem_aligned(s.per_worker * b->n_threads, sizeof *s.scratch);
    s.best = mem_zalloc((uint64_t)b->n_threads * geom->n_kv_heads * r->n_doc, sizeof *s.best);
    if (!s.scratch || !s.best)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for replay scores of %u tokens", r->n_doc);
    for (uint32_t i = 0; i < r->n_chunks && !rc; i++) {
        s.c = &r->chunk[i];
        rc = score_chunk(&s, e);
    }
    if (!rc)
        rc = collect(&s, score, e);
    mem_free(s.scratch);
    mem_free(s.best);
    ref_gather_free(s.doc, geom->n_kv_heads);
    return rc;
}
