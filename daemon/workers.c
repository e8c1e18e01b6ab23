/* workers.c - prefill processes: started, fed one job at a time, watched, replaced.
 *
 * The one idea: a worker is a state machine driven by its frames. Any frame that does not
 * fit the state, and any field that does not fit the model, ends the worker; its job is
 * tried once more with a new one. Serving never depends on a worker. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bytes.h"
#include "daemon.h"
#include "mem.h"
#include "memfile.h"
#include "seqpacket.h"
#include "sha256.h"

#define WORKER_FD 3
#define MAX_TRIES 2u
#define MAX_QUEUED_LAYERS 4u
#define PROBE_TIMEOUT_S 120
#define MAX_TEXT (1ull << 32)
#define LINE_MAX_ERR 400

extern char **environ;

enum worker_state {
    STARTING,   /* before W_HELLO */
    IDLE,
    PREPARING,  /* W_JOB sent */
    COMPUTING,  /* W_GO sent */
    COMMITTING, /* W_DONE came, the store writes */
    DRAINING,   /* canceled: waiting for the worker to notice */
};

struct worker {
    struct daemon *d;
    struct worker *next;
    pid_t pid; /* 0: not our child */
    int sock, err_fd;
    struct event *read_ev, *err_ev, *timer;
    enum worker_state state;
    bool paused; /* not reading: the store is behind */
    struct model *starting; /* the model it was started for */
    struct job *job;
    struct model *model; /* of the job */
    struct entry_writer *writer;
    uint32_t next_layer;
    char last_line[LINE_MAX_ERR + 1]; /* of its stderr */
    size_t line_len;
    char line[LINE_MAX_ERR + 1];
};

static void worker_end(struct worker *w, const char *why);

/* ---- small things */

static void set_timer(struct worker *w, uint64_t seconds)
{
    struct timeval t = {(time_t)seconds, 0};

    evtimer_add(w->timer, &t);
}

static int send_frame(struct worker *w, enum frame_type type, json_t *body, int fd, struct larder_err *e)
{
    void *packet = NULL;
    size_t len;
    int rc = body ? frame_encode(type, 1, body, &packet, &len, e) : larder_fail(e, LARDER_ENOMEM, "no memory for a frame");

    if (!rc)
        rc = seqpacket_send(w->sock, packet, len, fd, e);
    mem_free(packet);
    json_decref(body);
    return rc;
}

static json_t *job_body(const struct worker *w)
{
    return json_pack("{sI}", "job", (json_int_t)w->job->id);
}

static void go_idle(struct worker *w)
{
    w->state = IDLE;
    w->job = NULL;
    w->model = NULL;
    w->next_layer = 0;
    set_timer(w, w->d->conf.worker_idle_s);
}

/* Take the job away from the worker. */
static struct job *release_job(struct worker *w)
{
    struct job *j = w->job;

    entry_writer_abort(w->writer);
    w->writer = NULL;
    if (j)
        j->worker = NULL;
    w->job = NULL;
    return j;
}

/* ---- what is known of a model */

static void model_setting(const struct model *m, char *out, size_t cap)
{
    snprintf(out, cap, "model/%.480s", m->conf->path);
}

struct remember {
    char key[512];
    char value[2048];
};

static int remember_run(struct daemon *d, void *arg, struct larder_err *e)
{
    const struct remember *r = arg;

    return store_setting_put(d->store, r->key, r->value, e);
}

static void remember_model(struct daemon *d, const struct model *m)
{
    struct remember r;
    char fp[65], tok[65], tmpl[65];

    model_setting(m, r.key, sizeof r.key);
    sha256_hex(m->fp, fp);
    sha256_hex(m->tokenizer_fp, tok);
    sha256_hex(m->template_fp, tmpl);
    snprintf(r.value, sizeof r.value,
             "{\"dev\":%llu,\"ino\":%llu,\"size\":%llu,\"mtime_ns\":%llu,\"fingerprint\":\"%s\","
             "\"tokenizer_fingerprint\":\"%s\",\"template\":\"%s\",\"template_fingerprint\":\"%s\"}",
             (unsigned long long)m->dev, (unsigned long long)m->ino, (unsigned long long)m->size,
             (unsigned long long)m->mtime_ns, fp, tok, m->template, tmpl);
    write_quietly(d, remember_run, &r, sizeof r, "model fingerprint");
}

