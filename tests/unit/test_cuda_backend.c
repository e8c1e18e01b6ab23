/* Backend `cuda` on a device that is host memory (tests/cuda): what it computes against `ref`, what
 * it keeps where, how weights stream, and how every failure of the device is told. */
#include "cuda_fixture.h"

#include "engine.h"
#include "packed.h"

enum { N = 100 };

/* ---- whole prefills */

struct rows {
    uint32_t n[FAKE_LAYERS][FAKE_KV_HEADS];
    uint32_t pos[FAKE_LAYERS][FAKE_KV_HEADS][N];
    float k[FAKE_LAYERS][FAKE_KV_HEADS][N][FAKE_HEAD_DIM];
};

static float element(const void *x, enum kv_dtype t, uint64_t i)
{
    return t == KV_F32 ? ((const float *)x)[i] : bf16_to_f32(((const uint16_t *)x)[i]);
}

static int take_layer(void *arg, uint32_t layer, const struct kept_rows *heads,
                      struct larder_err *e)
{
    struct rows *r = arg;

    (void)e;
    for (uint32_t g = 0; g < FAKE_KV_HEADS; g++) {
        r->n[layer][g] = heads[g].n_rows;
        memcpy(r->pos[layer][g], heads[g].position, heads[g].n_rows * sizeof(uint32_t));
        for (uint32_t i = 0; i < heads[g].n_rows * FAKE_HEAD_DIM && !packed_type(heads[g].dtype);
             i++)
            r->k[layer][g][i / FAKE_HEAD_DIM][i % FAKE_HEAD_DIM] =
                element(heads[g].k, heads[g].dtype, i);
    }
    return 0;
}

static int prefill(struct backend *b, const char *policy, uint32_t n, struct rows *rows,
                   struct engine_result *r, struct larder_err *e)
{
    struct engine_sink sink = {rows, take_layer, NULL};

    return prefill_tokens(b, n, &policy, &sink, 1, r, e);
}

static struct rows want_rows, got_rows;

static void check_policy_of(const struct model *m, const char *policy)
{
    struct engine_result want = {0}, got = {0};
    struct larder_err e = {0, ""};
    struct backend *ref = open_ref(m), *b = open_cuda(m, KV_F32);

    if (prefill(ref, policy, N, &want_rows, &want, &e))
        fail_msg("%s: %s", policy, e.msg);
    if (prefill(b, policy, N, &got_rows, &got, &e))
        fail_msg("%s: %s", policy, e.msg);
    assert_int_equal(want.sel_layer, got.sel_layer);
    assert_memory_equal(want_rows.n, got_rows.n, sizeof want_rows.n);
    for (int l = 0; l < FAKE_LAYERS; l++)
        for (int g = 0; g < FAKE_KV_HEADS; g++) {
            if (memcmp(want_rows.pos[l][g], got_rows.pos[l][g], want_rows.n[l][g] * 4))
                fail_msg("%s: other rows in layer %d, head %d", policy, l, g);
            for (uint32_t i = 0; i < want_rows.n[l][g] * FAKE_HEAD_DIM; i++)
                if (!(fabsf((&want_rows.k[l][g][0][0])[i] - (&got_rows.k[l][g][0][0])[i]) < 1e-3f))
                    fail_msg("%s: layer %d head %d: %g, not %g", policy, l, g,
                             (&got_rows.k[l][g][0][0])[i], (&want_rows.k[l][g][0][0])[i]);
        }
    for (int i = 0; i < FAKE_VOCAB; i++)
        assert_true(fabsf(want.logits[i] - got.logits[i]) < 1e-3f);
    engine_result_done(&want);
    engine_result_done(&got);
    ref->ops->close(ref);
    close_clean(b);
}

static void check_policy(const char *policy)
{
    struct model m = fake_model();

    check_policy_of(&m, policy);
}

static void policies_keep_the_rows_that_ref_keeps(void **state)
{
    (void)state;
    fake_reset();
    check_policy("full");
    check_policy("snapkv,rows=25%,w=8,pool=3");
    check_policy("asl,w=8,pool=3,lmin=3,lobs=3,rows=25%,select=40");
    check_policy("keydiff,rows=25%");
    check_policy("expected,rows=25%");
    check_policy("observed,rows=25%");
    check_policy("tova,rows=25%");
    check_policy("pyramidinfer,recent=20%,decay=0.5");
    check_policy("gemfilter,rows=40,pool=3,layer=2");
    check_policy("criticalkv,rows=25%,w=8,pool=3");
}

