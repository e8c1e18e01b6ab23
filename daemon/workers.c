/* workers.c - what prefill processes are told and what they say.
 *
 * The one idea: a worker is a state machine driven by its frames. Any frame that does not
 * fit the state, and any field that does not fit the model, ends the worker; its job is
 * tried once more with a new one. Serving never depends on a worker. */
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bytes.h"
#include "mem.h"
#include "memfile.h"
#include "seqpacket.h"
#include "sha256.h"
#include "worker.h"

#define MAX_QUEUED_LAYERS 4u
#define MAX_TEXT (1ull << 32)

/* ---- small things */

void worker_set_timer(struct worker *w, uint64_t seconds)
{
    struct timeval t = {(time_t)seconds, 0};

    evtimer_add(w->timer, &t);
}

int worker_send(struct worker *w, enum frame_type type, json_t *body, int fd, struct larder_err *e)
{
    void *packet = NULL;
    size_t len;
    int rc = body ? frame_encode(type, 1, body, &packet, &len, e)
                  : larder_fail(e, LARDER_ENOMEM, "no memory for a frame");

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
    worker_set_timer(w, w->d->conf.worker_idle_s);
}

/* Take the job away from the worker. */
struct job *worker_release_job(struct worker *w)
{
    struct job *j = w->job;

    entry_writer_abort(w->writer);
    w->writer = NULL;
    if (j)
        j->worker = NULL;
    w->job = NULL;
    return j;
}

static int on_hello(struct worker *w, const json_t *body, struct larder_err *e)
{
    const json_t *models = NULL;
    int rc = field_array(body, "models", FIELD_REQUIRED, CONFIG_MAX_MODELS, &models, e);

    for (size_t i = 0; !rc && i < json_array_size(models); i++)
        rc = model_hello(w, body, json_array_get(models, i), e);
    if (rc)
        return rc;
    if (w->starting && w->starting->worker == w)
        log_line(LOG_LEVEL_INFO, "model %s: worker ready (%s, %s, %s)", w->starting->conf->name,
                 w->starting->backend, w->starting->dtype, w->starting->isa);
    w->starting = NULL;
    go_idle(w);
    for (uint32_t i = 0; !rc && i < w->d->n_models; i++)
        if (w->d->model[i].worker == w)
            rc = profile_tell(w, &w->d->model[i], e);
    jobs_start(w->d);
    return rc;
}

/* ---- one job */

