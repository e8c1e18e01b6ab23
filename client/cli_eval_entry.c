/* cli_eval_entry.c - the entries of one document while `larder eval` measures it.
 *
 * The one idea: what is stored for a measurement is put, waited for and fetched as any client
 * would do it, and is removed afterwards however that ends. So interruptions are not handled
 * where they strike: they wait in a descriptor that is looked at between steps. */
#include "cli_eval_run.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "mem.h"

#define POLL_MS 50 /* between looks at a job */

/* ---- interruption */

int eval_catch_signals(struct eval_run *r, struct larder_err *e)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, &r->before);
    r->stop_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return r->stop_fd < 0 ? larder_fail(e, LARDER_EIO, "signalfd: %s", strerror(errno)) : 0;
}

/* A signal that came is ours: it must not end us while results are still to be printed. */
void eval_release_signals(struct eval_run *r)
{
    struct signalfd_siginfo info;

    while (r->stop_fd >= 0 && read(r->stop_fd, &info, sizeof info) > 0)
        continue;
    if (r->stop_fd >= 0)
        close(r->stop_fd);
    sigprocmask(SIG_SETMASK, &r->before, NULL);
}

static bool is_stopped(const struct eval_run *r, int ms)
{
    struct pollfd p = {r->stop_fd, POLLIN, 0};

    return poll(&p, 1, ms) > 0 && p.revents & POLLIN;
}

int eval_check_stopped(const struct eval_run *r, struct larder_err *e)
{
    return is_stopped(r, 0) ? larder_fail(e, LARDER_ECANCELED, "interrupted") : 0;
}

/* After these a connection is of no use any more. */
static bool is_broken(int rc)
{
    return rc == LARDER_ENODAEMON || rc == LARDER_ETIMEOUT || rc == LARDER_EPROTO;
}

/* Does this end the run, or only fail one document? */
bool eval_is_fatal(int rc)
{
    return is_broken(rc) || rc == LARDER_ECANCELED;
}

/* ---- progress */

void eval_show_step(const struct eval_run *r, size_t step, const char *doing)
{
    size_t each = r->n_policies + 1; /* the questions are a step too */
    char *text = cli_text("document %zu of %zu, %s", r->doc_at + 1, r->set.n_docs, doing);

    cli_progress(text, r->doc_at * each + step, r->set.n_docs * each);
    mem_free(text);
}

static void show_job(const struct eval_run *r, size_t policy, const struct larder_job *job)
{
    const char *pass = *job->pass ? job->pass : "queued";
    char *text = job->n_layers ? cli_text("%.32s: %s, layer %u of %u", r->asked[policy], pass,
                                          job->layer, job->n_layers)
                               : cli_text("%.32s: %s", r->asked[policy], pass);

    eval_show_step(r, policy, text);
    mem_free(text);
}

/* ---- an entry: stored, fetched, and gone again */

/* Wait, and leave no job behind: after an interruption it is canceled first. A busy machine may
 * let larderd wait, so these deadlines are generous: hours of measuring hang on them. */
static int wait_job(struct eval_run *r, size_t policy, struct larder_job *job, struct larder_err *e)
{
    static const struct timespec pause = {0, POLL_MS * 1000000L};
    bool canceled = false;
    int rc = 0;

    while (!rc && job->state < LARDER_JOB_DONE) {
        show_job(r, policy, job);
        if (canceled) {
            nanosleep(&pause, NULL);
        } else if (is_stopped(r, POLL_MS)) {
            canceled = true;
            rc = larder_cancel(r->c->conn, job->id, CLI_WORK_MS, NULL, e);
            rc = rc == LARDER_ENOTFOUND ? 0 : rc; /* it has just finished */
        }
        if (!rc)
            rc = larder_job_get(r->c->conn, job->id, CLI_WORK_MS, job, e);
    }
    return rc;
}

/* The connection broke while the job went on: neither that nor its entry may stay. */
static void abandon_job(struct eval_run *r, struct larder_job *job)
{
    larder_close(r->c->conn);
    r->c->conn = NULL;
    if (cli_connect(r->c, NULL))
        return;
    larder_cancel(r->c->conn, job->id, CLI_SOON_MS, NULL, NULL);
    larder_job_get(r->c->conn, job->id, CLI_SOON_MS, job, NULL);
}

