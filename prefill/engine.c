/* engine.c - layer-major prefill: which rows go through which layer, and which stay.
 *
 * The one idea: a pass is a list of rows (their hidden states, their positions) that
 * goes through the layers one at a time; after a layer the list may shrink, once.
 * Rows leave for the sink before that, from the complete K and V of the layer, so
 * pruning the cache never changes the prefill itself. Two-pass policies run a
 * scoring pass first and then an ordinary pass over the chosen tokens. */
#include "engine.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include "half.h"
#include "mem.h"
#include "pack.h"
#include "select.h"

/* Per-layer scores of the rankable rows. */
struct scores {
    float *mass;     /* [n_heads][m] */
    double *head;    /* [n_kv_heads][m] */
    double *token;   /* [m] */
    uint32_t *order; /* [m] */
};

struct run {
    struct backend *b;
    const struct model_params *p;
    const struct policy *policy;
    const struct engine_sink *sink; /* NULL: rows are not collected */
    const char *pass;
    uint32_t n0;           /* rows at the start */
    uint32_t n;            /* rows now */
    uint32_t m;            /* of these, rankable (before the window) */
    uint32_t stride;       /* row capacity per head */
    uint32_t rows, select; /* the budgets in rows */
    float *hidden;
    uint32_t *pos;      /* rotation positions */
    uint32_t *original; /* positions in the document */
    void *q, *k, *v, *o;
    struct scores s;
    uint32_t **rank; /* ring of l_obs rank vectors, ASL only */
    double first_variance;
    uint32_t *keep;          /* [n_kv_heads][rows] */
    void *keep_k, *keep_v;   /* gathered rows of one layer */
    uint32_t *keep_pos;      /* [n_kv_heads][rows] */
    struct kept_rows *heads; /* [n_kv_heads] */
    enum kv_dtype precision; /* of the rows that the sink gets */
    struct packer packer;
    struct variance_point *trace;
    uint32_t n_trace;
    int32_t sel_layer;
    bool chose; /* s.order is the choice of a scoring pass */
    double load_ms;
};

static double now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static int no_memory(struct larder_err *e, uint32_t n)
{
    return larder_fail(e, LARDER_ENOMEM, "no memory to prefill %u tokens", n);
}

/* ---- buffers */

static void run_done(struct run *r)
{
    mem_free(r->hidden);
    mem_free(r->pos);
    mem_free(r->original);
    mem_free(r->q);
    mem_free(r->k);
    mem_free(r->v);
    mem_free(r->o);
    mem_free(r->s.mass);
    mem_free(r->s.head);
    mem_free(r->s.token);
    mem_free(r->s.order);
    for (uint32_t i = 0; r->rank && i < r->policy->l_obs; i++)
        mem_free(r->rank[i]);
    mem_free(r->rank);
    mem_free(r->keep);
    mem_free(r->keep_k);
    mem_free(r->keep_v);
    mem_free(r->keep_pos);
    mem_free(r->heads);
    packer_done(&r->packer);
    mem_free(r->trace);
}

static bool alloc_rows(struct run *r)
{
    const struct kv_geom *g = &r->p->geom;
    uint64_t elem = (uint64_t)kv_dtype_bytes(r->b->elem) * g->head_dim;
    uint64_t per_head = (uint64_t)r->stride * elem;

    r->hidden = mem_aligned((uint64_t)r->n0 * r->p->n_hidden, sizeof *r->hidden);
    r->pos = mem_alloc(r->n0, sizeof *r->pos);
    r->original = mem_alloc(r->n0, sizeof *r->original);
    r->q = mem_aligned(g->n_heads, per_head);
    r->k = mem_aligned(g->n_kv_heads, per_head);
    r->v = mem_aligned(g->n_kv_heads, per_head);
    r->o = mem_aligned(g->n_heads, per_head);
    r->heads = mem_zalloc(g->n_kv_heads, sizeof *r->heads);
    return r->hidden && r->pos && r->original && r->q && r->k && r->v && r->o && r->heads;
}

static bool alloc_scores(struct run *r)
{
    const struct kv_geom *g = &r->p->geom;
    uint32_t m = r->m;

    r->s.mass = mem_alloc((uint64_t)g->n_heads * m, sizeof *r->s.mass);
    r->s.head = mem_alloc((uint64_t)g->n_kv_heads * m, sizeof *r->s.head);
    r->s.token = mem_alloc(m, sizeof *r->s.token);
    r->s.order = mem_alloc(m, sizeof *r->s.order);
    r->trace = mem_alloc(g->n_layers, sizeof *r->trace);
    return r->s.mass && r->s.head && r->s.token && r->s.order && r->trace;
}

