/* cpu_resume.c - a few new rows on many stored ones: the steps of a decoder, in f32.
 *
 * The one idea: the keys of a KV head are cut into chunks, each an item of its own. An item widens
 * its keys block by block into panels that stay in the first caches, all query rows of the group
 * meet them there, and a running maximum, sum and output remain, which are combined at the end in
 * the order of the keys. So all threads have work however few heads there are, nothing as large as
 * the cache is allocated, and since chunks follow from the number of rows, results do not depend on
 * threads. */
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "fast.h"
#include "half.h"
#include "mem.h"
#include "packed.h"
#include "turn.h"

#define KEYS 128u      /* of a block */
#define MIN_CHUNK 256u /* keys */
#define MAX_CHUNKS 16u /* of the stored rows of a head */

#define BODY static inline __attribute__((always_inline))

/* ---- keys to panels */

/* Eight elements of row j at column c; zeros for a row that is not there. */
BODY void load8(const void *rows, enum kv_dtype t, uint64_t at, half_lanes *out)
{
    if (t == KV_F32)
        *out = *(const half_lanes *)((const float *)rows + at);
    else
        widen_lanes((const uint16_t *)rows + at, out);
}

/* n <= 8 rows to half a panel: columns `to` .. `to` + 7 of it. */
BODY void half_panel(const void *rows, enum kv_dtype t, uint64_t at, uint32_t n, uint32_t d,
                     float *to)
{
    uint32_t c = 0;

    for (; c + TURN <= d; c += TURN) {
        half_lanes x[TURN] = {{0}};

        if (n == TURN)
#pragma GCC unroll 8
            for (uint32_t j = 0; j < TURN; j++)
                load8(rows, t, at + (uint64_t)j * d + c, &x[j]);
        else
            for (uint32_t j = 0; j < n; j++)
                load8(rows, t, at + (uint64_t)j * d + c, &x[j]);
        turn8(x);
#pragma GCC unroll 8
        for (uint32_t j = 0; j < TURN; j++)
            *(half_lanes *)(to + (uint64_t)(c + j) * MUL_WIDE) = x[j];
    }
    for (; c < d; c++)
        for (uint32_t j = 0; j < TURN; j++) {
            uint64_t from = at + (uint64_t)j * d + c;

            to[(uint64_t)c * MUL_WIDE + j] = j >= n ? 0
                                             : t == KV_F32
                                                 ? ((const float *)rows)[from]
                                                 : bf16_to_f32(((const uint16_t *)rows)[from]);
        }
}

BODY void panels(const void *rows, enum kv_dtype t, uint64_t at, uint32_t n, uint32_t d, float *to)
{
    for (uint32_t j = 0; j < mul_padded(n); j += TURN) {
        uint32_t left = j < n ? n - j : 0;

        half_panel(rows, t, at + (uint64_t)j * d, left < TURN ? left : TURN, d,
                   to + (uint64_t)(j / MUL_WIDE) * MUL_WIDE * d + j % MUL_WIDE);
    }
}

FAST static void panels_f32(const void *rows, uint64_t at, uint32_t n, uint32_t d, float *to)
{
    panels(rows, KV_F32, at, n, d, to);
}

FAST static void panels_bf16(const void *rows, uint64_t at, uint32_t n, uint32_t d, float *to)
{
    panels(rows, KV_BF16, at, n, d, to);
}

/* ---- chunks */

/* What is left of a chunk, for all query rows. */
struct part {
    float *max, *sum; /* [padded] */
    float *o;         /* [padded][pad] */
};

struct steps {
    struct backend *b;
    const struct resume *r;
    mul_fn *mul;
    uint32_t d, pad;       /* of a row; padded */
    uint32_t rows, padded; /* query rows of a group */
    float *q;              /* [n_kv_heads][padded][d], scaled */
    float *parts;
    uint64_t per_part;
    float *scratch; /* [n_threads][per_worker] */
    uint64_t per_worker;
};