static int start_job(struct worker *w, struct job *j, struct larder_err *e)
{
    struct model *m = model_for(w->d, j->model, e);
    json_t *body =
        json_pack("{sI ss ss ss sI ss* sb}", "job", (json_int_t)j->id, "model", j->model, "policy",
                  j->policy, "source", j->tokens ? "tokens" : "text", "bytes",
                  (json_int_t)j->doc_len, "template", j->template, "calibrate", m->conf->calibrate);
    int fd = -1, rc = profile_tell(w, m, e);

    if (!rc)
        rc = memfile_from("larder-document", j->doc, j->doc_len, &fd, e);
    if (rc) {
        json_decref(body);
        return rc;
    }
    w->job = j;
    w->model = m;
    memcpy(j->profile, m->profile_id, sizeof j->profile);
    j->worker = w;
    j->state = JOB_RUNNING;
    j->tries++;
    snprintf(j->pass, sizeof j->pass, "tokenize");
    j->layer = j->n_layers = 0;
    w->state = PREPARING;
    worker_set_timer(w, w->d->conf.worker_timeout_s);
    rc = worker_send(w, FRAME_W_JOB, body, fd, e);
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

    size_t n;

    if (!strcmp(j->policy, j->canonical) || strlen(j->canonical) >= sizeof c.value)
        return;
    snprintf(c.key, sizeof c.key, "policy/%s", j->policy);
    if (policy_profile(j->policy, &n))
        strcpy(c.value, j->canonical);
    else /* models have profiles of their own */
        policy_any_profile(j->canonical, c.value, sizeof c.value);
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
static int take_prepared(struct job *j, uint32_t n_ctx, uint64_t text_bytes, int fd,
                         struct larder_err *e)
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
        rc = field_str(body, "template", FIELD_REQUIRED, KV_MAX_TEMPLATE - 1, &tmpl, e);
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
    return j->canonical && j->template_used ? 0
                                            : larder_fail(e, LARDER_ENOMEM, "no memory for a job");
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
    id = (struct store_ident){
        .policy = j->canonical, .ns = j->ns, .tokens = j->ids, .n_tokens = j->n_ctx};
    memcpy(id.model_fp, w->model->fp, 32);
    memcpy(id.tokenizer_fp, w->model->tokenizer_fp, 32);
    memcpy(id.template_fp, j->template_fp, 32);
    rc = store_key(&id, j->key, e);
    if (rc)
        return rc;
    j->has_key = true;
    remember_policy(j);
    if (is_stored(w->d, j->key)) {
        rc = worker_send(w, FRAME_W_SKIP, job_body(w), -1, e);
        j->worker = NULL;
        go_idle(w);
        j->stored_already = true;
        job_already_stored(j);
        jobs_start(w->d);
        return rc;
    }
    rc = entry_writer_begin(j, w->model, &w->writer, e);
    if (!rc)
        rc = worker_send(w, FRAME_W_GO, job_body(w), -1, e);
    w->state = COMPUTING;
    w->next_layer = 0;
    snprintf(j->pass, sizeof j->pass, "prefill");
    j->layer = j->n_layers = 0; /* a calibration counted others */
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

/* "bf16" when it is not there. */
static int read_precision(const json_t *body, enum kv_dtype *ret, struct larder_err *e)
{
    static const enum kv_dtype all[] = {KV_BF16, KV_INT8, KV_INT4};
    const char *name = kv_dtype_name(KV_BF16);
    int rc = field_str(body, "precision", FIELD_OPTIONAL, 8, &name, e);

    for (size_t i = 0; !rc && i < sizeof all / sizeof all[0]; i++) {
        if (strcmp(name, kv_dtype_name(all[i])))
            continue;
        *ret = all[i];
        return 0;
    }
    return rc ? rc : larder_fail(e, LARDER_EPROTO, "rows are sent as bf16, int8 or int4");
}

static int on_layer(struct worker *w, const json_t *body, int *fd, struct larder_err *e)
{
    const struct kv_geom *g = &w->model->geom;
    const json_t *list = NULL;
    uint32_t layer = 0, rows[KV_MAX_HEADS];
    struct layer_form form = {.precision = KV_BF16};
    int rc = field_u32(body, "layer", FIELD_REQUIRED, KV_MAX_LAYERS, &layer, e);

    if (!rc)
        rc = field_bool(body, "has_bias", FIELD_REQUIRED, &form.has_bias, e);
    if (!rc)
        rc = read_precision(body, &form.precision, e);
    if (!rc)
        rc = field_array(body, "rows", FIELD_REQUIRED, KV_MAX_HEADS, &list, e);
    if (rc)
        return rc;
    if (*fd < 0 || layer != w->next_layer || layer >= g->n_layers ||
        json_array_size(list) != g->n_kv_heads ||
        (layer && (form.precision != w->form.precision || form.has_bias != w->form.has_bias)))
        return larder_fail(e, LARDER_EPROTO, "layer %u out of order or of another shape", layer);
    for (uint32_t i = 0; i < g->n_kv_heads; i++) {
        const json_t *v = json_array_get(list, i);

        if (!json_is_integer(v) || json_integer_value(v) < 0 ||
            json_integer_value(v) > w->job->n_ctx)
            return larder_fail(e, LARDER_EPROTO,
                               "layer %u has more rows than the document has tokens", layer);
        rows[i] = (uint32_t)json_integer_value(v);
    }
    w->next_layer++;
    w->form = form;
    entry_writer_layer(w->writer, layer, rows, form, *fd);
    *fd = -1;
    if (w->writer && entry_writer_queued(w->writer) >= MAX_QUEUED_LAYERS && !w->paused) {
        event_del(w->read_ev);
        w->paused = true;
    }
    return 0;
}

/* Null, or what json_certificate() in the worker writes: finite numbers, never negative. */
static bool is_certificate(const json_t *c)
{
    static const char *const field[] = {"probes",    "tokens",   "kl",
                                        "agreement", "worst_kl", "worst_at"};
    const size_t n = sizeof field / sizeof field[0];

    if (json_is_null(c))
        return true;
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_object_get(c, field[i]);

        if (!json_is_number(v) || !(json_number_value(v) >= 0 && json_number_value(v) < 1e15))
            return false;
    }
    return json_object_size(c) == n;
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
    if (!rc && !is_certificate(json_object_get(body, "certificate")))
        rc = larder_fail(e, LARDER_EPROTO, "W_DONE with a certificate that is none");
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
    j = worker_release_job(w);
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
    if (worker_send(w, FRAME_W_CANCEL, job_body(w), -1, NULL))
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
    struct job *j = worker_release_job(w);

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
    if (w->state != COMPUTING && w->state != PREPARING)
        return; /* a commit is not stopped */
    entry_writer_abort(w->writer);
    w->writer = NULL;
    w->state = DRAINING;
    if (worker_send(w, FRAME_W_CANCEL, job_body(w), -1, NULL))
        worker_end(w, "it cannot be reached");
}