static bool alloc_ranks(struct run *r)
{
    if (!policy_is_adaptive(r->policy) || !r->m)
        return true;
    r->rank = mem_zalloc(r->policy->l_obs, sizeof *r->rank);
    for (uint32_t i = 0; r->rank && i < r->policy->l_obs; i++) {
        r->rank[i] = mem_alloc(r->m, sizeof **r->rank);
        if (!r->rank[i])
            return false;
    }
    return r->rank;
}

static bool alloc_keep(struct run *r)
{
    const struct kv_geom *g = &r->p->geom;
    uint64_t n = (uint64_t)g->n_kv_heads * r->rows;
    uint64_t bytes = (uint64_t)kv_dtype_bytes(r->b->elem) * g->head_dim;

    if (!r->sink || !r->sink->layer || r->rows >= r->n0)
        return true;
    r->keep = mem_alloc(n, sizeof *r->keep);
    r->keep_pos = mem_alloc(n, sizeof *r->keep_pos);
    r->keep_k = mem_aligned(n, bytes);
    r->keep_v = mem_aligned(n, bytes);
    return r->keep && r->keep_pos && r->keep_k && r->keep_v;
}

/* Hidden states of ids[], which sit at rotation positions 0.. . */
static int embed(struct run *r, const uint32_t *ids, const uint32_t *original, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < r->n0 && !rc; i++) {
        r->pos[i] = i;
        r->original[i] = original ? original[i] : i;
        rc = model_read_f32(r->b->model, 0, MODEL_EMBED, ids[i], 1,
                            r->hidden + (uint64_t)i * r->p->n_hidden, e);
    }
    return rc;
}

/* n rows; `m` of them can be dropped, which needs scores. */
static int run_init(struct run *r, uint32_t n, uint32_t m, struct larder_err *e)
{
    r->n0 = r->n = n;
    r->m = m;
    r->stride = (n + 15) / 16 * 16;
    r->sel_layer = -1;
    if (!alloc_rows(r) || !alloc_scores(r) || !alloc_ranks(r) || !alloc_keep(r))
        return no_memory(e, n);
    return 0;
}

/* ---- scores of one layer */

static int score_heads(struct run *r, struct larder_err *e)
{
    const struct kv_geom *g = &r->p->geom;
    const struct policy *p = r->policy;
    int rc = r->b->ops->window(r->b, r->q, r->k, r->n, r->stride, p->n_obs, r->s.mass, e);

    if (rc)
        return rc;
    return select_head_scores(r->s.mass, g->n_heads, g->n_kv_heads, r->m, p->pool_kernel, p->pool,
                              r->s.head, e);
}

static int order_tokens(struct run *r, struct larder_err *e)
{
    select_token_scores(r->s.head, r->p->geom.n_kv_heads, r->m, r->s.token);
    return select_order(r->s.token, r->m, r->s.order, e);
}

/* Tokens of the prefix that a cut passes on. */
static uint32_t n_chosen(const struct run *r)
{
    uint32_t n = r->select < r->n ? r->select : r->n;

    return n - (r->n - r->m);
}

/* One step of the adaptive choice; *ret_cut when this layer is the selection layer. */
static int test_layer(struct run *r, uint32_t layer, bool *ret_cut, struct larder_err *e)
{
    const struct policy *p = r->policy;
    struct variance_point v = {.layer = layer, .ratio = 1};
    int rc;

    rc = order_tokens(r, e);
    if (rc)
        return rc;
    select_rank(r->s.order, r->m, r->rank[layer % p->l_obs]);
    if (layer < p->l_min)
        return 0;
    v.value = select_variance((const uint32_t *const *)r->rank, p->l_obs, r->m, n_chosen(r), NULL);
    if (layer == p->l_min)
        r->first_variance = v.value;
    else
        v.ratio = select_ratio(v.value, r->first_variance);
    r->trace[r->n_trace++] = v;
    *ret_cut = v.ratio < p->tau;
    return 0;
}

/* Does the choice of a cut look at this layer? Adaptive: the first comparison, at l_min,
 * looks back over l_obs layers. */
static bool is_candidate(const struct run *r, uint32_t layer)
{
    const struct policy *p = r->policy;

    if (!r->m || r->sel_layer >= 0)
        return false;
    if (policy_is_adaptive(p))
        return layer + p->l_obs > p->l_min;
    return p->cut == CUT_FIXED && layer == p->layer;
}

