/* What leaves a CUDA device, on one that is host memory and counts (tests/cuda): only what is kept,
 * and only when somebody waits for it; and that what is chosen there is what `ref` chooses. */
#include "testlib.h"

#include <math.h>

#include "cuda_fixture.h"
#include "engine.h"
#include "select.h"
#include "select_ops.h"

enum { N = 90, D = FAKE_HEAD_DIM, KV = FAKE_KV_HEADS, ROW = D * 4 };

/* ---- whole prefills */

struct rows {
    uint32_t n[FAKE_LAYERS][KV], pos[FAKE_LAYERS][KV][N];
    float k[FAKE_LAYERS][KV][N * D], v[FAKE_LAYERS][KV][N * D];
};

static struct rows want, got;
static uint32_t n_tokens = N;

static int take_layer(void *arg, uint32_t layer, const struct kept_rows *heads,
                      struct larder_err *e)
{
    struct rows *r = arg;

    (void)e;
    for (uint32_t g = 0; g < KV; g++) {
        uint32_t n = heads[g].n_rows;

        r->n[layer][g] = n;
        memcpy(r->pos[layer][g], heads[g].position, n * sizeof(uint32_t));
        if (heads[g].dtype == KV_F32) {
            memcpy(r->k[layer][g], heads[g].k, (size_t)n * ROW);
            memcpy(r->v[layer][g], heads[g].v, (size_t)n * ROW);
        }
    }
    return 0;
}

static int prefill_each(struct backend *b, const char *const *policy, uint32_t n, struct rows *rows,
                        struct engine_result *r, struct larder_err *e)
{
    struct engine_sink sink[3];

    for (uint32_t i = 0; i < n; i++)
        sink[i] = (struct engine_sink){rows + i, take_layer, NULL};
    return prefill_tokens(b, n_tokens, policy, sink, n, r, e);
}

static int prefill(struct backend *b, const char *policy, struct rows *rows,
                   struct engine_result *r, struct larder_err *e)
{
    return prefill_each(b, &policy, 1, rows, r, e);
}

static void must(int rc, const char *policy, const struct larder_err *e)
{
    if (rc)
        fail_msg("%s: %s", policy, e->msg);
}

static void same_rows(const char *policy, const struct rows *w, const struct rows *g)
{
    assert_memory_equal(w->n, g->n, sizeof w->n);
    for (int i = 0; i < FAKE_LAYERS * KV; i++) {
        uint32_t n = w->n[i / KV][i % KV];

        if (memcmp(w->pos[i / KV][i % KV], g->pos[i / KV][i % KV], n * sizeof(uint32_t)))
            fail_msg("%s: other rows in layer %d, head %d", policy, i / KV, i % KV);
        for (uint32_t j = 0; j < n * D; j++)
            if (!(fabsf(w->k[i / KV][i % KV][j] - g->k[i / KV][i % KV][j]) < 1e-3f &&
                  fabsf(w->v[i / KV][i % KV][j] - g->v[i / KV][i % KV][j]) < 1e-3f))
                fail_msg("%s: layer %d head %d: another element %u", policy, i / KV, i % KV, j);
    }
}

static void same_result(const struct engine_result *w, const struct engine_result *g)
{
    assert_int_equal(w->sel_layer, g->sel_layer);
    assert_int_equal(w->n_trace, g->n_trace);
    for (uint32_t i = 0; i < w->n_trace; i++) {
        assert_int_equal(w->trace[i].layer, g->trace[i].layer);
        assert_true(fabs(w->trace[i].value - g->trace[i].value) <= 1e-9 * w->trace[i].value);
    }
    assert_int_equal(w->n_selected, g->n_selected);
    if (w->n_selected)
        assert_memory_equal(w->selected, g->selected, w->n_selected * sizeof(uint32_t));
    for (int i = 0; i < FAKE_VOCAB; i++)
        assert_true(fabsf(w->logits[i] - g->logits[i]) < 1e-3f);
}

