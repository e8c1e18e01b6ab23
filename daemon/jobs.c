/* jobs.c - the durable queue: a job is on disk before PUT is answered, and leaves when it ends.
 *
 * The one idea: jobs that would compute the same thing are one job with several names and
 * several watchers; after a restart the queue is read back and goes on. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon.h"
#include "mem.h"
#include "sha256.h"

#define POLICY_MAX 256u

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- life of the struct */

static void job_free(struct job *j)
{
    for (uint32_t i = 0; i < j->n_names; i++)
        mem_free(j->name[i]);
    mem_free(j->name);
    mem_free(j->ns);
    mem_free(j->model);
    mem_free(j->policy);
    mem_free(j->template);
    mem_free(j->doc);
    mem_free(j->canonical);
    mem_free(j->text);
    mem_free(j->template_used);
    mem_free(j->ids);
    mem_free(j);
}

static int add_name(struct job *j, const char *name, struct larder_err *e)
{
    char **grown;

    for (uint32_t i = 0; i < j->n_names; i++)
        if (!strcmp(j->name[i], name))
            return 0;
    grown = mem_grow(j->name, j->n_names + 1, sizeof *grown);
    if (!grown)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a job");
    j->name = grown;
    j->name[j->n_names] = mem_strdup(name);
    if (!j->name[j->n_names])
        return larder_fail(e, LARDER_ENOMEM, "no memory for a job");
    j->n_names++;
    return 0;
}

static int job_new(struct daemon *d, struct job **ret, const char *ns, const char *model,
                   const char *policy, const char *tmpl, struct larder_err *e)
{
    struct job *j = mem_zalloc(1, sizeof *j);

    if (j) {
        j->d = d;
        j->ns = mem_strdup(ns);
        j->model = mem_strdup(model);
        j->policy = mem_strdup(policy);
        j->template = tmpl ? mem_strdup(tmpl) : NULL;
        j->created_ms = now_ms();
    }
    if (!j || !j->ns || !j->model || !j->policy || (tmpl && !j->template)) {
        if (j)
            job_free(j);
        return larder_fail(e, LARDER_ENOMEM, "no memory for a job");
    }
    *ret = j;
    return 0;
}

struct job *job_find(struct daemon *d, uint64_t id)
{
    for (struct job *j = d->jobs; j; j = j->next)
        if (j->id == id)
            return j;
    for (struct job *j = d->history; j; j = j->next)
        if (j->id == id)
            return j;
    return NULL;
}

static void enlist(struct daemon *d, struct job *j)
{
    struct job **at = &d->jobs;

    while (*at && (*at)->id < j->id)
        at = &(*at)->next;
    j->next = *at;
    *at = j;
    d->n_jobs++;
}

/* ---- what a job looks like */

static const char *const state_name[] = {"queued", "running", "done", "failed", "canceled"};

static void set(json_t *o, const char *key, json_t *v)
{
    json_object_set_new(o, key, v);
}

json_t *job_object(const struct job *j)
{
    char full[NAME_MAX_NS + NAME_MAX_ENTRY + 2], hex[2 * SHA256_LEN + 1];
    json_t *o = json_object();

    set(o, "job", json_integer((json_int_t)j->id));
    set(o, "state", json_string(state_name[j->state]));
    set(o, "model", json_string(j->model));
    set(o, "policy", json_string(j->canonical ? j->canonical : j->policy));
    if (j->n_names) {
        snprintf(full, sizeof full, "%s/%s", j->ns, j->name[j->n_names - 1]);
        set(o, "name", json_string(full));
    }
    if (*j->pass)
        set(o, "pass", json_string(j->pass));
    if (j->n_layers) {
        set(o, "layer", json_integer(j->layer));
        set(o, "layers", json_integer(j->n_layers));
    }
    if (j->n_ctx)
        set(o, "n_ctx", json_integer(j->n_ctx));
    if (j->has_key) {
        sha256_hex(j->key, hex);
        set(o, "key", json_string(hex));
    }
    set(o, "stored_already", json_boolean(j->stored_already));
    if (j->prefill_ms)
        set(o, "prefill_ms", json_integer((json_int_t)j->prefill_ms));
    set(o, "elapsed_ms",
        json_integer((json_int_t)((j->ended_ms ? j->ended_ms : now_ms()) - j->created_ms)));
    if (j->state == JOB_FAILED) {
        set(o, "code", json_integer(j->why.code));
        set(o, "status", json_string(larder_status_name(j->why.code)));
        set(o, "message", json_string(j->why.msg));
    }
    return o;
}