/* Decide whether rows are cut after this candidate layer; s.order then ranks them. */
static int choose_cut(struct run *r, uint32_t layer, bool *ret_cut, struct larder_err *e)
{
    if (policy_is_adaptive(r->policy))
        return test_layer(r, layer, ret_cut, e);
    *ret_cut = true;
    return order_tokens(r, e);
}

/* ---- rows for the sink */

static void gather(struct run *r, const uint32_t *keep, uint32_t n_rows, uint32_t head)
{
    uint64_t bytes = (uint64_t)kv_dtype_bytes(r->b->elem) * r->p->geom.head_dim;
    const uint8_t *k = (const uint8_t *)r->k + (uint64_t)head * r->stride * bytes;
    const uint8_t *v = (const uint8_t *)r->v + (uint64_t)head * r->stride * bytes;
    uint8_t *to_k = (uint8_t *)r->keep_k + (uint64_t)head * r->rows * bytes;
    uint8_t *to_v = (uint8_t *)r->keep_v + (uint64_t)head * r->rows * bytes;
    uint32_t *to_pos = r->keep_pos + (uint64_t)head * r->rows;

    for (uint32_t i = 0; i < n_rows; i++) {
        memcpy(to_k + i * bytes, k + keep[i] * bytes, bytes);
        memcpy(to_v + i * bytes, v + keep[i] * bytes, bytes);
        to_pos[i] = r->original[keep[i]];
    }
    r->heads[head] = (struct kept_rows){n_rows, to_pos, to_k, to_v, NULL, r->b->elem};
}

/* The best rows of each KV head by its own scores, and the window. */
static int keep_best(struct run *r, struct larder_err *e)
{
    uint32_t w = r->n - r->m, k = r->rows - w;
    uint32_t *order = mem_alloc(r->m, sizeof *order);
    int rc = order ? 0 : no_memory(e, r->n);

    for (uint32_t g = 0; g < r->p->geom.n_kv_heads && !rc; g++) {
        uint32_t *keep = r->keep + (uint64_t)g * r->rows;

        rc = select_order(r->s.head + (uint64_t)g * r->m, r->m, order, e);
        if (rc)
            break;
        select_top(order, k, keep);
        for (uint32_t i = 0; i < w; i++)
            keep[k + i] = r->m + i;
        gather(r, keep, r->rows, g);
    }
    mem_free(order);
    return rc;
}

static void keep_all(struct run *r)
{
    uint64_t head = (uint64_t)r->stride * r->p->geom.head_dim * kv_dtype_bytes(r->b->elem);

    for (uint32_t g = 0; g < r->p->geom.n_kv_heads; g++)
        r->heads[g] = (struct kept_rows){
            r->n, r->original, (const uint8_t *)r->k + g * head, (const uint8_t *)r->v + g * head,
            NULL, r->b->elem};
}

static int emit(struct run *r, uint32_t layer, struct larder_err *e)
{
    int rc = 0;

    if (!r->sink || !r->sink->layer)
        return 0;
    if (r->n > r->rows)
        rc = keep_best(r, e);
    else
        keep_all(r);
    if (!rc)
        rc = packer_layer(&r->packer, &r->p->geom, r->precision, r->heads, e);
    return rc ? rc : r->sink->layer(r->sink->arg, layer, r->heads, e);
}

/* ---- the cut */

/* The chosen prefix tokens and the window, ascending indices of the present rows. */
static void chosen_rows(const struct run *r, uint32_t *rows)
{
    uint32_t k = n_chosen(r);

    select_top(r->s.order, k, rows);
    for (uint32_t i = r->m; i < r->n; i++)
        rows[k++] = i;
}

static int cut(struct run *r, uint32_t layer, struct larder_err *e)
{
    uint32_t n = n_chosen(r) + r->n - r->m;
    uint32_t *rows = mem_alloc(n, sizeof *rows);

    if (!rows)
        return no_memory(e, r->n);
    chosen_rows(r, rows);
    for (uint32_t i = 0; i < n; i++) { /* rows[i] >= i: moving down in place */
        memmove(r->hidden + (uint64_t)i * r->p->n_hidden,
                r->hidden + (uint64_t)rows[i] * r->p->n_hidden, r->p->n_hidden * sizeof *r->hidden);
        r->pos[i] = r->pos[rows[i]];
        r->original[i] = r->original[rows[i]];
    }
    mem_free(rows);
    r->m -= r->n - n;
    r->n = n;
    r->sel_layer = (int32_t)layer;
    return 0;
}

