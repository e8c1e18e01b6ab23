/* cli_put.c - `larder put`: documents in, one line each about what became of them.
 *
 * The one idea: a few documents are kept in the daemon's queue ahead of the one being
 * waited for, so that the worker never idles, and the outcome of each is told in the
 * order in which they came. A failed document does not stop the others; a lost
 * connection does.
 */
#include "cli.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mem.h"

#define MAX_AHEAD 8 /* documents queued and not yet told about */
#define MAX_DIR_DEPTH 64

struct put_run {
    struct cli *cli;
    json_t *names; /* used in this run, as keys of an object */
    struct {
        uint64_t job;
        char *name; /* full */
    } ahead[MAX_AHEAD];
    unsigned n_ahead;
    unsigned n_stored, n_already, n_queued, n_failed;
};

/* ---- outcomes */

struct outcome {
    const char *result; /* "stored", "already_stored", "queued", "failed", "canceled" */
    const char *name;
    const struct larder_job *job; /* NULL: the daemon did not take it */
};

static void key_hex(const struct larder_job *job, char out[65])
{
    out[0] = '\0';
    for (int i = 0; job && job->has_key && i < LARDER_KEY_BYTES; i++)
        snprintf(out + 2 * i, 3, "%02x", job->key[i]);
}

static void print_outcome_json(const struct outcome *o, const struct larder_err *why)
{
    json_t *j = json_pack("{s:s, s:s}", "name", o->name, "result", o->result);
    char hex[65];

    key_hex(o->job, hex);
    if (o->job)
        json_object_set_new(j, "job", json_integer((json_int_t)o->job->id));
    if (*hex)
        json_object_set_new(j, "key", json_string(hex));
    if (o->job && o->job->n_ctx)
        json_object_set_new(j, "n_ctx", json_integer(o->job->n_ctx));
    if (o->job && o->job->prefill_ms)
        json_object_set_new(j, "prefill_ms", json_integer((json_int_t)o->job->prefill_ms));
    if (why) {
        json_object_set_new(j, "code", json_integer(why->code));
        json_object_set_new(j, "status", json_string(larder_status_name(why->code)));
        json_object_set_new(j, "message", json_string(why->msg));
    }
    cli_print_json(j);
    json_decref(j);
}

static char *describe(const struct cli *c, const struct outcome *o)
{
    char *took, *s;

    if (!o->job)
        return cli_text("%s", "");
    if (!strcmp(o->result, "queued"))
        return cli_text("job %" PRIu64 "; 'larder jobs' shows it", o->job->id);
    if (strcmp(o->result, "stored"))
        return o->job->n_ctx ? cli_text("%u tokens", o->job->n_ctx) : cli_text("%s", "");
    took = cli_duration(c, o->job->prefill_ms);
    s = cli_text("%u tokens, prefill %s", o->job->n_ctx, took);
    mem_free(took);
    return s;
}

static void print_outcome_plain(const struct cli *c, const struct outcome *o)
{
    char hex[65], *text;

    key_hex(o->job, hex);
    if (c->tty) {
        text = describe(c, o);
        printf("%-14s  %s  %s\n",
               strcmp(o->result, "already_stored") ? o->result : "already stored", o->name, text);
    } else {
        /* result, name, job, key, tokens, milliseconds; unknown ones empty */
        text = cli_text("%" PRIu64, o->job ? o->job->id : 0);
        printf("%s\t%s\t%s\t%s\t%u\t%" PRIu64 "\n", o->result, o->name, text, hex,
               o->job ? o->job->n_ctx : 0, o->job ? o->job->prefill_ms : 0);
    }
    mem_free(text);
}

static void tell(struct put_run *r, const struct outcome *o, const struct larder_err *why)
{
    cli_progress_end();
    if (r->cli->opt[OPT_JSON])
        print_outcome_json(o, why);
    else if (!why || !r->cli->tty)
        print_outcome_plain(r->cli, o);
    fflush(stdout);
    if (why)
        cli_print_error(o->name, why);
}

static void tell_failed(struct put_run *r, const char *name, const struct larder_job *job,
                        const struct larder_err *why)
{
    struct outcome o = {"failed", name, job};

    r->n_failed++;
    tell(r, &o, why);
}

