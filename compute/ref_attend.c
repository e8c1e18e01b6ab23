/* ref_attend.c - attention of backend `ref`: inside one sequence, resumed on stored
 * rows, and the window mass.
 *
 * The one idea: all three are the same thing, rows of queries against a list of
 * keys of which each row sees a range that ends with its own. Keys of a KV head are gathered
 * once into f32 panels (stored rows first, then the sequence's own); a resumed row therefore
 * computes bit for bit what the same row of one long prefill computes. */
#include "ref.h"

#include <math.h>
#include <string.h>

#include "half.h"
#include "mem.h"
#include "packed.h"

struct attention {
    ref_mul_fn *mul;
    const struct kv_geom *geom;
    const float *q;
    uint64_t q_stride;   /* rows per head of q */
    uint32_t n_rows;     /* query rows */
    uint32_t row0;       /* first one that is wanted */
    uint32_t n_keys;     /* after the stored ones; the last query row sees all of them */
    uint32_t n_blocks;   /* of REF_BLOCK rows, per query head */
    struct ref_keys *kv; /* [n_kv_heads] */
    struct ref_sight sight;
    float *scratch;
    uint64_t per_worker;
    float *o;    /* attention output, or NULL */
    float *mass; /* [n_heads][n_keys - n_rows]: window mass, or NULL */
};

static void gather_row(struct ref_keys *g, uint32_t at, const float *k, const float *v, uint32_t d,
                       uint32_t pad)
{
    float *kp = g->k + (uint64_t)(at / REF_WIDE) * d * REF_WIDE + at % REF_WIDE;

    for (uint32_t i = 0; i < d; i++)
        kp[(uint64_t)i * REF_WIDE] = k[i];
    if (v)
        memcpy(g->v + (uint64_t)at * pad, v, d * sizeof *v);
}

void ref_scale(const void *x, enum kv_dtype t, uint64_t at, uint64_t n, float scale, float *out)
{
    for (uint64_t i = 0; i < n; i++)
        out[i] = scale * (t == KV_F32 ? ((const float *)x)[at + i]
                                      : bf16_to_f32(((const uint16_t *)x)[at + i]));
}

/* d elements at `at` as f32: in place, or through `buf`. */
static const float *widened(const void *x, enum kv_dtype t, uint64_t at, uint32_t d, float *buf)
{
    if (t == KV_F32)
        return (const float *)x + at;
    for (uint32_t i = 0; i < d; i++)
        buf[i] = bf16_to_f32(((const uint16_t *)x)[at + i]);
    return buf;
}

/* Packed rows are expanded first, keys and values through one buffer. */
static int gather_packed(struct ref_keys *g, const struct past_rows *p, uint32_t d, uint32_t pad)
{
    float *x = mem_alloc((uint64_t)p->n_rows * d, sizeof *x);

    if (!x)
        return LARDER_ENOMEM;
    packed_expand_k_f32(p->dtype, p->k, p->n_rows, d, x);
    for (uint32_t i = 0; i < p->n_rows; i++)
        gather_row(g, i, x + (uint64_t)i * d, NULL, d, pad);
    packed_expand_v_f32(p->dtype, p->v, p->n_rows, d, x);
    for (uint64_t i = 0; i < p->n_rows; i++)
        memcpy(g->v + i * pad, x + i * d, d * sizeof *x);
    mem_free(x);
    return 0;
}

static int gather_past(struct ref_keys *g, const struct past_rows *p, uint32_t d, uint32_t pad,
                       float *row)
{
    g->bias = p->bias;
    g->position = p->position;
    g->n_past = p->n_rows;
    if (packed_type(p->dtype))
        return gather_packed(g, p, d, pad);
    for (uint32_t i = 0; i < p->n_rows; i++) {
        uint64_t at = (uint64_t)i * d;

        gather_row(g, i, widened(p->k, p->dtype, at, d, row),
                   widened(p->v, p->dtype, at, d, row + d), d, pad);
    }
    return 0;
}

void ref_gather_free(struct ref_keys *g, uint32_t n_kv_heads)
{
    if (!g)
        return;
    for (uint32_t i = 0; i < n_kv_heads; i++) {
        mem_free(g[i].k);
        mem_free(g[i].v);
    }
    mem_free(g);
}

static int gather_head(const struct kv_geom *geom, const struct ref_source *s, uint32_t head,
                       struct ref_keys *g)
{
    uint32_t d = geom->head_dim, pad = ref_padded(d);
    uint32_t n_past = s->past ? s->past[head].n_rows : 0;
    float *row = mem_alloc(2 * (uint64_t)d, sizeof *row);
    int rc = 0;

