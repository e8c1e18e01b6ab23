/* Several ways of keeping from one pass, and the choice among budgets by certificate. */
#include "engine_fixture.h"

enum { N_WAYS = 4 };

static const char *const ways[N_WAYS] = {
    "kvzip,shape=uniform,rows=50%",
    "kvzip,shape=layer,rows=25%",
    "kvzip,shape=uniform,rows=50%,precision=int4",
    "kvzip,shape=uniform,rows=all",
};

/* Without a replay, where each has scores of its own. */
static const char *const plain_ways[N_WAYS] = {
    "keydiff,rows=50%",
    "criticalkv,rows=50%,w=8",
    "full,precision=int8",
    "observed,rows=25%,shape=global",
};

static int prefill_each(const char *const *text, uint32_t n, struct outcome *o)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct engine_sink sink[N_WAYS];
    struct engine_result r[N_WAYS];
    struct policy p[N_WAYS];
    uint32_t ids[N];
    int rc;

    make_ids(ids, N);
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(policy_parse(text[i], &p[i], NULL), 0);
        sink[i] = (struct engine_sink){&o[i], on_layer, on_progress};
    }
    rc = engine_prefill_each(b, &(struct engine_doc){ids, N, NULL, NULL}, p, sink, n, r, NULL);
    for (uint32_t i = 0; i < n; i++)
        o[i].r = r[i];
    b->ops->close(b);
    return rc;
}

static void assert_same_certificate(const struct certificate *a, const struct certificate *b)
{
    assert_int_equal(a->n_probes, b->n_probes);
    assert_true(fabs(a->kl - b->kl) < 1e-9 && a->agreement == b->agreement);
    assert_int_equal(a->worst_at, b->worst_at);
}

static void assert_together_is_as_alone(const char *const *text, bool certified)
{
    struct model m = fake_model();
    struct outcome all[N_WAYS] = {0};

    assert_int_equal(prefill_each(text, N_WAYS, all), 0);
    for (int i = 0; i < N_WAYS; i++) {
        struct outcome one = run(&m, N, text[i]);

        assert_same_positions(&one, &all[i]);
        if (one.head[0].dtype == KV_F32)
            assert_same_rows(&one, &all[i]);
        assert_same_logits(&one, &all[i]);
        assert_int_equal(one.r.certificate.n_probes > 0, certified);
        assert_same_certificate(&one.r.certificate, &all[i].r.certificate);
        assert_int_equal(all[i].n_progress, i ? 0 : FAKE_LAYERS);
        drop(&one);
        drop(&all[i]);
    }
}

static void together_is_as_alone(void **state)
{
    (void)state;
    assert_together_is_as_alone(ways, true);
    assert_together_is_as_alone(plain_ways, false);
}

static void policies_of_different_passes_are_not_mixed(void **state)
{
    static const char *const pairs[][2] = {
        {"kvzip,shape=layer", "kvzip,shape=layer,chunk=64"},
        {"kvzip,shape=layer", "kvzip+,shape=layer"},
        {"kvzip,shape=layer", "kvzip,shape=layer,rows=auto"},
        {"kvzip,shape=layer", "keydiff,rows=50%"},
        {"keydiff,rows=50%", "kvzip,shape=layer"},
        {"keydiff,rows=50%", "asl,rows=50%,w=8"},
        {"keydiff,rows=50%", "snapkv,rows=50%,obs=probe"},
    };

    (void)state;
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        const char *const *two = pairs[i];
        struct outcome o[2] = {0};

        assert_int_equal(prefill_each(two, 2, o), LARDER_EINVAL);
        drop(&o[0]);
        drop(&o[1]);
    }
}

/* ---- rows=auto */

#define AUTO "kvzip,shape=uniform,rows=auto,max_kl="

static uint32_t rows_for(uint32_t n, const char *max_kl)
{
    struct model m = fake_model();
    char text[64];
    struct outcome o;
    uint32_t rows, passes;

    snprintf(text, sizeof text, AUTO "%s", max_kl);
    o = run(&m, n, text);
    rows = o.head[0].n_rows;
    passes = rows <= n / 4 ? 1 : rows < n || n < N ? 2 : 3; /* a short one has no small budgets */
    assert_int_equal(o.n_progress, passes * FAKE_LAYERS);
    drop(&o);
    return rows;
}

static void fewer_rows_stay_where_more_divergence_is_accepted(void **state)
{
    struct model m = fake_model();
    struct outcome half = run(&m, N, ways[0]);
    char text[32];

    (void)state;
    assert_int_equal(rows_for(N, "1000"), N / 16); /* a smaller budget would hold the sinks only */
    assert_int_equal(rows_for(N, "0"), N);
    snprintf(text, sizeof text, "%.9f", half.r.certificate.kl + 1e-9);
    assert_true(rows_for(N, text) <= N / 2);
    drop(&half);
}

static void the_rows_are_those_of_the_budget_itself(void **state)
{
    struct model m = fake_model();
    struct outcome a = run(&m, N, AUTO "1000"), b = run(&m, N, "kvzip,shape=uniform,rows=6.25%");

    (void)state;
    assert_same_positions(&a, &b);
    assert_same_rows(&a, &b);
    assert_same_certificate(&a.r.certificate, &b.r.certificate);
    drop(&a);
    drop(&b);
}

static void a_document_too_short_to_be_asked_is_kept(void **state)
{
    (void)state;
    assert_int_equal(rows_for(12, "1000"), 12);
}

static void what_no_budget_reaches_is_an_error(void **state)
{
    struct model m = fake_model();
    struct outcome o = prefill(&m, N, "kvzip,shape=uniform,precision=int4,rows=auto,max_kl=0");

    (void)state;
    assert_int_equal(o.rc, LARDER_EBUDGET);
    assert_non_null(strstr(o.e.msg, "max_kl"));
    assert_int_equal(o.n_layers, 0);
    drop(&o);
}

static void a_ladder_can_be_canceled(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 1);
    struct outcome o = {.cancel_at = 2};
    uint32_t ids[N];

    (void)state;
    make_ids(ids, N);
    prefill_ids(b, ids, N, AUTO "1", &o);
    assert_int_equal(o.rc, LARDER_ECANCELED);
    assert_int_equal(o.n_layers, 0);
    drop(&o);
    b->ops->close(b);
}

static void only_certified_policies_have_a_ladder(void **state)
{
    struct policy p;

    (void)state;
    assert_int_equal(policy_parse("snapkv,rows=auto", &p, NULL), LARDER_EPOLICY);
    assert_int_equal(policy_parse("kvzip,rows=auto", &p, NULL), LARDER_EPOLICY);
    assert_int_equal(policy_parse("kvzip,shape=layer,rows=50%,max_kl=1", &p, NULL), LARDER_EPOLICY);
    assert_int_equal(policy_parse("kvzip,shape=layer,rows=auto,max_kl=0.1", &p, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(together_is_as_alone),
        cmocka_unit_test(policies_of_different_passes_are_not_mixed),
        cmocka_unit_test(fewer_rows_stay_where_more_divergence_is_accepted),
        cmocka_unit_test(the_rows_are_those_of_the_budget_itself),
        cmocka_unit_test(a_document_too_short_to_be_asked_is_kept),
        cmocka_unit_test(what_no_budget_reaches_is_an_error),
        cmocka_unit_test(a_ladder_can_be_canceled),
        cmocka_unit_test(only_certified_policies_have_a_ladder),
    };

    return run_on_every_backend(tests, sizeof tests / sizeof tests[0]);
}
