/* Selection on synthetic scores, and against the recorded numbers of the eight-layer toy
 * (its Q and K come from a linear congruential generator, so they are rebuilt here). */
#include "testlib.h"

#include <math.h>

#include "select.h"

/* ---- the toy: 24 tokens, 4 query heads, 2 KV heads, rows that converge with depth */

enum { N = 24, D = 4, HQ = 4, HKV = 2, W = 4, M = N - W, S = 3, LAYERS = 8 };
enum { L_MIN = 3, L_OBS = 3, SELECT = 10, ROWS = 8 };
#define TAU 0.6

struct toy {
    double q[HQ][N][D], k[HKV][N][D];
};

static double lcg(uint32_t *s)
{
    *s = 1664525u * *s + 1013904223u;
    return (*s >> 8) / (double)(1 << 24) * 2.0 - 1.0;
}

/* base is drawn once, the noise once per layer. */
static void toy_draw(struct toy *t, uint32_t seed)
{
    double *q = &t->q[0][0][0], *k = &t->k[0][0][0];

    for (int i = 0; i < HQ * N * D; i++)
        q[i] = lcg(&seed);
    for (int i = 0; i < HKV * N * D; i++)
        k[i] = lcg(&seed);
}

static void toy_layer(int layer, struct toy *out)
{
    struct toy base, noise;
    const double *b = &base.q[0][0][0], *x = &noise.q[0][0][0];
    double a = 2.0 * pow(0.5, layer);
    double *o = &out->q[0][0][0];

    _Static_assert(sizeof(struct toy) == sizeof(double) * (HQ + HKV) * N * D, "no padding");
    toy_draw(&base, 7);
    toy_draw(&noise, 1000u + (uint32_t)layer);
    for (size_t i = 0; i < sizeof *out / sizeof *o; i++)
        o[i] = 3 * b[i] + a * x[i];
}

static void toy_mass(const struct toy *t, float *mass)
{
    memset(mass, 0, sizeof(float) * HQ * M);
    for (int h = 0; h < HQ; h++) {
        double sum[M] = {0};

        for (int i = M; i < N; i++) {
            double x[N], z = 0;

            for (int j = 0; j <= i; j++) {
                double dot = 0;

                for (int d = 0; d < D; d++)
                    dot += t->q[h][i][d] * t->k[h / (HQ / HKV)][j][d];
                z += x[j] = exp(dot / sqrt(D));
            }
            for (int j = 0; j < M; j++)
                sum[j] += x[j] / z;
        }
        for (int j = 0; j < M; j++)
            mass[h * M + j] = (float)sum[j];
    }
}

struct toy_scores {
    double head[HKV * M], token[M];
    uint32_t order[M], rank[M];
};

static void toy_scores(int layer, struct toy_scores *r)
{
    struct toy t;
    float mass[HQ * M];

    toy_layer(layer, &t);
    toy_mass(&t, mass);
    assert_int_equal(select_head_scores(mass, HQ, HKV, M, S, POOL_AVG, r->head, NULL), 0);
    select_token_scores(r->head, HKV, M, r->token);
    assert_int_equal(select_order(r->token, M, r->order, NULL), 0);
    select_rank(r->order, M, r->rank);
}

static const double toy_score[LAYERS][5] = {
    {0.152953, 0.197076, 0.415875, 0.373042, 0.463603},
    {0.216856, 0.301716, 0.389703, 0.286407, 0.530129},
    {0.132063, 0.182472, 0.256267, 0.232077, 0.238980},
    {0.234418, 0.273432, 0.293413, 0.207758, 0.248674},
    {0.246223, 0.294333, 0.280938, 0.216465, 0.255457},
    {0.251391, 0.299325, 0.285905, 0.219393, 0.262553},
    {0.254720, 0.301833, 0.275436, 0.212154, 0.260419},
    {0.258212, 0.304133, 0.279035, 0.215271, 0.264474},
};
static const uint32_t toy_rank[LAYERS][M] = {
    {20, 18, 16, 17, 13, 15, 7, 3, 2, 12, 6, 4, 1, 5, 8, 14, 10, 11, 9, 19},
    {19, 17, 15, 18, 12, 13, 6, 11, 5, 3, 1, 2, 4, 10, 8, 7, 9, 14, 16, 20},
    {20, 19, 15, 17, 16, 14, 4, 6, 5, 10, 1, 2, 3, 11, 7, 8, 9, 13, 12, 18},
    {18, 16, 15, 19, 17, 14, 7, 9, 8, 11, 1, 2, 4, 10, 3, 5, 6, 13, 12, 20},
    {18, 15, 16, 19, 17, 14, 5, 9, 6, 10, 1, 2, 3, 11, 4, 8, 7, 13, 12, 20},
    {18, 15, 16, 19, 17, 14, 8, 9, 6, 10, 1, 2, 3, 11, 4, 5, 7, 13, 12, 20},
    {18, 15, 16, 19, 17, 14, 8, 9, 7, 10, 1, 2, 3, 11, 4, 5, 6, 13, 12, 20},
    {18, 15, 16, 19, 17, 14, 8, 9, 7, 10, 1, 2, 3, 11, 4, 5, 6, 13, 12, 20},
};
/* Prefix rows that each KV head keeps under a budget of ROWS. */
static const uint32_t toy_keep[LAYERS][HKV][ROWS - W] = {
    {{10, 11, 12, 13}, {6, 7, 8, 12}}, {{10, 11, 14, 15}, {6, 8, 10, 11}},
    {{10, 11, 14, 15}, {6, 7, 8, 10}}, {{11, 14, 15, 16}, {6, 7, 8, 10}},
    {{10, 11, 14, 15}, {6, 7, 8, 10}}, {{10, 11, 14, 15}, {6, 7, 8, 10}},
    {{10, 11, 14, 15}, {6, 7, 8, 10}}, {{10, 11, 14, 15}, {6, 7, 8, 10}},
};

