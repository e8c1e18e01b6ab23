/* What architectures differ in - biases, norms of q and k, partial rotation, scaled tables, sliding
 * windows - on a small random model, on every backend of the build. */
#include "testlib.h"

#include "decode.h"
#include "engine_fixture.h"

enum { Q = 7, LONG = 40, WINDOW = FAKE_WINDOW };

static void as_past(const struct outcome *o, struct past_rows *past)
{
    for (int i = 0; i < HEADS; i++)
        past[i] = (struct past_rows){
            o->head[i].n_rows,  o->head[i].dtype, o->head[i].k, o->head[i].v, NULL,
            o->head[i].position};
}

/* Logits after ids on the rows of an outcome, `step` tokens at a time. */
static void ask(struct backend *b, const struct outcome *o, const uint32_t *ids, uint32_t n,
                uint32_t step, float *logits)
{
    struct past_rows past[HEADS];
    struct weights *w = NULL;
    struct decode *d = NULL;

    as_past(o, past);
    assert_int_equal(weights_load(&w, b, NULL), 0);
    assert_int_equal(decode_open(&d, b, w, past, o->r.next_pos, n, NULL), 0);
    for (uint32_t i = 0; i < n; i += step)
        assert_int_equal(decode_step(d, ids + i, n - i < step ? n - i : step, logits, NULL), 0);
    decode_close(d);
    weights_free(w);
}

/* ---- decoding */

/* A long question has rows that see none of the document in the layers that slide. */
static void resuming_equals_one_long_prefill(void **state)
{
    const struct model models[] = {fake_model(), fake_sliding_model(), fake_rich_model()};
    const uint32_t lengths[] = {Q, LONG, WINDOW + 20}, steps[] = {1, 5, 1000};

    (void)state;
    for (int k = 0; k < 3; k++) {
        struct backend *b = open_backend(&models[k], 2);

        for (int i = 0; i < 3; i++) {
            struct outcome doc = {0}, both = {0};
            uint32_t ids[N + WINDOW + 20], n = lengths[i];
            float got[FAKE_VOCAB];

            make_ids(ids, N + n);
            prefill_ids(b, ids, N, "full", &doc);
            prefill_ids(b, ids, N + n, "full", &both);
            for (int s = 0; s < 3; s++) {
                ask(b, &doc, ids + N, n, steps[s], got);
                if (!strcmp(backend_name, "ref"))
                    assert_memory_equal(both.r.logits, got, sizeof got);
                assert_true(worst(both.r.logits, got) < 1e-4f);
            }
            drop(&doc);
            drop(&both);
        }
        b->ops->close(b);
    }
}

/* A row that slid out of sight changes nothing, whatever it holds. */
static void rows_out_of_the_window_are_not_seen(void **state)
{
    static const uint32_t always[FAKE_LAYERS] = {20, 20, 20, 20, 20, 20, 20, 20};
    struct model m = fake_model();
    struct outcome o;
    struct backend *b;
    float want[FAKE_VOCAB], got[FAKE_VOCAB];
    uint32_t ids[LONG];

    (void)state;
    o = run(&m, N, "full"); /* all rows are there */
    m.p.sliding = always;
    b = open_backend(&m, 2);
    make_ids(ids, LONG);
    ask(b, &o, ids, LONG, LONG, want);
    for (int i = 0; i < HEADS; i++)
        for (uint32_t j = 0; j < (N - 20 + 1) * FAKE_HEAD_DIM; j++)
            o.head[i].k[j] = o.head[i].v[j] = 1e6f;
    ask(b, &o, ids, LONG, LONG, got);
    assert_memory_equal(want, got, sizeof want);
    ask(b, &o, ids, LONG, 1, got);
    assert_true(worst(want, got) < 1e-4f);
    for (int i = 0; i < HEADS; i++) /* the first that is seen */
        o.head[i].v[(N - 20 + 1) * FAKE_HEAD_DIM] += 1;
    ask(b, &o, ids, LONG, LONG, got);
    assert_true(worst(want, got) > 1e-3f);
    drop(&o);
    b->ops->close(b);
}

