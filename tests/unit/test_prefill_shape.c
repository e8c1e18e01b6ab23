/* Shapes of budgets: rules that hold whatever the scores are, and small cases by hand. */
#include "testlib.h"

#include <math.h>

#include "shape.h"

enum { HEADS = 6, ROWS = 50, LO = 2, HI = 46 }; /* the first two and the last four stay */

struct heads {
    double score[HEADS][ROWS], worth[HEADS][ROWS];
    struct scored_head h[HEADS];
};

static void make_heads(struct heads *x, uint64_t seed)
{
    for (int i = 0; i < HEADS; i++) {
        for (int j = 0; j < ROWS; j++) {
            x->score[i][j] = test_randf(&seed) * (i + 1);
            x->worth[i][j] = 1 + test_randf(&seed) / 2;
        }
        x->h[i] = (struct scored_head){ROWS, LO, HI, x->score[i], NULL};
    }
}

static uint64_t sum(const uint32_t *count, int n)
{
    uint64_t s = 0;

    for (int i = 0; i < n; i++)
        s += count[i];
    return s;
}

/* ---- counts */

static void uniform_is_the_budget_or_what_there_is(void **state)
{
    struct heads x;
    uint32_t count[HEADS];

    (void)state;
    make_heads(&x, 1);
    x.h[2].n = 12;
    shape_uniform(x.h, HEADS, 20, count);
    for (int i = 0; i < HEADS; i++)
        assert_int_equal(count[i], i == 2 ? 12 : 20);
}

static void competing_heads_use_the_whole_budget(void **state)
{
    const uint64_t totals[] = {36, 37, 100, 150, 299, 300, 1000};
    struct heads x;
    uint32_t count[HEADS];

    (void)state;
    make_heads(&x, 2);
    for (size_t t = 0; t < sizeof totals / sizeof totals[0]; t++) {
        assert_int_equal(shape_compete(x.h, HEADS, totals[t], 0, count, NULL), 0);
        assert_int_equal(sum(count, HEADS), totals[t] < 300 ? totals[t] : 300);
        for (int i = 0; i < HEADS; i++)
            assert_in_range(count[i], LO + ROWS - HI, ROWS);
    }
}

static void a_guarantee_bounds_what_a_head_can_lose(void **state)
{
    struct heads x;
    uint32_t count[HEADS];

    (void)state;
    make_heads(&x, 3);
    for (int j = 0; j < ROWS; j++)
        x.score[1][j] = -100 + j; /* would get nothing */
    assert_int_equal(shape_compete(x.h, HEADS, 120, 0, count, NULL), 0);
    assert_int_equal(count[1], 6);
    assert_int_equal(shape_compete(x.h, HEADS, 120, 4, count, NULL), 0);
    assert_int_equal(count[1], 6); /* rows that stay anyway are part of it */
    assert_int_equal(shape_compete(x.h, HEADS, 120, 9, count, NULL), 0);
    assert_int_equal(count[1], 9);
    assert_int_equal(sum(count, HEADS), 120);
}

/* What competing heads keep is what one sort of all their rows keeps. */
static void competing_heads_keep_the_best_rows_of_all(void **state)
{
    struct heads x;
    uint32_t count[HEADS], keep[ROWS];
    double worst = INFINITY, best = -INFINITY;

    (void)state;
    make_heads(&x, 4);
    assert_int_equal(shape_compete(x.h, HEADS, 130, 0, count, NULL), 0);
    for (int i = 0; i < HEADS; i++) {
        bool kept[ROWS] = {false};

        assert_int_equal(shape_take(&x.h[i], count[i], 0, keep, NULL), 0);
        for (uint32_t j = 0; j < count[i]; j++)
            kept[keep[j]] = true;
        for (int j = LO; j < HI; j++) {
            if (kept[j])
                worst = fmin(worst, x.score[i][j]);
            else
                best = fmax(best, x.score[i][j]);
        }
    }
    assert_true(worst > best);
}

