/* What a calibration concludes: lmin and tau from made-up traces, a kernel from made-up
 * vocabularies. */
#include "testlib.h"

#include "reach.h"
#include "settle.h"

enum { LAYERS = 30, FIRST = 7, LEN = LAYERS - FIRST, MOST = 4 };

/* ---- traces */

static double variance[MOST][LEN];

/* A trace that is `low` up to layer `peak`, 1 there, and then falls in a straight line to `end` in
 * layer `bottom`, where it stays. */
static void make(uint32_t i, double low, uint32_t peak, uint32_t bottom, double end)
{
    for (uint32_t l = FIRST; l < LAYERS; l++) {
        double way = ((double)l - peak) / ((double)bottom - peak);

        variance[i][l - FIRST] = l < peak ? low : l < bottom ? 1 + way * (end - 1) : end;
    }
}

static bool choose(uint32_t n, struct profile_window *w)
{
    const struct traces t = {&variance[0][0], n, FIRST, LAYERS};

    return settle_choose(&t, w);
}

static void the_peak_is_compared_with_and_the_smallest_tau_that_fires_in_time_is_taken(void **state)
{
    struct profile_window w = {.pool = 21};

    (void)state;
    /* 0.55 in layer 20, 0.46 in 21, 0.37 in 22, 0.28 in 23: below 0.4 from 22 on, below 0.35 only
     * from 23 on, which is more than three quarters */
    make(0, 0.02, 15, 25, 0.1);
    assert_true(choose(1, &w));
    assert_int_equal(w.l_min, 15);
    assert_int_equal(w.tau_milli, 400);
    assert_int_equal(w.pool, 21);
}

static void a_valley_before_the_peak_is_not_compared_with(void **state)
{
    struct profile_window w = {0};

    (void)state;
    make(0, 0.02, 14, 20, 0.3); /* nothing is ever below the layers before 14 */
    make(1, 0.02, 14, 22, 0.3);
    assert_true(choose(2, &w));
    assert_int_equal(w.l_min, 14);
    assert_int_equal(w.tau_milli, 350);
}

static void a_trace_counts_as_a_share_of_itself(void **state)
{
    struct profile_window w = {0}, scaled = {0};

    (void)state;
    make(0, 0.1, 13, 24, 0.1);
    make(1, 0.1, 16, 22, 0.2);
    make(2, 0.1, 16, 23, 0.2);
    assert_true(choose(3, &w));
    assert_int_equal(w.l_min, 16);
    for (int l = 0; l < LEN; l++) /* a longer text */
        variance[0][l] *= 1e6;
    assert_true(choose(3, &scaled));
    assert_int_equal(scaled.l_min, w.l_min);
    assert_int_equal(scaled.tau_milli, w.tau_milli);
}

static void of_equal_layers_the_lower_one_is_taken(void **state)
{
    struct profile_window w = {0};

    (void)state;
    make(0, 0.02, 12, 20, 0.1);
    variance[0][13 - FIRST] = 1;
    assert_true(choose(1, &w));
    assert_int_equal(w.l_min, 12);
}

static void a_peak_in_the_last_third_is_too_late(void **state)
{
    struct profile_window w = {0};

    (void)state;
    make(0, 0.02, 12, 20, 0.1);
    variance[0][21 - FIRST] = 5;
    assert_true(choose(1, &w));
    assert_int_equal(w.l_min, 12);
    variance[0][19 - FIRST] = 5; /* the last layer that counts */
    assert_true(choose(1, &w));
    assert_int_equal(w.l_min, 19);
}

static void what_never_settles_is_said_and_changes_nothing(void **state)
{
    struct profile_window w = {21, 5, 5};

    (void)state;
    make(0, 1, 12, 20, 1);
    assert_false(choose(1, &w));
    assert_int_equal(w.pool, 21);
    assert_int_equal(w.l_min, 5);
    assert_int_equal(w.tau_milli, 5);
    assert_false(choose(0, &w));
}

static void what_settles_at_once_is_not_the_middle(void **state)
{
    struct profile_window w = {0};

    (void)state;
    make(0, 0.02, 8, 9, 0.01); /* every tau cuts after layer 9 */
    assert_false(choose(1, &w));
    make(0, 0.02, 13, 15, 0.01); /* and here after 15, which is just half */
    assert_true(choose(1, &w));
    assert_int_equal(w.tau_milli, 50);
}