/* ---- one layer */

static int progress(struct run *r, const struct engine_sink *sink, uint32_t layer,
                    struct larder_err *e)
{
    int rc = 0;

    if (sink && sink->progress)
        rc = sink->progress(sink->arg, r->pass, layer, r->p->geom.n_layers);
    return rc ? larder_fail(e, rc, "canceled before layer %u of %u", layer, r->p->geom.n_layers)
              : 0;
}

static int load_layer(struct run *r, uint32_t layer, struct layer **ret, struct larder_err *e)
{
    double start = now_ms();
    int rc = r->b->ops->layer_load(r->b, layer, ret, e);

    r->load_ms += now_ms() - start;
    return rc;
}

static int project(struct run *r, const struct layer *l, struct larder_err *e)
{
    return r->b->ops->qkv(r->b, l, r->hidden, r->pos, r->n, r->stride, r->q, r->k, r->v, e);
}

/* Attention and MLP for rows row0 and up. */
static int advance(struct run *r, const struct layer *l, uint32_t row0, struct larder_err *e)
{
    const struct kv_geom *g = &r->p->geom;
    uint64_t o_row = (uint64_t)g->n_heads * g->head_dim * kv_dtype_bytes(r->b->elem);
    struct attend a = {r->q, r->k, r->v, r->n, row0, r->stride, r->o};
    int rc = r->b->ops->attend(r->b, &a, e);

    if (rc)
        return rc;
    return r->b->ops->finish(r->b, l, r->hidden + (uint64_t)row0 * r->p->n_hidden,
                             (const uint8_t *)r->o + row0 * o_row, r->n - row0, e);
}

/* Scores, rows and the decision of one layer whose q, k and v are there. */
static int observe(struct run *r, uint32_t layer, bool *ret_cut, struct larder_err *e)
{
    bool may_cut = is_candidate(r, layer);
    int rc = 0;

    if (may_cut || (r->keep && r->n > r->rows))
        rc = score_heads(r, e);
    if (!rc && may_cut)
        rc = choose_cut(r, layer, ret_cut, e);
    return rc ? rc : emit(r, layer, e);
}

static int run_layer(struct run *r, uint32_t layer, struct larder_err *e)
{
    bool last = layer + 1 == r->p->geom.n_layers;
    struct layer *l = NULL;
    bool cut_here = false;
    int rc = load_layer(r, layer, &l, e);

    if (!rc)
        rc = project(r, l, e);
    if (!rc)
        rc = observe(r, layer, &cut_here, e);
    if (!rc) /* nothing reads the other rows of the last layer */
        rc = advance(r, l, last ? r->n - 1 : 0, e);
    if (!rc && cut_here)
        rc = cut(r, layer, e);
    r->b->ops->layer_free(r->b, l);
    return rc;
}

/* ---- scoring passes */

static double element(const struct run *r, const void *x, uint64_t i)
{
    return r->b->elem == KV_F32 ? ((const float *)x)[i] : bf16_to_f32(((const uint16_t *)x)[i]);
}

/* GemFilter: raw inner products of the last row's queries with every key, over all heads. */
static int score_last(struct run *r, struct larder_err *e)
{
    const struct kv_geom *g = &r->p->geom;
    uint32_t d = g->head_dim, n_group = g->n_heads / g->n_kv_heads;
    double *z = mem_zalloc(r->n, sizeof *z);
    int rc;

    if (!z)
        return no_memory(e, r->n);
    for (uint32_t h = 0; h < g->n_heads; h++) {
        uint64_t q = ((uint64_t)h * r->stride + r->n - 1) * d;
        uint64_t k = (uint64_t)(h / n_group) * r->stride * d;

        for (uint32_t j = 0; j < r->n; j++)
            for (uint32_t i = 0; i < d; i++)
                z[j] += element(r, r->q, q + i) * element(r, r->k, k + (uint64_t)j * d + i);
    }
    select_pool(z, r->n, r->policy->pool_kernel, POOL_AVG, r->s.token);
    mem_free(z);
    rc = select_order(r->s.token, r->n, r->s.order, e);
    r->chose = !rc;
    return rc;
}