json_t *jobs_status(const struct daemon *d)
{
    uint64_t running = 0;

    for (const struct job *j = d->jobs; j; j = j->next)
        running += j->state == JOB_RUNNING;
    return json_pack("{sI sI sI sI}", "queued", (json_int_t)(d->n_jobs - running), "running",
                     (json_int_t)running, "done", (json_int_t)d->n_done, "failed",
                     (json_int_t)d->n_failed);
}

/* ---- watching */

void job_changed(struct job *j)
{
    for (struct watcher *w = j->watchers, *next; w; w = next) {
        next = w->next; /* an event may end the client and with it the watcher */
        request_event(w->r, job_object(j));
    }
}

static void answer_watchers(struct job *j)
{
    struct watcher *w;

    while ((w = j->watchers)) {
        j->watchers = w->next;
        request_ok(w->r, job_object(j), -1);
        mem_free(w);
    }
}

static int watch(struct job *j, struct request *r, struct larder_err *e)
{
    struct watcher *w = mem_alloc(1, sizeof *w);

    if (!w)
        return larder_fail(e, LARDER_ENOMEM, "no memory to watch a job");
    *w = (struct watcher){r, j->watchers};
    j->watchers = w;
    return 0;
}

void job_forget_request(struct daemon *d, struct request *r)
{
    for (struct job *j = d->jobs; j; j = j->next)
        for (struct watcher **at = &j->watchers; *at; at = &(*at)->next) {
            struct watcher *w = *at;

            if (w->r != r)
                continue;
            *at = w->next;
            mem_free(w);
            request_ok(r, NULL, -1);
            return;
        }
}

/* ---- on disk */

static char *job_text(const struct job *j)
{
    json_t *names = json_array(), *o;
    char *text;

    for (uint32_t i = 0; i < j->n_names; i++)
        json_array_append_new(names, json_string(j->name[i]));
    o = json_pack("{ss ss ss ss* so sb sb sI}", "ns", j->ns, "model", j->model, "policy", j->policy,
                  "template", j->template, "names", names, "tokens", j->tokens, "pin", j->pin,
                  "created_ms", (json_int_t)j->created_ms);
    text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    return text;
}

static struct job *job_from_text(struct daemon *d, uint64_t id, const char *text)
{
    json_t *o = json_loads(text, 0, NULL), *names, *v;
    const char *ns = NULL, *model = NULL, *policy = NULL, *tmpl = NULL;
    struct job *j = NULL;
    int tokens = 0, pin = 0;
    json_int_t created = 0;
    size_t i;

    if (json_unpack(o, "{ss ss ss s?s so sb sb sI}", "ns", &ns, "model", &model, "policy", &policy,
                    "template", &tmpl, "names", &names, "tokens", &tokens, "pin", &pin,
                    "created_ms", &created) ||
        job_new(d, &j, ns, model, policy, tmpl, NULL)) {
        json_decref(o);
        return NULL;
    }
    j->id = id;
    j->tokens = tokens;
    j->pin = pin;
    j->created_ms = (uint64_t)created;
    json_array_foreach (names, i, v)
        if (json_is_string(v))
            add_name(j, json_string_value(v), NULL);
    json_decref(o);
    return j;
}

