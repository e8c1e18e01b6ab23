/* main_info.c - larder-prefill info: what a model file says about itself, what would compute
 * here, and how policies are spelled: all that a result is identified by. */
#include "main_common.h"

#include <stdio.h>
#include <string.h>

#include "geom.h"
#include "sha256.h"
#include "tokenizer.h"

struct info {
    struct engine_setup s;
    char model[65], tokenizer[65]; /* fingerprints */
    char policy[MAIN_MAX_LIST][POLICY_TEXT_MAX];
    uint32_t n_policies;
};

/* ---- what architectures differ in */

static const char *const scalings[] = {[ROPE_PLAIN] = "none",
                                       [ROPE_LLAMA3] = "llama3",
                                       [ROPE_FACTORS] = "factors",
                                       [ROPE_LONGROPE] = "longrope"};

static const char *const kinds[] = {
    [TOKENIZER_BYTES] = "bytes", [TOKENIZER_MERGES] = "merges", [TOKENIZER_SCORES] = "scores"};

static void print_rope(const struct model_params *p)
{
    printf("rope        theta %g, %u of %u elements, scaling %s", p->rope_theta, p->rope_dims,
           p->geom.head_dim, scalings[p->rope_scaling]);
    if (p->rope_scaling != ROPE_PLAIN)
        printf(", factor %g", p->rope_stretch);
    if (p->n_rope_short)
        printf(", trained on %u positions, attention factor %g", p->n_rope_short, p->rope.factor);
    putchar('\n');
}

/* Layers with one window stand together: "48 in layers 0-3, 64 in layer 7". */
static void print_sliding(const struct model_params *p)
{
    const char *before = "";

    printf("windows     %s", p->sliding ? "" : "none");
    for (uint32_t l = 0, end; p->sliding && l < p->geom.n_layers; l = end) {
        for (end = l + 1; end < p->geom.n_layers && p->sliding[end] == p->sliding[l];)
            end++;
        if (!p->sliding[l])
            continue;
        printf("%s%u in layer%s %u", before, p->sliding[l], end > l + 1 ? "s" : "", l);
        if (end > l + 1)
            printf("-%u", end - 1);
        before = ", ";
    }
    putchar('\n');
}

static void print_tokenizer(const struct tokenizer *t)
{
    static const char *const says[] = {
        [TOKENIZER_BYTES] = "byte-level BPE",
        [TOKENIZER_MERGES] = "SentencePiece-style BPE by merges",
        [TOKENIZER_SCORES] = "SentencePiece-style BPE by scores",
    };
    const char *name;

    printf("vocabulary  %u, %s", tokenizer_n_vocab(t), says[tokenizer_kind(t)]);
    for (uint32_t i = 0; i < PRETOK_STAGES && (name = tokenizer_stage(t, i)); i++)
        printf("%s%s", i ? " and " : ", cut by ", name);
    if (tokenizer_composes(t))
        printf(", NFC");
    if (tokenizer_adds_bos(t))
        printf(", first token %lld", (long long)tokenizer_bos(t));
    printf(", end token %lld\n", (long long)tokenizer_eos(t));
}

static void print_template(const struct info *in)
{
    const char *own = model_template_name(in->s.model);

    printf("template    %s", in->s.tmpl->name);
    if (strcmp(own, in->s.tmpl->name))
        printf(" (the model's: %s)", own);
    putchar('\n');
}

static void print_info(const struct info *in)
{
    const struct model_params *p = model_params(in->s.model);
    const struct backend *b = in->s.backend;

    printf("name        %s\n", *p->name ? p->name : "(none)");
    printf("arch        %s\n", p->arch);
    printf("layers      %u, hidden %u, feed-forward %u\n", p->geom.n_layers, p->n_hidden, p->n_ff);
    printf("heads       %u, KV heads %u, head dim %u\n", p->geom.n_heads, p->geom.n_kv_heads,
           p->geom.head_dim);
    printf("attention   %s; %s\n", p->has_qkv_bias ? "biases of q, k and v" : "no biases",
           p->has_qk_norm ? "norms of q and k" : "no norms of q and k");
    print_sliding(p);
    printf("positions   %u\n", p->n_positions);
    print_rope(p);
    printf("embedding   %s\n",
           p->tied ? "tied: it is the output matrix, too" : "and an output matrix of its own");
    print_tokenizer(model_tokenizer(in->s.model));
    print_template(in);
    printf("model       %s\n", in->model);
    printf("tokenizer   %s\n", in->tokenizer);
    printf("backend     %s, %s, %s\n", b->ops->name, kv_dtype_name(b->elem), b->isa);
    if (*b->device)
        printf("device      %s\n", b->device);
    for (uint32_t i = 0; i < in->n_policies; i++)
        printf("policy      %s\n", in->policy[i]);
}

