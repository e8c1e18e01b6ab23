/* cli_engine.c - `larder ask` and `larder trace`: run larder-prefill as a program.
 *
 * The one idea: the client links no model code. It fetches the image, which is a sealed
 * file, and lets the engine inherit the descriptor; the lease stays open meanwhile.
 * What the engine prints goes straight through, except that --json adds fetch_ms.
 */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "mem.h"
#include "memfile.h"

#define ENGINE "larder-prefill"
#define MAX_ARGS 48

struct engine {
    char *arg[MAX_ARGS + 1]; /* owned, NULL-terminated */
    int n;
    int image_fd;    /* to be inherited, or -1 */
    int document_fd; /* likewise: what came from standard input */
};

static void add(struct engine *en, const char *s)
{
    if (en->n < MAX_ARGS)
        en->arg[en->n++] = cli_text("%s", s);
}

/* --name value, if there is a value; a flag when the value is "". */
static void add_option(struct engine *en, const char *name, const char *value)
{
    if (!value)
        return;
    add(en, name);
    if (*value)
        add(en, value);
}

/* --file: the engine reads files only, so standard input becomes one. */
static int add_document(struct engine *en, const char *file, struct larder_err *e)
{
    char *text = NULL, *path;
    size_t len = 0;
    int rc;

    if (!file || strcmp(file, "-")) {
        add_option(en, "--file", file);
        return 0;
    }
    rc = cli_read_file(file, &text, &len, e);
    if (rc)
        return rc;
    rc = memfile_from("larder-document", text, len, &en->document_fd, e);
    mem_free(text);
    if (rc)
        return rc;
    path = cli_text("/proc/self/fd/%d", en->document_fd);
    add_option(en, "--file", path);
    mem_free(path);
    return 0;
}

static void engine_done(struct engine *en)
{
    if (en->document_fd >= 0)
        close(en->document_fd);
    for (int i = 0; i < en->n; i++)
        mem_free(en->arg[i]);
}

/* larder-prefill beside this program, else whatever PATH finds. */
static char *find_engine(void)
{
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    char *beside, *slash;

    if (n <= 0)
        return cli_text(ENGINE);
    self[n] = '\0';
    slash = strrchr(self, '/');
    beside = cli_text("%.*s/" ENGINE, slash ? (int)(slash - self) : 0, self);
    if (!access(beside, X_OK))
        return beside;
    mem_free(beside);
    return cli_text(ENGINE);
}

/* A model, and what the daemon's configuration says of it; strings are owned or NULL. */
struct engine_model {
    char *path, *tmpl, *policy, *backend, *dtype;
};

static void engine_model_done(struct engine_model *m)
{
    mem_free(m->path);
    mem_free(m->tmpl);
    mem_free(m->policy);
    mem_free(m->backend);
    mem_free(m->dtype);
}

/* The command line's word, else the configuration's unless that is "auto", else none. */
static char *choose(const char *given, const json_t *model, const char *key)
{
    const char *configured = model ? cli_str(model, key) : "";

    if (given)
        return cli_text("%s", given);
    return *configured && strcmp(configured, "auto") ? cli_text("%s", configured) : NULL;
}

static int find_model(struct cli *c, const char *name, struct engine_model *ret,
                      struct larder_err *e)
{
    json_t *m = NULL;
    int rc = cli_model_path(c, name, &ret->path, &m, e);

    if (rc)
        return rc;
    ret->tmpl = choose(c->opt[OPT_TEMPLATE], m, "template");
    ret->policy = choose(c->opt[OPT_POLICY], m, "policy");
    ret->backend = choose(c->opt[OPT_BACKEND], m, "backend");
    /* The configured type belongs to the configured backend. */
    ret->dtype = choose(c->opt[OPT_DTYPE], c->opt[OPT_BACKEND] ? NULL : m, "dtype");
    json_decref(m);
    return 0;
}

