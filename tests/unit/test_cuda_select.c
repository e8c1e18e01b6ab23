/* The CUDA kernels that score, rank and choose against the host's code (select.c, shape.c), whose
 * definition they share: built for a processor here, and for a GPU by make check-cuda. Choices are
 * compared exactly, scores too: both add the same terms in the same order. */
#include "testlib.h"

#include <math.h>

#include "cuda.h"
#include "cuda_select.h"
#include "harness.h"
#include "select.h"
#include "shape.h"

static void run(struct cuda_launch l)
{
    assert_int_equal(kernel_run(&l), 0);
}

#define NEW(type, n) ((type *)kernel_alloc((n) * sizeof(type)))

/* Scores of few different values have ties; those of many are all different. */
static double *random_scores(size_t n, uint32_t values, uint64_t *seed)
{
    double *x = NEW(double, n);

    for (size_t i = 0; i < n; i++)
        x[i] = values ? (double)(test_rand(seed) % values) - 2 : test_randf(seed);
    return x;
}

/* ---- scores */

static void check_pool(uint32_t m, uint32_t n_kv, uint32_t group, uint32_t kernel, bool max)
{
    uint32_t ld = m + 5, n_unseen = m > 20 ? 3 : 0;
    uint64_t seed = m + group;
    float *mass = NEW(float, n_kv *group *m);
    double *score = NEW(double, n_kv *ld), *want = NEW(double, n_kv *m);
    struct cuda_pool_args a = {mass, score, ld, n_kv, group, m, kernel, max, 0.37, n_unseen, -1e30};

    for (uint32_t i = 0; i < n_kv * group * m; i++)
        mass[i] = fabsf(test_randf(&seed));
    assert_int_equal(select_head_scores(mass, n_kv * group, n_kv, m, kernel,
                                        max ? POOL_MAX : POOL_AVG, want, NULL),
                     0);
    run(cuda_grid_flat(CUDA_POOL, false, (uint64_t)n_kv * m, &a));
    for (uint32_t g = 0; g < n_kv; g++)
        for (uint32_t j = 0; j < ld; j++) {
            double x = j >= m ? 0 : j < n_unseen ? -1e30 : want[g * m + j] * 0.37;

            if (score[g * ld + j] != x)
                fail_msg("%u tokens, group %u, kernel %u, max %d: token %u scores %g, not %g", m,
                         group, kernel, max, j, score[g * ld + j], x);
        }
    kernel_free(mass);
    kernel_free(score);
    kernel_free(want);
}

static void pooled_scores_are_the_hosts_to_the_bit(void **state)
{
    const uint32_t sizes[] = {1, 31, 33, 4097}, kernels[] = {1, 7, 21};

    (void)state;
    for (int i = 0; i < 12; i++) {
        check_pool(sizes[i / 3], 2, 2, kernels[i % 3], false);
        check_pool(sizes[i / 3], 2, 2, kernels[i % 3], true);
    }
    for (uint32_t group = 1; group <= 16; group++)
        check_pool(33, 3, group, 7, group % 2);
}

/* A maximum does not hide what is not a number. */
static void mass_that_is_not_finite_reaches_its_neighbours_scores(void **state)
{
    enum { M = 40, AT = 20 };
    float *mass = NEW(float, M);
    double *score = NEW(double, M);

    (void)state;
    for (int c = 0; c < 4; c++) {
        struct cuda_pool_args a = {mass, score, M, 1, 1, M, 7, c % 2, 1, 0, 0};

        for (int j = 0; j < M; j++)
            mass[j] = 1;
        mass[AT] = c / 2 ? NAN : INFINITY;
        run(cuda_grid_flat(CUDA_POOL, false, M, &a));
        for (int j = 0; j < M; j++)
            assert_int_equal(isfinite(score[j]) != 0, abs(j - AT) > 3);
    }
    kernel_free(mass);
    kernel_free(score);
}

/* ---- ranks */

static void check_rank(uint32_t m, uint32_t values)
{
    enum { HEADS = 3, LO = 2 };
    uint64_t seed = m + values, ld = m + LO + 3;
    double *score = random_scores(HEADS * ld, values, &seed), *token = NEW(double, m);
    uint32_t *rank = NEW(uint32_t, m), *bad = NEW(uint32_t, 1);
    uint32_t *order = NEW(uint32_t, m), *want = NEW(uint32_t, m);
    struct cuda_tokens_args t = {score, token, ld, HEADS, LO, m};
    struct cuda_rank_args a = {token, rank, bad, m};
    uint32_t blocks = (m + CUDA_ROW_BLOCK - 1) / CUDA_ROW_BLOCK;

    run(cuda_grid_flat(CUDA_TOKENS, false, m, &t));
    for (uint32_t j = 0; j < m; j++) {
        double s = 0;

        for (uint32_t g = 0; g < HEADS; g++)
            s += score[g * ld + LO + j];
        assert_true(token[j] == s);
    }
    assert_int_equal(select_order(token, m, order, NULL), 0);
    select_rank(order, m, want);
    run(cuda_grid_rows(CUDA_RANK, false, blocks + 1, &a));
    assert_int_equal(bad[0], UINT32_MAX);
    for (uint32_t j = 0; j < m; j++)
        if (rank[j] != want[j])
            fail_msg("%u tokens, %u values: token %u has rank %u, not %u", m, values, j, rank[j],
                     want[j]);
    token[m / 2] = -INFINITY;
    token[m - 1] = NAN;
    run(cuda_grid_rows(CUDA_RANK, false, 1, &a)); /* only the last block: no ranks asked for */
    assert_int_equal(bad[0], m / 2);
    kernel_free(score);
    kernel_free(token);
    kernel_free(rank);
    kernel_free(bad);
    kernel_free(order);
    kernel_free(want);
}

