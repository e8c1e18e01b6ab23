/* server.c - the client socket: connections, frames in, frames out.
 *
 * The one idea: every frame is one packet, so there is nothing to reassemble; what
 * cannot be sent at once waits in a bounded queue, and a client that lets it fill is
 * disconnected. Requests live on their own: when a client goes, those under way lose their
 * client and their answers go nowhere. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon.h"
#include "mem.h"
#include "memfile.h"
#include "seqpacket.h"

#define ACCEPT_PAUSE_S 1

struct packet {
    struct packet *next;
    void *bytes;
    size_t len;
    int fd; /* -1: none; ours */
};

struct lease {
    struct lease *next;
    uint64_t id;
    struct image *image;
};

struct client {
    struct daemon *d;
    struct client *next;
    int sock;
    struct event *read_ev, *write_ev;
    uid_t uid;
    gid_t gid[MAX_GROUPS];
    uint32_t n_gids;
    bool closing; /* send what is queued, then close */
    struct request *requests;
    uint32_t n_requests;
    struct packet *out, **out_last;
    uint32_t n_out;
    struct lease *leases;
    uint64_t next_lease;
};

static void client_close(struct client *c);

/* ---- out */

static void packet_free(struct packet *p)
{
    if (p->fd >= 0)
        close(p->fd);
    mem_free(p->bytes);
    mem_free(p);
}

/* Send what the socket takes; 0, or the code that ends the connection. */
static int flush(struct client *c)
{
    struct packet *p;
    int rc;

    while ((p = c->out)) {
        rc = seqpacket_send(c->sock, p->bytes, p->len, p->fd, NULL);
        if (rc == LARDER_EBUSY) {
            event_add(c->write_ev, NULL);
            return 0;
        }
        if (rc)
            return rc;
        c->out = p->next;
        if (!c->out)
            c->out_last = &c->out;
        c->n_out--;
        packet_free(p);
    }
    return c->closing ? LARDER_ENODAEMON : 0;
}

/* Queue a frame; a body over the limit goes in a memory file. Takes body, copies fd. */
static int enqueue(struct client *c, enum frame_type type, uint32_t seq, json_t *body, int fd)
{
    struct packet *p = mem_zalloc(1, sizeof *p);
    struct larder_err e;
    char *text;
    int rc = body && p ? 0 : LARDER_ENOMEM;

    if (p)
        p->fd = fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
    if (!rc && fd >= 0 && p->fd < 0)
        rc = LARDER_EIO;
    if (!rc)
        rc = frame_encode(type, seq, body, &p->bytes, &p->len, &e);
    if (rc == LARDER_ETOOBIG && fd < 0 && (text = json_dumps(body, JSON_COMPACT))) {
        json_t *small = json_pack("{sI}", "in_file", (json_int_t)strlen(text));

        rc = memfile_from("larder-answer", text, strlen(text), &p->fd, &e);
        if (!rc)
            rc = small ? frame_encode(type, seq, small, &p->bytes, &p->len, &e) : LARDER_ENOMEM;
        json_decref(small);
        free(text);
    }
    json_decref(body);
    if (rc || c->n_out >= c->d->conf.max_queued_frames) {
        if (p)
            packet_free(p);
        return rc ? rc : LARDER_ELIMIT;
    }
    *c->out_last = p;
    c->out_last = &p->next;
    c->n_out++;
    return 0;
}

/* Queue and send. False: the client had to be closed. */
static bool post(struct client *c, enum frame_type type, uint32_t seq, json_t *body, int fd)
{
    if (!enqueue(c, type, seq, body, fd) && !flush(c))
        return true;
    client_close(c);
    return false;
}

/* ---- requests */

static void request_free(struct request *r)
{
    if (r->fd >= 0)
        close(r->fd);
    json_decref(r->body);
    mem_free(r);
}

static void unlink_request(struct request *r)
{
    struct request **at = &r->client->requests;

    while (*at != r)
        at = &(*at)->next;
    *at = r->next;
    r->client->n_requests--;
}

static void answer(struct request *r, enum frame_type type, json_t *body, int fd)
{
    struct client *c = r->client;

    if (c) {
        unlink_request(r);
        post(c, type, r->seq, body ? body : json_object(), fd);
    } else {
        json_decref(body);
    }
    request_free(r);
}

void request_end(struct request *r)
{
    if (r->client)
        unlink_request(r);
    request_free(r);
}

void request_ok(struct request *r, json_t *body, int fd)
{
    answer(r, FRAME_OK, body, fd);
}

void request_fail(struct request *r, const struct larder_err *e)
{
    answer(r, FRAME_ERROR, frame_error_body(e), -1);
}

void request_event(struct request *r, json_t *body)
{
    if (r->client)
        post(r->client, FRAME_EVENT, r->seq, body, -1);
    else
        json_decref(body);
}

bool request_may_use(const struct request *r, const char *ns)
{
    return config_may_use(&r->d->conf, ns, r->uid, r->gid, r->n_gids);
}

/* ---- leases */

