/* cpu_score.c - window mass, and single dot products.
 *
 * The one idea: few query rows against many keys are bound by reading the keys:
 * each key row is widened to f32 once and met by all query rows of its group. Sums run
 * over 16 fixed lanes, so every instruction set and thread count agrees. */
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "fast.h"
#include "half.h"
#include "lanes.h"
#include "mem.h"

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
