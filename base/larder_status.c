/* larder_status.c - names, texts and the one-line way to fail. */
#include "larder_status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int larder_fail(struct larder_err *e, int code, const char *fmt, ...)
{
    va_list ap;

    if (!e)
        return code;
    e->code = code;
    va_start(ap, fmt);
    vsnprintf(e->msg, sizeof e->msg, fmt, ap);
    va_end(ap);
    return code;
}

int larder_fail_in(struct larder_err *e, int code, const char *fmt, ...)
{
    char inner[LARDER_ERR_MSG_MAX];
    va_list ap;
    int n;

    if (!e)
        return code;
    memcpy(inner, e->msg, sizeof inner);
    inner[sizeof inner - 1] = '\0';
    e->code = code;
    va_start(ap, fmt);
    n = vsnprintf(e->msg, sizeof e->msg, fmt, ap);
    va_end(ap);
    if (n >= 0 && (size_t)n < sizeof e->msg - 1)
        snprintf(e->msg + n, sizeof e->msg - (size_t)n, ": %s", inner);
    return code;
}

const char *larder_status_name(int code)
{
    switch (code) {
#define X(name, number, text) \
    case number: \
        return "LARDER_" #name;
        LARDER_STATUS_LIST(X)
#undef X
    default:
        return "LARDER_E?";
    }
}

const char *larder_status_text(int code)
{
    switch (code) {
#define X(name, number, text) \
    case number: \
        return text;
        LARDER_STATUS_LIST(X)
#undef X
    default:
        return "unknown status";
    }
}