static bool same_file(const struct model *m)
{
    struct stat st;

    return !stat(m->conf->path, &st) && st.st_dev == m->dev && st.st_ino == m->ino &&
           (uint64_t)st.st_size == m->size &&
           (uint64_t)st.st_mtim.tv_sec * 1000000000u + (uint64_t)st.st_mtim.tv_nsec == m->mtime_ns;
}

static void recall_model(struct daemon *d, struct model *m)
{
    char key[512], *text = NULL;
    json_t *o = NULL;
    bool present;

    model_setting(m, key, sizeof key);
    if (store_setting_get(d->store, key, &text, NULL))
        return;
    o = json_loads(text, 0, NULL);
    mem_free(text);
    /* only the fingerprint is taken: everything else comes from the worker's own words */
    if (o && !field_u64(o, "dev", FIELD_REQUIRED, UINT64_MAX >> 11, &m->dev, NULL) &&
        !field_u64(o, "ino", FIELD_REQUIRED, UINT64_MAX >> 11, &m->ino, NULL) &&
        !field_u64(o, "size", FIELD_REQUIRED, UINT64_MAX >> 11, &m->size, NULL) &&
        json_is_integer(json_object_get(o, "mtime_ns")) &&
        !field_hex32(o, "fingerprint", FIELD_REQUIRED, m->fp, &present, NULL)) {
        m->mtime_ns = (uint64_t)json_integer_value(json_object_get(o, "mtime_ns"));
        if (!same_file(m))
            m->size = 0;
    } else {
        m->size = 0;
    }
    json_decref(o);
}

void models_recall(struct daemon *d)
{
    for (uint32_t i = 0; i < d->n_models; i++)
        recall_model(d, &d->model[i]);
}

void models_configure(struct daemon *d)
{
    memset(d->model, 0, sizeof d->model);
    d->n_models = d->conf.n_models;
    for (uint32_t i = 0; i < d->n_models; i++)
        d->model[i].conf = &d->conf.model[i];
}

/* ---- W_HELLO */

static int copy_field(const json_t *o, const char *key, char *out, size_t cap, struct larder_err *e)
{
    const char *s = NULL;
    int rc = field_str(o, key, FIELD_REQUIRED, cap - 1, &s, e);

    if (!rc)
        strcpy(out, s);
    return rc;
}

static int hello_numbers(const json_t *o, struct model *m, struct larder_err *e)
{
    const struct {
        const char *key;
        uint32_t *to, max;
    } u32[] = {{"n_layers", &m->geom.n_layers, KV_MAX_LAYERS}, {"n_heads", &m->geom.n_heads, KV_MAX_HEADS},
               {"n_kv_heads", &m->geom.n_kv_heads, KV_MAX_HEADS}, {"head_dim", &m->geom.head_dim, KV_MAX_HEAD_DIM},
               {"n_vocab", &m->n_vocab, KV_MAX_VOCAB}, {"n_positions", &m->n_positions, KV_MAX_CTX}};
    const struct {
        const char *key;
        uint64_t *to;
    } id[] = {{"dev", &m->dev}, {"ino", &m->ino}, {"size", &m->size}, {"mtime_ns", &m->mtime_ns}};
    int rc = 0;

    for (size_t i = 0; !rc && i < sizeof u32 / sizeof u32[0]; i++)
        rc = field_u32(o, u32[i].key, FIELD_REQUIRED, u32[i].max, u32[i].to, e);
    for (size_t i = 0; !rc && i < sizeof id / sizeof id[0]; i++) {
        const json_t *v = json_object_get(o, id[i].key);

        if (!json_is_integer(v) || json_integer_value(v) < 0)
            return larder_fail(e, LARDER_EPROTO, "field '%s' is not a count", id[i].key);
        *id[i].to = (uint64_t)json_integer_value(v);
    }
    return rc ? rc : kv_geom_check(&m->geom, e);
}

