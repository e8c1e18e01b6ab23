/* tokenizer_json.c - tokenizer.json as a tokenizer_spec.
 *
 * The one idea: the file describes a pipeline of named steps with options. Each step that is
 * known sets a field of the specification; a step, or an option of one, that is not known ends
 * the reading, because text would become other tokens without it. Truncation, padding and the
 * decoder are not read: none of them changes the tokens of a text. */
#include "tokenizer_json.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "geom.h"
#include "mem.h"
#include "tokenizer_int.h"

#define META "\xe2\x96\x81" /* U+2581, which stands for a space */
#define MAX_STEPS 16        /* in a sequence */
#define MAX_WORD 65535u     /* bytes of a token or of one side of a merge */

struct parse {
    struct tokenizer_spec spec;
    const char **token, **merge;
    uint32_t *token_len, *merge_len;
    uint8_t *literal;
    struct tokenizer_added *added;
    char *pairs; /* merges that the file gives as pairs, as lines */
    int n_stages;
    bool byte_level, prepend, replace, metaspace;
    bool needs_all_bytes; /* a character without a token would become something else */
};

/* ---- small readers; each fails by naming what it met */

static int unsupported(struct larder_err *e, const char *what, const char *name)
{
    return larder_fail(e, LARDER_EUNSUPPORTED, "%s '%.80s' is not supported", what, name);
}

static const char *type_of(const json_t *o)
{
    const char *s = json_string_value(json_object_get(o, "type"));

    return s ? s : "(without a type)";
}

/* A boolean that may be absent or null. */
static int read_bool(const json_t *o, const char *key, bool absent, bool *ret, struct larder_err *e)
{
    const json_t *v = json_object_get(o, key);

    if (v && !json_is_boolean(v) && !json_is_null(v))
        return larder_fail(e, LARDER_EMODEL, "'%s' is not true or false", key);
    *ret = json_is_boolean(v) ? json_is_true(v) : absent;
    return 0;
}

static bool is_text(const json_t *o, const char *key, const char *want)
{
    const char *s = json_string_value(json_object_get(o, key));

    return s && !strcmp(s, want);
}

static bool is_empty(const json_t *v)
{
    return !v || json_is_null(v) || (json_is_string(v) && !json_string_length(v));
}

/* A step by itself, or the steps of a sequence one after the other. */
typedef int step_fn(struct parse *p, const json_t *step, struct larder_err *e);

static int each_step(struct parse *p, const json_t *step, const char *list, step_fn *fn,
                     struct larder_err *e)
{
    const json_t *all = json_object_get(step, list);
    int rc = 0;

    if (!step || json_is_null(step))
        return 0;
    if (strcmp(type_of(step), "Sequence"))
        return fn(p, step, e);
    if (!json_is_array(all) || json_array_size(all) > MAX_STEPS)
        return larder_fail(e, LARDER_EMODEL, "a sequence has no list '%s' of at most %d steps",
                           list, MAX_STEPS);
    for (size_t i = 0; !rc && i < json_array_size(all); i++)
        rc = fn(p, json_array_get(all, i), e);
    return rc;
}

/* ---- the pipeline */

static int normaliser(struct parse *p, const json_t *step, struct larder_err *e)
{
    const char *type = type_of(step);

    if (!strcmp(type, "NFC"))
        p->spec.nfc = true;
    else if (!strcmp(type, "Prepend") && is_text(step, "prepend", META))
        p->prepend = true;
    else if (!strcmp(type, "Replace") && is_text(step, "content", META) &&
             is_text(json_object_get(step, "pattern"), "String", " "))
        p->replace = true;
    else
        return unsupported(e, "normalizer", type);
    return 0;
}

static int add_stage(struct parse *p, const struct pretok_stage *stage, struct larder_err *e)
{
    if (p->byte_level)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "a pre-tokenizer behind ByteLevel is not supported");
    if (p->n_stages == PRETOK_STAGES)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "more than %d pre-tokenizers in a row are not supported", PRETOK_STAGES);
    p->spec.stage[p->n_stages++] = stage;
    return 0;
}

