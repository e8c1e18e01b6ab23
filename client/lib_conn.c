/* lib_conn.c - a connection: one question at a time, each with a deadline.
 *
 * The one idea: after anything that leaves the two sides out of step (a deadline that
 * passed with the answer still to come, a frame that makes no sense, a closed socket)
 * the connection is broken for good and every later call says why, so that a late
 * answer can never be taken for the answer to the next question.
 */
#include "lib.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "mem.h"
#include "memfile.h"
#include "seqpacket.h"

struct larder {
    int fd;
    uint32_t seq; /* of the last question */
    struct sockaddr_un addr;
    bool quiet_release;
    struct larder_err broken; /* code 0: usable */
    uint8_t packet[FRAME_MAX_BYTES];
};

struct deadline {
    bool never;
    int64_t end_ms;
};

static int64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static struct deadline deadline_in(int timeout_ms)
{
    struct deadline d = {timeout_ms < 0, timeout_ms < 0 ? 0 : now_ms() + timeout_ms};

    return d;
}

/* For poll(): -1 without a deadline. */
static int time_left(const struct deadline *d)
{
    int64_t left = d->never ? -1 : d->end_ms - now_ms();

    return d->never ? -1 : left < 0 ? 0 : (int)left;
}

int larder_break(struct larder *c, struct larder_err *e)
{
    c->broken = *e;
    return e->code;
}

static int late(struct larder *c, struct larder_err *e)
{
    larder_fail(e, LARDER_ETIMEOUT, "larderd at %s did not answer in time", c->addr.sun_path);
    return larder_break(c, e);
}

static int wait_for(struct larder *c, int want_write, const struct deadline *d,
                    struct larder_err *e)
{
    int rc = seqpacket_wait(c->fd, want_write, time_left(d), e);

    return rc == LARDER_ETIMEOUT ? late(c, e) : rc;
}

static int gone(struct larder *c, struct larder_err *e)
{
    return larder_fail(e, LARDER_ENODAEMON,
                       "larderd at %s closed the connection; see its log, and connect again",
                       c->addr.sun_path);
}

/* ---- connecting */

static int find_socket(const char *path, struct sockaddr_un *ret, struct larder_err *e)
{
    const char *env = getenv("LARDER_SOCKET");

    if (!path)
        path = env && *env ? env : LARDER_DEFAULT_SOCKET;
    memset(ret, 0, sizeof *ret);
    ret->sun_family = AF_UNIX;
    if (!*path || strlen(path) >= sizeof ret->sun_path)
        return larder_fail(e, LARDER_EINVAL, "a socket's path has 1 to %zu bytes, '%.40s' has %zu",
                           sizeof ret->sun_path - 1, path, strlen(path));
    memcpy(ret->sun_path, path, strlen(path));
    return 0;
}

static int refused(const char *path, int errnum, struct larder_err *e)
{
    if (errnum == EACCES || errnum == EPERM)
        return larder_fail(e, LARDER_ENODAEMON,
                           "cannot connect to %s: %s; ask for membership of the socket's group",
                           path, strerror(errnum));
    return larder_fail(e, LARDER_ENODAEMON,
                       "cannot connect to %s: %s; start larderd, or name its socket with "
                       "LARDER_SOCKET",
                       path, strerror(errnum));
}

/* A full backlog makes connect() of a Unix socket fail with EAGAIN at once, and nothing
 * can be polled for its end: try again until the deadline. */
static int connect_until(struct larder *c, const struct deadline *d, struct larder_err *e)
{
    const struct timespec pause = {0, 5 * 1000 * 1000};

    while (connect(c->fd, (const struct sockaddr *)&c->addr, sizeof c->addr)) {
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN)
            return refused(c->addr.sun_path, errno, e);
        if (time_left(d) == 0)
            return larder_fail(e, LARDER_ETIMEOUT, "larderd at %s is too busy to connect",
                               c->addr.sun_path);
        nanosleep(&pause, NULL);
    }
    return 0;
}

