/* pretok.c - the patterns of GPT-2, Llama 3 and Qwen 2, digits, and llama.cpp's default.
 *
 * The one idea: each alternative of
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * (and of its descendants) is a run over one class of characters, so a piece is found in one
 * forward pass without backtracking. A pre-tokenizer of several steps is a list of stages. */
#include "pretok.h"

#include <stdint.h>
#include <string.h>

#include <utf8proc.h>

enum char_class { LETTER, NUMBER, SPACE, OTHER, NONE };

/* Letters and digits of Unicode 15.1 and 16.0, which utf8proc 2.8 (Unicode 15.0) does not know
 * and the Hugging Face tokenizers do. Ascending. */
static const struct {
    uint32_t first, last;
    enum char_class is;
} newer[] = {
    {0x1c89, 0x1c8a, LETTER},   {0xa7cb, 0xa7cd, LETTER},   {0xa7da, 0xa7dc, LETTER},
    {0x105c0, 0x105f3, LETTER}, {0x10d40, 0x10d49, NUMBER}, {0x10d4a, 0x10d65, LETTER},
    {0x10d6f, 0x10d85, LETTER}, {0x10ec2, 0x10ec4, LETTER}, {0x11380, 0x11389, LETTER},
    {0x1138b, 0x1138b, LETTER}, {0x1138e, 0x1138e, LETTER}, {0x11390, 0x113b5, LETTER},
    {0x113b7, 0x113b7, LETTER}, {0x113d1, 0x113d1, LETTER}, {0x113d3, 0x113d3, LETTER},
    {0x116d0, 0x116e3, NUMBER}, {0x11bc0, 0x11be0, LETTER}, {0x11bf0, 0x11bf9, NUMBER},
    {0x13460, 0x143fa, LETTER}, {0x16100, 0x1611d, LETTER}, {0x16130, 0x16139, NUMBER},
    {0x16d40, 0x16d6c, LETTER}, {0x16d70, 0x16d79, NUMBER}, {0x18cff, 0x18cff, LETTER},
    {0x1ccf0, 0x1ccf9, NUMBER}, {0x1e5d0, 0x1e5ed, LETTER}, {0x1e5f0, 0x1e5f0, LETTER},
    {0x1e5f1, 0x1e5fa, NUMBER}, {0x2ebf0, 0x2ee5d, LETTER},
};

static enum char_class class_of_newer(utf8proc_int32_t c)
{
    for (size_t i = 0; i < sizeof newer / sizeof newer[0]; i++)
        if ((uint32_t)c >= newer[i].first && (uint32_t)c <= newer[i].last)
            return newer[i].is;
    return OTHER;
}

static enum char_class class_of(utf8proc_int32_t c)
{
    switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
        return LETTER;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
        return NUMBER;
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
        return SPACE;
    case UTF8PROC_CATEGORY_CN:
        return class_of_newer(c);
    default: /* White_Space among the control characters */
        return (c >= 9 && c <= 13) || c == 0x85 ? SPACE : OTHER;
    }
}

/* The character at p and its length; -1 at the end. */
static utf8proc_int32_t decode(const char *p, size_t len, size_t *n)
{
    utf8proc_int32_t c = -1;
    utf8proc_ssize_t got;

    *n = len ? 1 : 0;
    if (!len)
        return -1;
    if ((unsigned char)*p < 0x80)
        return (unsigned char)*p;
    got = utf8proc_iterate((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)(len < 4 ? len : 4), &c);
    *n = got > 0 ? (size_t)got : 1;
    return c;
}

/* Class and length of the character at p; NONE at the end. */
static enum char_class peek(const char *p, size_t len, size_t *n)
{
    utf8proc_int32_t c = decode(p, len, n);

    if (!len)
        return NONE;
    return c >= 0 ? class_of(c) : OTHER;
}

/* Length of the run of characters of class c. */
static size_t run(const char *p, size_t len, enum char_class c)
{
    size_t at = 0, n;

    while (peek(p + at, len - at, &n) == c)
        at += n;
    return at;
}