static void tell_finished(struct put_run *r, const char *name, const struct larder_job *job)
{
    struct outcome o = {job->stored_already ? "already_stored" : "stored", name, job};
    struct larder_err why = {0, ""};

    switch (job->state) {
    case LARDER_JOB_DONE:
        *(job->stored_already ? &r->n_already : &r->n_stored) += 1;
        tell(r, &o, NULL);
        break;
    case LARDER_JOB_FAILED:
        larder_fail(&why, job->code, "%s", job->message);
        tell_failed(r, name, job, &why);
        break;
    case LARDER_JOB_CANCELED:
        larder_fail(&why, LARDER_ECANCELED, "job %" PRIu64 " was canceled", job->id);
        tell_failed(r, name, job, &why);
        break;
    default:
        o.result = "queued";
        r->n_queued++;
        tell(r, &o, NULL);
    }
}

/* ---- waiting */

struct watch_text {
    const char *name;
};

static void show_progress(void *arg, const struct larder_job *job)
{
    const struct watch_text *w = arg;
    char *text = cli_text("%s  %s", w->name, *job->pass ? job->pass : "queued");

    cli_progress(text, job->layer, job->n_layers);
    mem_free(text);
}

/* Wait for the oldest document in the queue. */
static int settle_oldest(struct put_run *r, struct larder_err *e)
{
    char *name = r->ahead[0].name;
    uint64_t id = r->ahead[0].job;
    struct watch_text w = {name};
    struct larder_job job;
    int rc;

    memmove(&r->ahead[0], &r->ahead[1], (r->n_ahead - 1) * sizeof r->ahead[0]);
    r->n_ahead--;
    rc = larder_watch(r->cli->conn, id, show_progress, &w, -1, &job, e);
    if (!rc)
        tell_finished(r, name, &job);
    else
        larder_fail_in(e, rc, "%s is queued as job %" PRIu64 " and goes on with larderd, but", name,
                       id);
    mem_free(name);
    return rc;
}

static int settle_all(struct put_run *r, struct larder_err *e)
{
    int rc = 0;

    while (!rc && r->n_ahead)
        rc = settle_oldest(r, e);
    return rc;
}

/* ---- one document */

static int send_document(struct put_run *r, const struct larder_document *d, const char *name,
                         struct larder_job *ret, struct larder_err *e)
{
    const struct cli *c = r->cli;
    struct larder_put_options o = {.model = c->opt[OPT_MODEL],
                                   .name = name,
                                   .ns = c->opt[OPT_NAMESPACE],
                                   .policy = c->opt[OPT_POLICY],
                                   .tmpl = c->opt[OPT_TEMPLATE],
                                   .pin = c->opt[OPT_PIN] != NULL};

    if (!strcmp(d->source, "tokens"))
        return larder_put_tokens(c->conn, d->bytes, d->len / sizeof(uint32_t), &o, CLI_WORK_MS, ret,
                                 e);
    return larder_put_text(c->conn, d->bytes, d->len, &o, CLI_WORK_MS, ret, e);
}

/* Did the connection, rather than the document, fail? */
static bool is_fatal(int rc)
{
    return rc == LARDER_ENODAEMON || rc == LARDER_ETIMEOUT || rc == LARDER_EPROTO;
}

static void keep_ahead(struct put_run *r, uint64_t job, const char *name)
{
    r->ahead[r->n_ahead].job = job;
    r->ahead[r->n_ahead].name = cli_text("%s", name);
    r->n_ahead++;
}

/* Queue one document and, with --wait, remember it. Only what ends the run is an error. */
static int put_document(struct put_run *r, const struct larder_document *d, const char *name,
                        struct larder_err *e)
{
    const char *ns = r->cli->opt[OPT_NAMESPACE];
    char *full = cli_text("%s/%s", ns ? ns : "default", name);
    struct larder_job job;
    int rc = 0;

    if (json_object_get(r->names, full)) {
        larder_fail(e, LARDER_EINVAL, "another document of this run has this name already");
        tell_failed(r, full, NULL, e);
        goto out;
    }
    json_object_set_new(r->names, full, json_true());
    if (r->n_ahead == MAX_AHEAD)
        rc = settle_oldest(r, e);
    if (rc)
        goto out;
    rc = send_document(r, d, name, &job, e);
    while (rc == LARDER_ELIMIT && r->n_ahead) { /* make room and try again */
        rc = settle_oldest(r, e);
        if (!rc)
            rc = send_document(r, d, name, &job, e);
    }
    if (rc && !is_fatal(rc)) {
        tell_failed(r, full, NULL, e);
        rc = 0;
    } else if (!rc && (r->cli->opt[OPT_WAIT] || job.state >= LARDER_JOB_DONE)) {
        keep_ahead(r, job.id, full);
    } else if (!rc) {
        tell_finished(r, full, &job);
    }
out:
    mem_free(full);
    return rc;
}