/* The replay's rows attend to the document's, on the device; scores and fits are the host's. */
static void replays_keep_the_rows_that_ref_keeps(void **state)
{
    (void)state;
    fake_reset();
    check_policy("kvzip,rows=25%");
}

/* Windows, biases, norms of q and k, partial rotation with a factor. */
static void models_of_every_kind_keep_the_rows_that_ref_keeps(void **state)
{
    const char *policies[] = {"full", "snapkv,rows=25%,w=8,pool=3"};
    struct model m = fake_rich_model();

    (void)state;
    fake_reset();
    for (int i = 0; i < 2; i++)
        check_policy_of(&m, policies[i]);
    m.p.sliding = NULL; /* what a window refuses */
    check_policy_of(&m, "kvzip,rows=25%");
}

static void check_bf16(const struct model *m)
{
    struct engine_result want = {0}, got = {0};
    struct larder_err e = {0, ""};
    struct backend *ref = open_ref(m), *b;
    double err = 0, all = 0;

    fake_reset();
    b = open_cuda(m, KV_BF16);
    assert_int_equal(prefill(ref, "full", N, &want_rows, &want, &e), 0);
    if (prefill(b, "full", N, &got_rows, &got, &e))
        fail_msg("%s", e.msg);
    assert_int_equal(fake.kernels[CUDA_ATTEND_MMA], FAKE_LAYERS - 1);
    assert_int_equal(fake.kernels[CUDA_ATTEND], 1); /* one row of the last layer */
    for (int i = 0; i < FAKE_VOCAB; i++) {
        err += pow(want.logits[i] - got.logits[i], 2);
        all += pow(want.logits[i], 2);
    }
    if (!(err < 3e-2 * all)) /* eight random layers */
        fail_msg("error %g", err / all);
    err = all = 0;
    for (int i = 0; i < N * FAKE_HEAD_DIM; i++) { /* keys of the first layer */
        float x = (&want_rows.k[0][0][0][0])[i];

        err += pow(x - (&got_rows.k[0][0][0][0])[i], 2);
        all += pow(x, 2);
    }
    if (!(err < 2e-5 * all))
        fail_msg("error of a layer %g", err / all);
    engine_result_done(&want);
    engine_result_done(&got);
    ref->ops->close(ref);
    close_clean(b);
}

static void bf16_stays_near_f32(void **state)
{
    struct model m = fake_model();

    (void)state;
    check_bf16(&m);
    m = fake_rich_model();
    check_bf16(&m);
}

/* ---- residency and streaming */

static void weights_that_fit_are_read_once(void **state)
{
    struct model m = fake_model();
    struct engine_result r = {0};
    struct larder_err e = {0, ""};
    struct backend *b;
    long first;

    (void)state;
    fake_reset();
    b = open_cuda(&m, KV_F32);
    assert_true(cuda_of(b)->resident);
    assert_non_null(strstr(b->device, "fake device, CUDA driver 13.0"));
    assert_non_null(strstr(b->device, "resident"));
    assert_string_equal(b->isa, "sm_90");
    assert_int_equal(prefill(b, "full", 40, &got_rows, &r, &e), 0);
    engine_result_done(&r);
    first = fake.kernels[CUDA_DEQUANT];
    assert_int_equal(prefill(b, "full", 40, &got_rows, &r, &e), 0);
    engine_result_done(&r);
    assert_int_equal(fake.kernels[CUDA_DEQUANT], first);
    close_clean(b);
}

