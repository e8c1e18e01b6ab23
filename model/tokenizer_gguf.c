/* tokenizer_gguf.c - a GGUF file's vocabulary as a tokenizer_spec.
 *
 * The one idea: GGUF names its pre-tokenizers instead of describing them, so the table in
 * pretok.c says what a name stands for. Where a `llama` vocabulary leaves a choice, the choice is
 * SentencePiece's: a control or byte token is never the result of a merge. */
#include "tokenizer_gguf.h"

#include <string.h>

#include "bytes.h"
#include "geom.h"
#include "mem.h"

enum { TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER = 4 };

struct vocab {
    struct tokenizer_spec spec;
    const char **token, **merge;
    uint32_t *token_len, *merge_len;
    uint8_t *literal;
    float *score;
    struct tokenizer_added *added;
};

/* ---- arrays */

static int missing(const char *key, struct larder_err *e)
{
    return larder_fail(e, LARDER_EMODEL, "key %s is missing", key);
}

static int read_strings(const struct gguf *g, const char *key, uint64_t max, const char ***ret,
                        uint32_t **ret_len, uint32_t *ret_n, struct larder_err *e)
{
    const uint8_t *at;
    uint64_t n;
    int rc = gguf_get_array(g, key, GGUF_STRING, &n, &at, e);

    if (rc)
        return rc == LARDER_ENOTFOUND ? missing(key, e) : rc;
    if (n > max)
        return larder_fail(e, LARDER_EMODEL, "key %s has %llu elements; at most %llu", key,
                           (unsigned long long)n, (unsigned long long)max);
    *ret = mem_alloc(n, sizeof **ret);
    *ret_len = mem_alloc(n, sizeof **ret_len);
    if (!*ret || !*ret_len)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %s", key);
    for (uint64_t i = 0; i < n; i++) {
        struct gguf_str s = gguf_next_str(&at);

        if (s.len > 65535)
            return larder_fail(e, LARDER_EMODEL, "key %s: element %llu has %llu bytes", key,
                               (unsigned long long)i, (unsigned long long)s.len);
        (*ret)[i] = s.p;
        (*ret_len)[i] = (uint32_t)s.len;
    }
    *ret_n = (uint32_t)n;
    return 0;
}

/* One array of 32-bit values for each token; *ret_at NULL when the key is absent. */
static int read_values(const struct gguf *g, const char *key, enum gguf_type type, uint32_t want,
                       const uint8_t **ret_at, struct larder_err *e)
{
    uint64_t n;
    int rc = gguf_get_array(g, key, type, &n, ret_at, e);

    if (rc == LARDER_ENOTFOUND) {
        *ret_at = NULL;
        return 0;
    }
    if (!rc && n != want)
        return larder_fail(e, LARDER_EMODEL, "key %s has %llu elements for %u tokens", key,
                           (unsigned long long)n, want);
    return rc;
}

/* Control and user-defined tokens are reached by their literals; so is SentencePiece's unknown
 * token. In a `gpt2` vocabulary "unknown" means nothing. */
static bool is_literal(const struct vocab *v, uint32_t type)
{
    return type == TYPE_CONTROL || type == TYPE_USER ||
           (type == TYPE_UNKNOWN && v->spec.kind == TOKENIZER_SCORES);
}

static int read_types(const struct gguf *g, struct vocab *v, struct larder_err *e)
{
    uint32_t n = v->spec.n_vocab;
    const uint8_t *at;
    struct rd r;
    int rc = read_values(g, "tokenizer.ggml.token_type", GGUF_I32, n, &at, e);

    if (rc)
        return rc;
    v->literal = mem_zalloc(n, 1);
    v->added = mem_alloc(n, sizeof *v->added);
    if (!v->literal || !v->added)
        return larder_fail(e, LARDER_ENOMEM, "no memory for token types");
    r = rd_init(at, at ? 4ull * n : 0);
    for (uint32_t i = 0; at && i < n; i++) {
        uint32_t type = rd_u32(&r);

        if (!is_literal(v, type))
            continue;
        v->literal[i] = 1;
        v->added[v->spec.n_added++] = (struct tokenizer_added){
            .text = v->token[i], .len = v->token_len[i], .id = i, .special = type != TYPE_USER};
    }
    return 0;
}

static int read_scores(const struct gguf *g, struct vocab *v, struct larder_err *e)
{
    uint32_t n = v->spec.n_vocab;
    const uint8_t *at;
    struct rd r;
    int rc = read_values(g, "tokenizer.ggml.scores", GGUF_F32, n, &at, e);

    if (rc)
        return rc;
    if (!at)
        return missing("tokenizer.ggml.scores", e);
    v->score = mem_alloc(n, sizeof *v->score);
    if (!v->score)
        return larder_fail(e, LARDER_ENOMEM, "no memory for scores");
    r = rd_init(at, 4ull * n);
    for (uint32_t i = 0; i < n; i++)
        v->score[i] = rd_f32(&r);
    return 0;
}

/* ---- scalars */

static int read_token_id(const struct gguf *g, const char *key, uint32_t n_vocab, int64_t *ret,
                         struct larder_err *e)
{
    uint32_t id;
    int rc = gguf_get_u32(g, key, &id, e);

    *ret = -1;
    if (rc)
        return rc == LARDER_ENOTFOUND ? 0 : rc;
    if (id >= n_vocab)
        return larder_fail(e, LARDER_EMODEL, "key %s is %u; the vocabulary has %u tokens", key, id,
                           n_vocab);
    *ret = id;
    return 0;
}

