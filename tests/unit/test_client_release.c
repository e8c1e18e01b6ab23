/* Leases of liblarder that end without an answer. */
#include "testlib.h"

#include <poll.h>

#include "fake_image.h"
#include "larder.h"

#define SOON 5000

/* A RELEASE that wants no answer gets none. */
static void honest_and_quiet(int sock)
{
    struct frame f;
    int fd = -1, file, n_quiet = 0;

    while (fake_next(sock, &f, &fd)) {
        if (f.type == FRAME_RELEASE) {
            n_quiet += json_is_true(json_object_get(f.body, "quiet")) &&
                       json_integer_value(json_object_get(f.body, "lease")) == 77;
        } else if (f.type == FRAME_FETCH) {
            file = image_file(NULL);
            answer_fetch(sock, f.seq, file, (uint64_t)lseek(file, 0, SEEK_END));
            close(file);
        } else {
            char json[64];

            snprintf(json, sizeof json, "{\"freed_bytes\":%d}", n_quiet);
            fake_send(sock, FRAME_OK, f.seq, json, -1);
        }
    }
}

static void a_release_is_not_waited_for_where_the_daemon_can_do_without(void **state)
{
    struct fake d = fake_start_saying(honest_and_quiet, ",\"quiet_release\":true");
    struct larder *c = NULL;
    struct pollfd p = {-1, POLLIN, 0};
    struct larder_lease l;
    uint64_t n = 0;

    (void)state;
    assert_int_equal(larder_connect(&c, d.path, SOON, NULL), 0);
    p.fd = larder_fd(c);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(larder_fetch(c, "doc", SOON, &l, NULL), 0);
        assert_int_equal(larder_release(c, &l, SOON, NULL), 0);
    }
    assert_int_equal(larder_rm(c, "doc", SOON, &n, NULL), 0); /* a later answer is its own */
    assert_int_equal(n, 3);
    assert_int_equal(poll(&p, 1, 0), 0);
    assert_int_equal(larder_fetch(c, "doc", SOON, &l, NULL), 0);
    fake_stop(&d);
    assert_int_equal(larder_release(c, &l, SOON, NULL), LARDER_ENODAEMON);
    larder_close(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_release_is_not_waited_for_where_the_daemon_can_do_without),
    };

    return cmocka_run_group_tests_name("client_release", tests, NULL, NULL);
}
