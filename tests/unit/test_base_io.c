/* test_base_io.c - packets with descriptors, and sealed memory files. */
#include "testlib.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "memfile.h"
#include "seqpacket.h"

#define FOUR_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

static int count_fds(void)
{
    DIR *d = opendir("/proc/self/fd");
    int n = 0;

    assert_non_null(d);
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

static void make_pair(int sv[2], int extra_flags)
{
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | extra_flags, 0, sv), 0);
}

static void close_pair(int sv[2])
{
    close(sv[0]);
    close(sv[1]);
}

/* What a hostile sender does: any number of descriptors in one packet. */
static void send_fds(int sock, const void *buf, size_t len, int n_fds)
{
    struct iovec iov = {(void *)(uintptr_t)buf, len};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
    union {
        struct cmsghdr c;
        char room[CMSG_SPACE(8 * sizeof(int))];
    } ctl;
    int fds[8];

    memset(&ctl, 0, sizeof ctl);
    for (int i = 0; i < n_fds; i++)
        assert_true((fds[i] = dup(sock)) >= 0);
    if (n_fds) {
        m.msg_control = &ctl;
        m.msg_controllen = CMSG_SPACE((size_t)n_fds * sizeof(int));
        ctl.c.cmsg_level = SOL_SOCKET;
        ctl.c.cmsg_type = SCM_RIGHTS;
        ctl.c.cmsg_len = CMSG_LEN((size_t)n_fds * sizeof(int));
        memcpy(CMSG_DATA(&ctl.c), fds, (size_t)n_fds * sizeof(int));
    }
    assert_int_equal(sendmsg(sock, &m, MSG_NOSIGNAL), (ssize_t)len);
    for (int i = 0; i < n_fds; i++)
        close(fds[i]);
}