/* Two layers' weights at a time, the next one sent while one computes. */
static void weights_that_do_not_fit_stream(void **state)
{
    struct model m = fake_model();
    struct engine_result want = {0}, got = {0};
    struct larder_err e = {0, ""};
    struct backend *ref = open_ref(&m), *b;

    (void)state;
    fake_reset();
    fake.info.free = 1 << 20;
    b = open_cuda(&m, KV_F32);
    assert_false(cuda_of(b)->resident);
    assert_int_equal(cuda_of(b)->n_slots, 2);
    cuda_of(b)->info.free = fake.info.free = 1ull << 30; /* room for the rows */
    assert_int_equal(prefill(ref, "full", N, &want_rows, &want, &e), 0);
    for (int pass = 0; pass < 2; pass++) {
        assert_int_equal(prefill(b, "full", N, &got_rows, &got, &e), 0);
        for (int i = 0; i < FAKE_VOCAB; i++)
            assert_true(fabsf(want.logits[i] - got.logits[i]) < 1e-3f);
        engine_result_done(&got);
    }
    assert_int_equal(fake.copy_lane, 2 * FAKE_LAYERS * 9); /* each layer once a pass */
    assert_true(b->device_peak > 0 && b->device_planned >= b->device_peak);
    engine_result_done(&want);
    ref->ops->close(ref);
    close_clean(b);
}

static void layers_may_be_asked_for_in_any_order(void **state)
{
    struct model m = fake_rich_model();
    const uint32_t order[] = {5, 5, 0, 1, 7, 2, 3, 4, 4, 6};
    struct layer *l, *also;
    struct larder_err e = {0, ""};
    struct backend *b;

    (void)state;
    fake_reset();
    fake.info.free = 1 << 20;
    b = open_cuda(&m, KV_F32);
    fake.info.free = 1ull << 30;
    for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
        assert_int_equal(b->ops->layer_load(b, order[i], false, &l, &e), 0);
        assert_int_equal(b->ops->layer_load(b, (order[i] + 2) % FAKE_LAYERS, false, &also, &e), 0);
        assert_true(l->bias && l->q_norm && l->k_norm);
        for (uint32_t j = 0; j < 4; j++) {
            assert_true(l->k_norm[j] == fake_weight(&m, order[i], MODEL_K_NORM, 0, j));
            assert_true(l->bias[FAKE_HEADS * FAKE_HEAD_DIM + j] ==
                        fake_weight(&m, order[i], MODEL_K_BIAS, j, 0));
            assert_true(((float *)l->qkv)[j] == fake_weight(&m, order[i], MODEL_Q, 0, j));
            assert_true(((float *)also->down)[j] ==
                        fake_weight(&m, (order[i] + 2) % FAKE_LAYERS, MODEL_DOWN, 0, j));
            assert_true(l->ffn_norm[j] == fake_weight(&m, order[i], MODEL_FFN_NORM, 0, j));
        }
        b->ops->layer_free(b, also);
        b->ops->layer_free(b, l);
    }
    close_clean(b);
}

/* ---- one call at a time, with rows in plain host memory */

static void steps_take_host_memory_as_it_is(void **state)
{
    enum { ROWS = 33, STRIDE = 40, D = FAKE_HEAD_DIM };
    static float q[2][FAKE_HEADS * STRIDE * D], k[2][FAKE_KV_HEADS * STRIDE * D];
    static float v[2][FAKE_KV_HEADS * STRIDE * D], o[2][ROWS * FAKE_HEADS * D];
    static float hidden[2][ROWS * FAKE_HIDDEN], mass[2][FAKE_HEADS * (ROWS - 8)];
    struct model m = fake_model();
    struct backend *b[2] = {open_ref(&m), NULL};
    struct larder_err e = {0, ""};
    uint32_t pos[ROWS];
    uint64_t seed = 21;

    (void)state;
    fake_reset();
    b[1] = open_cuda(&m, KV_F32);
    fill(hidden[0], ROWS * FAKE_HIDDEN, &seed);
    memcpy(hidden[1], hidden[0], sizeof hidden[0]);
    for (uint32_t i = 0; i < ROWS; i++)
        pos[i] = 3 * i;
    for (int i = 0; i < 2; i++) {
        struct project p = {hidden[i], pos, &m.p.rope, ROWS, STRIDE, q[i], k[i], v[i]};
        struct window_mass w = {q[i], k[i], ROWS, STRIDE, 8, 0, mass[i]};
        struct attend a = {q[i], k[i], v[i], ROWS, 5, STRIDE, o[i], 0};
        struct layer *l;

        assert_int_equal(b[i]->ops->layer_load(b[i], 2, false, &l, &e), 0);
        assert_int_equal(b[i]->ops->qkv(b[i], l, &p, &e), 0);
        assert_int_equal(b[i]->ops->window(b[i], &w, &e), 0);
        assert_int_equal(b[i]->ops->attend(b[i], &a, &e), 0);
        assert_int_equal(b[i]->ops->finish(b[i], l, hidden[i] + 5 * FAKE_HIDDEN,
                                           o[i] + 5 * FAKE_HEADS * D, ROWS - 5, &e),
                         0);
        b[i]->ops->layer_free(b[i], l);
    }
#define NEAR(x)                                                                                    \
    for (size_t j = 0; j < sizeof x[0] / sizeof x[0][0]; j++)                                      \
    assert_true(fabsf(x[0][j] - x[1][j]) < 2e-4f)
    NEAR(q);
    NEAR(k);
    NEAR(v);
    NEAR(o);
    NEAR(mass);
    NEAR(hidden);
    b[0]->ops->close(b[0]);
    close_clean(b[1]);
}

