/* Backend `cuda` on a GPU: products, whole prefills of fake models, what they keep and questions to
 * them against `ref`, the same bytes twice, and a device whose memory is gone. Exit status 77: there
 * is no GPU. */
#include "testlib.h"

#include <math.h>

#include "cache.h"
#include "cuda.h"
#include "decode.h"
#include "engine.h"
#include "fake_model.h"
#include "half.h"

enum { N = 150 };

static int open_on(const struct backend_ops *ops, const struct model *m, enum kv_dtype dtype,
                   bool stream, struct backend **ret, struct larder_err *e)
{
    struct backend_opts o = {.dtype = dtype, .n_threads = 2, .stream = stream};

    return ops->open(ret, m, &o, e);
}

static void prefill_by(struct backend *b, const char *policy, uint32_t n,
                       const struct engine_sink *sink, float *logits)
{
    uint32_t ids[FAKE_POSITIONS];
    struct engine_doc doc = {ids, n, NULL, NULL};
    struct engine_result r = {0};
    struct larder_err e = {0, ""};
    struct policy p;
    uint64_t seed = 11;

    for (uint32_t i = 0; i < n; i++)
        ids[i] = (uint32_t)(test_rand(&seed) % FAKE_VOCAB);
    assert_int_equal(policy_parse(policy, &p, NULL), 0);
    if (engine_prefill(b, &doc, &p, sink, &r, &e))
        fail_msg("%s: %s", policy, e.msg);
    memcpy(logits, r.logits, FAKE_VOCAB * sizeof *logits);
    engine_result_done(&r);
}

static void prefill(struct backend *b, uint32_t n, float *logits)
{
    prefill_by(b, "full", n, NULL, logits);
}

static void prefill_on(const struct backend_ops *ops, const struct model *m, enum kv_dtype dtype,
                       bool stream, uint32_t n, float *logits)
{
    struct larder_err e = {0, ""};
    struct backend *b;

    if (open_on(ops, m, dtype, stream, &b, &e))
        fail_msg("%s", e.msg);
    prefill(b, n, logits);
    b->ops->close(b);
}

static double error(const float *want, const float *got, int n)
{
    double err = 0, all = 0;

    for (int i = 0; i < n; i++) {
        err += pow(want[i] - got[i], 2);
        all += pow(want[i], 2);
    }
    return isfinite(err) ? err / all : INFINITY;
}

/* Of bf16: eight random layers. */
static double allowed(enum kv_dtype dtype)
{
    return dtype == KV_F32 ? 1e-8 : 3e-2;
}

static void logits_are_those_of_ref(void **state)
{
    const struct model models[] = {fake_model(), fake_rich_model()};
    const uint32_t lengths[] = {1, 31, 33, N};
    float want[FAKE_VOCAB], got[FAKE_VOCAB];

    (void)state;
    for (int i = 0; i < 8; i++) {
        const struct model *m = &models[i / 4];

        prefill_on(&backend_ref, m, KV_F32, false, lengths[i % 4], want);
        for (int c = 0; c < 4; c++) {
            enum kv_dtype dtype = c / 2 ? KV_BF16 : KV_F32;
            double err;

            prefill_on(&backend_cuda, m, dtype, c % 2, lengths[i % 4], got);
            err = error(want, got, FAKE_VOCAB);
            if (!(err < allowed(dtype)))
                fail_msg("model %d, %u rows, %s, streamed %d: error %g", i / 4, lengths[i % 4],
                         kv_dtype_name(dtype), c % 2, err);
        }
    }
}

/* Five tokens, then one, on stored rows. */
static void ask_on(const struct backend_ops *ops, const struct model *m, enum kv_dtype dtype,
                   const struct past_rows *past, float *logits)
{
    const uint32_t ids[] = {1, 7, 19, 4, 88, 120};
    struct weights *w = NULL;
    struct decode *d = NULL;
    struct backend *b;

    assert_int_equal(open_on(ops, m, dtype, false, &b, NULL), 0);
    assert_int_equal(weights_load(&w, b, NULL), 0);
    assert_int_equal(decode_open(&d, b, w, past, N, 6, NULL), 0);
    assert_int_equal(decode_step(d, ids, 5, logits, NULL), 0);
    assert_int_equal(decode_step(d, ids + 5, 1, logits + FAKE_VOCAB, NULL), 0);
    decode_close(d);
    weights_free(w);
    b->ops->close(b);
}

