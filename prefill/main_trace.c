/* main_trace.c - larder-prefill trace: prefill and selection, nothing stored.
 *
 * Several policies share one opened model, so that comparing policies, or checking
 * many against recorded results, reads the document and the model's tables once. */
#include "main_common.h"

#include <stdio.h>

#include "geom.h"
#include "tokenizer.h"

/* How many rows the heads of a layer keep: "256" or "100-256". */
static void print_layer(const struct cache *c, uint32_t layer)
{
    const struct cached_head *h = &c->head[layer * c->geom.n_kv_heads];
    uint32_t min = UINT32_MAX, max = 0;

    for (uint32_t g = 0; g < c->geom.n_kv_heads; g++) {
        min = h[g].n_rows < min ? h[g].n_rows : min;
        max = h[g].n_rows > max ? h[g].n_rows : max;
    }
    if (min == max)
        printf("%10u", max);
    else
        printf("%5u-%4u", min, max);
}

static void print_layers(const struct engine_result *r, const struct cache *c)
{
    uint32_t at = 0;

    printf("layer      rows      variance     ratio\n");
    for (uint32_t l = 0; l < c->geom.n_layers; l++) {
        printf("%5u", l);
        print_layer(c, l);
        if (at < r->n_trace && r->trace[at].layer == l) {
            printf("  %12.4f  %8.4f", r->trace[at].value, r->trace[at].ratio);
            at++;
        }
        printf("%s\n", (int32_t)l == r->sel_layer ? "  selected" : "");
    }
}

static void print_table(const struct engine_setup *s, const struct policy *p,
                        const struct engine_result *r, const struct cache *c)
{
    const struct backend *b = s->backend;
    char policy[POLICY_TEXT_MAX];
    uint64_t rows = 0;
    uint32_t n_heads = c->geom.n_layers * c->geom.n_kv_heads;

    policy_print(p, policy);
    for (uint32_t i = 0; i < n_heads; i++)
        rows += c->head[i].n_rows;
    printf("policy     %s\n", policy);
    printf("tokens     %u, decoding goes on at position %u\n", r->n_ctx, r->next_pos);
    if (r->sel_layer < 0)
        printf("selection  none\n");
    else
        printf("selection  after layer %d, %u tokens passed on\n", r->sel_layer, r->n_selected);
    printf("rows kept  %.1f %% of %llu\n", 100.0 * (double)rows / ((double)n_heads * r->n_ctx),
           (unsigned long long)n_heads * r->n_ctx);
    printf("computed   %s, %s, %s: %.0f ms, of which %.0f ms reading weights\n", b->ops->name,
           kv_dtype_name(b->elem), b->isa, r->prefill_ms, r->load_ms);
    print_layers(r, c);
}

static int trace_one(const struct engine_setup *s, const struct document *d, const char *text,
                     bool json, struct larder_err *e)
{
    struct engine_result r = {0};
    struct cache c = {0};
    struct engine_sink sink = {&c, cache_add, NULL};
    struct engine_doc doc = {d->ids, d->n, s->tmpl, s->shares};
    struct policy p;
    int rc = setup_policy(s, text, &p, e);

    if (!rc)
        rc = cache_init(&c, s->backend, false, e);
    if (!rc)
        rc = engine_prefill(s->backend, &doc, &p, &sink, &r, e);
    if (!rc && json)
        rc = json_print(json_trace(s->backend, &p, &r, &c), e);
    else if (!rc)
        print_table(s, &p, &r, &c);
    engine_result_done(&r);
    cache_done(&c);
    return rc;
}

int main_trace(const struct options *o, struct larder_err *e)
{
    const char *text = option_get(o, OPTION_FILE), *ids = option_get(o, OPTION_TOKENS);
    struct engine_setup s = {0};
    struct document d = {0};
    struct policy p;
    int rc = 0;

    if (o->n_args)
        return main_usage(e, "unexpected argument '%.64s'", o->arg[0]);
    if (!text == !ids)
        return main_usage(e, "trace needs one of --file and --tokens");
    if (!o->n[OPTION_POLICY])
        return main_usage(e, "trace needs a --policy");
    for (uint32_t i = 0; i < o->n[OPTION_POLICY] && !rc; i++) /* before anything is computed */
        rc = policy_parse(o->value[OPTION_POLICY][i], &p, e);
    if (!rc)
        rc = setup_open(o, &s, e);
    if (!rc)
        rc = document_read(&s, text, ids, &d, e);
    for (uint32_t i = 0; i < o->n[OPTION_POLICY] && !rc; i++)
        rc = trace_one(&s, &d, o->value[OPTION_POLICY][i], o->n[OPTION_JSON], e);
    document_done(&d);
    setup_done(&s);
    return rc;
}
