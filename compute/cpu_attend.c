/* cpu_attend.c - attention of many rows in f32: a document, a long question, a replay.
 *
 * The one idea: a block of query rows walks over blocks of keys and keeps a running maximum,
 * sum and output, so logits never leave the cache. Stored rows and the sequence's own
 * keys are one list (ref_gather()), of which each row sees a range. Both products are
 * mul.h's. Blocks are fixed, so results do not depend on threads. */
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "mem.h"

#define ROWS 64u  /* query rows of an item */
#define KEYS 256u /* keys of a step: logits [64][256] and the keys' panels stay in L2 */

struct attention {
    struct backend *b;
    mul_fn *mul;
    const void *q;
    enum kv_dtype dtype; /* of q and o */
    uint64_t q_stride;   /* rows per head of q */
    uint32_t n_rows, row0;
    uint32_t n_keys; /* after the stored ones; the last row sees all of them */
    struct ref_keys *kv;
    struct ref_sight sight;
    void *o;
    float *scratch;
    uint64_t per_worker;
};

/* What an item works on. */
struct block {
    float *q;     /* [ROWS][d], scaled */
    float *logit; /* [ROWS][KEYS] */
    float *o;     /* [ROWS][pad] */
    float *max, *sum;
    uint32_t rows;  /* in this block */
    uint32_t first; /* keys that its first row sees */
};

static void load_queries(const struct attention *a, uint32_t h, uint32_t row, struct block *k)
{
    uint32_t d = a->b->p->geom.head_dim;

    ref_scale(a->q, a->dtype, (h * a->q_stride + row) * d, (uint64_t)k->rows * d,
              (float)(1 / sqrt(d)), k->q);
}

/* Logits of one row become weights relative to the running maximum; it sees keys from..to of
 * those of the step. */
static void soften(struct block *k, uint32_t i, const struct ref_keys *g, uint32_t at, uint32_t n,
                   uint32_t pad, uint32_t from)
{
    float *x = k->logit + (uint64_t)i * KEYS;
    uint32_t to = k->first + i > at ? k->first + i - at : 0;

    to = to < n ? to : n;
    from = from > at ? from - at : 0;
    for (uint32_t j = at + from; g->bias && j < g->n_past && j < at + to; j++)
        x[j - at] += g->bias[j];
    cpu_soften(x, n, from, to,
               &(struct cpu_running){&k->max[i], &k->sum[i], k->o + (uint64_t)i * pad, pad});
}

/* Keys at .. at + n, at a multiple of 16. */
static void step(const struct attention *a, struct block *k, const struct ref_keys *g, uint32_t at,
                 uint32_t n)
{
    uint32_t d = a->b->p->geom.head_dim, pad = mul_padded(d);

    a->mul(&(struct mul){.a = k->q,
                         .a_row = d,
                         .a_k = 1,
                         .a_panel = MUL_WIDE * d,
                         .b = g->k + (uint64_t)at * d,
                         .b_k = MUL_WIDE,
                         .b_panel = MUL_WIDE * d,
                         .c = k->logit,
                         .c_row = KEYS,
                         .c_panel = MUL_WIDE,
                         .m = k->rows,
                         .n = mul_padded(n),
                         .k = d});
    for (uint32_t i = 0; i < k->rows; i++)
        soften(k, i, g, at, n, pad, ref_sees_from(&a->sight, g, k->first + i - 1));
    a->mul(&(struct mul){.a = k->logit,
                         .a_row = KEYS,
                         .a_k = 1,
                         .a_panel = MUL_WIDE * KEYS,
                         .b = g->v + (uint64_t)at * pad,
                         .b_k = pad,
                         .b_panel = MUL_WIDE,
                         .c = k->o,
                         .c_row = pad,
                         .c_panel = MUL_WIDE,
                         .m = k->rows,
                         .n = pad,
                         .k = n,
                         .add = true});
}

