/* bench_client_growth.c - does a client wait longer when more is stored?
 *
 * bench_client_growth ENTRIES, with LARDER_SOCKET naming a larderd that serves a store of
 * bench_store_growth with so many entries and has image_cache_bytes=0. Looks up and fetches entries
 * drawn at random, each fetch of an entry whose image is not in memory. Prints CSV: minimum and
 * median.
 */
#include <stdio.h>
#include <stdlib.h>

#include "client_fetch.h"

#define N_RUNS 5001
#define N_WARM 20000 /* until the daemon has mapped what it reads of a large store */
#define MAX_ENTRIES 10000000ul

typedef int operation(struct larder *c, const char *name, double *us, struct larder_err *e);

static int look_up(struct larder *c, const char *name, double *us, struct larder_err *e)
{
    struct larder_entry entry;
    double t0 = now_us();
    int rc = larder_lookup(c, name, WAIT_MS, &entry, e);

    *us = now_us() - t0;
    return rc;
}

static int fetch(struct larder *c, const char *name, double *us, struct larder_err *e)
{
    uint64_t n_bytes;

    return timed_fetch(c, name, us, &n_bytes, e);
}

/* An entry drawn at random. The names are those of small_entry.h. */
static int one(struct larder *c, operation *op, unsigned long n, double *us, struct larder_err *e)
{
    char name[24];

    snprintf(name, sizeof name, "n%lu", (unsigned long)random() % n);
    return op(c, name, us, e);
}

static int warm_up(struct larder *c, unsigned long n, struct larder_err *e)
{
    double us;
    int rc = 0;

    for (int i = 0; !rc && i < N_WARM; i++)
        rc = one(c, fetch, n, &us, e);
    return rc;
}

static int measure(struct larder *c, const char *what, operation *op, unsigned long n,
                   struct larder_err *e)
{
    static double us[N_RUNS];
    int rc = 0;

    for (int i = 0; !rc && i < N_RUNS; i++)
        rc = one(c, op, n, &us[i], e);
    if (rc)
        return rc;
    qsort(us, N_RUNS, sizeof *us, by_value);
    printf("%s,%lu,%d,%.1f,%.1f\n", what, n, N_RUNS, us[0], us[N_RUNS / 2]);
    return 0;
}

int main(int argc, char **argv)
{
    unsigned long n = argc == 2 ? strtoul(argv[1], NULL, 10) : 0;
    struct larder_err e = {0, ""};
    struct larder *c = NULL;
    int rc;

    if (!n || n > MAX_ENTRIES) {
        fprintf(stderr, "usage: bench_client_growth ENTRIES\n");
        return 77;
    }
    rc = larder_connect(&c, NULL, WAIT_MS, &e);
    printf("operation,entries,runs,min_us,median_us\n");
    if (!rc)
        rc = warm_up(c, n, &e);
    if (!rc)
        rc = measure(c, "client's look-up", look_up, n, &e);
    if (!rc)
        rc = measure(c, "client's fetch", fetch, n, &e);
    larder_close(c);
    if (rc) {
        fprintf(stderr, "bench_client_growth: %s (%s)\n", e.msg, larder_status_name(rc));
        return 1;
    }
    return 0;
}
