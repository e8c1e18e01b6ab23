/* The resumed decode on a small random model, on every backend of the build. */
#include "testlib.h"

#include "decode.h"
#include "engine_fixture.h"

enum { Q = 7 };
static const uint32_t question[Q] = {5, 17, 80, 3, 199, 41, 66};

/* Logits after n ids on stored rows, in steps of `step` tokens. */
static void ask_ids(struct backend *b, const struct past_rows *past, uint32_t next_pos,
                    const uint32_t *ids, uint32_t n, uint32_t step, float *logits)
{
    struct weights *w = NULL;
    struct decode *d = NULL;

    assert_int_equal(weights_load(&w, b, NULL), 0);
    assert_int_equal(decode_open(&d, b, w, past, next_pos, n, NULL), 0);
    for (uint32_t i = 0; i < n; i += step)
        assert_int_equal(decode_step(d, ids + i, n - i < step ? n - i : step, logits, NULL), 0);
    decode_close(d);
    weights_free(w);
}

static void ask_rows(struct backend *b, const struct past_rows *past, uint32_t next_pos,
                     uint32_t step, float *logits)
{
    ask_ids(b, past, next_pos, question, Q, step, logits);
}

static void as_past(const struct outcome *o, struct past_rows *past)
{
    for (int i = 0; i < HEADS; i++)
        past[i] = (struct past_rows){
            o->head[i].n_rows,  o->head[i].dtype, o->head[i].k, o->head[i].v, NULL,
            o->head[i].position};
}

static void ask(const struct model *m, const struct outcome *o, uint32_t step, float *logits)
{
    struct backend *b = open_backend(m, 2);
    struct past_rows past[HEADS];

    as_past(o, past);
    ask_rows(b, past, o->r.next_pos, step, logits);
    b->ops->close(b);
}

static void a_pruned_cache_that_kept_everything_answers_bit_for_bit(void **state)
{
    const char *policies[] = {"snapkv,rows=all", "snapkv,rows=400", ASL ",rows=400,tau=9"};
    struct model m = fake_model();
    struct outcome full = run(&m, N, "full");
    float want[FAKE_VOCAB], got[FAKE_VOCAB];

    (void)state;
    ask(&m, &full, Q, want);
    for (int p = 0; p < 3; p++) {
        struct outcome o = run(&m, N, policies[p]);

        ask(&m, &o, Q, got);
        assert_memory_equal(want, got, sizeof want);
        drop(&o);
    }
    drop(&full);
}

/* One long prefill of document and question is the definition of the answer. `ref` computes
 * every row in one order of operations, so there it holds to the bit. */
static void resuming_equals_one_long_prefill(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct outcome doc = run(&m, N, "full"), both = {0};
    float got[FAKE_VOCAB];
    uint32_t ids[N + Q];

    (void)state;
    make_ids(ids, N);
    memcpy(ids + N, question, sizeof question);
    prefill_ids(b, ids, N + Q, "full", &both);
    ask(&m, &doc, Q, got);
    if (!strcmp(backend_name, "ref"))
        assert_memory_equal(both.r.logits, got, sizeof got);
    assert_true(worst(both.r.logits, got) < 1e-4f);
    drop(&doc);
    drop(&both);
    b->ops->close(b);
}

/* Many new rows at once take a path of their own in a backend. */
static void a_long_question_equals_one_long_prefill(void **state)
{
    enum { LONG = 75 };
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct outcome doc = {0}, both = {0};
    struct past_rows past[HEADS];
    struct weights *w = NULL;
    struct decode *d = NULL;
    float got[FAKE_VOCAB];
    uint32_t ids[N];

    (void)state;
    make_ids(ids, N);
    prefill_ids(b, ids, N, "full", &both);
    prefill_ids(b, ids, N - LONG, "full", &doc);
    as_past(&doc, past);
    assert_int_equal(weights_load(&w, b, NULL), 0);
    assert_int_equal(decode_open(&d, b, w, past, N - LONG, LONG, NULL), 0);
    assert_int_equal(decode_step(d, ids + N - LONG, LONG, got, NULL), 0);
    assert_true(worst(both.r.logits, got) < 1e-4f);
    decode_close(d);
    weights_free(w);
    drop(&doc);
    drop(&both);
    b->ops->close(b);
}

