/* larder.h - liblarder: store documents as pruned KV caches and map them back.
 *
 * Purpose    Everything a program says to larderd: put a document, follow its job, look up
 *            entries by key, by name or by the longest stored prefix of a prompt, and fetch
 *            one as a mapped, checked cache image (larder_image.h). C99 and C++.
 * Units      Sizes are bytes, counts are tokens or rows, times are milliseconds, `created` is
 *            Unix seconds. Token ids are uint32_t.
 * Deadlines  Every call that talks to the daemon takes timeout_ms and returns by then, whatever
 *            the daemon does; negative means no deadline. After LARDER_ETIMEOUT, LARDER_EPROTO or
 *            LARDER_ENODAEMON from such a call, or when memory ran out while an answer was read,
 *            the connection is broken: every further call on it returns the same code and says
 *            so. larder_close() it and connect again. Other codes leave the connection usable.
 * Ownership  larder_connect() and larder_close(), larder_fetch() and larder_release(),
 *            larder_call() and larder_free() pair up. Structs are filled in place and own nothing,
 *            except struct larder_lease. Outputs are untouched when a call fails.
 * Threads    A connection belongs to one thread at a time; different connections are
 *            independent. A fetched image may be read by any number of threads.
 * Signals    None is raised (no SIGPIPE) and interrupted waits are continued.
 * Fork       A child must not use its parent's connection; mappings stay valid in it.
 * Errors     0 or a negative LARDER_E* code (larder_status.h); `e`, which may be NULL, then holds
 *            one line that says what happened and what to do. Besides the codes named at a
 *            function, each call may return LARDER_EINVAL (an argument), LARDER_ENOMEM,
 *            LARDER_EIO, LARDER_ELIMIT (this client's limits in the daemon) and the three above.
 *
 * References An entry is named by a string: "namespace/name", "name" (namespace "default"), or 64
 *            lower-case hex digits, which are its key.
 */
#ifndef LARDER_H
#define LARDER_H

#include <stddef.h>
#include <stdint.h>

#include "larder_image.h"
#include "larder_status.h"