static bool is_newline(const char *p, size_t len)
{
    return len && (*p == '\r' || *p == '\n');
}

/* ---- contractions */

static const char *const ends[] = {"s", "t", "re", "ve", "m", "ll", "d"};

static size_t contraction(const char *p, size_t len)
{
    if (p[0] != '\'')
        return 0;
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        size_t n = strlen(ends[i]);

        if (len > n && !memcmp(p + 1, ends[i], n))
            return n + 1;
    }
    return 0;
}

/* In either case; the long s (U+017F) is an s then. */
static size_t contraction_any_case(const char *p, size_t len)
{
    if (p[0] != '\'')
        return 0;
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        size_t n = strlen(ends[i]), k = 0;

        while (k < n && k + 1 < len && (p[k + 1] | 0x20) == ends[i][k])
            k++;
        if (k == n)
            return n + 1;
    }
    return len > 2 && !memcmp(p + 1, "\xc5\xbf", 2) ? 3 : 0;
}

/* ---- patterns */

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
    enum char_class c;

    if (n)
        return n;
    c = peek(p + skip, len - skip, &first);
    if (c == SPACE || c == NONE)
        return spaces(p, len);
    return skip + run(p + skip, len - skip, c);
}

/* White space up to its last line end, or as in GPT-2 where there is none. */
static size_t lines(const char *p, size_t len)
{
    size_t at = 0, end = 0, n;

    while (peek(p + at, len - at, &n) == SPACE) {
        at += n;
        if (is_newline(p + at - n, n))
            end = at;
    }
    return end ? end : spaces(p, len);
}

/* A number: at most `most` of its characters. */
static size_t number(const char *p, size_t len, int most)
{
    size_t at = 0, n;

    while (most-- && peek(p + at, len - at, &n) == NUMBER)
        at += n;
    return at;
}

static size_t llama3_like(const char *p, size_t len, int digits)
{
    size_t n = contraction_any_case(p, len), skip = p[0] == ' ' ? 1 : 0, first, next;
    enum char_class c;

    if (n)
        return n;
    c = peek(p, len, &first);
    if (c == LETTER)
        return run(p, len, LETTER);
    if (c == NUMBER)
        return number(p, len, digits);
    if (!is_newline(p, len) && peek(p + first, len - first, &next) == LETTER)
        return first + run(p + first, len - first, LETTER);
    n = skip + run(p + skip, len - skip, OTHER);
    if (n == skip)
        return lines(p, len);
    while (is_newline(p + n, len - n))
        n++;
    return n;
}

static size_t llama3(const char *p, size_t len)
{
    return llama3_like(p, len, 3);
}

static size_t qwen2(const char *p, size_t len)
{
    return llama3_like(p, len, 1);
}

/* Everything up to the next number, or up to the end of one. */
static size_t around_numbers(const char *p, size_t len, int most)
{
    size_t at = number(p, len, most), n;

    if (at)
        return at;
    while (at < len && peek(p + at, len - at, &n) != NUMBER)
        at += n;
    return at;
}

static size_t digits(const char *p, size_t len)
{
    return around_numbers(p, len, 1);
}

static size_t digit_runs(const char *p, size_t len)
{
    return around_numbers(p, len, -1);
}

static bool is_punctuation(utf8proc_int32_t c)
{
    utf8proc_category_t cat = utf8proc_category(c);

    return (cat >= UTF8PROC_CATEGORY_PC && cat <= UTF8PROC_CATEGORY_PO) ||
           (c > 0 && c < 128 && strchr("$+<=>^~|", (int)c));
}

/* Runs of punctuation, and what is between them. */
static size_t punctuation(const char *p, size_t len)
{
    size_t n, at;
    bool is = is_punctuation(decode(p, len, &n));

    for (at = n; at < len && is_punctuation(decode(p + at, len - at, &n)) == is;)
        at += n;
    return at;
}

