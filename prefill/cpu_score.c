/* cpu_score.c - window mass, and new rows on stored ones.
 *
 * The one idea: both are few query rows against many keys, bound by reading the keys:
 * each key row is widened to f32 once and met by all query rows of its group. Sums run
 * over 16 fixed lanes, so every instruction set and thread count agrees. */
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "fast.h"
#include "half.h"
#include "lanes.h"
#include "mem.h"
#include "packed.h"

#define BODY static inline __attribute__((always_inline, optimize("O3", "fp-contract=off")))

typedef uint32_t half_bits __attribute__((vector_size(32)));
typedef uint16_t half_bf16 __attribute__((vector_size(16), aligned(2), may_alias));

BODY void widen_lanes(const uint16_t *x, half_lanes *out)
{
    *out = (half_lanes)(__builtin_convertvector(*(const half_bf16 *)x, half_bits) << 16);
}

FAST static float dot(const float *a, const float *b, uint32_t d)
{
    half_lanes lo = {0}, hi = {0};
    uint32_t i = 0;
    float sum;

    for (; i + LANES <= d; i += LANES) {
        lo += *(const half_lanes *)(a + i) * *(const half_lanes *)(b + i);
        hi += *(const half_lanes *)(a + i + LANES / 2) * *(const half_lanes *)(b + i + LANES / 2);
    }
    sum = sum_lanes(&lo, &hi);
    for (; i < d; i++)
        sum += a[i] * b[i];
    return sum;
}

FAST static void axpy(float a, const float *restrict x, uint32_t d, float *restrict y)
{
    uint32_t i = 0;

    for (; i + LANES / 2 <= d; i += LANES / 2)
        *(half_lanes *)(y + i) += a * *(const half_lanes *)(x + i);
    for (; i < d; i++)
        y[i] += a * x[i];
}

FAST static float dot_bf16(const uint16_t *a, const float *b, uint32_t d)
{
    half_lanes lo = {0}, hi = {0}, x, y;
    uint32_t i = 0;
    float sum;

    for (; i + LANES <= d; i += LANES) {
        widen_lanes(a + i, &x);
        widen_lanes(a + i + LANES / 2, &y);
        lo += x * *(const half_lanes *)(b + i);
        hi += y * *(const half_lanes *)(b + i + LANES / 2);
    }
    sum = sum_lanes(&lo, &hi);
    for (; i < d; i++)
        sum += bf16_to_f32(a[i]) * b[i];
    return sum;
}

float cpu_dot(const void *rows, enum kv_dtype t, uint64_t at, const float *x, uint32_t n)
{
    return t == KV_F32 ? dot((const float *)rows + at, x, n)
                       : dot_bf16((const uint16_t *)rows + at, x, n);
}

/* n elements at `at` as f32; f32 rows are used in place. */
static const float *widen(const void *rows, enum kv_dtype t, uint64_t at, uint32_t n, float *buf)
{
    if (t == KV_F32)
        return (const float *)rows + at;
    cpu_to_f32((const uint16_t *)rows + at, n, buf);
    return buf;
}

/* ---- window mass */

struct window {
    struct backend *b;
    const struct window_mass *x;
    float *scratch; /* [n_threads][per_worker] */
    uint64_t per_worker;
};

