/* main_worker.c - larder-prefill worker: jobs in, finished layers out (PROTOCOL.md, section 5).
 *
 * The one idea: one blocking loop and one job at a time. The socket is looked at between
 * layers only, for a cancel; everything large leaves in sealed memory files. What the
 * daemon sends is checked like any input, and a daemon that is gone ends the worker. */
#include "main_common.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "bytes.h"
#include "frame.h"
#include "half.h"
#include "main_worker.h"
#include "mem.h"
#include "memfile.h"
#include "packed.h"
#include "profile.h"
#include "seqpacket.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "rows are copied to the wire as they are");

/* One job. */
struct job {
    struct worker *w;
    uint64_t id;
    uint32_t seq;
    struct served *model;
    struct engine_setup s;  /* borrowed from the model */
    struct template *asked; /* the job's own, or NULL */
    struct policy policy;
    struct document doc;
    bool may_calibrate; /* when the policy needs a profile and there is none */
};

/* ---- frames */

static int send_frame(struct worker *w, enum frame_type type, uint32_t seq, json_t *body, int fd,
                      struct larder_err *e)
{
    void *packet = NULL;
    size_t len = 0;
    int rc = body ? frame_encode(type, seq, body, &packet, &len, e)
                  : larder_fail(e, LARDER_ENOMEM, "no memory for a frame");

    if (!rc)
        rc = seqpacket_send(w->sock, packet, len, fd, e);
    mem_free(packet);
    json_decref(body);
    return rc;
}

/* Send with a sealed file that holds buf. */
static int send_bytes(struct job *j, enum frame_type type, json_t *body, const void *buf,
                      uint64_t len, struct larder_err *e)
{
    int fd = -1;
    int rc = memfile_from("larder-worker", buf, len, &fd, e);

    if (rc) {
        json_decref(body);
        return rc;
    }
    rc = send_frame(j->w, type, j->seq, body, fd, e);
    close(fd);
    return rc;
}

static int recv_frame(struct worker *w, struct frame *ret, int *ret_fd, struct larder_err *e)
{
    size_t len = 0;
    int fd = -1;
    int rc = seqpacket_recv(w->sock, w->packet, FRAME_MAX_BYTES, &len, &fd, e);

    if (!rc)
        rc = frame_decode(w->packet, len, ret, e);
    if (rc && fd >= 0)
        close(fd);
    if (!rc)
        *ret_fd = fd;
    return rc;
}

/* A frame about this job that carries nothing but its number. */
static int recv_order(struct job *j, enum frame_type *ret, struct larder_err *e)
{
    static const char *const allowed[] = {"job", NULL};
    struct frame f;
    uint64_t id = 0;
    int fd = -1;
    int rc = recv_frame(j->w, &f, &fd, e);

    if (rc)
        return rc;
    rc = field_only(f.body, allowed, e);
    if (!rc)
        rc = field_u64(f.body, "job", FIELD_REQUIRED, UINT64_MAX, &id, e);
    if (!rc && (fd >= 0 || id != j->id || f.type < FRAME_W_GO))
        rc = larder_fail(e, LARDER_EPROTO, "unexpected %s for job %llu while job %llu is running",
                         frame_type_name((int)f.type), (unsigned long long)id,
                         (unsigned long long)j->id);
    if (fd >= 0)
        close(fd);
    *ret = f.type;
    json_decref(f.body);
    return rc;
}

/* ---- rows on their way out */

/* What rows are sent as: tiles as they are, everything else in bf16. */
static enum kv_dtype sent_as(const struct kept_rows *h)
{
    return packed_type(h->dtype) ? h->dtype : KV_BF16;
}

static uint8_t *put_rows(uint8_t *to, const void *rows, uint64_t n_bytes, enum kv_dtype t)
{
    const float *f = rows;

    if (t != KV_F32) {
        memcpy(to, rows, n_bytes);
        return to + n_bytes;
    }
    for (uint64_t i = 0; i < n_bytes / 2; i++, to += 2) {
        uint16_t h = f32_to_bf16(f[i]);

        memcpy(to, &h, sizeof h);
    }
    return to;
}

