/* profile.c - a profile's fields, one after the other; nothing is allocated by its own word.
 *
 * The one idea: every number is capped by a constant or by the bytes that came before room is
 * made for it, and the name that the profile gives itself must follow from its numbers. */
#include "profile.h"

#include <math.h>
#include <string.h>

#include "frame.h"
#include "geom.h"
#include "mem.h"
#include "sha256.h"

static int bad(struct larder_err *e, const char *what)
{
    return larder_fail(e, LARDER_EINVAL, "%s", what);
}

static int read_head(const json_t *o, struct profile *p, struct larder_err *e)
{
    static const char *const allowed[] = {
        "version", "model_fingerprint", "id",    "n_layers", "n_kv_heads", "measured", "backend",
        "dtype",   "template",          "texts", "shares",   "window",     NULL};
    const char *id = NULL, *word = NULL;
    uint64_t version = 0, measured;
    int rc = field_u64(o, "version", FIELD_REQUIRED, UINT64_MAX, &version, e);

    if (!rc && (version < 1 || version > PROFILE_VERSION))
        return larder_fail(e, LARDER_EVERSION, "version %llu; this program reads 1 to %d",
                           (unsigned long long)version, PROFILE_VERSION);
    if (!rc)
        rc = field_only(o, allowed, e);
    if (!rc && (version > 1) != (json_object_get(o, "window") != NULL))
        rc = bad(e, "version 1 has no window, version 2 has one");
    if (!rc)
        rc = field_hex32(o, "model_fingerprint", FIELD_REQUIRED, p->model_fp, NULL, e);
    if (!rc)
        rc = field_str(o, "id", FIELD_REQUIRED, PROFILE_ID_LEN, &id, e);
    if (!rc)
        rc = field_u32(o, "n_layers", FIELD_REQUIRED, KV_MAX_LAYERS, &p->n_layers, e);
    if (!rc)
        rc = field_u32(o, "n_kv_heads", FIELD_REQUIRED, KV_MAX_HEADS, &p->n_kv_heads, e);
    if (!rc)
        rc = field_u64(o, "measured", FIELD_REQUIRED, UINT64_MAX, &measured, e);
    if (!rc)
        rc = field_str(o, "backend", FIELD_REQUIRED, 15, &word, e);
    if (!rc)
        rc = field_str(o, "dtype", FIELD_REQUIRED, 15, &word, e);
    if (!rc)
        rc = field_str(o, "template", FIELD_REQUIRED, KV_MAX_TEMPLATE - 1, &word, e);
    if (rc)
        return rc;
    if (!profile_id_valid(id) || !p->n_layers || !p->n_kv_heads)
        return bad(e, "an id, layers or heads that cannot be");
    memcpy(p->id, id, sizeof p->id);
    return 0;
}

static int read_texts(const json_t *o, struct larder_err *e)
{
    static const char *const allowed[] = {"name", "n_tokens", NULL};
    const json_t *list = NULL, *v;
    size_t i;
    int rc = field_array(o, "texts", FIELD_REQUIRED, PROFILE_MAX_TEXTS, &list, e);

    json_array_foreach (list, i, v) {
        const char *name;
        uint32_t n;

        if (!rc && !json_is_object(v))
            rc = bad(e, "a text that is no object");
        if (!rc)
            rc = field_only(v, allowed, e);
        if (!rc)
            rc = field_str(v, "name", FIELD_REQUIRED, PROFILE_MAX_NAME, &name, e);
        if (!rc)
            rc = field_u32(v, "n_tokens", FIELD_REQUIRED, KV_MAX_CTX, &n, e);
    }
    return rc;
}

static int read_number(const json_t *v, float *ret, struct larder_err *e)
{
    double x = json_number_value(v);

    if (!json_is_number(v) || !(x >= 0 && x <= 1))
        return bad(e, "a budget or a share that is not a number from 0 to 1");
    *ret = (float)x;
    return 0;
}

static int read_budget(const json_t *o, struct profile *p, struct larder_err *e)
{
    static const char *const allowed[] = {"budget", "share", NULL};
    uint32_t n_heads = p->n_layers * p->n_kv_heads, i = p->n_budgets;
    float *share = p->share + (uint64_t)i * n_heads;
    const json_t *list = NULL;
    int rc = json_is_object(o) ? field_only(o, allowed, e) : bad(e, "a budget that is no object");

    if (!rc)
        rc = read_number(json_object_get(o, "budget"), &p->budget[i], e);
    if (!rc && !(p->budget[i] > (i ? p->budget[i - 1] : 0)))
        rc = bad(e, "budgets that do not ascend");
    if (!rc)
        rc = field_array(o, "share", FIELD_REQUIRED, n_heads, &list, e);
    if (!rc && json_array_size(list) != n_heads)
        rc = larder_fail(e, LARDER_EINVAL, "a budget with %zu shares for %u heads",
                         json_array_size(list), n_heads);
    for (uint32_t h = 0; h < n_heads && !rc; h++)
        rc = read_number(json_array_get(list, h), &share[h], e);
    p->n_budgets++;
    return rc;
}

