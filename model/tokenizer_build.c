/* tokenizer_build.c - the tables of a tokenizer, from what a model's files provide.
 *
 * The one idea: tokens are kept as the bytes they stand for (spaces as spaces), and text is
 * brought into the same form, so that merging, looking up and decoding share one spelling.
 * What only a literal may become is in no table that merging reads: no text can merge into a
 * token that ends a turn. */
#include "tokenizer_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <utf8proc.h>

#include "added.h"
#include "geom.h"
#include "mem.h"
#include "sha256.h"

#define NONE TOKENIZER_NONE
#define META "\xe2\x96\x81" /* U+2581, which stands for a space */

/* ---- look-up tables */

static uint64_t hash_bytes(const char *p, size_t n)
{
    uint64_t h = 0xcbf29ce484222325ull;

    for (size_t i = 0; i < n; i++)
        h = (h ^ (uint8_t)p[i]) * 0x100000001b3ull;
    return h ^ h >> 29;
}

static uint64_t hash_pair(uint32_t a, uint32_t b)
{
    uint64_t h = ((uint64_t)a << 32 | b) * 0x9e3779b97f4a7c15ull;

    return h ^ h >> 32;
}

/* Slots for n items at half load at most: a power of two minus one. */
static uint32_t mask_for(uint64_t n)
{
    uint32_t size = 16;

    while (size < 2 * n && size < 1u << 31)
        size *= 2;
    return size - 1;
}

static uint32_t *word_slot(const struct tokenizer *t, const char *p, size_t n)
{
    uint32_t i = (uint32_t)hash_bytes(p, n) & t->word_mask;

    for (;; i = (i + 1) & t->word_mask) {
        uint32_t id = t->word_slot[i];

        if (id == NONE || (tokenizer_len(t, id) == n && !memcmp(t->bytes + t->start[id], p, n)))
            return &t->word_slot[i];
    }
}

uint32_t tokenizer_find_word(const struct tokenizer *t, const char *p, size_t n)
{
    return *word_slot(t, p, n);
}

struct pair_slot *pair_find(const struct pair_table *t, uint32_t left, uint32_t right)
{
    uint32_t i = (uint32_t)hash_pair(left, right) & t->mask;

    for (;; i = (i + 1) & t->mask) {
        struct pair_slot *m = &t->slot[i];

        if (m->left == NONE || (m->left == left && m->right == right))
            return m;
    }
}

int pair_table_init(struct pair_table *t, uint64_t n, struct larder_err *e)
{
    t->mask = mask_for(n);
    t->slot = mem_alloc((uint64_t)t->mask + 1, sizeof *t->slot);
    if (!t->slot)
        return larder_fail(e, LARDER_ENOMEM, "no memory for %llu pairs", (unsigned long long)n);
    memset(t->slot, 0xff, ((size_t)t->mask + 1) * sizeof *t->slot);
    return 0;
}

/* ---- spelling */

/* The byte-level alphabet: printable Latin-1 bytes stand for themselves, the others for
 * code points from 256 on, in order. Byte of a code point, or -1. */