static void ranks_are_the_hosts(void **state)
{
    const uint32_t sizes[] = {1, 31, 33, 256, 257, 4097};

    (void)state;
    for (int i = 0; i < 6; i++) {
        check_rank(sizes[i], 0);
        check_rank(sizes[i], 5); /* mostly ties */
        check_rank(sizes[i], 1);
    }
}

/* A rank for each token, or the same ones in every layer. */
static void check_variance(uint32_t m, uint32_t n_layers, uint32_t k, bool same)
{
    uint64_t seed = m + n_layers;
    uint32_t n_blocks = (m + CUDA_ROW_BLOCK - 1) / CUDA_ROW_BLOCK, n_union;
    uint32_t *rank = NEW(uint32_t, n_layers * m), *order = NEW(uint32_t, m);
    const uint32_t **ring = NEW(const uint32_t *, n_layers);
    double *part = NEW(double, 2 * n_blocks), *ret = NEW(double, 2), want, got;
    struct cuda_spread_args a = {rank, part, ret, n_layers, m, k, n_blocks};

    for (uint32_t l = 0; l < n_layers; l++) {
        double *score = random_scores(m, 0, &seed);

        ring[l] = rank + l * m;
        assert_int_equal(select_order(score, m, order, NULL), 0);
        select_rank(order, m, rank + l * m);
        if (same)
            memcpy(rank + l * m, rank, m * sizeof *rank);
        kernel_free(score);
    }
    want = select_variance(ring, n_layers, m, k, &n_union);
    run(cuda_grid_rows(CUDA_SPREAD, false, n_blocks, &a));
    run(cuda_grid_rows(CUDA_SPREAD_SUM, false, 1, &a));
    assert_true(ret[1] == n_union);
    got = n_union ? ret[0] / (n_layers * ret[1]) : 0;
    if (!(fabs(got - want) <= 1e-13 * want)) /* exactly 0 where it is 0 */
        fail_msg("%u tokens, %u layers: %.17g, not %.17g", m, n_layers, got, want);
    kernel_free(rank);
    kernel_free(order);
    kernel_free(ring);
    kernel_free(part);
    kernel_free(ret);
}

static void variances_are_the_hosts(void **state)
{
    const uint32_t sizes[] = {1, 31, 33, 4097};

    (void)state;
    for (int i = 0; i < 4; i++) {
        check_variance(sizes[i], 3, sizes[i] / 4, false);
        check_variance(sizes[i], 8, sizes[i], false);
        check_variance(sizes[i], 2, 0, false);
        check_variance(sizes[i], 4, 5, true);
    }
}

/* ---- the best rows */

struct heads {
    uint32_t n_heads, n, lo, hi;
};

static void check_top(struct heads h, const double *score, const uint32_t *wanted)
{
    uint64_t ld = h.n + 3, all = 0;
    uint32_t *count = NEW(uint32_t, h.n_heads), *at = NEW(uint32_t, h.n_heads);
    uint32_t *bad = NEW(uint32_t, h.n_heads), *keep = NEW(uint32_t, h.n), *index;
    struct cuda_top_args a = {score, ld, h.n, h.lo, h.hi, count, at, NULL, bad};

    for (uint32_t g = 0; g < h.n_heads; g++) {
        count[g] = wanted[g];
        at[g] = (uint32_t)all;
        all += count[g];
    }
    index = a.index = NEW(uint32_t, all + 1);
    index[all] = 12345;
    run(cuda_grid_rows(CUDA_TOP, false, h.n_heads, &a));
    assert_int_equal(index[all], 12345);
    for (uint32_t g = 0; g < h.n_heads; g++) {
        struct scored_head s = {h.n, h.lo, h.hi, score + g * ld, NULL};

        assert_int_equal(bad[g], UINT32_MAX);
        assert_int_equal(shape_take(&s, count[g], 0, keep, NULL), 0);
        for (uint32_t i = 0; i < count[g]; i++)
            if (index[at[g] + i] != keep[i])
                fail_msg("%u rows, %u of head %u: row %u is %u, not %u", h.n, count[g], g, i,
                         index[at[g] + i], keep[i]);
    }
    kernel_free(count);
    kernel_free(at);
    kernel_free(bad);
    kernel_free(keep);
    kernel_free(index);
}