static void check_question(const struct model *m, const char *policy)
{
    struct past_rows past[FAKE_LAYERS * FAKE_KV_HEADS];
    float want[2 * FAKE_VOCAB], got[2 * FAKE_VOCAB];
    struct engine_result r = {0};
    struct backend *ref;
    struct policy p;
    struct cache c;
    struct engine_sink sink = {&c, cache_add, NULL};
    uint32_t ids[N];
    struct engine_doc doc = {ids, N, NULL, NULL};
    uint64_t seed = 12;

    for (uint32_t i = 0; i < N; i++)
        ids[i] = (uint32_t)(test_rand(&seed) % FAKE_VOCAB);
    assert_int_equal(open_on(&backend_ref, m, KV_F32, false, &ref, NULL), 0);
    assert_int_equal(policy_parse(policy, &p, NULL), 0);
    assert_int_equal(cache_init(&c, ref, true, NULL), 0);
    assert_int_equal(engine_prefill(ref, &doc, &p, &sink, &r, NULL), 0);
    for (int i = 0; i < FAKE_LAYERS * FAKE_KV_HEADS; i++) {
        const struct cached_head *h = &c.head[i];

        past[i] = (struct past_rows){h->n_rows, h->dtype, h->k, h->v, h->bias, h->position};
    }
    ask_on(&backend_ref, m, KV_F32, past, want);
    for (int i = 0; i < 2; i++) {
        enum kv_dtype dtype = i ? KV_BF16 : KV_F32;
        double err;

        ask_on(&backend_cuda, m, dtype, past, got);
        err = error(want, got, 2 * FAKE_VOCAB);
        if (!(err < allowed(dtype)))
            fail_msg("%s, %s: error %g", policy, kv_dtype_name(dtype), err);
    }
    engine_result_done(&r);
    cache_done(&c);
    ref->ops->close(ref);
}

static void questions_are_answered_as_by_ref(void **state)
{
    const char *policies[] = {"full,precision=bf16", "full,precision=int8", "full,precision=int4"};
    const struct model models[] = {fake_model(), fake_rich_model()};

    (void)state;
    for (int i = 0; i < 6; i++)
        check_question(&models[i % 2], policies[i / 2]);
}

static void the_same_input_gives_the_same_bytes(void **state)
{
    const struct model m = fake_rich_model();
    float first[FAKE_VOCAB], again[FAKE_VOCAB];

    (void)state;
    prefill_on(&backend_cuda, &m, KV_BF16, false, N, first);
    for (int i = 0; i < 3; i++) { /* streamed or not */
        prefill_on(&backend_cuda, &m, KV_BF16, i % 2, N, again);
        assert_memory_equal(first, again, sizeof first);
    }
}

/* ---- what is kept */

struct kept {
    bool row[FAKE_LAYERS][FAKE_KV_HEADS][N];
    float k[FAKE_LAYERS][FAKE_KV_HEADS][N][FAKE_HEAD_DIM];
};

static int take_layer(void *arg, uint32_t layer, const struct kept_rows *heads,
                      struct larder_err *e)
{
    struct kept *to = arg;

    (void)e;
    for (uint32_t g = 0; g < FAKE_KV_HEADS; g++)
        for (uint32_t i = 0; i < heads[g].n_rows; i++) {
            uint32_t at = heads[g].position[i];

            to->row[layer][g][at] = true;
            memcpy(to->k[layer][g][at], (const float *)heads[g].k + i * FAKE_HEAD_DIM,
                   sizeof to->k[layer][g][at]);
        }
    return 0;
}

