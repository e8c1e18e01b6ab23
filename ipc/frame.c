/* frame.c - the 16-byte header and the JSON body of PROTOCOL.md section 1.
 *
 * The one idea: the nesting is counted over the raw text, before a recursive
 * parser sees it, and duplicate keys are refused, so two readers of the same
 * bytes cannot disagree. Errors travel as bodies made and read here.
 */
#include "frame.h"

#include <limits.h>
#include <string.h>

#include "bytes.h"
#include "mem.h"

#define MAX_DEPTH 16

const char *frame_type_name(int type)
{
    switch (type) {
#define X(name, number)                                                                            \
    case number:                                                                                   \
        return #name;
        FRAME_TYPE_LIST(X)
#undef X
    default:
        return "?";
    }
}

static void write_header(void *packet, enum frame_type type, uint32_t seq, size_t body_len)
{
    struct wr w = wr_init(packet, FRAME_HEADER_BYTES);

    wr_u32(&w, FRAME_MAGIC);
    wr_u16(&w, FRAME_VERSION);
    wr_u16(&w, (uint16_t)type);
    wr_u32(&w, seq);
    wr_u32(&w, (uint32_t)body_len);
}

int frame_encode(enum frame_type type, uint32_t seq, const json_t *body, void **ret,
                 size_t *ret_len, struct larder_err *e)
{
    char *packet = mem_alloc(FRAME_MAX_BYTES, 1);
    size_t n = 2;
    void *fit;

    if (!packet)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a frame");
    if (body)
        n = json_dumpb(body, packet + FRAME_HEADER_BYTES, FRAME_MAX_BODY, JSON_COMPACT);
    else
        memcpy(packet + FRAME_HEADER_BYTES, "{}", 2);
    if (n == 0 || n > FRAME_MAX_BODY) {
        mem_free(packet);
        if (n == 0)
            return larder_fail(e, LARDER_ENOMEM, "no memory to write a frame body");
        return larder_fail(e, LARDER_ETOOBIG, "a %s body of %zu bytes; the limit is %u",
                           frame_type_name(type), n, FRAME_MAX_BODY);
    }
    write_header(packet, type, seq, n);
    /* Most frames are short and wait in queues: give the rest back. */
    fit = mem_grow(packet, FRAME_HEADER_BYTES + n, 1);
    *ret = fit ? fit : packet;
    *ret_len = FRAME_HEADER_BYTES + n;
    return 0;
}

/* Deepest nesting of brackets outside strings. Only valid JSON need be counted
 * right: the parser refuses the rest. */
static unsigned depth_of(const char *text, size_t len)
{
    unsigned depth = 0, deepest = 0;
    bool in_string = false;

    for (size_t i = 0; i < len; i++) {
        char c = text[i];

        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            if (++depth > deepest)
                deepest = depth;
        } else if ((c == '}' || c == ']') && depth) {
            depth--;
        }
    }
    return deepest;
}

int frame_parse_json(const char *text, size_t len, json_t **ret, struct larder_err *e)
{
    json_error_t je;
    json_t *j;

    if (depth_of(text, len) > MAX_DEPTH)
        return larder_fail(e, LARDER_EPROTO, "JSON nested deeper than %d", MAX_DEPTH);
    j = json_loadb(text, len, JSON_REJECT_DUPLICATES, &je);
    /* When memory is out, jansson fails without a text or says so by its code. */
    if (!j && (!je.text[0] || json_error_code(&je) == json_error_out_of_memory))
        return larder_fail(e, LARDER_ENOMEM, "no memory to parse %zu bytes of JSON", len);
    if (!j)
        return larder_fail(e, LARDER_EPROTO, "bad JSON at byte %d", je.position);
    if (!json_is_object(j)) {
        json_decref(j);
        return larder_fail(e, LARDER_EPROTO, "the JSON is not an object");
    }
    *ret = j;
    return 0;
}

static int read_header(const void *packet, size_t len, struct frame *ret, struct larder_err *e)
{
    struct rd r = rd_init(packet, len);
    uint32_t magic = rd_u32(&r);
    uint16_t version = rd_u16(&r);
    uint16_t type = rd_u16(&r);
    uint32_t seq = rd_u32(&r);
    uint32_t body_len = rd_u32(&r);

    if (!rd_ok(&r))
        return larder_fail(e, LARDER_EPROTO, "a packet of %zu bytes is shorter than a header", len);
    if (magic != FRAME_MAGIC)
        return larder_fail(e, LARDER_EPROTO, "not a larder frame (magic %08x)", (unsigned)magic);
    if (version != FRAME_VERSION)
        return larder_fail(e, LARDER_EPROTO, "protocol version %u; this side speaks %u",
                           (unsigned)version, FRAME_VERSION);
    if (frame_type_name(type)[0] == '?')
        return larder_fail(e, LARDER_EPROTO, "unknown frame type %u", (unsigned)type);
    if (body_len > FRAME_MAX_BODY)
        return larder_fail(e, LARDER_ETOOBIG, "a body of %lu bytes; the limit is %u",
                           (unsigned long)body_len, FRAME_MAX_BODY);
    if (body_len != rd_left(&r))
        return larder_fail(e, LARDER_EPROTO, "the header announces %lu bytes, %zu came",
                           (unsigned long)body_len, rd_left(&r));
    ret->type = (enum frame_type)type;
    ret->seq = seq;
    return 0;
}

int frame_decode(const void *packet, size_t len, struct frame *ret, struct larder_err *e)
{
    struct frame f = {.body = NULL};
    int rc = read_header(packet, len, &f, e);

    if (!rc)
        rc = frame_parse_json((const char *)packet + FRAME_HEADER_BYTES, len - FRAME_HEADER_BYTES,
                              &f.body, e);
    if (!rc)
        *ret = f;
    return rc;
}

/* A message may hold bytes of somebody's input, cut anywhere: make it one line,
 * and plain ASCII if it is not UTF-8. */
static json_t *message_string(const char *msg)
{
    char line[LARDER_ERR_MSG_MAX];
    size_t n = 0;
    json_t *j;

    for (; msg[n] && n < sizeof line - 1; n++)
        line[n] = (unsigned char)msg[n] < 0x20 || msg[n] == 0x7f ? ' ' : msg[n];
    line[n] = '\0';
    j = json_string(line);
    if (j)
        return j;
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)line[i] >= 0x80)
            line[i] = '?';
    return json_string(line);
}

json_t *frame_error_body(const struct larder_err *e)
{
    json_t *j = json_object();

    if (!j)
        return NULL;
    if (json_object_set_new(j, "code", json_integer(e->code)) ||
        json_object_set_new(j, "status", json_string(larder_status_name(e->code))) ||
        json_object_set_new(j, "message", message_string(e->msg))) {
        json_decref(j);
        return NULL;
    }
    return j;
}

int frame_error_read(const json_t *body, struct larder_err *e)
{
    const char *message = NULL;
    struct larder_err why;
    int64_t code = 0;
    int rc = field_i64(body, "code", FIELD_REQUIRED, &code, &why);

    if (!rc)
        rc = field_str(body, "message", FIELD_REQUIRED, FRAME_MAX_BODY, &message, &why);
    if (!rc && (code >= 0 || code < INT_MIN))
        rc = larder_fail(&why, LARDER_EPROTO, "code %lld", (long long)code);
    if (rc)
        return larder_fail(e, LARDER_EPROTO, "malformed ERROR frame: %s", why.msg);
    larder_fail(e, (int)code, "%s", message);
    for (char *p = e ? e->msg : NULL; p && *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            *p = ' '; /* it will reach a terminal */
    return (int)code;
}