/* A document whose name is made of `path`, unless --name says otherwise. */
static int put_named(struct put_run *r, const struct larder_document *d, const char *path,
                     struct larder_err *e)
{
    char name[NAME_MAX_ENTRY + 1];
    int rc = 0;

    if (r->cli->opt[OPT_NAME])
        return put_document(r, d, r->cli->opt[OPT_NAME], e);
    rc = cli_name_of(path, name, e);
    if (rc) {
        tell_failed(r, path, NULL, e);
        return 0;
    }
    return put_document(r, d, name, e);
}

static int put_text_file(struct put_run *r, const char *path, const char *name,
                         struct larder_err *e)
{
    struct larder_document d = {.source = "text"};
    char *text = NULL;
    size_t len = 0;
    int rc = cli_read_file(path, &text, &len, e);

    if (rc) {
        tell_failed(r, path, NULL, e);
        return 0;
    }
    d.bytes = text;
    d.len = len;
    rc = put_named(r, &d, name, e);
    mem_free(text);
    return rc;
}

/* ---- lines of JSON */

/* The text of a record, and its name: "name", "id" (a string or a number), or stem:line. */
static int read_record(const json_t *j, const char *stem, unsigned long line,
                       struct larder_document *ret, char **ret_name, struct larder_err *e)
{
    const json_t *text = json_object_get(j, "text");
    const json_t *id = json_object_get(j, "name");

    if (!json_is_string(text))
        return larder_fail(e, LARDER_EINVAL, "no \"text\" string in this record");
    *ret = (struct larder_document){json_string_value(text), json_string_length(text), "text"};
    if (!id)
        id = json_object_get(j, "id");
    if (json_is_string(id))
        *ret_name = cli_text("%s", json_string_value(id));
    else if (json_is_integer(id))
        *ret_name = cli_text("%" JSON_INTEGER_FORMAT, json_integer_value(id));
    else
        *ret_name = cli_text("%s:%lu", stem, line);
    return 0;
}

static int put_record(struct put_run *r, const char *line, size_t len, const char *where,
                      unsigned long number, struct larder_err *e)
{
    struct larder_document d;
    char *name = NULL, *label;
    json_t *j = NULL;
    int rc = frame_parse_json(line, len, &j, e);

    if (rc == LARDER_EPROTO)
        rc = larder_fail_in(e, LARDER_EINVAL, "not a JSON object");
    if (!rc)
        rc = read_record(j, cli_basename(where), number, &d, &name, e);
    if (rc) {
        label = cli_text("%s, line %lu", where, number);
        tell_failed(r, label, NULL, e);
        mem_free(label);
        rc = 0;
    } else {
        rc = put_named(r, &d, name, e);
    }
    mem_free(name);
    json_decref(j);
    return rc;
}

static int put_jsonl(struct put_run *r, const char *path, struct larder_err *e)
{
    FILE *f = fopen(path, "re");
    unsigned long number = 0;
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    int rc = 0;

    if (!f) {
        larder_fail(e, LARDER_EIO, "cannot open %s: %s", path, strerror(errno));
        tell_failed(r, path, NULL, e);
        return 0;
    }
    while (!rc && (n = getline(&line, &cap, f)) >= 0) {
        number++;
        if (line[strspn(line, " \t\r\n")] != '\0') /* blank lines are no records */
            rc = put_record(r, line, (size_t)n, path, number, e);
    }
    if (!rc && ferror(f)) {
        larder_fail(e, LARDER_EIO, "cannot read %s: %s", path, strerror(errno));
        tell_failed(r, path, NULL, e);
    }
    free(line);
    fclose(f);
    return rc;
}

/* ---- paths */

static bool is_jsonl(const char *path)
{
    size_t n = strlen(path);

    return n > 6 && !strcmp(path + n - 6, ".jsonl");
}

static int put_file(struct put_run *r, const char *path, const char *name, struct larder_err *e)
{
    return is_jsonl(path) ? put_jsonl(r, path, e) : put_text_file(r, path, name, e);
}

static int not_hidden(const struct dirent *d)
{
    return d->d_name[0] != '.';
}

static int put_dir(struct put_run *r, const char *path, size_t root_len, int depth,
                   struct larder_err *e);

static int put_dir_member(struct put_run *r, const char *path, size_t root_len, int depth,
                          struct larder_err *e)
{
    struct stat st;

    /* Links are not followed: a tree is taken once, and ends. */
    if (lstat(path, &st)) {
        larder_fail(e, LARDER_EIO, "cannot read %s: %s", path, strerror(errno));
        tell_failed(r, path, NULL, e);
        return 0;
    }
    if (S_ISDIR(st.st_mode))
        return put_dir(r, path, root_len, depth + 1, e);
    if (S_ISREG(st.st_mode))
        return put_file(r, path, path + root_len, e);
    return 0;
}