static int hello(struct larder *c, const struct deadline *d, struct larder_err *e)
{
    json_t *body = json_pack("{s:s}", "client", "liblarder " LARDER_VERSION);
    uint32_t protocol = 0;
    json_t *answer = NULL;
    int rc = larder_ask_plain(c, FRAME_HELLO, body, time_left(d), &answer, e);

    if (rc)
        return rc;
    rc = field_u32(answer, "protocol", FIELD_REQUIRED, UINT32_MAX, &protocol, e);
    if (!rc && protocol != FRAME_VERSION)
        rc = larder_fail(e, LARDER_EVERSION, "larderd at %s speaks protocol %u, this library %u",
                         c->addr.sun_path, (unsigned)protocol, FRAME_VERSION);
    if (!rc) /* daemons of before did not say so */
        rc = field_bool(answer, "quiet_release", FIELD_OPTIONAL, &c->quiet_release, e);
    json_decref(answer);
    return rc;
}

int larder_connect(struct larder **ret, const char *path, int timeout_ms, struct larder_err *e)
{
    struct deadline d = deadline_in(timeout_ms);
    struct larder *c = mem_zalloc(1, sizeof *c);
    int rc;

    if (!c)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a connection");
    c->fd = -1;
    rc = find_socket(path, &c->addr, e);
    if (rc)
        goto out;
    c->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (c->fd < 0) {
        rc = larder_fail(e, LARDER_EIO, "socket: %s", strerror(errno));
        goto out;
    }
    rc = connect_until(c, &d, e);
    if (!rc)
        rc = hello(c, &d, e);
    if (rc)
        goto out;
    *ret = c;
    c = NULL;
out:
    larder_close(c);
    return rc;
}

void larder_close(struct larder *c)
{
    if (c && c->fd >= 0)
        close(c->fd);
    mem_free(c);
}

int larder_fd(const struct larder *c)
{
    return c->fd;
}

const char *larder_path(const struct larder *c)
{
    return c->addr.sun_path;
}

/* ---- one question */

static int send_frame(struct larder *c, const struct larder_request *q, const struct deadline *d,
                      struct larder_err *e)
{
    void *packet = NULL;
    size_t len = 0;
    int rc = frame_encode(q->type, c->seq, q->body, &packet, &len, e);

    if (rc)
        return rc;
    while ((rc = seqpacket_send(c->fd, packet, len, q->fd, e)) == LARDER_EBUSY) {
        rc = wait_for(c, 1, d, e);
        if (rc)
            break;
    }
    mem_free(packet);
    if (rc == LARDER_ENODAEMON)
        gone(c, e);
    return rc ? larder_break(c, e) : 0;
}

static int recv_frame(struct larder *c, const struct deadline *d, struct frame *ret, int *ret_fd,
                      struct larder_err *e)
{
    size_t len = 0;
    int fd = -1;
    int rc;

    do {
        rc = wait_for(c, 0, d, e);
        if (!rc)
            rc = seqpacket_recv(c->fd, c->packet, sizeof c->packet, &len, &fd, e);
    } while (rc == LARDER_EBUSY);
    if (rc == LARDER_ENODAEMON)
        return gone(c, e);
    if (!rc)
        rc = frame_decode(c->packet, len, ret, e);
    if (rc) {
        if (fd >= 0)
            close(fd);
        return rc;
    }
    *ret_fd = fd;
    return 0;
}

/* Replace a body {"in_file": N} by the object in the file, and close the file. */
static int read_in_file(json_t **body, int *fd, struct larder_err *e)
{
    const void *map = NULL;
    json_t *whole = NULL;
    uint64_t n = 0;
    int rc = field_u64(*body, "in_file", FIELD_REQUIRED, LARDER_MAX_ANSWER, &n, e);

    if (!rc && *fd < 0)
        rc = larder_fail(e, LARDER_EPROTO, "a large answer came without its file");
    if (!rc)
        rc = memfile_map(*fd, n, LARDER_MAX_ANSWER, &map, NULL, e);
    if (!rc)
        rc = frame_parse_json(map, n, &whole, e);
    memfile_unmap(map, n);
    if (rc)
        return rc;
    json_decref(*body);
    *body = whole;
    close(*fd);
    *fd = -1;
    return 0;
}

static bool is_answer(enum frame_type t)
{
    return t == FRAME_OK || t == FRAME_ERROR || t == FRAME_EVENT;
}

/* Is this frame, with or without a descriptor, one that may answer the question? */
static int check_answer(const struct larder *c, const struct larder_request *q,
                        const struct frame *f, struct larder_err *e)
{
    /* What nobody asked for can only be the daemon's last word. */
    if (f->type == FRAME_ERROR && f->seq == 0)
        return 0;
    if (!is_answer(f->type) || f->seq != c->seq)
        return larder_fail(e, LARDER_EPROTO, "%s frame %lu while waiting for the answer to %s %lu",
                           frame_type_name(f->type), (unsigned long)f->seq,
                           frame_type_name(q->type), (unsigned long)c->seq);
    if (f->type == FRAME_EVENT && !q->on_event)
        return larder_fail(e, LARDER_EPROTO, "an event that %s does not have",
                           frame_type_name(q->type));
    return 0;
}

