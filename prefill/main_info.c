/* main_info.c - larder-prefill info: what a model file says about itself. */
#include "main_common.h"

#include <stdio.h>

#include "geom.h"
#include "sha256.h"
#include "tokenizer.h"

static void print_info(const struct model_params *p, const struct tokenizer *t, const char *tmpl,
                       const char *fp, const char *tok_fp)
{
    printf("name        %s\n", *p->name ? p->name : "(none)");
    printf("arch        %s\n", p->arch);
    printf("layers      %u, hidden %u, feed-forward %u\n", p->geom.n_layers, p->n_hidden, p->n_ff);
    printf("heads       %u, KV heads %u, head dim %u\n", p->geom.n_heads, p->geom.n_kv_heads,
           p->geom.head_dim);
    printf("positions   %u, rope theta %g\n", p->n_positions, p->rope_theta);
    printf("vocabulary  %u, end token %lld\n", p->n_vocab, (long long)tokenizer_eos(t));
    printf("template    %s\n", tmpl);
    printf("model       %s\n", fp);
    printf("tokenizer   %s\n", tok_fp);
}

static json_t *json_info(const struct model_params *p, const struct tokenizer *t, const char *tmpl,
                         const char *fp, const char *tok_fp)
{
    return json_pack("{ss ss sI sI sI sI sI sI sI sI sf sf sI ss ss ss}", "name", p->name, "arch",
                     p->arch, "n_layers", (json_int_t)p->geom.n_layers, "n_heads",
                     (json_int_t)p->geom.n_heads, "n_kv_heads", (json_int_t)p->geom.n_kv_heads,
                     "head_dim", (json_int_t)p->geom.head_dim, "n_hidden", (json_int_t)p->n_hidden,
                     "n_ff", (json_int_t)p->n_ff, "n_vocab", (json_int_t)p->n_vocab, "n_positions",
                     (json_int_t)p->n_positions, "rope_theta", p->rope_theta, "norm_eps",
                     p->norm_eps, "eos", (json_int_t)tokenizer_eos(t), "template", tmpl,
                     "fingerprint", fp, "tokenizer_fingerprint", tok_fp);
}

int main_info(const struct options *o, struct larder_err *e)
{
    struct model *m = NULL;
    const struct tokenizer *t;
    uint8_t fp[32], tok_fp[32];
    char hex[65], tok_hex[65];
    int rc;

    if (o->n[OPTION_MODEL] != 1 || o->n_args)
        return main_usage(e, "info needs one --model and nothing else");
    rc = model_open(&m, option_get(o, OPTION_MODEL), e);
    if (!rc)
        rc = model_fingerprint(m, fp, e);
    if (rc) {
        model_close(m);
        return rc;
    }
    t = model_tokenizer(m);
    tokenizer_fingerprint(t, tok_fp);
    sha256_hex(fp, hex);
    sha256_hex(tok_fp, tok_hex);
    if (o->n[OPTION_JSON])
        rc = json_print(json_info(model_params(m), t, model_template_name(m), hex, tok_hex), e);
    else
        print_info(model_params(m), t, model_template_name(m), hex, tok_hex);
    model_close(m);
    return rc;
}