static int hello_model(struct worker *w, const json_t *hello, const json_t *o, struct larder_err *e)
{
    struct model *m, fresh;
    const char *name = NULL;
    bool present;
    int rc = field_str(o, "name", FIELD_REQUIRED, NAME_MAX_NS, &name, e);

    if (rc)
        return rc;
    m = model_for(w->d, name, e);
    if (!m)
        return LARDER_EUNKNOWNMODEL;
    if (m->worker && m->worker != w)
        return larder_fail(e, LARDER_EBUSY, "model %s has a worker already", name);
    fresh = *m;
    rc = hello_numbers(o, &fresh, e);
    if (!rc)
        rc = field_hex32(o, "fingerprint", FIELD_REQUIRED, fresh.fp, &present, e);
    if (!rc)
        rc = field_hex32(o, "tokenizer_fingerprint", FIELD_REQUIRED, fresh.tokenizer_fp, &present, e);
    if (!rc)
        rc = field_hex32(o, "template_fingerprint", FIELD_REQUIRED, fresh.template_fp, &present, e);
    if (!rc)
        rc = copy_field(o, "template", fresh.template, sizeof fresh.template, e);
    if (!rc)
        rc = copy_field(hello, "backend", fresh.backend, sizeof fresh.backend, e);
    if (!rc)
        rc = copy_field(hello, "isa", fresh.isa, sizeof fresh.isa, e);
    if (!rc)
        rc = copy_field(hello, "dtype", fresh.dtype, sizeof fresh.dtype, e);
    if (rc)
        return rc;
    fresh.known = true;
    fresh.refused = false;
    fresh.worker = w;
    *m = fresh;
    remember_model(w->d, m);
    return 0;
}

static int on_hello(struct worker *w, const json_t *body, struct larder_err *e)
{
    const json_t *models = NULL;
    int rc = field_array(body, "models", FIELD_REQUIRED, CONFIG_MAX_MODELS, &models, e);

    for (size_t i = 0; !rc && i < json_array_size(models); i++)
        rc = hello_model(w, body, json_array_get(models, i), e);
    if (rc)
        return rc;
    if (w->starting && w->starting->worker == w)
        log_line(LOG_LEVEL_INFO, "model %s: worker ready (%s, %s, %s)", w->starting->conf->name,
                 w->starting->backend, w->starting->dtype, w->starting->isa);
    w->starting = NULL;
    go_idle(w);
    return 0;
}

/* ---- one job */

static int start_job(struct worker *w, struct job *j, struct larder_err *e)
{
    json_t *body = json_pack("{sI ss ss ss sI ss*}", "job", (json_int_t)j->id, "model", j->model, "policy", j->policy,
                             "source", j->tokens ? "tokens" : "text", "bytes", (json_int_t)j->doc_len,
                             "template", j->template);
    int fd = -1, rc = memfile_from("larder-document", j->doc, j->doc_len, &fd, e);

    if (rc) {
        json_decref(body);
        return rc;
    }
    w->job = j;
    w->model = model_for(w->d, j->model, e);
    j->worker = w;
    j->state = JOB_RUNNING;
    j->tries++;
    snprintf(j->pass, sizeof j->pass, "tokenize");
    j->layer = j->n_layers = 0;
    w->state = PREPARING;
    set_timer(w, w->d->conf.worker_timeout_s);
    rc = send_frame(w, FRAME_W_JOB, body, fd, e);
    close(fd);
    return rc;
}

struct canonical {
    char key[600];
    char value[256];
};

static int canonical_run(struct daemon *d, void *arg, struct larder_err *e)
{
    const struct canonical *c = arg;

    return store_setting_put(d->store, c->key, c->value, e);
}

/* Keep the canonical spelling of a policy as it was asked for: look-ups by policy need it,
 * and only workers know the rules. */
static void remember_policy(struct job *j)
{
    struct canonical c;

    if (!strcmp(j->policy, j->canonical) || strlen(j->canonical) >= sizeof c.value)
        return;
    snprintf(c.key, sizeof c.key, "policy/%s", j->policy);
    strcpy(c.value, j->canonical);
    write_quietly(j->d, canonical_run, &c, sizeof c, "policy");
}

static char *dup_range(const void *p, uint64_t n)
{
    char *s = mem_alloc(n + 1, 1);

    if (s) {
        if (n)
            memcpy(s, p, n);
        s[n] = '\0';
    }
    return s;
}

