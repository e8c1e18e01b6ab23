/* lib.h - inside of liblarder and the CLI: one request, one answer, as JSON objects.
 *
 * Purpose    What larder.h hides: json_t. The CLI prints answers that the public structs
 *            do not carry, so it may use this too.
 * Ownership  Request bodies are stolen; answers are new references.
 * Threads    As larder.h.
 * Errors     As larder.h.
 */
#ifndef LARDER_LIB_H
#define LARDER_LIB_H

#include <jansson.h>

#include "frame.h"
#include "geom.h"
#include "larder.h"

/* Largest answer that may come in a file: the text and tokens of the longest document. */
#define LARDER_MAX_ANSWER (256u << 20)

typedef void larder_on_event(void *arg, const json_t *body);

struct larder_request {
    enum frame_type type;
    json_t *body;              /* stolen, also on failure; NULL means that it could not be built */
    int fd;                    /* descriptor to send, or -1 */
    larder_on_event *on_event; /* NULL: an EVENT is a protocol error */
    void *arg;
    int timeout_ms;
    bool quiet; /* nothing is answered: over once it is sent, and *ret stays as it is */
};

/* ret_fd NULL: a descriptor that is not a large answer's is a protocol error. */
int larder_ask_json(struct larder *c, const struct larder_request *q, json_t **ret, int *ret_fd,
                    struct larder_err *e);

/* A request without descriptor and events. */
int larder_ask_plain(struct larder *c, enum frame_type type, json_t *body, int timeout_ms,
                     json_t **ret, struct larder_err *e);

/* Tell the daemon that a lease is over; there is no answer where the daemon can do without. */
int larder_let_go(struct larder *c, uint64_t lease, int timeout_ms, struct larder_err *e);

/* Mark the connection broken for the reason in `e` and return its code. */
int larder_break(struct larder *c, struct larder_err *e);

/* {"key": ...} or {"name": ...}; LARDER_EINVAL unless `ref` is a reference. */
int larder_ref_body(const char *ref, json_t **ret, struct larder_err *e);

/* body[key] = value unless value is NULL; a NULL body stays NULL, a failure makes it so. */
json_t *larder_body_str(json_t *body, const char *key, const char *value);
json_t *larder_body_bool(json_t *body, const char *key, bool value);

/* Read objects of PROTOCOL.md section 4. LARDER_EPROTO. */
int larder_read_job(const json_t *j, struct larder_job *ret, struct larder_err *e);
int larder_read_entry(const json_t *j, struct larder_entry *ret, struct larder_err *e);

/* The document's request: PUT body and its memory file. */
struct larder_document {
    const void *bytes;
    uint64_t len;
    const char *source; /* "text" or "tokens" */
};
int larder_document_file(const struct larder_document *d, int *ret_fd, struct larder_err *e);

#endif