static int alphabet_byte(utf8proc_int32_t c)
{
    int n = 0;

    if ((c >= 33 && c <= 126) || (c >= 161 && c <= 172) || (c >= 174 && c <= 255))
        return (int)c;
    if (c < 256)
        return -1;
    for (int b = 0; b < 256; b++) {
        if ((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174)
            continue;
        if (c == 256 + n++)
            return b;
    }
    return -1;
}

/* Bytes that a token in the byte-level alphabet spells, at most len; false: it is not in it. */
static bool spell_bytes(const char *token, uint32_t len, char *out, size_t *ret_n)
{
    size_t n = 0;

    for (uint32_t at = 0; at < len;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t got = utf8proc_iterate((const utf8proc_uint8_t *)token + at, len - at, &c);
        int b = got > 0 ? alphabet_byte(c) : -1;

        if (b < 0)
            return false;
        out[n++] = (char)b;
        at += (uint32_t)got;
    }
    *ret_n = n;
    return true;
}

static size_t spell_spaces(const char *token, size_t len, char *out)
{
    size_t n = 0;

    for (size_t at = 0; at < len; n++) {
        bool meta = len - at >= 3 && !memcmp(token + at, META, 3);

        out[n] = meta ? ' ' : token[at];
        at += meta ? 3 : 1;
    }
    return n;
}

/* "<0x4A>": its byte; anything else: -1. */
static int byte_of(const char *token, size_t len)
{
    static const char hex[] = "0123456789ABCDEF";
    const char *a, *b;

    if (len != 6 || memcmp(token, "<0x", 3) || token[5] != '>' || !token[3] || !token[4])
        return -1;
    a = strchr(hex, token[3]);
    b = strchr(hex, token[4]);
    return a && b ? (int)(16 * (a - hex) + (b - hex)) : -1;
}

/* What token i stands for, and whether merging may reach it. */
static int spell(struct tokenizer *t, const struct tokenizer_spec *s, uint32_t i, char *out,
                 size_t *ret_n, struct larder_err *e)
{
    const char *token = s->token[i];
    uint32_t len = token ? s->token_len[i] : 0;
    int byte = t->kind == TOKENIZER_BYTES || !token ? -1 : byte_of(token, len);

    *ret_n = len;
    t->word[i] = token && len && !s->literal[i] && byte < 0;
    if (byte >= 0) {
        out[0] = (char)byte;
        *ret_n = 1;
        t->byte_token[byte] = i;
    } else if (!t->word[i]) {
        if (len)
            memcpy(out, token, len);
    } else if (t->kind == TOKENIZER_BYTES) {
        if (spell_bytes(token, len, out, ret_n))
            return 0;
        if (!(t->flags[i] & TOKEN_ADDED))
            return larder_fail(e, LARDER_EMODEL,
                               "token %u is not spelled in the byte-level alphabet", i);
        t->word[i] = false; /* spelled as it is, and so out of reach */
        memcpy(out, token, len);
        *ret_n = len;
    } else {
        /* a space in text is never looked up as itself */
        t->word[i] = !memchr(token, ' ', len);
        *ret_n = spell_spaces(token, len, out);
    }
    return 0;
}

static int load_tokens(struct tokenizer *t, const struct tokenizer_spec *s, struct larder_err *e)
{
    uint64_t total = 0, at = 0;

    for (uint32_t i = 0; i < s->n_vocab; i++)
        total += s->token[i] ? s->token_len[i] : 0;
    t->bytes = mem_alloc(total, 1);
    t->start = mem_alloc((uint64_t)s->n_vocab + 1, sizeof *t->start);
    t->word = mem_zalloc(s->n_vocab, 1);
    t->flags = mem_zalloc(s->n_vocab, 1);
    if (!t->bytes || !t->start || !t->word || !t->flags)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the vocabulary");
    for (uint32_t i = 0; i < s->n_added; i++) {
        const struct tokenizer_added *a = &s->added[i];

        if (a->id >= s->n_vocab)
            return larder_fail(e, LARDER_EMODEL, "added token %u is not in the vocabulary", a->id);
        t->flags[a->id] |= (uint8_t)(TOKEN_ADDED | (a->special ? TOKEN_SPECIAL : 0));
    }
    for (uint32_t i = 0; i < s->n_vocab; i++) {
        size_t n;
        int rc = spell(t, s, i, t->bytes + at, &n, e);

        if (rc)
            return rc;
        t->start[i] = at;
        at += n;
    }
    t->start[s->n_vocab] = at;
    return 0;
}

/* ---- words and merges */

/* Does p hold a space behind another character? */
static bool has_inner_space(const char *p, size_t n)
{
    for (size_t i = 1; i < n; i++)
        if (p[i] == ' ' && p[i - 1] != ' ')
            return true;
    return false;
}

/* Every byte of a text must have a token, so that nothing is lost. */
static int check_fallback(const struct tokenizer *t, struct larder_err *e)
{
    if (t->kind == TOKENIZER_BYTES)
        return 0;
    if (tokenizer_find_word(t, " ", 1) == NONE)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "a vocabulary without a token for U+2581 is not supported");
    for (unsigned b = 0; b < 256; b++)
        if (t->byte_token[b] == NONE)
            return larder_fail(e, LARDER_EUNSUPPORTED,
                               "a vocabulary without byte fallback is not supported; token "
                               "<0x%02X> is missing",
                               b);
    return 0;
}