static void toy_scores_and_ranks_are_the_recorded_ones(void **state)
{
    (void)state;
    for (int l = 0; l < LAYERS; l++) {
        struct toy_scores r;

        toy_scores(l, &r);
        for (int j = 0; j < 5; j++)
            assert_true(fabs(r.token[j] - toy_score[l][j]) < 1e-6);
        assert_memory_equal(r.rank, toy_rank[l], sizeof r.rank);
    }
}

static void toy_heads_keep_the_recorded_rows(void **state)
{
    (void)state;
    for (int l = 0; l < LAYERS; l++) {
        struct toy_scores r;

        toy_scores(l, &r);
        for (int g = 0; g < HKV; g++) {
            uint32_t order[M], keep[ROWS - W];

            assert_int_equal(select_order(r.head + g * M, M, order, NULL), 0);
            select_top(order, ROWS - W, keep);
            assert_memory_equal(keep, toy_keep[l][g], sizeof keep);
        }
    }
}

/* Variance over the last L_OBS layers up to `layer`. */
static double toy_variance(int layer, uint32_t *ret_union)
{
    const uint32_t *rank[L_OBS];

    for (int i = 0; i < L_OBS; i++)
        rank[i] = toy_rank[layer - i];
    return select_variance(rank, L_OBS, M, SELECT - W, ret_union);
}

static void toy_selects_at_the_recorded_layer(void **state)
{
    static const uint32_t want[SELECT - W] = {6, 8, 10, 11, 12, 14};
    uint32_t n_union = 0, top[SELECT - W];
    struct toy_scores r;
    double first, ratio;

    (void)state;
    first = toy_variance(L_MIN, &n_union);
    assert_true(fabs(first - 2.888889) < 1e-6);
    assert_int_equal(n_union, 10);
    ratio = select_ratio(toy_variance(L_MIN + 1, &n_union), first);
    assert_true(fabs(ratio - 0.452991) < 1e-6);
    assert_int_equal(n_union, 9);
    assert_true(ratio < TAU);
    toy_scores(L_MIN + 1, &r);
    select_top(r.order, SELECT - W, top);
    assert_memory_equal(top, want, sizeof want);
}

/* ---- rules */

static void average_divides_by_the_kernel_at_the_borders(void **state)
{
    const double x[5] = {3, 6, 9, 12, 15};
    const double want[5] = {3, 6, 9, 12, 9};
    double out[5];

    (void)state;
    select_pool(x, 5, 3, POOL_AVG, out);
    for (int j = 0; j < 5; j++)
        assert_true(out[j] == want[j]);
}

static void maximum_looks_at_existing_neighbours_only(void **state)
{
    const double x[4] = {-5, -7, -1, -9};
    const double want[4] = {-5, -1, -1, -1};
    double out[4];

    (void)state;
    select_pool(x, 4, 3, POOL_MAX, out);
    for (int j = 0; j < 4; j++)
        assert_true(out[j] == want[j]);
}

static void kernel_may_be_wider_than_the_document(void **state)
{
    const double x[2] = {4, 10};
    double out[2];

    (void)state;
    select_pool(x, 2, 7, POOL_AVG, out);
    assert_true(out[0] == 2 && out[1] == 2);
    select_pool(x, 1, 7, POOL_MAX, out);
    assert_true(out[0] == 4);
    select_pool(x, 2, 1, POOL_AVG, out);
    assert_true(out[0] == 4 && out[1] == 10);
}

/* Pooling before summing over heads matters for maxima. */
static void heads_are_pooled_one_by_one(void **state)
{
    const float mass[2][3] = {{1, 0, 0}, {0, 0, 1}};
    double score[3];

    (void)state;
    assert_int_equal(select_head_scores(&mass[0][0], 2, 1, 3, 3, POOL_MAX, score, NULL), 0);
    assert_true(score[0] == 1 && score[1] == 2 && score[2] == 1);
}