static int read_shares(const json_t *o, size_t len, struct profile *p, struct larder_err *e)
{
    uint64_t n_heads = (uint64_t)p->n_layers * p->n_kv_heads, n;
    const json_t *list = NULL;
    int rc = field_array(o, "shares", FIELD_REQUIRED, PROFILE_MAX_BUDGETS, &list, e);

    if (rc)
        return rc;
    n = json_array_size(list) * n_heads;
    if (!n || n > len / 2) /* a share is a digit and a comma at least */
        return bad(e, "no budgets, or fewer shares than it says");
    p->share = mem_alloc(n, sizeof *p->share);
    if (!p->share)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a profile");
    for (size_t i = 0; i < json_array_size(list) && !rc; i++)
        rc = read_budget(json_array_get(list, i), p, e);
    return rc;
}

/* At most three digits behind the point: the thousandths are what is used and hashed. */
static int read_tau(const json_t *v, uint32_t *ret, struct larder_err *e)
{
    double x = 1000 * json_number_value(v), milli = round(x);

    if (!json_is_number(v) || !(milli >= 1 && milli <= 1000) || fabs(x - milli) > 1e-6)
        return bad(e, "a tau that is not a number of thousandths from 0.001 to 1");
    *ret = (uint32_t)milli;
    return 0;
}

/* What follows is checked against the model's layers, so that a policy can use it as it is. */
static int read_window(const json_t *o, struct profile *p, struct larder_err *e)
{
    static const char *const allowed[] = {"pool", "lmin", "tau", NULL};
    const json_t *w = json_object_get(o, "window"), *tau;
    int rc;

    if (!w)
        return 0;
    if (!json_is_object(w))
        return bad(e, "a window that is no object");
    rc = field_only(w, allowed, e);
    if (!rc)
        rc = field_u32(w, "pool", FIELD_REQUIRED, PROFILE_MAX_POOL, &p->window.pool, e);
    if (!rc && p->window.pool % 2 == 0)
        rc = bad(e, "a pool that is not odd");
    tau = json_object_get(w, "tau");
    if (rc || (!tau && !json_object_get(w, "lmin")))
        return rc;
    rc = field_u32(w, "lmin", FIELD_REQUIRED, p->n_layers - 1, &p->window.l_min, e);
    if (!rc && !p->window.l_min)
        rc = bad(e, "lmin 0, which has no layers before it to compare");
    return rc ? rc : read_tau(tau, &p->window.tau_milli, e);
}

static int check_id(const struct profile *p, struct larder_err *e)
{
    char id[PROFILE_ID_LEN + 1];
    int rc = profile_id(p->n_layers * p->n_kv_heads, p->n_budgets, p->budget, p->share, &p->window,
                        id, e);

    if (!rc && strcmp(id, p->id))
        rc = larder_fail(e, LARDER_EINVAL, "it says that it is %s, but its numbers are %s", p->id,
                         id);
    return rc;
}

int profile_parse(const char *text, size_t len, struct profile *ret, struct larder_err *e)
{
    struct larder_err why = {0, ""};
    struct profile p = {0};
    int rc = 0;

    if (len > PROFILE_MAX_BYTES)
        return larder_fail(e, LARDER_ETOOBIG, "a profile of %zu bytes; the limit is %u", len,
                           PROFILE_MAX_BYTES);
    rc = frame_parse_json(text, len, &p.json, &why);
    if (!rc)
        rc = read_head(p.json, &p, &why);
    if (!rc)
        rc = read_texts(p.json, &why);
    if (!rc)
        rc = read_shares(p.json, len, &p, &why);
    if (!rc)
        rc = read_window(p.json, &p, &why);
    if (!rc)
        rc = check_id(&p, &why);
    if (rc) {
        profile_done(&p);
        return larder_fail(e, rc == LARDER_EPROTO ? LARDER_EINVAL : rc, "not a profile: %.300s",
                           why.msg);
    }
    *ret = p;
    return 0;
}

void profile_done(struct profile *p)
{
    json_decref(p->json);
    mem_free(p->share);
    *p = (struct profile){0};
}

int profile_fits(const struct profile *p, const uint8_t model_fp[32], uint32_t n_layers,
                 uint32_t n_kv_heads, struct larder_err *e)
{
    char of[2 * SHA256_LEN + 1], is[2 * SHA256_LEN + 1];

    sha256_hex(p->model_fp, of);
    sha256_hex(model_fp, is);
    if (strcmp(of, is))
        return larder_fail(e, LARDER_EINVAL,
                           "the profile is of model %.16s..., this one is %.16s...; calibrate it",
                           of, is);
    if (p->n_layers != n_layers || p->n_kv_heads != n_kv_heads)
        return larder_fail(e, LARDER_EINVAL,
                           "the profile has %u layers of %u heads, the model %u of %u", p->n_layers,
                           p->n_kv_heads, n_layers, n_kv_heads);
    return 0;
}
