/* textout.c - a byte stream cut into whole UTF-8 characters.
 *
 * The one idea: at most four bytes wait. They are complete, can become complete, or
 * cannot; in the last case the first of them leaves as U+FFFD and the rest is looked
 * at again, so that no valid character is lost after a broken one. */
#include "textout.h"

#include <string.h>

#include "mem.h"

/* Bytes of the character that begins with `c`, by the lead byte alone; 0: it cannot begin one. */
static size_t char_len(unsigned char c)
{
    if (c < 0x80)
        return 1;
    if (c >= 0xc2 && c <= 0xdf)
        return 2;
    if (c >= 0xe0 && c <= 0xef)
        return 3;
    return c >= 0xf0 && c <= 0xf4 ? 4 : 0;
}

/* The second byte excludes overlong forms, surrogates and what lies above U+10FFFF. */
static bool second_ok(unsigned char first, unsigned char c)
{
    unsigned char lo = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    unsigned char hi = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;

    return c >= lo && c <= hi;
}

/* Could part[0..n) be the beginning of a character? */
static bool is_prefix(const unsigned char *part, size_t n)
{
    size_t len = char_len(part[0]);

    if (!len || n > len || (n > 1 && !second_ok(part[0], part[1])))
        return false;
    for (size_t i = 2; i < n; i++)
        if (part[i] < 0x80 || part[i] > 0xbf)
            return false;
    return true;
}

static void emit(struct text_out *t, const void *bytes, size_t n)
{
    if (t->len + n + 1 > t->cap) {
        size_t cap = 2 * t->cap + n + 256;
        char *p = mem_grow(t->buf, cap, 1);

        if (!p) {
            t->failed = true;
            return;
        }
        t->buf = p;
        t->cap = cap;
    }
    memcpy(t->buf + t->len, bytes, n);
    t->len += n;
    t->buf[t->len] = '\0';
    if (t->stream && fwrite(bytes, 1, n, t->stream) != n)
        t->failed = true;
}

static void replace_first(struct text_out *t)
{
    emit(t, "\xef\xbf\xbd", 3);
    t->n_part--;
    memmove(t->part, t->part + 1, t->n_part);
}

static void add_byte(struct text_out *t, unsigned char c)
{
    t->part[t->n_part++] = c;
    while (t->n_part && !is_prefix(t->part, t->n_part))
        replace_first(t);
    if (t->n_part && t->n_part == char_len(t->part[0])) {
        emit(t, t->part, t->n_part);
        t->n_part = 0;
    }
}

void text_out_add(struct text_out *t, const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        add_byte(t, (unsigned char)bytes[i]);
    if (t->stream && fflush(t->stream))
        t->failed = true;
}

void text_out_end(struct text_out *t)
{
    while (t->n_part)
        replace_first(t);
    emit(t, "", 0);
}

void text_out_done(struct text_out *t)
{
    mem_free(t->buf);
    *t = (struct text_out){0};
}