static int finished(const struct eval_run *r, const struct larder_job *job, struct larder_err *e)
{
    if (job->state == LARDER_JOB_FAILED)
        return larder_fail(e, job->code, "%s", job->message);
    if (job->state == LARDER_JOB_CANCELED)
        return is_stopped(r, 0) ? larder_fail(e, LARDER_ECANCELED, "interrupted")
                                : larder_fail(e, LARDER_EWORKER, "its job was canceled");
    return job->has_key ? 0 : larder_fail(e, LARDER_EPROTO, "larderd finished a job without key");
}

static int store(struct eval_run *r, size_t policy, struct eval_entry *en, struct larder_err *e)
{
    struct larder_put_options o = {
        .model = r->model.name, .ns = r->o->ns, .policy = r->asked[policy], .tmpl = r->model.tmpl};
    struct larder_job job;
    int rc = cli_connect(r->c, e);

    if (!rc)
        rc = larder_put_tokens(r->c->conn, r->doc->ids, r->doc->n_ids, &o, CLI_WORK_MS, &job, e);
    if (rc)
        return rc;
    rc = wait_job(r, policy, &job, e);
    if (is_broken(rc))
        abandon_job(r, &job);
    if (!rc)
        rc = finished(r, &job, e);
    if (job.state == LARDER_JOB_DONE && job.has_key) {
        en->made = !job.stored_already;
        for (int i = 0; i < LARDER_KEY_BYTES; i++)
            snprintf(en->key + 2 * i, 3, "%02x", job.key[i]);
    }
    return rc ? rc : eval_check_stopped(r, e);
}

/* What it is stored as; its policy is the canonical spelling with the profile that was used. */
static int show(struct eval_run *r, struct eval_entry *en, struct larder_err *e)
{
    json_t *answer = NULL;
    int rc = cli_ask_daemon(r->c, FRAME_SHOW, json_pack("{s:s}", "key", en->key), CLI_WORK_MS,
                            &answer, e);

    if (rc)
        return rc;
    en->shown = json_incref(json_object_get(answer, "entry"));
    json_decref(answer);
    if (!*cli_str(en->shown, "policy"))
        return larder_fail(e, LARDER_EPROTO, "larderd described an entry without policy");
    json_array_set(r->policy, en->policy, json_object_get(en->shown, "policy"));
    return 0;
}

static int fetch(struct eval_run *r, struct eval_entry *en, struct larder_err *e)
{
    static const struct larder_fetch_options as_stored = {.packed = 1}; /* the engine reads both */
    struct timespec t0;
    int rc;

    clock_gettime(CLOCK_MONOTONIC, &t0);
    rc = larder_fetch_with(r->c->conn, en->key, &as_stored, CLI_WORK_MS, &en->lease, e);
    en->fetch_ms = cli_ms_since(&t0);
    return rc;
}

/* What somebody has named or pinned meanwhile is not ours any more. */
static int remove_entry(struct eval_run *r, const char *key, struct larder_err *e)
{
    struct larder_entry now;
    int rc = cli_connect(r->c, e);

    if (!rc)
        rc = larder_lookup(r->c->conn, key, CLI_SOON_MS, &now, e);
    if (!rc && !*now.name && !now.pinned)
        rc = larder_rm(r->c->conn, key, CLI_SOON_MS, NULL, e);
    return rc == LARDER_ENOTFOUND ? 0 : rc;
}

static void drop_entry(struct eval_run *r, struct eval_entry *en)
{
    struct larder_err why = {0, ""};
    int rc = 0;

    if (en->lease.fd >= 0)
        larder_release(r->c->conn, &en->lease, CLI_SOON_MS, NULL);
    if (en->made && !r->o->keep)
        rc = remove_entry(r, en->key, &why);
    if (is_broken(rc)) { /* what broke the connection may be why we are here */
        larder_close(r->c->conn);
        r->c->conn = NULL;
        rc = remove_entry(r, en->key, &why);
    }
    if (rc) {
        larder_fail_in(&why, rc, "entry %s stays stored", en->key);
        cli_print_error(NULL, &why);
    }
    json_decref(en->shown);
    *en = (struct eval_entry){.lease.fd = -1};
}

int eval_add_entry(struct eval_run *r, size_t policy, struct larder_err *e)
{
    struct eval_entry *en = &r->entry[r->n_entries++];
    int rc;

    *en = (struct eval_entry){.policy = policy, .lease.fd = -1};
    rc = store(r, policy, en, e);
    if (!rc)
        rc = show(r, en, e);
    if (!rc)
        rc = fetch(r, en, e);
    if (rc)
        drop_entry(r, &r->entry[--r->n_entries]);
    return rc;
}

void eval_drop_entries(struct eval_run *r)
{
    while (r->n_entries)
        drop_entry(r, &r->entry[--r->n_entries]);
}