static bool three_digits(const char *p, size_t len)
{
    return len >= 3 && p[0] >= '0' && p[0] <= '9' && p[1] >= '0' && p[1] <= '9' && p[2] >= '0' &&
           p[2] <= '9';
}

static size_t threes(const char *p, size_t len)
{
    size_t at = 0;

    if (three_digits(p, len))
        return 3;
    while (at < len && !three_digits(p + at, len - at))
        at++;
    return at;
}

/* ---- tables */

#define WORDS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define REST "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

static const struct pretok_stage stages[] = {
    {"gpt2", gpt2,
     "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", true},
    {"llama3", llama3, "(?i:'s|'t|'re|'ve|'m|'ll|'d)" WORDS "\\p{N}{1,3}" REST, true},
    {"qwen2", qwen2, "(?i:'s|'t|'re|'ve|'m|'ll|'d)" WORDS "\\p{N}" REST, true},
    {"digits", digits, "\\p{N}", false},
    {"digit-runs", digit_runs, "\\p{N}+", false},
    {"punctuation", punctuation, "[\\p{P}\\$\\+<=>\\^~\\|]+", false},
    {"threes", threes, "[0-9][0-9][0-9]", false},
};

const struct pretok_stage *pretok_stage(const char *name)
{
    for (size_t i = 0; i < sizeof stages / sizeof stages[0]; i++)
        if (!strcmp(stages[i].name, name))
            return &stages[i];
    return NULL;
}

const struct pretok_stage *pretok_stage_for(const char *pattern)
{
    for (size_t i = 0; i < sizeof stages / sizeof stages[0]; i++)
        if (!strcmp(stages[i].pattern, pattern))
            return &stages[i];
    return NULL;
}

static const struct pretok table[] = {
    {.name = "smollm", .stage = {"digits", "gpt2"}},
    {.name = "gpt-2", .stage = {"gpt2"}},
    {.name = "llama-bpe", .stage = {"llama3"}, .ignore_merges = true, .add_bos = true},
    {.name = "qwen2", .stage = {"qwen2"}, .nfc = true},
    {.name = "starcoder", .stage = {"digits", "gpt2"}},
    {.name = "refact", .stage = {"digits", "gpt2"}},
    {.name = "default", .stage = {"punctuation", "gpt2", "digit-runs", "threes"}},
};

const struct pretok *pretok_find(const char *name)
{
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (!strcmp(table[i].name, name))
            return &table[i];
    return NULL;
}

const char *pretok_names(void)
{
    return "smollm, gpt-2, llama-bpe, qwen2, starcoder, refact, default";
}

/* ---- single characters */

/* Start of the character that ends before p + len. */
static size_t last_char(const char *p, size_t len)
{
    size_t at = len;

    while (at && ((unsigned char)p[--at] & 0xc0) == 0x80)
        continue;
    return at;
}

size_t pretok_space_at(const char *p, size_t len)
{
    size_t n;

    return peek(p, len, &n) == SPACE ? n : 0;
}

size_t pretok_space_before(const char *p, size_t len)
{
    size_t at = last_char(p, len);

    return pretok_space_at(p + at, len - at);
}

/* \w: letters and other alphabetic characters, marks, digits, connectors and joiners. */
bool pretok_word_at(const char *p, size_t len)
{
    size_t n;
    utf8proc_int32_t c = decode(p, len, &n);
    utf8proc_category_t cat;

    if (c < 0)
        return false;
    cat = utf8proc_category(c);
    return class_of(c) == LETTER || (cat >= UTF8PROC_CATEGORY_MN && cat <= UTF8PROC_CATEGORY_NL) ||
           (class_of(c) == NUMBER && cat == UTF8PROC_CATEGORY_CN) || cat == UTF8PROC_CATEGORY_PC ||
           c == 0x200c || c == 0x200d || (c >= 0x24b6 && c <= 0x24e9) ||
           (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) ||
           (c >= 0x1f170 && c <= 0x1f189);
}

bool pretok_word_before(const char *p, size_t len)
{
    size_t at = last_char(p, len);

    return len && pretok_word_at(p + at, len - at);
}
