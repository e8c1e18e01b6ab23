/* profiles.c - calibrations of models: kept in the settings, told to workers, given to clients.
 *
 * The one idea: a profile belongs to the bytes of a model (its fingerprint), whatever the
 * configuration calls it. A worker is told before a job that could need it, never during one;
 * the job remembers which profile that was, because its entry must never be taken for one that
 * was made with another. */
#include <string.h>
#include <unistd.h>

#include "mem.h"
#include "memfile.h"
#include "profile.h"
#include "sha256.h"
#include "worker.h"

/* ---- what is known of a model */

/* What the daemon itself needs of a profile. */
struct gist {
    char id[PROFILE_ID_LEN + 1];
    bool window;
};

static void setting_of(const uint8_t fp[32], char out[80])
{
    char hex[2 * SHA256_LEN + 1];

    sha256_hex(fp, hex);
    snprintf(out, 80, "profile/%s", hex);
}

static void forget(struct model *m)
{
    mem_free(m->profile);
    m->profile = NULL;
    m->profile_id[0] = '\0';
    m->profile_sent = m->profile_window = false;
}

/* Every configured model of these bytes has this profile from now on. */
static int take_over(struct daemon *d, const uint8_t fp[32], const char *text,
                     const struct gist *gist, struct larder_err *e)
{
    for (uint32_t i = 0; i < d->n_models; i++) {
        struct model *m = &d->model[i];
        char *copy;

        if (!m->known || memcmp(m->fp, fp, 32))
            continue;
        copy = mem_strdup(text);
        if (!copy)
            return larder_fail(e, LARDER_ENOMEM, "no memory for a profile");
        forget(m);
        m->profile = copy;
        memcpy(m->profile_fp, fp, 32);
        memcpy(m->profile_id, gist->id, sizeof m->profile_id);
        m->profile_window = gist->window;
    }
    return 0;
}

/* Is the text a profile of this model? */
static int check(const struct model *m, const char *text, size_t len, struct gist *ret,
                 struct larder_err *e)
{
    struct profile p = {0};
    int rc = profile_parse(text, len, &p, e);

    if (!rc)
        rc = profile_fits(&p, m->fp, m->geom.n_layers, m->geom.n_kv_heads, e);
    if (!rc) {
        memcpy(ret->id, p.id, sizeof p.id);
        ret->window = p.window.pool != 0;
    }
    profile_done(&p);
    return rc;
}

void profile_recall(struct daemon *d, struct model *m)
{
    char key[80], *text = NULL;
    struct gist gist;
    struct larder_err e;

    m->profile_sent = false;
    if (m->profile && !memcmp(m->profile_fp, m->fp, 32))
        return; /* the settings may be behind: writes are queued */
    forget(m);
    setting_of(m->fp, key);
    if (store_setting_get(d->store, key, &text, NULL))
        return;
    if (check(m, text, strlen(text), &gist, &e) || take_over(d, m->fp, text, &gist, &e))
        log_line(LOG_LEVEL_WARNING, "model %s: its stored profile is left alone: %s", m->conf->name,
                 e.msg);
    mem_free(text);
}

void profiles_free(struct daemon *d)
{
    for (uint32_t i = 0; i < d->n_models; i++)
        forget(&d->model[i]);
}

/* The file of a W_PROFILE or a PROFILE as a string. */
static int read_text(const json_t *body, int fd, char **ret, struct larder_err *e)
{
    const void *map = NULL;
    uint64_t bytes = 0, n = 0;
    char *text;
    int rc = field_u64(body, "bytes", FIELD_REQUIRED, PROFILE_MAX_BYTES, &bytes, e);

    if (!rc && (fd < 0 || !bytes))
        rc = larder_fail(e, LARDER_EPROTO, "the profile's memory file is missing");
    if (!rc)
        rc = memfile_map(fd, bytes, bytes, &map, &n, e);
    if (rc)
        return rc;
    text = mem_alloc(n + 1, 1);
    if (text) {
        memcpy(text, map, n);
        text[n] = '\0';
    }
    memfile_unmap(map, n);
    if (!text)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a profile");
    *ret = text;
    return 0;
}

/* ---- workers */

int profile_tell(struct worker *w, struct model *m, struct larder_err *e)
{
    uint64_t len = m->profile ? strlen(m->profile) : 0;
    int fd = -1, rc;

    if (!len || m->profile_sent)
        return 0;
    rc = memfile_from("larder-profile", m->profile, len, &fd, e);
    if (rc)
        return rc;
    rc = worker_send(w, FRAME_W_PROFILE,
                     json_pack("{ss sI}", "model", m->conf->name, "bytes", (json_int_t)len), fd, e);
    close(fd);
    m->profile_sent = !rc;
    return rc;
}

/* "key\0text\0" */
static int keep_run(struct daemon *d, void *arg, struct larder_err *e)
{
    const char *key = arg;

    return store_setting_put(d->store, key, key + strlen(key) + 1, e);
}

static int keep(struct daemon *d, const uint8_t fp[32], const char *text, struct larder_err *e)
{
    char key[80], *both;
    size_t n;

    setting_of(fp, key);
    n = strlen(key) + 1;
    both = mem_alloc(n + strlen(text) + 1, 1);
    if (!both)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a profile");
    memcpy(both, key, n);
    strcpy(both + n, text);
    write_quietly(d, keep_run, both, n + strlen(text) + 1, "profile");
    mem_free(both);
    return 0;
}