/* Write the job (and, the first time, its document), then answer. */
struct save {
    struct task task;
    struct job *j;
    struct request *r; /* NULL: nobody waits */
    char *text;
    void *doc; /* borrowed from the job, which cannot end before */
    uint64_t doc_len;
    struct larder_err e;
    int rc;
};

static void save_run(struct task *t)
{
    struct save *s = (struct save *)t;

    s->rc = store_job_put(s->j->d->store, s->j->id, s->text, s->doc, s->doc_len, &s->e);
}

static bool wants_wait(const struct request *r)
{
    return json_is_true(json_object_get(r->body, "wait"));
}

static void answer_put(struct job *j, struct request *r)
{
    struct larder_err e;

    if (!r)
        return;
    if (!wants_wait(r) || j->state > JOB_RUNNING)
        request_ok(r, job_object(j), -1);
    else if (!r->client)
        request_ok(r, NULL, -1);
    else if (watch(j, r, &e))
        request_fail(r, &e);
}

static void save_done(struct task *t)
{
    struct save *s = (struct save *)t;
    struct job *j = s->j;

    if (s->rc) {
        if (s->r)
            request_fail(s->r, &s->e);
        if (s->doc)
            job_end(j, JOB_FAILED, &s->e);
    } else {
        answer_put(j, s->r);
    }
    free(s->text);
    mem_free(s);
    job_unbusy(j);
}

static int job_save(struct job *j, struct request *r, bool with_doc, struct larder_err *e)
{
    struct save *s = mem_zalloc(1, sizeof *s);

    if (s)
        s->text = job_text(j);
    if (!s || !s->text) {
        mem_free(s);
        return larder_fail(e, LARDER_ENOMEM, "no memory for a job");
    }
    s->task = (struct task){save_run, save_done, NULL};
    s->j = j;
    s->r = r;
    s->doc = with_doc ? j->doc : NULL;
    s->doc_len = j->doc_len;
    j->busy++;
    task_run(j->d->writer, &s->task);
    return 0;
}

static int erase(struct daemon *d, void *arg, struct larder_err *e)
{
    uint64_t id;

    memcpy(&id, arg, sizeof id);
    return store_job_delete(d->store, id, e);
}

/* ---- the end of a job */

static void to_history(struct job *j)
{
    struct daemon *d = j->d;
    struct job **at = &d->jobs, *last;

    while (*at && *at != j)
        at = &(*at)->next;
    if (*at) {
        *at = j->next;
        d->n_jobs--;
    }
    j->next = d->history;
    d->history = j;
    if (++d->n_history <= HISTORY)
        return;
    for (at = &d->history; (*at)->next;)
        at = &(*at)->next;
    last = *at;
    *at = NULL;
    d->n_history--;
    job_free(last);
}

/* Once no task points at it any more. */
static void job_retire(struct job *j)
{
    mem_free(j->doc);
    mem_free(j->text);
    mem_free(j->ids);
    j->doc = NULL;
    j->text = NULL;
    j->ids = NULL;
    to_history(j);
}

void job_unbusy(struct job *j)
{
    struct daemon *d = j->d;

    if (--j->busy)
        return;
    if (j->ended)
        job_retire(j);
    jobs_start(d); /* it, or the next one, may have waited for this */
}

void job_end(struct job *j, enum job_state state, const struct larder_err *why)
{
    struct daemon *d = j->d;

    if (j->ended)
        return;
    j->ended = true;
    j->state = state;
    j->ended_ms = now_ms();
    if (why)
        j->why = *why;
    d->n_done += state == JOB_DONE;
    d->n_failed += state == JOB_FAILED;
    if (state == JOB_FAILED)
        log_line(LOG_LEVEL_WARNING, "job %llu failed: %s", (unsigned long long)j->id, j->why.msg);
    else
        log_line(LOG_LEVEL_INFO, "job %llu %s%s", (unsigned long long)j->id, state_name[state],
                 j->stored_already ? ", was stored already" : "");
    if (!d->stopping)
        write_quietly(d, erase, &j->id, sizeof j->id, "job queue");
    answer_watchers(j);
    if (!j->busy)
        job_retire(j);
}

