/* fake_daemon.h - a scripted larderd in a child process, for tests of liblarder.
 *
 * The child accepts connections one after the other, answers HELLO, and hands the socket
 * to the script. It says nothing about the client: the parent's assertions do that.
 */
#ifndef LARDER_FAKE_DAEMON_H
#define LARDER_FAKE_DAEMON_H

#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "frame.h"
#include "memfile.h"
#include "seqpacket.h"
#include "testlib.h"

typedef void fake_script(int sock);

struct fake {
    char *dir;
    char path[108];
    pid_t pid;
};

/* The next request, or false at the end. The body is leaked: the child is short-lived. */
static inline bool fake_next(int sock, struct frame *f, int *fd)
{
    static uint8_t packet[FRAME_MAX_BYTES];
    size_t len = 0;

    return !seqpacket_recv(sock, packet, sizeof packet, &len, fd, NULL) &&
           !frame_decode(packet, len, f, NULL);
}

static inline void fake_send(int sock, int type, uint32_t seq, const char *json, int fd)
{
    json_t *body = json_loads(json, 0, NULL);
    void *packet = NULL;
    size_t len = 0;

    if (!body || frame_encode((enum frame_type)type, seq, body, &packet, &len, NULL))
        _exit(3);
    seqpacket_send(sock, packet, len, fd, NULL);
    json_decref(body);
    mem_free(packet);
}

static inline void fake_serve(int listener, fake_script *script, const char *abilities)
{
    for (;;) {
        int sock = accept(listener, NULL, NULL);
        struct frame f;
        int fd = -1;

        if (sock < 0)
            _exit(2);
        if (fake_next(sock, &f, &fd)) {
            char hello[256];

            snprintf(hello, sizeof hello,
                     "{\"server\":\"fake\",\"protocol\":1,\"namespaces_restricted\":false%s}",
                     abilities);
            fake_send(sock, FRAME_OK, f.seq, hello, -1);
            script(sock);
        }
        close(sock);
    }
}

/* `abilities`: fields of its answer to HELLO, each with a comma before it. */
static inline struct fake fake_start_saying(fake_script *script, const char *abilities)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    struct fake d = {.dir = test_mkdir()};
    int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    snprintf(d.path, sizeof d.path, "%s/s", d.dir);
    snprintf(a.sun_path, sizeof a.sun_path, "%s", d.path);
    assert_int_equal(bind(s, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(s, 8), 0);
    d.pid = fork();
    assert_true(d.pid >= 0);
    if (!d.pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        fake_serve(s, script, abilities);
    }
    close(s);
    return d;
}

static inline struct fake fake_start(fake_script *script)
{
    return fake_start_saying(script, "");
}

static inline void fake_stop(struct fake *d)
{
    kill(d->pid, SIGKILL);
    waitpid(d->pid, NULL, 0);
    test_rmdir(d->dir);
}

#endif
