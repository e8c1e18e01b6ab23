/* nfc.c - normalisation form C through utf8proc, with the marks of Unicode 9.0.
 *
 * The one idea: to the reference a mark that Unicode added later is a character like any other, so
 * it is neither moved nor composed with. utf8proc knows such marks; a text is therefore composed
 * piece by piece, and each of them stands between two pieces. */
#include "nfc.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <utf8proc.h>

#include "mem.h"

/* Characters with a combining class, or that compose with the one before, of Unicode 10.0 to
 * 15.0. Ascending. */
static const struct {
    int32_t first, last;
} later[] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},
    {0xc3c, 0xc3c},     {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0xece, 0xece},
    {0x1715, 0x1715},   {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},
    {0x10d24, 0x10d27}, {0x10eab, 0x10eac}, {0x10efd, 0x10eff}, {0x10f46, 0x10f50},
    {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e},
    {0x11839, 0x1183a}, {0x11930, 0x11930}, {0x1193d, 0x1193e}, {0x11943, 0x11943},
    {0x119e0, 0x119e0}, {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99},
    {0x11d42, 0x11d42}, {0x11d44, 0x11d45}, {0x11d97, 0x11d97}, {0x11f41, 0x11f42},
    {0x16ff0, 0x16ff1}, {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae},
    {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef},
};

static bool is_later(int32_t c)
{
    size_t i = 0;

    while (i < sizeof later / sizeof later[0] && later[i].last < c)
        i++;
    return i < sizeof later / sizeof later[0] && c >= later[i].first;
}

/* No character below U+0300 changes, and none of those has a byte of 0xcc or more. */
static bool may_change(const char *p, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if ((uint8_t)p[i] >= 0xcc)
            return true;
    return false;
}

/* Bytes up to the next later mark, and the length of that mark (0: the text ends). */
static size_t until_later(const char *p, size_t len, size_t *ret_mark)
{
    size_t at = 0;

    while (at < len) {
        utf8proc_int32_t c = 0;
        utf8proc_ssize_t n = 1;

        if ((uint8_t)p[at] >= 0xcc) /* U+07FD begins with 0xdf */
            n = utf8proc_iterate((const utf8proc_uint8_t *)p + at, (utf8proc_ssize_t)(len - at),
                                 &c);
        if (n > 1 && is_later(c)) {
            *ret_mark = (size_t)n;
            return at;
        }
        at += n > 0 ? (size_t)n : 1;
    }
    *ret_mark = 0;
    return len;
}

struct made {
    char *p; /* owned */
    size_t n, cap;
};

static int append(struct made *m, const void *p, size_t n, struct larder_err *e)
{
    if (m->n + n > m->cap) {
        size_t cap = 2 * m->cap + n;
        char *grown = mem_grow(m->p, cap, 1);

        if (!grown)
            return larder_fail(e, LARDER_ENOMEM, "no memory to normalise %zu bytes", cap);
        m->p = grown;
        m->cap = cap;
    }
    if (n)
        memcpy(m->p + m->n, p, n);
    m->n += n;
    return 0;
}

static int compose_piece(struct made *m, const char *p, size_t len, struct larder_err *e)
{
    utf8proc_uint8_t *piece = NULL;
    utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)len, &piece,
                                      UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    int rc;

    if (n < 0)
        return larder_fail(e, LARDER_ENOMEM, "no memory to normalise %zu bytes", len);
    rc = append(m, piece, (size_t)n, e);
    free(piece); /* utf8proc's own */
    return rc;
}

int nfc_compose(const char *text, size_t len, char **ret, size_t *ret_len, struct larder_err *e)
{
    struct made m = {0};
    int rc = 0;

    if (!may_change(text, len)) {
        *ret = NULL;
        *ret_len = len;
        return 0;
    }
    for (size_t at = 0; !rc && at < len;) {
        size_t mark, n = until_later(text + at, len - at, &mark);

        if (n)
            rc = compose_piece(&m, text + at, n, e);
        if (!rc && mark)
            rc = append(&m, text + at + n, mark, e);
        at += n + mark;
    }
    if (rc) {
        mem_free(m.p);
        return rc;
    }
    *ret = m.p;
    *ret_len = m.n;
    return 0;
}