static void permuting_heads_permutes_counts(void **state)
{
    static const int to[HEADS] = {3, 5, 0, 1, 4, 2};
    struct heads x, y;
    uint32_t a[HEADS], b[HEADS];

    (void)state;
    make_heads(&x, 5);
    for (int i = 0; i < HEADS; i++) {
        memcpy(y.score[to[i]], x.score[i], sizeof x.score[i]);
        y.h[to[i]] = (struct scored_head){ROWS, LO, HI, y.score[to[i]], NULL};
    }
    assert_int_equal(shape_compete(x.h, HEADS, 120, 8, a, NULL), 0);
    assert_int_equal(shape_compete(y.h, HEADS, 120, 8, b, NULL), 0);
    for (int i = 0; i < HEADS; i++)
        assert_int_equal(a[i], b[to[i]]);
}

static void ties_between_heads_go_to_the_lower_one(void **state)
{
    const double same[4] = {1, 1, 1, 1};
    struct scored_head h[3];
    uint32_t count[3];

    (void)state;
    for (int i = 0; i < 3; i++)
        h[i] = (struct scored_head){4, 0, 4, same, NULL};
    assert_int_equal(shape_compete(h, 3, 6, 0, count, NULL), 0);
    assert_memory_equal(count, ((uint32_t[]){4, 2, 0}), sizeof count);
    assert_int_equal(shape_compete(h, 3, 6, 1, count, NULL), 0);
    assert_memory_equal(count, ((uint32_t[]){4, 1, 1}), sizeof count);
}

static void totals_round_in_favour_of_keeping(void **state)
{
    const struct row_budget half = {ROWS_SHARE, 50}, eighth = {ROWS_SHARE, 12.5},
                            all = {ROWS_ALL, 0}, some = {ROWS_COUNT, 87};

    (void)state;
    assert_int_equal(shape_total(&half, 700, 90), 31500);
    assert_int_equal(shape_total(&eighth, 700, 90), 7875);
    assert_int_equal(shape_total(&eighth, 700, 3), 263);
    assert_int_equal(shape_total(&some, 700, 90), 7830);
    assert_int_equal(shape_total(&all, 700, 90), 63000);
}

/* The recorded budgets of kvpress: n = 700, half of the rows, window 64, 30 layers. */
static void pyramids_shrink_linearly_to_the_window(void **state)
{
    uint64_t all = 0;

    (void)state;
    for (uint32_t l = 0; l < 30; l++) {
        all += shape_pyramid(350, 700, 64, 30, l);
        assert_true(!l ||
                    shape_pyramid(350, 700, 64, 30, l) < shape_pyramid(350, 700, 64, 30, l - 1));
    }
    assert_int_equal(shape_pyramid(350, 700, 64, 30, 0), 636);
    assert_int_equal(shape_pyramid(350, 700, 64, 30, 1), 616);
    assert_int_equal(shape_pyramid(350, 700, 64, 30, 11), 419);
    assert_int_equal(shape_pyramid(350, 700, 64, 30, 29), 64);
    assert_int_equal(all, 30 * 350);
}

static void pyramids_that_cannot_hold_the_window_are_flat(void **state)
{
    (void)state;
    for (uint32_t l = 0; l < 30; l += 29) {
        assert_int_equal(shape_pyramid(175, 700, 64, 30, l), 175);
        assert_int_equal(shape_pyramid(87.5, 700, 64, 30, l), 88); /* half to even */
        assert_int_equal(shape_pyramid(86.5, 700, 64, 30, l), 86);
    }
    assert_int_equal(shape_pyramid(350, 700, 64, 1, 0), 350);
}

static void shares_are_proportional_and_exact_in_all(void **state)
{
    const double share[HEADS] = {1, 2, 1, 0.5, 3, 1.5};
    struct heads x;
    uint32_t count[HEADS];

    (void)state;
    make_heads(&x, 6);
    shape_shares(x.h, HEADS, share, 90, count);
    assert_memory_equal(count, ((uint32_t[]){10, 20, 10, 6, 29, 15}), sizeof count);
    for (uint64_t total = 36; total <= 310; total++) {
        shape_shares(x.h, HEADS, share, total, count);
        assert_int_equal(sum(count, HEADS), total < 300 ? total : 300);
        for (int i = 0; i < HEADS; i++) {
            assert_in_range(count[i], LO + ROWS - HI, ROWS);
            assert_true(i == 0 || share[i] != share[0] || count[i] <= count[0]);
        }
    }
}