/* Bytes of a head in a layer's file; K and V together end at a multiple of 4. */
static uint64_t head_bytes(const struct kept_rows *h, uint32_t d)
{
    uint64_t n = tile_bytes_k(sent_as(h), h->n_rows, d) + tile_bytes_v(sent_as(h), h->n_rows, d);

    return (h->bias ? 8ull : 4ull) * h->n_rows + (n + 3) / 4 * 4;
}

static uint8_t *put_head(uint8_t *to, const struct kept_rows *h, uint32_t d)
{
    uint8_t *end = to + head_bytes(h, d);

    memcpy(to, h->position, h->n_rows * (uint64_t)4);
    to += h->n_rows * (uint64_t)4;
    to = put_rows(to, h->k, tile_bytes_k(sent_as(h), h->n_rows, d), h->dtype);
    put_rows(to, h->v, tile_bytes_v(sent_as(h), h->n_rows, d), h->dtype);
    if (h->bias)
        memcpy(end - h->n_rows * (uint64_t)4, h->bias, h->n_rows * (uint64_t)4);
    return end;
}

static int layer_file(const struct job *j, const struct kept_rows *heads, int *ret_fd,
                      struct larder_err *e)
{
    const struct kv_geom *g = &j->s.backend->p->geom;
    uint64_t n_bytes = 0;
    void *map = NULL;
    uint8_t *to;
    int fd = -1;
    int rc;

    for (uint32_t i = 0; i < g->n_kv_heads; i++) {
        /* one frame states both for the whole layer */
        assert(sent_as(&heads[i]) == sent_as(heads) && !heads[i].bias == !heads->bias);
        n_bytes += head_bytes(&heads[i], g->head_dim);
    }
    if (!n_bytes) /* such a file cannot be mapped */
        return memfile_from("larder-layer", NULL, 0, ret_fd, e);
    rc = memfile_new("larder-layer", n_bytes, 1, &fd, &map, e);
    if (rc)
        return rc;
    to = map;
    for (uint32_t i = 0; i < g->n_kv_heads; i++)
        to = put_head(to, &heads[i], g->head_dim);
    rc = memfile_seal(fd, map, n_bytes, n_bytes, e);
    if (rc) {
        close(fd);
        return rc;
    }
    *ret_fd = fd;
    return 0;
}

static int on_layer(void *arg, uint32_t layer, const struct kept_rows *heads, struct larder_err *e)
{
    struct job *j = arg;
    json_t *rows = json_array();
    int fd = -1;
    int rc = layer_file(j, heads, &fd, e);

    if (rc) {
        json_decref(rows);
        return rc;
    }
    for (uint32_t g = 0; g < j->s.backend->p->geom.n_kv_heads; g++)
        json_array_append_new(rows, json_integer(heads[g].n_rows));
    rc = send_frame(j->w, FRAME_W_LAYER, j->seq,
                    json_pack("{sI sI so ss sb}", "job", (json_int_t)j->id, "layer",
                              (json_int_t)layer, "rows", rows, "precision",
                              kv_dtype_name(sent_as(heads)), "has_bias", heads->bias != NULL),
                    fd, e);
    close(fd);
    return rc;
}

/* Before each layer: say where we are, and see whether anybody still wants it. */
static int on_progress(void *arg, const char *pass, uint32_t layer, uint32_t n_layers)
{
    struct job *j = arg;
    enum frame_type order;
    int rc = send_frame(j->w, FRAME_W_PROGRESS, j->seq,
                        json_pack("{sI ss sI sI}", "job", (json_int_t)j->id, "pass", pass, "layer",
                                  (json_int_t)layer, "layers", (json_int_t)n_layers),
                        -1, NULL);

    if (rc)
        return rc;
    rc = seqpacket_wait(j->w->sock, 0, 0, NULL);
    if (rc)
        return rc == LARDER_ETIMEOUT ? 0 : rc;
    rc = recv_order(j, &order, NULL);
    if (rc)
        return rc;
    return order == FRAME_W_CANCEL ? LARDER_ECANCELED : LARDER_EPROTO;
}