static void question_may_come_in_pieces(void **state)
{
    struct model m = fake_model();
    struct outcome o = run(&m, N, "snapkv,rows=40,w=8");
    float whole[FAKE_VOCAB], pieces[FAKE_VOCAB];

    (void)state;
    ask(&m, &o, Q, whole);
    for (uint32_t step = 1; step < Q; step += 2) {
        ask(&m, &o, step, pieces);
        assert_true(worst(whole, pieces) < 1e-4f);
    }
    drop(&o);
}

/* The answer under teacher forcing: row i of one step is the last row of a step that ends there. */
static void a_step_gives_the_logits_of_its_last_rows(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct outcome o = run(&m, N, "snapkv,rows=40,w=8");
    struct past_rows past[HEADS];
    static float rows[Q][FAKE_VOCAB];
    float one[FAKE_VOCAB];
    struct weights *w = NULL;
    struct decode *d = NULL;

    (void)state;
    as_past(&o, past);
    assert_int_equal(weights_load(&w, b, NULL), 0);
    for (uint32_t n_last = 1; n_last <= Q; n_last += 2) {
        assert_int_equal(decode_open(&d, b, w, past, N, Q, NULL), 0);
        assert_int_equal(decode_step_rows(d, question, Q, n_last, rows[0], NULL), 0);
        for (uint32_t i = 0; i < n_last; i++) {
            decode_rewind(d, 0);
            assert_int_equal(decode_step(d, question, Q - n_last + i + 1, one, NULL), 0);
            assert_true(worst(rows[i], one) < 1e-4f);
        }
        decode_close(d);
    }
    weights_free(w);
    drop(&o);
    b->ops->close(b);
}

static void rewinding_forgets_tokens(void **state)
{
    static const uint32_t astray[3] = {1, 2, 202};
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct outcome o = run(&m, N, "snapkv,rows=40,w=8");
    struct past_rows past[HEADS];
    float want[FAKE_VOCAB], got[FAKE_VOCAB];
    struct weights *w = NULL;
    struct decode *d = NULL;

    (void)state;
    as_past(&o, past);
    assert_int_equal(weights_load(&w, b, NULL), 0);
    assert_int_equal(decode_open(&d, b, w, past, N, Q, NULL), 0);
    assert_int_equal(decode_step(d, question, 4, want, NULL), 0);
    assert_int_equal(decode_step(d, question + 4, Q - 4, want, NULL), 0);
    decode_rewind(d, 4);
    assert_int_equal(decode_step(d, astray, 3, got, NULL), 0);
    decode_rewind(d, 4);
    assert_int_equal(decode_step(d, question + 4, Q - 4, got, NULL), 0);
    assert_memory_equal(want, got, sizeof want);
    decode_close(d);
    weights_free(w);
    drop(&o);
    b->ops->close(b);
}

static void decoding_without_a_cache_is_a_prefill(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct past_rows past[HEADS] = {0};
    struct outcome o = {0};
    float got[FAKE_VOCAB];

    (void)state;
    for (int i = 0; i < HEADS; i++)
        past[i].dtype = KV_F32;
    ask_rows(b, past, 0, Q, got);
    prefill_ids(b, question, Q, "full", &o);
    assert_true(worst(o.r.logits, got) < 1e-4f);
    drop(&o);
    b->ops->close(b);
}

/* Rows in bf16 answer like the same values in f32. */
static void past_rows_may_be_bf16(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct outcome o = run(&m, N, "snapkv,rows=40,w=8");
    struct past_rows past[HEADS], narrow[HEADS];
    float want[FAKE_VOCAB], got[FAKE_VOCAB];

    (void)state;
    as_past(&o, past);
    memcpy(narrow, past, sizeof past);
    for (int i = 0; i < HEADS; i++) {
        size_t n = (size_t)past[i].n_rows * FAKE_HEAD_DIM;
        uint16_t *k = malloc(2 * n), *v = malloc(2 * n);

        for (size_t j = 0; j < n; j++) {
            k[j] = f32_to_bf16(o.head[i].k[j]);
            v[j] = f32_to_bf16(o.head[i].v[j]);
            o.head[i].k[j] = bf16_to_f32(k[j]);
            o.head[i].v[j] = bf16_to_f32(v[j]);
        }
        narrow[i].dtype = KV_BF16;
        narrow[i].k = k;
        narrow[i].v = v;
    }
    ask_rows(b, past, N, Q, want);
    ask_rows(b, narrow, N, Q, got);
    assert_true(worst(want, got) < 1e-5f);
    for (int i = 0; i < HEADS; i++) {
        free((void *)(uintptr_t)narrow[i].k);
        free((void *)(uintptr_t)narrow[i].v);
    }
    drop(&o);
    b->ops->close(b);
}