/* Leaves *ret alone when the key is absent. */
static int may_bool(const struct gguf *g, const char *key, bool *ret, struct larder_err *e)
{
    int rc = gguf_get_bool(g, key, ret, e);

    return rc == LARDER_ENOTFOUND ? 0 : rc;
}

/* A string value as a C string; the default when absent. */
static int copy_str(const struct gguf *g, const char *key, const char *absent, char *out,
                    size_t cap, struct larder_err *e)
{
    struct gguf_str s = {absent, strlen(absent)};
    int rc = gguf_get_str(g, key, &s, e);

    if (rc && rc != LARDER_ENOTFOUND)
        return rc;
    if (s.len >= cap)
        return larder_fail(e, LARDER_EMODEL, "key %s is too long", key);
    memcpy(out, s.p, s.len);
    out[s.len] = '\0';
    return 0;
}

/* ---- the two kinds */

static int steps_gpt2(const struct gguf *g, struct vocab *v, char pre[64], struct larder_err *e)
{
    const struct pretok *p;
    int rc = copy_str(g, "tokenizer.ggml.pre", "default", pre, 64, e);

    if (rc)
        return rc;
    p = pretok_find(pre);
    if (!p)
        return larder_fail(e, LARDER_EUNSUPPORTED, "pre-tokenizer '%s' is not supported; %s are",
                           pre, pretok_names());
    v->spec.kind = TOKENIZER_BYTES;
    v->spec.pretok = pre;
    v->spec.nfc = p->nfc;
    v->spec.ignore_merges = p->ignore_merges;
    v->spec.add_bos = p->add_bos;
    for (int i = 0; i < PRETOK_STAGES && p->stage[i]; i++)
        v->spec.stage[i] = pretok_stage(p->stage[i]);
    return read_strings(g, "tokenizer.ggml.merges", 4ull * KV_MAX_VOCAB, &v->merge, &v->merge_len,
                        &v->spec.n_merges, e);
}

static int steps_llama(const struct gguf *g, struct vocab *v, struct larder_err *e)
{
    bool space = true, squeeze = false;
    int rc = may_bool(g, "tokenizer.ggml.add_space_prefix", &space, e);

    if (!rc)
        rc = may_bool(g, "tokenizer.ggml.remove_extra_whitespaces", &squeeze, e);
    if (rc)
        return rc;
    if (squeeze)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "a llama vocabulary with remove_extra_whitespaces is not supported");
    v->spec.kind = TOKENIZER_SCORES;
    v->spec.mark_first = true;
    v->spec.prefix = space ? PREFIX_ALWAYS : PREFIX_NONE;
    v->spec.add_bos = true;
    return read_scores(g, v, e);
}

static int read_steps(const struct gguf *g, struct vocab *v, char pre[64], struct larder_err *e)
{
    char kind[64];
    int rc = copy_str(g, "tokenizer.ggml.model", "", kind, sizeof kind, e);

    if (rc)
        return rc;
    if (!strcmp(kind, "gpt2"))
        rc = steps_gpt2(g, v, pre, e);
    else if (!strcmp(kind, "llama"))
        rc = steps_llama(g, v, e);
    else
        rc = larder_fail(e, LARDER_EUNSUPPORTED,
                         "tokenizer model '%s' is not supported; gpt2 and llama are", kind);
    return rc ? rc : may_bool(g, "tokenizer.ggml.add_bos_token", &v->spec.add_bos, e);
}

static int read_vocab(const struct gguf *g, uint32_t n_vocab, struct vocab *v, struct larder_err *e)
{
    int rc = read_strings(g, "tokenizer.ggml.tokens", KV_MAX_VOCAB, &v->token, &v->token_len,
                          &v->spec.n_vocab, e);

    if (!rc && n_vocab && v->spec.n_vocab != n_vocab)
        rc = larder_fail(e, LARDER_EMODEL, "%u tokens for an embedding of %u rows", v->spec.n_vocab,
                         n_vocab);
    if (!rc)
        rc = read_token_id(g, "tokenizer.ggml.bos_token_id", v->spec.n_vocab, &v->spec.bos, e);
    return rc ? rc
              : read_token_id(g, "tokenizer.ggml.eos_token_id", v->spec.n_vocab, &v->spec.eos, e);
}

static void vocab_done(struct vocab *v)
{
    mem_free(v->token);
    mem_free(v->token_len);
    mem_free(v->literal);
    mem_free(v->added);
    mem_free(v->merge);
    mem_free(v->merge_len);
    mem_free(v->score);
}

int tokenizer_from_gguf(struct tokenizer **ret, const struct gguf *g, uint32_t n_vocab,
                        struct larder_err *e)
{
    struct vocab v = {0};
    char pre[64];
    int rc = read_vocab(g, n_vocab, &v, e);

    if (!rc)
        rc = read_steps(g, &v, pre, e);
    if (!rc)
        rc = read_types(g, &v, e);
    if (!rc) {
        v.spec.token = v.token;
        v.spec.token_len = v.token_len;
        v.spec.literal = v.literal;
        v.spec.added = v.added;
        v.spec.merge = v.merge;
        v.spec.merge_len = v.merge_len;
        v.spec.score = v.score;
        rc = tokenizer_new(ret, &v.spec, e);
    }
    vocab_done(&v);
    return rc;
}