static void heads_without_a_share_keep_what_stays(void **state)
{
    const double share[HEADS] = {0, 1, 0, 0, 0, 0};
    struct heads x;
    uint32_t count[HEADS];

    (void)state;
    make_heads(&x, 7);
    shape_shares(x.h, HEADS, share, 200, count);
    for (int i = 0; i < HEADS; i++)
        assert_int_equal(count[i], i == 1 ? ROWS : 6);
}

static void whole_heads_come_by_share(void **state)
{
    const double share[HEADS] = {0.1, 0.9, 0.3, 0.9, 0.2, 0};
    struct heads x;
    uint32_t count[HEADS];

    (void)state;
    make_heads(&x, 8);
    assert_int_equal(shape_heads(x.h, HEADS, share, 36 + 44 * 3 + 43, count, NULL), 0);
    assert_memory_equal(count, ((uint32_t[]){6, 50, 50, 50, 6, 6}), sizeof count);
    assert_int_equal(shape_heads(x.h, HEADS, share, 36 + 44, count, NULL), 0);
    assert_memory_equal(count, ((uint32_t[]){6, 50, 6, 6, 6, 6}), sizeof count);
    assert_int_equal(shape_heads(x.h, HEADS, share, 300, count, NULL), 0);
    assert_int_equal(sum(count, HEADS), 300);
}

/* ---- rows */

static void rows_ascend_and_hold_what_stays(void **state)
{
    struct heads x;
    uint32_t keep[ROWS];

    (void)state;
    make_heads(&x, 9);
    for (int critical = 0; critical < 2; critical++) {
        x.h[0].worth = critical ? x.worth[0] : NULL;
        for (uint32_t n = 6; n <= ROWS; n++) {
            assert_int_equal(shape_take(&x.h[0], n, 0, keep, NULL), 0);
            assert_int_equal(keep[0], 0);
            assert_int_equal(keep[1], 1);
            for (uint32_t j = 1; j < n; j++)
                assert_true(keep[j] > keep[j - 1]);
            for (uint32_t j = 0; j < 4; j++)
                assert_int_equal(keep[n - 1 - j], ROWS - 1 - j);
        }
    }
}

static void more_rows_contain_fewer(void **state)
{
    struct heads x;
    uint32_t some[20], more[30];

    (void)state;
    make_heads(&x, 10);
    assert_int_equal(shape_take(&x.h[3], 20, 0, some, NULL), 0);
    assert_int_equal(shape_take(&x.h[3], 30, 0, more, NULL), 0);
    for (int i = 0, j = 0; i < 20; i++, j++) {
        while (j < 30 && more[j] != some[i])
            j++;
        assert_true(j < 30);
    }
}

static void equal_rows_go_to_the_lower_index(void **state)
{
    const double score[6] = {9, 2, 2, 2, 2, 9};
    const struct scored_head h = {6, 1, 5, score, NULL};
    uint32_t keep[4];

    (void)state;
    assert_int_equal(shape_take(&h, 4, 0, keep, NULL), 0);
    assert_memory_equal(keep, ((uint32_t[]){0, 1, 2, 5}), sizeof keep);
}

/* Half by score, the rest by score times worth; `sure` rows by score at least. */
static void worth_decides_the_second_half(void **state)
{
    const double score[6] = {6, 5, 4, 3, 2, 1}, worth[6] = {1, 1, 1, 2, 9, 99};
    const struct scored_head h = {6, 0, 6, score, worth};
    uint32_t keep[4];

    (void)state;
    assert_int_equal(shape_take(&h, 4, 0, keep, NULL), 0);
    assert_memory_equal(keep, ((uint32_t[]){0, 1, 4, 5}), sizeof keep);
    assert_int_equal(shape_take(&h, 4, 3, keep, NULL), 0);
    assert_memory_equal(keep, ((uint32_t[]){0, 1, 2, 5}), sizeof keep);
    assert_int_equal(shape_take(&h, 4, 9, keep, NULL), 0);
    assert_memory_equal(keep, ((uint32_t[]){0, 1, 2, 3}), sizeof keep);
}