/* "Isolated" keeps matches and what is between them; so does "Removed" with "invert" where the
 * pattern leaves nothing between its matches. */
static int split(struct parse *p, const json_t *step, struct larder_err *e)
{
    const char *regex =
        json_string_value(json_object_get(json_object_get(step, "pattern"), "Regex"));
    const struct pretok_stage *stage = regex ? pretok_stage_for(regex) : NULL;
    bool invert = false;
    int rc = read_bool(step, "invert", false, &invert, e);

    if (rc)
        return rc;
    if (!stage)
        return unsupported(e, "the pattern of pre-tokenizer Split,",
                           regex ? regex : "(not a regular expression)");
    if (!(is_text(step, "behavior", "Isolated") && !invert) &&
        !(is_text(step, "behavior", "Removed") && invert && stage->covers))
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "pre-tokenizer Split with a behavior other than Isolated is not "
                           "supported");
    return add_stage(p, stage, e);
}

static int byte_level(struct parse *p, const json_t *step, struct larder_err *e)
{
    bool space = false, regex = false;
    int rc = read_bool(step, "add_prefix_space", true, &space, e);

    if (!rc)
        rc = read_bool(step, "use_regex", true, &regex, e);
    if (!rc && space)
        rc = larder_fail(e, LARDER_EUNSUPPORTED,
                         "pre-tokenizer ByteLevel with add_prefix_space is not supported");
    if (!rc && regex)
        rc = add_stage(p, pretok_stage("gpt2"), e);
    p->byte_level = true;
    return rc;
}

/* Older files say add_prefix_space, newer ones prepend_scheme; false overrules "first". */
static int metaspace(struct parse *p, const json_t *step, struct larder_err *e)
{
    const json_t *scheme = json_object_get(step, "prepend_scheme");
    const char *name = json_is_string(scheme) ? json_string_value(scheme) : "always";
    bool space = false;
    int rc = read_bool(step, "add_prefix_space", true, &space, e);

    if (!rc)
        rc = read_bool(step, "split", true, &p->spec.split_spaces, e);
    if (rc)
        return rc;
    if (!is_text(step, "replacement", META))
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "pre-tokenizer Metaspace with a replacement other than U+2581 is not "
                           "supported");
    if (p->metaspace)
        return larder_fail(e, LARDER_EUNSUPPORTED, "two pre-tokenizers Metaspace");
    p->metaspace = true;
    if (!space || !strcmp(name, "never"))
        p->spec.prefix = PREFIX_NONE;
    else if (!strcmp(name, "always"))
        p->spec.prefix = PREFIX_MISSING;
    else if (!strcmp(name, "first"))
        p->spec.prefix = PREFIX_FIRST;
    else
        return unsupported(e, "prepend_scheme", name);
    return 0;
}

static int digits(struct parse *p, const json_t *step, struct larder_err *e)
{
    bool single = false;
    int rc = read_bool(step, "individual_digits", false, &single, e);

    return rc ? rc : add_stage(p, pretok_stage(single ? "digits" : "digit-runs"), e);
}

static int pre_tokenizer(struct parse *p, const json_t *step, struct larder_err *e)
{
    static const struct {
        const char *type;
        step_fn *fn;
    } known[] = {
        {"Split", split}, {"Digits", digits}, {"ByteLevel", byte_level}, {"Metaspace", metaspace}};

    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (!strcmp(known[i].type, type_of(step)))
            return known[i].fn(p, step, e);
    return unsupported(e, "pre-tokenizer", type_of(step));
}