static void rows_without_positions_are_refused(void **state)
{
    struct model m = fake_sliding_model();
    struct outcome o = run(&m, N, "full");
    struct backend *b = open_backend(&m, 1);
    struct past_rows past[HEADS];
    struct weights *w = NULL;
    struct decode *d = NULL;

    (void)state;
    as_past(&o, past);
    past[0].position = NULL;
    assert_int_equal(weights_load(&w, b, NULL), 0);
    assert_int_equal(decode_open(&d, b, w, past, N, Q, NULL), LARDER_EINVAL);
    assert_null(d);
    weights_free(w);
    drop(&o);
    b->ops->close(b);
}

/* ---- scores and rows */

/* Window mass by its formula. */
static void mass_of_head(const float *q, const float *k, uint32_t n, uint32_t w, uint32_t sliding,
                         double *mass)
{
    enum { D = FAKE_HEAD_DIM };

    memset(mass, 0, (n - w) * sizeof *mass);
    for (uint32_t i = n - w; i < n; i++) {
        uint32_t from = sliding && i + 1 > sliding ? i + 1 - sliding : 0;
        double p[64], sum = 0;

        for (uint32_t j = from; j <= i; j++) {
            double dot = 0;

            for (uint32_t c = 0; c < D; c++)
                dot += (double)q[i * D + c] * k[j * D + c];
            sum += p[j] = exp(dot / sqrt(D));
        }
        for (uint32_t j = from; j < n - w; j++)
            mass[j] += p[j] / sum;
    }
}

static void window_mass_is_that_of_visible_keys(void **state)
{
    enum { ROWS = 61, STRIDE = 64, SEEN_FROM = 6 };
    static float q[FAKE_HEADS * STRIDE * FAKE_HEAD_DIM], k[FAKE_KV_HEADS * STRIDE * FAKE_HEAD_DIM];
    const uint32_t windows[] = {0, 4, 9, 30, 61, 100};
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    uint64_t seed = 3;

    (void)state;
    for (size_t i = 0; i < sizeof q / sizeof q[0]; i++)
        q[i] = 2 * test_randf(&seed);
    for (size_t i = 0; i < sizeof k / sizeof k[0]; i++)
        k[i] = test_randf(&seed);
    for (int i = 0; i < 6; i++) {
        float mass[FAKE_HEADS * (ROWS - SEEN_FROM)];
        double want[ROWS];
        struct window_mass x = {q, k, ROWS, STRIDE, SEEN_FROM, windows[i], mass};

        assert_int_equal(b->ops->window(b, &x, NULL), 0);
        for (uint32_t h = 0; h < FAKE_HEADS; h++) {
            uint32_t g = h / (FAKE_HEADS / FAKE_KV_HEADS);

            mass_of_head(q + h * STRIDE * FAKE_HEAD_DIM, k + g * STRIDE * FAKE_HEAD_DIM, ROWS,
                         SEEN_FROM, windows[i], want);
            for (uint32_t j = 0; j < ROWS - SEEN_FROM; j++)
                assert_true(fabs(mass[h * (ROWS - SEEN_FROM) + j] - want[j]) < 1e-5);
        }
    }
    b->ops->close(b);
}

