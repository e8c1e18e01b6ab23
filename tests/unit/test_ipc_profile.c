/* A profile from outside: read whole or refused with a line that says why. */
#include "testlib.h"

#include "profile.h"
#include "sha256.h"

enum { LAYERS = 2, HEADS = 3, N = LAYERS * HEADS };

#define FP "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

/* {budget: share of each head}, with the id that goes with w. */
static json_t *make(const struct profile_window *w)
{
    static const float budget[] = {0.25f, 0.5f};
    static const float share[2 * N] = {0.125f, 0.25f, 0.5f, 0, 0.375f, 0.25f,
                                       0.25f,  0.5f,  1,    0, 0.75f,  0.5f};
    char id[PROFILE_ID_LEN + 1];
    json_t *shares = json_array();

    assert_int_equal(profile_id(N, 2, budget, share, w, id, NULL), 0);
    for (int i = 0; i < 2; i++) {
        json_t *list = json_array();

        for (int h = 0; h < N; h++)
            json_array_append_new(list, json_real(share[i * N + h]));
        json_array_append_new(shares,
                              json_pack("{s:f, s:o}", "budget", (double)budget[i], "share", list));
    }
    return json_pack("{s:i, s:s, s:s, s:i, s:i, s:i, s:s, s:s, s:s, s:[{s:s, s:i}], s:o}",
                     "version", w->pool ? 2 : 1, "model_fingerprint", FP, "id", id, "n_layers",
                     LAYERS, "n_kv_heads", HEADS, "measured", 1700000000, "backend", "cpu", "dtype",
                     "f32", "template", "plain", "texts", "name", "t.txt", "n_tokens", 9, "shares",
                     shares);
}

/* The profile that the cases change. */
static json_t *good(void)
{
    const struct profile_window none = {0};

    return make(&none);
}

/* One of version 2, whose id is that of pool 21, lmin 1, tau 0.45. */
static json_t *with_window(json_t *window)
{
    const struct profile_window w = {21, 1, 450};
    json_t *j = make(&w);

    json_object_set_new(j, "window", window);
    return j;
}

/* "pool", "lmin" and "tau", as they are. */
static json_t *window(int pool, int lmin, double tau)
{
    return with_window(json_pack("{s:i, s:i, s:f}", "pool", pool, "lmin", lmin, "tau", tau));
}

static int parse(json_t *j, struct profile *p, struct larder_err *e)
{
    char *text = json_dumps(j, JSON_COMPACT | JSON_REAL_PRECISION(9));
    int rc = profile_parse(text, strlen(text), p, e);

    free(text);
    json_decref(j);
    return rc;
}

static void assert_refused(json_t *j, const char *why)
{
    struct profile p = {0};
    struct larder_err e = {0, ""};

    assert_int_equal(parse(j, &p, &e), LARDER_EINVAL);
    if (!strstr(e.msg, why))
        fail_msg("'%s' does not say '%s'", e.msg, why);
}

static json_t *with(const char *key, json_t *v)
{
    json_t *j = good();

    json_object_set_new(j, key, v);
    return j;
}

static json_t *without(const char *key)
{
    json_t *j = good();

    json_object_del(j, key);
    return j;
}

/* Share `h` of the second budget replaced. */
static json_t *with_share(size_t h, json_t *v)
{
    json_t *j = good(), *b = json_array_get(json_object_get(j, "shares"), 1);

    json_array_set_new(json_object_get(b, "share"), h, v);
    return j;
}

static void a_profile_is_read_as_it_was_written(void **state)
{
    struct profile p = {0};
    struct larder_err e;
    uint8_t fp[32];

    (void)state;
    assert_int_equal(parse(good(), &p, &e), 0);
    assert_int_equal(p.n_layers, LAYERS);
    assert_int_equal(p.n_kv_heads, HEADS);
    assert_int_equal(p.n_budgets, 2);
    assert_true(p.budget[0] == 0.25f && p.budget[1] == 0.5f);
    assert_true(p.share[2] == 0.5f && p.share[N + 4] == 0.75f);
    assert_int_equal(sha256_unhex(FP, fp), 0);
    assert_int_equal(profile_fits(&p, fp, LAYERS, HEADS, &e), 0);
    assert_int_equal(profile_fits(&p, fp, LAYERS, HEADS + 1, &e), LARDER_EINVAL);
    fp[31]++;
    assert_int_equal(profile_fits(&p, fp, LAYERS, HEADS, &e), LARDER_EINVAL);
    assert_int_equal(p.window.pool, 0); /* version 1 */
    profile_done(&p);
    profile_done(&p);
}

static void a_window_is_read_as_it_was_written(void **state)
{
    struct profile p = {0};

    (void)state;
    assert_int_equal(parse(window(21, 1, 0.45), &p, NULL), 0);
    assert_int_equal(p.window.pool, 21);
    assert_int_equal(p.window.l_min, 1);
    assert_int_equal(p.window.tau_milli, 450);
    profile_done(&p);
}