/* ---- one job, step by step */

static int document_from_wire_ids(const struct model_params *p, const void *map, uint64_t bytes,
                                  struct document *ret, struct larder_err *e)
{
    struct rd r = rd_init(map, bytes);
    struct document d = {.n = (uint32_t)(bytes / 4)};

    if (bytes % 4)
        return larder_fail(e, LARDER_EINVAL, "a token list of %llu bytes is not u32 numbers",
                           (unsigned long long)bytes);
    d.ids = mem_alloc(d.n, sizeof *d.ids);
    if (!d.ids)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %u tokens", d.n);
    for (uint32_t i = 0; i < d.n; i++) {
        d.ids[i] = rd_u32(&r);
        if (d.ids[i] < p->n_vocab)
            continue;
        larder_fail(e, LARDER_EINVAL, "token %u is %u, but the vocabulary has %u entries", i,
                    d.ids[i], p->n_vocab);
        mem_free(d.ids);
        return LARDER_EINVAL;
    }
    *ret = d;
    return 0;
}

static int read_document(struct job *j, const char *source, uint64_t bytes, int fd,
                         struct larder_err *e)
{
    const void *map = NULL;
    uint64_t n = 0;
    int rc;

    if (!bytes)
        return larder_fail(e, LARDER_EEMPTY, "the document is empty; there is nothing to prefill");
    rc = memfile_map(fd, bytes, MAIN_MAX_DOCUMENT, &map, &n, e);
    if (rc)
        return rc;
    if (!strcmp(source, "text"))
        rc = document_from_text(&j->s, map, n, &j->doc, e);
    else if (!strcmp(source, "tokens"))
        rc = document_from_wire_ids(model_params(j->s.model), map, n, &j->doc, e);
    else
        rc = larder_fail(e, LARDER_EPROTO, "source '%.20s' is neither text nor tokens", source);
    memfile_unmap(map, n);
    return rc;
}

/* What would fail after the daemon's go, checked before it. */
static int check_policy(struct job *j, const char *text, struct larder_err *e)
{
    const struct shares *s = j->model->s.shares;
    struct policy p;
    uint32_t rows;
    int rc = policy_parse(text, &j->policy, e);

    p = j->policy;
    if (!rc)
        rc = policy_resolve(&p, model_params(j->s.model)->geom.n_layers, s ? &s->window : NULL, e);
    if (!rc) /* before a calibration, too */
        rc = engine_check_windows(model_params(j->s.model), &p, j->doc.n, e);
    if (!rc)
        rc = policy_rows(&p, &p.rows, j->doc.n, &rows, e);
    return rc ? rc : policy_rows(&p, &p.select, j->doc.n, &rows, e);
}

static int check_length(const struct job *j, struct larder_err *e)
{
    const struct model_params *p = model_params(j->s.model);

    if (j->doc.n <= p->n_positions)
        return 0;
    return larder_fail(e, LARDER_ETOOLONG,
                       "the document has %u tokens, the model only %u positions; split it",
                       j->doc.n, p->n_positions);
}

/* Tell the daemon what was measured: it keeps it for the next worker. */
static int send_profile(struct job *j, json_t *profile, struct larder_err *e)
{
    char *text = profile_text(profile);
    uint64_t len = text ? strlen(text) : 0;
    int rc =
        text ? send_bytes(j, FRAME_W_PROFILE,
                          json_pack("{ss sI}", "model", j->model->name, "bytes", (json_int_t)len),
                          text, len, e)
             : larder_fail(e, LARDER_ENOMEM, "no memory for a profile");

    free(text);
    return rc;
}

static int calibrate(struct job *j, struct larder_err *e)
{
    const struct calibrate_watch watch = {j, on_progress};
    struct measuring m = {0};
    struct shares *s = NULL;
    json_t *profile = NULL;
    int rc = measuring_open(&m, &j->model->s, CALIBRATION_TEXTS, &watch, e);

    if (!rc)
        rc = measuring_builtin(&m, e);
    if (!rc)
        rc = measuring_end(&m, &s, &profile, e);
    if (!rc)
        rc = send_profile(j, profile, e);
    json_decref(profile);
    measuring_done(&m);
    if (rc) {
        shares_free(s);
        return larder_fail_in(e, rc, "calibrating");
    }
    j->model->s.shares = s;
    return 0;
}

