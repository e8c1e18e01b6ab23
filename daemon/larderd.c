/* larderd.c - larderd: options, start, signals, stop.
 *
 * The one idea: everything that can be wrong is found before the socket appears: the
 * configuration, the store, and, by a probe of each model's worker, models and backends. */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <systemd/sd-daemon.h>
#include <time.h>
#include <unistd.h>

#include "daemon.h"
#include "mem.h"

#define DEFAULT_CONFIG "/etc/larder/larder.conf"
#define MAX_OVERRIDES 64

static const char usage[] =
    "usage: larderd [--config FILE] [--set KEY=VALUE]...\n"
    "       larderd --private DIR --model NAME=PATH [--model NAME=PATH]... [--set KEY=VALUE]...\n"
    "\n"
    "Keeps pruned KV caches of documents and hands them to decoders over a Unix socket.\n"
    "\n"
    "  --config FILE       read FILE instead of " DEFAULT_CONFIG "\n"
    "  --private DIR       store and sockets below DIR, no configuration file\n"
    "  --model NAME=PATH   serve this model (repeatable)\n"
    "  --set KEY=VALUE     set a key of larder.conf (repeatable)\n"
    "  --dump-config       print the whole configuration and exit\n"
    "  --check-config      read the configuration, say whether it is good, and exit\n"
    "  --version           print the version and exit\n"
    "  --help              print this and exit\n";

struct options {
    const char *config, *private;
    const char *set[MAX_OVERRIDES], *model[MAX_OVERRIDES];
    int n_set, n_model;
    bool dump, check;
};

static int parse_options(int argc, char **argv, struct options *o)
{
    enum { CONFIG = 256, PRIVATE, MODEL, SET, DUMP, CHECK, VERSION, HELP };
    static const struct option longs[] = {{"config", required_argument, NULL, CONFIG},
                                          {"private", required_argument, NULL, PRIVATE},
                                          {"model", required_argument, NULL, MODEL},
                                          {"set", required_argument, NULL, SET},
                                          {"dump-config", no_argument, NULL, DUMP},
                                          {"check-config", no_argument, NULL, CHECK},
                                          {"version", no_argument, NULL, VERSION},
                                          {"help", no_argument, NULL, HELP},
                                          {NULL, 0, NULL, 0}};
    int c;

    while ((c = getopt_long(argc, argv, "h", longs, NULL)) != -1) {
        switch (c) {
        case CONFIG:
            o->config = optarg;
            break;
        case PRIVATE:
            o->private = optarg;
            break;
        case MODEL:
        case SET: {
            const char **list = c == MODEL ? o->model : o->set;
            int *n = c == MODEL ? &o->n_model : &o->n_set;

            if (*n == MAX_OVERRIDES)
                return 2;
            list[(*n)++] = optarg;
            break;
        }
        case DUMP:
            o->dump = true;
            break;
        case CHECK:
            o->check = true;
            break;
        case VERSION:
            puts("larderd " LARDER_VERSION);
            exit(0);
        case 'h':
        case HELP:
            fputs(usage, stdout);
            exit(0);
        default:
            return 2;
        }
    }
    return optind == argc ? 0 : 2;
}

/* ---- configuration */

/* Everything below DIR. */
static int configure_private(struct config *c, const char *dir, struct larder_err *e)
{
    static const char *const key[] = {"store", "socket", "worker_socket"};
    static const char *const leaf[] = {"store", "larder.sock", "worker.sock"};
    char line[4300];
    int rc = 0;

    if (mkdir(dir, 0700) && errno != EEXIST)
        return larder_fail(e, LARDER_ECONFIG, "--private %s: %s", dir, strerror(errno));
    for (int i = 0; !rc && i < 3; i++) {
        snprintf(line, sizeof line, "%s=%s/%s", key[i], dir, leaf[i]);
        rc = config_set(c, line, "--private", e);
    }
    if (!rc)
        rc = config_set(c, "allow_any_fs=yes", "--private", e);
    return rc ? rc : config_set(c, "allow_import=yes", "--private", e);
}