static void keep_on(const struct backend_ops *ops, const char *policy, struct kept *ret)
{
    struct engine_sink sink = {ret, take_layer, NULL};
    struct model m = fake_model();
    struct larder_err e = {0, ""};
    struct backend *b;
    float logits[FAKE_VOCAB];

    memset(ret, 0, sizeof *ret);
    if (open_on(ops, &m, KV_F32, false, &b, &e))
        fail_msg("%s", e.msg);
    prefill_by(b, policy, N, &sink, logits);
    b->ops->close(b);
}

/* Chosen on the device, from scores that differ in their last digits: near ties may flip. */
static void kept_rows_are_those_of_ref(void **state)
{
    static const char *const policy[] = {"full",
                                         "snapkv,rows=25%,w=8,pool=3",
                                         "snapkv,rows=40,w=8,pool=5,poolkind=max,sink=2",
                                         "fastkv,w=8,pool=3,layer=2,rows=30,select=60",
                                         "asl,w=8,pool=3,lmin=3,lobs=3,rows=25%,select=60",
                                         "kvzip,rows=25%,shape=uniform,chunk=64",
                                         "kvzip+,rows=25%,shape=uniform,chunk=64",
                                         "matching,rows=25%,shape=uniform,chunk=64",
                                         "kvzip,rows=25%"};
    static struct kept want, got, again;

    (void)state;
    for (size_t p = 0; p < sizeof policy / sizeof *policy; p++) {
        uint32_t all = 0, other = 0;

        keep_on(&backend_ref, policy[p], &want);
        keep_on(&backend_cuda, policy[p], &got);
        keep_on(&backend_cuda, policy[p], &again);
        assert_memory_equal(&got, &again, sizeof got);
        for (int i = 0; i < FAKE_LAYERS * FAKE_KV_HEADS * N; i++) {
            bool *w = &want.row[0][0][0] + i, *g = &got.row[0][0][0] + i;

            all += *w;
            other += *w != *g;
            for (int c = 0; c < FAKE_HEAD_DIM && *w && *g; c++)
                assert_true(fabsf((&want.k[0][0][0][0])[i * FAKE_HEAD_DIM + c] -
                                  (&got.k[0][0][0][0])[i * FAKE_HEAD_DIM + c]) < 1e-2f);
        }
        if (50 * other > all)
            fail_msg("%s: of %u rows %u differ", policy[p], all, other);
    }
}

/* ---- products */

/* y += x w^T of shapes that models have, with TF32 and emulation off in f32. */
static void check_product(void *d, uint32_t n, uint32_t n_in, uint32_t n_out, bool bf16)
{
    uint64_t seed = n + n_in, elem = bf16 ? 2 : 4, n_x = (uint64_t)n * n_in;
    uint64_t n_w = (uint64_t)n_out * n_in, n_y = (uint64_t)n * n_out;
    float *host = malloc((n_x + n_w + n_y) * sizeof *host), *x = host, *w = x + n_x, *y = w + n_w;
    uint16_t *narrow = malloc((n_x + n_w) * sizeof *narrow);
    void *dx, *dw, *dy;
    struct cuda_gemm g = {
        .ldx = n_in, .ldy = n_out, .n = n, .n_in = n_in, .n_out = n_out, .bf16 = bf16, .add = true};
    double err = 0, all = 0;

    for (uint64_t i = 0; i < n_x + n_w; i++) {
        host[i] = test_randf(&seed);
        narrow[i] = f32_to_bf16(host[i]);
        if (bf16)
            host[i] = bf16_to_f32(narrow[i]);
    }
    assert_int_equal(cuda_device.alloc(d, n_x * elem, &dx), 0);
    assert_int_equal(cuda_device.alloc(d, n_w * elem, &dw), 0);
    assert_int_equal(cuda_device.alloc(d, n_y * 4, &dy), 0);
    cuda_device.copy(d, dx, bf16 ? (void *)narrow : x, n_x * elem, CUDA_TO_DEVICE, CUDA_COMPUTE);
    cuda_device.copy(d, dw, bf16 ? (void *)(narrow + n_x) : w, n_w * elem, CUDA_TO_DEVICE,
                     CUDA_COMPUTE);
    cuda_device.zero(d, dy, n_y * 4, CUDA_COMPUTE);
    g.x = dx;
    g.w = dw;
    g.y = dy;
    for (int i = 0; i < 2; i++)
        assert_int_equal(cuda_device.gemm(d, &g), 0);
    cuda_device.copy(d, y, dy, n_y * 4, CUDA_TO_HOST, CUDA_COMPUTE);
    assert_int_equal(cuda_device.sync(d, CUDA_COMPUTE), 0);
    for (uint32_t i = 0; i < n; i += 1 + n / 7)
        for (uint32_t j = 0; j < n_out; j++) {
            double sum = 0;

            for (uint32_t k = 0; k < n_in; k++)
                sum += 2.0 * x[(uint64_t)i * n_in + k] * w[(uint64_t)j * n_in + k];
            err += pow(sum - y[(uint64_t)i * n_out + j], 2);
            all += sum * sum;
        }
    if (!(err < 1e-10 * all)) /* TF32 is near 1e-7 */
        fail_msg("%u x %u x %u, bf16 %d: error %g", n, n_in, n_out, bf16, err / all);
    cuda_device.release(d, dx);
    cuda_device.release(d, dw);
    cuda_device.release(d, dy);
    free(host);
    free(narrow);
}