static void windows_that_cannot_be_are_refused(void **state)
{
    (void)state;
    assert_refused(with_window(json_pack("{s:i}", "pool", 21)), "its numbers are");
    assert_refused(window(21, 1, 0.5), "its numbers are");
    assert_refused(window(20, 1, 0.45), "not odd");
    assert_refused(window(0, 1, 0.45), "not odd");
    assert_refused(window(1025, 1, 0.45), "pool");
    assert_refused(window(21, LAYERS, 0.45), "lmin");
    assert_refused(window(21, 0, 0.45), "lmin 0");
    assert_refused(window(21, 1, 0), "tau");
    assert_refused(window(21, 1, 1.5), "tau");
    assert_refused(window(21, 1, 0.4505), "tau");
    assert_refused(with_window(json_pack("{s:i, s:i, s:s}", "pool", 21, "lmin", 1, "tau", "0.45")),
                   "tau");
    assert_refused(with_window(json_pack("{s:i, s:f}", "lmin", 1, "tau", 0.45)), "pool");
    assert_refused(with_window(json_pack("{s:i, s:i}", "pool", 21, "lmin", 1)), "tau");
    assert_refused(with_window(json_pack("{s:i, s:f}", "pool", 21, "tau", 0.45)), "lmin");
    assert_refused(with_window(json_pack("{s:i, s:b}", "pool", 21, "surprise", 1)), "surprise");
    assert_refused(with_window(json_integer(21)), "no object");
    assert_refused(with("window", json_pack("{s:i}", "pool", 21)), "version 1");
    assert_refused(with("version", json_integer(2)), "version 2");
}

static void every_field_is_needed_and_typed(void **state)
{
    static const char *const keys[] = {
        "version", "model_fingerprint", "id",    "n_layers", "n_kv_heads", "measured", "backend",
        "dtype",   "template",          "texts", "shares"};

    (void)state;
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        assert_refused(without(keys[i]), keys[i]);
        assert_refused(with(keys[i], json_null()), keys[i]);
    }
    assert_refused(with("surprise", json_true()), "surprise");
}

static void numbers_out_of_range_are_refused(void **state)
{
    (void)state;
    assert_refused(with_share(0, json_real(-0.25)), "0 to 1");
    assert_refused(with_share(0, json_real(1.5)), "0 to 1");
    assert_refused(with_share(0, json_string("0.5")), "0 to 1");
    assert_refused(with_share(0, json_true()), "0 to 1");
    assert_refused(with("n_layers", json_integer(0)), "cannot be");
    assert_refused(with("n_layers", json_integer(1 << 20)), "n_layers");
    assert_refused(with("n_kv_heads", json_integer(HEADS + 1)), "shares for");
    assert_refused(with("n_layers", json_integer(512)), "fewer shares");
    assert_refused(with("id", json_string("0123456789AB")), "cannot be");
    assert_refused(with("model_fingerprint", json_string("00")), "model_fingerprint");
    assert_refused(with("texts", json_pack("[i]", 3)), "text");
    assert_refused(with("texts", json_pack("[{s:s}]", "name", "x")), "n_tokens");
    assert_refused(with("shares", json_array()), "no budgets");
    assert_refused(with("shares", json_pack("[i]", 3)), "no object");
}

static void budgets_ascend(void **state)
{
    json_t *j = good(), *list = json_object_get(j, "shares");

    (void)state;
    json_object_set_new(json_array_get(list, 1), "budget", json_real(0.25));
    assert_refused(j, "ascend");
    j = good();
    json_object_set_new(json_array_get(json_object_get(j, "shares"), 0), "budget", json_real(0));
    assert_refused(j, "ascend");
}

static void an_id_that_does_not_follow_from_the_numbers_is_refused(void **state)
{
    (void)state;
    assert_refused(with("id", json_string("0123456789ab")), "its numbers are");
    assert_refused(with_share(5, json_real(0.625)), "its numbers are");
}

static void what_is_no_json_or_too_deep_or_too_long_is_refused(void **state)
{
    struct profile p = {0};
    char deep[200], *big = calloc(1, PROFILE_MAX_BYTES + 1);

    (void)state;
    memset(deep, '[', sizeof deep);
    assert_int_equal(profile_parse("", 0, &p, NULL), LARDER_EINVAL);
    assert_int_equal(profile_parse("[]", 2, &p, NULL), LARDER_EINVAL);
    assert_int_equal(profile_parse("{\"a\":1,\"a\":2}", 13, &p, NULL), LARDER_EINVAL);
    assert_int_equal(profile_parse(deep, sizeof deep, &p, NULL), LARDER_EINVAL);
    assert_int_equal(profile_parse(big, PROFILE_MAX_BYTES + 1, &p, NULL), LARDER_ETOOBIG);
    assert_int_equal(parse(with("version", json_integer(3)), &p, NULL), LARDER_EVERSION);
    free(big);
}

static void a_budget_has_a_share_for_every_head(void **state)
{
    json_t *j = good(), *b = json_array_get(json_object_get(j, "shares"), 0);

    (void)state;
    json_array_remove(json_object_get(b, "share"), 0);
    assert_refused(j, "5 shares for 6 heads");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_profile_is_read_as_it_was_written),
        cmocka_unit_test(a_window_is_read_as_it_was_written),
        cmocka_unit_test(windows_that_cannot_be_are_refused),
        cmocka_unit_test(every_field_is_needed_and_typed),
        cmocka_unit_test(numbers_out_of_range_are_refused),
        cmocka_unit_test(budgets_ascend),
        cmocka_unit_test(a_budget_has_a_share_for_every_head),
        cmocka_unit_test(an_id_that_does_not_follow_from_the_numbers_is_refused),
        cmocka_unit_test(what_is_no_json_or_too_deep_or_too_long_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