/* One layer of a scoring pass; r->chose ends it. */
static int scan_layer(struct run *r, uint32_t layer, struct larder_err *e)
{
    bool last = layer + 1 == r->p->geom.n_layers;
    struct layer *l = NULL;
    bool cut_here = false;
    int rc = load_layer(r, layer, &l, e);

    if (!rc)
        rc = project(r, l, e);
    if (!rc && r->policy->cut == CUT_FIXED2) {
        if (layer == r->policy->layer)
            rc = score_last(r, e);
    } else if (!rc) {
        rc = observe(r, layer, &cut_here, e);
        r->chose = cut_here || last;
    }
    if (!rc && (cut_here || r->policy->cut == CUT_FIXED2) && r->chose)
        r->sel_layer = (int32_t)layer;
    if (!rc && !r->chose)
        rc = advance(r, l, 0, e);
    r->b->ops->layer_free(r->b, l);
    return rc;
}

/* ---- passes */

static int last_logits(struct run *r, float **ret, struct larder_err *e)
{
    uint32_t n_vocab = r->p->n_vocab;
    float *x = mem_alloc(n_vocab, sizeof *x);
    double start = now_ms();
    int rc;

    if (!x)
        return no_memory(e, r->n);
    rc = r->b->ops->logits(r->b, NULL, r->hidden + (uint64_t)(r->n - 1) * r->p->n_hidden, 1, x, e);
    r->load_ms += now_ms() - start; /* reading the output matrix dominates */
    for (uint32_t i = 0; i < n_vocab && !rc; i++)
        if (!isfinite(x[i]))
            rc = larder_fail(e, LARDER_ENUMERIC,
                             "logit %u of the last token is not finite; nothing was kept", i);
    if (rc) {
        mem_free(x);
        return rc;
    }
    *ret = x;
    return 0;
}

/* Move what the result needs out of a run. */
static void take_trace(struct run *r, struct engine_result *res)
{
    res->sel_layer = r->sel_layer;
    if (r->n_trace) {
        res->trace = r->trace;
        res->n_trace = r->n_trace;
        r->trace = NULL;
    }
}

static void take_selected(uint32_t *selected, uint32_t n, struct engine_result *res)
{
    res->selected = selected;
    res->n_selected = n;
}

/* Rows that can be dropped in a pass of n rows under policy p. */
static uint32_t rankable(const struct policy *p, uint32_t n)
{
    return p->n_obs && n > p->n_obs ? n - p->n_obs : 0;
}

/* An ordinary pass over ids; fills everything but the times. */
static int pass_prefill(struct run *r, const uint32_t *ids, const uint32_t *original, uint32_t n,
                        struct engine_result *res, struct larder_err *e)
{
    uint32_t n_layers = r->p->geom.n_layers;
    int rc = run_init(r, n, rankable(r->policy, n), e);

    if (!rc)
        rc = embed(r, ids, original, e);
    for (uint32_t l = 0; l < n_layers && !rc; l++) {
        rc = progress(r, r->sink, l, e);
        if (!rc)
            rc = run_layer(r, l, e);
    }
    if (!rc)
        rc = last_logits(r, &res->logits, e);
    if (rc || original)
        return rc;
    take_trace(r, res);
    if (r->sel_layer >= 0) {
        take_selected(r->original, r->n, res);
        r->original = NULL;
    }
    return 0;
}

/* A scoring pass; the chosen tokens become res->selected. */
static int pass_scan(struct run *r, const struct engine_sink *sink, const uint32_t *ids, uint32_t n,
                     struct engine_result *res, struct larder_err *e)
{
    bool gem = r->policy->cut == CUT_FIXED2;
    uint32_t *rows;
    int rc = run_init(r, n, gem ? n : rankable(r->policy, n), e);

    if (!rc)
        rc = embed(r, ids, NULL, e);
    for (uint32_t l = 0; l < r->p->geom.n_layers && !rc && !r->chose; l++) {
        rc = progress(r, sink, l, e);
        if (!rc)
            rc = scan_layer(r, l, e);
    }
    if (rc)
        return rc;
    rows = mem_alloc(r->select, sizeof *rows);
    if (!rows)
        return no_memory(e, n);
    chosen_rows(r, rows);
    take_trace(r, res);
    take_selected(rows, r->select, res);
    return 0;
}

/* ---- the whole thing */

/* Score the document, then prefill the chosen tokens at fresh positions. */
static int two_passes(struct run *proto, const uint32_t *ids, uint32_t n, struct engine_result *res,
                      struct larder_err *e)
{
    static const struct policy keep_everything = {.kind = POLICY_FULL};
    struct run scan = *proto, fill = *proto;
    uint32_t *chosen = NULL;
    int rc;

