/* cli_run.c - larder-prefill as a program.
 *
 * The one idea: the client links no model code. What the engine is to read beyond its
 * arguments are memory files that it inherits; what it prints goes straight through, or is
 * read as one JSON object, or as one per line while it runs. */
#include "cli_run.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mem.h"
#include "memfile.h"

#define ENGINE "larder-prefill"
#define MAX_LINE (64u << 20) /* of its output; ends a mistake */

/* ---- arguments */

void engine_start(struct engine *en, const char *command)
{
    memset(en, 0, sizeof *en);
    engine_add(en, ENGINE);
    engine_add(en, command);
}

void engine_done(struct engine *en)
{
    for (int i = 0; i < en->n_fds; i++)
        close(en->fd[i]);
    for (int i = 0; i < en->n; i++)
        mem_free(en->arg[i]);
    memset(en, 0, sizeof *en);
}

void engine_add(struct engine *en, const char *s)
{
    if (en->n < ENGINE_MAX_ARGS)
        en->arg[en->n++] = cli_text("%s", s);
}

void engine_option(struct engine *en, const char *name, const char *value)
{
    if (!value)
        return;
    engine_add(en, name);
    if (*value)
        engine_add(en, value);
}

int engine_inherit(struct engine *en, int fd, int *ret, struct larder_err *e)
{
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);

    assert(en->n_fds < ENGINE_MAX_FDS);
    if (own < 0)
        return larder_fail(e, LARDER_EIO, "fcntl: %s", strerror(errno));
    en->fd[en->n_fds++] = own;
    *ret = own;
    return 0;
}

int engine_file(struct engine *en, const char *name, const void *bytes, size_t len,
                struct larder_err *e)
{
    int fd = -1;
    int rc = memfile_from("larder-engine", bytes, len, &fd, e);
    char *path;

    if (rc)
        return rc;
    assert(en->n_fds < ENGINE_MAX_FDS);
    en->fd[en->n_fds++] = fd;
    path = cli_text("/proc/self/fd/%d", fd);
    engine_option(en, name, path);
    mem_free(path);
    return 0;
}

/* ---- the model */

void engine_model_done(struct engine_model *m)
{
    mem_free(m->path);
    mem_free(m->tmpl);
    mem_free(m->policy);
    mem_free(m->backend);
    mem_free(m->dtype);
    mem_free(m->name);
}

/* The command line's word, else the configuration's unless that is "auto", else none. */
static char *choose(const char *given, const json_t *model, const char *key)
{
    const char *configured = model ? cli_str(model, key) : "";

    if (given)
        return cli_text("%s", given);
    return *configured && strcmp(configured, "auto") ? cli_text("%s", configured) : NULL;
}

int engine_model_find(struct cli *c, const char *name, struct engine_model *ret,
                      struct larder_err *e)
{
    json_t *m = NULL;
    int rc = cli_model_path(c, name, &ret->path, &m, e);

    if (rc)
        return rc;
    ret->name = m ? cli_text("%s", cli_str(m, "name")) : NULL;
    ret->has_profile = m && *cli_str(m, "profile");
    ret->tmpl = choose(c->opt[OPT_TEMPLATE], m, "template");
    ret->policy = choose(c->opt[OPT_POLICY], m, "policy");
    ret->backend = choose(c->opt[OPT_BACKEND], m, "backend");
    /* The configured type belongs to the configured backend. */
    ret->dtype = choose(c->opt[OPT_DTYPE], c->opt[OPT_BACKEND] ? NULL : m, "dtype");
    json_decref(m);
    return 0;
}

void engine_options(struct engine *en, const struct cli *c, const struct engine_model *m)
{
    engine_option(en, "--dtype", m->dtype);
    engine_option(en, "--backend", m->backend);
    en->cuda = m->backend && !strcmp(m->backend, "cuda");
    engine_option(en, "--threads", c->opt[OPT_THREADS]);
}