static uint32_t up_to(uint32_t n, uint32_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

static uint32_t chunk_of(uint32_t n_rows)
{
    uint32_t chunk = up_to((n_rows + MAX_CHUNKS - 1) / MAX_CHUNKS, KEYS);

    return chunk < MIN_CHUNK ? MIN_CHUNK : chunk;
}

static uint32_t n_chunks(uint32_t n_rows)
{
    return (n_rows + chunk_of(n_rows) - 1) / chunk_of(n_rows);
}

static struct part part_at(const struct steps *s, uint32_t i)
{
    float *at = s->parts + i * s->per_part;

    return (struct part){at, at + s->padded, at + 2 * s->padded};
}

/* A run of keys, number `first` and on of the head's list. */
struct run {
    const void *k, *v;
    enum kv_dtype t; /* of both, from row `at` on: the packed ones where it is a packed type */
    uint64_t at;
    struct packed_rows pk, pv;
    uint32_t first, n;
};

/* The runs of a KV head: the exact rows of tiles, stored rows, the tail. */
#define RUNS 3

static void list_runs(const struct steps *s, uint32_t g, struct run run[RUNS])
{
    const struct resume *r = s->r;
    const struct past_rows *p = &r->past[g];
    uint32_t n = p->n_rows, d = s->d;

    run[0] = (struct run){p->k, p->v, KV_BF16, .n = 0};
    run[1] = (struct run){p->k, p->v, p->dtype, .n = n};
    run[2] =
        (struct run){r->k, r->v, s->b->elem, (uint64_t)g * r->stride, .first = n, .n = r->n_tail};
    if (packed_type(p->dtype)) {
        run[1].pk = (struct packed_rows){p->dtype, p->k, packed_parts_k(p->dtype, n, d), d};
        run[1].pv = (struct packed_rows){p->dtype, p->v, packed_parts_v(p->dtype, n, d), d};
        run[0].n = run[1].first = run[1].pk.parts.n_exact;
        run[1].n = run[1].pk.parts.n_packed;
    }
}

static uint32_t n_parts(const struct steps *s, uint32_t g)
{
    struct run run[RUNS];
    uint32_t n = 0;

    list_runs(s, g, run);
    for (int i = 0; i < RUNS; i++)
        n += n_chunks(run[i].n);
    return n;
}

static struct run chunk_run(const struct steps *s, uint32_t g, uint32_t chunk)
{
    struct run run[RUNS], *x = run;
    uint32_t from, size;

    list_runs(s, g, run);
    for (; chunk >= n_chunks(x->n); x++)
        chunk -= n_chunks(x->n);
    size = chunk_of(x->n);
    from = chunk * size;
    x->at += from;
    x->first += from;
    x->n = x->n - from < size ? x->n - from : size;
    return *x;
}

/* What row i of the group sees of keys first .. first + n - 1 of the list. */
static void soften_row(const struct steps *s, uint32_t g, uint32_t i, uint32_t first, uint32_t n,
                       float *x, const struct part *p)
{
    const struct resume *r = s->r;
    const struct past_rows *past = &r->past[g];
    const struct ref_keys keys = {.n_past = past->n_rows, .position = past->position};
    uint32_t own = past->n_rows + r->n_tail - r->n_new + i % r->n_new;
    uint32_t from = ref_sees_from(&(struct ref_sight){r->sliding, r->pos0}, &keys, own);
    uint32_t to = own + 1 > first ? own + 1 - first : 0;

    to = to < n ? to : n;
    from = from > first ? from - first : 0;
    from = from < to ? from : to;
    if (past->bias && first < past->n_rows)
        cpu_add(past->bias + first, n, x);
    cpu_soften(x, n, from, to,
               &(struct cpu_running){&p->max[i], &p->sum[i], p->o + (uint64_t)i * s->pad, s->pad});
}

static void keys(const struct steps *s, const struct run *x, uint32_t at, uint32_t n, float *panel)
{
    uint64_t from = (x->at + at) * s->d;

    if (packed_type(x->t))
        cpu_packed_keys(&x->pk, (uint32_t)x->at + at, n, panel);
    else if (x->t == KV_F32)
        panels_f32(x->k, from, n, s->d, panel);
    else
        panels_bf16(x->k, from, n, s->d, panel);
}

/* In rows of `pad`; where they are, if that is how they stand there. */
static const float *values(const struct steps *s, const struct run *x, uint32_t at, uint32_t n,
                           float *buf)
{
    uint64_t from = (x->at + at) * s->d;

    if (packed_type(x->t)) {
        cpu_packed_values(&x->pv, (uint32_t)x->at + at, n, buf);
        return buf;
    }
    if (x->t == KV_F32 && s->pad == s->d)
        return (const float *)x->v + from;
    for (uint32_t j = 0; j < n; j++, from += s->d)
        if (x->t == KV_F32)
            memcpy(buf + (uint64_t)j * s->pad, (const float *)x->v + from, s->d * sizeof *buf);
        else
            cpu_to_f32((const uint16_t *)x->v + from, s->d, buf + (uint64_t)j * s->pad);
    return buf;
}

/* Keys at .. at + n - 1 of a run. */
static void block(const struct steps *s, uint32_t g, const struct run *x, uint32_t at, uint32_t n,
                  const struct part *p, float *scratch)
{
    float *panel = scratch, *v = panel + KEYS * (uint64_t)s->d;
    float *logit = v + KEYS * (uint64_t)s->pad;
    uint32_t wide = mul_padded(n);
    const float *q = s->q + (uint64_t)g * s->padded * s->d;

    keys(s, x, at, n, panel);
    s->mul(&(struct mul){.a = q,
                         .a_row = s->d,
                         .a_k = 1,
                         .a_panel = MUL_WIDE * s->d,
                         .b = panel,
                         .b_k = MUL_WIDE,
                         .b_panel = MUL_WIDE * s->d,
                         .c = logit,
                         .c_row = KEYS,
                         .c_panel = MUL_WIDE,
                         .m = s->padded,
                         .n = wide,
                         .k = s->d});
    for (uint32_t i = 0; i < s->rows; i++)
        soften_row(s, g, i, x->first + at, n, logit + (uint64_t)i * KEYS, p);
    s->mul(&(struct mul){.a = logit,
                         .a_row = KEYS,
                         .a_k = 1,
                         .a_panel = MUL_WIDE * KEYS,
                         .b = values(s, x, at, n, v),
                         .b_k = s->pad,
                         .b_panel = MUL_WIDE,
                         .c = p->o,
                         .c_row = s->pad,
                         .c_panel = MUL_WIDE,
                         .m = s->padded,
                         .n = s->pad,
                         .k = n,
                         .add = true});
}

static void step_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct steps *s = arg;
    struct part p = part_at(s, item);
    uint32_t g = 0, chunk = item, n;
    struct run x;

    for (; chunk >= (n = n_parts(s, g)); g++)
        chunk -= n;
    x = chunk_run(s, g, chunk);
    for (uint32_t i = 0; i < s->padded; i++) {
        p.max[i] = -INFINITY;
        p.sum[i] = 0;
    }
    memset(p.o, 0, (uint64_t)s->padded * s->pad * sizeof *p.o);
    for (uint32_t at = 0; at < x.n; at += KEYS)
        block(s, g, &x, at, x.n - at < KEYS ? x.n - at : KEYS, &p,
              s->scratch + worker * s->per_worker);
}

