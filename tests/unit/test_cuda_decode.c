/* Backend `cuda` on a device that is host memory: new rows on top of stored ones, in one call and in
 * sessions that hold them, against `ref`; and how failures of the device end a session. */
#include "cuda_fixture.h"

#include "cache.h"
#include "decode.h"
#include "packed.h"

enum { N = 100 };

static void check_resume(enum kv_dtype stored, bool bias, enum kv_dtype elem)
{
    enum { D = FAKE_HEAD_DIM, TAIL = 7, NEW = 3, STRIDE = 9, MOST = 600 };
    const uint32_t n_past[FAKE_KV_HEADS] = {MOST, 33};
    static float rows[MOST * D], k[FAKE_KV_HEADS * STRIDE * D], v[FAKE_KV_HEADS * STRIDE * D];
    static float q[FAKE_HEADS * NEW * D], want[NEW * FAKE_HEADS * D], biases[MOST];
    static uint16_t kb[FAKE_KV_HEADS * STRIDE * D], vb[FAKE_KV_HEADS * STRIDE * D];
    static uint16_t qb[FAKE_HEADS * NEW * D], got16[NEW * FAKE_HEADS * D];
    static float got[NEW * FAKE_HEADS * D];
    static uint8_t tile[FAKE_KV_HEADS][2][MOST * D * 4];
    struct past_rows past[FAKE_KV_HEADS];
    struct resume r = {q, k, v, NEW, TAIL, NEW, STRIDE, past, want, 0, 0};
    struct model m = fake_model();
    struct backend *ref = open_ref(&m), *b = open_cuda(&m, elem);
    struct larder_err e = {0, ""};
    uint64_t seed = 31;

    fill(biases, MOST, &seed);
    for (uint32_t g = 0; g < FAKE_KV_HEADS; g++) {
        past[g] = (struct past_rows){
            n_past[g], stored, tile[g][0], tile[g][1], bias && !g ? biases : NULL, NULL};
        for (int i = 0; i < 2; i++) {
            fill(rows, MOST * D, &seed);
            if (stored == KV_F32)
                memcpy(tile[g][i], rows, sizeof rows);
            else if (stored == KV_BF16)
                dequant_round_bf16(rows, MOST * D, (uint16_t *)(void *)tile[g][i]);
            else if (!i)
                packed_from_k(stored, rows, n_past[g], D, tile[g][i]);
            else
                packed_from_v(stored, rows, n_past[g], D, tile[g][i]);
        }
    }
    fill(q, FAKE_HEADS * NEW * D, &seed);
    fill(k, FAKE_KV_HEADS * STRIDE * D, &seed);
    fill(v, FAKE_KV_HEADS * STRIDE * D, &seed);
    assert_int_equal(ref->ops->resume(ref, &r, &e), 0);
    if (elem == KV_BF16) {
        dequant_round_bf16(q, FAKE_HEADS * NEW * D, qb);
        dequant_round_bf16(k, FAKE_KV_HEADS * STRIDE * D, kb);
        dequant_round_bf16(v, FAKE_KV_HEADS * STRIDE * D, vb);
        r = (struct resume){qb, kb, vb, NEW, TAIL, NEW, STRIDE, past, got16, 0, 0};
    } else {
        r.o = got;
    }
    if (b->ops->resume(b, &r, &e))
        fail_msg("%s", e.msg);
    for (size_t i = 0; i < NEW * FAKE_HEADS * D; i++) {
        float x = elem == KV_BF16 ? bf16_to_f32(got16[i]) : got[i];

        if (!(fabsf(x - want[i]) < (elem == KV_BF16 ? 2e-2f : 1e-5f)))
            fail_msg("stored %d, bias %d, elements %d: %g, not %g", stored, bias, elem, x, want[i]);
    }
    ref->ops->close(ref);
    close_clean(b);
}

static void resume_reads_every_stored_type(void **state)
{
    const enum kv_dtype stored[] = {KV_F32, KV_BF16, KV_INT8, KV_INT4};

    (void)state;
    fake_reset();
    for (int i = 0; i < 8; i++) {
        check_resume(stored[i / 2], i % 2, KV_F32);
        check_resume(stored[i / 2], i % 2, KV_BF16);
    }
    assert_int_equal(fake.kernels[CUDA_MERGE], 16); /* 600 keys are shared by blocks */
}

/* ---- decoding */

enum { QUESTION = 9 };

