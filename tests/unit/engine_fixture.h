/* engine_fixture.h - prefills on the fake model, with everything they gave, for unit tests. */
#ifndef LARDER_ENGINE_FIXTURE_H
#define LARDER_ENGINE_FIXTURE_H

#include "testlib.h"

#include "engine.h"
#include "fake_model.h"
#include "packed.h"

enum { N = 150, HEADS = FAKE_LAYERS * FAKE_KV_HEADS };

static const char *backend_name; /* set per group of tests */

/* ---- helpers */

static inline struct backend *open_backend(const struct model *m, uint32_t n_threads)
{
    struct backend_opts o = {.dtype = KV_F32, .n_threads = n_threads};
    struct backend *b = NULL;
    struct larder_err e = {0, ""};

    if (backend_find(backend_name)->open(&b, m, &o, &e))
        fail_msg("backend %s: %s", backend_name, e.msg);
    return b;
}

struct kept {
    uint32_t n_rows;
    enum kv_dtype dtype;
    uint32_t *position;
    float *k, *v; /* or tiles */
};

/* One prefill with everything it gave. */
struct outcome {
    int rc;
    struct larder_err e;
    struct engine_result r;
    struct kept head[HEADS];
    uint32_t n_layers; /* that reached the sink */
    uint32_t n_progress;
    char passes[64];    /* names of the passes, in order, each once */
    uint32_t cancel_at; /* progress call that cancels */
};

static inline int on_layer(void *arg, uint32_t layer, const struct kept_rows *heads,
                           struct larder_err *e)
{
    struct outcome *o = arg;

    (void)e;
    assert_int_equal(layer, o->n_layers);
    o->n_layers++;
    for (uint32_t g = 0; g < FAKE_KV_HEADS; g++) {
        struct kept *to = &o->head[layer * FAKE_KV_HEADS + g];
        size_t k_bytes = tile_bytes_k(heads[g].dtype, heads[g].n_rows, FAKE_HEAD_DIM);
        size_t v_bytes = tile_bytes_v(heads[g].dtype, heads[g].n_rows, FAKE_HEAD_DIM);

        to->n_rows = heads[g].n_rows;
        to->dtype = heads[g].dtype;
        to->position = malloc(to->n_rows * sizeof(uint32_t));
        to->k = malloc(k_bytes);
        to->v = malloc(v_bytes);
        memcpy(to->position, heads[g].position, to->n_rows * sizeof(uint32_t));
        memcpy(to->k, heads[g].k, k_bytes);
        memcpy(to->v, heads[g].v, v_bytes);
        assert_null(heads[g].bias);
    }
    return 0;
}

static inline int on_progress(void *arg, const char *pass, uint32_t layer, uint32_t n_layers)
{
    struct outcome *o = arg;

    assert_int_equal(n_layers, FAKE_LAYERS);
    assert_true(layer < n_layers);
    if (!strstr(o->passes, pass))
        strcat(strcat(o->passes, pass), " ");
    return ++o->n_progress == o->cancel_at ? LARDER_ECANCELED : 0;
}

static inline void drop(struct outcome *o)
{
    engine_result_done(&o->r);
    for (int i = 0; i < HEADS; i++) {
        free(o->head[i].position);
        free(o->head[i].k);
        free(o->head[i].v);
    }
    *o = (struct outcome){0};
}

static inline void make_ids(uint32_t *ids, uint32_t n)
{
    uint64_t seed = 11;

    for (uint32_t i = 0; i < n; i++)
        ids[i] = (uint32_t)(test_rand(&seed) % FAKE_VOCAB);
}

static inline void prefill_ids(struct backend *b, const uint32_t *ids, uint32_t n,
                               const char *policy, struct outcome *o)
{
    struct engine_sink sink = {o, on_layer, on_progress};
    struct engine_doc doc = {ids, n, NULL, NULL};
    struct policy p;

    assert_int_equal(policy_parse(policy, &p, NULL), 0);
    o->rc = engine_prefill(b, &doc, &p, &sink, &o->r, &o->e);
}

/* The document of n tokens through model m. */
static inline struct outcome prefill(const struct model *m, uint32_t n, const char *policy)
{
    struct backend *b = open_backend(m, 2);
    uint32_t ids[FAKE_POSITIONS + 1];
    struct outcome o = {0};

    make_ids(ids, n);
    prefill_ids(b, ids, n, policy, &o);
    b->ops->close(b);
    return o;
}

/* One that must succeed. */
static inline struct outcome run(const struct model *m, uint32_t n, const char *policy)
{
    struct outcome o = prefill(m, n, policy);

    if (o.rc)
        fail_msg("%s: %s", policy, o.e.msg);
    assert_int_equal(o.n_layers, FAKE_LAYERS);
    return o;
}

static inline void assert_same_logits(const struct outcome *a, const struct outcome *b)
{
    assert_memory_equal(a->r.logits, b->r.logits, FAKE_VOCAB * sizeof(float));
}

static inline void assert_same_rows(const struct outcome *a, const struct outcome *b)
{
    for (int i = 0; i < HEADS; i++) {
        const struct kept *x = &a->head[i], *y = &b->head[i];
        size_t bytes = x->n_rows * (size_t)FAKE_HEAD_DIM * sizeof(float);

        assert_int_equal(x->n_rows, y->n_rows);
        assert_memory_equal(x->k, y->k, bytes);
        assert_memory_equal(x->v, y->v, bytes);
    }
}

static inline void assert_same_positions(const struct outcome *a, const struct outcome *b)
{
    for (int i = 0; i < HEADS; i++) {
        assert_int_equal(a->head[i].n_rows, b->head[i].n_rows);
        assert_memory_equal(a->head[i].position, b->head[i].position,
                            a->head[i].n_rows * sizeof(uint32_t));
    }
}

#define ASL "asl,w=8,pool=3,lmin=3,lobs=3"

static inline float worst(const float *a, const float *b)
{
    float max = 0;

    for (int i = 0; i < FAKE_VOCAB; i++)
        max = fmaxf(max, fabsf(a[i] - b[i]));
    return max;
}

/* Run the group once per backend of the build. */
static inline int run_on_every_backend(const struct CMUnitTest *tests, size_t n)
{
    const char *names[] = {"ref", "cpu"};
    int failed = 0;

    for (int i = 0; i < 2; i++) {
        backend_name = names[i];
        failed += _cmocka_run_group_tests(names[i], tests, n, NULL, NULL);
    }
    return failed;
}

#endif