/* f32 rows for the tiles of `past`. */
static void expand_past(const struct past_rows *past, struct past_rows *wide)
{
    for (int i = 0; i < HEADS; i++) {
        uint64_t n = (uint64_t)past[i].n_rows * FAKE_HEAD_DIM;
        float *k = malloc(n * sizeof *k), *v = malloc(n * sizeof *v);

        packed_expand_k_f32(past[i].dtype, past[i].k, past[i].n_rows, FAKE_HEAD_DIM, k);
        packed_expand_v_f32(past[i].dtype, past[i].v, past[i].n_rows, FAKE_HEAD_DIM, v);
        wide[i] = (struct past_rows){past[i].n_rows, KV_F32, k, v, past[i].bias, past[i].position};
    }
}

/* Rows that left the engine packed: short steps read the codes, long ones expand them first. The
 * sums are the same in another order, through eight layers. */
static void packed_rows_answer_like_what_they_stand_for(void **state)
{
    const char *policies[] = {"snapkv,rows=77,w=8,precision=int4",
                              "snapkv,rows=77,w=8,precision=int8", "full,precision=int4"};
    enum { LONG = 30 };
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct past_rows past[HEADS], wide[HEADS];
    float bias[N], want[FAKE_VOCAB], got[FAKE_VOCAB];
    uint32_t ids[LONG];

    (void)state;
    make_ids(ids, LONG);
    for (uint32_t i = 0; i < N; i++)
        bias[i] = (float)(i % 5) / 4 - 0.5f;
    for (int p = 0; p < 3; p++) {
        struct outcome o = run(&m, N, policies[p]);

        as_past(&o, past);
        for (int i = 0; i < HEADS; i++) {
            assert_int_equal(past[i].dtype, p == 1 ? KV_INT8 : KV_INT4);
            past[i].bias = i % 2 ? bias : NULL;
        }
        expand_past(past, wide);
        for (uint32_t step = 1; step <= LONG; step = 3 * step + 1) { /* 1, 4, 13 */
            ask_ids(b, wide, N, ids, LONG, step, want);
            ask_ids(b, past, N, ids, LONG, step, got);
            assert_true(worst(want, got) < 1e-4f);
        }
        ask_ids(b, wide, N, ids, LONG, LONG, want);
        ask_ids(b, past, N, ids, LONG, LONG, got);
        assert_true(worst(want, got) < 1e-4f);
        for (int i = 0; i < HEADS; i++) {
            free((void *)(uintptr_t)wide[i].k);
            free((void *)(uintptr_t)wide[i].v);
        }
        drop(&o);
    }
    b->ops->close(b);
}

/* A bias of minus a lot removes a row; a bias of log 2 counts it twice. */
static void bias_is_added_to_the_logit(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct outcome o = run(&m, N, "snapkv,rows=40,w=8");
    struct past_rows past[HEADS], fewer[HEADS];
    float off[40] = {0}, twice[40] = {0}, want[FAKE_VOCAB], got[FAKE_VOCAB];

    (void)state;
    as_past(&o, past);
    as_past(&o, fewer);
    off[39] = -1e30f;
    for (int i = 0; i < HEADS; i++) {
        past[i].bias = off;
        fewer[i].n_rows = 39;
    }
    ask_rows(b, past, N, Q, got);
    ask_rows(b, fewer, N, Q, want);
    assert_true(worst(want, got) < 1e-5f);

    twice[0] = logf(2);
    for (int i = 0; i < HEADS; i++) {
        float *k = malloc(41 * FAKE_HEAD_DIM * sizeof *k),
              *v = malloc(41 * FAKE_HEAD_DIM * sizeof *v);

        memcpy(k, o.head[i].k, 40 * FAKE_HEAD_DIM * sizeof *k);
        memcpy(v, o.head[i].v, 40 * FAKE_HEAD_DIM * sizeof *v);
        memcpy(k + 40 * FAKE_HEAD_DIM, k, FAKE_HEAD_DIM * sizeof *k);
        memcpy(v + 40 * FAKE_HEAD_DIM, v, FAKE_HEAD_DIM * sizeof *v);
        past[i].bias = twice;
        fewer[i] = (struct past_rows){41, KV_F32, k, v, NULL, NULL};
    }
    ask_rows(b, past, N, Q, got);
    ask_rows(b, fewer, N, Q, want);
    assert_true(worst(want, got) < 1e-4f);
    for (int i = 0; i < HEADS; i++) {
        free((void *)(uintptr_t)fewer[i].k);
        free((void *)(uintptr_t)fewer[i].v);
    }
    drop(&o);
    b->ops->close(b);
}