#ifdef __cplusplus
extern "C" {
#endif

struct larder; /* a connection; opaque */

/* The socket used when neither the caller nor $LARDER_SOCKET names one. */
#define LARDER_DEFAULT_SOCKET "/run/larder/larder.sock"

#define LARDER_KEY_BYTES 32
#define LARDER_NAME_BYTES 648   /* of "namespace/name" with terminator */
#define LARDER_MODEL_BYTES 136  /* of a model's name */
#define LARDER_POLICY_BYTES 264 /* of a canonical policy */

/* ---- connection */

/* Connect to the daemon at `path` (NULL: $LARDER_SOCKET, else LARDER_DEFAULT_SOCKET) and make sure
 * that it speaks this protocol. LARDER_ENODAEMON: nobody listens there. */
LARDER_API int larder_connect(struct larder **ret, const char *path, int timeout_ms,
                              struct larder_err *e);

/* Accepts NULL. Ends all leases of the connection; mappings that were fetched stay valid. */
LARDER_API void larder_close(struct larder *c);

/* A descriptor for poll(): readable between calls means that the daemon has gone. Borrowed. */
LARDER_API int larder_fd(const struct larder *c);

/* Path of the daemon's socket, borrowed from the connection. */
LARDER_API const char *larder_path(const struct larder *c);

/* ---- jobs */

enum larder_job_state {
    LARDER_JOB_QUEUED,
    LARDER_JOB_RUNNING,
    LARDER_JOB_DONE,
    LARDER_JOB_FAILED,
    LARDER_JOB_CANCELED
};

/* What is known so far; numbers that are not known yet are 0, strings empty. */
struct larder_job {
    uint64_t id;
    enum larder_job_state state;
    int has_key;
    uint8_t key[LARDER_KEY_BYTES];
    char name[LARDER_NAME_BYTES]; /* full; empty when the document is unnamed */
    char model[LARDER_MODEL_BYTES];
    char policy[LARDER_POLICY_BYTES];
    char pass[32];      /* "tokenize", "calibrate", "prefill" or "store" */
    uint32_t layer;     /* layers finished in this pass ... */
    uint32_t n_layers;  /* ... of so many */
    uint32_t n_ctx;     /* tokens of the document */
    int stored_already; /* the entry was there; nothing was computed */
    uint64_t prefill_ms;
    uint64_t elapsed_ms;
    int code;                         /* of a failed job: a LARDER_E* code ... */
    char message[LARDER_ERR_MSG_MAX]; /* ... and its message */
};

/* All members may be NULL or 0. */
struct larder_put_options {
    const char *model;  /* NULL: the only one configured */
    const char *name;   /* within `ns`; NULL: unnamed */
    const char *ns;     /* namespace; NULL: "default" */
    const char *policy; /* NULL: the model's */
    const char *tmpl;   /* prompt template; NULL: the model's */
    int pin;            /* never evict */
};

/* Queue a document, as UTF-8 text or as token ids; it is copied. The job is durable when the
 * call returns. A document that is stored already comes back as a job that is done. `o` may be
 * NULL. LARDER_EEMPTY, LARDER_ETOOBIG, LARDER_EUNKNOWNMODEL, LARDER_EPOLICY. */
LARDER_API int larder_put_text(struct larder *c, const char *text, size_t len,
                               const struct larder_put_options *o, int timeout_ms,
                               struct larder_job *ret, struct larder_err *e);
LARDER_API int larder_put_tokens(struct larder *c, const uint32_t *ids, size_t n,
                                 const struct larder_put_options *o, int timeout_ms,
                                 struct larder_job *ret, struct larder_err *e);

/* State of a job. LARDER_ENOTFOUND: unknown, or finished long ago. */
LARDER_API int larder_job_get(struct larder *c, uint64_t id, int timeout_ms, struct larder_job *ret,
                              struct larder_err *e);

/* Called from within larder_watch(), on its thread; `job` is borrowed during the call. It must
 * not use the connection. */
typedef void larder_progress(void *arg, const struct larder_job *job);

/* Wait until a job has finished, reporting progress to `progress` (may be NULL). Returns 0 for a
 * job that is done, failed or canceled: ret->state tells which. */
LARDER_API int larder_watch(struct larder *c, uint64_t id, larder_progress *progress, void *arg,
                            int timeout_ms, struct larder_job *ret, struct larder_err *e);

/* Cancel a job that has not finished. `ret` may be NULL. LARDER_ENOTFOUND as larder_job_get(). */
LARDER_API int larder_cancel(struct larder *c, uint64_t id, int timeout_ms, struct larder_job *ret,
                             struct larder_err *e);

/* ---- entries */

struct larder_entry {
    uint8_t key[LARDER_KEY_BYTES];
    char name[LARDER_NAME_BYTES]; /* full; empty when unnamed */
    char model[LARDER_MODEL_BYTES];
    char policy[LARDER_POLICY_BYTES];
    char precision[8];     /* of the stored rows: "bf16", "int8", "int4" */
    uint32_t n_ctx;        /* tokens of the document */
    uint32_t next_pos;     /* where decoding continues */
    int32_t sel_layer;     /* selection layer of the policy; -1: none */
    uint64_t full_bytes;   /* the whole document's rows in bf16 */
    uint64_t image_bytes;  /* of the image that larder_fetch() maps, in bf16 */
    uint64_t stored_bytes; /* on disk */
    uint64_t rows_total;   /* rows kept, over all layers and KV heads */
    uint64_t created;
    uint64_t prefill_ms;
    uint64_t hits;
    int pinned;
    int damaged; /* failed verification: it is not served */
};

/* One entry by reference. LARDER_ENOTFOUND: the message says why. */
LARDER_API int larder_lookup(struct larder *c, const char *ref, int timeout_ms,
                             struct larder_entry *ret, struct larder_err *e);

/* Restricts a prefix lookup; members may be NULL. */
struct larder_lookup_options {
    const char *model;
    const char *policy;
    const char *ns; /* NULL: "default" */
};

/* The entry whose document is the longest verified prefix of a prompt. *ret_matched: how many
 * tokens, or bytes of text, of the prompt it covers; resume with what follows. `o` may be NULL.
 * LARDER_ENOTFOUND: no entry is a prefix. */
LARDER_API int larder_lookup_tokens(struct larder *c, const uint32_t *ids, size_t n,
                                    const struct larder_lookup_options *o, int timeout_ms,
                                    struct larder_entry *ret, uint64_t *ret_matched,
                                    struct larder_err *e);
LARDER_API int larder_lookup_text(struct larder *c, const char *text, size_t len,
                                  const struct larder_lookup_options *o, int timeout_ms,
                                  struct larder_entry *ret, uint64_t *ret_matched,
                                  struct larder_err *e);

/* Delete an entry. *ret_freed (may be NULL): bytes given back. LARDER_ENOTFOUND. */
LARDER_API int larder_rm(struct larder *c, const char *ref, int timeout_ms, uint64_t *ret_freed,
                         struct larder_err *e);

/* Protect an entry from eviction (on != 0), or no longer. LARDER_ENOTFOUND. */
LARDER_API int larder_pin(struct larder *c, const char *ref, int on, int timeout_ms,
                          struct larder_err *e);

/* ---- images */

/* A fetched image. While it is held, the daemon keeps the decoded image at hand. */
struct larder_lease {
    uint64_t id;
    int fd;                    /* the sealed memory file, owned by the lease, close-on-exec */
    struct larder_image image; /* checked; valid until larder_release() */
    struct larder_entry entry;
};

/* Map the image of an entry, ready for use: seals, size, and every offset and count are checked;
 * what the arrays hold, the daemon has verified (larder_image_check() does it again).
 * LARDER_ENOTFOUND: the message says why; LARDER_EDAMAGED: the entry fails verification. */
LARDER_API int larder_fetch(struct larder *c, const char *ref, int timeout_ms,
                            struct larder_lease *ret, struct larder_err *e);

/* All members may be 0. */
struct larder_fetch_options {
    int packed; /* rows as they are stored: int8 and int4 ones as tiles, not as bf16 */
};

/* The same with options; `o` may be NULL. Packed rows take a third of the memory and less time to
 * fetch, and the decoder must read LARDER_ROWS_INT8 and LARDER_ROWS_INT4 (image.dtype tells). The
 * image of an entry that is stored in bf16 is the same either way. */
LARDER_API int larder_fetch_with(struct larder *c, const char *ref,
                                 const struct larder_fetch_options *o, int timeout_ms,
                                 struct larder_lease *ret, struct larder_err *e);

/* Unmap the image, close its descriptor and tell the daemon, without waiting for an answer. `c` may
 * be NULL (closed meanwhile): then the daemon is not told. The lease is released whatever the
 * result. Accepts a NULL lease. */
LARDER_API int larder_release(struct larder *c, struct larder_lease *lease, int timeout_ms,
                              struct larder_err *e);

/* ---- everything else */

/* Called for each EVENT that precedes an answer; `json` is borrowed during the call. */
typedef void larder_event(void *arg, const char *json);

/* Any request of PROTOCOL.md, for tools: `type` is its name ("STATUS", "LS", ...), `json` its body
 * (NULL: {}), fd_in a sealed memory file or -1 (borrowed). *ret_json is the answer's body, to be
 * released with larder_free(); a large answer is read from its file. *ret_fd: the descriptor that
 * came with it, owned by the caller, or -1; with ret_fd NULL such an answer is LARDER_EPROTO.
 * `event` may be NULL: events are then passed over. An ERROR answer becomes the returned code. */
LARDER_API int larder_call(struct larder *c, const char *type, const char *json, int fd_in,
                           larder_event *event, void *arg, int timeout_ms, char **ret_json,
                           int *ret_fd, struct larder_err *e);

/* Accepts NULL. */
LARDER_API void larder_free(void *p);

/* Version of this library, "0.1.0". */
LARDER_API const char *larder_version(void);

#ifdef __cplusplus
}
#endif
#endif