/* "single" of a TemplateProcessing: [BOS] and the text. */
static int template_single(struct parse *p, const json_t *step, struct larder_err *e)
{
    const json_t *single = json_object_get(step, "single");
    const json_t *first = json_array_get(single, 0), *last, *bos, *ids;
    size_t n = json_array_size(single);

    last = json_array_get(single, n ? n - 1 : 0);
    bos = json_object_get(json_object_get(first, "SpecialToken"), "id");
    if (n < 1 || n > 2 || !json_object_get(last, "Sequence") || (n == 2 && !bos))
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "post-processor TemplateProcessing with more than one token before "
                           "the text, or with one after it, is not supported");
    if (n == 1)
        return 0;
    ids = json_object_get(
        json_object_get(json_object_get(step, "special_tokens"), json_string_value(bos)), "ids");
    if (json_array_size(ids) != 1 || !json_is_integer(json_array_get(ids, 0)) ||
        json_integer_value(json_array_get(ids, 0)) < 0)
        return larder_fail(e, LARDER_EMODEL,
                           "post-processor TemplateProcessing: the token before the text has no "
                           "id");
    p->spec.bos = json_integer_value(json_array_get(ids, 0));
    p->spec.add_bos = true;
    return 0;
}

static int post_processor(struct parse *p, const json_t *step, struct larder_err *e)
{
    if (!strcmp(type_of(step), "ByteLevel"))
        return 0; /* offsets only */
    if (!strcmp(type_of(step), "TemplateProcessing"))
        return template_single(p, step, e);
    return unsupported(e, "post-processor", type_of(step));
}

/* ---- the model */

static int check_model(struct parse *p, const json_t *m, bool *ret_fallback, struct larder_err *e)
{
    const json_t *dropout = json_object_get(m, "dropout");
    int rc;

    /* files older than the key hold what the key would say */
    if (json_object_get(m, "type") ? strcmp(type_of(m), "BPE")
                                   : !json_is_array(json_object_get(m, "merges")))
        return unsupported(e, "tokenizer model", type_of(m));
    if (dropout && !json_is_null(dropout) && json_number_value(dropout) != 0)
        return unsupported(e, "BPE with", "dropout");
    if (!is_empty(json_object_get(m, "continuing_subword_prefix")))
        return unsupported(e, "BPE with", "continuing_subword_prefix");
    if (!is_empty(json_object_get(m, "end_of_word_suffix")))
        return unsupported(e, "BPE with", "end_of_word_suffix");
    rc = read_bool(m, "byte_fallback", false, ret_fallback, e);
    if (!rc)
        rc = read_bool(m, "ignore_merges", false, &p->spec.ignore_merges, e);
    p->needs_all_bytes = *ret_fallback || !is_empty(json_object_get(m, "unk_token"));
    return rc;
}

/* Which kind the steps and the model amount to; steps of the other kind are refused. */
static int choose_kind(struct parse *p, bool fallback, struct larder_err *e)
{
    if (p->byte_level) {
        p->spec.kind = TOKENIZER_BYTES;
        if (p->prepend || p->replace || p->metaspace)
            return larder_fail(e, LARDER_EUNSUPPORTED,
                               "U+2581 for spaces together with ByteLevel is not supported");
        return 0;
    }
    if (!fallback)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "BPE without ByteLevel and without byte_fallback is not supported");
    if (p->n_stages)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "pre-tokenizers Split and Digits without ByteLevel are not supported");
    if (!p->replace && !p->metaspace)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "byte_fallback without U+2581 for spaces is not supported");
    if (p->prepend && (p->metaspace || !p->replace))
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "normalizer Prepend is supported with Replace only");
    p->spec.kind = TOKENIZER_MERGES;
    p->spec.mark_first = p->replace;
    if (p->prepend)
        p->spec.prefix = PREFIX_ALWAYS;
    return 0;
}

/* An id, and that it fits the vocabulary's cap. */
static int read_id(const json_t *v, const char *what, uint32_t *ret, struct larder_err *e)
{
    json_int_t id = json_is_integer(v) ? json_integer_value(v) : -1;

    if (id < 0 || id >= KV_MAX_VOCAB)
        return larder_fail(e, LARDER_EMODEL, "the id of %s '%.40s' is not a number below %u",
                           "token", what, KV_MAX_VOCAB);
    *ret = (uint32_t)id;
    return 0;
}