static void check_policy(const char *policy)
{
    struct model m = fake_model();
    struct engine_result w = {0}, g = {0};
    struct larder_err e = {0, ""};
    struct backend *ref = open_on(&backend_ref, &m, KV_F32),
                   *b = open_on(&backend_cuda, &m, KV_F32);

    memset(&want, 0, sizeof want);
    memset(&got, 0, sizeof got);
    must(prefill(ref, policy, &want, &w, &e), policy, &e);
    must(prefill(b, policy, &got, &g, &e), policy, &e);
    same_rows(policy, &want, &got);
    same_result(&w, &g);
    engine_result_done(&w);
    engine_result_done(&g);
    ref->ops->close(ref);
    close_clean(b);
}

static void what_is_chosen_there_is_what_ref_chooses(void **state)
{
    (void)state;
    fake_reset();
    check_policy("snapkv,rows=40,w=8,pool=5,poolkind=max,sink=2");
    check_policy("asl,w=8,pool=3,lmin=3,lobs=2,tau=0.99,rows=50%,select=40");
    check_policy("fastkv,w=8,pool=3,layer=2,rows=30,select=40");
    check_policy("asl2pass,w=8,pool=3,lmin=3,lobs=3,rows=40");
    assert_true(fake.kernels[CUDA_TOP] && fake.kernels[CUDA_RANK] && fake.kernels[CUDA_SPREAD]);
    check_policy("pyramidkv,w=8,pool=3,rows=30");
    check_policy("adakv,w=8,pool=3,rows=30");
    check_policy("snapkv,w=8,pool=3,rows=30,shape=global");
}

/* Where everything stays whatever it scores, there is nothing to rank. */
static void documents_within_the_window_are_kept_whole(void **state)
{
    const uint32_t lengths[] = {1, 8, 9, 40};

    (void)state;
    fake_reset();
    for (int i = 0; i < 4; i++) {
        n_tokens = lengths[i];
        check_policy("full");
        check_policy("snapkv,rows=40,w=8,pool=3");
        check_policy("asl,w=8,pool=3,lmin=3,lobs=3,rows=40,select=40");
        check_policy("asl2pass,w=8,pool=3,lmin=3,lobs=3,rows=40");
    }
    n_tokens = N;
}

/* Each has its own rows, on the same scores or on others. */
static void policies_of_one_pass_keep_their_own_rows(void **state)
{
    static const char *const policy[] = {"snapkv,rows=25%,w=8,pool=3", "full",
                                         "criticalkv,rows=30,w=8,pool=7"};
    static struct rows each[3];
    struct model m = fake_model();
    struct engine_result r[3] = {{0}};
    struct larder_err e = {0, ""};
    struct backend *ref = open_on(&backend_ref, &m, KV_F32), *b;

    (void)state;
    fake_reset();
    b = open_on(&backend_cuda, &m, KV_F32);
    must(prefill_each(b, policy, 3, each, r, &e), "all", &e);
    for (int i = 0; i < 3; i++) {
        struct engine_result w = {0};

        must(prefill(ref, policy[i], &want, &w, &e), policy[i], &e);
        same_rows(policy[i], &want, &each[i]);
        engine_result_done(&w);
        engine_result_done(&r[i]);
    }
    ref->ops->close(ref);
    close_clean(b);
}

/* ---- bytes */

static uint64_t rows_of(const struct rows *r)
{
    uint64_t n = 0;

    for (int i = 0; i < FAKE_LAYERS * KV; i++)
        n += r->n[i / KV][i % KV];
    return n;
}

/* Bytes that a prefill copied to the host, without the last row's logits. */
static uint64_t copied(const char *policy, struct engine_result *r)
{
    struct model m = fake_model();
    struct larder_err e = {0, ""};
    struct backend *b;

    fake_reset();
    b = open_on(&backend_cuda, &m, KV_F32);
    memset(&got, 0, sizeof got);
    must(prefill(b, policy, &got, r, &e), policy, &e);
    close_clean(b);
    return fake.down - FAKE_VOCAB * sizeof(float);
}