static int index_words(struct tokenizer *t, struct larder_err *e)
{
    t->word_mask = mask_for(t->n_vocab);
    t->word_slot = mem_alloc((uint64_t)t->word_mask + 1, sizeof *t->word_slot);
    if (!t->word_slot)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the vocabulary");
    memset(t->word_slot, 0xff, ((size_t)t->word_mask + 1) * sizeof *t->word_slot);
    t->space_leads = true;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        uint32_t *slot;

        if (!t->word[i])
            continue;
        slot = word_slot(t, t->bytes + t->start[i], tokenizer_len(t, i));
        if (*slot == NONE)
            *slot = i;
        t->space_leads &= !has_inner_space(t->bytes + t->start[i], tokenizer_len(t, i));
    }
    for (unsigned b = 0; b < 256 && t->kind == TOKENIZER_BYTES; b++) {
        char c = (char)b;

        t->byte_token[b] = tokenizer_find_word(t, &c, 1);
    }
    return check_fallback(t, e);
}

static int spell_part(const struct tokenizer *t, const char *p, size_t len, char *out,
                      size_t *ret_n, uint32_t rank, struct larder_err *e)
{
    if (t->kind != TOKENIZER_BYTES) {
        *ret_n = spell_spaces(p, len, out);
        return 0;
    }
    if (!spell_bytes(p, (uint32_t)len, out, ret_n))
        return larder_fail(e, LARDER_EMODEL, "merge %u is not spelled in the byte-level alphabet",
                           rank);
    return 0;
}

/* A merge that has a special token in it would let text become one: it is left out. */
static bool is_special(const struct tokenizer *t, const char *p, size_t n)
{
    uint32_t i = added_find(t, p, n);

    return i != NONE && t->added[i].special;
}

/* One "left right" line: both sides and what they make must be tokens. */
static int add_merge(struct tokenizer *t, const char *m, uint32_t len, uint32_t rank, char *buf,
                     struct larder_err *e)
{
    const char *space = memchr(m, ' ', len);
    size_t left, right;
    uint32_t l, r, into;
    struct pair_slot *slot;
    int rc;

    if (!space)
        return larder_fail(e, LARDER_EMODEL, "merge %u has no space", rank);
    rc = spell_part(t, m, (size_t)(space - m), buf, &left, rank, e);
    if (!rc)
        rc = spell_part(t, space + 1, len - (size_t)(space - m) - 1, buf + left, &right, rank, e);
    if (rc)
        return rc;
    l = tokenizer_find_word(t, buf, left);
    r = tokenizer_find_word(t, buf + left, right);
    into = tokenizer_find_word(t, buf, left + right);
    if (l == NONE || r == NONE || into == NONE)
        return is_special(t, buf, left) || is_special(t, buf + left, right) ||
                       is_special(t, buf, left + right)
                   ? 0
                   : larder_fail(e, LARDER_EMODEL,
                                 "merge %u names a token that the vocabulary lacks", rank);
    slot = pair_find(&t->merges, l, r);
    if (slot->left != NONE)
        return larder_fail(e, LARDER_EMODEL, "merge %u repeats merge %u", rank, slot->rank);
    *slot = (struct pair_slot){l, r, rank, into};
    return 0;
}