/* One more than the largest id of the vocabulary and of the added tokens. */
static int count_ids(struct parse *p, json_t *vocab, const json_t *added, struct larder_err *e)
{
    const char *word;
    json_t *v;
    uint32_t id = 0, n = 0;
    size_t i;
    int rc;

    json_object_foreach (vocab, word, v) {
        rc = read_id(v, word, &id, e);
        if (rc)
            return rc;
        n = id + 1 > n ? id + 1 : n;
    }
    json_array_foreach (added, i, v) {
        word = json_string_value(json_object_get(v, "content"));
        if (!word)
            return larder_fail(e, LARDER_EMODEL, "added token %zu has no content", i);
        rc = read_id(json_object_get(v, "id"), word, &id, e);
        if (rc)
            return rc;
        n = id + 1 > n ? id + 1 : n;
    }
    p->spec.n_vocab = n;
    return 0;
}

static int take_token(struct parse *p, uint32_t id, const char *text, struct larder_err *e)
{
    size_t len = strlen(text);

    if (len > MAX_WORD)
        return larder_fail(e, LARDER_EMODEL, "token %u has %zu bytes", id, len);
    if (p->token[id] && strcmp(p->token[id], text))
        return larder_fail(e, LARDER_EMODEL, "token %u is both '%.40s' and '%.40s'", id,
                           p->token[id], text);
    p->token[id] = text;
    p->token_len[id] = (uint32_t)len;
    return 0;
}

static int read_vocab(struct parse *p, json_t *vocab, struct larder_err *e)
{
    const char *word;
    json_t *v;
    int rc = 0;

    json_object_foreach (vocab, word, v) {
        if (!rc)
            rc = take_token(p, (uint32_t)json_integer_value(v), word, e);
    }
    return rc;
}

static int read_one_added(struct parse *p, const json_t *vocab, const json_t *o,
                          struct tokenizer_added *a, struct larder_err *e)
{
    const char *text = json_string_value(json_object_get(o, "content"));
    const json_t *word = json_object_get(vocab, text);
    int rc;

    *a =
        (struct tokenizer_added){.text = text,
                                 .len = (uint32_t)json_string_length(json_object_get(o, "content")),
                                 .id = (uint32_t)json_integer_value(json_object_get(o, "id"))};
    if (word && json_integer_value(word) != a->id)
        return larder_fail(e, LARDER_EMODEL,
                           "added token '%.40s' is %u here and %lld in the "
                           "vocabulary",
                           text, a->id, (long long)json_integer_value(word));
    rc = read_bool(o, "special", false, &a->special, e);
    if (!rc)
        rc = read_bool(o, "lstrip", false, &a->lstrip, e);
    if (!rc)
        rc = read_bool(o, "rstrip", false, &a->rstrip, e);
    if (!rc)
        rc = read_bool(o, "single_word", false, &a->single_word, e);
    if (!rc)
        rc = read_bool(o, "normalized", !a->special, &a->normalized, e);
    if (!rc)
        rc = take_token(p, a->id, text, e);
    p->literal[a->id] = a->special || !word;
    return rc;
}

static int read_added(struct parse *p, const json_t *vocab, const json_t *added,
                      struct larder_err *e)
{
    int rc = 0;

    p->spec.n_added = (uint32_t)json_array_size(added);
    p->added = mem_alloc(p->spec.n_added, sizeof *p->added);
    if (!p->added)
        return larder_fail(e, LARDER_ENOMEM, "no memory for added tokens");
    for (uint32_t i = 0; !rc && i < p->spec.n_added; i++)
        rc = read_one_added(p, vocab, json_array_get(added, i), &p->added[i], e);
    return rc;
}

