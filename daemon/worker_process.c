/* worker_process.c - prefill processes: started, read from, reaped, replaced.
 *
 * The one idea: a worker is two file descriptors and a pid; whatever goes wrong with any of
 * them ends in worker_end(), which decides what becomes of its job. */
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mem.h"
#include "sha256.h"
#include "worker.h"

#define WORKER_FD 3
#define MAX_TRIES 2u
#define START_TIMEOUT_S 120

extern char **environ;

bool worker_listed(const struct daemon *d, const struct worker *w)
{
    const struct worker *at = d->workers;

    while (at && at != w)
        at = at->next;
    return at != NULL;
}

/* Its stderr: whole lines go to the log, the last one explains a failure to start. */
static void on_stderr(evutil_socket_t fd, short what, void *arg)
{
    struct worker *w = arg;
    char buf[1024];
    ssize_t n = read(fd, buf, sizeof buf);

    (void)what;
    if (n == 0)
        event_del(w->err_ev);
    for (ssize_t i = 0; i < n; i++) {
        if (buf[i] != '\n') {
            if (w->line_len < WORKER_LINE_MAX)
                w->line[w->line_len++] = buf[i];
            continue;
        }
        w->line[w->line_len] = '\0';
        memcpy(w->last_line, w->line, w->line_len + 1);
        w->line_len = 0;
        log_line(LOG_LEVEL_WARNING, "worker %d: %s", (int)w->pid, w->last_line);
    }
}

/* ---- the end of a worker */

/* How a child ended, in words; it is killed first if it has not. */
static void reap(struct worker *w, char *out, size_t cap)
{
    int status = 0;

    *out = '\0';
    if (!w->pid)
        return;
    for (int i = 0; i < 20 && waitpid(w->pid, &status, WNOHANG) == 0; i++) {
        if (i == 19) {
            kill(w->pid, SIGKILL);
            waitpid(w->pid, &status, 0);
            snprintf(out, cap, "it had to be killed");
            return;
        }
        usleep(5000);
    }
    if (WIFSIGNALED(status))
        snprintf(out, cap, "killed by signal %d", WTERMSIG(status));
    else
        snprintf(out, cap, "exit status %d", WEXITSTATUS(status));
}

static void worker_free(struct worker *w)
{
    struct worker **at = &w->d->workers;

    while (*at && *at != w)
        at = &(*at)->next;
    if (*at)
        *at = w->next;
    for (uint32_t i = 0; i < w->d->n_models; i++)
        if (w->d->model[i].worker == w)
            w->d->model[i].worker = NULL;
    if (w->read_ev)
        event_free(w->read_ev);
    if (w->err_ev)
        event_free(w->err_ev);
    if (w->timer)
        event_free(w->timer);
    if (w->sock >= 0)
        close(w->sock);
    if (w->err_fd >= 0)
        close(w->err_fd);
    mem_free(w);
}

/* why: NULL when it closed the connection itself. */
void worker_end(struct worker *w, const char *why)
{
    struct daemon *d = w->d;
    bool was_idle = w->state == IDLE, started = w->state != STARTING;
    struct model *m = w->starting;
    struct job *j = worker_release_job(w);
    char how[64];
    struct larder_err e;

    if (w->pid && why && !was_idle)
        kill(w->pid, SIGKILL);
    close(w->sock); /* an idle worker ends by itself when its socket closes */
    w->sock = -1;
    reap(w, how, sizeof how);
    if (w->err_fd >= 0)
        on_stderr(w->err_fd, 0, w);
    if (!started)
        larder_fail(&e, LARDER_EWORKER, "%s", *w->last_line ? w->last_line : how);
    else
        larder_fail(&e, LARDER_EWORKER, "the prefill worker ended during the job: %s%s%s",
                    why ? why : "", why && *how ? "; " : "", how);
    if (!was_idle)
        log_line(LOG_LEVEL_WARNING, "worker %d ended: %s%s%s", (int)w->pid, why ? why : "",
                 why && *how ? "; " : "", how);
    worker_free(w);
    if (m && !started) {
        m->refused = true;
        m->why = e;
    }
    if (j && !j->ended) {
        if (j->cancel) {
            job_end(j, JOB_CANCELED, NULL);
        } else if (j->why.code) {
            job_end(j, JOB_FAILED, &j->why);
        } else if (j->tries >= MAX_TRIES) {
            job_end(j, JOB_FAILED, &e);
        } else {
            j->state = JOB_QUEUED;
            log_line(LOG_LEVEL_INFO, "job %llu is tried once more", (unsigned long long)j->id);
        }
    }
    jobs_start(d);
}

/* ---- starting */

static struct worker *worker_new(struct daemon *d, int sock, int err_fd, pid_t pid)
{
    struct worker *w = mem_zalloc(1, sizeof *w);

    if (!w)
        return NULL;
    w->d = d;
    w->sock = sock;
    w->err_fd = err_fd;
    w->pid = pid;
    w->read_ev = event_new(d->base, sock, EV_READ | EV_PERSIST, worker_readable, w);
    w->timer = evtimer_new(d->base, worker_overdue, w);
    if (err_fd >= 0)
        w->err_ev = event_new(d->base, err_fd, EV_READ | EV_PERSIST, on_stderr, w);
    w->next = d->workers;
    d->workers = w;
    if (!w->read_ev || !w->timer || (err_fd >= 0 && !w->err_ev)) {
        worker_free(w);
        return NULL;
    }
    event_add(w->read_ev, NULL);
    if (w->err_ev)
        event_add(w->err_ev, NULL);
    worker_set_timer(w, START_TIMEOUT_S);
    return w;
}

