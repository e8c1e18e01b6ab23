/* Replay scores of backend `cuda`, on a device that is host memory (tests/cuda), against the host's
 * (replay.c, match.c) and what a pass with a replay then keeps and copies. */
#include "testlib.h"

#include <math.h>

#include "cuda_fixture.h"
#include "engine.h"
#include "half.h"
#include "match.h"
#include "packed.h"
#include "recall.h"
#include "select_ops.h"

/* ---- one layer's rows */

struct layer_rows {
    struct model m;
    uint32_t n_doc, n_replay, stride, n_heads, n_kv, d;
    float *q, *k; /* what the elements of T are */
    void *q_t, *k_t;
    float *worth, *length;
};

static struct layer_rows make_rows(uint32_t n_doc, uint32_t n_replay, uint32_t n_heads,
                                   uint32_t n_kv, uint32_t d, enum kv_dtype t)
{
    struct layer_rows x = {.m = fake_model(),
                           .n_doc = n_doc,
                           .n_replay = n_replay,
                           .stride = n_doc + n_replay + 3,
                           .n_heads = n_heads,
                           .n_kv = n_kv,
                           .d = d};
    uint64_t seed = n_doc + d + n_heads;

    x.m.p.geom = (struct kv_geom){1, n_heads, n_kv, d};
    x.q = random_rows((size_t)n_heads * x.stride * d, 3, &seed);
    x.k = random_rows((size_t)n_kv * x.stride * d, 1, &seed);
    x.q_t = elements(x.q, (size_t)n_heads * x.stride * d, t);
    x.k_t = elements(x.k, (size_t)n_kv * x.stride * d, t);
    x.worth = random_rows((size_t)n_heads * n_doc, 1, &seed);
    x.length = random_rows(n_replay, 1, &seed);
    for (uint32_t i = 0; i < n_heads * n_doc; i++)
        x.worth[i] = 1 + fabsf(x.worth[i]);
    for (uint32_t i = 0; i < n_replay; i++)
        x.length[i] = .5f + fabsf(x.length[i]);
    return x;
}

static void free_rows(struct layer_rows *x)
{
    free(x->q);
    free(x->k);
    free(x->q_t);
    free(x->k_t);
    free(x->worth);
    free(x->length);
}

static struct replay_ask ask_for(const struct layer_rows *x, const struct replay_part *part,
                                 uint32_t n_parts, double *score)
{
    return (struct replay_ask){.q = x->q_t,
                               .k = x->k_t,
                               .stride = x->stride,
                               .n_doc = x->n_doc,
                               .part = part,
                               .n_parts = n_parts,
                               .score = score};
}

/* What the device's scores are compared with: those of the host in f32. */
static void compare(const struct layer_rows *x, const float *want, const double *got,
                    const char *what)
{
    for (uint32_t i = 0; i < x->n_kv * x->n_doc; i++)
        if (!(fabs(want[i] - got[i]) <= 1e-5 * want[i] + 1e-9))
            fail_msg("%s, %u rows, %u heads of %u: row %u of head %u scores %g, not %g", what,
                     x->n_doc, x->n_heads, x->d, i % x->n_doc, i / x->n_doc, got[i], want[i]);
}

/* Two chunks, the first from row `start` on. */
static void check(uint32_t n_doc, uint32_t start, uint32_t n_heads, uint32_t n_kv, uint32_t d,
                  enum kv_dtype t, uint64_t logit_bytes)
{
    uint32_t middle = start + (n_doc - start + 1) / 2;
    struct replay_chunk chunk[2] = {{start, middle, 0, 70}, {middle, n_doc, 70, 33}};
    struct replay r = {.n_doc = n_doc, .chunk = chunk, .n_rows = 103, .max_rows = 70};
    struct replay_part part[2] = {{start, middle - start, 0, 70}, {middle, n_doc - middle, 70, 33}};
    struct layer_rows x = make_rows(n_doc, 103, n_heads, n_kv, d, t);
    struct replay_rows rows = {x.q, x.k, x.stride, NULL, NULL};
    float *want = malloc((size_t)n_kv * n_doc * sizeof *want);
    double *got = malloc((size_t)n_kv * n_doc * sizeof *got);
    struct backend *ref = open_on(&backend_ref, &x.m, KV_F32), *b;
    struct replay_ask a = ask_for(&x, part, 2, got);
    struct larder_err e = {0, ""};
    struct replay_rows there = {x.q_t, x.k_t, x.stride, NULL, NULL};
    struct match *match = NULL;
    double *square = malloc((size_t)n_kv * n_doc * sizeof *square);