uint64_t client_lease(struct client *c, struct image *im)
{
    struct lease *l = c ? mem_alloc(1, sizeof *l) : NULL;

    if (!l)
        return 0;
    *l = (struct lease){c->leases, ++c->next_lease, im};
    c->leases = l;
    image_lease(im);
    return l->id;
}

int client_release(struct client *c, uint64_t id)
{
    for (struct lease **at = c ? &c->leases : NULL; at && *at; at = &(*at)->next) {
        struct lease *l = *at;

        if (l->id != id)
            continue;
        *at = l->next;
        image_release(c->d, l->image);
        mem_free(l);
        return 0;
    }
    return LARDER_ENOTFOUND;
}

uint64_t server_n_leases(const struct daemon *d)
{
    uint64_t n = 0;

    for (const struct client *c = d->clients; c; c = c->next)
        for (const struct lease *l = c->leases; l; l = l->next)
            n++;
    return n;
}

/* ---- in */

/* A violation is answered once, then the connection ends. */
static void violate(struct client *c, uint32_t seq, const struct larder_err *e)
{
    c->closing = true;
    event_del(c->read_ev);
    post(c, FRAME_ERROR, seq, frame_error_body(e), -1);
}

static bool takes_file(enum frame_type t)
{
    return t == FRAME_PUT || t == FRAME_LOOKUP || t == FRAME_EXPLAIN || t == FRAME_PROFILE ||
           t == FRAME_IMPORT;
}

static int check_frame(const struct client *c, const struct frame *f, int fd, struct larder_err *e)
{
    if (f->type < FRAME_HELLO || f->type > FRAME_IMPORT)
        return larder_fail(e, LARDER_EPROTO, "frame type %d is not a request", (int)f->type);
    if (fd >= 0 && !takes_file(f->type))
        return larder_fail(e, LARDER_EPROTO, "%s takes no descriptor", frame_type_name(f->type));
    if (c->n_requests >= c->d->conf.max_in_flight)
        return larder_fail(e, LARDER_ELIMIT, "more than %llu requests in flight",
                           (unsigned long long)c->d->conf.max_in_flight);
    return 0;
}

/* Takes the frame's body and fd. */
static void receive(struct client *c, const struct frame *f, int fd)
{
    struct request *r = mem_zalloc(1, sizeof *r);
    struct larder_err e;
    int rc =
        r ? check_frame(c, f, fd, &e) : larder_fail(&e, LARDER_ENOMEM, "no memory for a request");

    if (rc) {
        mem_free(r);
        json_decref(f->body);
        if (fd >= 0)
            close(fd);
        violate(c, f->seq, &e);
        return;
    }
    r->d = c->d;
    r->client = c;
    r->seq = f->seq;
    r->type = f->type;
    r->body = f->body;
    r->fd = fd;
    r->uid = c->uid;
    r->n_gids = c->n_gids;
    memcpy(r->gid, c->gid, c->n_gids * sizeof r->gid[0]);
    r->next = c->requests;
    c->requests = r;
    c->n_requests++;
    c->d->n_requests++;
    request_dispatch(r);
}

/* One packet a wake: a client that sends many takes turns with the others, and one that waits for
 * its answer is not asked in vain for a second. */
static void on_readable(evutil_socket_t sock, short what, void *arg)
{
    static uint8_t packet[FRAME_MAX_BYTES]; /* the loop thread's */
    struct client *c = arg;
    struct larder_err e = {0, ""};
    struct frame f;
    size_t len;
    int fd = -1, rc = seqpacket_recv(sock, packet, sizeof packet, &len, &fd, &e);

    (void)what;
    if (rc == LARDER_EBUSY)
        return;
    if (rc && rc != LARDER_EPROTO) {
        client_close(c);
        return;
    }
    if (!rc)
        rc = frame_decode(packet, len, &f, &e);
    if (!rc) {
        receive(c, &f, fd);
        return;
    }
    if (fd >= 0)
        close(fd);
    violate(c, 0, &e);
}

static void on_writable(evutil_socket_t sock, short what, void *arg)
{
    (void)sock;
    (void)what;
    if (flush(arg))
        client_close(arg);
}

/* ---- connections */

static void client_close(struct client *c)
{
    struct daemon *d = c->d;
    struct client **at = &d->clients;
    struct packet *p;
    struct lease *l;

    while (*at != c)
        at = &(*at)->next;
    *at = c->next;
    d->n_clients--;
    event_free(c->read_ev);
    event_free(c->write_ev);
    for (struct request *r = c->requests, *next; r; r = next) {
        next = r->next;
        r->client = NULL;
        job_forget_request(d, r);
    }
    while ((p = c->out)) {
        c->out = p->next;
        packet_free(p);
    }
    while ((l = c->leases)) {
        c->leases = l->next;
        image_release(d, l->image);
        mem_free(l);
    }
    close(c->sock);
    mem_free(c);
}

/* Who is at the other end, as the kernel says. */
static int read_peer(struct client *c)
{
    struct ucred cred;
    socklen_t len = sizeof cred, groups_len = sizeof c->gid - sizeof c->gid[0];

    if (getsockopt(c->sock, SOL_SOCKET, SO_PEERCRED, &cred, &len))
        return LARDER_EIO;
    c->uid = cred.uid;
    if (!getsockopt(c->sock, SOL_SOCKET, SO_PEERGROUPS, c->gid, &groups_len))
        c->n_gids = groups_len / sizeof c->gid[0];
    c->gid[c->n_gids++] = cred.gid;
    return 0;
}

