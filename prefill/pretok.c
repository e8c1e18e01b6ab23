/* pretok.c - the GPT-2 pattern, and the SmolLM one that isolates digits first.
 *
 * The one idea: each alternative of
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * is a run over one class of characters, so a piece is found in one forward pass without
 * backtracking. SmolLM cuts out every single digit before that pattern sees the text, so
 * its pattern never looks across a digit. */
#include "pretok.h"

#include <stdbool.h>
#include <string.h>

#include <utf8proc.h>

enum class { LETTER, NUMBER, SPACE, OTHER, NONE };

static enum class class_of(utf8proc_int32_t c) {
    switch (utf8proc_category(c)){
        case UTF8PROC_CATEGORY_LU : case UTF8PROC_CATEGORY_LL : case UTF8PROC_CATEGORY_LT : case
        UTF8PROC_CATEGORY_LM : case UTF8PROC_CATEGORY_LO : return LETTER;
        case UTF8PROC_CATEGORY_ND : case UTF8PROC_CATEGORY_NL : case
        UTF8PROC_CATEGORY_NO : return NUMBER;
        case UTF8PROC_CATEGORY_ZS : case UTF8PROC_CATEGORY_ZL : case
        UTF8PROC_CATEGORY_ZP : return SPACE;
        default : /* White_Space among the control characters */
                    return (c >= 9 && c <= 13) || c == 0x85
            ? SPACE
            : OTHER;
    }
}

/* Class and length of the character at p; NONE at the end. */
static enum class peek(const char *p, size_t len, size_t *n) {
    utf8proc_int32_t c; utf8proc_ssize_t got;

    *n = 0; if (!len) return NONE;
    if ((unsigned char)*p < 0x80){ *n = 1; return class_of((unsigned char)*p);}
got = utf8proc_iterate((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)(len < 4 ? len : 4), &c);
*n = got > 0 ? (size_t)got : 1;
return got > 0 ? class_of(c) : OTHER;
}

/* Length of the run of characters of class c. */
static size_t run(const char *p, size_t len, enum class c)
{
    size_t at = 0, n;

    while (peek(p + at, len - at, &n) == c)
        at += n;
    return at;
}

static size_t contraction(const char *p, size_t len)
{
    static const char *const ends[] = {"s", "t", "re", "ve", "m", "ll", "d"};

    if (p[0] != '\'')
        return 0;
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        size_t n = strlen(ends[i]);

        if (len > n && !memcmp(p + 1, ends[i], n))
            return n + 1;
    }
    return 0;
}

/* White space: all of a run at the end of the text; otherwise all but its last
 * character, which the next piece may take with it; a lone one stands alone. */
static size_t spaces(const char *p, size_t len)
{
    size_t at = 0, last = 0, n;

    while (peek(p + at, len - at, &n) == SPACE) {
        last = at;
        at += n;
    }
    return at == len || !last ? at : last;
}

static size_t gpt2(const char *p, size_t len)
{
    size_t n = contraction(p, len), skip = p[0] == ' ' ? 1 : 0, first;
    enum class c;

    if (n)
        return n;
    c = peek(p + skip, len - skip, &first);
    if (c == SPACE || c == NONE)
        return spaces(p, len);
    return skip + run(p + skip, len - skip, c);
}

/* With digits cut out first, the only look across a digit that is left is that of white
 * space: before a digit it is at the end of its text and stays in one piece. */
static size_t smollm(const char *p, size_t len)
{
    size_t n, at;
    enum class c = peek(p, len, &n);

    if (c == NUMBER)
        return n;
    if (c == SPACE) {
        at = run(p, len, SPACE);
        if (peek(p + at, len - at, &n) == NUMBER)
            return at;
    }
    return gpt2(p, len);
}

static const struct {
    const char *name;
    pretok_fn *fn;
} table[] = {{"smollm", smollm}, {"gpt-2", gpt2}};

pretok_fn *pretok_find(const char *name)
{
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (!strcmp(table[i].name, name))
            return table[i].fn;
    return NULL;
}

const char *pretok_names(void)
{
    return "smollm, gpt-2";
}