static json_t *json_sliding(const struct model_params *p)
{
    json_t *list = p->sliding ? json_array() : json_null();

    for (uint32_t l = 0; p->sliding && l < p->geom.n_layers; l++)
        json_array_append_new(list, json_integer(p->sliding[l]));
    return list;
}

static json_t *json_rope(const struct model_params *p)
{
    return json_pack("{sf sI ss sf sf so}", "theta", p->rope_theta, "dims",
                     (json_int_t)p->rope_dims, "scaling", scalings[p->rope_scaling], "factor",
                     p->rope_stretch, "attention_factor", p->rope.factor, "n_original",
                     p->n_rope_short ? json_integer(p->n_rope_short) : json_null());
}

static json_t *json_id(int64_t id)
{
    return id < 0 ? json_null() : json_integer(id);
}

static json_t *json_tokenizer(const struct tokenizer *t)
{
    json_t *stages = json_array();
    const char *name;

    for (uint32_t i = 0; i < PRETOK_STAGES && (name = tokenizer_stage(t, i)); i++)
        json_array_append_new(stages, json_string(name));
    return json_pack("{ss so sb sb so so}", "kind", kinds[tokenizer_kind(t)], "pre_tokenizer",
                     stages, "nfc", tokenizer_composes(t), "adds_bos", tokenizer_adds_bos(t), "bos",
                     json_id(tokenizer_bos(t)), "eos", json_id(tokenizer_eos(t)));
}

/* What does not follow from the numbers alone. */
static json_t *json_features(const struct info *in)
{
    const struct model_params *p = model_params(in->s.model);

    return json_pack("{sb sb sb so so so ss}", "qkv_bias", p->has_qkv_bias, "qk_norm",
                     p->has_qk_norm, "tied_embeddings", p->tied, "sliding", json_sliding(p), "rope",
                     json_rope(p), "tokenizer", json_tokenizer(model_tokenizer(in->s.model)),
                     "own_template", model_template_name(in->s.model));
}

static json_t *json_info(const struct info *in)
{
    const struct model_params *p = model_params(in->s.model);
    const struct backend *b = in->s.backend;
    json_t *policies = json_array(), *features = json_features(in), *all;

    for (uint32_t i = 0; i < in->n_policies; i++)
        json_array_append_new(policies, json_string(in->policy[i]));
    all = json_pack("{ss ss sI sI sI sI sI sI sI sI sf sf sI ss ss ss ss ss ss so ss*}", "name",
                    p->name, "arch", p->arch, "n_layers", (json_int_t)p->geom.n_layers, "n_heads",
                    (json_int_t)p->geom.n_heads, "n_kv_heads", (json_int_t)p->geom.n_kv_heads,
                    "head_dim", (json_int_t)p->geom.head_dim, "n_hidden", (json_int_t)p->n_hidden,
                    "n_ff", (json_int_t)p->n_ff, "n_vocab", (json_int_t)p->n_vocab, "n_positions",
                    (json_int_t)p->n_positions, "rope_theta", p->rope_theta, "norm_eps",
                    p->norm_eps, "eos", (json_int_t)tokenizer_eos(model_tokenizer(in->s.model)),
                    "template", in->s.tmpl->name, "fingerprint", in->model, "tokenizer_fingerprint",
                    in->tokenizer, "backend", b->ops->name, "dtype", kv_dtype_name(b->elem), "isa",
                    b->isa, "policies", policies, "device", *b->device ? b->device : NULL);
    if (all && features && json_object_update(all, features)) {
        json_decref(all);
        all = NULL;
    }
    json_decref(features);
    return all;
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