/* A document's rows as `precision`, by ref, for who decodes. */
static void keep_rows(const struct model *m, const char *policy, struct cache *c,
                      struct past_rows *past)
{
    struct backend *ref = open_ref(m);
    struct engine_sink sink = {c, cache_add, NULL};
    struct engine_result r = {0};
    struct larder_err e = {0, ""};

    assert_int_equal(cache_init(c, ref, true, NULL), 0);
    if (prefill_tokens(ref, N, &policy, &sink, 1, &r, &e))
        fail_msg("%s", e.msg);
    for (uint32_t i = 0; i < m->p.geom.n_layers * FAKE_KV_HEADS; i++) {
        const struct cached_head *h = &c->head[i];

        past[i] = (struct past_rows){h->n_rows, h->dtype, h->k, h->v, h->bias, h->position};
    }
    engine_result_done(&r);
    ref->ops->close(ref);
}

/* A question in steps of different sizes, one of which is taken back. */
static int ask(struct backend *b, const struct past_rows *past, float logits[3][FAKE_VOCAB],
               struct larder_err *e)
{
    const uint32_t ids[QUESTION] = {1, 7, 19, 4, 88, 120, 5, 5, 200};
    struct weights *w = NULL;
    struct decode *d = NULL;
    int rc = weights_load(&w, b, e);

    if (!rc)
        rc = decode_open(&d, b, w, past, N, QUESTION, e);
    if (!rc)
        rc = decode_step(d, ids, 5, logits[0], e);
    if (!rc)
        rc = decode_step(d, ids + 7, 2, logits[1], e);
    if (!rc) {
        decode_rewind(d, 5);
        rc = decode_step(d, ids + 5, 3, logits[1], e);
    }
    if (!rc)
        rc = decode_step(d, ids + 8, 1, logits[2], e);
    decode_close(d);
    weights_free(w);
    return rc;
}

static void check_decoding(const struct model *m, const char *policy, enum kv_dtype elem)
{
    struct past_rows past[FAKE_LAYERS * FAKE_KV_HEADS];
    struct backend *ref = open_ref(m), *b = open_cuda(m, elem);
    float want[3][FAKE_VOCAB], got[3][FAKE_VOCAB];
    struct larder_err e = {0, ""};
    double err = 0, all = 0;
    struct cache c;

    keep_rows(m, policy, &c, past);
    assert_int_equal(ask(ref, past, want, &e), 0);
    if (ask(b, past, got, &e))
        fail_msg("%s", e.msg);
    for (int i = 0; i < 3 * FAKE_VOCAB; i++) {
        float x = want[i / FAKE_VOCAB][i % FAKE_VOCAB];

        err += pow(x - got[i / FAKE_VOCAB][i % FAKE_VOCAB], 2);
        all += pow(x, 2);
    }
    if (!(err < (elem == KV_BF16 ? 3e-2 : 1e-8) * all))
        fail_msg("%s, elements %d: error %g", policy, elem, err / all);
    cache_done(&c);
    ref->ops->close(ref);
    close_clean(b);
}

static void questions_are_answered_as_by_ref(void **state)
{
    const char *policies[] = {"full,precision=bf16", "snapkv,rows=40%,w=8,precision=int8",
                              "full,precision=int4"};
    const struct model models[] = {fake_model(), fake_rich_model()};

    (void)state;
    fake_reset();
    for (int i = 0; i < 6; i++) {
        check_decoding(&models[i % 2], policies[i / 2], KV_F32);
        check_decoding(&models[i % 2], policies[i / 2], KV_BF16);
    }
}