    scan.pass = "select";
    scan.sink = NULL;
    rc = pass_scan(&scan, proto->sink, ids, n, res, e);
    run_done(&scan);
    if (rc)
        return rc;
    chosen = mem_alloc(res->n_selected, sizeof *chosen);
    if (!chosen)
        return no_memory(e, n);
    for (uint32_t i = 0; i < res->n_selected; i++)
        chosen[i] = ids[res->selected[i]];
    fill.policy = &keep_everything;
    rc = pass_prefill(&fill, chosen, res->selected, res->n_selected, res, e);
    res->next_pos = res->n_selected;
    res->renumbered = true;
    res->load_ms = scan.load_ms + fill.load_ms;
    run_done(&fill);
    mem_free(chosen);
    return rc;
}

static int one_pass(struct run *proto, const uint32_t *ids, uint32_t n, struct engine_result *res,
                    struct larder_err *e)
{
    struct run r = *proto;
    int rc = pass_prefill(&r, ids, NULL, n, res, e);

    res->load_ms = r.load_ms;
    run_done(&r);
    return rc;
}

static int check_ids(const struct model_params *p, const uint32_t *ids, uint32_t n,
                     struct larder_err *e)
{
    if (!n)
        return larder_fail(e, LARDER_EEMPTY, "the document is empty; there is nothing to prefill");
    if (n > p->n_positions)
        return larder_fail(e, LARDER_ETOOLONG,
                           "the document has %u tokens, the model only %u positions; split it", n,
                           p->n_positions);
    for (uint32_t i = 0; i < n; i++)
        if (ids[i] >= p->n_vocab)
            return larder_fail(e, LARDER_EINVAL,
                               "token %u is %u, but the vocabulary has %u entries", i, ids[i],
                               p->n_vocab);
    return 0;
}

/* Budgets in rows of this document. In two-pass policies `rows` is what passes the cut. */
static int set_budgets(struct run *r, uint32_t n, struct larder_err *e)
{
    const struct policy *p = r->policy;
    int rc = policy_rows(p, &p->rows, n, &r->rows, e);

    if (!rc)
        rc = policy_rows(p, policy_is_two_pass(p) ? &p->rows : &p->select, n, &r->select, e);
    return rc;
}

int engine_supports(const struct policy *p, struct larder_err *e)
{
    char text[POLICY_TEXT_MAX];
    bool old = p->obs == OBS_NONE || p->obs == OBS_TAIL || p->obs == OBS_DOT;

    if (old && p->kind <= POLICY_ASL2PASS && p->shape == SHAPE_UNIFORM && !p->sink &&
        p->rows.kind != ROWS_AUTO)
        return 0;
    policy_print(p, text);
    return larder_fail(e, LARDER_EUNSUPPORTED, "policy %s is not computed yet", text);
}

int engine_prefill(struct backend *b, const uint32_t *ids, uint32_t n, const struct policy *policy,
                   const struct engine_sink *sink, struct engine_result *ret, struct larder_err *e)
{
    struct policy p = *policy;
    struct run proto = {.b = b,
                        .p = b->p,
                        .policy = &p,
                        .sink = sink,
                        .pass = "prefill",
                        .precision = policy->precision};
    struct engine_result res = {.n_ctx = n, .next_pos = n, .sel_layer = -1};
    double start = now_ms();
    int rc = check_ids(b->p, ids, n, e);

    if (!rc)
        rc = engine_supports(policy, e);
    if (!rc)
        rc = policy_resolve(&p, b->p->geom.n_layers, e);
    if (!rc)
        rc = set_budgets(&proto, n, e);
    if (rc)
        return rc;
    if (policy_is_two_pass(&p) && proto.select >= n)
        p = (struct policy){.kind = POLICY_FULL}; /* nothing to choose: everything stays */
    rc = policy_is_two_pass(&p) ? two_passes(&proto, ids, n, &res, e)
                                : one_pass(&proto, ids, n, &res, e);
    if (rc) {
        engine_result_done(&res);
        return rc;
    }
    res.prefill_ms = now_ms() - start;
    *ret = res;
    return 0;
}

void engine_result_done(struct engine_result *r)
{
    if (!r)
        return;
    mem_free(r->trace);
    mem_free(r->selected);
    mem_free(r->logits);
    *r = (struct engine_result){.sel_layer = -1};
}