    g->k = mem_aligned((uint64_t)ref_padded(n_past + s->n) * d, sizeof(float));
    g->v = s->v ? mem_aligned((uint64_t)(n_past + s->n) * pad, sizeof(float)) : NULL;
    if (!row || !g->k || (s->v && !g->v)) {
        mem_free(row);
        return LARDER_ENOMEM;
    }
    if (s->past)
        rc = gather_past(g, &s->past[head], d, pad, row);
    for (uint32_t i = 0; i < s->n && !rc; i++) {
        uint64_t at = (head * s->stride + i) * d;
        const float *k = widened(s->k, s->dtype, at, d, row);
        const float *v = s->v ? widened(s->v, s->dtype, at, d, row + d) : NULL;

        gather_row(g, n_past + i, k, v, d, pad);
    }
    mem_free(row);
    return rc;
}

int ref_gather(const struct kv_geom *geom, const struct ref_source *s, struct ref_keys **ret,
               struct larder_err *e)
{
    struct ref_keys *g = mem_zalloc(geom->n_kv_heads, sizeof *g);
    int rc = g ? 0 : LARDER_ENOMEM;

    for (uint32_t h = 0; h < geom->n_kv_heads && !rc; h++)
        rc = gather_head(geom, s, h, &g[h]);
    if (rc) {
        ref_gather_free(g, geom->n_kv_heads);
        return larder_fail(e, rc, "no memory for the keys and values of one layer");
    }
    *ret = g;
    return 0;
}

uint32_t ref_sees_from(const struct ref_sight *s, const struct ref_keys *g, uint32_t own)
{
    uint32_t row = own - g->n_past, pos = s->pos0 + row, lo = 0, hi = g->n_past;

    if (!s->sliding || pos < s->sliding)
        return 0;
    if (row >= s->sliding)
        return g->n_past + sliding_from(s->sliding, row);
    while (lo < hi) { /* the first stored row near enough */
        uint32_t mid = lo + (hi - lo) / 2;

        if (g->position[mid] > pos - s->sliding)
            hi = mid;
        else
            lo = mid + 1;
    }
    return lo;
}

/* p[from..n) = softmax(x * scale + bias), zero before and up to `wide`. */
static void softmax_row(float *x, uint32_t from, uint32_t n, uint32_t wide, float scale,
                        const struct ref_keys *g)
{
    float max = -INFINITY;
    double sum = 0;

    memset(x, 0, from * sizeof *x);
    for (uint32_t j = from; j < n; j++) {
        x[j] *= scale;
        if (g->bias && j < g->n_past)
            x[j] += g->bias[j];
        /* written so that a NaN reaches the sum instead of vanishing in a maximum */
        max = x[j] > max ? x[j] : max;
    }
    for (uint32_t j = from; j < n; j++) {
        x[j] = expf(x[j] - max);
        sum += x[j];
    }
    scale = (float)(1 / sum);
    for (uint32_t j = from; j < n; j++)
        x[j] *= scale;
    memset(x + n, 0, (wide - n) * sizeof *x);
}

/* Rows row0 .. row0+n-1 of query head h: logits[n][ld] against keys 0 .. n_keys-1. */
static void logits(const struct attention *a, uint32_t h, uint32_t row, uint32_t n, uint32_t n_keys,
                   float *x, uint64_t ld)
{
    uint32_t d = a->geom->head_dim;
    const struct ref_keys *g = &a->kv[h / (a->geom->n_heads / a->geom->n_kv_heads)];
    struct ref_mul m = {a->q + (h * a->q_stride + row) * d,
                        d,
                        n,
                        g->k,
                        REF_WIDE,
                        (uint64_t)d * REF_WIDE,
                        d,
                        x,
                        ld,
                        n_keys};

    a->mul(&m);
}

/* Item: a block of query rows of one head. */
static void attend_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct attention *a = arg;
    uint32_t n_heads = a->geom->n_heads, d = a->geom->head_dim;
    uint32_t h = item % n_heads;
    uint32_t row = a->row0 + item / n_heads * REF_BLOCK;
    uint32_t n = a->n_rows - row < REF_BLOCK ? a->n_rows - row : REF_BLOCK;
    const struct ref_keys *g = &a->kv[h / (n_heads / a->geom->n_kv_heads)];
    uint32_t first = g->n_past + (a->n_keys - a->n_rows) + row + 1; /* keys the first row sees */
    uint32_t n_keys = first + n - 1;
    uint64_t ld = ref_padded(n_keys);
    float *x = a->scratch + worker * a->per_worker;
    float scale = (float)(1 / sqrt(d));

    logits(a, h, row, n, n_keys, x, ld);
    for (uint32_t i = 0; i < n; i++)
        softmax_row(x + i * ld, ref_sees_from(&a->sight, g, first + i - 1), first + i, n_keys,
                    scale, g);
    a->mul(&(struct ref_mul){x, ld, n, g->v, ref_padded(d), REF_WIDE, n_keys,
                             a->o + ((uint64_t)row * n_heads + h) * d, (uint64_t)n_heads * d, d});
}