    fake_reset();
    b = open_on(&backend_cuda, &x.m, t);
    cuda_of(b)->logit_bytes = logit_bytes;
    r.n_chunks = a.n_parts = middle < n_doc ? 2 : 1;
    assert_int_equal(replay_score(ref, &r, &rows, want, &e), 0);
    assert_int_equal(cuda_select.replay(b, &a, &e), 0);
    compare(&x, want, got, "largest");
    a.worth = rows.worth = x.worth;
    a.length = rows.length = x.length;
    assert_int_equal(replay_score(ref, &r, &rows, want, &e), 0);
    assert_int_equal(cuda_select.replay(b, &a, &e), 0);
    compare(&x, want, got, "weighed");
    rows.worth = rows.length = a.worth = a.length = NULL;
    assert_int_equal(match_open(&match, ref, &r, 1, &e), 0);
    assert_int_equal(match_layer(match, &rows, x.k, square, &e), 0);
    match_close(match);
    for (size_t i = 0; i < (size_t)n_kv * n_doc; i++)
        want[i] = (float)square[i];
    assert_int_equal(match_open(&match, b, &r, 1, &e), 0);
    assert_int_equal(match_layer(match, &there, x.k_t, got, &e), 0);
    compare(&x, want, got, "squares");
    match_close(match);
    free(square);
    ref->ops->close(ref);
    close_clean(b);
    free(want);
    free(got);
    free_rows(&x);
}

static void scores_are_the_hosts(void **state)
{
    const uint32_t rows[] = {1, 31, 33, 300}, dims[] = {64, 80, 96, 128};

    (void)state;
    for (int i = 0; i < 4; i++) {
        check(rows[i], 0, 2, 2, dims[i], KV_F32, 1 << 20);
        check(rows[i], rows[i] / 10, 2, 1, dims[3 - i], KV_BF16, 1 << 20);
    }
    check(4097, 3950, 2, 2, 64, KV_F32, 1 << 20); /* most rows are nobody's */
    for (uint32_t group = 1; group <= 16; group += group < 4 ? 1 : 12)
        check(37, 5, 2 * group, 2, 32, KV_F32, 1 << 20);
}

/* Logits of a few heads at a time, of parts of a group, and of a few rows. */
static void scores_do_not_depend_on_what_fits(void **state)
{
    (void)state;
    check(90, 7, 6, 2, 32, KV_F32, 0);
    check(90, 7, 6, 2, 32, KV_F32, 70 * 160 * 4 * 2);
    check(90, 7, 6, 2, 32, KV_F32, 70 * 160 * 4 * 5);
}

static void what_is_not_finite_reaches_the_scores(void **state)
{
    struct layer_rows x = make_rows(40, 20, 4, 2, 32, KV_F32);
    const struct replay_part part = {8, 32, 0, 20};
    double score[80];
    struct replay_ask a = ask_for(&x, &part, 1, score);
    struct backend *b;

    (void)state;
    fake_reset();
    b = open_on(&backend_cuda, &x.m, KV_F32);
    ((float *)x.q_t)[(3 * x.stride + 40 + 19) * 32] = NAN; /* the last row of the last head */
    for (int square = 0; square < 2; square++) {
        a.square = square;
        a.n_queries = 40;
        assert_int_equal(cuda_select.replay(b, &a, NULL), 0);
        for (int j = 0; j < 40; j++) {
            assert_true(isfinite(score[j]));
            assert_int_equal(isfinite(score[40 + j]) != 0, j < 8);
        }
    }
    close_clean(b);
    free_rows(&x);
}