static void decode_refuses_what_does_not_fit(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 1);
    struct past_rows past[HEADS] = {0};
    const uint32_t stray = FAKE_VOCAB;
    float logits[FAKE_VOCAB];
    struct weights *w = NULL;
    struct decode *d = NULL;

    (void)state;
    for (int i = 0; i < HEADS; i++)
        past[i].dtype = KV_F32;
    assert_int_equal(weights_load(&w, b, NULL), 0);
    assert_int_equal(decode_open(&d, b, w, past, FAKE_POSITIONS - 3, 4, NULL), LARDER_ETOOLONG);
    assert_int_equal(decode_open(&d, b, w, past, UINT32_MAX, 4, NULL), LARDER_ETOOLONG);
    assert_int_equal(decode_open(&d, b, w, past, 0, UINT32_MAX, NULL), LARDER_ETOOLONG);
    assert_null(d);
    assert_int_equal(decode_open(&d, b, w, past, FAKE_POSITIONS - 4, 4, NULL), 0);
    assert_int_equal(decode_step(d, question, 5, logits, NULL), LARDER_ETOOLONG);
    assert_int_equal(decode_step(d, question, 0, logits, NULL), LARDER_EEMPTY);
    assert_int_equal(decode_step(d, &stray, 1, logits, NULL), LARDER_EINVAL);
    assert_int_equal(decode_step_rows(d, question, 2, 0, logits, NULL), LARDER_EINVAL);
    assert_int_equal(decode_step_rows(d, question, 2, 3, logits, NULL), LARDER_EINVAL);
    assert_int_equal(decode_step(d, question, 4, logits, NULL), 0);
    assert_int_equal(decode_step(d, question, 1, logits, NULL), LARDER_ETOOLONG);
    decode_close(d);
    decode_close(NULL);
    weights_free(w);
    weights_free(NULL);
    b->ops->close(b);
}

static void decode_survives_failing_allocations(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 1);
    struct past_rows past[HEADS] = {0};
    float logits[FAKE_VOCAB];
    int rc = LARDER_ENOMEM;

    (void)state;
    for (int i = 0; i < HEADS; i++)
        past[i].dtype = KV_F32;
    for (long n = 0; rc; n++) {
        struct weights *w = NULL;
        struct decode *d = NULL;
        long left = n;

        mem_set_hook(test_fail_nth, &left);
        rc = weights_load(&w, b, NULL);
        if (!rc)
            rc = decode_open(&d, b, w, past, 0, Q, NULL);
        if (!rc)
            rc = decode_step(d, question, Q, logits, NULL);
        mem_set_hook(NULL, NULL);
        decode_close(d);
        weights_free(w);
        assert_true(rc == 0 || rc == LARDER_ENOMEM);
    }
    b->ops->close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_pruned_cache_that_kept_everything_answers_bit_for_bit),
        cmocka_unit_test(resuming_equals_one_long_prefill),
        cmocka_unit_test(a_long_question_equals_one_long_prefill),
        cmocka_unit_test(question_may_come_in_pieces),
        cmocka_unit_test(a_step_gives_the_logits_of_its_last_rows),
        cmocka_unit_test(rewinding_forgets_tokens),
        cmocka_unit_test(decoding_without_a_cache_is_a_prefill),
        cmocka_unit_test(past_rows_may_be_bf16),
        cmocka_unit_test(packed_rows_answer_like_what_they_stand_for),
        cmocka_unit_test(bias_is_added_to_the_logit),
        cmocka_unit_test(decode_refuses_what_does_not_fit),
        cmocka_unit_test(decode_survives_failing_allocations),
    };

    return run_on_every_backend(tests, sizeof tests / sizeof tests[0]);
}