/* Tokens and text from the worker's file into the job. */
static int take_prepared(struct job *j, uint32_t n_ctx, uint64_t text_bytes, int fd, struct larder_err *e)
{
    uint64_t want = 4ull * n_ctx + text_bytes, got;
    const void *map;
    struct rd r;
    int rc = memfile_map(fd, want, want, &map, &got, e);

    if (rc)
        return rc;
    mem_free(j->ids);
    mem_free(j->text);
    j->ids = mem_alloc(n_ctx, sizeof *j->ids);
    j->text = dup_range((const uint8_t *)map + 4ull * n_ctx, text_bytes);
    r = rd_init(map, 4ull * n_ctx);
    for (uint32_t i = 0; j->ids && i < n_ctx; i++)
        j->ids[i] = rd_u32(&r);
    memfile_unmap(map, want);
    if (!j->ids || !j->text)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a document's tokens");
    j->n_ctx = n_ctx;
    j->text_len = text_bytes;
    return 0;
}

static int read_prepared(struct worker *w, const json_t *body, int fd, struct larder_err *e)
{
    struct job *j = w->job;
    const char *policy = NULL, *tmpl = NULL;
    uint64_t text_bytes = 0;
    uint32_t n_ctx = 0;
    bool present;
    int rc = field_str(body, "policy", FIELD_REQUIRED, 256, &policy, e);

    if (!rc)
        rc = field_str(body, "template", FIELD_REQUIRED, 63, &tmpl, e);
    if (!rc)
        rc = field_hex32(body, "template_fingerprint", FIELD_REQUIRED, j->template_fp, &present, e);
    if (!rc)
        rc = field_u32(body, "n_ctx", FIELD_REQUIRED, KV_MAX_CTX, &n_ctx, e);
    if (!rc)
        rc = field_u64(body, "text_bytes", FIELD_REQUIRED, MAX_TEXT, &text_bytes, e);
    if (!rc && (fd < 0 || !n_ctx))
        rc = larder_fail(e, LARDER_EPROTO, "W_PREPARED without tokens");
    if (!rc)
        rc = take_prepared(j, n_ctx, text_bytes, fd, e);
    if (rc)
        return rc;
    mem_free(j->canonical);
    mem_free(j->template_used);
    j->canonical = mem_strdup(policy);
    j->template_used = mem_strdup(tmpl);
    return j->canonical && j->template_used ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for a job");
}

static bool is_stored(struct daemon *d, const uint8_t key[32])
{
    struct store_entry *en;
    bool good;

    if (store_entry_open(d->store, key, &en, NULL))
        return false;
    good = !store_entry_info(en)->damaged;
    store_entry_close(en);
    return good;
}

static int on_prepared(struct worker *w, const json_t *body, int fd, struct larder_err *e)
{
    struct job *j = w->job;
    struct store_ident id;
    int rc = read_prepared(w, body, fd, e);

    if (rc)
        return rc;
    id = (struct store_ident){.policy = j->canonical, .ns = j->ns, .tokens = j->ids, .n_tokens = j->n_ctx};
    memcpy(id.model_fp, w->model->fp, 32);
    memcpy(id.tokenizer_fp, w->model->tokenizer_fp, 32);
    memcpy(id.template_fp, j->template_fp, 32);
    rc = store_key(&id, j->key, e);
    if (rc)
        return rc;
    j->has_key = true;
    remember_policy(j);
    if (j->cancel || is_stored(w->d, j->key)) {
        rc = send_frame(w, FRAME_W_SKIP, job_body(w), -1, e);
        j->worker = NULL;
        go_idle(w);
        if (j->cancel) {
            job_end(j, JOB_CANCELED, NULL);
        } else {
            j->stored_already = true;
            job_already_stored(j);
        }
        jobs_start(w->d);
        return rc;
    }
    rc = entry_writer_begin(j, w->model, &w->writer, e);
    if (!rc)
        rc = send_frame(w, FRAME_W_GO, job_body(w), -1, e);
    w->state = COMPUTING;
    w->next_layer = 0;
    snprintf(j->pass, sizeof j->pass, "prefill");
    return rc;
}

static int on_progress(struct worker *w, const json_t *body, struct larder_err *e)
{
    struct job *j = w->job;
    const char *pass = NULL;
    uint32_t layer = 0, layers = 0;
    int rc = field_str(body, "pass", FIELD_REQUIRED, sizeof j->pass - 1, &pass, e);

    if (!rc)
        rc = field_u32(body, "layer", FIELD_REQUIRED, KV_MAX_LAYERS, &layer, e);
    if (!rc)
        rc = field_u32(body, "layers", FIELD_REQUIRED, KV_MAX_LAYERS, &layers, e);
    if (rc || w->state == DRAINING)
        return rc;
    strcpy(j->pass, pass);
    j->layer = layer;
    j->n_layers = layers;
    job_changed(j);
    return 0;
}