/* ---- whole passes */

enum { N = 60, LAYERS = 3, KV = FAKE_KV_HEADS, ROW = FAKE_HEAD_DIM * 4 };

struct kept {
    uint32_t n[FAKE_LAYERS][KV], pos[FAKE_LAYERS][KV][N];
};

static int take_layer(void *arg, uint32_t layer, const struct kept_rows *heads,
                      struct larder_err *e)
{
    struct kept *to = arg;

    (void)e;
    for (uint32_t g = 0; g < KV; g++) {
        to->n[layer][g] = heads[g].n_rows;
        memcpy(to->pos[layer][g], heads[g].position, heads[g].n_rows * sizeof(uint32_t));
    }
    return 0;
}

static int prefill(struct backend *b, const char *policy, uint32_t n, struct kept *kept,
                   struct engine_result *r, struct larder_err *e)
{
    struct engine_sink sink = {kept, take_layer, NULL};

    memset(kept, 0, sizeof *kept);
    return prefill_tokens(b, n, &policy, &sink, 1, r, e);
}

static struct kept want, got;

/* Bytes copied to the host, without logits: those of the last row and of the probes, on the full
 * cache and on the kept rows. */
static uint64_t check_policy(const char *policy)
{
    struct model m = fake_model();
    struct engine_result w = {0}, g = {0};
    struct larder_err e = {0, ""};
    struct backend *ref, *b;
    uint64_t logits;

    m.p.geom.n_layers = LAYERS;
    ref = open_on(&backend_ref, &m, KV_F32);
    fake_reset();
    b = open_on(&backend_cuda, &m, KV_F32);
    if (prefill(ref, policy, N, &want, &w, &e) || prefill(b, policy, N, &got, &g, &e))
        fail_msg("%s: %s", policy, e.msg);
    if (memcmp(&want, &got, sizeof want))
        fail_msg("%s: other rows", policy);
    assert_int_equal(w.certificate.n_probes, g.certificate.n_probes);
    if (!(fabs(w.certificate.kl - g.certificate.kl) <= 5e-3 * w.certificate.kl))
        fail_msg("%s: a divergence of %g, not %g", policy, g.certificate.kl, w.certificate.kl);
    logits = 1 + 2ull * g.certificate.n_probes * PROBE_QUOTE;
    assert_true(fake.kernels[CUDA_REPLAY_SCORE] > 0);
    engine_result_done(&w);
    engine_result_done(&g);
    ref->ops->close(ref);
    close_clean(b);
    return fake.down - logits * FAKE_VOCAB * sizeof(float);
}

/* What the replay scores leaves when it is kept, and nothing of the replay's own rows does. */
static void only_what_is_kept_leaves(void **state)
{
    enum { LISTED = 2 * ROW + 4, SAID = 4, HEADS = LAYERS * KV };
    uint64_t rows = 0, bytes = check_policy("kvzip,rows=25%,shape=uniform,chunk=32");

    (void)state;
    for (int i = 0; i < HEADS; i++)
        rows += got.n[i / KV][i % KV];
    assert_int_equal(bytes, rows * LISTED + HEADS * SAID);
    bytes = check_policy("kvzip,rows=25%,chunk=32"); /* all heads compete at the end */
    assert_int_equal(bytes, (uint64_t)HEADS * N * (2 * ROW + sizeof(double)));
}

/* Fitted and packed rows leave as tiles, with biases; of each system that was solved the host learns
 * how it went. */