/* A policy that depends on a profile names it in W_PREPARED. Only one that cannot do without has
 * it measured now: nobody who asks for `asl` expects to wait for that. */
static int need_profile(struct job *j, struct larder_err *e)
{
    bool missing = policy_needs_profile(&j->policy) && !j->model->s.shares;
    int rc = 0;

    if (!policy_uses_profile(&j->policy))
        return 0;
    if (missing && !j->may_calibrate)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "the policy needs the profile of model %.64s and there is none; run "
                           "'larder calibrate %.64s'",
                           j->model->name, j->model->name);
    if (missing)
        rc = calibrate(j, e);
    j->s.shares = j->model->s.shares;
    return rc ? rc : shares_name_in(j->s.shares, &j->policy, e);
}

static struct served *find_model(struct worker *w, const char *name)
{
    for (uint32_t i = 0; i < w->n_models; i++)
        if (!strcmp(w->model[i].name, name))
            return &w->model[i];
    return NULL;
}

static int read_job(struct job *j, const json_t *body, int fd, struct larder_err *e)
{
    static const char *const allowed[] = {"job",   "model",    "policy",    "source",
                                          "bytes", "template", "calibrate", NULL};
    const char *model = NULL, *policy = NULL, *source = NULL, *tmpl = NULL;
    uint64_t bytes = 0;
    int rc = field_only(body, allowed, e);

    if (!rc)
        rc = field_str(body, "model", FIELD_REQUIRED, 512, &model, e);
    if (!rc)
        rc = field_str(body, "policy", FIELD_REQUIRED, POLICY_TEXT_MAX, &policy, e);
    if (!rc)
        rc = field_str(body, "source", FIELD_REQUIRED, 16, &source, e);
    if (!rc)
        rc = field_u64(body, "bytes", FIELD_REQUIRED, UINT64_MAX, &bytes, e);
    if (!rc)
        rc = field_str(body, "template", FIELD_OPTIONAL, KV_MAX_TEMPLATE - 1, &tmpl, e);
    j->may_calibrate = true;
    if (!rc)
        rc = field_bool(body, "calibrate", FIELD_OPTIONAL, &j->may_calibrate, e);
    if (rc)
        return rc;
    j->model = find_model(j->w, model);
    if (!j->model)
        return larder_fail(e, LARDER_EUNKNOWNMODEL, "this worker does not serve model '%.64s'",
                           model);
    j->s = j->model->s;
    if (tmpl)
        rc = setup_template(j->s.model, tmpl, &j->asked, e);
    if (j->asked)
        j->s.tmpl = j->asked;
    if (!rc)
        rc = read_document(j, source, bytes, fd, e);
    if (!rc)
        rc = check_length(j, e);
    if (!rc)
        rc = check_policy(j, policy, e);
    return rc ? rc : need_profile(j, e);
}

static int send_prepared(struct job *j, struct larder_err *e)
{
    uint64_t ids_bytes = (uint64_t)j->doc.n * 4, len = ids_bytes + j->doc.text_len;
    char policy[POLICY_TEXT_MAX], hex[65];
    int rc = worker_template_hex(j->s.tmpl, hex, e);
    uint8_t *buf = rc ? NULL : mem_alloc(len, 1);

    if (rc)
        return rc;
    if (!buf)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %u tokens", j->doc.n);
    memcpy(buf, j->doc.ids, ids_bytes);
    if (j->doc.text_len)
        memcpy(buf + ids_bytes, j->doc.text, j->doc.text_len);
    policy_print(&j->policy, policy);
    rc = send_bytes(j, FRAME_W_PREPARED,
                    json_pack("{sI ss ss ss sI sI}", "job", (json_int_t)j->id, "policy", policy,
                              "template", j->s.tmpl->name, "template_fingerprint", hex, "n_ctx",
                              (json_int_t)j->doc.n, "text_bytes", (json_int_t)j->doc.text_len),
                    buf, len, e);
    mem_free(buf);
    return rc;
}