/* The next frame of the answer, whole: its large body read, its descriptor accounted for. */
static int next_answer(struct larder *c, const struct larder_request *q, const struct deadline *d,
                       bool fd_allowed, struct frame *ret, int *ret_fd, struct larder_err *e)
{
    struct frame f = {.body = NULL};
    int fd = -1;
    int rc = recv_frame(c, d, &f, &fd, e);

    if (!rc)
        rc = check_answer(c, q, &f, e);
    if (!rc && json_object_get(f.body, "in_file"))
        rc = read_in_file(&f.body, &fd, e);
    if (!rc && fd >= 0 && !(fd_allowed && f.type == FRAME_OK))
        rc = larder_fail(e, LARDER_EPROTO, "a descriptor came where none belongs");
    if (rc) {
        json_decref(f.body);
        if (fd >= 0)
            close(fd);
        return larder_break(c, e);
    }
    *ret = f;
    *ret_fd = fd;
    return 0;
}

static int answer_error(struct larder *c, const struct frame *f, struct larder_err *e)
{
    int rc = frame_error_read(f->body, e);

    /* The daemon closes the connection after it has said this. */
    if (rc == LARDER_EPROTO || f->seq == 0)
        larder_break(c, e);
    return rc;
}

static int exchange(struct larder *c, const struct larder_request *q, json_t **ret, int *ret_fd,
                    struct larder_err *e)
{
    struct deadline d = deadline_in(q->timeout_ms);
    struct frame f = {.body = NULL};
    int fd = -1;
    int rc;

    c->seq = c->seq == UINT32_MAX ? 1 : c->seq + 1; /* 0 means: nobody asked */
    rc = send_frame(c, q, &d, e);
    if (rc || q->quiet)
        return rc;
    while (!rc) {
        rc = next_answer(c, q, &d, ret_fd != NULL, &f, &fd, e);
        if (rc || f.type != FRAME_EVENT)
            break;
        q->on_event(q->arg, f.body);
        json_decref(f.body);
        /* Events that never stop must not carry the call past its deadline. */
        if (time_left(&d) == 0)
            rc = late(c, e);
    }
    if (rc)
        return rc;
    if (f.type == FRAME_ERROR) {
        rc = answer_error(c, &f, e);
        json_decref(f.body);
        return rc;
    }
    *ret = f.body;
    if (ret_fd)
        *ret_fd = fd;
    return 0;
}

int larder_ask_json(struct larder *c, const struct larder_request *q, json_t **ret, int *ret_fd,
                    struct larder_err *e)
{
    struct larder_err mine = {0, ""}; /* breaking needs a message even if the caller does not */
    int rc;

    if (!q->body)
        rc = larder_fail(&mine, LARDER_ENOMEM, "no memory for a request");
    else if (c->broken.code)
        rc = larder_fail(&mine, c->broken.code, "this connection is unusable since: %s",
                         c->broken.msg);
    else
        rc = exchange(c, q, ret, ret_fd, &mine);
    json_decref(q->body);
    if (rc && e)
        *e = mine;
    return rc;
}

int larder_ask_plain(struct larder *c, enum frame_type type, json_t *body, int timeout_ms,
                     json_t **ret, struct larder_err *e)
{
    struct larder_request q = {.type = type, .body = body, .fd = -1, .timeout_ms = timeout_ms};

    return larder_ask_json(c, &q, ret, NULL, e);
}

int larder_let_go(struct larder *c, uint64_t lease, int timeout_ms, struct larder_err *e)
{
    struct larder_request q = {.type = FRAME_RELEASE,
                               .body = json_pack("{s:I}", "lease", (json_int_t)lease),
                               .fd = -1,
                               .timeout_ms = timeout_ms,
                               .quiet = c->quiet_release};
    json_t *answer = NULL;
    int rc;

    if (q.quiet)
        q.body = larder_body_bool(q.body, "quiet", true);
    rc = larder_ask_json(c, &q, &answer, NULL, e);
    json_decref(answer);
    return rc;
}