static void engine_options(struct engine *en, const struct cli *c, const struct engine_model *m)
{
    add_option(en, "--max-new", c->opt[OPT_MAX_NEW]);
    add_option(en, "--ignore-eos", c->opt[OPT_IGNORE_EOS]);
    add_option(en, "--dtype", m->dtype);
    add_option(en, "--backend", m->backend);
    add_option(en, "--threads", c->opt[OPT_THREADS]);
    add_option(en, "--json", c->opt[OPT_JSON]);
}

/* ---- running it */

/* In the child: never returns. */
static void become(const struct engine *en, const char *program, int out)
{
    if (en->image_fd >= 0)
        fcntl(en->image_fd, F_SETFD, 0);
    if (en->document_fd >= 0)
        fcntl(en->document_fd, F_SETFD, 0);
    if (out >= 0)
        dup2(out, STDOUT_FILENO);
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
    j = json_loadf(f, JSON_REJECT_DUPLICATES, &why);
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

/* Run the engine; with `ret`, its standard output is read as one JSON object. */
static int run_engine(struct engine *en, json_t **ret, struct larder_err *e)
{
    char *program = find_engine();
    int p[2] = {-1, -1};
    struct larder_err why = {0, ""};
    int rc = 0, read_rc = 0;
    pid_t pid;

    fflush(stdout);
    if (ret && pipe2(p, O_CLOEXEC)) {
        mem_free(program);
        return larder_fail(e, LARDER_EIO, "pipe: %s", strerror(errno));
    }
    pid = fork();
    if (pid == 0)
        become(en, program, p[1]);
    mem_free(program);
    if (p[1] >= 0)
        close(p[1]);
    if (pid < 0) {
        if (p[0] >= 0)
            close(p[0]);
        return larder_fail(e, LARDER_EIO, "fork: %s", strerror(errno));
    }
    if (ret)
        read_rc = read_pipe(p[0], ret, &why);
    rc = wait_engine(pid, e);
    if (!rc && read_rc) {
        *e = why;
        rc = read_rc;
    }
    return rc;
}

/* ---- ask */

struct ask {
    const char *ref;      /* a stored entry, or NULL: the document is on the command line */
    const char *question; /* or NULL: --tokens */
    struct engine_model model;
    double fetch_ms; /* < 0: nothing was fetched */
    struct larder_lease lease;
};

static double ms_since(const struct timespec *t0)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)(t.tv_sec - t0->tv_sec) * 1e3 + (double)(t.tv_nsec - t0->tv_nsec) / 1e6;
}

static int check_ask(const struct cli *c, struct ask *a, struct larder_err *e)
{
    bool file = c->opt[OPT_FILE] || c->opt[OPT_DOC_TOKENS];
    int n_named = file ? 0 : 1;

    if (c->opt[OPT_FILE] && c->opt[OPT_DOC_TOKENS])
        return cli_usage(e, "--file and --doc-tokens exclude each other");
    if (c->n_args < n_named)
        return cli_usage(e, "ask needs the NAME of a stored entry, --file or --doc-tokens");
    if (!file && c->opt[OPT_POLICY])
        return cli_usage(e, "--policy goes with --file: a stored entry has its policy");
    if (c->n_args > n_named + 1)
        return cli_usage(e, "unexpected argument '%.64s'; put the question in quotes",
                         c->arg[n_named + 1]);
    a->ref = file ? NULL : c->arg[0];
    a->question = c->n_args > n_named ? c->arg[n_named] : NULL;
    if ((a->question != NULL) == (c->opt[OPT_QUESTION_TOKENS] != NULL))
        return cli_usage(e, "ask needs a QUESTION or --tokens, and not both");
    return 0;
}

/* What the entry was made with: its model, unless --model names a file, and its template. */
static int describe_entry(struct cli *c, struct ask *a, struct larder_err *e)
{
    json_t *body = NULL, *answer = NULL;
    const json_t *en;
    int rc = larder_ref_body(a->ref, &body, e);

    if (!rc)
        rc = cli_ask_daemon(c, FRAME_SHOW, body, CLI_WORK_MS, &answer, e);
    if (rc)
        return cli_hint_namespace(rc, a->ref, e);
    en = json_object_get(answer, "entry");
    rc = find_model(c, c->opt[OPT_MODEL] ? c->opt[OPT_MODEL] : cli_str(en, "model"), &a->model, e);
    if (!rc && !c->opt[OPT_TEMPLATE]) {
        mem_free(a->model.tmpl);
        a->model.tmpl = cli_text("%s", cli_str(en, "template"));
    }
    json_decref(answer);
    return rc;
}