/* A kept row is its K, its V and its number; a choice among heads says whether it could be made. */
static void only_what_is_kept_leaves(void **state)
{
    enum { LISTED = 2 * ROW + 4, SAID = 4, TESTED = 16 };
    struct engine_result r = {0};
    uint64_t bytes = copied("full", &r);

    (void)state;
    assert_int_equal(bytes, (uint64_t)FAKE_LAYERS * KV * N * 2 * ROW);
    engine_result_done(&r);
    bytes = copied("snapkv,rows=20,w=8,pool=3", &r);
    assert_int_equal(rows_of(&got), FAKE_LAYERS * KV * 20);
    assert_int_equal(bytes, rows_of(&got) * LISTED + FAKE_LAYERS * KV * SAID);
    engine_result_done(&r);
    /* layers 1.. are ranked, 3.. tested; a layer above the cut has fewer rows than its budget */
    bytes = copied("asl,w=8,pool=3,lmin=3,lobs=3,tau=0.99,rows=40,select=40", &r);
    assert_true(r.sel_layer > 3 && r.sel_layer < FAKE_LAYERS - 1);
    {
        uint32_t l = (uint32_t)r.sel_layer, below = (l + 1) * KV, above = FAKE_LAYERS * KV - below;

        assert_int_equal(rows_of(&got), FAKE_LAYERS * KV * 40);
        assert_int_equal(bytes, below * (40 * LISTED + SAID) + above * 40 * 2 * ROW + l * SAID +
                                    (l - 2) * TESTED + SAID + (40 - 8) * 4);
    }
    engine_result_done(&r);
}

/* ---- one call at a time, with memory of the host as it is */

static void calls_take_host_memory_as_it_is(void **state)
{
    enum { M = 70, HEADS = 2, LD = 75, LO = 2, LAYERS = 3, K = 20 };
    static double score[HEADS * LD], token[M], want_token[M];
    static uint32_t rank[LAYERS * M], order[M], want_rank[M], index[HEADS * M];
    static float rows[HEADS * LD * 3], to[HEADS * M * 3];
    const uint32_t *ring[] = {rank, rank + M, rank + 2 * M}, count[] = {9, 31};
    struct token_rank t = {score, HEADS, LD, LO, M, token, rank};
    struct rank_variance v = {rank, LAYERS, M, K};
    struct top_rows best = {score, HEADS, LD, M, LO, M - 3, count, index};
    struct gather g = {rows, LD, HEADS, 12, count, index, to};
    struct model m = fake_model();
    struct backend *b;
    uint64_t seed = 5;
    double got_v = 0;

    (void)state;
    fake_reset();
    b = open_on(&backend_cuda, &m, KV_F32);
    for (int l = 0; l < LAYERS; l++) {
        for (int i = 0; i < HEADS * LD; i++)
            score[i] = test_randf(&seed);
        t.rank = rank + l * M;
        assert_int_equal(cuda_select.rank(b, &t, NULL), 0);
        select_token_scores(score + LO, 1, M, want_token);
        for (int j = 0; j < M; j++)
            want_token[j] = score[LO + j] + score[LD + LO + j];
        assert_memory_equal(token, want_token, sizeof token);
        assert_int_equal(select_order(token, M, order, NULL), 0);
        select_rank(order, M, want_rank);
        assert_memory_equal(t.rank, want_rank, sizeof want_rank);
    }
    assert_int_equal(cuda_select.variance(b, &v, &got_v, NULL), 0);
    assert_true(fabs(got_v - select_variance(ring, LAYERS, M, K, NULL)) < 1e-9);
    assert_int_equal(cuda_select.top(b, &best, NULL), 0);
    for (int i = 0; i < HEADS * LD * 3; i++)
        rows[i] = (float)i;
    assert_int_equal(cuda_select.gather(b, &g, NULL), 0);
    for (uint32_t i = 0; i < count[0] + count[1]; i++)
        assert_true(to[3 * i + 1] == (i < count[0] ? 0 : LD * 3) + 3 * index[i] + 1);
    assert_true(index[0] == 0 && index[1] == 1 && index[count[0]] == 0 && index[39] == M - 1);
    g.index = NULL;
    assert_int_equal(cuda_select.gather(b, &g, NULL), 0);
    for (uint32_t i = 0; i < count[0] + count[1]; i++)
        assert_true(to[3 * i] == 3 * (i < count[0] ? i : LD + i - count[0]));
    close_clean(b);
}