static int on_layer(struct worker *w, const json_t *body, int *fd, struct larder_err *e)
{
    const struct kv_geom *g = &w->model->geom;
    const json_t *list = NULL;
    uint32_t layer = 0, rows[KV_MAX_HEADS];
    bool bias = false;
    int rc = field_u32(body, "layer", FIELD_REQUIRED, KV_MAX_LAYERS, &layer, e);

    if (!rc)
        rc = field_bool(body, "has_bias", FIELD_REQUIRED, &bias, e);
    if (!rc)
        rc = field_array(body, "rows", FIELD_REQUIRED, KV_MAX_HEADS, &list, e);
    if (rc)
        return rc;
    if (*fd < 0 || layer != w->next_layer || layer >= g->n_layers || json_array_size(list) != g->n_kv_heads || bias)
        return larder_fail(e, LARDER_EPROTO, "layer %u out of order or of another shape", layer);
    for (uint32_t i = 0; i < g->n_kv_heads; i++) {
        const json_t *v = json_array_get(list, i);

        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > w->job->n_ctx)
            return larder_fail(e, LARDER_EPROTO, "layer %u has more rows than the document has tokens", layer);
        rows[i] = (uint32_t)json_integer_value(v);
    }
    w->next_layer++;
    entry_writer_layer(w->writer, layer, rows, bias, *fd);
    *fd = -1;
    if (w->writer && entry_writer_queued(w->writer) >= MAX_QUEUED_LAYERS && !w->paused) {
        event_del(w->read_ev);
        w->paused = true;
    }
    return 0;
}

static int on_done(struct worker *w, const json_t *body, int *fd, struct larder_err *e)
{
    const json_t *sel = json_object_get(body, "sel_layer"), *trace = NULL;
    uint64_t ms = 0;
    uint32_t next_pos = 0;
    bool renumbered;
    int rc = field_u32(body, "next_pos", FIELD_REQUIRED, KV_MAX_CTX, &next_pos, e);

    if (!rc)
        rc = field_bool(body, "renumbered", FIELD_REQUIRED, &renumbered, e);
    if (!rc)
        rc = field_u64(body, "prefill_ms", FIELD_REQUIRED, UINT64_MAX >> 11, &ms, e);
    if (!rc)
        rc = field_array(body, "rank_variance", FIELD_REQUIRED, KV_MAX_LAYERS, &trace, e);
    if (!rc && (*fd < 0 || w->next_layer != w->model->geom.n_layers ||
                !(json_is_null(sel) || (json_is_integer(sel) && json_integer_value(sel) >= 0 &&
                                        json_integer_value(sel) < w->model->geom.n_layers))))
        rc = larder_fail(e, LARDER_EPROTO, "W_DONE before every layer came, or without its fields");
    if (rc)
        return rc;
    w->job->prefill_ms = ms;
    w->state = COMMITTING;
    evtimer_del(w->timer);
    snprintf(w->job->pass, sizeof w->job->pass, "store");
    job_changed(w->job);
    entry_writer_commit(w->writer, body, *fd);
    *fd = -1;
    return 0;
}

static int on_fail(struct worker *w, const json_t *body, struct larder_err *e)
{
    struct larder_err why = {0, ""};
    struct job *j;
    int rc = frame_error_read(body, &why);

    if (!why.code || rc >= 0)
        return larder_fail(e, LARDER_EPROTO, "W_FAIL without a code");
    j = release_job(w);
    go_idle(w);
    if (j->cancel)
        job_end(j, JOB_CANCELED, NULL);
    else
        job_end(j, JOB_FAILED, j->why.code ? &j->why : &why);
    jobs_start(w->d);
    return 0;
}

/* The store could not take it: stop the worker's computation, keep the reason. */
static void give_up(struct worker *w, const struct larder_err *why)
{
    struct job *j = w->job;

    j->why = *why;
    entry_writer_abort(w->writer);
    w->writer = NULL;
    w->state = DRAINING;
    if (send_frame(w, FRAME_W_CANCEL, job_body(w), -1, NULL))
        worker_end(w, "it cannot be reached");
}