static int fetch_entry(struct cli *c, struct ask *a, struct larder_err *e)
{
    static const struct larder_fetch_options as_stored = {.packed = 1}; /* the engine reads both */
    struct timespec t0;
    int rc = describe_entry(c, a, e);

    if (rc)
        return rc;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    rc = larder_fetch_with(c->conn, a->ref, &as_stored, CLI_WORK_MS, &a->lease, e);
    a->fetch_ms = ms_since(&t0);
    return rc;
}

static int ask_arguments(struct engine *en, const struct cli *c, const struct ask *a,
                         struct larder_err *e)
{
    char fd[16];
    int rc;

    snprintf(fd, sizeof fd, "%d", a->lease.fd);
    add(en, ENGINE);
    add(en, "ask");
    add_option(en, "--model", a->model.path);
    add_option(en, "--image-fd", a->ref ? fd : NULL);
    rc = add_document(en, c->opt[OPT_FILE], e);
    if (rc)
        return rc;
    add_option(en, "--doc-tokens", c->opt[OPT_DOC_TOKENS]);
    add_option(en, "--policy", c->opt[OPT_POLICY]);
    add_option(en, "--template", a->model.tmpl);
    add_option(en, "--tokens", c->opt[OPT_QUESTION_TOKENS]);
    engine_options(en, c, &a->model);
    if (a->question) {
        add(en, "--"); /* a question may begin with a dash */
        add(en, a->question);
    }
    en->image_fd = a->ref ? a->lease.fd : -1;
    return 0;
}

static int ask_engine(const struct cli *c, const struct ask *a, struct larder_err *e)
{
    struct engine en = {.image_fd = -1, .document_fd = -1};
    json_t *answer = NULL;
    int rc = ask_arguments(&en, c, a, e);

    if (!rc)
        rc = run_engine(&en, c->opt[OPT_JSON] ? &answer : NULL, e);
    if (!rc && answer) {
        if (a->fetch_ms >= 0)
            json_object_set_new(answer, "fetch_ms", json_real(a->fetch_ms));
        cli_print_json(answer);
    }
    json_decref(answer);
    engine_done(&en);
    return rc;
}

int cli_ask(struct cli *c, struct larder_err *e)
{
    struct ask a = {.fetch_ms = -1, .lease = {.fd = -1}};
    int rc = check_ask(c, &a, e);

    if (!rc)
        rc = a.ref ? fetch_entry(c, &a, e) : find_model(c, c->opt[OPT_MODEL], &a.model, e);
    if (!rc)
        rc = ask_engine(c, &a, e);
    if (a.lease.fd >= 0)
        larder_release(c->conn, &a.lease, CLI_SOON_MS, NULL);
    engine_model_done(&a.model);
    return rc;
}

/* ---- trace */

int cli_trace(struct cli *c, struct larder_err *e)
{
    struct engine en = {.image_fd = -1, .document_fd = -1};
    struct engine_model m = {0};
    int rc;

    if (!c->opt[OPT_FILE] == !c->opt[OPT_TOKENS_FILE])
        return cli_usage(e, "trace needs one of --file and --tokens");
    rc = find_model(c, c->opt[OPT_MODEL], &m, e);
    if (!rc && !m.policy)
        rc = cli_usage(e, "trace needs --policy when --model is a file");
    if (!rc) {
        add(&en, ENGINE);
        add(&en, "trace");
        add_option(&en, "--model", m.path);
        rc = add_document(&en, c->opt[OPT_FILE], e);
        add_option(&en, "--tokens", c->opt[OPT_TOKENS_FILE]);
        add_option(&en, "--policy", m.policy);
        add_option(&en, "--template", m.tmpl);
        engine_options(&en, c, &m);
    }
    if (!rc)
        rc = run_engine(&en, NULL, e);
    engine_done(&en);
    engine_model_done(&m);
    return rc;
}
