/* bench_client_fetch.c - what a decoder waits for: fetching a stored entry over the socket.
 *
 * bench_client_fetch NAME, with LARDER_SOCKET naming a running larderd. Prints CSV: minimum and
 * median of the fetches, and for comparison one round trip of a small request and a memcpy of as
 * many bytes, in the same run. --fresh measures few fetches with a pause before each: against
 * a daemon with image_cache_bytes=0, every one of them is decoded for it. --cold measures the
 * first fetch of all, of a daemon that was just started on a store outside the page cache.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client_fetch.h"
#include "mem.h"

#define N_RUNS 301
#define N_COPIES 21
#define N_FIRST 15
#define REST_US 150000 /* between first fetches: the daemon prepares its next memory file */

static double median(double *v, size_t n)
{
    qsort(v, n, sizeof *v, by_value);
    return v[n / 2];
}

static int round_trip(struct larder *c, double *ret_us, struct larder_err *e)
{
    double us[N_RUNS];

    for (int i = 0; i < N_RUNS; i++) {
        double t0 = now_us();
        char *json = NULL;
        int rc = larder_call(c, "HELLO", "{\"client\":\"bench\"}", -1, NULL, NULL, WAIT_MS, &json,
                             NULL, e);

        us[i] = now_us() - t0;
        larder_free(json);
        if (rc)
            return rc;
    }
    *ret_us = median(us, N_RUNS);
    return 0;
}

/* Between buffers that have been touched before: the copy alone. */
static double copy_us(uint64_t n)
{
    double us[N_COPIES] = {0};
    char *from = mem_alloc(n, 1), *to = mem_alloc(n, 1);

    if (from && to) {
        memset(from, 1, n);
        memset(to, 2, n);
        for (int i = 0; i < N_COPIES; i++) {
            double t0 = now_us();

            from[i] = (char)i;
            memcpy(to, from, n);
            us[i] = now_us() - t0;
        }
    }
    mem_free(from);
    mem_free(to);
    return median(us, N_COPIES);
}

static int fetch_all(struct larder *c, const char *name, bool fresh, double *us, int n_runs,
                     uint64_t *n_bytes, struct larder_err *e)
{
    for (int i = 0; i < n_runs; i++) {
        int rc;

        if (fresh)
            usleep(REST_US);
        rc = timed_fetch(c, name, &us[i], n_bytes, e);
        if (rc)
            return rc;
    }
    return 0;
}

int main(int argc, char **argv)
{
    const char *kind = argc == 3 && !strncmp(argv[1], "--", 2) ? argv[1] + 2 : "decoded";
    bool fresh = !strcmp(kind, "fresh"), cold = !strcmp(kind, "cold");
    int n_runs = cold ? 1 : fresh ? N_FIRST : N_RUNS, rc;
    const char *name = argv[argc - 1];
    struct larder_err e = {0, ""};
    double us[N_RUNS], rtt = 0;
    struct larder *c = NULL;
    uint64_t n = 0;

    if (argc != 2 && !fresh && !cold) {
        fprintf(stderr, "usage: bench_client_fetch [--fresh | --cold] NAME\n");
        return 77;
    }
    rc = larder_connect(&c, NULL, WAIT_MS, &e);
    if (!rc && !cold) /* warms up */
        rc = timed_fetch(c, name, us, &n, &e);
    if (!rc)
        rc = fetch_all(c, name, fresh, us, n_runs, &n, &e);
    if (!rc)
        rc = round_trip(c, &rtt, &e);
    larder_close(c);
    if (rc) {
        fprintf(stderr, "bench_client_fetch: %s (%s)\n", e.msg, larder_status_name(rc));
        return 1;
    }
    qsort(us, (size_t)n_runs, sizeof *us, by_value);
    printf("fetch,mib,runs,min_us,median_us,round_trip_us,memcpy_us\n"
           "%s,%.1f,%d,%.1f,%.1f,%.1f,%.1f\n",
           kind, (double)n / (1 << 20), n_runs, us[0], us[n_runs / 2], rtt, copy_us(n));
    return 0;
}