static int send_done(struct job *j, const struct engine_result *r, struct larder_err *e)
{
    json_t *body = json_pack(
        "{sI sI so sb so so sI sI sI so*}", "job", (json_int_t)j->id, "next_pos",
        (json_int_t)r->next_pos, "sel_layer",
        r->sel_layer < 0 ? json_null() : json_integer(r->sel_layer), "renumbered",
        (int)r->renumbered, "rank_variance", json_variance(r), "certificate",
        json_certificate(&r->certificate), "prefill_ms", (json_int_t)(r->prefill_ms + 0.5),
        "load_ms", (json_int_t)(r->load_ms + 0.5), "peak_bytes", (json_int_t)peak_bytes(),
        "device", json_device(j->s.backend));

    return send_bytes(j, FRAME_W_DONE, body, r->logits,
                      (uint64_t)j->s.backend->p->n_vocab * sizeof *r->logits, e);
}

static int compute(struct job *j, struct larder_err *e)
{
    struct engine_sink sink = {j, on_layer, on_progress};
    struct engine_doc doc = {j->doc.ids, j->doc.n, j->s.tmpl, j->s.shares};
    struct engine_result r = {0};
    int rc = engine_prefill(j->s.backend, &doc, &j->policy, &sink, &r, e);

    if (!rc)
        rc = send_done(j, &r, e);
    engine_result_done(&r);
    return rc;
}

/* Losing the daemon, or understanding it no longer, ends the worker; all else is the job's. */
static bool ends_worker(int rc)
{
    return rc == LARDER_ENODAEMON || rc == LARDER_EPROTO;
}

static int send_fail(struct job *j, const struct larder_err *why, struct larder_err *e)
{
    return send_frame(j->w, FRAME_W_FAIL, j->seq,
                      json_pack("{sI sI ss}", "job", (json_int_t)j->id, "code",
                                (json_int_t)why->code, "message", why->msg),
                      -1, e);
}

static int do_job(struct job *j, const json_t *body, int fd, struct larder_err *e)
{
    enum frame_type order = FRAME_W_SKIP;
    int rc = read_job(j, body, fd, e);

    if (!rc)
        rc = send_prepared(j, e);
    if (!rc)
        rc = recv_order(j, &order, e);
    if (!rc && order == FRAME_W_GO)
        rc = compute(j, e);
    else if (!rc && order == FRAME_W_CANCEL)
        rc = larder_fail(e, LARDER_ECANCELED, "canceled before the prefill");
    else if (!rc && order != FRAME_W_SKIP)
        rc = larder_fail(e, LARDER_EPROTO, "%s is no answer to W_PREPARED",
                         frame_type_name((int)order));
    return rc;
}

static int take_job(struct worker *w, const struct frame *f, int fd, struct larder_err *e)
{
    struct job j = {.w = w, .seq = f->seq};
    struct larder_err why = {0, ""};
    int rc;

    if (fd < 0)
        return larder_fail(e, LARDER_EPROTO, "W_JOB came without a document");
    rc = field_u64(f->body, "job", FIELD_REQUIRED, UINT64_MAX, &j.id, e);
    if (rc)
        return rc;
    rc = do_job(&j, f->body, fd, &why);
    document_done(&j.doc);
    template_free(j.asked);
    if (!rc)
        return 0;
    if (ends_worker(rc)) {
        *e = why;
        return rc;
    }
    rc = send_fail(&j, &why, e);
    if (rc || why.code != LARDER_EBACKEND)
        return rc;
    *e = why; /* a device that failed stays failed in this process; the next job gets a new one */
    return why.code;
}