/* ---- names of a finished entry */

struct dress {
    struct task task;
    struct job *j;
    uint8_t source[32];
    bool has_source;
    struct larder_err e;
    int rc;
};

static void dress_run(struct task *t)
{
    struct dress *x = (struct dress *)t;
    struct job *j = x->j;
    struct store *s = j->d->store;

    for (uint32_t i = 0; !x->rc && i < j->n_names; i++)
        x->rc = store_set_name(s, j->key, j->ns, j->name[i], &x->e);
    if (!x->rc && j->pin)
        x->rc = store_pin(s, j->key, true, &x->e);
    if (!x->rc && x->has_source)
        x->rc = store_set_source(s, x->source, j->key, &x->e);
}

static void dress_done(struct task *t)
{
    struct dress *x = (struct dress *)t;
    struct job *j = x->j;

    job_end(j, x->rc ? JOB_FAILED : JOB_DONE, x->rc ? &x->e : NULL);
    mem_free(x);
    job_unbusy(j);
}

/* Also after a commit: further names, pin and source are set in the same way. */
void job_already_stored(struct job *j)
{
    struct dress *x = mem_zalloc(1, sizeof *x);
    struct model *m = model_for(j->d, j->model, NULL);
    struct larder_err e;

    if (!x) {
        larder_fail(&e, LARDER_ENOMEM, "no memory for a job");
        job_end(j, JOB_FAILED, &e);
        return;
    }
    x->task = (struct task){dress_run, dress_done, NULL};
    x->j = j;
    if (m && m->known) {
        job_source_digest(j, m, x->source);
        x->has_source = true;
    }
    j->busy++;
    task_run(j->d->writer, &x->task);
}

static void digest_field(struct sha256 *h, const void *p, size_t n)
{
    uint8_t len[8];

    for (int i = 0; i < 8; i++)
        len[i] = (uint8_t)((uint64_t)n >> (8 * i));
    sha256_add(h, len, sizeof len);
    if (n)
        sha256_add(h, p, n);
}

void job_source_digest(const struct job *j, const struct model *m, uint8_t ret[32])
{
    struct sha256 *h = sha256_new();
    const char *tmpl = j->template ? j->template : m->template;

    memset(ret, 0, 32);
    if (!h)
        return;
    digest_field(h, j->ns, strlen(j->ns));
    digest_field(h, m->fp, 32);
    digest_field(h, m->tokenizer_fp, 32);
    digest_field(h, m->template_fp, 32);
    digest_field(h, tmpl, strlen(tmpl));
    digest_field(h, j->policy, strlen(j->policy));
    digest_field(h, &j->tokens, sizeof j->tokens);
    digest_field(h, j->doc_digest, 32);
    if (*j->profile) /* the same words mean something else with another one */
        digest_field(h, j->profile, PROFILE_ID_LEN);
    sha256_get(h, ret);
    sha256_free(h);
}

/* Recognise a document that was stored before, without a worker. */
static bool recognise(struct job *j)
{
    struct model *m = model_for(j->d, j->model, NULL);
    struct store_entry *en;
    uint8_t digest[32];
    bool good;

    if (!m || !m->known)
        return false;
    memcpy(j->profile, m->profile_id, sizeof j->profile);
    job_source_digest(j, m, digest);
    if (store_find_source(j->d->store, digest, j->key, NULL) ||
        store_entry_open(j->d->store, j->key, &en, NULL))
        return false;
    good = !store_entry_info(en)->damaged;
    j->n_ctx = store_entry_info(en)->n_ctx;
    store_entry_close(en);
    j->has_key = j->stored_already = good;
    return good;
}

/* ---- PUT */

struct put {
    const char *model, *name, *ns, *policy, *tmpl;
    bool pin, wait, tokens;
    void *doc;
    uint64_t len;
};