static void the_best_rows_are_the_hosts(void **state)
{
    const uint32_t sizes[] = {1, 31, 33, 256, 257, 4097}, values[] = {0, 3, 1};
    uint64_t seed = 13;

    (void)state;
    for (int i = 0; i < 18; i++) {
        uint32_t n = sizes[i / 3], stay = n > 30 ? 9 : 0, rest = n - stay;
        struct heads h = {4, n, stay ? 4 : 0, n - (stay ? 5 : 0)};
        const uint32_t count[] = {stay, stay + rest / 3, n, stay + (rest + 1) / 2};
        double *score = random_scores(4 * (n + 3), values[i % 3], &seed);

        check_top(h, score, count);
        kernel_free(score);
    }
}

/* Zeros of both signs tie; the smallest and the largest numbers are in order. */
static void scores_at_the_edges_of_f64_are_in_order(void **state)
{
    static const double edge[] = {0.0,      -0.0,      5e-324, -5e-324, 1.7e308, -1.7e308,
                                  2.2e-308, -2.2e-308, 0.0,    -0.0,    1,       -1};
    enum { N = sizeof edge / sizeof *edge };
    double *score = NEW(double, N + 3);

    (void)state;
    memcpy(score, edge, sizeof edge);
    for (uint32_t count = 0; count <= N; count++)
        check_top((struct heads){1, N, 0, N}, score, &count);
    kernel_free(score);
}

static void a_score_that_is_not_finite_is_named(void **state)
{
    enum { N = 300, LO = 4, HI = 290 };
    uint64_t seed = 14;
    double *score = random_scores(2 * N, 0, &seed);
    uint32_t *x = NEW(uint32_t, 6 + 2 * N);
    struct cuda_top_args a = {score, N, N, LO, HI, x, x + 2, x + 6, x + 4};

    (void)state;
    x[0] = x[1] = 50;
    x[3] = 50;
    score[1] = score[N - 1] = NAN; /* they stay whatever they score */
    score[N + 270] = -INFINITY;
    score[N + 271] = NAN;
    run(cuda_grid_rows(CUDA_TOP, false, 2, &a));
    assert_int_equal(a.bad[0], UINT32_MAX);
    assert_int_equal(a.bad[1], 270);
    kernel_free(score);
    kernel_free(x);
}

/* ---- rows */

static void check_gather(uint32_t n_from, uint32_t n, uint32_t row_bytes, uint32_t unit,
                         bool listed)
{
    uint64_t seed = n + row_bytes;
    uint8_t *from = kernel_alloc((size_t)n_from * row_bytes);
    uint8_t *to = kernel_alloc((size_t)(n + 1) * row_bytes);
    uint32_t *index = NEW(uint32_t, n);
    struct cuda_gather_args a = {from, to, listed ? index : NULL, n, row_bytes / unit};
    struct cuda_launch l = cuda_grid_flat(CUDA_GATHER, false, n * a.units, &a);

    for (size_t i = 0; i < (size_t)n_from * row_bytes; i++)
        from[i] = (uint8_t)test_rand(&seed);
    for (uint32_t i = 0; i < n; i++)
        index[i] = (uint32_t)(test_rand(&seed) % n_from);
    l.variant = unit;
    run(l);
    for (uint32_t i = 0; i < n; i++)
        assert_memory_equal(to + i * row_bytes, from + (listed ? index[i] : i) * row_bytes,
                            row_bytes);
    for (uint32_t i = 0; i < row_bytes; i++)
        assert_int_equal(to[n * row_bytes + i], 0);
    kernel_free(from);
    kernel_free(to);
    kernel_free(index);
}

static void rows_are_gathered_whole(void **state)
{
    const uint32_t dims[] = {64, 80, 96, 128}, rows[] = {1, 31, 33, 4097};

    (void)state;
    for (int i = 0; i < 16; i++)
        check_gather(rows[i / 4] + 7, rows[i / 4], dims[i % 4] * 2, 16, i % 3);
    check_gather(40, 33, 36, 4, true);
    check_gather(40, 33, 6, 2, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pooled_scores_are_the_hosts_to_the_bit),
        cmocka_unit_test(mass_that_is_not_finite_reaches_its_neighbours_scores),
        cmocka_unit_test(ranks_are_the_hosts),
        cmocka_unit_test(variances_are_the_hosts),
        cmocka_unit_test(the_best_rows_are_the_hosts),
        cmocka_unit_test(scores_at_the_edges_of_f64_are_in_order),
        cmocka_unit_test(a_score_that_is_not_finite_is_named),
        cmocka_unit_test(rows_are_gathered_whole),
    };

    return cmocka_run_group_tests_name("cuda/select", tests, NULL, NULL);
}
