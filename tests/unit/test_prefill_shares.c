/* Tables of shares: their identity, reading between the measured budgets, and measuring. */
#include "engine_fixture.h"

#include "calibrate.h"
#include "shares.h"

static struct shares *table(uint32_t n_heads)
{
    struct shares *s = NULL;

    assert_int_equal(shares_new(&s, n_heads, NULL), 0);
    return s;
}

/* ---- identity */

static void an_id_is_what_another_program_computes(void **state)
{
    static const float a[] = {0, .25f, .5f}, b[] = {.125f, .5f, 1};
    struct shares *s = table(3);

    (void)state;
    assert_int_equal(shares_add(s, .25, a, NULL), 0);
    assert_int_equal(shares_add(s, .5, b, NULL), 0);
    /* python: sha256(pack('<3I2f6f', 1, 3, 2, .25, .5, 0, .25, .5, .125, .5, 1)) */
    assert_string_equal(s->id, "ece65223c40b");
    shares_free(s);
}

static void any_other_number_is_another_id(void **state)
{
    static const float a[] = {0, .25f, .5f}, b[] = {0, .25f, .50000006f};
    struct shares *x = table(3), *y = table(3), *z = table(3);

    (void)state;
    assert_int_equal(shares_add(x, .25, a, NULL), 0);
    assert_int_equal(shares_add(y, .25, b, NULL), 0);
    assert_int_equal(shares_add(z, .250001, a, NULL), 0);
    assert_string_not_equal(x->id, y->id);
    assert_string_not_equal(x->id, z->id);
    shares_free(x);
    shares_free(y);
    shares_free(z);
}

static void a_table_takes_ascending_budgets_and_fractions_only(void **state)
{
    static const float good[] = {0, 1}, high[] = {0, 1.5f}, nan[] = {NAN, 0};
    struct shares *s = table(2);

    (void)state;
    assert_int_equal(shares_add(s, 0, good, NULL), LARDER_EINVAL);
    assert_int_equal(shares_add(s, 1e-60, good, NULL), LARDER_EINVAL);
    assert_int_equal(shares_add(s, .5, high, NULL), LARDER_EINVAL);
    assert_int_equal(shares_add(s, .5, nan, NULL), LARDER_EINVAL);
    assert_int_equal(shares_add(s, .5, good, NULL), 0);
    assert_int_equal(shares_add(s, .5, good, NULL), LARDER_EINVAL);
    assert_int_equal(shares_add(s, .5 + 1e-12, good, NULL), LARDER_EINVAL);
    assert_int_equal(shares_add(s, 1.25, good, NULL), LARDER_EINVAL);
    assert_int_equal(s->n_budgets, 1);
    shares_free(s);
}

static void a_policy_names_the_table_it_reads(void **state)
{
    static const float a[] = {.5f};
    struct shares *s = table(1);
    struct larder_err e;
    struct policy p;
    char text[POLICY_TEXT_MAX];

    (void)state;
    assert_int_equal(shares_add(s, .5, a, NULL), 0);
    assert_int_equal(policy_parse("offline,rows=25%", &p, NULL), 0);
    assert_int_equal(shares_name_in(NULL, &p, &e), 0);
    assert_string_equal(p.profile, "");
    assert_int_equal(shares_name_in(s, &p, &e), 0);
    policy_print(&p, text);
    assert_string_equal(strstr(text, ",profile=") + 9, s->id);
    assert_int_equal(policy_parse(text, &p, NULL), 0);
    assert_int_equal(shares_name_in(s, &p, &e), 0);
    assert_int_equal(policy_parse("offline,profile=0123456789ab", &p, NULL), 0);
    assert_int_equal(shares_name_in(s, &p, &e), LARDER_EPOLICY);
    assert_non_null(strstr(e.msg, s->id));
    assert_int_equal(policy_parse("offline,shape=uniform", &p, NULL), 0);
    assert_int_equal(shares_name_in(s, &p, &e), 0);
    assert_string_equal(p.profile, "");
    shares_free(s);
}

static void the_other_numbers_are_part_of_the_id(void **state)
{
    static const float a[] = {0, .25f, .5f}, b[] = {.125f, .5f, 1};
    const struct profile_window w = {21, 14, 500}, none = {0, 0, 0}, other = {21, 14, 550};
    struct shares *s = table(3);

    (void)state;
    assert_int_equal(shares_add(s, .25, a, NULL), 0);
    assert_int_equal(shares_add(s, .5, b, NULL), 0);
    assert_int_equal(shares_set_window(s, &w, NULL), 0);
    /* python: sha256(pack('<3I2f6f3I', 2, 3, 2, .25, .5, 0, .25, .5, .125, .5, 1, 21, 14, 500)) */
    assert_string_equal(s->id, "d16ef6effee5");
    assert_int_equal(shares_set_window(s, &other, NULL), 0);
    assert_string_not_equal(s->id, "d16ef6effee5");
    assert_int_equal(shares_set_window(s, &none, NULL), 0);
    assert_string_equal(s->id, "ece65223c40b");
    shares_free(s);
}