static void logits_are_the_same_from_slices_and_from_a_kept_matrix(void **state)
{
    struct model m = fake_model();
    struct larder_err e = {0, ""};
    float hidden[3 * FAKE_HIDDEN], want[3 * FAKE_VOCAB], got[3 * FAKE_VOCAB];
    struct backend *ref = open_ref(&m), *b;
    struct head *h;
    uint64_t seed = 41;

    (void)state;
    fake_reset();
    fake.info.free = 1 << 20; /* streamed: nothing is kept */
    b = open_cuda(&m, KV_F32);
    fill(hidden, 3 * FAKE_HIDDEN, &seed);
    assert_int_equal(ref->ops->logits(ref, NULL, hidden, 3, want, &e), 0);
    fake.info.free = 1ull << 30;
    assert_int_equal(b->ops->logits(b, NULL, hidden, 3, got, &e), 0);
    for (int i = 0; i < 3 * FAKE_VOCAB; i++)
        assert_true(fabsf(want[i] - got[i]) < 1e-4f);
    assert_int_equal(b->ops->head_load(b, &h, &e), 0);
    memset(got, 0xff, sizeof got);
    assert_int_equal(b->ops->logits(b, h, hidden, 3, got, &e), 0);
    for (int i = 0; i < 3 * FAKE_VOCAB; i++)
        assert_true(fabsf(want[i] - got[i]) < 1e-4f);
    b->ops->head_free(b, h);
    ref->ops->close(ref);
    close_clean(b);
}

/* ---- buffers */

static void a_buffer_is_copied_only_when_the_other_side_changed_it(void **state)
{
    struct model m = fake_model();
    struct backend *b;
    uint8_t *device;
    float *x;
    long copies;

    (void)state;
    fake_reset();
    b = open_cuda(&m, KV_F32);
    x = backend_buffer_new(b, 100, sizeof *x);
    assert_true(x[0] == 0 && x[99] == 0);
    copies = fake.count[FAKE_COPY];
    assert_int_equal(cuda_twin_find(cuda_of(b), x + 7, false, &device, NULL), 0);
    assert_true(((float *)(void *)device)[92] == 0); /* blank: cleared, not copied */
    assert_int_equal(fake.count[FAKE_COPY], copies);
    assert_int_equal(backend_view(b, x, VIEW_WRITE, NULL), 0);
    x[7] = 42;
    assert_int_equal(cuda_twin_find(cuda_of(b), x + 7, true, &device, NULL), 0);
    assert_true(*(float *)(void *)device == 42);
    *(float *)(void *)device = 43;
    assert_true(isnan(x[7])); /* poisoned until it is looked at */
    assert_int_equal(backend_view(b, x + 50, VIEW_READ, NULL), 0);
    assert_true(x[7] == 43);
    assert_int_equal(fake.count[FAKE_COPY], copies + 2);
    assert_int_equal(backend_view(b, x, VIEW_READ, NULL), 0);
    assert_int_equal(fake.count[FAKE_COPY], copies + 2);
    assert_int_equal(cuda_twin_find(cuda_of(b), &m, false, &device, NULL), 0);
    assert_null(device); /* other memory */
    backend_buffer_free(b, x);
    backend_buffer_free(b, NULL);
    close_clean(b);
}

/* ---- what goes wrong */

static void expect_refusal(const struct model *m, int code, const char *part)
{
    struct backend_opts o = {.dtype = KV_BF16, .n_threads = 1};
    struct backend *b = NULL;
    struct larder_err e = {0, ""};

    assert_int_equal(backend_cuda.open(&b, m, &o, &e), code);
    assert_null(b);
    if (!strstr(e.msg, part))
        fail_msg("%s", e.msg);
    assert_int_equal(fake.n_live, 0);
}

