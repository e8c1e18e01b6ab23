/* larder_status.h - status codes and error detail shared by every part of larder.
 *
 * Purpose    One list of codes: the numbers cross the wire and the library
 *            boundary, so codes are only ever appended, never renumbered.
 * Errors     A function that can fail returns 0 or one of these negative codes
 *            and takes a `struct larder_err *` (NULL allowed) as last parameter;
 *            larder_fail() fills it and returns the code, so failing is one line.
 * Threads    No state; safe from any thread.
 */
#ifndef LARDER_STATUS_H
#define LARDER_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

/* X(name, number, short text) - the text says what happened in general; the
 * message in struct larder_err says what happened here and what to do. */
#define LARDER_STATUS_LIST(X) \
    X(OK, 0, "success") \
    X(EINVAL, -1, "invalid argument") \
    X(ENOMEM, -2, "out of memory") \
    X(EIO, -3, "input or output failed") \
    X(ENOTFOUND, -4, "no such entry") \
    X(EFULL, -5, "store budget exhausted") \
    X(EVERSION, -6, "unknown format or protocol version") \
    X(EDAMAGED, -7, "stored bytes fail verification") \
    X(ETOOBIG, -8, "exceeds a limit") \
    X(EUNSUPPORTED, -9, "not supported") \
    X(EMODEL, -10, "model file unusable") \
    X(ETEXT, -11, "text is not valid UTF-8") \
    X(EEMPTY, -12, "document is empty") \
    X(ETOOLONG, -13, "document longer than the model's positions") \
    X(EPOLICY, -14, "invalid pruning policy") \
    X(EBUDGET, -15, "row budget too small") \
    X(ENODAEMON, -16, "daemon not reachable") \
    X(EPROTO, -17, "protocol violation") \
    X(ETIMEOUT, -18, "deadline passed") \
    X(ECANCELED, -19, "canceled") \
    X(EWORKER, -20, "prefill worker failed") \
    X(EBACKEND, -21, "compute backend not available") \
    X(ELIMIT, -22, "client limit reached") \
    X(ENUMERIC, -23, "computation produced a non-finite value") \
    X(EUNKNOWNMODEL, -24, "model not configured") \
    X(ECONFIG, -25, "invalid configuration") \
    X(EBUSY, -26, "resource is in use") \
    X(EINTERNAL, -27, "internal error")

enum larder_status {
#define X(name, number, text) LARDER_##name = number,
    LARDER_STATUS_LIST(X)
#undef X
};

#define LARDER_ERR_MSG_MAX 512

struct larder_err {
    int code;                     /* the code returned */
    char msg[LARDER_ERR_MSG_MAX]; /* one line: what happened, what to do */
};

#if defined(__GNUC__)
#define LARDER_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define LARDER_API __attribute__((visibility("default")))
#else
#define LARDER_PRINTF(fmt, args)
#define LARDER_API
#endif

/* Fill `e` (may be NULL) and return `code`. */
int larder_fail(struct larder_err *e, int code, const char *fmt, ...) LARDER_PRINTF(3, 4);

/* Put "context: " before the message already in `e` (may be NULL); returns `code`. */
int larder_fail_in(struct larder_err *e, int code, const char *fmt, ...) LARDER_PRINTF(3, 4);

/* "LARDER_ENOTFOUND"; "LARDER_E?" for a number that is not in the list. */
LARDER_API const char *larder_status_name(int code);

/* "no such entry"; never NULL. */
LARDER_API const char *larder_status_text(int code);

#ifdef __cplusplus
}
#endif
#endif