/* ---- frames */

static int check_job(const struct worker *w, const json_t *body, struct larder_err *e)
{
    uint64_t id = 0;
    int rc = field_u64(body, "job", FIELD_REQUIRED, UINT64_MAX >> 11, &id, e);

    if (!rc && (!w->job || id != w->job->id))
        rc = larder_fail(e, LARDER_EPROTO, "a frame for job %llu, which is not running",
                         (unsigned long long)id);
    return rc;
}

static int on_frame(struct worker *w, const struct frame *f, int *fd, struct larder_err *e)
{
    bool computing = w->state == COMPUTING, draining = w->state == DRAINING;
    int rc;

    if (f->type == FRAME_W_HELLO && w->state == STARTING)
        return on_hello(w, f->body, e);
    if (f->type == FRAME_W_PROFILE && (w->state == PREPARING || draining))
        return profile_from_worker(w, f->body, *fd, e);
    rc = check_job(w, f->body, e);
    if (rc)
        return rc;
    if (f->type == FRAME_W_PREPARED && w->state == PREPARING)
        return on_prepared(w, f->body, *fd, e);
    if (f->type == FRAME_W_PROGRESS && (computing || draining || w->state == PREPARING))
        return on_progress(w, f->body, e);
    if (f->type == FRAME_W_FAIL && (computing || draining || w->state == PREPARING))
        return on_fail(w, f->body, e);
    if (f->type == FRAME_W_LAYER && computing)
        return on_layer(w, f->body, fd, e);
    if (f->type == FRAME_W_DONE && computing)
        return on_done(w, f->body, fd, e);
    if (draining && (f->type == FRAME_W_LAYER || f->type == FRAME_W_PREPARED))
        return 0; /* was on its way when it was canceled */
    if (draining && f->type == FRAME_W_DONE) {
        struct larder_err none = {LARDER_ECANCELED, "canceled"};
        struct job *j = worker_release_job(w);

        go_idle(w);
        job_end(j, j->cancel ? JOB_CANCELED : JOB_FAILED,
                j->cancel     ? NULL
                : j->why.code ? &j->why
                              : &none);
        jobs_start(w->d);
        return 0;
    }
    return larder_fail(e, LARDER_EPROTO, "unexpected %s", frame_type_name((int)f->type));
}

void worker_readable(evutil_socket_t sock, short what, void *arg)
{
    static uint8_t packet[FRAME_MAX_BYTES]; /* the loop thread's */
    struct worker *w = arg;
    struct daemon *d = w->d;

    (void)what;
    while (worker_listed(d, w) && !w->paused) {
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
                worker_set_timer(w, d->conf.worker_timeout_s);
            rc = on_frame(w, &f, &fd, &e);
            json_decref(f.body);
        }
        if (fd >= 0)
            close(fd);
        if (rc && worker_listed(d, w)) {
            worker_end(w, e.msg);
            return;
        }
    }
}

void worker_overdue(evutil_socket_t sock, short what, void *arg)
{
    struct worker *w = arg;

    (void)sock;
    (void)what;
    if (w->state == IDLE)
        worker_end(w, "idle");
    else
        worker_end(w, "it said nothing for too long");
}

/* ---- jobs for it */

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
        if (!worker_start(d, m, &e))
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