int profile_from_worker(struct worker *w, const json_t *body, int fd, struct larder_err *e)
{
    static const char *const allowed[] = {"model", "bytes", NULL};
    struct model *m = w->model;
    char *text = NULL;
    const char *name = NULL;
    struct gist gist;
    int rc = field_only(body, allowed, e);

    if (!rc)
        rc = field_str(body, "model", FIELD_REQUIRED, NAME_MAX_NS, &name, e);
    if (!rc && strcmp(name, m->conf->name))
        rc = larder_fail(e, LARDER_EPROTO, "W_PROFILE of a model that is not the job's");
    if (!rc)
        rc = read_text(body, fd, &text, e);
    if (!rc)
        rc = check(m, text, strlen(text), &gist, e);
    if (!rc && !m->profile) { /* one that a client brought meanwhile stays */
        rc = take_over(w->d, m->fp, text, &gist, e);
        if (!rc)
            rc = keep(w->d, m->fp, text, e);
        m->profile_sent = !rc;
        if (!rc)
            log_line(LOG_LEVEL_INFO, "model %s: calibrated, profile %s", m->conf->name, gist.id);
    }
    if (!rc)
        memcpy(w->job->profile, gist.id, sizeof gist.id);
    mem_free(text);
    return rc;
}

/* ---- PROFILE */

static json_t *profile_object(const struct model *m)
{
    json_t *p = m->profile ? json_loads(m->profile, 0, NULL) : NULL;
    char hex[2 * SHA256_LEN + 1];

    sha256_hex(m->fp, hex);
    return json_pack("{ss so so}", "model", m->conf->name, "fingerprint",
                     m->known ? json_string(hex) : json_null(), "profile", p ? p : json_null());
}

/* Store one, then answer. */
struct install {
    struct task task;
    struct request *r;
    struct model *m;
    uint8_t fp[32];
    struct gist gist;
    char *text;
    struct larder_err e;
    int rc;
};

static void install_run(struct task *t)
{
    struct install *x = (struct install *)t;
    char key[80];

    setting_of(x->fp, key);
    x->rc = store_setting_put(x->r->d->store, key, x->text, &x->e);
}

static void install_done(struct task *t)
{
    struct install *x = (struct install *)t;

    if (!x->rc)
        x->rc = take_over(x->r->d, x->fp, x->text, &x->gist, &x->e);
    if (x->rc)
        request_fail(x->r, &x->e);
    else
        request_ok(x->r, profile_object(x->m), -1);
    mem_free(x->text);
    mem_free(x);
}

/* A profile changes what everybody's documents are reduced to: where users are kept apart, only
 * those may bring one who could replace the daemon's files as well. */
static int may_install(const struct request *r, struct larder_err *e)
{
    if (!r->d->conf.n_ns || !r->uid || r->uid == geteuid())
        return 0;
    return larder_fail(e, LARDER_EUNSUPPORTED,
                       "where namespaces are restricted, only root and larderd's own user may "
                       "calibrate");
}

static void install(struct request *r, struct model *m)
{
    struct install *x = mem_zalloc(1, sizeof *x);
    struct larder_err e;
    int rc = x ? may_install(r, &e) : larder_fail(&e, LARDER_ENOMEM, "no memory");

    if (!rc && !m->known)
        rc = larder_fail(&e, LARDER_EBUSY, "model %s is still being opened", m->conf->name);
    if (!rc)
        rc = read_text(r->body, r->fd, &x->text, &e);
    if (!rc)
        rc = check(m, x->text, strlen(x->text), &x->gist, &e);
    if (rc) {
        if (x)
            mem_free(x->text);
        mem_free(x);
        request_fail(r, &e);
        return;
    }
    x->task = (struct task){install_run, install_done, NULL};
    x->r = r;
    x->m = m;
    memcpy(x->fp, m->fp, 32);
    task_run(r->d->writer, &x->task);
}

void handle_profile(struct request *r)
{
    const char *name = NULL;
    struct model *m = NULL;
    struct larder_err e;
    int rc = field_str(r->body, "model", FIELD_OPTIONAL, NAME_MAX_NS, &name, &e);

    if (!rc && !(m = model_for(r->d, name, &e)))
        rc = e.code;
    if (!rc && r->fd >= 0 && !json_object_get(r->body, "bytes"))
        rc = larder_fail(&e, LARDER_EPROTO, "a file without its size");
    if (rc)
        request_fail(r, &e);
    else if (json_object_get(r->body, "bytes"))
        install(r, m);
    else
        request_ok(r, profile_object(m), -1);
}

/* ---- policies that name one */

const char *policy_profile(const char *policy, size_t *ret_len)
{
    const char *at = strstr(policy, ",profile=");

    *ret_len = at ? 1 + strcspn(at + 1, ",") : 0;
    return at;
}

void policy_any_profile(const char *policy, char *out, size_t cap)
{
    size_t n;
    const char *at = policy_profile(policy, &n);

    snprintf(out, cap, "%.*s%s", at ? (int)(at - policy) : 0, policy, at ? at + n : policy);
}

/* Numbers that a profile gives where there is one. Only workers know the rules, but the spelling
 * of these keys is the protocol's. */
static bool leaves_open(const char *policy)
{
    return strstr(policy, ",pool=auto") || strstr(policy, ",lmin=auto") ||
           strstr(policy, ",tau=auto");
}

bool policy_serves(const char *want, const char *have, const struct model *m)
{
    char any[512];
    size_t n;
    const char *of = policy_profile(have, &n);

    if (policy_profile(want, &n))
        return !strcmp(want, have);
    if (!of)
        return !strcmp(want, have) && !(m && m->profile_window && leaves_open(have));
    policy_any_profile(have, any, sizeof any);
    return !strcmp(want, any) &&
           (!m || !*m->profile_id ||
            !strncmp(of + strlen(",profile="), m->profile_id, PROFILE_ID_LEN));
}