static int configure(struct config *c, const struct options *o, struct larder_err *e)
{
    int rc = config_init(c, e);

    if (!rc && o->private)
        rc = configure_private(c, o->private, e);
    else if (!rc && (o->config || !access(DEFAULT_CONFIG, F_OK)))
        rc = config_read(c, o->config ? o->config : DEFAULT_CONFIG, e);
    for (int i = 0; !rc && i < o->n_model; i++)
        rc = config_add_model(c, o->model[i], e);
    for (int i = 0; !rc && i < o->n_set; i++)
        rc = config_set(c, o->set[i], "--set", e);
    return rc;
}

static int check_models(const struct config *c, struct larder_err *e)
{
    if (!c->n_models)
        return larder_fail(e, LARDER_ECONFIG,
                           "no model is configured; use --model NAME=PATH or a 'model NAME { path "
                           "= ... }' section");
    for (uint32_t i = 0; i < c->n_models; i++)
        if (access(c->model[i].path, R_OK))
            return larder_fail(e, LARDER_ECONFIG, "model %s: %s: %s", c->model[i].name,
                               c->model[i].path, strerror(errno));
    return 0;
}

/* ---- signals and watchdog */

static void on_stop(evutil_socket_t sig, short what, void *arg)
{
    struct daemon *d = arg;

    (void)what;
    log_line(LOG_LEVEL_INFO, "signal %d: stopping", (int)sig);
    d->stopping = true;
    event_base_loopbreak(d->base);
}

/* Limits may change while running; what is open stays as it is. */
static void take_limits(struct daemon *d, const struct config *c)
{
    d->conf.image_cache_bytes = c->image_cache_bytes;
    d->conf.max_clients = c->max_clients;
    d->conf.max_in_flight = c->max_in_flight;
    d->conf.max_queued_frames = c->max_queued_frames;
    d->conf.max_document_bytes = c->max_document_bytes;
    d->conf.max_jobs = c->max_jobs;
    d->conf.worker_idle_s = c->worker_idle_s;
    d->conf.worker_timeout_s = c->worker_timeout_s;
}

static struct options options; /* kept for a reload */

static void on_reload(evutil_socket_t sig, short what, void *arg)
{
    struct daemon *d = arg;
    struct config fresh;
    struct larder_err e;

    (void)sig;
    (void)what;
    sd_notify(0, "RELOADING=1");
    if (configure(&fresh, &options, &e)) {
        log_line(LOG_LEVEL_ERROR, "reload: %s; the old configuration stays", e.msg);
    } else {
        take_limits(d, &fresh);
        log_line(
            LOG_LEVEL_INFO,
            "reload: limits are taken over; models, paths, budget and namespaces need a restart");
    }
    config_done(&fresh);
    sd_notify(0, "READY=1");
}

static void on_watchdog(evutil_socket_t sig, short what, void *arg)
{
    (void)sig;
    (void)what;
    (void)arg;
    sd_notify(0, "WATCHDOG=1");
}

static struct event *events[8];
static int n_events;

static int add_event(struct event *ev, const struct timeval *t, struct larder_err *e)
{
    if (!ev || event_add(ev, t))
        return larder_fail(e, LARDER_ENOMEM, "no memory for the event loop");
    events[n_events++] = ev;
    return 0;
}

static int watch_signals(struct daemon *d, struct larder_err *e)
{
    uint64_t usec = 0;
    struct timeval t;
    int rc = add_event(evsignal_new(d->base, SIGTERM, on_stop, d), NULL, e);

    if (!rc)
        rc = add_event(evsignal_new(d->base, SIGINT, on_stop, d), NULL, e);
    if (!rc)
        rc = add_event(evsignal_new(d->base, SIGHUP, on_reload, d), NULL, e);
    if (!rc && sd_watchdog_enabled(0, &usec) > 0) {
        t = (struct timeval){(time_t)(usec / 2000000), (suseconds_t)(usec / 2 % 1000000)};
        rc = add_event(event_new(d->base, -1, EV_PERSIST, on_watchdog, d), &t, e);
    }
    return rc;
}