/* A profile that the daemon has for one of the models; it replaces the one at hand. */
static int take_profile(struct worker *w, const json_t *body, int fd, struct larder_err *e)
{
    static const char *const allowed[] = {"model", "bytes", NULL};
    const char *name = NULL;
    const void *map = NULL;
    uint64_t bytes = 0, n = 0;
    struct shares *s = NULL;
    struct served *m = NULL;
    int rc = field_only(body, allowed, e);

    if (!rc)
        rc = field_str(body, "model", FIELD_REQUIRED, 512, &name, e);
    if (!rc)
        rc = field_u64(body, "bytes", FIELD_REQUIRED, PROFILE_MAX_BYTES, &bytes, e);
    if (!rc && (fd < 0 || !bytes || !(m = find_model(w, name))))
        rc = larder_fail(e, LARDER_EPROTO, "W_PROFILE of nothing, or of a model not served here");
    if (!rc)
        rc = memfile_map(fd, bytes, bytes, &map, &n, e);
    if (!rc)
        rc = profile_take(map, n, m->s.model, &s, e);
    memfile_unmap(map, n);
    if (rc) /* the daemon has checked it: the two do not understand each other */
        return larder_fail_in(e, LARDER_EPROTO, "W_PROFILE");
    shares_free(m->s.shares);
    m->s.shares = s;
    return 0;
}

/* One frame while idle. */
static int serve_one(struct worker *w, struct larder_err *e)
{
    struct frame f;
    int fd = -1;
    int rc = recv_frame(w, &f, &fd, e);

    if (rc)
        return rc;
    if (f.type == FRAME_W_JOB)
        rc = take_job(w, &f, fd, e);
    else if (f.type == FRAME_W_PROFILE)
        rc = take_profile(w, f.body, fd, e);
    else if (f.type != FRAME_W_CANCEL) /* a cancel may cross a job's last frame */
        rc =
            larder_fail(e, LARDER_EPROTO, "unexpected %s while idle", frame_type_name((int)f.type));
    if (fd >= 0)
        close(fd);
    json_decref(f.body);
    return rc;
}

/* ---- start */

static int connect_to(const char *path, int *ret, struct larder_err *e)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd;

    if (strlen(path) >= sizeof a.sun_path)
        return larder_fail(e, LARDER_EINVAL, "socket path is longer than %zu bytes",
                           sizeof a.sun_path - 1);
    memcpy(a.sun_path, path, strlen(path) + 1);
    fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a)) {
        int rc = larder_fail(e, LARDER_ENODAEMON, "%.120s: %s; is larderd running?", path,
                             strerror(errno));

        if (fd >= 0)
            close(fd);
        return rc;
    }
    *ret = fd;
    return 0;
}

static int open_socket(const struct options *o, int *ret, struct larder_err *e)
{
    uint64_t fd = 0;
    int rc;

    if (o->n[OPTION_CONNECT])
        return connect_to(option_get(o, OPTION_CONNECT), ret, e);
    rc = option_number(o, OPTION_FD, 1u << 20, &fd, e);
    if (rc)
        return rc;
    /* started by the daemon: do not outlive it */
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    *ret = (int)fd;
    return 0;
}

int main_worker(const struct options *o, struct larder_err *e)
{
    struct worker w = {.sock = -1};
    int rc;

    if (o->n_args)
        return main_usage(e, "unexpected argument '%.64s'", o->arg[0]);
    if (o->n[OPTION_FD] + o->n[OPTION_CONNECT] != 1)
        return main_usage(e, "a worker needs one of --fd and --connect");
    rc = worker_open_models(&w, o, e);
    if (!rc)
        rc = open_socket(o, &w.sock, e);
    if (!rc && !(w.packet = mem_alloc(FRAME_MAX_BYTES, 1)))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for packets");
    if (!rc)
        rc = send_frame(&w, FRAME_W_HELLO, 0, worker_hello(&w), -1, e);
    w.said_hello = !rc;
    while (!rc)
        rc = serve_one(&w, e);
    if (w.sock >= 0)
        close(w.sock);
    mem_free(w.packet);
    worker_close_models(&w);
    /* before W_HELLO a missing daemon is an error; afterwards it is the normal end */
    return rc == LARDER_ENODAEMON && w.said_hello ? 0 : rc;
}