/* Products of one batch by the same matrix, into parts of wider rows: as one by one. */
static void batched_products_are_those_one_by_one(void **state)
{
    enum { BATCH = 3, ROWS = 33, IN = 64, OUT = 40, X_FAR = 50 * IN, LD = 72, Y_FAR = ROWS * LD };
    static uint16_t narrow[BATCH * X_FAR + OUT * IN];
    static float x[BATCH * X_FAR + OUT * IN], one[BATCH * Y_FAR], all[BATCH * Y_FAR];
    struct cuda_info info;
    uint64_t seed = 5;
    void *d, *dx, *dy;

    (void)state;
    assert_int_equal(cuda_device.open(&d, &info, NULL), 0);
    assert_int_equal(cuda_device.alloc(d, sizeof x, &dx), 0);
    assert_int_equal(cuda_device.alloc(d, sizeof all, &dy), 0);
    for (size_t i = 0; i < sizeof x / sizeof *x; i++) {
        x[i] = test_randf(&seed);
        narrow[i] = f32_to_bf16(x[i]);
    }
    for (int bf16 = 0; bf16 < 2; bf16++) {
        uint64_t elem = bf16 ? 2 : 4;
        struct cuda_gemm g = {.x = dx,
                              .w = (uint8_t *)dx + BATCH * X_FAR * elem,
                              .ldx = IN,
                              .ldy = LD,
                              .n = ROWS,
                              .n_in = IN,
                              .n_out = OUT,
                              .bf16 = bf16};

        cuda_device.copy(d, dx, bf16 ? (void *)narrow : x, bf16 ? sizeof narrow : sizeof x,
                         CUDA_TO_DEVICE, CUDA_COMPUTE);
        for (int batched = 0; batched < 2; batched++) {
            cuda_device.zero(d, dy, sizeof all, CUDA_COMPUTE);
            for (int i = 0; i < (batched ? 1 : BATCH); i++) {
                g.x = (uint8_t *)dx + i * X_FAR * elem;
                g.y = (float *)dy + i * Y_FAR + 16;
                g.batch = batched ? BATCH : 1;
                g.x_stride = X_FAR;
                g.y_stride = Y_FAR;
                assert_int_equal(cuda_device.gemm(d, &g), 0);
            }
            cuda_device.copy(d, batched ? all : one, dy, sizeof all, CUDA_TO_HOST, CUDA_COMPUTE);
            assert_int_equal(cuda_device.sync(d, CUDA_COMPUTE), 0);
        }
        for (int i = 0; i < BATCH * Y_FAR; i++)
            assert_true(fabsf(one[i] - all[i]) < 1e-5f);
        assert_true(one[16] != 0 && one[15] == 0 && all[16 + OUT] == 0);
    }
    cuda_device.release(d, dx);
    cuda_device.release(d, dy);
    cuda_device.close(d);
}

