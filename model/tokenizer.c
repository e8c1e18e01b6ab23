/* tokenizer.c - from text to tokens, step by step.
 *
 * The one idea: a text is cut ever finer and each step knows only its own cuts: literals of added
 * tokens, normalisation, literals of normalised added tokens, pieces, merges. What a cut leaves
 * is handed down at once, so nothing but a normalised copy is ever held beside the text. */
#include "tokenizer.h"

#include <string.h>

#include <utf8proc.h>

#include "added.h"
#include "bpe.h"
#include "mem.h"
#include "nfc.h"

#define MAX_TEXT (1u << 30)
#define META "\xe2\x96\x81" /* U+2581, which stands for a space */

/* ---- normalisation */

/* The text with spaces for U+2581, and one before it; never longer than text and one byte. */
static size_t to_spaces(bool prefix, const char *text, size_t len, char *out)
{
    size_t n = 0;

    if (prefix && len)
        out[n++] = ' ';
    for (size_t at = 0; at < len; n++) {
        bool meta = len - at >= 3 && !memcmp(text + at, META, 3);

        out[n] = meta ? ' ' : text[at];
        at += meta ? 3 : 1;
    }
    return n;
}

static int mark_spaces(bool prefix, const char *text, size_t len, char **ret, size_t *ret_len,
                       struct larder_err *e)
{
    *ret = mem_alloc(len + 1, 1);
    if (!*ret)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a text of %zu bytes", len);
    *ret_len = to_spaces(prefix, text, len, *ret);
    return 0;
}

int tokenizer_normalise(const struct tokenizer *t, bool prefix, const char *text, size_t len,
                        char **ret, size_t *ret_len, struct larder_err *e)
{
    char *composed = NULL;
    int rc = 0;

    if (t->nfc)
        rc = nfc_compose(text, len, &composed, &len, e);
    *ret = composed;
    *ret_len = len;
    if (rc || !t->mark_first)
        return rc;
    rc = mark_spaces(prefix, composed ? composed : text, len, ret, ret_len, e);
    mem_free(composed);
    return rc;
}

/* ---- encoding */

/* One encode call. */
struct encoding {
    const struct tokenizer *t;
    bool parse_special;
    struct bpe work;
    struct ids out;
};

/* Cuts of stage i and those after it, then merges. */
static int encode_stages(struct encoding *c, int i, const char *p, size_t len, struct larder_err *e)
{
    int rc = 0;

    if (i == PRETOK_STAGES || !c->t->stage[i])
        return bpe_piece(c->t, &c->work, p, len, &c->out, e);
    while (!rc && len) {
        size_t n = c->t->stage[i]->fn(p, len);

        rc = encode_stages(c, i + 1, p, n, e);
        p += n;
        len -= n;
    }
    return rc;
}

/* Where no word holds a space behind another character nothing merges across that place, so
 * that a whole document need not be one piece. */
static size_t until_space(const struct tokenizer *t, const char *p, size_t len)
{
    size_t n = 1;

    if (!t->split_spaces && !t->space_leads)
        return len;
    while (n < len && !(p[n] == ' ' && (t->split_spaces || p[n - 1] != ' ')))
        n++;
    return n;
}

static int encode_words(struct encoding *c, const char *p, size_t len, struct larder_err *e)
{
    int rc = 0;

    if (c->t->kind == TOKENIZER_BYTES)
        return encode_stages(c, 0, p, len, e);
    while (!rc && len) {
        size_t n = until_space(c->t, p, len);

        rc = bpe_piece(c->t, &c->work, p, n, &c->out, e);
        p += n;
        len -= n;
    }
    return rc;
}

/* Text between added tokens; follows: what is before it. */
static int encode_between(struct encoding *c, enum tokenizer_before follows, const char *p,
                          size_t len, struct larder_err *e)
{
    const struct tokenizer *t = c->t;
    bool first = t->prefix == PREFIX_FIRST && follows == BEFORE_NOTHING;
    bool missing = first || (t->prefix == PREFIX_MISSING && follows != BEFORE_TEXT);
    char *marked;
    size_t n;
    int rc;

    if (t->kind == TOKENIZER_BYTES || t->mark_first)
        return encode_words(c, p, len, e);
    if (*p == ' ' || (len >= 3 && !memcmp(p, META, 3)))
        missing = false;
    rc = mark_spaces(missing, p, len, &marked, &n, e);
    if (rc)
        return rc;
    rc = encode_words(c, marked, n, e);
    mem_free(marked);
    return rc;
}

typedef int part_fn(struct encoding *c, enum tokenizer_before follows, const char *p, size_t len,
                    struct larder_err *e);

/* Added tokens as tokens, and what is between them to `part`. */
static int encode_around(struct encoding *c, const struct literals *l,
                         enum tokenizer_before follows, const char *p, size_t len, part_fn *part,
                         struct larder_err *e)
{
    size_t done = 0, at = 0;
    struct added_match m;
    int rc = 0;