/* ---- buffers */

static void what_leaves_is_there_when_it_is_looked_at(void **state)
{
    struct model m = fake_model();
    const uint32_t all = 4, some[] = {3, 1};
    struct gather g = {.stride = 4, .n_heads = 1, .row_bytes = 16, .count = &all};
    struct backend *b;
    uint8_t *device;
    float *from, *to;

    (void)state;
    fake_reset();
    b = open_on(&backend_cuda, &m, KV_F32);
    from = backend_buffer_new(b, 16, sizeof *from);
    to = backend_staging_new(b, 16, sizeof *to);
    assert_true(to[0] == 0 && to[15] == 0);
    assert_int_equal(backend_view(b, from, VIEW_WRITE, NULL), 0);
    for (int i = 0; i < 16; i++)
        from[i] = (float)i;
    g.from = from;
    g.to = to;
    assert_int_equal(cuda_select.gather(b, &g, NULL), 0);
    assert_true(isnan(to[0]));
    assert_int_equal(backend_view(b, to, VIEW_READ, NULL), 0);
    assert_true(to[0] == 0 && to[15] == 15);
    assert_int_equal(cuda_select.gather(b, &g, NULL), 0); /* and the device may want it back */
    assert_int_equal(cuda_twin_find(cuda_of(b), to + 5, false, &device, NULL), 0);
    assert_true(*(float *)(void *)device == 5);
    g.index = some;
    g.count = &(uint32_t){2};
    assert_int_equal(cuda_select.gather(b, &g, NULL), 0);
    assert_int_equal(cuda_twin_find(cuda_of(b), to, false, &device, NULL), 0);
    assert_true(*(float *)(void *)device == 12 && isnan(to[0])); /* it is still there, too */
    g.index = &some[1]; /* written over before anybody looked */
    g.count = &(uint32_t){1};
    assert_int_equal(cuda_select.gather(b, &g, NULL), 0);
    assert_int_equal(backend_view(b, to, VIEW_READ, NULL), 0);
    assert_true(to[0] == 4);
    g.to = from; /* down in place */
    g.index = some;
    g.count = &(uint32_t){2};
    assert_int_equal(cuda_select.gather(b, &g, NULL), 0);
    assert_int_equal(backend_view(b, from, VIEW_READ, NULL), 0);
    assert_true(from[0] == 12 && from[4] == 4 && from[8] == 8);
    backend_buffer_free(b, from);
    backend_buffer_free(b, to);
    close_clean(b);
}

/* ---- what goes wrong */

static void scores_that_are_not_finite_end_the_job(void **state)
{
    static const char *const policy[] = {"snapkv,rows=20,w=8,pool=3",
                                         "snapkv,rows=20,w=8,pool=3,poolkind=max",
                                         "asl,w=8,pool=3,lmin=3,lobs=3,rows=all,select=40"};

    (void)state;
    for (int i = 0; i < 3; i++) {
        struct model m = fake_model();
        struct engine_result r = {0};
        struct larder_err e = {0, ""};
        struct backend *b;

        fake_reset();
        m.nan_layer = 2;
        b = open_on(&backend_cuda, &m, KV_F32);
        assert_int_equal(prefill(b, policy[i], &got, &r, &e), LARDER_ENUMERIC);
        if (!strstr(e.msg, "is not finite; nothing was kept"))
            fail_msg("%s", e.msg);
        engine_result_done(&r);
        close_clean(b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_chosen_there_is_what_ref_chooses),
        cmocka_unit_test(documents_within_the_window_are_kept_whole),
        cmocka_unit_test(policies_of_one_pass_keep_their_own_rows),
        cmocka_unit_test(only_what_is_kept_leaves),
        cmocka_unit_test(calls_take_host_memory_as_it_is),
        cmocka_unit_test(what_leaves_is_there_when_it_is_looked_at),
        cmocka_unit_test(scores_that_are_not_finite_end_the_job),
    };

    return cmocka_run_group_tests_name("cuda/leave", tests, NULL, NULL);
}