/* As the equations of a fit are made: x and w stored the other way, each its own in a batch. */
static void tall_products_are_those_of_the_transposed(void **state)
{
    enum { BATCH = 2, IN = 70, ROWS = 16, WIDE = 48, FAR = IN * WIDE, Y = ROWS * WIDE };
    static float p[BATCH * FAR], y[BATCH * Y];
    struct cuda_info info;
    uint64_t seed = 6;
    void *d, *dp, *dy;
    struct cuda_gemm g = {.ldx = WIDE,
                          .ldy = WIDE,
                          .n = ROWS,
                          .n_in = IN,
                          .n_out = WIDE,
                          .x_tall = true,
                          .w_tall = true,
                          .batch = BATCH,
                          .x_stride = FAR,
                          .w_stride = FAR,
                          .y_stride = Y};

    (void)state;
    for (int i = 0; i < BATCH * FAR; i++)
        p[i] = test_randf(&seed);
    assert_int_equal(cuda_device.open(&d, &info, NULL), 0);
    assert_int_equal(cuda_device.alloc(d, sizeof p, &dp), 0);
    assert_int_equal(cuda_device.alloc(d, sizeof y, &dy), 0);
    cuda_device.copy(d, dp, p, sizeof p, CUDA_TO_DEVICE, CUDA_COMPUTE);
    g.x = g.w = dp;
    g.y = dy;
    assert_int_equal(cuda_device.gemm(d, &g), 0);
    g.add = true;
    assert_int_equal(cuda_device.gemm(d, &g), 0);
    cuda_device.copy(d, y, dy, sizeof y, CUDA_TO_HOST, CUDA_COMPUTE);
    assert_int_equal(cuda_device.sync(d, CUDA_COMPUTE), 0);
    for (int i = 0; i < BATCH * Y; i++) {
        const float *of = p + i / Y * FAR;
        double sum = 0;

        for (int k = 0; k < IN; k++)
            sum += 2.0 * of[k * WIDE + i % Y / WIDE] * of[k * WIDE + i % WIDE];
        assert_true(fabs(sum - y[i]) < 1e-4);
    }
    cuda_device.release(d, dp);
    cuda_device.release(d, dy);
    cuda_device.close(d);
}

/* a = f f^T + 1 of n rows in wider ones; x solves it, or `bad` says that nothing does. */
static void check_system(void *d, uint32_t n, uint32_t cols, bool definite)
{
    uint64_t ld = n + 5, seed = n, bytes = (n * ld + cols * ld + 1) * sizeof(float);
    float *a = calloc(1, bytes), *x = a + n * ld, *f = malloc(n * n * sizeof *f);
    float *want = malloc(n * cols * sizeof *want);
    struct cuda_solve s = {.n = n, .cols = cols, .ld = ld};
    uint32_t bad = 77;
    void *memory;

    for (uint32_t i = 0; i < n * n; i++)
        f[i] = test_randf(&seed);
    for (uint32_t i = 0; i < n * cols; i++)
        want[i] = test_randf(&seed);
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < n; j++) {
            double sum = i == j ? definite ? 1 : -2.0 * n : 0;

            for (uint32_t k = 0; k < n; k++)
                sum += (double)f[i * n + k] * f[j * n + k];
            a[i * ld + j] = (float)sum;
            for (uint32_t c = 0; c < cols; c++)
                x[c * ld + i] += (float)(sum * want[j * cols + c]);
        }
    assert_int_equal(cuda_device.alloc(d, bytes, &memory), 0);
    cuda_device.copy(d, memory, a, bytes, CUDA_TO_DEVICE, CUDA_COMPUTE);
    s.a = memory;
    s.x = s.a + n * ld;
    s.bad = (uint32_t *)(s.x + cols * ld);
    assert_int_equal(cuda_device.solve(d, &s), 0);
    cuda_device.copy(d, x, s.x, cols * ld * sizeof *x, CUDA_TO_HOST, CUDA_COMPUTE);
    cuda_device.copy(d, &bad, s.bad, sizeof bad, CUDA_TO_HOST, CUDA_COMPUTE);
    assert_int_equal(cuda_device.sync(d, CUDA_COMPUTE), 0);
    assert_int_equal(bad == 0, definite);
    for (uint32_t i = 0; i < n * cols && definite; i++)
        assert_true(fabsf(x[i % cols * ld + i / cols] - want[i]) < 5e-3f);
    cuda_device.release(d, memory);
    free(want);
    free(f);
    free(a);
}