static void rows_that_no_question_can_see_are_not_kept(void **state)
{
    const char *policies[] = {"full",
                              "snapkv,rows=30,w=8",
                              "keydiff,rows=30",
                              "knorm,rows=30",
                              "observed,rows=30",
                              "streaming,rows=30",
                              "tova,rows=30",
                              "expected,rows=30",
                              "defensive,rows=30,w=8",
                              "adakv,rows=30,w=8",
                              "pyramidkv,rows=30,w=8",
                              "criticalkv,rows=30,w=8",
                              "snapkv,rows=30,w=8,shape=global",
                              "full,precision=int4"};
    struct model m = fake_sliding_model();

    (void)state;
    for (size_t p = 0; p < sizeof policies / sizeof policies[0]; p++) {
        struct outcome o = run(&m, N, policies[p]);

        for (int i = 0; i < HEADS; i++) {
            bool slides = fake_every_second[i / FAKE_KV_HEADS];

            assert_true(o.head[i].n_rows > 0);
            if (slides)
                assert_true(o.head[i].position[0] > N - WINDOW);
            if (!strncmp(policies[p], "full", 4))
                assert_int_equal(o.head[i].n_rows, slides ? WINDOW - 1 : N);
        }
        drop(&o);
    }
}

/* A budget goes to rows that can be seen: all of it, where there are enough of them. */
static void a_budget_is_not_spent_on_rows_out_of_sight(void **state)
{
    const char *policies[] = {"snapkv,rows=30,w=8", "knorm,rows=30,sink=0",
                              "keydiff,rows=30,sink=0"};
    struct model m = fake_sliding_model();

    (void)state;
    for (int p = 0; p < 3; p++) {
        struct outcome o = run(&m, N, policies[p]);

        for (int i = 0; i < HEADS; i++)
            assert_int_equal(o.head[i].n_rows, 30);
        drop(&o);
    }
}

static void what_means_nothing_in_a_window_is_refused(void **state)
{
    const char *policies[] = {ASL ",rows=40,select=60",
                              "fastkv,rows=40,select=60,w=8,layer=3",
                              "gemfilter,rows=40,layer=3",
                              "asl2pass,rows=40,w=8,lmin=3,lobs=3",
                              "pyramidinfer",
                              "kvzip,rows=50%,chunk=64",
                              "matching,rows=50%,shape=uniform,chunk=64"};
    struct model m = fake_sliding_model();

    (void)state;
    for (size_t p = 0; p < sizeof policies / sizeof policies[0]; p++) {
        struct outcome o = prefill(&m, N, policies[p]);

        if (o.rc != LARDER_EUNSUPPORTED || !strstr(o.e.msg, "positions"))
            fail_msg("%s: %d, %s", policies[p], o.rc, o.e.msg);
        drop(&o);
    }
}

/* What fits the window is computed as if there were none. */
static void a_document_within_the_window_is_an_ordinary_one(void **state)
{
    const char *policies[] = {ASL ",rows=15,select=20", "kvzip,rows=50%,chunk=16", "full"};
    struct model m = fake_sliding_model(), plain = fake_model();

    (void)state;
    for (int p = 0; p < 3; p++) {
        struct outcome a = run(&m, 24, policies[p]), b = run(&plain, 24, policies[p]);

        assert_same_logits(&a, &b);
        assert_same_rows(&a, &b);
        assert_same_positions(&a, &b);
        drop(&a);
        drop(&b);
    }
}

/* ---- everything */

static void threads_do_not_change_a_result(void **state)
{
    struct model m = fake_rich_model();
    struct outcome one = {0}, three = {0};
    uint32_t ids[N];

    (void)state;
    make_ids(ids, N);
    for (int i = 0; i < 2; i++) {
        struct backend *b = open_backend(&m, i ? 3 : 1);

        prefill_ids(b, ids, N, "snapkv,rows=30,w=8", i ? &three : &one);
        b->ops->close(b);
    }
    assert_same_logits(&one, &three);
    assert_same_rows(&one, &three);
    drop(&one);
    drop(&three);
}

/* Each of them matters, so that a backend that forgot one is found. */
static void every_variant_changes_the_answer(void **state)
{
    struct model m[6];
    struct outcome plain;

    (void)state;
    for (int i = 0; i < 6; i++)
        m[i] = fake_model();
    plain = run(&m[0], N, "full");
    m[1].p.has_qkv_bias = true;
    m[2].p.has_qk_norm = true;
    m[3].p.sliding = fake_every_second;
    m[4].p.rope.factor = 1.2;
    m[5].p.rope_dims = 20;
    for (int i = 1; i < 6; i++) {
        struct outcome o = run(&m[i], N, "full");

        assert_true(worst(plain.r.logits, o.r.logits) > 1e-2f);
        drop(&o);
    }
    drop(&plain);
}