/* Bytes that merges take as lines; those given as pairs need a copy. */
static int measure_merges(const json_t *merges, uint64_t *ret, struct larder_err *e)
{
    uint64_t total = 0;
    json_t *m;
    size_t i;

    json_array_foreach (merges, i, m) {
        const json_t *l = json_array_get(m, 0), *r = json_array_get(m, 1);

        if (json_is_string(m) && json_string_length(m) <= 2 * MAX_WORD)
            continue;
        if (json_array_size(m) != 2 || !json_is_string(l) || !json_is_string(r) ||
            json_string_length(l) > MAX_WORD || json_string_length(r) > MAX_WORD)
            return larder_fail(e, LARDER_EMODEL, "merge %zu is not a pair of tokens", i);
        if (strchr(json_string_value(l), ' ') || strchr(json_string_value(r), ' '))
            return larder_fail(e, LARDER_EUNSUPPORTED,
                               "merge %zu holds a space; that is not supported", i);
        total += json_string_length(l) + json_string_length(r) + 1;
    }
    *ret = total;
    return 0;
}

static int read_merges(struct parse *p, const json_t *merges, struct larder_err *e)
{
    size_t n = json_array_size(merges), at = 0;
    uint64_t total = 0;
    int rc;

    if (!json_is_array(merges) || n > 4ull * KV_MAX_VOCAB)
        return larder_fail(e, LARDER_EMODEL, "no list of at most %llu merges", 4ull * KV_MAX_VOCAB);
    rc = measure_merges(merges, &total, e);
    if (rc)
        return rc;
    p->merge = mem_alloc(n, sizeof *p->merge);
    p->merge_len = mem_alloc(n, sizeof *p->merge_len);
    p->pairs = mem_alloc(total, 1);
    if (!p->merge || !p->merge_len || !p->pairs)
        return larder_fail(e, LARDER_ENOMEM, "no memory for merges");
    for (size_t i = 0; i < n; i++) {
        const json_t *m = json_array_get(merges, i), *l = json_array_get(m, 0);
        const json_t *r = json_array_get(m, 1), *first = l ? l : m;
        size_t left = json_string_length(first), right = json_string_length(r);

        p->merge[i] = l ? p->pairs + at : json_string_value(m);
        p->merge_len[i] = (uint32_t)(l ? left + 1 + right : left);
        if (!l)
            continue;
        memcpy(p->pairs + at, json_string_value(l), left);
        p->pairs[at + left] = ' ';
        memcpy(p->pairs + at + left + 1, json_string_value(r), right);
        at += left + 1 + right;
    }
    p->spec.n_merges = (uint32_t)n;
    return 0;
}

static int read_model(struct parse *p, const json_t *m, const json_t *added, struct larder_err *e)
{
    json_t *vocab = json_object_get(m, "vocab");
    uint32_t n;
    int rc;

    if (!json_is_object(vocab))
        return larder_fail(e, LARDER_EMODEL, "the tokenizer's model has no vocabulary");
    if (added && !json_is_array(added))
        return larder_fail(e, LARDER_EMODEL, "added_tokens is not a list");
    rc = count_ids(p, vocab, added, e);
    if (rc)
        return rc;
    n = p->spec.n_vocab;
    p->token = mem_zalloc(n, sizeof *p->token);
    p->token_len = mem_zalloc(n, sizeof *p->token_len);
    p->literal = mem_zalloc(n, 1);
    if (!p->token || !p->token_len || !p->literal)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the vocabulary");
    rc = read_vocab(p, vocab, e);
    if (!rc)
        rc = read_added(p, vocab, added, e);
    return rc ? rc : read_merges(p, json_object_get(m, "merges"), e);
}

/* ---- the file */

static int check_bytes(const struct tokenizer *t, struct larder_err *e)
{
    for (unsigned b = 0; b < 256; b++)
        if (t->byte_token[b] == TOKENIZER_NONE)
            return larder_fail(e, LARDER_EUNSUPPORTED,
                               "an unknown token is supported only where every byte has a token; "
                               "byte 0x%02x has none",
                               b);
    return 0;
}