static void what_is_packed_leaves_as_codes(void **state)
{
    enum { HEADS = LAYERS * KV, VERDICT = 12, SAID = 4 + 4 };
    static const char *const policy[] = {"matching,rows=25%,shape=uniform,chunk=32,precision=int8",
                                         "matching,rows=25%,shape=uniform,chunk=32,precision=int4",
                                         "kvzip,rows=25%,shape=uniform,chunk=32,precision=int4"};

    (void)state;
    for (int p = 0; p < 3; p++) {
        enum kv_dtype t = p ? KV_INT4 : KV_INT8;
        uint64_t bytes = check_policy(policy[p]), expect = HEADS * SAID;

        for (int i = 0; i < HEADS; i++) {
            uint32_t n = got.n[i / KV][i % KV];

            expect += tile_bytes_k(t, n, FAKE_HEAD_DIM) + tile_bytes_v(t, n, FAKE_HEAD_DIM);
            expect += n * (p < 2 ? 8 : 4); /* its number, and its bias */
        }
        assert_int_equal(fake.kernels[CUDA_MATCH_REDUCE] > 0, p < 2);
        assert_int_equal(bytes, expect + fake.kernels[CUDA_MATCH_REDUCE] * KV * VERDICT);
    }
}

static void passes_with_a_replay_keep_the_rows_that_ref_keeps(void **state)
{
    (void)state;
    check_policy("kvzip+,rows=25%,shape=uniform");
    check_policy("kvzip,rows=30,shape=layer,chunk=40");
    check_policy("matching,rows=25%,shape=uniform,chunk=32");
    check_policy("matching,rows=all,shape=uniform,chunk=32,precision=int4");
    check_policy("matching,rows=25%,shape=layer,precision=int8");
    check_policy("kvzip,rows=25%,shape=uniform,precision=int4");
}

/* A call of the device fails at its at-th use; true: it is not used so often. */
static bool fail_once(const char *policy, enum fake_call call, long at)
{
    struct model m = fake_model();
    struct engine_result r = {0};
    struct larder_err e = {0, ""};
    struct backend *b;
    int rc;

    m.p.geom.n_layers = 1;
    fake_reset();
    b = open_on(&backend_cuda, &m, KV_F32);
    fake.count[call] = 0;
    fake.fail = call;
    fake.fail_at = at;
    fake.fail_rc = call == FAKE_ALLOC ? CUDA_OUT_OF_MEMORY : 700;
    rc = prefill(b, policy, 24, &got, &r, &e);
    engine_result_done(&r);
    close_clean(b);
    if (!rc && fake.count[call] < at)
        return true;
    if (call == FAKE_ALLOC || call == FAKE_PIN)
        assert_int_equal(rc, LARDER_ENOMEM);
    else if (call != FAKE_MARK) /* a weight's is only looked at when it is missed */
        assert_true(rc == LARDER_EBACKEND && strstr(e.msg, "illegal memory access"));
    return false;
}

/* Each call of the device fails once: the error is told, nothing leaks. */
static void every_failure_of_the_device_ends_the_job_cleanly(void **state)
{
    static const char *const policy[] = {"kvzip,rows=50%,shape=uniform,chunk=16",
                                         "matching,rows=50%,shape=uniform,chunk=16,precision=int8"};
    const enum fake_call calls[] = {FAKE_ALLOC, FAKE_PIN,  FAKE_COPY, FAKE_MARK,  FAKE_ZERO,
                                    FAKE_WAIT,  FAKE_SYNC, FAKE_GEMM, FAKE_SOLVE, FAKE_LAUNCH};

    (void)state;
    for (size_t p = 0; p < sizeof policy / sizeof *policy; p++)
        for (size_t c = 0; c < sizeof calls / sizeof *calls; c++)
            for (long at = 1; !fail_once(policy[p], calls[c], at);)
                at += 1 + (calls[c] == FAKE_ALLOC && !p ? at / 8 : at);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scores_are_the_hosts),
        cmocka_unit_test(scores_do_not_depend_on_what_fits),
        cmocka_unit_test(what_is_not_finite_reaches_the_scores),
        cmocka_unit_test(only_what_is_kept_leaves),
        cmocka_unit_test(what_is_packed_leaves_as_codes),
        cmocka_unit_test(passes_with_a_replay_keep_the_rows_that_ref_keeps),
        cmocka_unit_test(every_failure_of_the_device_ends_the_job_cleanly),
    };

    return cmocka_run_group_tests_name("cuda/replay", tests, NULL, NULL);
}