/* One KV head: its keys in panels, then each query head's window in one product. */
static void window_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct window *s = arg;
    const struct window_mass *x = s->x;
    const struct model_params *p = s->b->p;
    uint32_t d = p->geom.head_dim, group = p->geom.n_heads / p->geom.n_kv_heads, g = item / group;
    uint32_t m = x->n - x->w, wide = ref_padded(x->n);
    float *panel = s->scratch + worker * s->per_worker;
    float *q = panel + (uint64_t)wide * d, *logit = q + (uint64_t)x->w * d,
          *row = logit + (uint64_t)x->w * wide;
    float *mass = x->mass + (uint64_t)item * m, scale = (float)(1 / sqrt(d));
    struct ref_mul mul = {q, d,     x->w, panel, REF_WIDE, (uint64_t)d * REF_WIDE,
                          d, logit, wide, x->n};

    for (uint32_t j = 0; j < x->n; j++) {
        const float *k = widen(x->k, s->b->elem, ((uint64_t)g * x->stride + j) * d, d, row);
        float *to = panel + (uint64_t)(j / REF_WIDE) * d * REF_WIDE + j % REF_WIDE;

        for (uint32_t i = 0; i < d; i++)
            to[(uint64_t)i * REF_WIDE] = k[i];
    }
    for (uint32_t i = 0; i < x->w; i++) {
        const float *from =
            widen(x->q, s->b->elem, ((uint64_t)item * x->stride + m + i) * d, d, row);

        for (uint32_t c = 0; c < d; c++)
            q[(uint64_t)i * d + c] = from[c] * scale;
    }
    ref_of(s->b)->mul(&mul);
    memset(mass, 0, m * sizeof *mass);
    for (uint32_t i = 0; i < x->w; i++) {
        uint32_t from = sliding_from(x->sliding, m + i), seen = m + i + 1 - from;
        float *l = logit + (uint64_t)i * wide + from;
        float sum = cpu_softmax_exp(l, seen, seen, cpu_max(l, seen));

        if (from < m)
            axpy(1 / sum, l, m - from, mass + from);
    }
}

int cpu_window(struct backend *b, const struct window_mass *x, struct larder_err *e)
{
    uint32_t d = b->p->geom.head_dim, wide = ref_padded(x->n);
    struct window s = {.b = b, .x = x};

    s.per_worker = (uint64_t)wide * d + (uint64_t)x->w * (d + wide) + wide + d;
    s.scratch = mem_aligned(s.per_worker * b->n_threads, sizeof *s.scratch);
    if (!s.scratch)
        return larder_fail(e, LARDER_ENOMEM, "no memory for window scores of %u tokens", x->n);
    pool_for(cpu_of(b)->pool, b->p->geom.n_heads, window_item, &s);
    mem_free(s.scratch);
    return 0;
}

/* ---- resumed rows */

struct resumed {
    struct backend *b;
    const struct resume *r;
    float *scratch;
    uint64_t per_worker, max_keys;
};

/* logits[rows][max_keys] of all query rows of the group against one run of keys. */
static void logits_of(const struct resumed *x, const void *k, enum kv_dtype t, uint64_t at,
                      uint32_t n_keys, const float *q, uint32_t rows, uint32_t first, float *logit,
                      float *buf)
{
    uint32_t d = x->b->p->geom.head_dim;

    for (uint32_t j = 0; j < n_keys; j++) {
        const float *kj = widen(k, t, at + (uint64_t)j * d, d, buf);

        for (uint32_t i = 0; i < rows; i++)
            logit[i * x->max_keys + first + j] = dot(q + (uint64_t)i * d, kj, d);
    }
}

static void values_of(const struct resumed *x, const void *v, enum kv_dtype t, uint64_t at,
                      uint32_t n_keys, const float *p, uint32_t rows, uint32_t first, float *o,
                      float *buf)
{
    uint32_t d = x->b->p->geom.head_dim;

    for (uint32_t j = 0; j < n_keys; j++) {
        const float *vj = widen(v, t, at + (uint64_t)j * d, d, buf);

        for (uint32_t i = 0; i < rows; i++)
            axpy(p[i * x->max_keys + first + j], vj, d, o + (uint64_t)i * d);
    }
}

/* Probabilities of row i (of the group: query head i / n_new, new row i % n_new). */
static void soften(const struct resumed *x, uint32_t i, const struct past_rows *past, float *l)
{
    const struct resume *r = x->r;
    uint32_t end = past->n_rows + r->n_tail - r->n_new + i % r->n_new + 1;
    uint32_t all = past->n_rows + r->n_tail;
    const struct ref_keys keys = {.n_past = past->n_rows, .position = past->position};
    uint32_t from = ref_sees_from(&(struct ref_sight){r->sliding, r->pos0}, &keys, end - 1);
    uint32_t seen = end - from;
    float sum;

    for (uint32_t j = 0; past->bias && j < past->n_rows; j++)
        l[j] += past->bias[j];
    sum = cpu_softmax_exp(l + from, seen, all - from, cpu_max(l + from, seen));
    for (uint32_t j = from; j < end; j++)
        l[j] /= sum;
    memset(l, 0, from * sizeof *l);
}