int engine_profile(struct engine *en, struct cli *c, const struct engine_model *m,
                   struct larder_err *e)
{
    json_t *profile = NULL;
    char *text;
    int rc;

    if (!m->has_profile)
        return 0;
    rc = cli_profile(c, m->name, NULL, &profile, e);
    if (rc)
        return rc;
    text = cli_profile_text(json_object_get(profile, "profile"));
    json_decref(profile);
    rc = engine_file(en, "--profile", text, strlen(text), e);
    mem_free(text);
    return rc;
}

/* ---- running it */

/* larder-prefill beside this program, else whatever PATH finds. */
static char *find_engine(bool cuda)
{
    const char *name = cuda ? ENGINE "-cuda" : ENGINE;
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    char *beside, *slash;

    if (n <= 0)
        return cli_text("%s", name);
    self[n] = '\0';
    slash = strrchr(self, '/');
    beside = cli_text("%.*s/%s", slash ? (int)(slash - self) : 0, self, name);
    if (!access(beside, X_OK))
        return beside;
    mem_free(beside);
    return cli_text("%s", name);
}

/* In the child: never returns. */
static void become(const struct engine *en, const char *program, int out)
{
    sigset_t ends;

    for (int i = 0; i < en->n_fds; i++)
        fcntl(en->fd[i], F_SETFD, 0);
    if (out >= 0)
        dup2(out, STDOUT_FILENO);
    /* Who waits for these with a descriptor has them blocked. */
    sigemptyset(&ends);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGTERM);
    sigprocmask(SIG_UNBLOCK, &ends, NULL);
    execvp(program, en->arg);
    fprintf(stderr, "larder: cannot run %s: %s; install it beside larder (LARDER_EBACKEND)\n",
            program, strerror(errno));
    _exit(1);
}

/* The engine has told its own failures; being killed it could not. */
static int wait_engine(pid_t pid, struct larder_err *e)
{
    int status = 0;

    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return larder_fail(e, LARDER_EIO, "waiting for " ENGINE ": %s", strerror(errno));
    if (WIFSIGNALED(status))
        return larder_fail(e, LARDER_EWORKER, ENGINE " was ended by signal %d (%s)",
                           WTERMSIG(status), strsignal(WTERMSIG(status)));
    return WEXITSTATUS(status) ? CLI_REPORTED : 0;
}

static int read_pipe(int fd, json_t **ret, struct larder_err *e)
{
    json_error_t why;
    json_t *j;
    FILE *f = fdopen(fd, "r");

    if (!f) {
        close(fd);
        return larder_fail(e, LARDER_EIO, "fdopen: %s", strerror(errno));
    }
    j = json_loadf(f, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &why);
    while (getc(f) != EOF) /* let the engine finish writing */
        continue;
    fclose(f);
    if (!json_is_object(j)) {
        json_decref(j);
        return larder_fail(e, LARDER_EWORKER, ENGINE " did not answer in JSON");
    }
    *ret = j;
    return 0;
}

/* Start it. With ret_fd, its standard output is a pipe whose end that is. */
static int spawn(const struct engine *en, pid_t *ret_pid, int *ret_fd, struct larder_err *e)
{
    char *program = find_engine(en->cuda);
    int p[2] = {-1, -1}, rc = 0;
    pid_t pid = -1;

    fflush(stdout);
    if (ret_fd && pipe2(p, O_CLOEXEC))
        rc = larder_fail(e, LARDER_EIO, "pipe: %s", strerror(errno));
    if (!rc) {
        pid = fork();
        if (pid == 0)
            become(en, program, p[1]);
        if (pid < 0)
            rc = larder_fail(e, LARDER_EIO, "fork: %s", strerror(errno));
    }
    mem_free(program);
    if (p[1] >= 0)
        close(p[1]);
    if (rc) {
        if (p[0] >= 0)
            close(p[0]);
        return rc;
    }
    *ret_pid = pid;
    if (ret_fd)
        *ret_fd = p[0];
    return 0;
}

