/* main_profile.c - a model's calibration: measured into JSON, and read back from it.
 *
 * The one idea: the table of shares comes first and the JSON is made of its numbers, in
 * enough digits to give them back bit by bit, so that a profile means the same wherever
 * it is read. */
#include "main_common.h"

#include <string.h>
#include <time.h>

#include "mem.h"
#include "profile.h"
#include "sha256.h"

#define DIGITS JSON_REAL_PRECISION(9) /* of an f32 */

/* ---- reading */

static int to_shares(const struct profile *p, struct shares **ret, struct larder_err *e)
{
    uint32_t n_heads = p->n_layers * p->n_kv_heads;
    struct shares *s = NULL;
    int rc = shares_new(&s, n_heads, e);

    for (uint32_t i = 0; i < p->n_budgets && !rc; i++)
        rc = shares_add(s, p->budget[i], p->share + (uint64_t)i * n_heads, e);
    if (!rc)
        rc = shares_set_window(s, &p->window, e);
    if (rc) {
        shares_free(s);
        return rc;
    }
    *ret = s;
    return 0;
}

int profile_take(const char *text, size_t len, struct model *m, struct shares **ret,
                 struct larder_err *e)
{
    const struct kv_geom *g = &model_params(m)->geom;
    struct profile p = {0};
    uint8_t fp[32];
    int rc = model_fingerprint(m, fp, e);

    if (!rc)
        rc = profile_parse(text, len, &p, e);
    if (!rc)
        rc = profile_fits(&p, fp, g->n_layers, g->n_kv_heads, e);
    if (!rc)
        rc = to_shares(&p, ret, e);
    profile_done(&p);
    return rc;
}

int profile_read(const char *path, struct model *m, struct shares **ret, struct larder_err *e)
{
    char *text = NULL;
    size_t len = 0;
    int rc = file_read(path, PROFILE_MAX_BYTES, &text, &len, e);

    if (!rc) {
        rc = profile_take(text, len, m, ret, e);
        if (rc)
            larder_fail_in(e, rc, "%.200s", path);
    }
    mem_free(text);
    return rc;
}

/* ---- measuring */

int measuring_open(struct measuring *m, const struct engine_setup *s, uint32_t n_texts,
                   const struct calibrate_watch *watch, struct larder_err *e)
{
    *m = (struct measuring){.s = s, .texts = json_array()};
    if (!m->texts)
        return larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");
    return calibrate_open(&m->c, s->backend, n_texts, watch, e);
}

void measuring_done(struct measuring *m)
{
    calibrate_free(m->c);
    json_decref(m->texts);
    *m = (struct measuring){0};
}

static int add_document(struct measuring *m, const char *name, const struct document *d,
                        struct larder_err *e)
{
    struct engine_doc doc = {d->ids, d->n, m->s->tmpl, NULL};
    int rc = calibrate_add(m->c, &doc, e);

    if (rc)
        return rc;
    if (json_array_append_new(m->texts,
                              json_pack("{s:s, s:I}", "name", name, "n_tokens", (json_int_t)d->n)))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");
    return rc;
}

int measuring_builtin(struct measuring *m, struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < CALIBRATION_TEXTS && !rc; i++) {
        struct calibration_text t = calibration_text(i);
        struct document d = {0};

        rc = document_from_text(m->s, t.text, t.len, &d, e);
        if (!rc)
            rc = add_document(m, t.name, &d, e);
        document_done(&d);
        if (rc)
            larder_fail_in(e, rc, "%s", t.name);
    }
    return rc;
}

/* The last part of a path, in what a JSON string and a profile can hold. */
static void text_name(const char *path, char out[PROFILE_MAX_NAME + 1])
{
    const char *slash = strrchr(path, '/');
    size_t n = 0;

    for (const char *s = slash ? slash + 1 : path; *s && n < PROFILE_MAX_NAME; s++)
        out[n++] = *s >= 0x20 && *s < 0x7f ? *s : '_';
    out[n] = '\0';
}

int measuring_file(struct measuring *m, const char *path, struct larder_err *e)
{
    char name[PROFILE_MAX_NAME + 1];
    struct document d = {0};
    int rc = document_read(m->s, path, NULL, &d, e);

    if (rc)
        return rc;
    text_name(path, name);
    rc = add_document(m, name, &d, e);
    document_done(&d);
    return rc ? larder_fail_in(e, rc, "%.200s", path) : 0;
}

/* ---- writing */

static json_t *json_shares(const struct shares *s)
{
    json_t *all = json_array();

    for (uint32_t i = 0; i < s->n_budgets; i++) {
        json_t *list = json_array();

        for (uint32_t h = 0; h < s->n_heads; h++)
            json_array_append_new(list, json_real(s->share[(uint64_t)i * s->n_heads + h]));
        json_array_append_new(
            all, json_pack("{s:f, s:o}", "budget", (double)s->budget[i], "share", list));
    }
    return all;
}

/* NULL: nothing was measured. */
static json_t *json_window(const struct profile_window *w)
{
    if (!w->pool)
        return NULL;
    if (!w->l_min)
        return json_pack("{s:I}", "pool", (json_int_t)w->pool);
    return json_pack("{s:I, s:I, s:f}", "pool", (json_int_t)w->pool, "lmin", (json_int_t)w->l_min,
                     "tau", w->tau_milli / 1000.0);
}

static json_t *json_profile(const struct measuring *m, const char *fingerprint,
                            const struct shares *s)
{
    const struct backend *b = m->s->backend;
    const struct kv_geom *g = &b->p->geom;

    return json_pack("{s:i, s:s, s:s, s:I, s:I, s:I, s:s, s:s, s:s, s:O, s:o, s:o*}", "version",
                     s->window.pool ? 2 : 1, "model_fingerprint", fingerprint, "id", s->id,
                     "n_layers", (json_int_t)g->n_layers, "n_kv_heads", (json_int_t)g->n_kv_heads,
                     "measured", (json_int_t)time(NULL), "backend", b->ops->name, "dtype",
                     kv_dtype_name(b->elem), "template", m->s->tmpl->name, "texts", m->texts,
                     "shares", json_shares(s), "window", json_window(&s->window));
}

int measuring_end(struct measuring *m, struct shares **ret_shares, json_t **ret_profile,
                  struct larder_err *e)
{
    struct shares *s = NULL;
    uint8_t fp[32];
    char hex[65];
    json_t *j;
    int rc = model_fingerprint(m->s->model, fp, e);

    if (!rc)
        rc = calibrate_shares(m->c, &s, e);
    if (rc)
        return rc;
    sha256_hex(fp, hex);
    j = json_profile(m, hex, s);
    if (!j) {
        shares_free(s);
        return larder_fail(e, LARDER_ENOMEM, "no memory for a profile");
    }
    *ret_shares = s;
    *ret_profile = j;
    return 0;
}

char *profile_text(const json_t *profile)
{
    return json_dumps(profile, JSON_COMPACT | DIGITS);
}