static uint32_t longest_past(const struct kv_geom *geom, const struct ref_keys *g)
{
    uint32_t max = 0;

    for (uint32_t h = 0; h < geom->n_kv_heads; h++)
        max = g[h].n_past > max ? g[h].n_past : max;
    return max;
}

static int attend_all(struct backend *b, struct attention *a, struct larder_err *e)
{
    const struct kv_geom *geom = &b->p->geom;
    uint32_t keys = longest_past(geom, a->kv) + a->n_keys;

    a->mul = ref_of(b)->mul;
    a->geom = geom;
    a->per_worker = (uint64_t)REF_BLOCK * ref_padded(keys);
    a->scratch = ref_scratch(b, a->per_worker);
    if (!a->scratch)
        return larder_fail(e, LARDER_ENOMEM, "no memory for attention over %u keys", keys);
    a->n_blocks = (a->n_rows - a->row0 + REF_BLOCK - 1) / REF_BLOCK;
    ref_for(b, a->n_blocks * geom->n_heads, attend_item, a);
    mem_free(a->scratch);
    return 0;
}

int ref_attend(struct backend *b, const struct attend *t, struct larder_err *e)
{
    struct ref_source s = {t->k, t->v, KV_F32, t->n, t->stride, NULL};
    struct attention a = {.q = t->q,
                          .q_stride = t->stride,
                          .n_rows = t->n,
                          .row0 = t->row0,
                          .n_keys = t->n,
                          .sight = {t->sliding, 0},
                          .o = t->o};
    int rc = ref_gather(&b->p->geom, &s, &a.kv, e);

    if (!rc)
        rc = attend_all(b, &a, e);
    ref_gather_free(a.kv, b->p->geom.n_kv_heads);
    return rc;
}

int ref_resume(struct backend *b, const struct resume *r, struct larder_err *e)
{
    struct ref_source s = {r->k, r->v, KV_F32, r->n_tail, r->stride, r->past};
    struct attention a = {.q = r->q,
                          .q_stride = r->q_stride,
                          .n_rows = r->n_new,
                          .n_keys = r->n_tail,
                          .sight = {r->sliding, r->pos0},
                          .o = r->o};
    int rc = ref_gather(&b->p->geom, &s, &a.kv, e);

    if (!rc)
        rc = attend_all(b, &a, e);
    ref_gather_free(a.kv, b->p->geom.n_kv_heads);
    return rc;
}

/* ---- window mass */

/* Item: one query head; its window rows one after the other, sums in f64. */
static void window_item(void *arg, uint32_t h, uint32_t worker)
{
    const struct attention *a = arg;
    uint32_t w = a->n_rows, m = a->n_keys - w;
    uint64_t ld = ref_padded(a->n_keys);
    float *x = a->scratch + worker * a->per_worker;
    double *p = (double *)(x + ld);
    double *sum = p + ld;
    double scale = 1 / sqrt(a->geom->head_dim);

    memset(sum, 0, m * sizeof *sum);
    for (uint32_t i = 0; i < w; i++) {
        uint32_t n = m + i + 1, from = sliding_from(a->sight.sliding, m + i);
        double max = -INFINITY, total = 0;

        logits(a, h, m + i, 1, n, x, ld);
        for (uint32_t j = from; j < n; j++) {
            p[j] = x[j] * scale;
            max = p[j] > max ? p[j] : max;
        }
        for (uint32_t j = from; j < n; j++)
            total += p[j] = exp(p[j] - max);
        for (uint32_t j = from; j < m; j++)
            sum[j] += p[j] / total;
    }
    for (uint32_t j = 0; j < m; j++)
        a->mass[(uint64_t)h * m + j] = (float)sum[j];
}

int ref_window(struct backend *b, const struct window_mass *x, struct larder_err *e)
{
    const struct kv_geom *geom = &b->p->geom;
    struct ref_source s = {x->k, NULL, KV_F32, x->n, x->stride, NULL};
    struct attention a = {.mul = ref_of(b)->mul,
                          .geom = geom,
                          .q = x->q,
                          .q_stride = x->stride,
                          .n_rows = x->w,
                          .n_keys = x->n,
                          .sight = {x->sliding, 0},
                          .mass = x->mass};
    int rc = ref_gather(geom, &s, &a.kv, e);

    if (rc)
        return rc;
    a.per_worker = 5 * (uint64_t)ref_padded(x->n); /* one f32 row and two f64 rows */
    a.scratch = ref_scratch(b, a.per_worker);
    if (a.scratch)
        ref_for(b, geom->n_heads, window_item, &a);
    else
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for window scores of %u tokens", x->n);
    mem_free(a.scratch);
    ref_gather_free(a.kv, geom->n_kv_heads);
    return rc;
}
