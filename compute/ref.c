/* ref.c - backend `ref`: plain C in f32, the oracle that other backends are compared with.
 *
 * The one idea: every step is written as its formula; speed comes only from one
 * register-tiled product (ref_mul.c) and from giving blocks of rows to threads.
 * RoPE angles are f64, sums of norms and softmax are f64. It computes in f32 only
 * and says so when bf16 is asked for. */
#include "ref.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "mem.h"

#define MAX_THREADS 256u

/* ---- work on threads */

struct crew {
    backend_item_fn *fn;
    void *arg;
    uint32_t n;
    atomic_uint next;
};

struct crew_member {
    struct crew *crew;
    uint32_t worker;
};

static void *crew_run(void *arg)
{
    struct crew_member *m = arg;
    uint32_t i;

    while ((i = atomic_fetch_add(&m->crew->next, 1)) < m->crew->n)
        m->crew->fn(m->crew->arg, i, m->worker);
    return NULL;
}

/* Items are independent, so who computes which changes nothing; a thread that cannot
 * be started leaves its items to the others. */
void ref_for(struct backend *b, uint32_t n, backend_item_fn *fn, void *arg)
{
    struct crew crew = {.fn = fn, .arg = arg, .n = n};
    struct crew_member member[MAX_THREADS];
    pthread_t thread[MAX_THREADS];
    uint32_t want = n < b->n_threads ? n : b->n_threads;
    uint32_t n_started = 0;

    for (uint32_t i = 1; i < want; i++) {
        member[i] = (struct crew_member){&crew, i};
        if (pthread_create(&thread[n_started], NULL, crew_run, &member[i]))
            break;
        n_started++;
    }
    member[0] = (struct crew_member){&crew, 0};
    crew_run(&member[0]);
    for (uint32_t i = 0; i < n_started; i++)
        pthread_join(thread[i], NULL);
}

float *ref_scratch(const struct backend *b, uint64_t per_worker)
{
    return mem_aligned(per_worker * b->n_threads, sizeof(float));
}

static uint32_t thread_count(uint32_t asked)
{
    cpu_set_t set;
    uint32_t n = 1;

    if (asked)
        return asked < MAX_THREADS ? asked : MAX_THREADS;
    if (!sched_getaffinity(0, sizeof set, &set))
        n = (uint32_t)CPU_COUNT(&set);
    return n < MAX_THREADS ? n : MAX_THREADS;
}

/* ---- row-wise formulas */

void ref_rmsnorm(const float *x, const float *w, uint32_t n, double eps, float *out)
{
    double sum = 0;
    float scale;

    for (uint32_t i = 0; i < n; i++)
        sum += (double)x[i] * x[i];
    scale = (float)(1 / sqrt(sum / n + eps));
    for (uint32_t i = 0; i < n; i++)
        out[i] = x[i] * scale * w[i];
}

/* Rotate-half: (a, b) -> (a cos - b sin, b cos + a sin), b half of the dims above a. */
static void rope(float *x, uint32_t dims, const float *cosine, const float *sine)
{
    uint32_t half = dims / 2;

    for (uint32_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];

        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

/* ---- qkv */

struct qkv_work {
    struct backend *b;
    const struct layer *l;
    const struct project *r;
    float *scratch;
    uint64_t per_worker;
};

static void scatter_row(const struct qkv_work *w, uint32_t row, float *x, float *trig)
{
    const struct model_params *p = w->b->p;
    uint32_t d = p->geom.head_dim, half = p->rope_dims / 2;
    uint32_t n_heads = p->geom.n_heads, n_kv = p->geom.n_kv_heads;
    const struct ref_extras *extras = &w->l->extras;

    for (uint32_t i = 0; extras->bias && i < (n_heads + 2 * n_kv) * d; i++)
        x[i] += extras->bias[i];
    rope_angles(w->r->rope, p->rope_dims, w->r->pos[row], trig, trig + half);
    for (uint32_t h = 0; h < n_heads + 2 * n_kv; h++, x += d) {
        bool is_q = h < n_heads, is_k = !is_q && h < n_heads + n_kv;
        float *to = is_q ? w->r->q : is_k ? w->r->k : w->r->v;
        const float *norm = is_q ? extras->q_norm : is_k ? extras->k_norm : NULL;
        uint64_t head = is_q ? h : is_k ? h - n_heads : h - n_heads - n_kv;

        if (norm)
            ref_rmsnorm(x, norm, d, p->norm_eps, x);
        if (is_q || is_k)
            rope(x, p->rope_dims, trig, trig + half);
        memcpy(to + (head * w->r->stride + row) * d, x, d * sizeof *x);
    }
}

static void qkv_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct qkv_work *w = arg;
    const struct model_params *p = w->b->p;
    uint32_t row = item * REF_BLOCK;
    uint32_t n = w->r->n - row < REF_BLOCK ? w->r->n - row : REF_BLOCK;
    uint32_t n_out = w->l->qkv.n_out;
    float *x = w->scratch + worker * w->per_worker;
    float *y = x + (uint64_t)REF_BLOCK * p->n_hidden;
    float *trig = y + (uint64_t)REF_BLOCK * n_out;
    struct ref_mul m = ref_by(&w->l->qkv, x, p->n_hidden, n, y, n_out);

    for (uint32_t i = 0; i < n; i++)
        ref_rmsnorm(w->r->hidden + (uint64_t)(row + i) * p->n_hidden, w->l->attn_norm, p->n_hidden,
                    p->norm_eps, x + (uint64_t)i * p->n_hidden);
    ref_of(w->b)->mul(&m);
    for (uint32_t i = 0; i < n; i++)
        scatter_row(w, row + i, y + (uint64_t)i * n_out, trig);
}