static void systems_are_solved(void **state)
{
    const uint32_t sizes[] = {1, 2, 31, 33, 130, 700};
    struct cuda_info info;
    void *d;

    (void)state;
    assert_int_equal(cuda_device.open(&d, &info, NULL), 0);
    for (int i = 0; i < 6; i++) {
        check_system(d, sizes[i], 1, true);
        check_system(d, sizes[i], 64, true);
        check_system(d, sizes[i], 1, false);
    }
    cuda_device.close(d);
}

static void products_are_exact_to_f32(void **state)
{
    const uint32_t rows[] = {1, 31, 33, 257};
    struct cuda_info info;
    void *d;

    (void)state;
    assert_int_equal(cuda_device.open(&d, &info, NULL), 0);
    for (int i = 0; i < 8; i++) {
        check_product(d, rows[i / 2], 576, 960, i % 2);
        check_product(d, rows[i / 2], 1536, 576, i % 2);
    }
    cuda_device.close(d);
}

/* Somebody else has the memory: a named error, and the device works again afterwards. */
static void memory_that_is_gone_is_a_named_error(void **state)
{
    struct model m = fake_model();
    struct larder_err e = {0, ""};
    struct backend *b = NULL;
    struct cuda_info info;
    float logits[FAKE_VOCAB];
    void *d, *hog[64];
    uint64_t left;
    int n = 0, rc;

    (void)state;
    assert_int_equal(cuda_device.open(&d, &info, NULL), 0);
    for (uint64_t step = 1ull << 36; step >= 1 << 20 && n < 64; step /= 2)
        while (n < 64 && !cuda_device.free_bytes(d, &left) && left > step &&
               !cuda_device.alloc(d, step, &hog[n]))
            n++;
    rc = open_on(&backend_cuda, &m, KV_F32, false, &b, &e);
    if (!rc) {
        struct engine_result r = {0};
        uint32_t ids[N] = {0};
        struct engine_doc doc = {ids, N, NULL, NULL};
        struct policy p;

        policy_parse("full", &p, NULL);
        rc = engine_prefill(b, &doc, &p, NULL, &r, &e);
        engine_result_done(&r);
        b->ops->close(b);
    }
    while (n)
        cuda_device.release(d, hog[--n]);
    cuda_device.close(d);
    assert_int_equal(rc, LARDER_ENOMEM);
    assert_true(strstr(e.msg, "memory") != NULL);
    prefill_on(&backend_cuda, &m, KV_F32, false, N, logits);
    assert_true(isfinite(logits[0]));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products_are_exact_to_f32),
        cmocka_unit_test(batched_products_are_those_one_by_one),
        cmocka_unit_test(tall_products_are_those_of_the_transposed),
        cmocka_unit_test(systems_are_solved),
        cmocka_unit_test(logits_are_those_of_ref),
        cmocka_unit_test(questions_are_answered_as_by_ref),
        cmocka_unit_test(the_same_input_gives_the_same_bytes),
        cmocka_unit_test(kept_rows_are_those_of_ref),
        cmocka_unit_test(memory_that_is_gone_is_a_named_error),
    };
    struct larder_err e = {0, ""};
    struct cuda_info info;
    void *d;

    if (cuda_device.open(&d, &info, &e)) {
        fprintf(stderr, "the GPU is not tested: %s\n", e.msg);
        return 77;
    }
    cuda_device.close(d);
    return cmocka_run_group_tests_name("device", tests, NULL, NULL);
}