static int put_dir(struct put_run *r, const char *path, size_t root_len, int depth,
                   struct larder_err *e)
{
    struct dirent **list = NULL;
    int n = depth < MAX_DIR_DEPTH ? scandir(path, &list, not_hidden, alphasort) : -1;
    int rc = 0;

    if (n < 0) {
        larder_fail(e, LARDER_EIO, "cannot read the directory: %s",
                    depth < MAX_DIR_DEPTH ? strerror(errno) : "nested too deep");
        tell_failed(r, path, NULL, e);
        return 0;
    }
    for (int i = 0; i < n; i++) {
        char *member = cli_text("%s/%s", path, list[i]->d_name);

        if (!rc)
            rc = put_dir_member(r, member, root_len, depth, e);
        mem_free(member);
        free(list[i]);
    }
    free(list);
    return rc;
}

static int put_path(struct put_run *r, const char *path, struct larder_err *e)
{
    size_t len = strlen(path);
    struct stat st;
    char *root;
    int rc;

    if (!strcmp(path, "-") || stat(path, &st) || !S_ISDIR(st.st_mode))
        return put_file(r, path, cli_basename(path), e);
    while (len > 1 && path[len - 1] == '/')
        len--;
    root = cli_text("%.*s", (int)len, path);
    rc = put_dir(r, root, len + 1, 0, e);
    mem_free(root);
    return rc;
}

static int put_tokens(struct put_run *r, struct larder_err *e)
{
    const char *path = r->cli->opt[OPT_TOKENS_FILE];
    struct larder_document d;
    int rc = cli_document(r->cli, OPT_FILE, OPT_TOKENS_FILE, &d, e);

    if (rc)
        return rc;
    rc = put_named(r, &d, cli_basename(path), e);
    mem_free((void *)(uintptr_t)d.bytes);
    return rc;
}

/* ---- the command */

static bool is_dir(const char *path)
{
    struct stat st;

    return !stat(path, &st) && S_ISDIR(st.st_mode);
}

static int check_options(const struct cli *c, struct larder_err *e)
{
    const char *name = c->opt[OPT_NAME];
    int n = c->n_args + (c->opt[OPT_TOKENS_FILE] != NULL);

    if (!n)
        return cli_usage(e, "put needs FILE, DIR, JSONL or --tokens");
    if (c->opt[OPT_TOKENS_FILE] && c->n_args)
        return cli_usage(e, "--tokens takes the place of a file");
    if (name && (n > 1 || (c->n_args && (is_dir(c->arg[0]) || is_jsonl(c->arg[0])))))
        return cli_usage(e, "--name is for one document");
    if (name && !name_is_entry(name))
        return cli_usage(e,
                         "'%.64s' is no name: use letters, digits, . _ - and, not first, "
                         "/ + @ : , = (a namespace goes with --namespace)",
                         name);
    if (c->opt[OPT_NAMESPACE] && !name_is_namespace(c->opt[OPT_NAMESPACE]))
        return cli_usage(e, "'%.64s' is no namespace: use letters, digits, . _ -",
                         c->opt[OPT_NAMESPACE]);
    for (int i = 0; i < c->n_args; i++)
        if (!strcmp(c->arg[i], "-") && !name)
            return cli_usage(e, "a document from standard input needs --name");
    return 0;
}

static void summarise(const struct put_run *r)
{
    if (r->n_stored + r->n_already + r->n_queued + r->n_failed < 2 || r->cli->opt[OPT_JSON])
        return;
    fprintf(stderr, "%u stored, %u already stored, %u queued, %u failed\n", r->n_stored,
            r->n_already, r->n_queued, r->n_failed);
}

int cli_put(struct cli *c, struct larder_err *e)
{
    struct put_run r = {.cli = c};
    int rc = check_options(c, e);

    if (!rc)
        rc = cli_connect(c, e);
    if (rc)
        return rc;
    r.names = json_object();
    if (!r.names)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    if (c->opt[OPT_TOKENS_FILE])
        rc = put_tokens(&r, e);
    for (int i = 0; !rc && i < c->n_args; i++)
        rc = put_path(&r, c->arg[i], e);
    if (!rc)
        rc = settle_all(&r, e);
    for (unsigned i = 0; i < r.n_ahead; i++)
        mem_free(r.ahead[i].name);
    json_decref(r.names);
    cli_progress_end();
    summarise(&r);
    return rc ? rc : r.n_failed ? CLI_REPORTED : 0;
}