static int ref_qkv(struct backend *b, const struct layer *l, const struct project *r,
                   struct larder_err *e)
{
    struct qkv_work w = {b, l, r, NULL, 0};

    w.per_worker = (uint64_t)REF_BLOCK * (b->p->n_hidden + l->qkv.n_out) + b->p->rope_dims;
    w.scratch = ref_scratch(b, w.per_worker);
    if (!w.scratch)
        return larder_fail(e, LARDER_ENOMEM, "no memory to project %u tokens", r->n);
    ref_for(b, (r->n + REF_BLOCK - 1) / REF_BLOCK, qkv_item, &w);
    mem_free(w.scratch);
    return 0;
}

/* ---- finish */

struct finish_work {
    struct backend *b;
    const struct layer *l;
    float *hidden;
    const float *o;
    uint32_t n;
    float *scratch;
    uint64_t per_worker;
};

static void add(float *to, const float *x, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        to[i] += x[i];
}

/* gate = silu(gate) * up */
static void silu_times(float *gate, const float *up, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

static void finish_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct finish_work *w = arg;
    const struct model_params *p = w->b->p;
    ref_mul_fn *mul = ref_of(w->b)->mul;
    uint32_t row = item * REF_BLOCK, n_hidden = p->n_hidden, n_ff = p->n_ff;
    uint32_t n = w->n - row < REF_BLOCK ? w->n - row : REF_BLOCK;
    uint32_t n_o = w->l->o.n_in;
    float *h = w->hidden + (uint64_t)row * n_hidden;
    float *x = w->scratch + worker * w->per_worker;
    float *gate = x + (uint64_t)REF_BLOCK * n_hidden;
    float *up = gate + (uint64_t)REF_BLOCK * n_ff;
    struct ref_mul m;

    m = ref_by(&w->l->o, w->o + (uint64_t)row * n_o, n_o, n, x, n_hidden);
    mul(&m);
    add(h, x, (uint64_t)n * n_hidden);
    for (uint32_t i = 0; i < n; i++)
        ref_rmsnorm(h + (uint64_t)i * n_hidden, w->l->ffn_norm, n_hidden, p->norm_eps,
                    x + (uint64_t)i * n_hidden);
    m = ref_by(&w->l->gate, x, n_hidden, n, gate, n_ff);
    mul(&m);
    m = ref_by(&w->l->up, x, n_hidden, n, up, n_ff);
    mul(&m);
    silu_times(gate, up, (uint64_t)n * n_ff);
    m = ref_by(&w->l->down, gate, n_ff, n, x, n_hidden);
    mul(&m);
    add(h, x, (uint64_t)n * n_hidden);
}

static int ref_finish(struct backend *b, const struct layer *l, float *hidden, const void *o,
                      uint32_t n, struct larder_err *e)
{
    struct finish_work w = {b, l, hidden, o, n, NULL, 0};

    w.per_worker = (uint64_t)REF_BLOCK * (b->p->n_hidden + 2 * (uint64_t)b->p->n_ff);
    w.scratch = ref_scratch(b, w.per_worker);
    if (!w.scratch)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the MLP of %u tokens", n);
    ref_for(b, (n + REF_BLOCK - 1) / REF_BLOCK, finish_item, &w);
    mem_free(w.scratch);
    return 0;
}

/* ---- open and close */

static int ref_open(struct backend **ret, const struct model *m, const struct backend_opts *o,
                    struct larder_err *e)
{
    struct ref_backend *b;
    const char *isa;

    if (o->dtype != KV_F32)
        return larder_fail(e, LARDER_EBACKEND,
                           "backend ref computes in f32 only; ask for f32 or for another backend");
    b = mem_zalloc(1, sizeof *b);
    if (!b)
        return larder_fail(e, LARDER_ENOMEM, "no memory for backend ref");
    b->mul = ref_mul_pick(&isa);
    b->base.ops = &backend_ref;
    b->base.model = m;
    b->base.p = model_params(m);
    b->base.elem = KV_F32;
    b->base.n_threads = thread_count(o->n_threads);
    snprintf(b->base.isa, sizeof b->base.isa, "%s", isa);
    *ret = &b->base;
    return 0;
}

static void ref_close(struct backend *b)
{
    mem_free(b);
}

const struct backend_ops backend_ref = {
    .name = "ref",
    .open = ref_open,
    .close = ref_close,
    .layer_load = ref_layer_load,
    .layer_free = ref_layer_free,
    .qkv = ref_qkv,
    .attend = ref_attend,
    .finish = ref_finish,
    .window = ref_window,
    .resume = ref_resume,
    .logits = ref_logits,
    .head_load = ref_head_load,
    .head_free = ref_head_free,
    .parallel = ref_for,
};