static void a_packet_arrives_whole_with_its_descriptor(void **state)
{
    int sv[2], fd = -1;
    char buf[16];
    size_t len = 0;

    (void)state;
    make_pair(sv, 0);
    assert_int_equal(seqpacket_send(sv[0], "hello", 5, -1, NULL), 0);
    assert_int_equal(seqpacket_send(sv[0], "again", 5, sv[0], NULL), 0);
    assert_int_equal(seqpacket_recv(sv[1], buf, sizeof buf, &len, &fd, NULL), 0);
    assert_int_equal(len, 5);
    assert_memory_equal(buf, "hello", 5);
    assert_int_equal(fd, -1);
    assert_int_equal(seqpacket_recv(sv[1], buf, sizeof buf, &len, &fd, NULL), 0);
    assert_memory_equal(buf, "again", 5);
    assert_true(fd >= 0);
    assert_int_equal(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    close(fd);
    close_pair(sv);
}

static void more_than_one_descriptor_is_refused_and_leaves_none_open(void **state)
{
    (void)state;
    for (int n = 0; n <= 5; n++) {
        int sv[2], fd = -7, before, rc;
        char buf[16];
        size_t len = 99;

        make_pair(sv, 0);
        send_fds(sv[0], "x", 1, n);
        before = count_fds();
        rc = seqpacket_recv(sv[1], buf, sizeof buf, &len, &fd, NULL);
        if (n < 2) {
            assert_int_equal(rc, 0);
            assert_int_equal(count_fds(), before + n);
            if (fd >= 0)
                close(fd);
        } else {
            assert_int_equal(rc, LARDER_EPROTO);
            assert_int_equal(count_fds(), before);
            assert_int_equal(fd, -7);
            assert_int_equal(len, 99);
        }
        close_pair(sv);
    }
}

static void a_packet_too_long_is_refused_and_its_descriptor_closed(void **state)
{
    int sv[2], fd = -7, before;
    char buf[4];
    size_t len = 0;

    (void)state;
    make_pair(sv, 0);
    send_fds(sv[0], "too long", 8, 1);
    before = count_fds();
    assert_int_equal(seqpacket_recv(sv[1], buf, sizeof buf, &len, &fd, NULL), LARDER_EPROTO);
    assert_int_equal(count_fds(), before);
    close_pair(sv);
}

static void an_empty_packet_ends_the_connection_and_keeps_no_descriptor(void **state)
{
    int sv[2], fd = -7, before;
    char buf[4];
    size_t len = 0;

    (void)state;
    make_pair(sv, 0);
    send_fds(sv[0], "", 0, 1);
    before = count_fds();
    assert_int_equal(seqpacket_recv(sv[1], buf, sizeof buf, &len, &fd, NULL), LARDER_ENODAEMON);
    assert_int_equal(count_fds(), before);
    close_pair(sv);
}

static void a_closed_peer_is_reported_without_a_signal(void **state)
{
    struct larder_err e = {0, ""};
    int sv[2], fd = -1;
    char buf[4];
    size_t len = 0;

    (void)state;
    make_pair(sv, 0);
    close(sv[0]);
    assert_int_equal(seqpacket_recv(sv[1], buf, sizeof buf, &len, &fd, &e), LARDER_ENODAEMON);
    assert_int_equal(seqpacket_send(sv[1], "x", 1, -1, &e), LARDER_ENODAEMON);
    close(sv[1]);
}

static void a_socket_that_is_not_ready_is_busy(void **state)
{
    static char big[4096];
    int sv[2], fd = -1, rc = 0;
    char buf[4];
    size_t len = 0;

    (void)state;
    make_pair(sv, SOCK_NONBLOCK);
    assert_int_equal(seqpacket_recv(sv[1], buf, sizeof buf, &len, &fd, NULL), LARDER_EBUSY);
    for (int i = 0; i < 10000 && !rc; i++)
        rc = seqpacket_send(sv[0], big, sizeof big, -1, NULL);
    assert_int_equal(rc, LARDER_EBUSY);
    assert_int_equal(seqpacket_wait(sv[0], 1, 0, NULL), LARDER_ETIMEOUT);
    close_pair(sv);
}

static void waiting_ends_at_data_at_a_hangup_and_at_the_deadline(void **state)
{
    int sv[2];

    (void)state;
    make_pair(sv, 0);
    assert_int_equal(seqpacket_wait(sv[1], 0, 1, NULL), LARDER_ETIMEOUT);
    assert_int_equal(seqpacket_wait(sv[1], 1, -1, NULL), 0);
    assert_int_equal(seqpacket_send(sv[0], "x", 1, -1, NULL), 0);
    assert_int_equal(seqpacket_wait(sv[1], 0, -1, NULL), 0);
    close(sv[0]);
    assert_int_equal(seqpacket_wait(sv[1], 0, -1, NULL), 0);
    close(sv[1]);
    assert_int_equal(seqpacket_wait(sv[1], 0, 10, NULL), LARDER_EIO);
}

static volatile sig_atomic_t n_alarms;

static void on_alarm(int sig)
{
    (void)sig;
    n_alarms++;
}

static void a_signal_does_not_end_a_wait(void **state)
{
    struct sigaction sa = {.sa_handler = on_alarm};
    int sv[2];

    (void)state;
    make_pair(sv, 0);
    sigaction(SIGALRM, &sa, NULL);
    ualarm(5000, 5000);
    assert_int_equal(seqpacket_wait(sv[1], 0, 60, NULL), LARDER_ETIMEOUT);
    ualarm(0, 0);
    assert_true(n_alarms >= 2);
    close_pair(sv);
}

/* ---- memory files */

static void a_memory_file_is_sealed_private_and_readable(void **state)
{
    const void *map = NULL;
    uint64_t n = 0;
    struct stat st;
    int fd = -1;

    (void)state;
    assert_int_equal(memfile_from("t", "hello", 5, &fd, NULL), 0);
    assert_int_equal(fcntl(fd, F_GET_SEALS) & 0xf, FOUR_SEALS);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0400);
    assert_int_equal(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    assert_int_equal(memfile_map(fd, 5, 100, &map, &n, NULL), 0);
    assert_int_equal(n, 5);
    assert_memory_equal(map, "hello", 5);
    memfile_unmap(map, n);
    assert_int_equal(memfile_map(fd, UINT64_MAX, 5, &map, &n, NULL), 0);
    memfile_unmap(map, n);
    assert_int_equal(ftruncate(fd, 1), -1);
    assert_int_equal(pwrite(fd, "J", 1, 0), -1);
    close(fd);
}

static void an_empty_memory_file_maps_to_nothing(void **state)
{
    const void *map = NULL;
    uint64_t n = 7;
    int fd = -1;

    (void)state;
    assert_int_equal(memfile_from("t", NULL, 0, &fd, NULL), 0);
    assert_int_equal(memfile_map(fd, 0, 10, &map, &n, NULL), 0);
    assert_non_null(map);
    assert_int_equal(n, 0);
    memfile_unmap(map, n);
    memfile_unmap(NULL, 4096);
    close(fd);
}

static void a_filled_file_is_cut_and_sealed(void **state)
{
    const void *map = NULL;
    void *rw = NULL;
    uint64_t n = 0;
    int fd = -1;

    (void)state;
    assert_int_equal(memfile_new("t", 3 * 4096, 1, &fd, &rw, NULL), 0);
    memset(rw, 'x', 3 * 4096);
    assert_int_equal(memfile_map(fd, UINT64_MAX, 1 << 20, &map, &n, NULL), LARDER_EPROTO);
    assert_int_equal(memfile_seal(fd, rw, 3 * 4096, 4096, NULL), 0);
    assert_int_equal(memfile_map(fd, 4096, 4096, &map, &n, NULL), 0);
    assert_int_equal(((const char *)map)[4095], 'x');
    memfile_unmap(map, n);
    close(fd);
    assert_int_equal(memfile_new("t", 0, 0, &fd, &rw, NULL), LARDER_EINVAL);
    assert_int_equal(memfile_new("t", UINT64_MAX, 0, &fd, &rw, NULL), LARDER_EINVAL);
    assert_int_equal(memfile_new("t", 4096, 0, &fd, &rw, NULL), 0);
    assert_int_equal(memfile_seal(fd, rw, 4096, 8192, NULL), LARDER_EINVAL);
    close(fd);
}

/* Served: sealed while its maker's mapping is still there, and after. */
static void a_served_file_takes_no_new_writer(void **state)
{
    const void *map = NULL;
    void *rw = NULL;
    struct stat st;
    int fd = -1;

    (void)state;
    assert_int_equal(memfile_new("t", 4 * 4096, 0, &fd, &rw, NULL), 0);
    assert_int_equal(memfile_populate(rw, 5000, 4096, NULL), 0);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(st.st_blocks, 2 * 8); /* the pages that it lies in */
    assert_int_equal(memfile_populate(rw, 0, 0, NULL), 0);
    memcpy((char *)rw + 4095, "xy", 2);
    assert_int_equal(memfile_cut(fd, 2 * 4096, NULL), 0);
    assert_int_equal(memfile_seal_mapped(fd, NULL), 0);
    assert_int_equal(memfile_populate(rw, 0, 4 * 4096, NULL), LARDER_EIO); /* cut off */
    assert_int_equal(memfile_map(fd, 2 * 4096, 1 << 20, &map, NULL, NULL), LARDER_EPROTO);
    assert_int_equal(memfile_map_served(fd, 2 * 4096, 1 << 20, &map, NULL, NULL), 0);
    assert_int_equal(pwrite(fd, "J", 1, 0), -1);
    assert_int_equal(ftruncate(fd, 1), -1);
    assert_ptr_equal(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
    memfile_unmap(rw, 4 * 4096);
    assert_memory_equal((const char *)map + 4094, "\0xy\0", 4);
    memfile_unmap(map, 2 * 4096);
    close(fd);
}

static void a_wrong_size_is_refused(void **state)
{
    const void *map = NULL;
    int fd = -1;

    (void)state;
    assert_int_equal(memfile_from("t", "hello", 5, &fd, NULL), 0);
    assert_int_equal(memfile_map(fd, 4, 100, &map, NULL, NULL), LARDER_EPROTO);
    assert_int_equal(memfile_map(fd, 6, 100, &map, NULL, NULL), LARDER_EPROTO);
    assert_int_equal(memfile_map(fd, 5, 4, &map, NULL, NULL), LARDER_EPROTO);
    assert_int_equal(memfile_map(fd, UINT64_MAX, 4, &map, NULL, NULL), LARDER_EPROTO);
    assert_null(map);
    close(fd);
}

/* Every subset of the four seals but the whole, and FUTURE_WRITE instead of WRITE. */
static void a_missing_seal_is_refused(void **state)
{
    static const int seal[] = {F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_SEAL};
    const void *map = NULL;

    (void)state;
    for (int set = 0; set < 16; set++) {
        int fd = memfd_create("t", MFD_ALLOW_SEALING);
        int flags = 0;

        for (int i = 0; i < 4; i++)
            flags |= set >> i & 1 ? seal[i] : 0;
        assert_int_equal(write(fd, "hello", 5), 5);
        assert_int_equal(fcntl(fd, F_ADD_SEALS, flags), 0);
        if (set < 15) {
            assert_int_equal(memfile_map(fd, 5, 5, &map, NULL, NULL), LARDER_EPROTO);
            assert_null(map);
        } else {
            assert_int_equal(memfile_map(fd, 5, 5, &map, NULL, NULL), 0);
            memfile_unmap(map, 5);
        }
        close(fd);
        map = NULL;
    }
    int fd = memfd_create("t", MFD_ALLOW_SEALING);
    assert_int_equal(write(fd, "hello", 5), 5);
    assert_int_equal(
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL), 0);
    assert_int_equal(memfile_map(fd, 5, 5, &map, NULL, NULL), LARDER_EPROTO);
    assert_int_equal(memfile_map_served(fd, 5, 5, &map, NULL, NULL), 0);
    memfile_unmap(map, 5);
    close(fd);
}

static void other_kinds_of_descriptor_are_refused(void **state)
{
    char *dir = test_mkdir();
    const void *map = NULL;
    int fds[7], p[2], sv[2];

    (void)state;
    assert_int_equal(pipe(p), 0);
    make_pair(sv, 0);
    fds[0] = open(dir, O_RDONLY | O_DIRECTORY);
    fds[1] = open(dir, O_RDWR | O_TMPFILE, 0600);
    fds[2] = p[0];
    fds[3] = sv[0];
    fds[4] = open("/dev/zero", O_RDONLY);
    fds[5] = open("/proc/self/mem", O_RDONLY);
    fds[6] = 9999;
    for (int i = 0; i < 7; i++)
        assert_int_equal(memfile_map(fds[i], UINT64_MAX, 4096, &map, NULL, NULL), LARDER_EPROTO);
    for (int i = 0; i < 6; i++)
        close(fds[i]);
    close(p[1]);
    close(sv[1]);
    test_rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_packet_arrives_whole_with_its_descriptor),
        cmocka_unit_test(more_than_one_descriptor_is_refused_and_leaves_none_open),
        cmocka_unit_test(a_packet_too_long_is_refused_and_its_descriptor_closed),
        cmocka_unit_test(an_empty_packet_ends_the_connection_and_keeps_no_descriptor),
        cmocka_unit_test(a_closed_peer_is_reported_without_a_signal),
        cmocka_unit_test(a_socket_that_is_not_ready_is_busy),
        cmocka_unit_test(waiting_ends_at_data_at_a_hangup_and_at_the_deadline),
        cmocka_unit_test(a_signal_does_not_end_a_wait),
        cmocka_unit_test(a_memory_file_is_sealed_private_and_readable),
        cmocka_unit_test(an_empty_memory_file_maps_to_nothing),
        cmocka_unit_test(a_filled_file_is_cut_and_sealed),
        cmocka_unit_test(a_served_file_takes_no_new_writer),
        cmocka_unit_test(a_wrong_size_is_refused),
        cmocka_unit_test(a_missing_seal_is_refused),
        cmocka_unit_test(other_kinds_of_descriptor_are_refused),
    };

    return cmocka_run_group_tests_name("base_io", tests, NULL, NULL);
}