/* ---- together */

static void load_queries(const struct steps *s)
{
    const struct kv_geom *geom = &s->b->p->geom;
    uint32_t group = geom->n_heads / geom->n_kv_heads, n_new = s->r->n_new;
    float scale = (float)(1 / sqrt(s->d));

    memset(s->q, 0, (uint64_t)geom->n_kv_heads * s->padded * s->d * sizeof *s->q);
    for (uint32_t h = 0; h < geom->n_heads; h++)
        ref_scale(s->r->q, s->b->elem, h * (uint64_t)s->r->q_stride * s->d, (uint64_t)n_new * s->d,
                  scale, s->q + ((uint64_t)(h / group) * s->padded + h % group * n_new) * s->d);
}

/* Row i of a group, from its parts. */
static void combine(const struct steps *s, uint32_t first, uint32_t n, uint32_t i, float *o)
{
    float max = -INFINITY, sum = 0;

    for (uint32_t c = first; c < first + n; c++)
        max = fmaxf(max, part_at(s, c).max[i]);
    memset(o, 0, s->pad * sizeof *o);
    for (uint32_t c = first; c < first + n; c++) {
        struct part p = part_at(s, c);
        const float *from = p.o + (uint64_t)i * s->pad;
        float w = p.sum[i] > 0 || isnan(p.sum[i]) ? expf(p.max[i] - max) : 0;

        sum += p.sum[i] * w;
        for (uint32_t k = 0; k < s->pad && w != 0; k++)
            o[k] += w * from[k];
    }
    for (uint32_t k = 0; k < s->pad; k++)
        o[k] /= sum;
}

static void store(const struct steps *s)
{
    const struct kv_geom *geom = &s->b->p->geom;
    uint32_t group = geom->n_heads / geom->n_kv_heads, n_new = s->r->n_new, first = 0;
    float *o = s->scratch;

    for (uint32_t g = 0; g < geom->n_kv_heads; g++) {
        uint32_t n = n_parts(s, g);

        for (uint32_t i = 0; i < s->rows; i++) {
            uint64_t to = ((uint64_t)(i % n_new) * geom->n_heads + g * group + i / n_new) * s->d;

            combine(s, first, n, i, o);
            if (s->b->elem == KV_BF16)
                cpu_to_bf16(o, s->d, (uint16_t *)s->r->o + to);
            else
                memcpy((float *)s->r->o + to, o, s->d * sizeof *o);
        }
        first += n;
    }
}

static int resume_few(struct backend *b, const struct resume *r, struct larder_err *e)
{
    const struct kv_geom *geom = &b->p->geom;
    struct steps s = {.b = b,
                      .r = r,
                      .mul = cpu_of(b)->mul,
                      .d = geom->head_dim,
                      .pad = mul_padded(geom->head_dim),
                      .rows = geom->n_heads / geom->n_kv_heads * r->n_new};
    uint64_t n_items = 0, n_q;

    for (uint32_t g = 0; g < geom->n_kv_heads; g++)
        n_items += n_parts(&s, g);
    s.padded = up_to(s.rows, s.rows <= 4 ? 4 : 8); /* whole tiles of a product */
    n_q = (uint64_t)geom->n_kv_heads * s.padded * s.d;
    s.per_part = (uint64_t)s.padded * (s.pad + 2);
    s.per_worker = KEYS * (uint64_t)(s.d + s.pad + s.padded);
    s.q = cpu_scratch(cpu_of(b), n_q + n_items * s.per_part + b->n_threads * s.per_worker, e);
    if (!s.q)
        return LARDER_ENOMEM;
    s.parts = s.q + n_q;
    s.scratch = s.parts + n_items * s.per_part;
    load_queries(&s);
    pool_for(cpu_of(b)->pool, (uint32_t)n_items, step_item, &s);
    store(&s);
    return 0;
}

int cpu_resume(struct backend *b, const struct resume *r, struct larder_err *e)
{
    return r->n_new < CPU_MANY_ROWS ? resume_few(b, r, e) : cpu_resume_many(b, r, e);
}
