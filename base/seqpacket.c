/* seqpacket.c - the only sendmsg and recvmsg of larder.
 *
 * The one idea: the control buffer has room for exactly one descriptor. The kernel
 * installs as many descriptors as fit, padding included, so the length announced is
 * CMSG_LEN and not CMSG_SPACE; a second descriptor then sets MSG_CTRUNC, which is an
 * error that leaves nothing open.
 */
#include "seqpacket.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Aligned room for one control message; only CMSG_LEN(sizeof(int)) of it is used. */
union one_fd {
    struct cmsghdr align;
    char room[CMSG_SPACE(sizeof(int))];
};

static int io_error(struct larder_err *e, const char *what, int errnum)
{
    switch (errnum) {
    case EAGAIN:
#if EWOULDBLOCK != EAGAIN
    case EWOULDBLOCK:
#endif
        return larder_fail(e, LARDER_EBUSY, "%s: the socket is not ready", what);
    case EPIPE:
    case ECONNRESET:
    case ENOTCONN:
        return larder_fail(e, LARDER_ENODAEMON, "%s: the other side is gone", what);
    default:
        return larder_fail(e, LARDER_EIO, "%s: %s", what, strerror(errnum));
    }
}

int seqpacket_send(int sock, const void *buf, size_t len, int pass_fd, struct larder_err *e)
{
    struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = len};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
    union one_fd ctl;
    ssize_t n;

    memset(&ctl, 0, sizeof ctl);
    if (pass_fd >= 0) {
        m.msg_control = &ctl;
        m.msg_controllen = CMSG_LEN(sizeof(int));
        ctl.align.cmsg_level = SOL_SOCKET;
        ctl.align.cmsg_type = SCM_RIGHTS;
        ctl.align.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&ctl.align), &pass_fd, sizeof pass_fd);
    }
    do
        n = sendmsg(sock, &m, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return io_error(e, "send", errno);
    return 0;
}

/* The descriptor that came with `m`, or -1. More than one, which the kernel should
 * have refused for want of room, are all closed and make *ret_bad true. */
static int take_fd(struct msghdr *m, bool *ret_bad)
{
    int fd = -1;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < n; i++) {
            int got;

            memcpy(&got, CMSG_DATA(c) + i * sizeof got, sizeof got);
            if (fd < 0) {
                fd = got;
            } else {
                close(got);
                *ret_bad = true;
            }
        }
    }
    return fd;
}

int seqpacket_recv(int sock, void *buf, size_t cap, size_t *ret_len, int *ret_fd,
                   struct larder_err *e)
{
    struct iovec iov = {.iov_base = buf, .iov_len = cap};
    union one_fd ctl;
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &ctl};
    bool extra = false;
    int fd, rc = 0;
    ssize_t n;

    do {
        m.msg_controllen = CMSG_LEN(sizeof(int));
        n = recvmsg(sock, &m, MSG_CMSG_CLOEXEC);
    } while (n < 0 && errno == EINTR);
    if (n < 0)
        return io_error(e, "receive", errno);
    fd = take_fd(&m, &extra);
    /* An empty packet cannot be told from the end; no frame is empty, so both end it. */
    if (n == 0)
        rc = larder_fail(e, LARDER_ENODAEMON, "receive: the other side closed the connection");
    else if (m.msg_flags & MSG_TRUNC)
        rc = larder_fail(e, LARDER_EPROTO, "received a packet longer than %zu bytes", cap);
    else if (extra || (m.msg_flags & MSG_CTRUNC))
        rc = larder_fail(e, LARDER_EPROTO,
                         "received more than one descriptor, or one that this process has no "
                         "room for (see ulimit -n)");
    if (rc) {
        if (fd >= 0)
            close(fd);
        return rc;
    }
    *ret_len = (size_t)n;
    *ret_fd = fd;
    return 0;
}

static int64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

int seqpacket_wait(int sock, int want_write, int timeout_ms, struct larder_err *e)
{
    struct pollfd p = {.fd = sock, .events = want_write ? POLLOUT : POLLIN};
    int64_t end = timeout_ms < 0 ? 0 : now_ms() + timeout_ms;
    int left = timeout_ms;

    for (;;) {
        int n = poll(&p, 1, left);

        if (n > 0 && (p.revents & POLLNVAL))
            return larder_fail(e, LARDER_EIO, "poll: the socket is not open");
        if (n > 0)
            return 0;
        if (n < 0 && errno != EINTR)
            return larder_fail(e, LARDER_EIO, "poll: %s", strerror(errno));
        if (timeout_ms < 0)
            continue;
        left = (int)(end - now_ms());
        if (n == 0 || left < 0)
            return larder_fail(e, LARDER_ETIMEOUT, "no answer within %d ms", timeout_ms);
    }
}
