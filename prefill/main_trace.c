/* main_trace.c - larder-prefill trace: prefill and selection, nothing stored.
 *
 * Several policies share one opened model, and neighbours that can a pass, so that comparing
 * policies, or checking many against recorded results, computes little twice. */
#include "main_past.h"

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

struct tracing {
    struct engine_setup s;
    struct document doc;
    bool json;
};

static int trace_policy(void *arg, const struct policy *policy, struct past *p,
                        struct larder_err *e)
{
    const struct tracing *t = arg;

    if (t->json)
        return json_print(json_trace(t->s.backend, policy, &p->result, &p->cache), e);
    print_table(&t->s, policy, &p->result, &p->cache);
    return 0;
}

int main_trace(const struct options *o, struct larder_err *e)
{
    const char *text = option_get(o, OPTION_FILE), *ids = option_get(o, OPTION_TOKENS);
    struct tracing t = {.json = o->n[OPTION_JSON]};
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
        rc = setup_open(o, &t.s, e);
    if (!rc)
        rc = document_read(&t.s, text, ids, &t.doc, e);
    if (!rc)
        rc = past_each(&t.s, &t.doc, o->value[OPTION_POLICY], o->n[OPTION_POLICY], false,
                       trace_policy, &t, e);
    document_done(&t.doc);
    setup_done(&t.s);
    return rc;
}
