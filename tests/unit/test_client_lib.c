/* test_client_lib.c - liblarder against honest, broken, dying and hostile daemons. */
#include "testlib.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <time.h>

#include "fake_daemon.h"
#include "fake_image.h"
#include "larder.h"

#define SOON 5000

static void *hooked_malloc(size_t n)
{
    return mem_alloc(n, 1);
}

static int setup(void **state)
{
    (void)state;
    json_set_alloc_funcs(hooked_malloc, mem_free);
    unsetenv("LARDER_SOCKET");
    return 0;
}

static int count_fds(void)
{
    DIR *d = opendir("/proc/self/fd");
    int n = 0;

    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

/* ---- an honest daemon */

static void answer_document(int sock, const struct frame *f, int fd)
{
    char json[4096], text[64] = "";
    const char *source = "", *name = "", *ns = "", *policy = "";
    uint64_t bytes = 0;
    ssize_t n = pread(fd, text, sizeof text - 1, 0);

    field_str(f->body, "source", FIELD_REQUIRED, 9, &source, NULL);
    field_str(f->body, "name", FIELD_OPTIONAL, 512, &name, NULL);
    field_str(f->body, "namespace", FIELD_OPTIONAL, 512, &ns, NULL);
    field_str(f->body, "policy", FIELD_OPTIONAL, 512, &policy, NULL);
    field_u64(f->body, "bytes", FIELD_REQUIRED, 1 << 20, &bytes, NULL);
    if (n != (ssize_t)bytes)
        fake_send(sock, FRAME_ERROR, f->seq,
                  "{\"code\":-17,\"status\":\"x\",\"message\":\"wrong size\"}", -1);
    else if (f->type == FRAME_LOOKUP && !strcmp(source, "text"))
        fake_send(sock, FRAME_OK, f->seq, "{\"entry\":" ENTRY ",\"matched\":4}", -1);
    else if (f->type == FRAME_LOOKUP)
        fake_send(sock, FRAME_OK, f->seq, "{\"entry\":" ENTRY ",\"matched\":2}", -1);
    else {
        snprintf(json, sizeof json,
                 "{\"job\":12,\"state\":\"queued\",\"name\":\"%s/%s\",\"policy\":\"%s\","
                 "\"model\":\"%s\"}",
                 ns, name, policy, source);
        fake_send(sock, FRAME_OK, f->seq, json, -1);
    }
}

static void answer_watch(int sock, uint32_t seq)
{
    for (int layer = 1; layer <= 3; layer++) {
        char json[256];

        snprintf(
            json, sizeof json,
            "{\"job\":12,\"state\":\"running\",\"pass\":\"prefill\",\"layer\":%d,\"layers\":3}",
            layer);
        fake_send(sock, FRAME_EVENT, seq, json, -1);
    }
    fake_send(sock, FRAME_OK, seq,
              "{\"job\":12,\"state\":\"failed\",\"code\":-13,\"status\":\"LARDER_ETOOLONG\","
              "\"message\":\"9000 tokens\"}",
              -1);
}

static void honest(int sock)
{
    struct frame f;
    int fd = -1, file;

    while (fake_next(sock, &f, &fd)) {
        switch (f.type) {
        case FRAME_PUT:
            answer_document(sock, &f, fd);
            break;
        case FRAME_LOOKUP:
            if (fd >= 0)
                answer_document(sock, &f, fd);
            else
                fake_send(sock, FRAME_OK, f.seq, "{\"entry\":" ENTRY "}", -1);
            break;
        case FRAME_JOB:
        case FRAME_CANCEL:
            fake_send(sock, FRAME_OK, f.seq, "{\"job\":12,\"state\":\"canceled\"}", -1);
            break;
        case FRAME_WATCH:
            answer_watch(sock, f.seq);
            break;
        case FRAME_FETCH:
            image_rows_type = json_object_get(f.body, "rows") ? KV_INT4 : KV_BF16;
            file = image_file(NULL);
            answer_fetch(sock, f.seq, file, (uint64_t)lseek(file, 0, SEEK_END));
            close(file);
            break;
        case FRAME_RM:
            fake_send(sock, FRAME_OK, f.seq, "{\"freed_bytes\":4096}", -1);
            break;
        case FRAME_SHOW:
            fake_send(sock, FRAME_ERROR, f.seq,
                      "{\"code\":-4,\"status\":\"LARDER_ENOTFOUND\",\"message\":\"never stored\","
                      "\"reason\":\"never_stored\"}",
                      -1);
            break;
        default:
            fake_send(sock, FRAME_OK, f.seq, "{\"lease\":1}", -1);
        }
        if (fd >= 0)
            close(fd);
    }
}

static struct larder *connect_to(const struct fake *d)
{
    struct larder_err e = {0, ""};
    struct larder *c = NULL;

    assert_int_equal(larder_connect(&c, d->path, SOON, &e), 0);
    return c;
}

static void documents_are_put_as_text_and_as_tokens(void **state)
{
    static const uint32_t ids[] = {1, 2, 3};
    struct larder_put_options o = {.name = "a/b", .ns = "team", .policy = "full", .pin = 1};
    struct fake d = fake_start(honest);
    struct larder *c = connect_to(&d);
    struct larder_job job;
    struct larder_err e = {0, ""};

    (void)state;
    assert_int_equal(larder_put_text(c, "hello", 5, &o, SOON, &job, &e), 0);
    assert_int_equal(job.id, 12);
    assert_int_equal(job.state, LARDER_JOB_QUEUED);
    assert_string_equal(job.name, "team/a/b");
    assert_string_equal(job.policy, "full");
    assert_string_equal(job.model, "text");
    assert_int_equal(larder_put_tokens(c, ids, 3, NULL, SOON, &job, &e), 0);
    assert_string_equal(job.model, "tokens");
    assert_int_equal(larder_put_text(c, "", 0, NULL, SOON, &job, &e), LARDER_EEMPTY);
    assert_int_equal(larder_put_tokens(c, ids, SIZE_MAX / 2, NULL, SOON, &job, &e), LARDER_ETOOBIG);
    assert_int_equal(larder_job_get(c, 12, SOON, &job, &e), 0);
    assert_int_equal(larder_cancel(c, 12, SOON, NULL, &e), 0);
    larder_close(c);
    fake_stop(&d);
}

static void count_progress(void *arg, const struct larder_job *job)
{
    int *n = arg;

    assert_int_equal(job->layer, ++*n);
    assert_string_equal(job->pass, "prefill");
}

static void watching_reports_progress_and_then_the_outcome(void **state)
{
    struct fake d = fake_start(honest);
    struct larder *c = connect_to(&d);
    struct larder_job job;
    int n = 0;

    (void)state;
    assert_int_equal(larder_watch(c, 12, count_progress, &n, SOON, &job, NULL), 0);
    assert_int_equal(n, 3);
    assert_int_equal(job.state, LARDER_JOB_FAILED);
    assert_int_equal(job.code, LARDER_ETOOLONG);
    assert_string_equal(job.message, "9000 tokens");
    assert_int_equal(larder_watch(c, 12, NULL, NULL, SOON, &job, NULL), 0);
    larder_close(c);
    fake_stop(&d);
}

static void entries_are_found_by_name_key_and_prefix(void **state)
{
    static const uint32_t ids[] = {1, 2, 3};
    struct larder_lookup_options o = {.model = "m"};
    struct fake d = fake_start(honest);
    struct larder *c = connect_to(&d);
    struct larder_entry en;
    uint64_t matched = 0, freed = 0;

    (void)state;
    assert_int_equal(larder_lookup(c, "doc", SOON, &en, NULL), 0);
    assert_string_equal(en.name, "default/doc");
    assert_int_equal(en.key[31], 0xaa);
    assert_int_equal(en.sel_layer, -1);
    assert_int_equal(en.pinned, 1);
    assert_int_equal(en.hits, 3);
    assert_int_equal(larder_lookup(c, KEY, SOON, &en, NULL), 0);
    assert_int_equal(larder_lookup(c, "no such/..", SOON, &en, NULL), LARDER_EINVAL);
    assert_int_equal(larder_lookup_tokens(c, ids, 3, &o, SOON, &en, &matched, NULL), 0);
    assert_int_equal(matched, 2);
    assert_int_equal(larder_lookup_text(c, "a text", 6, NULL, SOON, &en, &matched, NULL), 0);
    assert_int_equal(matched, 4);
    assert_int_equal(larder_rm(c, "doc", SOON, &freed, NULL), 0);
    assert_int_equal(freed, 4096);
    assert_int_equal(larder_pin(c, "doc", 1, SOON, NULL), 0);
    larder_close(c);
    fake_stop(&d);
}

static void a_fetched_image_is_mapped_and_outlives_the_connection(void **state)
{
    struct fake d = fake_start(honest);
    struct larder_lease l = {.fd = -1}, l2 = {.fd = -1};
    int before = count_fds();
    struct larder *c = connect_to(&d);

    (void)state;
    assert_int_equal(larder_fetch(c, "doc", SOON, &l, NULL), 0);
    assert_int_equal(l.id, 77);
    assert_int_equal(l.image.n_ctx, 9);
    assert_memory_equal(larder_image_text(&l.image), "text", 4);
    assert_int_equal(larder_image_rows(&l.image, 0, 0).position[2], 4);
    assert_int_equal(fcntl(l.fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    assert_int_equal(larder_fetch(c, "doc", SOON, &l2, NULL), 0);
    assert_int_equal(larder_release(c, &l2, SOON, NULL), 0);
    assert_int_equal(l2.fd, -1);
    larder_close(c);
    fake_stop(&d);
    assert_memory_equal(larder_image_text(&l.image), "text", 4);
    assert_int_equal(larder_release(NULL, &l, SOON, NULL), 0);
    assert_int_equal(larder_release(NULL, NULL, SOON, NULL), 0);
    assert_int_equal(count_fds(), before);
}

static void packed_rows_come_only_when_asked_for(void **state)
{
    const struct larder_fetch_options o[] = {{.packed = 1}, {0}};
    struct fake d = fake_start(honest);
    struct larder *c = connect_to(&d);
    struct larder_lease l = {.fd = -1};

    (void)state;
    for (int i = 0; i < 3; i++) {
        assert_int_equal(larder_fetch_with(c, "doc", i < 2 ? &o[i] : NULL, SOON, &l, NULL), 0);
        assert_int_equal(l.image.dtype, i ? LARDER_ROWS_BF16 : LARDER_ROWS_INT4);
        assert_int_equal(larder_release(c, &l, SOON, NULL), 0);
    }
    larder_close(c);
    fake_stop(&d);
}

static void an_error_answer_is_its_code_and_leaves_the_connection_usable(void **state)
{
    struct fake d = fake_start(honest);
    struct larder *c = connect_to(&d);
    struct larder_err e = {0, ""};
    char *json = NULL;

    (void)state;
    assert_int_equal(
        larder_call(c, "SHOW", "{\"name\":\"x\"}", -1, NULL, NULL, SOON, &json, NULL, &e),
        LARDER_ENOTFOUND);
    assert_string_equal(e.msg, "never stored");
    assert_null(json);
    assert_int_equal(larder_call(c, "STATUS", NULL, -1, NULL, NULL, SOON, &json, NULL, &e), 0);
    assert_string_equal(json, "{\"lease\":1}");
    larder_free(json);
    json = NULL;
    assert_int_equal(larder_call(c, "W_JOB", NULL, -1, NULL, NULL, SOON, &json, NULL, &e),
                     LARDER_EINVAL);
    assert_int_equal(larder_call(c, "?", NULL, -1, NULL, NULL, SOON, &json, NULL, &e),
                     LARDER_EINVAL);
    assert_int_equal(larder_call(c, "STATUS", "[]", -1, NULL, NULL, SOON, &json, NULL, &e),
                     LARDER_EINVAL);
    assert_int_equal(larder_call(c, "STATUS", NULL, -1, NULL, NULL, SOON, &json, NULL, &e), 0);
    larder_free(json);
    larder_close(c);
    larder_free(NULL);
    larder_close(NULL);
    fake_stop(&d);
}

/* ---- nobody there */

static void a_missing_daemon_is_named_with_what_to_do(void **state)
{
    struct larder_err e = {0, ""};
    struct larder *c = NULL;
    char *dir = test_mkdir(), *path = NULL, longer[200];

    (void)state;
    assert_true(asprintf(&path, "%s/none.sock", dir) > 0);
    assert_int_equal(larder_connect(&c, path, SOON, &e), LARDER_ENODAEMON);
    assert_non_null(strstr(e.msg, path));
    assert_non_null(strstr(e.msg, "start larderd"));
    setenv("LARDER_SOCKET", path, 1);
    e.msg[0] = '\0';
    assert_int_equal(larder_connect(&c, NULL, SOON, &e), LARDER_ENODAEMON);
    assert_non_null(strstr(e.msg, path));
    unsetenv("LARDER_SOCKET");
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    assert_int_equal(larder_connect(&c, longer, SOON, &e), LARDER_EINVAL);
    assert_int_equal(larder_connect(&c, "", SOON, &e), LARDER_EINVAL);
    assert_null(c);
    free(path);
    test_rmdir(dir);
}

static void connecting_to_a_full_backlog_ends_at_the_deadline(void **state)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    char *dir = test_mkdir();
    struct larder *c = NULL;
    int s = socket(AF_UNIX, SOCK_SEQPACKET, 0), idle[4], rc = 0;

    (void)state;
    snprintf(a.sun_path, sizeof a.sun_path, "%s/s", dir);
    assert_int_equal(bind(s, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(s, 0), 0);
    for (int i = 0; i < 4; i++) {
        idle[i] = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0);
        rc = connect(idle[i], (struct sockaddr *)&a, sizeof a);
    }
    assert_int_equal(rc, -1);
    assert_int_equal(larder_connect(&c, a.sun_path, 30, NULL), LARDER_ETIMEOUT);
    assert_null(c);
    for (int i = 0; i < 4; i++)
        close(idle[i]);
    close(s);
    test_rmdir(dir);
}

/* ---- daemons that misbehave: each script spoils the answer to the first request */

static void silent(int sock)
{
    struct frame f;
    int fd;

    while (fake_next(sock, &f, &fd))
        continue;
}

static void dies(int sock)
{
    struct frame f;
    int fd;

    fake_next(sock, &f, &fd);
}

#define HOSTILE(name, ...)                                                                         \
    static void name(int sock)                                                                     \
    {                                                                                              \
        struct frame f;                                                                            \
        int fd;                                                                                    \
        while (fake_next(sock, &f, &fd)) {                                                         \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    }

static void send_raw(int sock, const void *p, size_t n)
{
    seqpacket_send(sock, p, n, -1, NULL);
}

HOSTILE(wrong_seq, fake_send(sock, FRAME_OK, f.seq + 1, "{\"lease\":1}", -1);)
HOSTILE(stale_seq, fake_send(sock, FRAME_OK, f.seq - 1, "{\"lease\":1}", -1);)
HOSTILE(wrong_type, fake_send(sock, FRAME_PUT, f.seq, "{}", -1);)
HOSTILE(worker_type, fake_send(sock, FRAME_W_DONE, f.seq, "{}", -1);)
HOSTILE(stray_event, fake_send(sock, FRAME_EVENT, f.seq, "{}", -1);)
HOSTILE(no_frame, send_raw(sock, "hello", 5);)
HOSTILE(stray_fd, fake_send(sock, FRAME_OK, f.seq, "{\"lease\":1}", sock);)
HOSTILE(stray_fd_in_error,
        fake_send(sock, FRAME_ERROR, f.seq, "{\"code\":-4,\"message\":\"x\"}", sock);)
HOSTILE(bad_error, fake_send(sock, FRAME_ERROR, f.seq, "{\"code\":4,\"message\":\"x\"}", -1);)
HOSTILE(last_word, fake_send(sock, FRAME_ERROR, 0, "{\"code\":-17,\"message\":\"bad\"}", -1);)
HOSTILE(file_without_fd, fake_send(sock, FRAME_OK, f.seq, "{\"in_file\":10}", -1);)
HOSTILE(file_is_a_socket, fake_send(sock, FRAME_OK, f.seq, "{\"in_file\":10}", sock);)
HOSTILE(file_too_large, fake_send(sock, FRAME_OK, f.seq, "{\"in_file\":99999999999}", sock);)

static void hostile_answers_break_the_connection_and_leak_nothing(void **state)
{
    static fake_script *const scripts[] = {
        wrong_seq,       stale_seq,        wrong_type,        worker_type, stray_event,
        no_frame,        stray_fd,         stray_fd_in_error, bad_error,   last_word,
        file_without_fd, file_is_a_socket, file_too_large,
    };

    (void)state;
    for (size_t i = 0; i < sizeof scripts / sizeof *scripts; i++) {
        struct fake d = fake_start(scripts[i]);
        struct larder *c = connect_to(&d);
        struct larder_err e = {0, ""};
        struct larder_entry en;
        int before = count_fds();

        assert_int_equal(larder_lookup(c, "doc", SOON, &en, NULL), LARDER_EPROTO);
        assert_int_equal(count_fds(), before);
        assert_int_equal(larder_lookup(c, "doc", SOON, &en, &e), LARDER_EPROTO);
        assert_non_null(strstr(e.msg, "unusable since"));
        larder_close(c);
        fake_stop(&d);
    }
}

HOSTILE(no_key, fake_send(sock, FRAME_OK, f.seq, "{\"entry\":{\"n_ctx\":1,\"next_pos\":1}}", -1);)
HOSTILE(no_entry, fake_send(sock, FRAME_OK, f.seq, "{}", -1);)
HOSTILE(entry_is_text, fake_send(sock, FRAME_OK, f.seq, "{\"entry\":\"x\"}", -1);)
HOSTILE(negative_rows,
        fake_send(sock, FRAME_OK, f.seq,
                  "{\"entry\":{\"key\":\"" KEY "\",\"n_ctx\":-1,\"next_pos\":1}}", -1);)

static void answers_that_do_not_read_break_the_connection(void **state)
{
    static fake_script *const scripts[] = {no_key, no_entry, entry_is_text, negative_rows};

    (void)state;
    for (size_t i = 0; i < sizeof scripts / sizeof *scripts; i++) {
        struct fake d = fake_start(scripts[i]);
        struct larder *c = connect_to(&d);
        struct larder_entry en;
        struct larder_job job;

        assert_int_equal(larder_lookup(c, "doc", SOON, &en, NULL), LARDER_EPROTO);
        assert_int_equal(larder_job_get(c, 1, SOON, &job, NULL), LARDER_EPROTO);
        larder_close(c);
        fake_stop(&d);
    }
}

static void a_deadline_breaks_the_connection(void **state)
{
    struct fake d = fake_start(silent);
    struct larder *c = connect_to(&d);
    struct larder_err e = {0, ""};
    struct larder_job job;

    (void)state;
    assert_int_equal(larder_job_get(c, 1, 20, &job, &e), LARDER_ETIMEOUT);
    assert_non_null(strstr(e.msg, d.path));
    assert_int_equal(larder_job_get(c, 1, SOON, &job, &e), LARDER_ETIMEOUT);
    assert_non_null(strstr(e.msg, "unusable since"));
    larder_close(c);
    fake_stop(&d);
}

HOSTILE(
    endless_events,
    for (;;) { fake_send(sock, FRAME_EVENT, f.seq, "{\"job\":1,\"state\":\"running\"}", -1); })

static void endless_events_do_not_outlast_the_deadline(void **state)
{
    struct fake d = fake_start(endless_events);
    struct larder *c = connect_to(&d);
    struct larder_job job;

    (void)state;
    assert_int_equal(larder_watch(c, 1, NULL, NULL, 50, &job, NULL), LARDER_ETIMEOUT);
    larder_close(c);
    fake_stop(&d);
}

static void a_daemon_that_dies_in_a_call_is_reported_without_a_signal(void **state)
{
    struct fake d = fake_start(dies);
    struct larder *c = connect_to(&d);
    struct larder_err e = {0, ""};
    struct larder_job job;
    struct pollfd p = {.events = POLLIN};

    (void)state;
    assert_int_equal(larder_job_get(c, 1, SOON, &job, &e), LARDER_ENODAEMON);
    assert_non_null(strstr(e.msg, d.path));
    larder_close(c);
    c = connect_to(&d);
    kill(d.pid, SIGKILL);
    p.fd = larder_fd(c);
    assert_int_equal(poll(&p, 1, SOON), 1); /* the descriptor tells */
    assert_int_equal(larder_job_get(c, 1, SOON, &job, &e), LARDER_ENODAEMON);
    assert_int_equal(larder_job_get(c, 1, SOON, &job, &e), LARDER_ENODAEMON);
    larder_close(c);
    fake_stop(&d);
}

/* ---- large answers */

static void large(int sock)
{
    struct frame f;
    int fd;

    while (fake_next(sock, &f, &fd)) {
        size_t n = 300000;
        char *json = mem_alloc(n, 1), body[64];
        int file = -1;

        memset(json, 'x', n);
        memcpy(json, "{\"text\":\"", 9);
        memcpy(json + n - 2, "\"}", 2);
        if (memfile_from("large", json, n, &file, NULL))
            _exit(3);
        snprintf(body, sizeof body, "{\"in_file\":%zu}", n);
        fake_send(sock, FRAME_OK, f.seq, body, file);
        close(file);
        mem_free(json);
    }
}

HOSTILE(large_unsealed, int file = memfd_create("large", MFD_ALLOW_SEALING);
        if (write(file, "{\"a\":1}", 7) != 7) _exit(3);
        fake_send(sock, FRAME_OK, f.seq, "{\"in_file\":7}", file); close(file);)
HOSTILE(large_shorter, int file = -1; memfile_from("large", "{\"a\":1}", 7, &file, NULL);
        fake_send(sock, FRAME_OK, f.seq, "{\"in_file\":8}", file); close(file);)
HOSTILE(large_no_json, int file = -1; memfile_from("large", "{\"a\":1,", 7, &file, NULL);
        fake_send(sock, FRAME_OK, f.seq, "{\"in_file\":7}", file); close(file);)

static void a_large_answer_is_read_from_its_file(void **state)
{
    static fake_script *const bad[] = {large_unsealed, large_shorter, large_no_json};
    struct fake d = fake_start(large);
    int before = count_fds();
    struct larder *c = connect_to(&d);
    char *json = NULL;

    (void)state;
    assert_int_equal(larder_call(c, "SHOW", "{}", -1, NULL, NULL, SOON, &json, NULL, NULL), 0);
    assert_int_equal(strlen(json), 300000);
    larder_free(json);
    larder_close(c);
    assert_int_equal(count_fds(), before);
    fake_stop(&d);
    for (int i = 0; i < 3; i++) {
        d = fake_start(bad[i]);
        c = connect_to(&d);
        before = count_fds();
        assert_int_equal(larder_call(c, "SHOW", "{}", -1, NULL, NULL, SOON, &json, NULL, NULL),
                         LARDER_EPROTO);
        assert_int_equal(count_fds(), before);
        larder_close(c);
        fake_stop(&d);
    }
}

/* ---- bad images */

static void spoil_key(uint8_t *base, uint64_t n)
{
    (void)n;
    base[130] ^= 1;
}

static void spoil_table(uint8_t *base, uint64_t n)
{
    (void)n;
    base[264] ^= 64;
}

static void spoil_version(uint8_t *base, uint64_t n)
{
    (void)n;
    base[8] = 9;
}

HOSTILE(no_image, if (f.type == FRAME_FETCH) answer_fetch(sock, f.seq, -1, 4096);)
HOSTILE(image_is_a_socket, if (f.type == FRAME_FETCH) answer_fetch(sock, f.seq, sock, 4096);)
HOSTILE(image_of_another_entry, int file = image_file(spoil_key);
        answer_fetch(sock, f.seq, file, (uint64_t)lseek(file, 0, SEEK_END)); close(file);)
HOSTILE(image_packed_unasked, image_rows_type = KV_INT4; int file = image_file(NULL);
        answer_fetch(sock, f.seq, file, (uint64_t)lseek(file, 0, SEEK_END)); close(file);)
HOSTILE(image_of_wrong_size, int file = image_file(NULL); answer_fetch(sock, f.seq, file, 4096);
        close(file);)
HOSTILE(image_unsealed, uint64_t n = 0; uint8_t *p = image_bytes(&n, NULL);
        int file = memfd_create("image", MFD_ALLOW_SEALING);
        if (write(file, p, n) != (ssize_t)n) _exit(3);
        fcntl(file, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
        answer_fetch(sock, f.seq, file, n); close(file); mem_free(p);)

/* An honest daemon but for what is in the image: the connection survives. */
static void serve_spoiled(int sock, void (*spoil)(uint8_t *, uint64_t))
{
    struct frame f;
    int fd;

    while (fake_next(sock, &f, &fd)) {
        int file;

        if (f.type != FRAME_FETCH) {
            fake_send(sock, FRAME_OK, f.seq, "{\"job\":1,\"state\":\"done\"}", -1);
            continue;
        }
        file = image_file(spoil);
        answer_fetch(sock, f.seq, file, (uint64_t)lseek(file, 0, SEEK_END));
        close(file);
    }
}

static void image_damaged(int sock)
{
    serve_spoiled(sock, spoil_table);
}

static void image_too_new(int sock)
{
    serve_spoiled(sock, spoil_version);
}

static void images_that_cannot_be_trusted_never_reach_the_caller(void **state)
{
    static const struct {
        fake_script *script;
        int code;
    } cases[] = {
        {no_image, LARDER_EPROTO},
        {image_is_a_socket, LARDER_EPROTO},
        {image_of_another_entry, LARDER_EPROTO},
        {image_packed_unasked, LARDER_EPROTO},
        {image_of_wrong_size, LARDER_EPROTO},
        {image_unsealed, LARDER_EPROTO},
        {image_damaged, LARDER_EDAMAGED},
        {image_too_new, LARDER_EVERSION},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fake d = fake_start(cases[i].script);
        struct larder *c = connect_to(&d);
        struct larder_lease l = {.id = 5, .fd = -9};
        struct larder_job job;
        int before = count_fds();

        assert_int_equal(larder_fetch(c, "doc", SOON, &l, NULL), cases[i].code);
        assert_int_equal(count_fds(), before);
        assert_int_equal(l.fd, -9);
        assert_int_equal(larder_job_get(c, 1, SOON, &job, NULL),
                         cases[i].code == LARDER_EPROTO ? LARDER_EPROTO : 0);
        larder_close(c);
        fake_stop(&d);
    }
}

/* ---- memory */

static int everything_once(const char *path)
{
    struct larder_lease l = {.fd = -1};
    struct larder *c = NULL;
    struct larder_job job;
    struct larder_entry en;
    char *json = NULL;
    int rc = larder_connect(&c, path, SOON, NULL);

    if (!rc)
        rc = larder_put_text(c, "hello", 5, NULL, SOON, &job, NULL);
    if (!rc)
        rc = larder_watch(c, 12, NULL, NULL, SOON, &job, NULL);
    if (!rc)
        rc = larder_lookup(c, "doc", SOON, &en, NULL);
    if (!rc)
        rc = larder_pin(c, "doc", 1, SOON, NULL);
    if (!rc)
        rc = larder_call(c, "STATUS", NULL, -1, NULL, NULL, SOON, &json, NULL, NULL);
    if (!rc)
        rc = larder_fetch(c, "doc", SOON, &l, NULL);
    if (l.fd >= 0)
        larder_release(c, &l, SOON, NULL);
    larder_free(json);
    larder_close(c);
    return rc;
}

static void running_out_of_memory_is_an_error_and_leaks_nothing(void **state)
{
    struct fake d = fake_start(honest);
    int before = count_fds(), n_memory = 0, rc;

    (void)state;
    for (long n = 0;; n++) {
        long left = n;

        mem_set_hook(test_fail_nth, &left);
        rc = everything_once(d.path);
        mem_set_hook(NULL, NULL);
        assert_int_equal(count_fds(), before);
        if (left >= 0)
            break; /* nothing failed: the sweep is over */
        n_memory += rc == LARDER_ENOMEM;
        /* jansson's lexer may report it as a syntax error; an event may be passed over. */
        assert_true(rc == 0 || rc == LARDER_ENOMEM || rc == LARDER_EPROTO);
    }
    assert_int_equal(rc, 0);
    assert_true(n_memory > 50);
    fake_stop(&d);
}

static void names_of_statuses_come_with_the_library(void **state)
{
    (void)state;
    assert_string_equal(larder_status_name(LARDER_ENODAEMON), "LARDER_ENODAEMON");
    assert_true(strlen(larder_version()) > 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(documents_are_put_as_text_and_as_tokens),
        cmocka_unit_test(watching_reports_progress_and_then_the_outcome),
        cmocka_unit_test(entries_are_found_by_name_key_and_prefix),
        cmocka_unit_test(a_fetched_image_is_mapped_and_outlives_the_connection),
        cmocka_unit_test(packed_rows_come_only_when_asked_for),
        cmocka_unit_test(an_error_answer_is_its_code_and_leaves_the_connection_usable),
        cmocka_unit_test(a_missing_daemon_is_named_with_what_to_do),
        cmocka_unit_test(connecting_to_a_full_backlog_ends_at_the_deadline),
        cmocka_unit_test(hostile_answers_break_the_connection_and_leak_nothing),
        cmocka_unit_test(answers_that_do_not_read_break_the_connection),
        cmocka_unit_test(a_deadline_breaks_the_connection),
        cmocka_unit_test(endless_events_do_not_outlast_the_deadline),
        cmocka_unit_test(a_daemon_that_dies_in_a_call_is_reported_without_a_signal),
        cmocka_unit_test(a_large_answer_is_read_from_its_file),
        cmocka_unit_test(images_that_cannot_be_trusted_never_reach_the_caller),
        cmocka_unit_test(running_out_of_memory_is_an_error_and_leaks_nothing),
        cmocka_unit_test(names_of_statuses_come_with_the_library),
    };

    return cmocka_run_group_tests_name("client_lib", tests, setup, NULL);
}
