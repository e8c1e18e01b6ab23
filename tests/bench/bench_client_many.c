/* bench_client_many.c - many decoders at once: how many fetches a second, and how long each waits.
 *
 * bench_client_many NAME FETCHES CLIENTS..., with LARDER_SOCKET naming a running larderd. Each
 * client is a process, as a decoder is, with a connection of its own, and fetches and releases in
 * a closed loop until FETCHES have been made between them. Prints CSV, a line per number of
 * clients: a fetch is timed from the request to the checked image; the rate counts its release
 * as well.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client_fetch.h"

#define WARM_UP 8 /* fetches of each client before the clock starts */
#define MAX_CLIENTS 4096
#define MAX_FETCHES 10000000

/* What the processes share. */
struct load {
    const char *name;
    unsigned n_fetches;
    pthread_barrier_t ready; /* passed twice: when all are warm, and when the clock runs */
    atomic_uint next;
    atomic_int rc; /* first failure */
    atomic_ullong image_bytes;
    double us[]; /* [n_fetches] */
};

static int fetch(struct load *l, struct larder *c, double *us, struct larder_err *e)
{
    uint64_t n_bytes = 0;
    int rc = timed_fetch(c, l->name, us, &n_bytes, e);

    atomic_store(&l->image_bytes, n_bytes);
    return rc;
}

static void run_client(struct load *l)
{
    struct larder *c = NULL;
    struct larder_err e;
    double us;
    unsigned i;
    int none = 0, rc = larder_connect(&c, NULL, WAIT_MS, &e);

    for (i = 0; !rc && i < WARM_UP; i++)
        rc = fetch(l, c, &us, &e);
    pthread_barrier_wait(&l->ready);
    pthread_barrier_wait(&l->ready);
    while (!rc && !atomic_load(&l->rc) && (i = atomic_fetch_add(&l->next, 1)) < l->n_fetches)
        rc = fetch(l, c, &l->us[i], &e);
    if (rc && atomic_compare_exchange_strong(&l->rc, &none, rc))
        fprintf(stderr, "bench_client_many: %s (%s)\n", e.msg, larder_status_name(rc));
    larder_close(c);
}

/* A child that outlived its parent would wait at the barrier for ever. */
static void start_client(struct load *l)
{
    pid_t pid = fork();

    if (pid < 0) {
        perror("bench_client_many: fork");
        exit(1);
    }
    if (pid)
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    run_client(l);
    _exit(0);
}

/* Seconds from when all are connected and warm until the last has ended. */
static double run_clients(struct load *l, unsigned n)
{
    pthread_barrierattr_t attr;
    double t0;

    pthread_barrierattr_init(&attr);
    pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&l->ready, &attr, n + 1);
    pthread_barrierattr_destroy(&attr);
    for (unsigned i = 0; i < n; i++)
        start_client(l);
    pthread_barrier_wait(&l->ready);
    t0 = now_us();
    pthread_barrier_wait(&l->ready);
    while (wait(NULL) > 0)
        ;
    return (now_us() - t0) / 1e6;
}

static int measure(struct load *l, unsigned n)
{
    double seconds;

    atomic_store(&l->next, 0);
    seconds = run_clients(l, n);
    if (atomic_load(&l->rc))
        return 1;
    qsort(l->us, l->n_fetches, sizeof *l->us, by_value);
    printf("fetch,%u,%u,%.1f,%.1f,%.1f,%.0f,%.0f\n", n, l->n_fetches, l->us[0],
           l->us[l->n_fetches / 2], l->us[l->n_fetches - 1 - l->n_fetches / 100],
           l->n_fetches / seconds, (double)atomic_load(&l->image_bytes) / 1024);
    fflush(stdout); /* before the next fork */
    return 0;
}

/* A count on the command line; 0 when it is none up to `max`. */
static unsigned count(const char *arg, unsigned max)
{
    char *end;
    unsigned long n = strtoul(arg, &end, 10);

    return *end || n > max ? 0 : (unsigned)n;
}

int main(int argc, char **argv)
{
    unsigned n = argc > 3 ? count(argv[2], MAX_FETCHES) : 0;
    struct load *l;
    int rc = 0;

    for (int i = 3; i < argc; i++)
        if (!count(argv[i], MAX_CLIENTS))
            n = 0;
    if (!n) {
        fprintf(stderr, "usage: bench_client_many NAME FETCHES CLIENTS...\n");
        return 77;
    }
    l = mmap(NULL, sizeof *l + n * sizeof l->us[0], PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (l == MAP_FAILED) {
        perror("bench_client_many: mmap");
        return 1;
    }
    l->name = argv[1];
    l->n_fetches = n;
    printf("operation,clients,runs,min_us,median_us,p99_us,rate_per_s,image_kib\n");
    fflush(stdout);
    for (int i = 3; !rc && i < argc; i++)
        rc = measure(l, count(argv[i], MAX_CLIENTS));
    return rc;
}