static void what_cannot_be_done_is_said_at_the_start(void **state)
{
    struct model m = fake_model();

    (void)state;
    fake_reset();
    fake.fail = FAKE_OPEN;
    fake.fail_at = 1;
    expect_refusal(&m, LARDER_EBACKEND, "no CUDA device");
    fake_reset();
    fake.info.major = 7;
    fake.info.minor = 5;
    expect_refusal(&m, LARDER_EBACKEND, "compute capability 7.5");
    fake_reset();
    m = fake_model();
    m.p.geom.head_dim = m.p.rope_dims = 512;
    expect_refusal(&m, LARDER_EUNSUPPORTED, "heads of 512");
    fake_reset();
    fake.info.shared_max = 1024;
    m = fake_model();
    expect_refusal(&m, LARDER_EBACKEND, "shared memory");
    fake.info.shared_max = 64 << 10; /* the kernel on tensor cores takes more */
    m.p.geom.head_dim = m.p.rope_dims = 128;
    expect_refusal(&m, LARDER_EBACKEND, "heads of 128 elements need 87040");
}

static void a_document_that_does_not_fit_is_refused_with_its_plan(void **state)
{
    struct model m = fake_model();
    struct engine_result r = {0};
    struct larder_err e = {0, ""};
    struct backend *b;

    (void)state;
    fake_reset();
    fake.info.free = 4 << 20;
    b = open_cuda(&m, KV_F32);
    assert_int_equal(prefill(b, "full", N, &got_rows, &r, &e), LARDER_ENOMEM);
    assert_non_null(strstr(e.msg, "100 tokens need"));
    assert_non_null(strstr(e.msg, "workspace"));
    close_clean(b);
}

/* Rows that sessions hold are memory that a prefill does not have. */
static void what_sessions_hold_is_planned_for(void **state)
{
    enum { ROWS = 4096 };
    static float rows[ROWS * FAKE_HEAD_DIM];
    struct past_rows past[FAKE_LAYERS * FAKE_KV_HEADS];
    struct model m = fake_model();
    struct engine_result r = {0};
    struct larder_err e = {0, ""};
    struct backend *b;
    uint64_t alone, held;

    (void)state;
    fake_reset();
    for (int i = 0; i < FAKE_LAYERS * FAKE_KV_HEADS; i++)
        past[i] = (struct past_rows){ROWS, KV_F32, rows, rows, NULL, NULL};
    b = open_cuda(&m, KV_F32);
    assert_int_equal(prefill(b, "full", N, &got_rows, &r, &e), 0);
    engine_result_done(&r);
    alone = b->device_planned;
    assert_int_equal(b->ops->hold(b, past, &e), 0);
    held = cuda_held(cuda_of(b));
    assert_true(held >= 2ull * FAKE_LAYERS * FAKE_KV_HEADS * sizeof rows);
    assert_int_equal(prefill(b, "full", N, &got_rows, &r, &e), 0); /* no more rows than before */
    engine_result_done(&r);
    assert_int_equal(b->device_planned, alone + held);
    assert_true(b->device_planned >= b->device_peak);
    b->ops->hold_end(b, past);
    assert_int_equal(cuda_held(cuda_of(b)), 0);
    cuda_of(b)->info.free = alone + 1; /* enough for the next document, if nobody holds anything */
    cuda_of(b)->planned_rows = 0;
    cuda_of(b)->plan.held = 0;
    assert_int_equal(b->ops->hold(b, past, &e), 0);
    assert_int_equal(prefill(b, "full", N, &got_rows, &r, &e), LARDER_ENOMEM);
    assert_non_null(strstr(e.msg, "rows of sessions 16"));
    b->ops->hold_end(b, past);
    assert_int_equal(prefill(b, "full", N, &got_rows, &r, &e), 0);
    engine_result_done(&r);
    close_clean(b);
}

