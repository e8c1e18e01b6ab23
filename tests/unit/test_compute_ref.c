/* The product of backend `ref` against the plainest loop, bit for bit. */
#include "testlib.h"

#include <math.h>

#include "ref.h"

static void fill(float *x, size_t n, uint64_t *seed)
{
    for (size_t i = 0; i < n; i++)
        x[i] = test_randf(seed);
}

/* c = a · w^T for every shape around the tile borders; one chain per element. */
static void check_product(uint32_t m, uint32_t n, uint32_t k)
{
    uint64_t seed = 1 + m + 100 * n + 10000 * k;
    uint32_t lda = k + 3, ldc = n + 5;
    float *a = malloc(m * lda * sizeof *a), *w = malloc(n * k * sizeof *w);
    float *c = malloc(m * ldc * sizeof *c);
    struct ref_matrix packed = {k, n, NULL};
    struct ref_mul x;
    const char *isa;

    packed.panel = mem_aligned((uint64_t)ref_padded(n) * k, sizeof(float));
    assert_non_null(packed.panel);
    fill(a, m * lda, &seed);
    fill(w, n * k, &seed);
    fill(c, m * ldc, &seed);
    ref_pack_rows(&packed, 0, w, n / 2);
    ref_pack_rows(&packed, n / 2, w + n / 2 * k, n - n / 2);
    x = ref_by(&packed, a, lda, m, c, ldc);
    ref_mul_pick (&isa)(&x);
    for (uint32_t i = 0; i < m; i++) {
        for (uint32_t j = 0; j < n; j++) {
            float acc = 0;

            for (uint32_t l = 0; l < k; l++)
                acc += a[i * lda + l] * w[j * k + l];
            if (memcmp(&acc, &c[i * ldc + j], sizeof acc))
                fail_msg("%u x %u x %u on %s: element %u, %u", m, n, k, isa, i, j);
        }
    }
    free(a);
    free(w);
    free(c);
    mem_free(packed.panel);
}

static void product_is_one_chain_per_element(void **state)
{
    const uint32_t rows[] = {1, 2, 7, 8, 9, 17}, cols[] = {1, 15, 16, 17, 48, 50};

    (void)state;
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 6; j++)
            for (uint32_t k = 1; k <= 65; k += 16)
                check_product(rows[i], cols[j], k);
}

static void columns_beyond_the_matrix_are_not_written(void **state)
{
    float a[3] = {1, 2, 3}, w[3] = {4, 5, 6}, c[4] = {-1, -1, -1, -1};
    struct ref_matrix packed = {3, 1, NULL};
    struct ref_mul x;
    const char *isa;

    (void)state;
    packed.panel = mem_aligned(REF_WIDE * 3, sizeof(float));
    ref_pack_rows(&packed, 0, w, 1);
    x = ref_by(&packed, a, 3, 1, c + 1, 1);
    ref_mul_pick (&isa)(&x);
    assert_true(c[0] == -1 && c[1] == 32 && c[2] == -1 && c[3] == -1);
    mem_free(packed.panel);
}

static void rmsnorm_divides_by_the_root_of_the_mean_square(void **state)
{
    const float x[4] = {1, -2, 3, -4}, w[4] = {1, 1, 2, .5f};
    float out[4];

    (void)state;
    ref_rmsnorm(x, w, 4, 1e-5, out);
    for (int i = 0; i < 4; i++)
        assert_true(fabs(out[i] - x[i] * w[i] / sqrt(7.5 + 1e-5)) < 1e-6);
}

static void count_item(void *arg, uint32_t item, uint32_t worker)
{
    uint32_t *seen = arg;

    assert_true(worker < 4);
    __atomic_fetch_add(&seen[item], 1, __ATOMIC_RELAXED);
}

static void every_item_runs_once(void **state)
{
    struct backend b = {.n_threads = 4};
    uint32_t seen[100];

    (void)state;
    for (uint32_t n = 0; n <= 100; n += 10) {
        memset(seen, 0, sizeof seen);
        ref_for(&b, n, count_item, seen);
        for (uint32_t i = 0; i < 100; i++)
            assert_int_equal(seen[i], i < n);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(product_is_one_chain_per_element),
        cmocka_unit_test(columns_beyond_the_matrix_are_not_written),
        cmocka_unit_test(rmsnorm_divides_by_the_root_of_the_mean_square),
        cmocka_unit_test(every_item_runs_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