static int read_put(struct request *r, struct put *p, struct larder_err *e)
{
    int rc = field_str(r->body, "model", FIELD_OPTIONAL, NAME_MAX_NS, &p->model, e);

    if (!rc)
        rc = field_str(r->body, "name", FIELD_OPTIONAL, NAME_MAX_ENTRY, &p->name, e);
    if (!rc)
        rc = field_str(r->body, "namespace", FIELD_OPTIONAL, NAME_MAX_NS, &p->ns, e);
    if (!rc)
        rc = field_str(r->body, "policy", FIELD_OPTIONAL, POLICY_MAX, &p->policy, e);
    if (!rc)
        rc = field_str(r->body, "template", FIELD_OPTIONAL, KV_MAX_TEMPLATE - 1, &p->tmpl, e);
    if (!rc)
        rc = field_bool(r->body, "pin", FIELD_OPTIONAL, &p->pin, e);
    if (!rc)
        rc = field_bool(r->body, "wait", FIELD_OPTIONAL, &p->wait, e);
    if (!rc && p->name && !name_is_entry(p->name))
        rc = larder_fail(
            e, LARDER_EINVAL,
            "'%.64s' is no name: use letters, digits, . _ - and, not first, / + @ : , =", p->name);
    if (!rc && !name_is_namespace(p->ns))
        rc = larder_fail(e, LARDER_EINVAL, "'%.64s' is no namespace: use letters, digits, . _ -",
                         p->ns);
    if (!rc && !request_may_use(r, p->ns))
        rc = larder_fail(e, LARDER_ENOTFOUND, "no namespace '%.64s' that you may use", p->ns);
    return rc ? rc : read_document(r, &p->tokens, &p->doc, &p->len, e);
}

static bool same_work(const struct job *a, const struct job *b)
{
    return !a->ended && !a->cancel && a->tokens == b->tokens && !strcmp(a->ns, b->ns) &&
           !strcmp(a->model, b->model) && !strcmp(a->policy, b->policy) &&
           !strcmp(a->template ? a->template : "", b->template ? b->template : "") &&
           a->doc_len == b->doc_len && !memcmp(a->doc_digest, b->doc_digest, 32);
}

/* Join an equal job: its names and watchers grow. */
static bool attach(struct job *fresh, struct request *r, struct larder_err *e, int *rc)
{
    for (struct job *j = fresh->d->jobs; j; j = j->next) {
        if (!same_work(j, fresh))
            continue;
        *rc = fresh->n_names ? add_name(j, fresh->name[0], e) : 0;
        j->pin |= fresh->pin;
        if (!*rc)
            *rc = job_save(j, r, false, e);
        return true;
    }
    return false;
}

void handle_put(struct request *r)
{
    struct put p = {.ns = "default"};
    struct daemon *d = r->d;
    struct larder_err e;
    struct model *m = NULL;
    struct job *j = NULL;
    bool joined = false;
    int rc = read_put(r, &p, &e);

    if (!rc && !(m = model_for(d, p.model, &e)))
        rc = e.code;
    if (!rc && d->n_jobs >= d->conf.max_jobs)
        rc = larder_fail(&e, LARDER_ELIMIT, "%llu jobs are waiting; try again later",
                         (unsigned long long)d->n_jobs);
    if (!rc)
        rc = job_new(d, &j, p.ns, m->conf->name, p.policy ? p.policy : m->conf->policy,
                     p.tmpl                              ? p.tmpl
                     : strcmp(m->conf->template, "auto") ? m->conf->template
                                                         : NULL,
                     &e);
    if (!rc && p.name)
        rc = add_name(j, p.name, &e);
    if (!rc) {
        j->tokens = p.tokens;
        j->pin = p.pin;
        j->doc_len = p.len;
        sha256_of(p.doc, p.len, j->doc_digest);
        joined = attach(j, r, &e, &rc);
    }
    if (!rc && !joined) {
        j->doc = p.doc;
        p.doc = NULL;
        j->id = d->next_job++;
        enlist(d, j);
        if (recognise(j)) {
            job_already_stored(j);
            answer_put(j, r);
            return;
        }
        rc = job_save(j, r, true, &e);
        if (!rc)
            return;
        job_end(j, JOB_FAILED, &e);
        j = NULL;
    }
    mem_free(p.doc);
    if (j)
        job_free(j);
    if (rc)
        request_fail(r, &e);
}

