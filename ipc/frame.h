/* frame.h - the frames of PROTOCOL.md: encode and decode, no sockets.
 *
 * Purpose    A frame is a 16-byte header and a JSON object. Descriptors travel
 *            beside the packet and are the caller's business.
 * Ownership  json_t results are new references. Encoded packets are mem_free()d.
 * Threads    No state.
 * Errors     LARDER_EPROTO for bytes that are not a frame, LARDER_ETOOBIG for a
 *            body over the limit, LARDER_ENOMEM.
 */
#ifndef LARDER_FRAME_H
#define LARDER_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "larder_status.h"

#define FRAME_MAGIC 0x4452524cu
#define FRAME_VERSION 1u
#define FRAME_HEADER_BYTES 16u
#define FRAME_MAX_BYTES 65536u
#define FRAME_MAX_BODY (FRAME_MAX_BYTES - FRAME_HEADER_BYTES)

/* X(name, number) - PROTOCOL.md sections 3 and 5. */
#define FRAME_TYPE_LIST(X) \
    X(HELLO, 1) X(PUT, 2) X(JOB, 3) X(WATCH, 4) X(CANCEL, 5) X(JOBS, 6) X(LOOKUP, 7) \
    X(FETCH, 8) X(RELEASE, 9) X(LS, 10) X(SHOW, 11) X(RM, 12) X(PIN, 13) X(STATUS, 14) \
    X(VERIFY, 15) X(EXPLAIN, 16) X(PROFILE, 17) X(IMPORT, 18) \
    X(OK, 100) X(ERROR, 101) X(EVENT, 102) \
    X(W_HELLO, 200) X(W_JOB, 201) X(W_PREPARED, 202) X(W_GO, 203) X(W_SKIP, 204) \
    X(W_PROGRESS, 205) X(W_LAYER, 206) X(W_DONE, 207) X(W_FAIL, 208) X(W_CANCEL, 209) \
    X(W_PROFILE, 210)

enum frame_type {
#define X(name, number) FRAME_##name = number,
    FRAME_TYPE_LIST(X)
#undef X
};

struct frame {
    enum frame_type type;
    uint32_t seq;
    json_t *body; /* an object; owned by whoever holds the frame */
};

/* Encode into a new packet of *ret_len bytes. `body` NULL stands for {}; borrowed. */
int frame_encode(enum frame_type type, uint32_t seq, const json_t *body, void **ret,
                 size_t *ret_len, struct larder_err *e);

/* Decode one packet. On success ret->body is a new reference. */
int frame_decode(const void *packet, size_t len, struct frame *ret, struct larder_err *e);

/* Parse untrusted JSON text (the `in_file` of a large answer, too) under the
 * same rules: an object, no duplicate keys, nesting at most 16. */
int frame_parse_json(const char *text, size_t len, json_t **ret, struct larder_err *e);

/* "PUT"; "?" for a number that is not in the list. */
const char *frame_type_name(int type);

/* ---- typed access to a body. `what` fields that are required fail with EPROTO
 * and name the field. Pointers are borrowed from the body. */
enum field_need { FIELD_OPTIONAL, FIELD_REQUIRED };

/* Leave *ret untouched when an optional field is absent. */
int field_str(const json_t *body, const char *key, enum field_need need, size_t max_len,
              const char **ret, struct larder_err *e);
int field_u64(const json_t *body, const char *key, enum field_need need, uint64_t max,
              uint64_t *ret, struct larder_err *e);
int field_u32(const json_t *body, const char *key, enum field_need need, uint32_t max,
              uint32_t *ret, struct larder_err *e);
int field_i64(const json_t *body, const char *key, enum field_need need, int64_t *ret,
              struct larder_err *e);
int field_bool(const json_t *body, const char *key, enum field_need need, bool *ret,
               struct larder_err *e);
int field_hex32(const json_t *body, const char *key, enum field_need need, uint8_t ret[32],
                bool *ret_present, struct larder_err *e);
int field_array(const json_t *body, const char *key, enum field_need need, size_t max_len,
                const json_t **ret, struct larder_err *e);

/* LARDER_EPROTO naming the first key that is not in the NULL-terminated list. */
int field_only(const json_t *body, const char *const *allowed, struct larder_err *e);

/* An ERROR body for `e`; NULL when memory is out. */
json_t *frame_error_body(const struct larder_err *e);

/* Turn a received ERROR body into `e` and return its (negative) code. */
int frame_error_read(const json_t *body, struct larder_err *e);

/* True for a legal namespace / entry name (PROTOCOL.md section 2). */
bool name_is_namespace(const char *s);
bool name_is_entry(const char *s);

/* Split "namespace/name" (or "name": namespace "default") into buffers of
 * NAME_MAX_NS + 1 and NAME_MAX_ENTRY + 1 bytes; LARDER_EINVAL says what is wrong. */
#define NAME_MAX_NS 128u
#define NAME_MAX_ENTRY 512u
int name_split(const char *full, char *ns, char *name, struct larder_err *e);

#endif