/* One KV head with all query rows of its group. */
static void resume_item(void *arg, uint32_t g, uint32_t worker)
{
    const struct resumed *x = arg;
    const struct resume *r = x->r;
    const struct kv_geom *geom = &x->b->p->geom;
    const struct past_rows *past = &r->past[g];
    uint32_t d = geom->head_dim, group = geom->n_heads / geom->n_kv_heads, rows = group * r->n_new;
    float *q = x->scratch + worker * x->per_worker, *o = q + (uint64_t)rows * d;
    float *l = o + (uint64_t)rows * d, *buf = l + rows * x->max_keys;
    float scale = (float)(1 / sqrt(d));
    uint64_t tail = (uint64_t)g * r->stride * d;

    for (uint32_t i = 0; i < rows; i++) {
        uint64_t at = ((uint64_t)(g * group + i / r->n_new) * r->q_stride + i % r->n_new) * d;
        const float *from = widen(r->q, x->b->elem, at, d, buf);

        for (uint32_t c = 0; c < d; c++)
            q[(uint64_t)i * d + c] = from[c] * scale;
    }
    if (packed_type(past->dtype))
        cpu_packed_logits(past, d, q, rows, l, x->max_keys, buf);
    else
        logits_of(x, past->k, past->dtype, 0, past->n_rows, q, rows, 0, l, buf);
    logits_of(x, r->k, x->b->elem, tail, r->n_tail, q, rows, past->n_rows, l, buf);
    memset(o, 0, (uint64_t)rows * d * sizeof *o);
    for (uint32_t i = 0; i < rows; i++)
        soften(x, i, past, l + i * x->max_keys);
    if (packed_type(past->dtype))
        cpu_packed_values(past, d, l, rows, x->max_keys, o, buf);
    else
        values_of(x, past->v, past->dtype, 0, past->n_rows, l, rows, 0, o, buf);
    values_of(x, r->v, x->b->elem, tail, r->n_tail, l, rows, past->n_rows, o, buf);
    for (uint32_t i = 0; i < rows; i++) {
        uint64_t to = ((uint64_t)(i % r->n_new) * geom->n_heads + g * group + i / r->n_new) * d;

        if (x->b->elem == KV_BF16)
            cpu_to_bf16(o + (uint64_t)i * d, d, (uint16_t *)r->o + to);
        else
            memcpy((float *)r->o + to, o + (uint64_t)i * d, d * sizeof *o);
    }
}

int cpu_resume(struct backend *b, const struct resume *r, struct larder_err *e)
{
    const struct kv_geom *geom = &b->p->geom;
    uint32_t rows = geom->n_heads / geom->n_kv_heads * r->n_new;
    struct resumed x = {.b = b, .r = r};

    if (r->n_new >= (packed_type(r->past->dtype) ? CPU_MANY_PACKED : CPU_MANY_ROWS))
        return cpu_resume_many(b, r, e);
    for (uint32_t g = 0; g < geom->n_kv_heads; g++)
        x.max_keys = r->past[g].n_rows > x.max_keys ? r->past[g].n_rows : x.max_keys;
    x.max_keys += r->n_tail;
    x.per_worker = 2ull * rows * geom->head_dim + rows * x.max_keys + /* q, o, l, buf */
                   cpu_packed_floats(geom->head_dim, rows);
    x.scratch = mem_aligned(x.per_worker * b->n_threads, sizeof *x.scratch);
    if (!x.scratch)
        return larder_fail(e, LARDER_ENOMEM, "no memory to attend to %llu rows",
                           (unsigned long long)x.max_keys);
    pool_for(cpu_of(b)->pool, geom->n_kv_heads, resume_item, &x);
    mem_free(x.scratch);
    return 0;
}