/* ---- JOB, WATCH, CANCEL, JOBS */

static void cancel(struct job *j)
{
    if (j->ended)
        return;
    j->cancel = true;
    if (j->worker)
        worker_cancel(j->worker);
    else if (j->state == JOB_QUEUED)
        job_end(j, JOB_CANCELED, NULL);
}

void handle_job(struct request *r)
{
    struct larder_err e;
    struct job *j = NULL;
    uint64_t id = 0;
    int rc = field_u64(r->body, "job", FIELD_REQUIRED, UINT64_MAX >> 11, &id, &e);

    if (!rc) {
        j = job_find(r->d, id);
        if (!j || !request_may_use(r, j->ns))
            rc = larder_fail(&e, LARDER_ENOTFOUND,
                             "no job %llu; 'larder jobs' lists the recent ones",
                             (unsigned long long)id);
    }
    if (!rc && r->type == FRAME_WATCH && !j->ended) {
        request_event(r, job_object(j));
        if (!r->client)
            request_ok(r, NULL, -1);
        else if (watch(j, r, &e))
            request_fail(r, &e);
        return;
    }
    if (rc) {
        request_fail(r, &e);
        return;
    }
    if (r->type == FRAME_CANCEL)
        cancel(j);
    request_ok(r, job_object(j), -1);
}

void handle_jobs(struct request *r)
{
    json_t *jobs = json_array();

    for (int pass = 0; pass < 2; pass++)
        for (struct job *j = pass ? r->d->history : r->d->jobs; j; j = j->next)
            if (request_may_use(r, j->ns))
                json_array_append_new(jobs, job_object(j));
    request_ok(r, json_pack("{so}", "jobs", jobs), -1);
}

/* ---- starting and stopping */

void jobs_start(struct daemon *d)
{
    if (d->stopping)
        return;
    for (struct job *j = d->jobs, *next; j; j = next) {
        next = j->next;
        /* a job whose record is still being written is not durable yet */
        if (j->state == JOB_QUEUED && !j->ended && !j->busy)
            worker_take(d, j);
    }
}

static bool load_one(void *arg, uint64_t id, const char *text)
{
    struct daemon *d = arg;
    struct job *j = job_from_text(d, id, text);

    if (!j) {
        log_line(LOG_LEVEL_WARNING, "job %llu in the queue cannot be read and is left alone",
                 (unsigned long long)id);
    } else {
        enlist(d, j);
    }
    if (id >= d->next_job)
        d->next_job = id + 1;
    return true;
}

int jobs_load(struct daemon *d, struct larder_err *e)
{
    int rc;

    d->next_job = 1;
    rc = store_job_list(d->store, load_one, d, e);
    for (struct job *j = d->jobs; !rc && j; j = j->next) {
        rc = store_job_get(d->store, j->id, NULL, &j->doc, &j->doc_len, e);
        if (!rc)
            sha256_of(j->doc, j->doc_len, j->doc_digest);
    }
    if (!rc && d->jobs)
        log_line(LOG_LEVEL_INFO, "%u jobs go on from before the restart", d->n_jobs);
    return rc;
}

void jobs_free(struct daemon *d)
{
    for (int pass = 0; pass < 2; pass++)
        for (struct job *j = pass ? d->history : d->jobs, *next; j; j = next) {
            next = j->next;
            job_free(j);
        }
    d->jobs = d->history = NULL;
}