/* ---- start and stop */

static int open_store(struct daemon *d, struct larder_err *e)
{
    struct store_opts o = {d->conf.store, d->conf.store_budget, (enum store_codec)d->conf.codec,
                           d->conf.allow_any_fs};

    if (mkdir(d->conf.store, 0700) && errno != EEXIST)
        return larder_fail(e, LARDER_EIO, "%s: %s", d->conf.store, strerror(errno));
    return store_open(&d->store, &o, e);
}

static int start(struct daemon *d, struct larder_err *e)
{
    long n_cpu = sysconf(_SC_NPROCESSORS_ONLN);
    int rc = open_store(d, e);

    if (rc)
        return rc;
    d->base = event_base_new();
    if (!d->base)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the event loop");
    rc = returns_new(&d->returns, d->base, e);
    if (!rc)
        rc = pool_new(&d->writer, d->returns, 1, e);
    if (!rc)
        rc = pool_new(&d->readers, d->returns, n_cpu > 0 ? (uint32_t)n_cpu : 1, e);
    if (!rc)
        rc = pool_new(&d->slow, d->returns, 1, e);
    if (!rc)
        rc = images_new(d, e);
    if (!rc)
        rc = watch_signals(d, e);
    if (rc)
        return rc;
    models_configure(d);
    models_recall(d);
    rc = workers_probe(d, e);
    if (!rc && !d->stopping)
        rc = jobs_load(d, e);
    return rc ? rc : server_open(d, e);
}

static void stop(struct daemon *d)
{
    d->stopping = true;
    if (d->base) {
        server_close(d);
        workers_stop(d);
    }
    pool_free(d->slow);
    pool_free(d->readers);
    if (d->returns)
        returns_drain(d->returns); /* what they leave may need the writer */
    pool_free(d->writer);
    if (d->returns)
        returns_drain(d->returns);
    images_free(d);
    jobs_free(d);
    profiles_free(d);
    for (int i = 0; i < n_events; i++)
        event_free(events[i]);
    returns_free(d->returns);
    if (d->base)
        event_base_free(d->base);
    store_close(d->store);
}

/* A KV cache is its document: no core dumps, no debuggers of other users, private files. */
static void harden(void)
{
    const struct rlimit none = {0, 0};

    umask(077);
    setrlimit(RLIMIT_CORE, &none);
    prctl(PR_SET_DUMPABLE, 0);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
}

static int run(struct daemon *d)
{
    struct larder_err e = {0, ""};

    d->started = (uint64_t)time(NULL);
    d->client_sock = d->worker_sock = -1;
    if (check_models(&d->conf, &e) || start(d, &e)) {
        log_line(LOG_LEVEL_ERROR, "%s (%s)", e.msg, larder_status_name(e.code));
        stop(d);
        return 1;
    }
    if (!d->stopping) {
        log_line(LOG_LEVEL_INFO, "listening on %s", d->conf.socket);
        sd_notify(0, "READY=1");
        jobs_start(d);
        event_base_dispatch(d->base);
    }
    sd_notify(0, "STOPPING=1");
    stop(d);
    return 0;
}

int main(int argc, char **argv)
{
    struct daemon *d = mem_zalloc(1, sizeof *d);
    struct larder_err e = {0, ""};
    int rc = 0;

    if (!d || parse_options(argc, argv, &options)) {
        fputs(usage, stderr);
        return 2;
    }
    if (configure(&d->conf, &options, &e)) {
        log_line(LOG_LEVEL_ERROR, "%s (%s)", e.msg, larder_status_name(e.code));
        rc = 1;
    } else if (options.dump) {
        config_dump(&d->conf, stdout);
    } else if (options.check) {
        puts("the configuration is good");
    } else {
        harden();
        rc = run(d);
    }
    config_done(&d->conf);
    mem_free(d);
    return rc;
}