/* Rows of a session: one layer ahead, once, and as they are stored. */
static void held_rows_are_sent_once_and_a_layer_ahead(void **state)
{
    enum { D = FAKE_HEAD_DIM, KV = FAKE_KV_HEADS };
    static float q[FAKE_HEADS * D], k[KV * D], v[KV * D], o[FAKE_HEADS * D];
    struct past_rows past[FAKE_LAYERS * KV];
    struct model m = fake_model();
    struct backend *b;
    struct cuda_hold *h;
    uint64_t rows = 0, tables = FAKE_LAYERS * KV * sizeof(struct cuda_past);
    struct cache c;

    (void)state;
    fake_reset();
    b = open_cuda(&m, KV_F32);
    keep_rows(&m, "full,precision=int4", &c, past);
    for (int i = 0; i < FAKE_LAYERS * KV; i++)
        rows += tile_bytes_k(KV_INT4, N, D) + tile_bytes_v(KV_INT4, N, D) + N * sizeof(uint32_t);
    fake.sent = 0;
    assert_int_equal(b->ops->hold(b, past, NULL), 0);
    h = cuda_of(b)->holds;
    assert_int_equal(h->n_sent, 1);
    for (int pass = 0; pass < 2; pass++)
        for (uint32_t l = 0; l < FAKE_LAYERS; l++) {
            struct resume r = {q, k, v, 1, 1, 1, 1, past + l * KV, o, 0, N};

            assert_int_equal(b->ops->resume(b, &r, NULL), 0);
            assert_int_equal(h->n_sent, pass || l + 2 > FAKE_LAYERS ? FAKE_LAYERS : l + 2);
        }
    assert_int_equal(fake.sent, rows + tables);
    assert_int_equal(b->ops->hold(b, past, NULL), 0); /* two sessions share them */
    assert_ptr_equal(cuda_of(b)->holds, h);
    b->ops->hold_end(b, past);
    assert_non_null(cuda_of(b)->holds);
    b->ops->hold_end(b, past);
    assert_null(cuda_of(b)->holds);
    assert_int_equal(fake.sent, rows + tables);
    cache_done(&c);
    close_clean(b);
}

/* Each call of the device fails once, at each of its uses. */
static void every_failure_ends_a_session_cleanly(void **state)
{
    const enum fake_call calls[] = {FAKE_ALLOC, FAKE_COPY, FAKE_ZERO, FAKE_MARK,
                                    FAKE_WAIT,  FAKE_SYNC, FAKE_GEMM, FAKE_LAUNCH};
    struct past_rows past[FAKE_LAYERS * FAKE_KV_HEADS];
    float want[3][FAKE_VOCAB], got[3][FAKE_VOCAB];
    struct model m = fake_rich_model();
    struct larder_err e = {0, ""};
    struct cache c;

    (void)state;
    m.p.geom.n_layers = 2;
    keep_rows(&m, "full,precision=int8", &c, past);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        for (long at = 1;; at += calls[i] == FAKE_ALLOC ? 1 : 1 + at) {
            struct backend *b;
            int rc;

            fake_reset();
            b = open_cuda(&m, KV_F32);
            fake.fail = calls[i];
            fake.fail_at = at;
            fake.fail_rc = calls[i] == FAKE_ALLOC ? CUDA_OUT_OF_MEMORY : 700;
            rc = ask(b, past, want, &e);
            if (!rc) { /* marks of a layer that is freed tell nobody */
                if (calls[i] != FAKE_MARK)
                    assert_true(fake.count[calls[i]] < at);
                close_clean(b);
                if (fake.count[calls[i]] < at)
                    break;
                continue;
            }
            assert_int_equal(rc, calls[i] == FAKE_ALLOC ? LARDER_ENOMEM : LARDER_EBACKEND);
            assert_null(cuda_of(b)->holds);
            fake.fail_at = 0;
            assert_int_equal(ask(b, past, got, &e), 0); /* and it goes on */
            close_clean(b);
        }
    cache_done(&c);
}

static void host_memory_that_is_out_is_an_error(void **state)
{
    struct past_rows past[FAKE_LAYERS * FAKE_KV_HEADS];
    float logits[3][FAKE_VOCAB];
    struct model m = fake_model();
    struct larder_err e = {0, ""};
    struct cache c;

    (void)state;
    m.p.geom.n_layers = 2;
    keep_rows(&m, "full,precision=bf16", &c, past);
    for (long at = 0;; at++) {
        struct backend *b;
        long left = at;
        int rc;

        fake_reset();
        b = open_cuda(&m, KV_F32);
        mem_set_hook(cuda_count_down, &left);
        rc = ask(b, past, logits, &e);
        mem_set_hook(NULL, NULL);
        close_clean(b);
        if (!rc)
            break;
        assert_int_equal(rc, LARDER_ENOMEM);
    }
    cache_done(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resume_reads_every_stored_type),
        cmocka_unit_test(questions_are_answered_as_by_ref),
        cmocka_unit_test(held_rows_are_sent_once_and_a_layer_ahead),
        cmocka_unit_test(every_failure_ends_a_session_cleanly),
        cmocka_unit_test(host_memory_that_is_out_is_an_error),
    };

    return cmocka_run_group_tests_name("cuda/decode", tests, NULL, NULL);
}