/* Each call of the device fails once, at each of its uses: the error is told, nothing leaks. */
static void every_failure_of_the_device_ends_the_job_cleanly(void **state)
{
    const enum fake_call calls[] = {FAKE_ALLOC, FAKE_PIN,  FAKE_COPY, FAKE_ZERO,
                                    FAKE_WAIT,  FAKE_SYNC, FAKE_GEMM, FAKE_LAUNCH};
    const char *policy = "asl,w=8,pool=3,lmin=2,lobs=2,rows=50%,select=12";
    struct model m = fake_model();
    struct larder_err e = {0, ""};

    (void)state;
    m.p.geom.n_layers = 4;
    for (size_t c = 0; c < sizeof calls / sizeof *calls; c++)
        for (long at = 1;; at += 1 + (calls[c] == FAKE_ALLOC ? at / 16 : at)) {
            struct engine_result r = {0};
            struct backend *b;
            int rc;

            fake_reset();
            fake.info.free = 1 << 20;
            b = open_cuda(&m, KV_BF16);
            cuda_of(b)->info.free = fake.info.free = 1ull << 30;
            fake.fail = calls[c];
            fake.fail_at = at;
            fake.fail_rc = calls[c] == FAKE_ALLOC ? CUDA_OUT_OF_MEMORY : 700;
            rc = prefill(b, policy, 24, &got_rows, &r, &e);
            if (!rc) { /* used less often than that */
                assert_true(fake.count[calls[c]] < at);
                engine_result_done(&r);
                close_clean(b);
                break;
            }
            if (calls[c] == FAKE_ALLOC || calls[c] == FAKE_PIN)
                assert_int_equal(rc, LARDER_ENOMEM);
            else
                assert_true(rc == LARDER_EBACKEND && strstr(e.msg, "illegal memory access"));
            if (calls[c] == FAKE_ALLOC)
                assert_non_null(strstr(e.msg, "no device memory for"));
            fake.fail_at = 0;
            assert_int_equal(prefill(b, "full", 9, &got_rows, &r, &e), 0); /* and it goes on */
            engine_result_done(&r);
            close_clean(b);
        }
}

static void host_memory_that_is_out_is_an_error(void **state)
{
    struct model m = fake_model();
    struct larder_err e = {0, ""};

    (void)state;
    for (long at = 0;; at += 1 + at / 4) {
        struct backend_opts o = {.dtype = KV_F32, .n_threads = 1};
        struct engine_result r = {0};
        struct backend *b = NULL;
        long left = at;
        int rc;

        fake_reset();
        mem_set_hook(cuda_count_down, &left);
        rc = backend_cuda.open(&b, &m, &o, &e);
        if (!rc)
            rc = prefill(b, "full", 9, &got_rows, &r, &e);
        mem_set_hook(NULL, NULL);
        engine_result_done(&r);
        if (b)
            b->ops->close(b);
        assert_int_equal(fake.n_live, 0);
        if (!rc)
            break;
        assert_int_equal(rc, LARDER_ENOMEM);
    }
}

/* ---- planning and geometry */

static void the_plan_of_a_large_model(void **state)
{
    /* the shape of Llama-3.1-8B, weights in bf16 */
    const struct model_params p = {.geom = {32, 32, 8, 128},
                                   .n_hidden = 4096,
                                   .n_ff = 14336,
                                   .n_vocab = 128256,
                                   .rope_dims = 128};
    const struct cuda_weights_size w = {
        .layer = 436ull << 20, .raw = 130ull << 20, .head = 1002ull << 20};
    struct cuda_plan a, b;
    struct larder_err e = {0, ""};
    struct cuda_info small = {.name = "a small card", .free = 8ull << 30};

    (void)state;
    a = cuda_plan_rows(&p, &w, KV_BF16, false, 131072, 0);
    assert_int_equal(a.hidden, 131072ull * 4096 * 4);
    assert_int_equal(a.kv, 131072ull * 2 * (4096 + 1024) * 2);
    assert_int_equal(a.weights, (130ull + 2 * 436) << 20);
    assert_int_equal(a.chosen, 131072ull * (1024 * (2 * 2 + 16) + 40 + 32 * 8 + 8 * 12));
    assert_int_equal(a.total, a.hidden + a.kv + a.weights + a.workspace + a.chosen);
    b = cuda_plan_rows(&p, &w, KV_BF16, true, 131072, 0);
    assert_int_equal(b.total - a.total, (30 * 436ull + 1002) << 20);
    assert_true(a.workspace < 2ull << 30);
    a = cuda_plan_rows(&p, &w, KV_BF16, false, 1u << 22, 0); /* 4 million: beyond 32 bits */
    assert_int_equal(a.hidden, 1ull << 36);
    assert_int_equal(cuda_plan_check(&a, 1u << 22, &small, &e), LARDER_ENOMEM);
    assert_non_null(strstr(e.msg, "a small card had 8192 MiB free"));
    assert_true(cuda_plan_resident(&w, 32, 80ull << 30));
    assert_false(cuda_plan_resident(&w, 32, 24ull << 30));
}