static void store(const struct attention *a, uint32_t h, uint32_t row, struct block *k)
{
    uint32_t d = a->b->p->geom.head_dim, pad = mul_padded(d), n_heads = a->b->p->geom.n_heads;

    for (uint32_t i = 0; i < k->rows; i++) {
        float *o = k->o + (uint64_t)i * pad, scale = 1 / k->sum[i];
        uint64_t to = ((uint64_t)(row + i) * n_heads + h) * d;

        for (uint32_t c = 0; c < d; c++)
            o[c] *= scale;
        if (a->dtype == KV_F32)
            memcpy((float *)a->o + to, o, d * sizeof *o);
        else
            cpu_to_bf16(o, d, (uint16_t *)a->o + to);
    }
}

/* Late blocks see most keys: handing them out first evens out the end. */
static void attend_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct attention *a = arg;
    const struct kv_geom *geom = &a->b->p->geom;
    uint32_t d = geom->head_dim, pad = mul_padded(d), h = item % geom->n_heads;
    uint32_t n_blocks = (a->n_rows - a->row0 + ROWS - 1) / ROWS;
    uint32_t row = a->row0 + (n_blocks - 1 - item / geom->n_heads) * ROWS;
    const struct ref_keys *g = &a->kv[h / (geom->n_heads / geom->n_kv_heads)];
    float *at = a->scratch + worker * a->per_worker;
    struct block k = {.rows = a->n_rows - row < ROWS ? a->n_rows - row : ROWS,
                      .first = g->n_past + (a->n_keys - a->n_rows) + row + 1,
                      .q = at,
                      .logit = at + ROWS * (uint64_t)d,
                      .o = at + ROWS * (uint64_t)(d + KEYS)};
    uint32_t end = k.first + k.rows - 1;

    k.max = k.o + ROWS * (uint64_t)pad;
    k.sum = k.max + ROWS;
    load_queries(a, h, row, &k);
    memset(k.o, 0, ROWS * (uint64_t)pad * sizeof *k.o);
    for (uint32_t i = 0; i < ROWS; i++) {
        k.max[i] = -INFINITY;
        k.sum[i] = 0;
    }
    /* keys that even the first row does not see are nobody's */
    for (uint32_t j = ref_sees_from(&a->sight, g, k.first - 1) / KEYS * KEYS; j < end; j += KEYS)
        step(a, &k, g, j, end - j < KEYS ? end - j : KEYS);
    store(a, h, row, &k);
}

static int attend(struct attention *a, const struct ref_source *s, struct larder_err *e)
{
    const struct kv_geom *geom = &a->b->p->geom;
    uint32_t n_blocks = (a->n_rows - a->row0 + ROWS - 1) / ROWS;
    int rc = ref_gather(geom, s, &a->kv, e);

    if (rc)
        return rc;
    a->mul = mul_pick();
    a->dtype = a->b->elem;
    a->per_worker = ROWS * (uint64_t)(geom->head_dim + KEYS + mul_padded(geom->head_dim) + 2);
    a->scratch = mem_aligned(a->per_worker * a->b->n_threads, sizeof *a->scratch);
    if (a->scratch)
        pool_for(cpu_of(a->b)->pool, n_blocks * geom->n_heads, attend_item, a);
    else
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for attention over %u tokens", a->n_keys);
    mem_free(a->scratch);
    ref_gather_free(a->kv, geom->n_kv_heads);
    return rc;
}

int cpu_attend_f32(struct backend *b, const struct attend *t, struct larder_err *e)
{
    struct ref_source s = {t->k, t->v, b->elem, t->n, t->stride, NULL};
    struct attention a = {.b = b,
                          .q = t->q,
                          .q_stride = t->stride,
                          .n_rows = t->n,
                          .row0 = t->row0,
                          .n_keys = t->n,
                          .sight = {t->sliding, 0},
                          .o = t->o};

    return attend(&a, &s, e);
}

int cpu_resume_many(struct backend *b, const struct resume *r, struct larder_err *e)
{
    struct ref_source s = {r->k, r->v, b->elem, r->n_tail, r->stride, r->past};
    struct attention a = {.b = b,
                          .q = r->q,
                          .q_stride = r->q_stride,
                          .n_rows = r->n_new,
                          .n_keys = r->n_tail,
                          .sight = {r->sliding, r->pos0},
                          .o = r->o};

    return attend(&a, &s, e);
}