static void client_open(struct daemon *d, int sock)
{
    struct client *c = mem_zalloc(1, sizeof *c);

    if (c) {
        c->d = d;
        c->sock = sock;
        c->out_last = &c->out;
        c->read_ev = event_new(d->base, sock, EV_READ | EV_PERSIST, on_readable, c);
        c->write_ev = event_new(d->base, sock, EV_WRITE, on_writable, c);
    }
    if (!c || !c->read_ev || !c->write_ev || read_peer(c) || event_add(c->read_ev, NULL)) {
        if (c && c->read_ev)
            event_free(c->read_ev);
        if (c && c->write_ev)
            event_free(c->write_ev);
        mem_free(c);
        close(sock);
        return;
    }
    c->next = d->clients;
    d->clients = c;
    d->n_clients++;
}

/* Out of descriptors: accepting again at once would spin. */
static void pause_accept(struct daemon *d)
{
    static const struct timeval pause = {ACCEPT_PAUSE_S, 0};

    event_del(d->client_ev);
    event_add(d->accept_pause, &pause);
}

static void on_pause_over(evutil_socket_t sock, short what, void *arg)
{
    struct daemon *d = arg;

    (void)sock;
    (void)what;
    event_add(d->client_ev, NULL);
}

static void on_connect(evutil_socket_t sock, short what, void *arg)
{
    struct daemon *d = arg;
    int peer = accept4(sock, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    (void)what;
    if (peer < 0) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)
            pause_accept(d);
        return;
    }
    if (d->n_clients >= d->conf.max_clients)
        close(peer);
    else
        client_open(d, peer);
}

static void on_worker_connect(evutil_socket_t sock, short what, void *arg)
{
    int peer = accept4(sock, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    (void)what;
    if (peer >= 0)
        workers_accept(arg, peer);
}

/* A socket file that nobody answers on was left by a daemon that was killed. */
static int remove_stale(const struct sockaddr_un *addr, struct larder_err *e)
{
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    int rc = 0;

    if (sock < 0)
        return larder_fail(e, LARDER_EIO, "socket: %s", strerror(errno));
    if (!connect(sock, (const struct sockaddr *)addr, sizeof *addr))
        rc = larder_fail(e, LARDER_EBUSY, "another daemon answers on %s", addr->sun_path);
    else if (errno != ENOENT && unlink(addr->sun_path) && errno != ENOENT)
        rc = larder_fail(e, LARDER_EIO, "%s: %s", addr->sun_path, strerror(errno));
    close(sock);
    return rc;
}

static int listen_at(const char *path, mode_t mode, int *ret, struct larder_err *e)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    int sock, rc;

    if (strlen(path) >= sizeof addr.sun_path)
        return larder_fail(e, LARDER_ECONFIG, "the socket path %s is longer than %zu bytes", path,
                           sizeof addr.sun_path - 1);
    strcpy(addr.sun_path, path);
    rc = remove_stale(&addr, e);
    if (rc)
        return rc;
    sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (sock < 0 || bind(sock, (struct sockaddr *)&addr, sizeof addr) || chmod(path, mode) ||
        listen(sock, 128)) {
        rc = larder_fail(e, LARDER_EIO, "cannot listen on %s: %s", path, strerror(errno));
        if (sock >= 0)
            close(sock);
        return rc;
    }
    *ret = sock;
    return 0;
}

int server_open(struct daemon *d, struct larder_err *e)
{
    int rc = listen_at(d->conf.worker_socket, 0600, &d->worker_sock, e);

    if (!rc)
        rc = listen_at(d->conf.socket, (mode_t)d->conf.socket_mode, &d->client_sock, e);
    if (rc)
        return rc;
    d->client_ev = event_new(d->base, d->client_sock, EV_READ | EV_PERSIST, on_connect, d);
    d->worker_ev = event_new(d->base, d->worker_sock, EV_READ | EV_PERSIST, on_worker_connect, d);
    d->accept_pause = evtimer_new(d->base, on_pause_over, d);
    if (!d->client_ev || !d->worker_ev || !d->accept_pause || event_add(d->client_ev, NULL) ||
        event_add(d->worker_ev, NULL))
        return larder_fail(e, LARDER_ENOMEM, "no memory for the sockets");
    return 0;
}

static void stop_listening(int *sock, struct event *ev, const char *path)
{
    if (ev)
        event_free(ev);
    if (*sock >= 0) {
        unlink(path);
        close(*sock);
        *sock = -1;
    }
}

void server_close(struct daemon *d)
{
    stop_listening(&d->client_sock, d->client_ev, d->conf.socket);
    stop_listening(&d->worker_sock, d->worker_ev, d->conf.worker_socket);
    if (d->accept_pause)
        event_free(d->accept_pause);
    while (d->clients)
        client_close(d->clients);
}