void worker_layer_written(struct worker *w, const struct larder_err *e)
{
    if (w->paused) {
        w->paused = false;
        event_add(w->read_ev, NULL);
    }
    if (e && (w->state == COMPUTING || w->state == COMMITTING))
        give_up(w, e);
}

void worker_committed(struct worker *w, const uint8_t key[32], const struct larder_err *e)
{
    struct job *j = release_job(w);

    go_idle(w);
    if (e) {
        job_end(j, JOB_FAILED, e);
    } else {
        memcpy(j->key, key, 32);
        images_forget(w->d, key);
        job_already_stored(j);
    }
    jobs_start(w->d);
}

void worker_cancel(struct worker *w)
{
    if (w->state != COMPUTING)
        return; /* while preparing, the cancel is seen at W_PREPARED; a commit is not stopped */
    entry_writer_abort(w->writer);
    w->writer = NULL;
    w->state = DRAINING;
    if (send_frame(w, FRAME_W_CANCEL, job_body(w), -1, NULL))
        worker_end(w, "it cannot be reached");
}

/* ---- frames */

static int check_job(const struct worker *w, const json_t *body, struct larder_err *e)
{
    uint64_t id = 0;
    int rc = field_u64(body, "job", FIELD_REQUIRED, UINT64_MAX >> 11, &id, e);

    if (!rc && (!w->job || id != w->job->id))
        rc = larder_fail(e, LARDER_EPROTO, "a frame for job %llu, which is not running", (unsigned long long)id);
    return rc;
}

static int on_frame(struct worker *w, const struct frame *f, int *fd, struct larder_err *e)
{
    bool computing = w->state == COMPUTING, draining = w->state == DRAINING;
    int rc;

    if (f->type == FRAME_W_HELLO && w->state == STARTING)
        return on_hello(w, f->body, e);
    rc = check_job(w, f->body, e);
    if (rc)
        return rc;
    if (f->type == FRAME_W_PREPARED && w->state == PREPARING)
        return on_prepared(w, f->body, *fd, e);
    if (f->type == FRAME_W_PROGRESS && (computing || draining))
        return on_progress(w, f->body, e);
    if (f->type == FRAME_W_FAIL && (computing || draining || w->state == PREPARING))
        return on_fail(w, f->body, e);
    if (f->type == FRAME_W_LAYER && computing)
        return on_layer(w, f->body, fd, e);
    if (f->type == FRAME_W_DONE && computing)
        return on_done(w, f->body, fd, e);
    if (draining && f->type == FRAME_W_LAYER)
        return 0; /* was on its way when it was canceled */
    if (draining && f->type == FRAME_W_DONE) {
        struct larder_err none = {LARDER_ECANCELED, "canceled"};
        struct job *j = release_job(w);

        go_idle(w);
        job_end(j, j->cancel ? JOB_CANCELED : JOB_FAILED, j->cancel ? NULL : j->why.code ? &j->why : &none);
        jobs_start(w->d);
        return 0;
    }
    return larder_fail(e, LARDER_EPROTO, "unexpected %s", frame_type_name((int)f->type));
}

static bool is_listed(const struct daemon *d, const struct worker *w)
{
    const struct worker *at = d->workers;

    while (at && at != w)
        at = at->next;
    return at != NULL;
}

static void on_readable(evutil_socket_t sock, short what, void *arg)
{
    static uint8_t packet[FRAME_MAX_BYTES]; /* the loop thread's */
    struct worker *w = arg;
    struct daemon *d = w->d;

    (void)what;
    while (is_listed(d, w) && !w->paused) {
        struct larder_err e = {0, ""};
        struct frame f;
        size_t len;
        int fd = -1, rc = seqpacket_recv(sock, packet, sizeof packet, &len, &fd, &e);

        if (rc == LARDER_EBUSY)
            return;
        if (rc == LARDER_ENODAEMON) {
            worker_end(w, NULL);
            return;
        }
        if (!rc)
            rc = frame_decode(packet, len, &f, &e);
        if (!rc) {
            if (w->state > IDLE && w->state != COMMITTING)
                set_timer(w, d->conf.worker_timeout_s);
            rc = on_frame(w, &f, &fd, &e);
            json_decref(f.body);
        }
        if (fd >= 0)
            close(fd);
        if (rc && is_listed(d, w)) {
            worker_end(w, e.msg);
            return;
        }
    }
}