    while (!rc && added_next(c->t, l, p, len, c->parse_special, done, &at, &m)) {
        if (done < m.start)
            rc = part(c, done ? BEFORE_ADDED : follows, p + done, m.start - done, e);
        if (!rc)
            rc = ids_push(&c->out, m.id, e);
        done = m.end;
    }
    if (rc || done >= len)
        return rc;
    return part(c, done ? BEFORE_ADDED : follows, p + done, len - done, e);
}

static int encode_normalised(struct encoding *c, enum tokenizer_before follows, const char *p,
                             size_t len, struct larder_err *e)
{
    bool prefix = c->t->prefix == PREFIX_ALWAYS && follows != BEFORE_TEXT;
    char *made = NULL;
    size_t n = len;
    int rc = tokenizer_normalise(c->t, prefix, p, len, &made, &n, e);

    if (!rc && n > MAX_TEXT)
        rc = larder_fail(e, LARDER_ETOOBIG, "a normalised text of %zu bytes; at most %u", n,
                         MAX_TEXT);
    if (!rc)
        rc = encode_around(c, &c->t->after, follows, made ? made : p, n, encode_between, e);
    mem_free(made);
    return rc;
}

size_t tokenizer_valid_utf8(const char *p, size_t len)
{
    size_t at = 0;

    while (at < len) {
        utf8proc_int32_t c;
        utf8proc_ssize_t n = 1;

        if ((uint8_t)p[at] >= 0x80)
            n = utf8proc_iterate((const utf8proc_uint8_t *)p + at,
                                 (utf8proc_ssize_t)(len - at < 4 ? len - at : 4), &c);
        if (n < 1)
            break;
        at += (size_t)n;
    }
    return at;
}

int tokenizer_encode_after(const struct tokenizer *t, enum tokenizer_before before,
                           const char *text, size_t len, bool parse_special, uint32_t **ret_ids,
                           size_t *ret_n, struct larder_err *e)
{
    struct encoding c = {.t = t, .parse_special = parse_special};
    size_t valid;
    int rc;

    if (len > MAX_TEXT)
        return larder_fail(e, LARDER_ETOOBIG, "a text of %zu bytes; at most %u", len, MAX_TEXT);
    valid = tokenizer_valid_utf8(text, len);
    if (valid < len)
        return larder_fail(e, LARDER_ETEXT,
                           "the text is not valid UTF-8: byte 0x%02x at offset %zu; convert it "
                           "first (iconv -t UTF-8)",
                           (uint8_t)text[valid], valid);
    rc = encode_around(&c, &t->before, before, text, len, encode_normalised, e);
    bpe_done(&c.work);
    if (rc) {
        mem_free(c.out.id);
        return rc;
    }
    *ret_ids = c.out.id;
    *ret_n = c.out.n;
    return 0;
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t len, bool parse_special,
                     uint32_t **ret_ids, size_t *ret_n, struct larder_err *e)
{
    return tokenizer_encode_after(t, BEFORE_NOTHING, text, len, parse_special, ret_ids, ret_n, e);
}

/* ---- questions */

enum tokenizer_before tokenizer_before(const struct tokenizer *t, const uint32_t *ids, size_t n)
{
    return tokenizer_is_added(t, ids[n - 1]) ? BEFORE_ADDED : BEFORE_TEXT;
}

const char *tokenizer_piece(const struct tokenizer *t, uint32_t id, size_t *ret_len)
{
    if (id >= t->n_vocab)
        return NULL;
    *ret_len = tokenizer_len(t, id);
    return t->bytes + t->start[id];
}

uint32_t tokenizer_n_vocab(const struct tokenizer *t)
{
    return t->n_vocab;
}

bool tokenizer_is_special(const struct tokenizer *t, uint32_t id)
{
    return id < t->n_vocab && t->flags[id] & TOKEN_SPECIAL;
}

bool tokenizer_is_added(const struct tokenizer *t, uint32_t id)
{
    return id < t->n_vocab && t->flags[id] & TOKEN_ADDED;
}

int64_t tokenizer_bos(const struct tokenizer *t)
{
    return t->bos;
}

int64_t tokenizer_eos(const struct tokenizer *t)
{
    return t->eos;
}

bool tokenizer_adds_bos(const struct tokenizer *t)
{
    return t->add_bos;
}

enum tokenizer_kind tokenizer_kind(const struct tokenizer *t)
{
    return t->kind;
}

bool tokenizer_composes(const struct tokenizer *t)
{
    return t->nfc;
}

const char *tokenizer_stage(const struct tokenizer *t, uint32_t i)
{
    return t->stage[i] ? t->stage[i]->name : NULL;
}

int tokenizer_set_eos(struct tokenizer *t, int64_t eos, struct larder_err *e)
{
    if (eos >= (int64_t)t->n_vocab)
        return larder_fail(e, LARDER_EMODEL, "the EOS token is %lld; the vocabulary has %u tokens",
                           (long long)eos, t->n_vocab);
    t->eos = eos;
    return 0;
}

void tokenizer_fingerprint(const struct tokenizer *t, uint8_t ret[32])
{
    memcpy(ret, t->fingerprint, 32);
}