/* longrope: the document's length chooses the table, for what comes after it too. */
static void the_document_chooses_the_table(void **state)
{
    static double slow[FAKE_HEAD_DIM / 2];
    struct model both = fake_model(), fast = both, all_slow = both;
    struct outcome want, got;

    (void)state;
    rope_plain(3e5, FAKE_HEAD_DIM, slow);
    both.p.rope_long = all_slow.p.rope = (struct rope){slow, 1};
    both.p.n_rope_short = 100;
    want = run(&fast, 100, "full");
    got = run(&both, 100, "full");
    assert_same_logits(&want, &got);
    drop(&want);
    drop(&got);
    want = run(&all_slow, 101, "full");
    got = run(&both, 101, "full");
    assert_same_logits(&want, &got);
    drop(&want);
    drop(&got);
    for (uint32_t n = 95; n <= 101;
         n += 6) { /* a question that passes the border, and one behind */
        const struct model *alike = n > 100 ? &all_slow : &fast;
        struct backend *b = open_backend(&both, 2), *c = open_backend(alike, 2);
        float x[FAKE_VOCAB], y[FAKE_VOCAB];
        uint32_t ids[LONG];

        make_ids(ids, LONG);
        got = run(&both, n, "full");
        ask(b, &got, ids, LONG, 3, x);
        ask(c, &got, ids, LONG, 3, y);
        assert_memory_equal(x, y, sizeof x);
        drop(&got);
        b->ops->close(b);
        c->ops->close(c);
    }
}

/* ---- tables */

static void llama3_slows_long_waves_only(void **state)
{
    const struct rope_llama3 s = {8, 1, 4, 8192};
    double plain[64], freq[64];

    (void)state;
    rope_plain(5e5, 128, plain);
    rope_plain(5e5, 128, freq);
    rope_scale_llama3(&s, 128, freq);
    for (int i = 0; i < 64; i++) {
        double turns = 8192 * plain[i] / 6.283185307179586;

        if (turns > 4)
            assert_true(freq[i] == plain[i]);
        else if (turns < 1)
            assert_true(freq[i] == plain[i] / 8);
        else
            assert_true(freq[i] < plain[i] && freq[i] > plain[i] / 8);
    }
    assert_true(freq[0] == 1 && freq[63] == plain[63] / 8);
}

static void longrope_has_an_attention_factor(void **state)
{
    (void)state;
    assert_true(rope_longrope_factor(4096, 4096) == 1);
    assert_true(fabs(rope_longrope_factor(131072, 4096) - 1.1902380714238083) < 1e-12);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resuming_equals_one_long_prefill),
        cmocka_unit_test(rows_out_of_the_window_are_not_seen),
        cmocka_unit_test(rows_without_positions_are_refused),
        cmocka_unit_test(window_mass_is_that_of_visible_keys),
        cmocka_unit_test(rows_that_no_question_can_see_are_not_kept),
        cmocka_unit_test(a_budget_is_not_spent_on_rows_out_of_sight),
        cmocka_unit_test(what_means_nothing_in_a_window_is_refused),
        cmocka_unit_test(a_document_within_the_window_is_an_ordinary_one),
        cmocka_unit_test(threads_do_not_change_a_result),
        cmocka_unit_test(every_variant_changes_the_answer),
        cmocka_unit_test(the_document_chooses_the_table),
        cmocka_unit_test(llama3_slows_long_waves_only),
        cmocka_unit_test(longrope_has_an_attention_factor),
    };

    return run_on_every_backend(tests, sizeof tests / sizeof tests[0]);
}