/* Backend cuda is in a program of its own, so that nobody else needs CUDA's libraries. */
static void program_path(const struct daemon *d, const struct config_model *c, char *out,
                         size_t cap)
{
    static const char *const beside[] = {"larder-prefill", "../bin/larder-prefill"};
    const char *suffix = strcmp(c->backend, "cuda") ? "" : "-cuda";
    char self[3072];
    ssize_t n;

    if (*d->conf.worker_program) {
        snprintf(out, cap, "%s%s", d->conf.worker_program, suffix);
        return;
    }
    n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = '\0';
    if (strrchr(self, '/'))
        strrchr(self, '/')[1] = '\0';
    for (int i = 0; i < 2; i++) {
        snprintf(out, cap, "%s%s%s", self, beside[i], suffix);
        if (!access(out, X_OK))
            return;
    }
    snprintf(out, cap, "larder-prefill%s", suffix);
}

static pid_t spawn(const struct daemon *d, const struct model *m, int sock, int err_fd)
{
    static const char *const fixed[] = {"worker", "--fd", "3", "--model"};
    char program[4096], model[4096 + 512 + KV_MAX_TEMPLATE], known[700], threads[24], hex[65];
    const char *argv[20];
    const struct config_model *c = m->conf;
    posix_spawn_file_actions_t fa;
    pid_t pid = -1;
    int n = 0, rc;

    program_path(d, c, program, sizeof program);
    snprintf(model, sizeof model, "%s=%s%s%s", c->name, c->path,
             strcmp(c->template, "auto") ? ",template=" : "",
             strcmp(c->template, "auto") ? c->template : "");
    snprintf(threads, sizeof threads, "%llu", (unsigned long long)c->threads);
    sha256_hex(m->fp, hex);
    snprintf(known, sizeof known, "%s=%llu:%llu:%llu:%llu:%s", c->name,
             (unsigned long long)m->id.dev, (unsigned long long)m->id.ino,
             (unsigned long long)m->id.size, (unsigned long long)m->id.mtime_ns, hex);
    argv[n++] = program;
    for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++)
        argv[n++] = fixed[i];
    argv[n++] = model;
    argv[n++] = "--backend";
    argv[n++] = c->backend;
    argv[n++] = "--dtype";
    argv[n++] = c->dtype;
    if (c->threads) {
        argv[n++] = "--threads";
        argv[n++] = threads;
    }
    if (m->id.size && model_same_file(m)) {
        argv[n++] = "--known";
        argv[n++] = known;
    }
    argv[n] = NULL;
    posix_spawn_file_actions_init(&fa);
    posix_spawn_file_actions_adddup2(&fa, err_fd, STDERR_FILENO);
    posix_spawn_file_actions_adddup2(&fa, sock, WORKER_FD);
    rc = posix_spawnp(&pid, program, &fa, NULL, (char *const *)(uintptr_t)argv, environ);
    posix_spawn_file_actions_destroy(&fa);
    if (rc) {
        log_line(LOG_LEVEL_ERROR, "cannot start %s: %s", program, strerror(rc));
        return -1;
    }
    setpriority(PRIO_PROCESS, (id_t)pid, (int)d->conf.worker_nice);
    return pid;
}

struct worker *worker_start(struct daemon *d, struct model *m, struct larder_err *e)
{
    int pair[2] = {-1, -1}, err[2] = {-1, -1};
    struct worker *w = NULL;
    pid_t pid = -1;

    if (!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) && !pipe2(err, O_CLOEXEC))
        pid = spawn(d, m, pair[1], err[1]);
    if (pid > 0) {
        fcntl(pair[0], F_SETFL, O_NONBLOCK);
        fcntl(err[0], F_SETFL, O_NONBLOCK);
        w = worker_new(d, pair[0], err[0], pid);
    }
    if (pair[1] >= 0)
        close(pair[1]);
    if (err[1] >= 0)
        close(err[1]);
    if (!w) {
        if (pid > 0)
            kill(pid, SIGKILL);
        if (pid <= 0) {
            if (pair[0] >= 0)
                close(pair[0]);
            if (err[0] >= 0)
                close(err[0]);
        }
        larder_fail(e, LARDER_EWORKER,
                    "larder-prefill%s cannot be started; %s",
                    strcmp(m->conf->backend, "cuda") ? "" : "-cuda",
                    strcmp(m->conf->backend, "cuda")
                        ? "set worker_program to its path"
                        : "build and install it with make CUDA=1, or configure backend = cpu");
        return NULL;
    }
    w->starting = m;
    m->worker = w;
    return w;
}

void workers_accept(struct daemon *d, int sock)
{
    struct ucred cred;
    socklen_t len = sizeof cred;

    if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &len) ||
        (cred.uid && cred.uid != geteuid()) || !worker_new(d, sock, -1, 0))
        close(sock);
}

int workers_probe(struct daemon *d, struct larder_err *e)
{
    for (uint32_t i = 0; i < d->n_models; i++) {
        struct model *m = &d->model[i];

        if (!worker_start(d, m, e))
            return LARDER_EWORKER;
        while (m->worker && m->worker->state == STARTING)
            event_base_loop(d->base, EVLOOP_ONCE);
        if (m->refused) {
            *e = m->why;
            return larder_fail_in(e, m->why.code, "model %s", m->conf->name);
        }
    }
    return 0;
}

void workers_stop(struct daemon *d)
{
    for (struct worker *w = d->workers, *next; w; w = next) {
        struct job *j;

        next = w->next;
        j = worker_release_job(w);
        if (j)
            j->state = JOB_QUEUED;
        if (w->pid) {
            kill(w->pid, SIGKILL);
            waitpid(w->pid, NULL, 0);
        }
        worker_free(w);
    }
}