static int index_merges(struct tokenizer *t, const struct tokenizer_spec *s, struct larder_err *e)
{
    uint32_t longest = 0;
    char *buf;
    int rc;

    for (uint32_t i = 0; i < s->n_merges; i++)
        if (s->merge_len[i] > longest)
            longest = s->merge_len[i];
    rc = pair_table_init(&t->merges, s->n_merges, e);
    if (rc)
        return rc;
    buf = mem_alloc(longest, 1);
    if (!buf)
        return larder_fail(e, LARDER_ENOMEM, "no memory for merges");
    for (uint32_t i = 0; !rc && i < s->n_merges; i++)
        rc = add_merge(t, s->merge[i], s->merge_len[i], i, buf, e);
    mem_free(buf);
    return rc;
}

/* ---- scores */

struct scored {
    float score;
    uint32_t id;
};

static int better_first(const void *a, const void *b)
{
    float x = ((const struct scored *)a)->score, y = ((const struct scored *)b)->score;

    return x > y ? -1 : x < y;
}

/* Equal scores share a rank, so that the leftmost of equals merges first. */
static int rank_scores(struct tokenizer *t, const struct tokenizer_spec *s, struct larder_err *e)
{
    struct scored *all = mem_alloc(t->n_vocab, sizeof *all);
    uint32_t rank = 0;

    t->rank = mem_alloc(t->n_vocab, sizeof *t->rank);
    if (!all || !t->rank) {
        mem_free(all);
        return larder_fail(e, LARDER_ENOMEM, "no memory for scores");
    }
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (!(s->score[i] >= -1e30f && s->score[i] <= 1e30f)) {
            mem_free(all);
            return larder_fail(e, LARDER_EMODEL, "the score of token %u is not a finite number", i);
        }
        all[i] = (struct scored){s->score[i], i};
    }
    qsort(all, t->n_vocab, sizeof *all, better_first);
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        rank += i && all[i].score < all[i - 1].score;
        t->rank[all[i].id] = rank;
    }
    mem_free(all);
    return 0;
}

/* ---- fingerprint */

static void add_field(struct sha256 *h, const void *p, uint32_t n)
{
    uint8_t len[4] = {(uint8_t)n, (uint8_t)(n >> 8), (uint8_t)(n >> 16), (uint8_t)(n >> 24)};

    sha256_add(h, len, 4);
    sha256_add(h, p, n);
}

static void add_text(struct sha256 *h, const char *s)
{
    add_field(h, s, (uint32_t)strlen(s));
}

static void add_vocabulary(struct sha256 *h, const struct tokenizer_spec *s)
{
    for (uint32_t i = 0; i < s->n_vocab; i++)
        add_field(h, s->token[i] ? s->token[i] : "", s->token[i] ? s->token_len[i] : 0);
    add_field(h, s->literal, s->n_vocab);
    for (uint32_t i = 0; i < s->n_merges; i++)
        add_field(h, s->merge[i], s->merge_len[i]);
}

/* Version 1 has no words for what came later, and what it names keeps its keys. */
static bool is_version_1(const struct tokenizer_spec *s)
{
    if (!s->pretok || s->kind != TOKENIZER_BYTES || s->add_bos ||
        (strcmp(s->pretok, "smollm") && strcmp(s->pretok, "gpt-2")))
        return false;
    for (uint32_t i = 0; i < s->n_added; i++)
        if (!s->added[i].special)
            return false;
    return true;
}

static void add_version_2(struct sha256 *h, const struct tokenizer_spec *s)
{
    static const char *const kind[] = {"bytes", "merges", "scores"};
    char line[256];

    add_text(h, "larder-tokenizer-2");
    snprintf(line, sizeof line,
             "%s vocab=%u merges=%u added=%u nfc=%d prefix=%d mark_first=%d split_spaces=%d "
             "ignore_merges=%d "
             "bos=%lld",
             kind[s->kind], s->n_vocab, s->n_merges, s->n_added, s->nfc, (int)s->prefix,
             s->mark_first, s->split_spaces, s->ignore_merges, s->add_bos ? (long long)s->bos : -1);
    add_text(h, line);
    for (int i = 0; i < PRETOK_STAGES; i++)
        add_text(h, s->stage[i] ? s->stage[i]->name : "");
    add_vocabulary(h, s);
    for (uint32_t i = 0; s->score && i < s->n_vocab; i++) {
        snprintf(line, sizeof line, "%a", (double)s->score[i]);
        add_text(h, line);
    }
    for (uint32_t i = 0; i < s->n_added; i++) {
        const struct tokenizer_added *a = &s->added[i];

        snprintf(line, sizeof line,
                 "%u special=%d lstrip=%d rstrip=%d single_word=%d normalized=%d", a->id,
                 a->special, a->lstrip, a->rstrip, a->single_word, a->normalized);
        add_text(h, line);
        add_field(h, a->text, a->len);
    }
}