static void on_timer(evutil_socket_t sock, short what, void *arg)
{
    struct worker *w = arg;

    (void)sock;
    (void)what;
    if (w->state == IDLE)
        worker_end(w, "idle");
    else
        worker_end(w, "it said nothing for too long");
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
            if (w->line_len < LINE_MAX_ERR)
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
static void worker_end(struct worker *w, const char *why)
{
    struct daemon *d = w->d;
    bool was_idle = w->state == IDLE, started = w->state != STARTING;
    struct model *m = w->starting;
    struct job *j = release_job(w);
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
        larder_fail(&e, LARDER_EWORKER, "the prefill worker ended during the job: %s%s%s", why ? why : "",
                    why && *how ? "; " : "", how);
    if (!was_idle)
        log_line(LOG_LEVEL_WARNING, "worker %d ended: %s%s%s", (int)w->pid, why ? why : "", why && *how ? "; " : "", how);
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
    w->read_ev = event_new(d->base, sock, EV_READ | EV_PERSIST, on_readable, w);
    w->timer = evtimer_new(d->base, on_timer, w);
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
    set_timer(w, PROBE_TIMEOUT_S);
    return w;
}

static void program_path(const struct daemon *d, char *out, size_t cap)
{
    static const char *const beside[] = {"larder-prefill", "../bin/larder-prefill"};
    char self[3072];
    ssize_t n;

    if (*d->conf.worker_program) {
        snprintf(out, cap, "%s", d->conf.worker_program);
        return;
    }
    n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = '\0';
    if (strrchr(self, '/'))
        strrchr(self, '/')[1] = '\0';
    for (int i = 0; i < 2; i++) {
        snprintf(out, cap, "%s%s", self, beside[i]);
        if (!access(out, X_OK))
            return;
    }
    snprintf(out, cap, "larder-prefill");
}

static pid_t spawn(const struct daemon *d, const struct model *m, int sock, int err_fd)
{
    static const char *const fixed[] = {"worker", "--fd", "3", "--model"};
    char program[4096], model[4600], known[700], threads[24], hex[65];
    const char *argv[20];
    const struct config_model *c = m->conf;
    posix_spawn_file_actions_t fa;
    pid_t pid = -1;
    int n = 0, rc;

    program_path(d, program, sizeof program);
    snprintf(model, sizeof model, "%s=%s%s%s", c->name, c->path, strcmp(c->template, "auto") ? ",template=" : "",
             strcmp(c->template, "auto") ? c->template : "");
    snprintf(threads, sizeof threads, "%llu", (unsigned long long)c->threads);
    sha256_hex(m->fp, hex);
    snprintf(known, sizeof known, "%s=%llu:%llu:%llu:%llu:%s", c->name, (unsigned long long)m->dev,
             (unsigned long long)m->ino, (unsigned long long)m->size, (unsigned long long)m->mtime_ns, hex);
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
    if (m->size && same_file(m)) {
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

static struct worker *start_worker(struct daemon *d, struct model *m, struct larder_err *e)
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
        larder_fail(e, LARDER_EWORKER, "larder-prefill cannot be started; set worker_program to its path");
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

    if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &len) || (cred.uid && cred.uid != geteuid()) ||
        !worker_new(d, sock, -1, 0))
        close(sock);
}

bool worker_take(struct daemon *d, struct job *j)
{
    struct larder_err e;
    struct model *m = model_for(d, j->model, &e);

    if (!m || m->refused) {
        if (m)
            e = m->why;
        if (m)
            m->refused = false; /* the next job tries again */
        job_end(j, JOB_FAILED, &e);
        return false;
    }
    if (!m->worker) {
        if (!start_worker(d, m, &e))
            job_end(j, JOB_FAILED, &e);
        return false;
    }
    if (m->worker->state != IDLE)
        return false;
    if (start_job(m->worker, j, &e)) {
        worker_end(m->worker, e.msg);
        return false;
    }
    return true;
}

int workers_probe(struct daemon *d, struct larder_err *e)
{
    for (uint32_t i = 0; i < d->n_models; i++) {
        struct model *m = &d->model[i];

        if (!start_worker(d, m, e))
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
        j = release_job(w);
        if (j)
            j->state = JOB_QUEUED;
        if (w->pid) {
            kill(w->pid, SIGKILL);
            waitpid(w->pid, NULL, 0);
        }
        worker_free(w);
    }
}
