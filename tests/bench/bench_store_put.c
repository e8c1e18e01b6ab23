/* bench_store_put.c - what it costs to store a small entry: two fsyncs and little else.
 *
 * bench_store_put DIR NAME, with DIR a directory for a store that nobody has open. Prints CSV:
 * minimum and median of durable puts of entries whose images are about 64 KiB. They stay in the
 * store, the last one under NAME, so that a larderd can serve it.
 */
#include <stdio.h>
#include <stdlib.h>

#include "benchlib.h"
#include "small_entry.h"

#define N_RUNS 101
#define BUDGET (64u << 20)

static const struct small_shape shape = {{4, 4, 2, 64}, 32};

static int put_all(struct store *s, const char *name, double *us, struct larder_err *e)
{
    uint8_t key[STORE_KEY_LEN];
    int rc = 0;

    for (uint64_t i = 0; !rc && i <= N_RUNS; i++) { /* the first warms up */
        char other[SMALL_NAME_BYTES];
        double t0 = now_us();

        small_name(i, other);
        rc = small_put(s, &shape, i, i == N_RUNS ? name : other, key, e);
        us[i ? i - 1 : 0] = now_us() - t0;
    }
    return rc;
}

int main(int argc, char **argv)
{
    struct store_opts o = {
        .dir = argc == 3 ? argv[1] : NULL, .store_budget = BUDGET, .allow_any_fs = true};
    uint64_t raw =
        4ull * shape.geom.n_layers * shape.geom.n_kv_heads * shape.rows * shape.geom.head_dim;
    struct larder_err e = {0, ""};
    struct store *s = NULL;
    double us[N_RUNS];
    int rc;

    if (argc != 3) {
        fprintf(stderr, "usage: bench_store_put DIR NAME\n");
        return 77;
    }
    rc = store_open(&s, &o, &e);
    if (!rc)
        rc = put_all(s, argv[2], us, &e);
    store_close(s);
    if (rc) {
        fprintf(stderr, "bench_store_put: %s (%s)\n", e.msg, larder_status_name(rc));
        return 1;
    }
    qsort(us, N_RUNS, sizeof *us, by_value);
    printf("operation,mib,runs,min_us,median_us\n"
           "durable put,%.3f,%d,%.1f,%.1f\n",
           (double)raw / (1 << 20), N_RUNS, us[0], us[N_RUNS / 2]);
    return 0;
}