static void query_heads_of_a_group_may_be_permuted(void **state)
{
    enum { HEADS = 6, KV = 2, TOKENS = 100 };
    static float a[HEADS][TOKENS], b[HEADS][TOKENS];
    static const int swap[HEADS] = {2, 0, 1, 4, 5, 3};
    static double sa[KV * TOKENS], sb[KV * TOKENS];
    uint64_t seed = 5;

    (void)state;
    for (int h = 0; h < HEADS; h++)
        for (int j = 0; j < TOKENS; j++) /* multiples of 2^-10: sums are exact in any order */
            a[h][j] = (float)(test_rand(&seed) % 1024) / 1024;
    for (int h = 0; h < HEADS; h++)
        memcpy(b[swap[h]], a[h], sizeof a[h]);
    for (int kind = POOL_AVG; kind <= POOL_MAX; kind++) {
        assert_int_equal(select_head_scores(&a[0][0], HEADS, KV, TOKENS, 1, kind, sa, NULL), 0);
        assert_int_equal(select_head_scores(&b[0][0], HEADS, KV, TOKENS, 1, kind, sb, NULL), 0);
        assert_memory_equal(sa, sb, sizeof sa);
    }
}

static void ties_go_to_the_lower_index(void **state)
{
    const double score[7] = {1, 5, 5, 1, 5, 0, 1};
    const uint32_t want[7] = {1, 2, 4, 0, 3, 6, 5};
    uint32_t order[7], rank[7], top[4];

    (void)state;
    assert_int_equal(select_order(score, 7, order, NULL), 0);
    assert_memory_equal(order, want, sizeof want);
    select_rank(order, 7, rank);
    assert_int_equal(rank[1], 1);
    assert_int_equal(rank[5], 7);
    select_top(order, 4, top);
    assert_memory_equal(top, ((uint32_t[]){0, 1, 2, 4}), sizeof top);
}

static void infinite_and_undefined_scores_are_refused(void **state)
{
    const double bad[3] = {NAN, INFINITY, -INFINITY};
    double score[4], out[4];
    uint32_t order[4];

    (void)state;
    for (int i = 0; i < 3; i++) {
        float mass[4] = {0, 1, (float)bad[i], 2};

        memcpy(score, ((double[]){0, 1, 2, bad[i]}), sizeof score);
        assert_int_equal(select_order(score, 4, order, NULL), LARDER_ENUMERIC);
        assert_int_equal(select_head_scores(mass, 1, 1, 4, 3, POOL_MAX, out, NULL),
                         LARDER_ENUMERIC);
    }
}

static void equal_rankings_have_no_variance(void **state)
{
    const uint32_t rank[5] = {3, 1, 2, 5, 4};
    const uint32_t *all[4] = {rank, rank, rank, rank};
    uint32_t n_union = 0;

    (void)state;
    assert_true(select_variance(all, 4, 5, 2, &n_union) == 0);
    assert_int_equal(n_union, 2);
    assert_true(select_variance(all, 4, 5, 0, &n_union) == 0);
    assert_int_equal(n_union, 0);
}

static void variance_is_the_mean_over_layers_and_union(void **state)
{
    const uint32_t a[4] = {1, 2, 3, 4}, b[4] = {4, 1, 2, 3};
    const uint32_t *both[2] = {a, b};
    uint32_t n_union = 0;

    (void)state;
    /* union of top 1: tokens 0 and 1; squared distances 2 * 1.5^2 and 2 * 0.5^2 */
    assert_true(fabs(select_variance(both, 2, 4, 1, &n_union) - 5.0 / 4) < 1e-12);
    assert_int_equal(n_union, 2);
}

static void zero_first_variance_has_defined_ratios(void **state)
{
    (void)state;
    assert_true(select_ratio(0, 0) == 0);
    assert_true(isinf(select_ratio(1, 0)));
    assert_true(select_ratio(3, 4) == 0.75);
}

static void running_out_of_memory_is_an_error(void **state)
{
    float mass[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    double score[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    uint32_t order[8];
    long left = 0;

    (void)state;
    mem_set_hook(test_fail_nth, &left);
    assert_int_equal(select_order(score, 8, order, NULL), LARDER_ENOMEM);
    left = 0;
    assert_int_equal(select_head_scores(mass, 2, 1, 4, 3, POOL_AVG, score, NULL), LARDER_ENOMEM);
    mem_set_hook(NULL, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(toy_scores_and_ranks_are_the_recorded_ones),
        cmocka_unit_test(toy_heads_keep_the_recorded_rows),
        cmocka_unit_test(toy_selects_at_the_recorded_layer),
        cmocka_unit_test(average_divides_by_the_kernel_at_the_borders),
        cmocka_unit_test(maximum_looks_at_existing_neighbours_only),
        cmocka_unit_test(kernel_may_be_wider_than_the_document),
        cmocka_unit_test(heads_are_pooled_one_by_one),
        cmocka_unit_test(query_heads_of_a_group_may_be_permuted),
        cmocka_unit_test(ties_go_to_the_lower_index),
        cmocka_unit_test(infinite_and_undefined_scores_are_refused),
        cmocka_unit_test(equal_rankings_have_no_variance),
        cmocka_unit_test(variance_is_the_mean_over_layers_and_union),
        cmocka_unit_test(zero_first_variance_has_defined_ratios),
        cmocka_unit_test(running_out_of_memory_is_an_error),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
