/* The fast product against the plainest loop in f64, in every layout its callers use. */
#include "testlib.h"

#include <math.h>

#include "mul.h"

enum { PAD = 16 };

static float *fill(size_t n, uint64_t *seed)
{
    float *x = malloc((n + PAD) * sizeof *x);

    assert_non_null(x);
    for (size_t i = 0; i < n + PAD; i++)
        x[i] = test_randf(seed);
    return x;
}

/* Element (i, l) of a, (l, j) of b and (i, j) of c. */
static float at_a(const struct mul *x, uint32_t i, uint32_t l)
{
    return x->a[i / MUL_WIDE * x->a_panel + i % MUL_WIDE * x->a_row + l * x->a_k];
}

static float at_b(const struct mul *x, uint32_t l, uint32_t j)
{
    return x->b[j / MUL_WIDE * x->b_panel + l * x->b_k + j % MUL_WIDE];
}

static uint64_t at_c(const struct mul *x, uint32_t i, uint32_t j)
{
    return j / MUL_WIDE * x->c_panel + i * x->c_row + j % MUL_WIDE;
}

static void check(struct mul x, uint64_t n_c, uint64_t *seed)
{
    float *c = fill(n_c, seed), *before = malloc((n_c + PAD) * sizeof *c);

    memcpy(before, c, (n_c + PAD) * sizeof *c);
    x.c = c;
    mul_pick()(&x);
    for (uint32_t i = 0; i < x.m; i++) {
        for (uint32_t j = 0; j < x.n; j++) {
            double want = x.add ? before[at_c(&x, i, j)] : 0;

            for (uint32_t l = 0; l < x.k; l++)
                want += (double)at_a(&x, i, l) * at_b(&x, l, j);
            if (fabs(c[at_c(&x, i, j)] - want) > 1e-4)
                fail_msg("%u x %u x %u: (%u, %u) is %f, not %f", x.m, x.n, x.k, i, j,
                         c[at_c(&x, i, j)], want);
            before[at_c(&x, i, j)] = c[at_c(&x, i, j)];
        }
    }
    assert_memory_equal(before, c, (n_c + PAD) * sizeof *c); /* nothing else was written */
    free(before);
    free(c);
}

static void products_of_row_major_matrices(void **state)
{
    const uint32_t m[] = {1, 3, 8, 21}, n[] = {1, 16, 17, 50}, k[] = {1, 7, 64};
    uint64_t seed = 5;

    (void)state;
    for (int i = 0; i < 4 * 4 * 3 * 2; i++) {
        uint32_t rows = m[i % 4], cols = n[i / 4 % 4], depth = k[i / 16 % 3], ldc = cols + 3;
        float *a = fill((size_t)rows * depth, &seed), *b = fill((size_t)depth * cols, &seed);

        check((struct mul){.a = a,
                           .a_row = depth,
                           .a_k = 1,
                           .a_panel = MUL_WIDE * depth,
                           .b = b,
                           .b_k = cols,
                           .b_panel = MUL_WIDE,
                           .c_row = ldc,
                           .c_panel = MUL_WIDE,
                           .m = rows,
                           .n = cols,
                           .k = depth,
                           .add = i / 48},
              (uint64_t)rows * ldc, &seed);
        free(a);
        free(b);
    }
}

/* X^T X with X in panels: the form of the normal equations. */
static void a_matrix_in_panels_times_its_own_transpose(void **state)
{
    uint64_t seed = 6;

    (void)state;
    for (uint32_t n = 16; n <= 48; n += 16) {
        for (uint32_t k = 1; k < 40; k += 13) {
            float *x = fill((size_t)n * k, &seed);

            check((struct mul){.a = x,
                               .a_row = 1,
                               .a_k = MUL_WIDE,
                               .a_panel = MUL_WIDE * k,
                               .b = x,
                               .b_k = MUL_WIDE,
                               .b_panel = MUL_WIDE * k,
                               .c_row = MUL_WIDE,
                               .c_panel = MUL_WIDE * n,
                               .m = n,
                               .n = n,
                               .k = k,
                               .add = k > 1},
                  (uint64_t)n * n, &seed);
            free(x);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products_of_row_major_matrices),
        cmocka_unit_test(a_matrix_in_panels_times_its_own_transpose),
    };

    return cmocka_run_group_tests_name("compute/mul", tests, NULL, NULL);
}