static void grids_cover_every_row_and_stay_within_limits(void **state)
{
    struct cuda_attend_args a = {
        .n_heads = 32, .group = 4, .d = 128, .n_rows = 131073, .n_tail = 131073, .n_splits = 1};
    struct cuda_launch l = cuda_grid_attend(&a, true, true);
    struct cuda_window_args w = {.n = 131072, .w = 33, .d = 128, .n_batch = 2};

    (void)state;
    assert_int_equal(l.grid[0], 2049);
    assert_int_equal(l.grid[1], 32);
    assert_int_equal(l.shared, 320 * 136 * 2);
    a.d = CUDA_MAX_HEAD_DIM;
    l = cuda_grid_attend(&a, false, true);
    assert_int_equal(l.kernel, CUDA_ATTEND);
    assert_true(l.grid[0] == 131073 * 4 / 16 + 1 && l.grid[1] == 8);
    assert_true(l.shared <= 99 << 10); /* what compute capability 8.6 and 12.0 give a block */
    a.n_rows = a.row0 = 5;
    assert_int_equal(cuda_grid_attend(&a, false, true).grid[0], 0);
    assert_int_equal(cuda_attend_splits(&a, 5), 1);
    a.row0 = 4; /* one row: 8 KV heads, a block each */
    assert_int_equal(cuda_attend_splits(&a, 100000), 32);
    assert_int_equal(cuda_attend_splits(&a, 700), 3);
    assert_int_equal(cuda_attend_splits(&a, 1), 1);
    a.row0 = 0;
    a.n_rows = 1000; /* 250 blocks for each of 8 heads */
    assert_int_equal(cuda_attend_splits(&a, 100000), 1);
    l = cuda_grid_window(CUDA_WINDOW_LOGITS, true, &w);
    assert_true(l.grid[0] == 2048 && l.grid[1] == 3 && l.grid[2] == 2);
    l = cuda_grid_window(CUDA_WINDOW_MASS, true, &w);
    assert_int_equal(l.grid[0], 512);
    assert_int_equal(cuda_window_batch(32, 131072, 64), 8);
    assert_int_equal(cuda_window_batch(32, 1u << 22, 64), 1);
    assert_int_equal(cuda_window_batch(32, 100, 8), 32);
    assert_int_equal(cuda_grid_flat(CUDA_DEQUANT, true, 1ull << 40, NULL).grid[0], 16384);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(policies_keep_the_rows_that_ref_keeps),
        cmocka_unit_test(replays_keep_the_rows_that_ref_keeps),
        cmocka_unit_test(models_of_every_kind_keep_the_rows_that_ref_keeps),
        cmocka_unit_test(bf16_stays_near_f32),
        cmocka_unit_test(weights_that_fit_are_read_once),
        cmocka_unit_test(weights_that_do_not_fit_stream),
        cmocka_unit_test(layers_may_be_asked_for_in_any_order),
        cmocka_unit_test(steps_take_host_memory_as_it_is),
        cmocka_unit_test(logits_are_the_same_from_slices_and_from_a_kept_matrix),
        cmocka_unit_test(a_buffer_is_copied_only_when_the_other_side_changed_it),
        cmocka_unit_test(what_cannot_be_done_is_said_at_the_start),
        cmocka_unit_test(a_document_that_does_not_fit_is_refused_with_its_plan),
        cmocka_unit_test(what_sessions_hold_is_planned_for),
        cmocka_unit_test(every_failure_of_the_device_ends_the_job_cleanly),
        cmocka_unit_test(host_memory_that_is_out_is_an_error),
        cmocka_unit_test(the_plan_of_a_large_model),
        cmocka_unit_test(grids_cover_every_row_and_stay_within_limits),
    };

    return cmocka_run_group_tests_name("cuda/backend", tests, NULL, NULL);
}
