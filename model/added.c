/* added.c - the added tokens of a vocabulary and where a text spells them.
 *
 * The one idea: literals are a tree over bytes, so that a position costs as many steps as the
 * longest literal that begins there, however many tokens there are. What counts as a match
 * (words, white space, special tokens in a user's text) is decided after the longest is found,
 * as in the Hugging Face implementation: a match that does not count hides what is inside it. */
#include "added.h"

#include <string.h>

#include "mem.h"

#define NONE TOKENIZER_NONE

/* ---- construction */

static void plant(struct literals *l, const char *p, size_t n, uint32_t token)
{
    uint32_t node = 0;

    for (size_t i = 0; i < n; i++) {
        struct pair_slot *s = pair_find(&l->edge, node, (uint8_t)p[i]);

        if (s->left == NONE)
            *s = (struct pair_slot){node, (uint8_t)p[i], 0, l->n_nodes++};
        node = s->into;
    }
    if (n && l->token[node] == NONE)
        l->token[node] = token;
    if (n)
        l->first[(uint8_t)*p] = true;
}

/* Normalised as text will be: with the space that is put before every text. */
static int plant_one(struct tokenizer *t, struct literals *l, uint32_t i, struct larder_err *e)
{
    const struct tokenizer_added *a = &t->added[i];
    char *text = NULL;
    size_t n;
    int rc = 0;

    if (a->normalized)
        rc = tokenizer_normalise(t, t->prefix == PREFIX_ALWAYS, a->text, a->len, &text, &n, e);
    if (!rc)
        plant(l, text ? text : a->text, text ? n : a->len, i);
    mem_free(text);
    return rc;
}

/* Normalisation may make a literal three times as long. */
static int plant_all(struct tokenizer *t, struct literals *l, bool normalized, struct larder_err *e)
{
    uint64_t n = 1;
    int rc;

    for (uint32_t i = 0; i < t->n_added; i++)
        n += t->added[i].normalized == normalized ? 3ull * t->added[i].len + 1 : 0;
    l->token = n < UINT32_MAX ? mem_alloc(n, sizeof *l->token) : NULL;
    if (!l->token)
        return larder_fail(e, LARDER_ENOMEM, "no memory for added tokens");
    memset(l->token, 0xff, n * sizeof *l->token);
    l->n_nodes = 1;
    rc = pair_table_init(&l->edge, n, e);
    for (uint32_t i = 0; !rc && i < t->n_added; i++)
        if (t->added[i].normalized == normalized)
            rc = plant_one(t, l, i, e);
    return rc;
}

static int copy_added(struct tokenizer *t, const struct tokenizer_spec *s, struct larder_err *e)
{
    uint64_t total = 0, at = 0;

    for (uint32_t i = 0; i < s->n_added; i++)
        total += s->added[i].len;
    t->added = mem_dup(s->added, (uint64_t)s->n_added * sizeof *s->added);
    t->added_text = mem_alloc(total, 1);
    if (!t->added || !t->added_text)
        return larder_fail(e, LARDER_ENOMEM, "no memory for added tokens");
    t->n_added = s->n_added;
    for (uint32_t i = 0; i < s->n_added; i++) {
        struct tokenizer_added *a = &t->added[i];

        if (tokenizer_valid_utf8(a->text, a->len) < a->len)
            return larder_fail(e, LARDER_EMODEL, "added token %u is not valid UTF-8", a->id);
        if (a->len)
            memcpy(t->added_text + at, a->text, a->len);
        a->text = t->added_text + at;
        at += a->len;
    }
    return 0;
}

int added_init(struct tokenizer *t, const struct tokenizer_spec *spec, struct larder_err *e)
{
    int rc = copy_added(t, spec, e);

    if (!rc)
        rc = plant_all(t, &t->before, false, e);
    return rc ? rc : plant_all(t, &t->after, true, e);
}

void added_done(struct tokenizer *t)
{
    mem_free(t->added);
    mem_free(t->added_text);
    mem_free(t->before.edge.slot);
    mem_free(t->before.token);
    mem_free(t->after.edge.slot);
    mem_free(t->after.token);
}

/* ---- looking */

/* The longest literal at p, and its length; NONE: none begins there. */
static uint32_t longest_at(const struct literals *l, const char *p, size_t len, size_t *ret_n)
{
    uint32_t node = 0, best = NONE;

    for (size_t i = 0; i < len; i++) {
        const struct pair_slot *s = pair_find(&l->edge, node, (uint8_t)p[i]);

        if (s->left == NONE)
            break;
        node = s->into;
        if (l->token[node] != NONE) {
            best = l->token[node];
            *ret_n = i + 1;
        }
    }
    return best;
}

uint32_t added_find(const struct tokenizer *t, const char *p, size_t n)
{
    const struct literals *both[] = {&t->before, &t->after};

    for (int i = 0; i < 2; i++) {
        size_t got = 0;
        uint32_t found = longest_at(both[i], p, n, &got);

        if (found != NONE && got == n)
            return found;
    }
    return NONE;
}

static bool counts(const struct tokenizer_added *a, bool parse_special, const char *text,
                   size_t len, const struct added_match *m)
{
    if (a->special && !parse_special)
        return false;
    return !a->single_word ||
           !(pretok_word_before(text, m->start) || pretok_word_at(text + m->end, len - m->end));
}

/* A marked space is U+2581 in the reference, which is no white space. */
static void take_spaces(const struct tokenizer_added *a, bool marked, const char *text, size_t len,
                        size_t done, struct added_match *m)
{
    size_t n;

    while (a->lstrip && m->start > done && (n = pretok_space_before(text, m->start)) > 0 &&
           !(marked && text[m->start - 1] == ' '))
        m->start = m->start - n > done ? m->start - n : done;
    while (a->rstrip && (n = pretok_space_at(text + m->end, len - m->end)) > 0 &&
           !(marked && text[m->end] == ' '))
        m->end += n;
}

bool added_next(const struct tokenizer *t, const struct literals *l, const char *text, size_t len,
                bool parse_special, size_t done, size_t *at, struct added_match *ret)
{
    size_t i = *at, n = 0;

    while (i < len) {
        const struct tokenizer_added *a;
        uint32_t found = l->first[(uint8_t)text[i]] ? longest_at(l, text + i, len - i, &n) : NONE;

        if (found == NONE) {
            i++;
            continue;
        }
        a = &t->added[found];
        *ret = (struct added_match){i, i + n, a->id};
        i += n;
        if (!counts(a, parse_special, text, len, ret))
            continue;
        take_spaces(a, l == &t->after && t->mark_first, text, len, done, ret);
        *at = i;
        return true;
    }
    *at = len;
    return false;
}