/* Everything that decides how text becomes tokens (PROTOCOL.md section 2). */
static int take_fingerprint(struct tokenizer *t, const struct tokenizer_spec *s,
                            struct larder_err *e)
{
    struct sha256 *h = sha256_new();

    if (!h)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    if (is_version_1(s)) {
        add_text(h, "larder-tokenizer-1");
        add_text(h, "gpt2");
        add_text(h, s->pretok);
        add_vocabulary(h, s);
    } else {
        add_version_2(h, s);
    }
    sha256_get(h, t->fingerprint);
    sha256_free(h);
    return 0;
}

/* ---- life */

static int check_id(const char *what, int64_t id, uint32_t n_vocab, struct larder_err *e)
{
    return id < (int64_t)n_vocab
               ? 0
               : larder_fail(e, LARDER_EMODEL, "%s is token %lld; the vocabulary has %u", what,
                             (long long)id, n_vocab);
}

static int check_spec(const struct tokenizer_spec *s, struct larder_err *e)
{
    int rc;

    if (!s->n_vocab || s->n_vocab > KV_MAX_VOCAB)
        return larder_fail(e, LARDER_EMODEL, "a vocabulary of %u tokens", s->n_vocab);
    if (s->add_bos && s->bos < 0)
        return larder_fail(e, LARDER_EMODEL, "texts begin with a BOS token, but none is named");
    rc = check_id("the BOS token", s->bos, s->n_vocab, e);
    return rc ? rc : check_id("the EOS token", s->eos, s->n_vocab, e);
}

static void take_steps(struct tokenizer *t, const struct tokenizer_spec *s)
{
    t->kind = s->kind;
    t->n_vocab = s->n_vocab;
    t->nfc = s->nfc;
    t->prefix = s->prefix;
    t->mark_first = s->mark_first;
    t->split_spaces = s->split_spaces;
    t->ignore_merges = s->ignore_merges;
    t->bos = s->bos;
    t->eos = s->eos;
    t->add_bos = s->add_bos;
    memcpy(t->stage, s->stage, sizeof t->stage);
    for (int b = 0; b < 256; b++)
        t->byte_token[b] = NONE;
}

int tokenizer_new(struct tokenizer **ret, const struct tokenizer_spec *spec, struct larder_err *e)
{
    struct tokenizer *t;
    int rc = check_spec(spec, e);

    if (rc)
        return rc;
    t = mem_zalloc(1, sizeof *t);
    if (!t)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    take_steps(t, spec);
    rc = load_tokens(t, spec, e);
    if (!rc)
        rc = added_init(t, spec, e);
    if (!rc)
        rc = index_words(t, e);
    if (!rc)
        rc = t->kind == TOKENIZER_SCORES ? rank_scores(t, spec, e) : index_merges(t, spec, e);
    if (!rc)
        rc = take_fingerprint(t, spec, e);
    if (rc) {
        tokenizer_free(t);
        return rc;
    }
    *ret = t;
    return 0;
}

void tokenizer_free(struct tokenizer *t)
{
    if (!t)
        return;
    added_done(t);
    mem_free(t->bytes);
    mem_free(t->start);
    mem_free(t->word);
    mem_free(t->flags);
    mem_free(t->word_slot);
    mem_free(t->merges.slot);
    mem_free(t->rank);
    mem_free(t);
}
