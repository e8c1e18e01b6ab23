/* main_info.c - larder-prefill info: what a model file says about itself, what would compute
 * here, and how policies are spelled: all that a result is identified by. */
#include "main_common.h"

#include <stdio.h>

#include "geom.h"
#include "sha256.h"
#include "tokenizer.h"

struct info {
    struct engine_setup s;
    char model[65], tokenizer[65]; /* fingerprints */
    char policy[MAIN_MAX_LIST][POLICY_TEXT_MAX];
    uint32_t n_policies;
};

static void print_info(const struct info *in)
{
    const struct model_params *p = model_params(in->s.model);
    const struct backend *b = in->s.backend;

    printf("name        %s\n", *p->name ? p->name : "(none)");
    printf("arch        %s\n", p->arch);
    printf("layers      %u, hidden %u, feed-forward %u\n", p->geom.n_layers, p->n_hidden, p->n_ff);
    printf("heads       %u, KV heads %u, head dim %u\n", p->geom.n_heads, p->geom.n_kv_heads,
           p->geom.head_dim);
    printf("positions   %u, rope theta %g\n", p->n_positions, p->rope_theta);
    printf("vocabulary  %u, end token %lld\n", p->n_vocab,
           (long long)tokenizer_eos(model_tokenizer(in->s.model)));
    printf("template    %s\n", in->s.tmpl->name);
    printf("model       %s\n", in->model);
    printf("tokenizer   %s\n", in->tokenizer);
    printf("backend     %s, %s, %s\n", b->ops->name, kv_dtype_name(b->elem), b->isa);
    if (*b->device)
        printf("device      %s\n", b->device);
    for (uint32_t i = 0; i < in->n_policies; i++)
        printf("policy      %s\n", in->policy[i]);
}

static json_t *json_info(const struct info *in)
{
    const struct model_params *p = model_params(in->s.model);
    const struct backend *b = in->s.backend;
    json_t *policies = json_array();

    for (uint32_t i = 0; i < in->n_policies; i++)
        json_array_append_new(policies, json_string(in->policy[i]));
    return json_pack("{ss ss sI sI sI sI sI sI sI sI sf sf sI ss ss ss ss ss ss so ss*}", "name",
                     p->name, "arch", p->arch, "n_layers", (json_int_t)p->geom.n_layers, "n_heads",
                     (json_int_t)p->geom.n_heads, "n_kv_heads", (json_int_t)p->geom.n_kv_heads,
                     "head_dim", (json_int_t)p->geom.head_dim, "n_hidden", (json_int_t)p->n_hidden,
                     "n_ff", (json_int_t)p->n_ff, "n_vocab", (json_int_t)p->n_vocab, "n_positions",
                     (json_int_t)p->n_positions, "rope_theta", p->rope_theta, "norm_eps",
                     p->norm_eps, "eos", (json_int_t)tokenizer_eos(model_tokenizer(in->s.model)),
                     "template", in->s.tmpl->name, "fingerprint", in->model,
                     "tokenizer_fingerprint", in->tokenizer, "backend", b->ops->name, "dtype",
                     kv_dtype_name(b->elem), "isa", b->isa, "policies", policies, "device",
                     *b->device ? b->device : NULL);
}

static int spell_policies(const struct options *o, struct info *in, struct larder_err *e)
{
    struct policy p;
    int rc = 0;

    for (uint32_t i = 0; i < o->n[OPTION_POLICY] && !rc; i++) {
        rc = setup_policy(&in->s, o->value[OPTION_POLICY][i], &p, e);
        if (!rc)
            policy_print(&p, in->policy[in->n_policies++]);
    }
    return rc;
}

static int fingerprints(struct info *in, struct larder_err *e)
{
    uint8_t fp[32];
    int rc = model_fingerprint(in->s.model, fp, e);

    if (rc)
        return rc;
    sha256_hex(fp, in->model);
    tokenizer_fingerprint(model_tokenizer(in->s.model), fp);
    sha256_hex(fp, in->tokenizer);
    return 0;
}

int main_info(const struct options *o, struct larder_err *e)
{
    static struct info in; /* 16 KiB of policies */
    int rc;

    if (o->n_args)
        return main_usage(e, "unexpected argument '%.64s'", o->arg[0]);
    rc = setup_open(o, &in.s, e);
    if (!rc)
        rc = spell_policies(o, &in, e);
    if (!rc)
        rc = fingerprints(&in, e);
    if (!rc && o->n[OPTION_JSON])
        rc = json_print(json_info(&in), e);
    else if (!rc)
        print_info(&in);
    setup_done(&in.s);
    return rc;
}
