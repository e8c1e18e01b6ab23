/* main_json.c - results of the engine as JSON, and files of JSON lines.
 *
 * The one idea: an allocation failure anywhere makes the whole object NULL (jansson's
 * _new functions pass NULL on), and json_print() turns that into one error. */
#include "main_common.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "geom.h"
#include "mem.h"

/* JSON has no infinity; a ratio to a zero variance is printed as the largest power of ten. */
#define JSON_INFINITY 1e308

json_t *json_top_logits(const float *logits, uint32_t n_vocab)
{
    uint32_t best[TOP_LOGITS], n = 0;
    json_t *top = json_array();

    for (uint32_t i = 0; i < n_vocab; i++) {
        uint32_t at = n < TOP_LOGITS ? n++ : TOP_LOGITS;

        while (at > 0 && logits[i] > logits[best[at - 1]]) {
            if (at < TOP_LOGITS)
                best[at] = best[at - 1];
            at--;
        }
        if (at < TOP_LOGITS)
            best[at] = i;
    }
    for (uint32_t i = 0; i < n; i++)
        json_array_append_new(top, json_pack("[If]", (json_int_t)best[i], (double)logits[best[i]]));
    return top;
}

json_t *json_variance(const struct engine_result *r)
{
    json_t *all = json_array();

    for (uint32_t i = 0; i < r->n_trace; i++) {
        const struct variance_point *v = &r->trace[i];

        json_array_append_new(all, json_pack("{sIsfsf}", "layer", (json_int_t)v->layer, "value",
                                             v->value, "ratio",
                                             isinf(v->ratio) ? JSON_INFINITY : v->ratio));
    }
    return all;
}

json_t *json_certificate(const struct certificate *c)
{
    if (!c->n_probes)
        return json_null();
    return json_pack("{sI sI sf sf sf sI}", "probes", (json_int_t)c->n_probes, "tokens",
                     (json_int_t)c->n_tokens, "kl", c->kl, "agreement", c->agreement, "worst_kl",
                     c->worst_kl, "worst_at", (json_int_t)c->worst_at);
}

static json_t *json_positions(const uint32_t *pos, uint32_t n)
{
    json_t *all = json_array();

    for (uint32_t i = 0; i < n; i++)
        json_array_append_new(all, json_integer(pos[i]));
    return all;
}

static json_t *json_rows(const struct cache *c)
{
    json_t *layers = json_array();

    for (uint32_t l = 0; l < c->geom.n_layers; l++) {
        json_t *heads = json_array();

        for (uint32_t g = 0; g < c->geom.n_kv_heads; g++) {
            const struct cached_head *h = &c->head[l * c->geom.n_kv_heads + g];

            json_array_append_new(heads, json_positions(h->position, h->n_rows));
        }
        json_array_append_new(layers, heads);
    }
    return layers;
}

json_t *json_device(const struct backend *b)
{
    if (!*b->device)
        return NULL;
    return json_pack("{ss sI sI}", "name", b->device, "planned_bytes",
                     (json_int_t)b->device_planned, "peak_bytes", (json_int_t)b->device_peak);
}

json_t *json_trace(const struct backend *b, const struct policy *p, const struct engine_result *r,
                   const struct cache *c)
{
    char policy[POLICY_TEXT_MAX];

    policy_print(p, policy);
    return json_pack("{sI sI ss so so so so so so ss ss ss sf sf sI so*}", "n_ctx",
                     (json_int_t)r->n_ctx, "next_pos", (json_int_t)r->next_pos, "policy", policy,
                     "sel_layer", r->sel_layer < 0 ? json_null() : json_integer(r->sel_layer),
                     "rank_variance", json_variance(r), "selected",
                     r->selected ? json_positions(r->selected, r->n_selected) : json_null(), "rows",
                     json_rows(c), "top_logits", json_top_logits(r->logits, b->p->n_vocab),
                     "certificate", json_certificate(&r->certificate), "backend", b->ops->name,
                     "dtype", kv_dtype_name(b->elem), "isa", b->isa, "prefill_ms", r->prefill_ms,
                     "load_ms", r->load_ms, "peak_bytes", (json_int_t)peak_bytes(), "device",
                     json_device(b));
}

int json_print(json_t *j, struct larder_err *e)
{
    int rc = 0;

    if (!j)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the answer");
    if (json_dumpf(j, stdout, JSON_COMPACT | JSON_REAL_PRECISION(12)) || putchar('\n') == EOF ||
        fflush(stdout))
        rc = larder_fail(e, LARDER_EIO, "cannot write the answer to standard output");
    json_decref(j);
    return rc;
}

/* ---- lines */

int json_lines_open(struct json_lines *l, const char *path, struct larder_err *e)
{
    *l = (struct json_lines){.path = path};
    return file_read(path, MAIN_MAX_DOCUMENT, &l->text, &l->len, e);
}

int json_lines_next(struct json_lines *l, json_t **ret, struct larder_err *e)
{
    json_error_t why;

    *ret = NULL;
    while (l->at < l->len && !*ret) {
        const char *line = l->text + l->at, *end = memchr(line, '\n', l->len - l->at);
        size_t n = end ? (size_t)(end - line) : l->len - l->at;

        l->at += n + 1;
        l->line++;
        if (strspn(line, " \t\r") >= n)
            continue;
        *ret = json_loadb(line, n, JSON_REJECT_DUPLICATES, &why);
        if (!*ret)
            return larder_fail(e, LARDER_EINVAL, "%.200s, line %u is not JSON: %.160s", l->path,
                               l->line, why.text);
    }
    if (*ret && !json_is_object(*ret)) {
        json_decref(*ret);
        *ret = NULL;
        return larder_fail(e, LARDER_EINVAL, "%.200s, line %u is not a JSON object", l->path,
                           l->line);
    }
    return 0;
}

void json_lines_done(struct json_lines *l)
{
    mem_free(l->text);
    *l = (struct json_lines){0};
}