static void equal_worth_changes_nothing(void **state)
{
    struct heads x;
    uint32_t plain[20], critical[20];

    (void)state;
    make_heads(&x, 11);
    for (int j = 0; j < ROWS; j++) {
        x.score[0][j] = fabs(x.score[0][j]);
        x.worth[0][j] = 3;
    }
    assert_int_equal(shape_take(&x.h[0], 20, 0, plain, NULL), 0);
    x.h[0].worth = x.worth[0];
    assert_int_equal(shape_take(&x.h[0], 20, 0, critical, NULL), 0);
    assert_memory_equal(plain, critical, sizeof plain);
}

static void scores_that_are_not_finite_are_refused(void **state)
{
    struct heads x;
    uint32_t count[HEADS], keep[ROWS];

    (void)state;
    make_heads(&x, 12);
    x.score[4][0] = NAN; /* stays whatever its score */
    assert_int_equal(shape_compete(x.h, HEADS, 100, 0, count, NULL), 0);
    x.score[4][10] = NAN;
    assert_int_equal(shape_compete(x.h, HEADS, 100, 0, count, NULL), LARDER_ENUMERIC);
    assert_int_equal(shape_take(&x.h[4], 20, 0, keep, NULL), LARDER_ENUMERIC);
    x.worth[0][10] = INFINITY;
    x.h[0].worth = x.worth[0];
    assert_int_equal(shape_take(&x.h[0], 20, 0, keep, NULL), LARDER_ENUMERIC);
}

static void running_out_of_memory_is_an_error(void **state)
{
    const double share[HEADS] = {1, 1, 1, 1, 1, 1};
    struct heads x;
    uint32_t count[HEADS], keep[ROWS];
    int rc = LARDER_ENOMEM;

    (void)state;
    make_heads(&x, 13);
    x.h[0].worth = x.worth[0];
    for (long n = 0; rc; n++) {
        long left = n;

        mem_set_hook(test_fail_nth, &left);
        rc = shape_compete(x.h, HEADS, 100, 5, count, NULL);
        if (!rc)
            rc = shape_take(&x.h[0], 20, 5, keep, NULL);
        if (!rc)
            rc = shape_heads(x.h, HEADS, share, 100, count, NULL);
        mem_set_hook(NULL, NULL);
        assert_true(!rc || rc == LARDER_ENOMEM);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(uniform_is_the_budget_or_what_there_is),
        cmocka_unit_test(competing_heads_use_the_whole_budget),
        cmocka_unit_test(a_guarantee_bounds_what_a_head_can_lose),
        cmocka_unit_test(competing_heads_keep_the_best_rows_of_all),
        cmocka_unit_test(permuting_heads_permutes_counts),
        cmocka_unit_test(ties_between_heads_go_to_the_lower_one),
        cmocka_unit_test(totals_round_in_favour_of_keeping),
        cmocka_unit_test(pyramids_shrink_linearly_to_the_window),
        cmocka_unit_test(pyramids_that_cannot_hold_the_window_are_flat),
        cmocka_unit_test(shares_are_proportional_and_exact_in_all),
        cmocka_unit_test(heads_without_a_share_keep_what_stays),
        cmocka_unit_test(whole_heads_come_by_share),
        cmocka_unit_test(rows_ascend_and_hold_what_stays),
        cmocka_unit_test(more_rows_contain_fewer),
        cmocka_unit_test(equal_rows_go_to_the_lower_index),
        cmocka_unit_test(worth_decides_the_second_half),
        cmocka_unit_test(equal_worth_changes_nothing),
        cmocka_unit_test(scores_that_are_not_finite_are_refused),
        cmocka_unit_test(running_out_of_memory_is_an_error),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
