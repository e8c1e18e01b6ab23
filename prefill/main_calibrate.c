/* main_calibrate.c - larder-prefill calibrate: what a model's heads need, measured once.
 *
 * The one idea: every text is replayed once; one threshold over all layers and heads then
 * says, for each budget, what share of its rows each head would keep. The mean over texts
 * is the model's table. It is written as JSON under the model's fingerprint, and read back
 * only for the same model. */
#include "main_common.h"

#include <string.h>

#include "mem.h"
#include "offline.h"
#include "sha256.h"

#define CHUNK 512u
#define SINK 4u
#define MAX_PROFILE (16u << 20)

static const double budgets[] = {0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.75};
#define N_BUDGETS (sizeof budgets / sizeof budgets[0])

/* ---- measuring */

struct measured {
    const struct kv_geom *geom;
    uint32_t n;
    float **score; /* [n_layers * n_kv_heads][n], first level owned */
};

static void measured_done(struct measured *m)
{
    for (uint32_t i = 0; m->score && i < m->geom->n_layers * m->geom->n_kv_heads; i++)
        mem_free(m->score[i]);
    mem_free(m->score);
}

static int take_layer(void *arg, uint32_t layer, const float *score, struct larder_err *e)
{
    struct measured *m = arg;

    for (uint32_t g = 0; g < m->geom->n_kv_heads; g++) {
        float **to = &m->score[layer * m->geom->n_kv_heads + g];

        *to = mem_dup(score + (uint64_t)g * m->n, m->n * sizeof *score);
        if (!*to)
            return larder_fail(e, LARDER_ENOMEM, "no memory for scores of layer %u", layer);
    }
    return 0;
}

/* Add the shares of one text to sum[N_BUDGETS][n_heads]. */
static int measure_text(const struct engine_setup *s, const char *path, double *sum,
                        struct larder_err *e)
{
    const struct kv_geom *g = &s->backend->p->geom;
    uint32_t n_heads = g->n_layers * g->n_kv_heads;
    struct measured m = {.geom = g, .score = mem_zalloc(n_heads, sizeof(float *))};
    float *share = mem_alloc(n_heads, sizeof *share);
    struct document d = {0};
    int rc = m.score && share ? document_read(s, path, NULL, &d, e)
                              : larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");
    struct engine_doc doc = {d.ids, d.n, s->tmpl, NULL};

    m.n = d.n;
    if (!rc)
        rc = offline_scores(s->backend, &doc, CHUNK, take_layer, &m, e);
    for (uint32_t i = 0; i < N_BUDGETS && !rc; i++) {
        rc =
            shares_measure((const float *const *)m.score, n_heads, d.n, SINK, budgets[i], share, e);
        for (uint32_t h = 0; h < n_heads && !rc; h++)
            sum[i * n_heads + h] += share[h];
    }
    measured_done(&m);
    mem_free(share);
    document_done(&d);
    return rc ? larder_fail_in(e, rc, "%.200s", path) : 0;
}

/* ---- the profile */

static json_t *json_profile(struct engine_setup *s, const double *sum, uint32_t n_texts,
                            struct larder_err *e)
{
    const struct kv_geom *g = &s->backend->p->geom;
    uint32_t n_heads = g->n_layers * g->n_kv_heads;
    uint8_t fp[32];
    char hex[65];
    json_t *all = json_array();

    if (model_fingerprint(s->model, fp, e)) {
        json_decref(all);
        return NULL;
    }
    sha256_hex(fp, hex);
    for (uint32_t i = 0; i < N_BUDGETS; i++) {
        json_t *list = json_array();

        for (uint32_t h = 0; h < n_heads; h++)
            json_array_append_new(list, json_real(sum[i * n_heads + h] / n_texts));
        json_array_append_new(all, json_pack("{sf so}", "budget", budgets[i], "share", list));
    }
    return json_pack("{ss si sI sI sI so}", "model_fingerprint", hex, "version", 1, "n_layers",
                     (json_int_t)g->n_layers, "n_kv_heads", (json_int_t)g->n_kv_heads, "n_texts",
                     (json_int_t)n_texts, "shares", all);
}

static int take_budget(const json_t *o, struct shares *s, struct larder_err *e)
{
    const json_t *list = json_object_get(o, "share"), *v;
    float *share = mem_zalloc(s->n_heads, sizeof *share);
    size_t i;
    int rc = share ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for a table of shares");

    if (!rc && json_array_size(list) != s->n_heads)
        rc = larder_fail(e, LARDER_EINVAL, "a budget has %zu shares; the model has %u heads",
                         json_array_size(list), s->n_heads);
    if (!rc)
        json_array_foreach (list, i, v)
            share[i] = (float)json_number_value(v);
    if (!rc)
        rc = shares_add(s, json_number_value(json_object_get(o, "budget")), share, e);
    mem_free(share);
    return rc;
}

static int take_profile(const json_t *o, struct model *m, struct shares *s, struct larder_err *e)
{
    const char *of = json_string_value(json_object_get(o, "model_fingerprint"));
    const json_t *list = json_object_get(o, "shares"), *v;
    uint8_t fp[32];
    char hex[65];
    size_t i;
    int rc = model_fingerprint(m, fp, e);

    if (rc)
        return rc;
    sha256_hex(fp, hex);
    if (!of || strcmp(of, hex))
        return larder_fail(e, LARDER_EINVAL,
                           "the profile is of model %.16s..., this one is %.16s...; calibrate it",
                           of ? of : "?", hex);
    if (json_integer_value(json_object_get(o, "version")) != 1 || !json_array_size(list))
        return larder_fail(e, LARDER_EVERSION, "not a profile of version 1");
    json_array_foreach (list, i, v) {
        rc = take_budget(v, s, e);
        if (rc)
            return rc;
    }
    return 0;
}

int profile_read(const char *path, struct model *m, struct shares **ret, struct larder_err *e)
{
    const struct kv_geom *g = &model_params(m)->geom;
    struct shares *s = NULL;
    json_t *o = NULL;
    char *text = NULL;
    size_t len = 0;
    int rc = file_read(path, MAX_PROFILE, &text, &len, e);

    if (!rc && !(o = json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL)))
        rc = larder_fail(e, LARDER_EINVAL, "not JSON");
    if (!rc)
        rc = shares_new(&s, g->n_layers * g->n_kv_heads, e);
    if (!rc)
        rc = take_profile(o, m, s, e);
    json_decref(o);
    mem_free(text);
    if (rc) {
        shares_free(s);
        return larder_fail_in(e, rc, "%.200s", path);
    }
    *ret = s;
    return 0;
}

/* ---- the command */

int main_calibrate(const struct options *o, struct larder_err *e)
{
    struct engine_setup s = {0};
    double *sum = NULL;
    json_t *j;
    int rc;

    if (!o->n_args)
        return main_usage(e, "calibrate needs texts");
    rc = setup_open(o, &s, e);
    if (!rc) {
        sum = mem_zalloc(N_BUDGETS * (uint64_t)s.backend->p->geom.n_layers *
                             s.backend->p->geom.n_kv_heads,
                         sizeof *sum);
        rc = sum ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");
    }
    for (int i = 0; i < o->n_args && !rc; i++)
        rc = measure_text(&s, o->arg[i], sum, e);
    if (!rc) {
        j = json_profile(&s, sum, (uint32_t)o->n_args, e);
        rc = json_print(j, e);
    }
    mem_free(sum);
    setup_done(&s);
    return rc;
}