int engine_run(struct engine *en, json_t **ret, struct larder_err *e)
{
    struct larder_err why = {0, ""};
    int fd = -1, read_rc = 0, rc;
    pid_t pid;

    rc = spawn(en, &pid, ret ? &fd : NULL, e);
    if (rc)
        return rc;
    if (ret)
        read_rc = read_pipe(fd, ret, &why);
    rc = wait_engine(pid, e);
    if (!rc && read_rc) {
        *e = why;
        rc = read_rc;
    }
    return rc;
}

/* ---- line by line */

struct lines {
    char *buf;
    size_t len, cap;
    engine_line *line;
    void *arg;
};

/* Hand out the whole lines that have come; the rest waits for more. */
static int take_lines(struct lines *l, struct larder_err *e)
{
    size_t at = 0;
    char *end;
    int rc = 0;

    while (!rc && (end = memchr(l->buf + at, '\n', l->len - at))) {
        json_t *j = json_loadb(l->buf + at, (size_t)(end - l->buf) - at,
                               JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, NULL);

        rc = json_is_object(j) ? l->line(l->arg, j, e)
                               : larder_fail(e, LARDER_EWORKER, ENGINE " did not answer in JSON");
        json_decref(j);
        at = (size_t)(end - l->buf) + 1;
    }
    memmove(l->buf, l->buf + at, l->len - at);
    l->len -= at;
    return rc;
}

/* What can be read now; *ret_end: there is no more. */
static int read_some(struct lines *l, int fd, bool *ret_end, struct larder_err *e)
{
    ssize_t n;

    if (l->len == l->cap) {
        size_t cap = l->cap ? 2 * l->cap : 1 << 16;
        char *more = cap > MAX_LINE ? NULL : mem_grow(l->buf, cap, 1);

        if (!more)
            return larder_fail(e, LARDER_ENOMEM, "no memory for the output of " ENGINE);
        l->buf = more;
        l->cap = cap;
    }
    n = read(fd, l->buf + l->len, l->cap - l->len);
    if (n < 0 && errno != EINTR)
        return larder_fail(e, LARDER_EIO, "cannot read from " ENGINE ": %s", strerror(errno));
    *ret_end = n == 0;
    l->len += n > 0 ? (size_t)n : 0;
    return take_lines(l, e);
}

static bool is_readable(int fd)
{
    struct pollfd p = {fd, POLLIN, 0};

    return fd >= 0 && poll(&p, 1, 0) > 0;
}

static int read_lines(struct lines *l, int fd, int stop_fd, struct larder_err *e)
{
    bool end = false;
    int rc = 0;

    while (!rc && !end) {
        struct pollfd p[2] = {{fd, POLLIN, 0}, {stop_fd, POLLIN, 0}};

        if (poll(p, 2, -1) < 0)
            continue;
        if (p[1].revents)
            return larder_fail(e, LARDER_ECANCELED, "interrupted");
        rc = read_some(l, fd, &end, e);
    }
    return rc;
}

int engine_lines(struct engine *en, int stop_fd, engine_line *line, void *arg, struct larder_err *e)
{
    struct lines l = {.line = line, .arg = arg};
    int fd = -1, rc, end_rc;
    struct larder_err why;
    pid_t pid;

    rc = spawn(en, &pid, &fd, e);
    if (rc)
        return rc;
    rc = read_lines(&l, fd, stop_fd, e);
    if (rc)
        kill(pid, SIGTERM);
    close(fd);
    mem_free(l.buf);
    end_rc = wait_engine(pid, &why);
    if (!rc && end_rc) {
        *e = why;
        rc = end_rc;
    }
    /* A terminal interrupts both of us, and the engine may be the first to end. */
    return rc && is_readable(stop_fd) ? larder_fail(e, LARDER_ECANCELED, "interrupted") : rc;
}