static void a_window_policy_names_what_it_takes_numbers_from(void **state)
{
    static const float a[] = {.5f};
    const struct profile_window w = {21, 14, 500};
    struct shares *s = table(1);
    char text[POLICY_TEXT_MAX];
    struct larder_err e;
    struct policy p;

    (void)state;
    assert_int_equal(shares_add(s, .5, a, NULL), 0);
    assert_int_equal(policy_parse("asl", &p, NULL), 0);
    assert_int_equal(shares_name_in(s, &p, &e), 0); /* which says nothing of windows */
    assert_string_equal(p.profile, "");
    assert_int_equal(shares_set_window(s, &w, NULL), 0);
    assert_int_equal(shares_name_in(s, &p, &e), 0);
    policy_print(&p, text);
    assert_non_null(strstr(text, ",tau=auto,profile="));
    assert_string_equal(p.profile, s->id);
    assert_int_equal(policy_parse("asl,pool=7,lmin=10,tau=0.3", &p, NULL), 0);
    assert_int_equal(shares_name_in(s, &p, &e), 0);
    assert_string_equal(p.profile, "");
    assert_int_equal(policy_parse("asl,profile=0123456789ab", &p, NULL), 0);
    assert_int_equal(shares_name_in(s, &p, &e), LARDER_EPOLICY);
    assert_int_equal(shares_name_in(NULL, &p, &e), LARDER_EPOLICY);
    assert_non_null(strstr(e.msg, "has none"));
    shares_free(s);
}

static void only_a_policy_that_reads_a_table_may_name_one(void **state)
{
    char text[POLICY_TEXT_MAX];
    struct policy p;

    (void)state;
    assert_int_equal(policy_parse("tova,profile=0123456789ab", &p, NULL), LARDER_EPOLICY);
    assert_int_equal(policy_parse("snapkv,pool=7,profile=0123456789ab", &p, NULL), LARDER_EPOLICY);
    assert_int_equal(policy_parse("offline,profile=0123456789AB", &p, NULL), LARDER_EPOLICY);
    assert_int_equal(policy_parse("offline,profile=0123456789abc", &p, NULL), LARDER_EPOLICY);
    assert_int_equal(policy_parse("offline,profile=", &p, NULL), LARDER_EPOLICY);
    assert_int_equal(policy_parse("snapkv,profile=0123456789ab,shape=shares", &p, NULL), 0);
    policy_print(&p, text);
    assert_string_equal(strstr(text, ",profile="), ",profile=0123456789ab");
}

/* ---- reading */

static void shares_lie_between_the_measured_budgets(void **state)
{
    static const float a[] = {.1f, .3f}, b[] = {.2f, .8f};
    struct shares *s = table(2);
    double at[2];

    (void)state;
    assert_int_equal(shares_add(s, .2, a, NULL), 0);
    assert_int_equal(shares_add(s, .5, b, NULL), 0);
    shares_at(s, .2, at);
    assert_true(fabs(at[0] - .1) < 1e-6 && fabs(at[1] - .3) < 1e-6);
    shares_at(s, .35, at); /* half way */
    assert_true(fabs(at[0] - .15) < 1e-6 && fabs(at[1] - .55) < 1e-6);
    shares_at(s, .1, at); /* below the first: in proportion */
    assert_true(fabs(at[0] - .05) < 1e-6 && fabs(at[1] - .15) < 1e-6);
    shares_at(s, .75, at); /* half way to everything */
    assert_true(fabs(at[0] - .6) < 1e-6 && fabs(at[1] - .9) < 1e-6);
    shares_at(s, 1, at);
    assert_true(at[0] == 1 && at[1] == 1);
    shares_free(s);
}

static void one_threshold_serves_all_heads(void **state)
{
    static const float x[] = {0, 0, .9f, .8f, .7f, .1f}, y[] = {0, 0, .6f, .2f, .1f, .1f};
    static const float *const score[] = {x, y};
    float share[2];

    (void)state;
    /* 12 rows, half of them are 6: two first ones a head, the best two of the others */
    assert_int_equal(shares_measure(score, 2, 6, 2, .5, share, NULL), 0);
    assert_float_equal(share[0], 4.f / 6, 1e-6);
    assert_float_equal(share[1], 2.f / 6, 1e-6);
    assert_int_equal(shares_measure(score, 2, 6, 2, 1, share, NULL), 0);
    assert_float_equal(share[0] + share[1], 2, 1e-6);
}

/* ---- measuring a model */

struct seen {
    uint32_t n, last, of, cancel_at;
};

static int see(void *arg, const char *pass, uint32_t layer, uint32_t n_layers)
{
    struct seen *s = arg;

    assert_string_equal(pass, "calibrate");
    assert_int_equal(layer, s->n);
    s->n++;
    s->of = n_layers;
    return s->n == s->cancel_at ? LARDER_ECANCELED : 0;
}