static int build(struct tokenizer **ret, struct parse *p, const json_t *root, struct larder_err *e)
{
    const json_t *model = json_object_get(root, "model");
    struct tokenizer *t = NULL;
    bool fallback = false;
    int rc;

    if (!json_is_object(model))
        return larder_fail(e, LARDER_EMODEL, "there is no tokenizer model in the file");
    rc = check_model(p, model, &fallback, e);
    if (!rc)
        rc = each_step(p, json_object_get(root, "normalizer"), "normalizers", normaliser, e);
    if (!rc)
        rc =
            each_step(p, json_object_get(root, "pre_tokenizer"), "pretokenizers", pre_tokenizer, e);
    if (!rc)
        rc = each_step(p, json_object_get(root, "post_processor"), "processors", post_processor, e);
    if (!rc)
        rc = choose_kind(p, fallback, e);
    if (!rc)
        rc = read_model(p, model, json_object_get(root, "added_tokens"), e);
    if (rc)
        return rc;
    p->spec.token = p->token;
    p->spec.token_len = p->token_len;
    p->spec.literal = p->literal;
    p->spec.merge = p->merge;
    p->spec.merge_len = p->merge_len;
    p->spec.added = p->added;
    rc = tokenizer_new(&t, &p->spec, e);
    if (!rc && p->needs_all_bytes)
        rc = check_bytes(t, e);
    if (rc)
        tokenizer_free(t);
    else
        *ret = t;
    return rc;
}

static int read_whole(const char *path, char **ret, size_t *ret_len, struct larder_err *e)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), rc = 0;
    size_t n = 0, cap = 0;
    ssize_t got = 1;
    char *buf = NULL;
    struct stat st;

    if (fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode))
        rc = larder_fail(e, LARDER_EIO, "not a readable file: %s", fd < 0 ? strerror(errno) : "");
    else if (st.st_size > TOKENIZER_JSON_MAX)
        rc = larder_fail(e, LARDER_ETOOBIG, "the file has %lld bytes; at most %u",
                         (long long)st.st_size, TOKENIZER_JSON_MAX);
    if (!rc) {
        cap = (size_t)st.st_size;
        buf = mem_alloc(cap, 1);
        if (!buf)
            rc = larder_fail(e, LARDER_ENOMEM, "no memory for %zu bytes", cap);
    }
    while (!rc && n < cap && (got = read(fd, buf + n, cap - n)) > 0)
        n += (size_t)got;
    if (!rc && n < cap)
        rc = larder_fail(e, LARDER_EIO, "the file could not be read whole");
    if (fd >= 0)
        close(fd);
    if (rc) {
        mem_free(buf);
        return rc;
    }
    *ret = buf;
    *ret_len = n;
    return 0;
}

static void parse_done(struct parse *p)
{
    mem_free(p->token);
    mem_free(p->token_len);
    mem_free(p->literal);
    mem_free(p->added);
    mem_free(p->merge);
    mem_free(p->merge_len);
    mem_free(p->pairs);
}

int tokenizer_from_json(struct tokenizer **ret, const char *path, struct larder_err *e)
{
    struct parse p = {.spec = {.bos = -1, .eos = -1}};
    json_error_t at;
    json_t *root = NULL;
    char *text = NULL;
    size_t len;
    int rc = read_whole(path, &text, &len, e);

    if (!rc) {
        root = json_loadb(text, len, JSON_REJECT_DUPLICATES, &at);
        if (!root)
            rc = larder_fail(e, LARDER_EMODEL, "line %d: %.120s", at.line, at.text);
    }
    mem_free(text);
    if (!rc)
        rc = build(ret, &p, root, e);
    parse_done(&p);
    json_decref(root);
    return rc ? larder_fail_in(e, rc, "%.200s", path) : 0;
}