static void a_text_that_never_settles_counts_as_all_layers(void **state)
{
    struct profile_window w = {0};

    (void)state;
    for (uint32_t i = 0; i < 3; i++)
        make(i, 0.02, 14, 17, 0.01);
    make(3, 0.02, 14, 17, 0.99); /* (3 x 17 + 30) / 4 = 20.25 */
    assert_true(choose(4, &w));
    assert_int_equal(w.tau_milli, 50);
    for (uint32_t i = 1; i < 4; i++)
        make(i, 0.02, 14, 17, 0.99); /* at best (15 + 3 x 30) / 4 = 26.25 */
    assert_false(choose(4, &w));
}

static void a_shallow_model_has_no_middle(void **state)
{
    const double v[4] = {1, 0.5, 0.1, 0.1};
    const struct traces t = {v, 1, 7, 10};
    struct profile_window w = {0};

    (void)state;
    assert_false(settle_choose(&t, &w));
}

/* ---- vocabularies */

#define SPACE "\xc4\xa0" /* in the byte-level alphabet */

static struct tokenizer *vocabulary(bool pairs)
{
    static char text[100][3], merged[100][4];
    const char *token[16 + 100] = {SPACE, "i", "s", ":", SPACE "i", SPACE "is"};
    const char *merge[2 + 100] = {SPACE " i", SPACE "i s"};
    uint32_t token_len[16 + 100], merge_len[2 + 100], n = 6, n_merges = 2;
    static const uint8_t literal[16 + 100];
    struct tokenizer_spec spec;
    struct tokenizer *t = NULL;
    struct larder_err e;

    for (int i = 0; i < 10; i++) {
        text[i][0] = (char)('0' + i);
        text[i][1] = '\0';
        token[n++] = text[i];
    }
    for (int i = 0; i < 100 && pairs; i++) {
        static char pair[100][3];

        pair[i][0] = merged[i][0] = (char)('0' + i / 10);
        pair[i][1] = merged[i][2] = (char)('0' + i % 10);
        merged[i][1] = ' ';
        token[n++] = pair[i];
        merge[n_merges++] = merged[i];
    }
    for (uint32_t i = 0; i < n; i++)
        token_len[i] = (uint32_t)strlen(token[i]);
    for (uint32_t i = 0; i < n_merges; i++)
        merge_len[i] = (uint32_t)strlen(merge[i]);
    spec = (struct tokenizer_spec){
        .pretok = pairs ? "gpt-2" : "smollm",
        .n_vocab = n,
        .token = token,
        .token_len = token_len,
        .literal = literal,
        .n_merges = n_merges,
        .merge = merge,
        .merge_len = merge_len,
        .bos = -1,
        .eos = -1,
        .stage = {pretok_stage(pairs ? "gpt2" : "digits"), pairs ? NULL : pretok_stage("gpt2")},
    };
    if (tokenizer_new(&t, &spec, &e))
        fail_msg("%s", e.msg);
    return t;
}

static uint32_t kernel_of(bool pairs)
{
    struct tokenizer *t = vocabulary(pairs);
    uint32_t kernel = 0;

    assert_int_equal(reach_kernel(t, &kernel, NULL), 0);
    tokenizer_free(t);
    return kernel;
}

static void a_kernel_reaches_to_the_end_of_a_number(void **state)
{
    (void)state;
    assert_int_equal(kernel_of(false), 21); /* " is", ":", " ", seven digits: ten to each side */
}

static void where_digits_are_grouped_it_is_shorter(void **state)
{
    uint32_t kernel = kernel_of(true);

    (void)state;
    assert_int_equal(kernel % 2, 1);
    assert_true(kernel >= 2 * 7 + 1); /* " is", ":", " ", three pairs and a digit */
    assert_true(kernel < 21);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(
            the_peak_is_compared_with_and_the_smallest_tau_that_fires_in_time_is_taken),
        cmocka_unit_test(a_valley_before_the_peak_is_not_compared_with),
        cmocka_unit_test(a_trace_counts_as_a_share_of_itself),
        cmocka_unit_test(of_equal_layers_the_lower_one_is_taken),
        cmocka_unit_test(a_peak_in_the_last_third_is_too_late),
        cmocka_unit_test(what_never_settles_is_said_and_changes_nothing),
        cmocka_unit_test(what_settles_at_once_is_not_the_middle),
        cmocka_unit_test(a_text_that_never_settles_counts_as_all_layers),
        cmocka_unit_test(a_shallow_model_has_no_middle),
        cmocka_unit_test(a_kernel_reaches_to_the_end_of_a_number),
        cmocka_unit_test(where_digits_are_grouped_it_is_shorter),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