static int measure(struct seen *seen, uint32_t n_texts, struct shares **ret)
{
    const struct calibrate_watch watch = {seen, see};
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct calibration *c = NULL;
    uint32_t ids[N];
    int rc = calibrate_open(&c, b, n_texts, &watch, NULL);

    make_ids(ids, N);
    for (uint32_t i = 0; i < n_texts && !rc; i++) {
        struct engine_doc doc = {ids, N - 10 * i, NULL, NULL};

        rc = calibrate_add(c, &doc, NULL);
    }
    if (!rc)
        rc = calibrate_shares(c, ret, NULL);
    calibrate_free(c);
    b->ops->close(b);
    return rc;
}

static void a_measured_table_spends_its_budgets(void **state)
{
    struct seen seen = {0};
    struct shares *s = NULL, *again = NULL;

    (void)state;
    assert_int_equal(measure(&seen, 2, &s), 0);
    assert_int_equal(s->n_heads, HEADS);
    assert_int_equal(seen.n, 2 * FAKE_LAYERS);
    assert_int_equal(seen.of, 2 * FAKE_LAYERS);
    for (uint32_t i = 0; i < s->n_budgets; i++) {
        double sum = 0;

        for (uint32_t h = 0; h < HEADS; h++)
            sum += s->share[i * HEADS + h];
        /* the first four rows of a head stay whatever the budget is */
        assert_true(fabs(sum / HEADS - fmax(s->budget[i], 4. / N)) < .02);
    }
    seen = (struct seen){0};
    assert_int_equal(measure(&seen, 2, &again), 0);
    assert_string_equal(s->id, again->id);
    shares_free(s);
    shares_free(again);
}

static void a_measured_table_shapes_a_prefill(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 2);
    struct outcome o = {0};
    struct engine_sink sink = {&o, on_layer, on_progress};
    struct seen seen = {0};
    struct shares *s = NULL;
    uint32_t ids[N], total = 0;
    double share[HEADS];
    struct policy p;

    (void)state;
    assert_int_equal(measure(&seen, 1, &s), 0);
    make_ids(ids, N);
    assert_int_equal(policy_parse("kvzip,shape=shares,rows=25%,chunk=512", &p, NULL), 0);
    assert_int_equal(
        engine_prefill(b, &(struct engine_doc){ids, N, NULL, s}, &p, &sink, &o.r, &o.e), 0);
    shares_at(s, .25, share);
    for (int i = 0; i < HEADS; i++) {
        double want = share[i] * N < p.sink ? p.sink : share[i] * N;

        total += o.head[i].n_rows;
        assert_true(fabs(o.head[i].n_rows - want) <= 2); /* whole rows, and the exact total */
    }
    assert_int_equal(total, (uint32_t)(HEADS * N * .25 + .5));
    drop(&o);
    o.rc = engine_prefill(b, &(struct engine_doc){ids, N, NULL, NULL}, &p, &sink, &o.r, &o.e);
    assert_int_equal(o.rc, LARDER_EUNSUPPORTED);
    drop(&o);
    shares_free(s);
    b->ops->close(b);
}

static void a_calibration_can_be_canceled(void **state)
{
    struct seen seen = {.cancel_at = FAKE_LAYERS + 3};
    struct shares *s = NULL;

    (void)state;
    assert_int_equal(measure(&seen, 2, &s), LARDER_ECANCELED);
    assert_null(s);
}

static void the_built_in_texts_are_there(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < CALIBRATION_TEXTS; i++) {
        struct calibration_text t = calibration_text(i);

        assert_true(t.len > 3000 && t.text[t.len - 1] == '\n' && t.text[0] >= 'A');
        assert_null(memchr(t.text, 0, t.len));
    }
}

int main(void)
{
    const struct CMUnitTest tables[] = {
        cmocka_unit_test(an_id_is_what_another_program_computes),
        cmocka_unit_test(any_other_number_is_another_id),
        cmocka_unit_test(a_table_takes_ascending_budgets_and_fractions_only),
        cmocka_unit_test(a_policy_names_the_table_it_reads),
        cmocka_unit_test(the_other_numbers_are_part_of_the_id),
        cmocka_unit_test(a_window_policy_names_what_it_takes_numbers_from),
        cmocka_unit_test(only_a_policy_that_reads_a_table_may_name_one),
        cmocka_unit_test(shares_lie_between_the_measured_budgets),
        cmocka_unit_test(one_threshold_serves_all_heads),
        cmocka_unit_test(the_built_in_texts_are_there),
    };
    const struct CMUnitTest measuring[] = {
        cmocka_unit_test(a_measured_table_spends_its_budgets),
        cmocka_unit_test(a_measured_table_shapes_a_prefill),
        cmocka_unit_test(a_calibration_can_be_canceled),
    };
    int failed = cmocka_run_group_tests(tables, NULL, NULL);

    return failed + run_on_every_backend(measuring, sizeof measuring / sizeof measuring[0]);
}
