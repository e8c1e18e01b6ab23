/* test_client_cli.c - the program `larder` against a scripted daemon and a scripted engine.
 *
 * Runs a copy of the built program in a directory of its own, so that the engine it finds
 * beside itself is the test's. Skips when the program has not been built.
 */
#include "testlib.h"

#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <sys/stat.h>

#include "fake_daemon.h"
#include "image_plan.h"

#define KEY "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
#define ENTRY(name)                                                                                \
    "{\"key\":\"" KEY "\",\"name\":\"" name "\",\"model\":\"m\",\"policy\":\"full\",\"n_ctx\":9,"  \
    "\"next_pos\":9,\"sel_layer\":null,\"full_bytes\":2097152,\"image_bytes\":1048576,"            \
    "\"stored_bytes\":40,\"rows_total\":7,\"precision\":\"bf16\",\"pinned\":true,\"created\":5,"   \
    "\"prefill_ms\":6,\"hits\":3,\"damaged\":false"

/* ---- the daemon */

static char put_names[64][700]; /* by job number; the daemon's memory */
static int n_puts;

static void answer_put(int sock, const struct frame *f, int fd)
{
    const char *name = "", *ns = "default";
    char json[2048], text[16] = "";
    int job = ++n_puts;

    field_str(f->body, "name", FIELD_OPTIONAL, 512, &name, NULL);
    field_str(f->body, "namespace", FIELD_OPTIONAL, 512, &ns, NULL);
    if (pread(fd, text, sizeof text, 0) < 0)
        _exit(4);
    close(fd);
    snprintf(put_names[job], sizeof put_names[job], "%s/%s", ns, name);
    if (!strncmp(text, "refuse", 6)) {
        fake_send(sock, FRAME_ERROR, f->seq,
                  "{\"code\":-14,\"status\":\"LARDER_EPOLICY\",\"message\":\"no such policy\"}",
                  -1);
        return;
    }
    snprintf(json, sizeof json, "{\"job\":%d,\"state\":\"%s\"}", job,
             strncmp(text, "old", 3) ? "queued" : "done");
    fake_send(sock, FRAME_OK, f->seq, json, -1);
}

static void answer_watch(int sock, const struct frame *f)
{
    uint64_t job = 0;
    const char *name;
    char json[2048];

    field_u64(f->body, "job", FIELD_REQUIRED, 63, &job, NULL);
    name = put_names[job];
    if (strstr(name, "bad"))
        snprintf(json, sizeof json,
                 "{\"job\":%d,\"state\":\"failed\",\"code\":-11,\"message\":\"byte 7\"}", (int)job);
    else
        snprintf(json, sizeof json,
                 "{\"job\":%d,\"state\":\"done\",\"name\":\"%s\",\"key\":\"" KEY "\",\"n_ctx\":9,"
                 "\"prefill_ms\":6,\"stored_already\":%s}",
                 (int)job, name, strstr(name, "old") ? "true" : "false");
    fake_send(sock, FRAME_EVENT, f->seq,
              "{\"job\":1,\"state\":\"running\",\"pass\":\"prefill\",\"layer\":1,\"layers\":2}",
              -1);
    fake_send(sock, FRAME_OK, f->seq, json, -1);
}

static void answer_fetch(int sock, uint32_t seq)
{
    static const uint32_t rows[1] = {2};
    struct image_spec s = {.geom = {1, 1, 1, 2},
                           .dtype = KV_BF16,
                           .n_ctx = 9,
                           .next_pos = 9,
                           .n_vocab = 2,
                           .rows = rows};
    struct image_plan *p = NULL;
    uint8_t *base;
    char json[1024];
    int fd = -1;

    memset(s.key, 0xaa, 32);
    if (image_plan_new(&p, &s, 1 << 20, NULL))
        _exit(5);
    base = mem_aligned(p->n_bytes, 1);
    image_plan_write(p, base);
    ((uint32_t *)(void *)(base + p->slot[0].position_off))[1] = 1;
    memfile_from("image", base, p->n_bytes, &fd, NULL);
    snprintf(json, sizeof json, "{\"lease\":1,\"bytes\":%d,\"entry\":" ENTRY("d/x") "}}",
             (int)p->n_bytes);
    fake_send(sock, FRAME_OK, seq, json, fd);
    close(fd);
}

static void answer_show(int sock, const struct frame *f)
{
    const char *name = "";

    field_str(f->body, "name", FIELD_OPTIONAL, 512, &name, NULL);
    if (strstr(name, "none"))
        fake_send(sock, FRAME_ERROR, f->seq,
                  "{\"code\":-4,\"status\":\"LARDER_ENOTFOUND\",\"message\":\"never stored\"}", -1);
    else
        fake_send(sock, FRAME_OK, f->seq,
                  "{\"entry\":" ENTRY("d/x") ",\"template\":\"t\\u001b[31m\",\"rows\":[[3,4]],"
                                             "\"text\":\"line 1\\nline 2\\n\",\"tokens\":[5,6,7]}}",
                  -1);
}

static void answer_ls(int sock, const struct frame *f)
{
    if (json_object_get(f->body, "after"))
        fake_send(sock, FRAME_OK, f->seq, "{\"entries\":[" ENTRY("d/two") "}],\"more\":false}", -1);
    else
        fake_send(sock, FRAME_OK, f->seq, "{\"entries\":[" ENTRY("d/one") "}],\"more\":true}", -1);
}

#define MODEL                                                                                      \
    "{\"name\":\"m\",\"path\":\"/models/m.gguf\",\"template\":\"smollm2\","                        \
    "\"policy\":\"asl\",\"backend\":\"ref\",\"dtype\":\"auto\",\"worker\":\"stopped\"}"

static void shop(int sock)
{
    struct frame f;
    int fd = -1;

    while (fake_next(sock, &f, &fd)) {
        switch (f.type) {
        case FRAME_PUT:
            answer_put(sock, &f, fd);
            break;
        case FRAME_WATCH:
            answer_watch(sock, &f);
            break;
        case FRAME_FETCH:
            answer_fetch(sock, f.seq);
            break;
        case FRAME_RM:
        case FRAME_SHOW:
            answer_show(sock, &f);
            break;
        case FRAME_LS:
            answer_ls(sock, &f);
            break;
        case FRAME_VERIFY:
            fake_send(sock, FRAME_EVENT, f.seq, "{\"done\":1,\"of\":2}", -1);
            fake_send(sock, FRAME_OK, f.seq,
                      "{\"checked\":2,\"bytes\":99,\"damaged\":[{\"key\":\"" KEY
                      "\",\"name\":\"d/x\",\"message\":\"extent 3\"}]}",
                      -1);
            break;
        case FRAME_EXPLAIN:
            fake_send(sock, FRAME_OK, f.seq,
                      "{\"reason\":\"other_policy\",\"message\":\"stored with full\","
                      "\"have\":\"full\"}",
                      -1);
            break;
        case FRAME_JOBS:
            fake_send(
                sock, FRAME_OK, f.seq,
                "{\"jobs\":[{\"job\":3,\"state\":\"running\",\"name\":\"d/x\",\"model\":\"m\","
                "\"pass\":\"prefill\",\"layer\":1,\"layers\":2,\"elapsed_ms\":70}]}",
                -1);
            break;
        case FRAME_STATUS:
            fake_send(sock, FRAME_OK, f.seq,
                      "{\"version\":\"1\",\"pid\":7,\"uptime_s\":5,\"store\":{\"dir\":\"/d\"},"
                      "\"models\":[" MODEL "]}",
                      -1);
            break;
        default:
            fake_send(sock, FRAME_OK, f.seq, "{\"job\":3,\"state\":\"canceled\"}", -1);
        }
    }
}

/* ---- the program */

struct env {
    struct fake d;
    char larder[PATH_MAX];
    char out[1 << 16], err[1 << 16];
    int status;
};

static void slurp(const struct env *v, const char *name, char *buf, size_t cap)
{
    char path[PATH_MAX];
    FILE *f;
    size_t n;

    snprintf(path, sizeof path, "%s/%s", v->d.dir, name);
    f = fopen(path, "r");
    assert_non_null(f);
    n = fread(buf, 1, cap - 1, f);
    buf[n] = '\0';
    fclose(f);
}

/* Run `larder ARGS` in the test's directory, with the shell's quoting. */
static int run(struct env *v, const char *args)
{
    char *cmd = NULL;

    assert_true(asprintf(&cmd, "cd '%s' && LARDER_SOCKET='%s' ./larder </dev/null %s >.out 2>.err",
                         v->d.dir, v->d.path, args) > 0);
    v->status = system(cmd);
    free(cmd);
    assert_true(WIFEXITED(v->status));
    v->status = WEXITSTATUS(v->status);
    slurp(v, ".out", v->out, sizeof v->out);
    slurp(v, ".err", v->err, sizeof v->err);
    return v->status;
}

static void put_file(const struct env *v, const char *name, const char *text)
{
    char path[PATH_MAX];
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", v->d.dir, name);
    f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static const char engine_text[] =
    "#!/bin/sh\n"
    "printf '%s|' \"$@\" >args\n"
    "[ \"$1\" = trace ] && { echo '{\"sel_layer\":null}'; exit 0; }\n"
    "fd=; prev=; for a; do [ \"$prev\" = --image-fd ] && fd=$a; prev=$a; done\n"
    "[ -z \"$fd\" ] || head -c 8 <&$fd >magic\n"
    "prev=; for a; do case $prev$a in --file/proc*) cat \"$a\" >stdin ;; esac; prev=$a; done\n"
    "case $* in *crash*) kill -9 $$ ;; *fail*) echo 'larder-prefill: no (LARDER_EMODEL)' >&2; exit "
    "1 ;; esac\n"
    "case $* in *--json*) echo '{\"text\":\"42\",\"ttft_ms\":1.5}' ;; *) echo 42 ;; esac\n";

static char built[PATH_MAX]; /* build/larder of this variant */

static int start(void **state)
{
    struct env *v = calloc(1, sizeof *v);
    char *cmd = NULL;

    v->d = fake_start(shop);
    put_file(v, "larder-prefill", engine_text);
    assert_true(asprintf(&cmd, "cp '%s' '%s/larder' && chmod +x '%s/larder-prefill'", built,
                         v->d.dir, v->d.dir) > 0);
    assert_int_equal(system(cmd), 0);
    free(cmd);
    *state = v;
    return 0;
}

static int stop(void **state)
{
    struct env *v = *state;

    fake_stop(&v->d);
    free(v);
    return 0;
}

static void put_tells_what_became_of_each_document(void **state)
{
    struct env *v = *state;

    put_file(v, "new.txt", "hello");
    put_file(v, "old.txt", "old text");
    put_file(v, "bad.txt", "hello");
    put_file(v, "refused.txt", "refuse me");
    put_file(v, "empty.txt", "");
    assert_int_equal(run(v, "put new.txt --wait"), 0);
    assert_string_equal(v->out, "stored\tdefault/new.txt\t1\t" KEY "\t9\t6\n");
    assert_string_equal(v->err, "");
    assert_int_equal(run(v, "put new.txt"), 0);
    assert_string_equal(v->out, "queued\tdefault/new.txt\t2\t\t0\t0\n");
    assert_int_equal(run(v, "put new.txt old.txt bad.txt refused.txt empty.txt none.txt --wait"),
                     1);
    assert_string_equal(v->out, "failed\tdefault/refused.txt\t0\t\t0\t0\n"
                                "failed\tdefault/empty.txt\t0\t\t0\t0\n"
                                "failed\tnone.txt\t0\t\t0\t0\n"
                                "stored\tdefault/new.txt\t3\t" KEY "\t9\t6\n"
                                "already_stored\tdefault/old.txt\t4\t" KEY "\t9\t6\n"
                                "failed\tdefault/bad.txt\t5\t\t0\t0\n");
    assert_non_null(strstr(v->err, "larder: default/bad.txt: byte 7 (LARDER_ETEXT)\n"));
    assert_non_null(
        strstr(v->err, "larder: default/refused.txt: no such policy (LARDER_EPOLICY)\n"));
    assert_non_null(
        strstr(v->err, "larder: default/empty.txt: the document is empty (LARDER_EEMPTY)"));
    assert_non_null(strstr(v->err, "larder: none.txt: cannot open none.txt: No such file"));
    assert_non_null(strstr(v->err, "1 stored, 1 already stored, 0 queued, 4 failed\n"));
}

static void put_walks_directories_and_records_in_order(void **state)
{
    struct env *v = *state;
    char cmd[PATH_MAX];

    snprintf(cmd, sizeof cmd, "mkdir -p '%s/c/sub' && ln -s /etc '%s/c/link'", v->d.dir, v->d.dir);
    assert_int_equal(system(cmd), 0);
    put_file(v, "c/b file.txt", "hello");
    put_file(v, "c/sub/a..txt", "hello");
    put_file(v, "c/.hidden", "hello");
    put_file(v, "c/r.jsonl",
             "{\"id\":7,\"text\":\"seven\"}\n\n{\"name\":\"n/m\",\"text\":\"x\"}\n"
             "{\"text\":\"y\"}\n{\"id\":8}\n[1]\n{\"name\":\"n/m\",\"text\":\"x\"}");
    assert_int_equal(run(v, "put c/ --namespace team --json"), 1);
    assert_string_equal(
        v->out,
        "{\"name\":\"team/b_file.txt\",\"result\":\"queued\",\"job\":1}\n"
        "{\"name\":\"team/7\",\"result\":\"queued\",\"job\":2}\n"
        "{\"name\":\"team/n/m\",\"result\":\"queued\",\"job\":3}\n"
        "{\"name\":\"team/r.jsonl:4\",\"result\":\"queued\",\"job\":4}\n"
        "{\"name\":\"c/r.jsonl, line "
        "5\",\"result\":\"failed\",\"code\":-1,\"status\":\"LARDER_EINVAL\","
        "\"message\":\"no \\\"text\\\" string in this record\"}\n"
        "{\"name\":\"c/r.jsonl, line "
        "6\",\"result\":\"failed\",\"code\":-1,\"status\":\"LARDER_EINVAL\","
        "\"message\":\"not a JSON object: the JSON is not an object\"}\n"
        "{\"name\":\"team/n/m\",\"result\":\"failed\",\"code\":-1,\"status\":\"LARDER_EINVAL\","
        "\"message\":\"another document of this run has this name already\"}\n"
        "{\"name\":\"team/sub/a._txt\",\"result\":\"queued\",\"job\":5}\n");
}

static void put_takes_token_ids_and_refuses_what_is_none(void **state)
{
    struct env *v = *state;

    put_file(v, "ids", "1 2\n3\t4294967295\n");
    assert_int_equal(run(v, "put --tokens ids --name t --wait"), 0);
    assert_non_null(strstr(v->out, "stored\tdefault/t\t"));
    put_file(v, "ids", "1 2x");
    assert_int_equal(run(v, "put --tokens ids"), 1);
    assert_string_equal(v->err, "larder: ids: no token id at byte 2 (LARDER_EINVAL)\n");
    put_file(v, "ids", "1 4294967296");
    assert_int_equal(run(v, "put --tokens ids"), 1);
    put_file(v, "ids", "-1");
    assert_int_equal(run(v, "put --tokens ids"), 1);
}

static void more_documents_than_are_kept_ahead_all_arrive(void **state)
{
    struct env *v = *state;
    char args[1024] = "put --wait", name[32];
    int n = 0;

    for (int i = 0; i < 20; i++) {
        snprintf(name, sizeof name, "f%02d", i);
        put_file(v, name, "hello");
        strcat(strcat(args, " "), name);
    }
    assert_int_equal(run(v, args), 0);
    for (char *p = v->out; (p = strstr(p, "stored\tdefault/f")); p++, n++)
        assert_int_equal(atoi(p + 16), n);
    assert_int_equal(n, 20);
}

static void entries_are_listed_over_pages_and_shown(void **state)
{
    struct env *v = *state;

    assert_int_equal(run(v, "ls"), 0);
    assert_string_equal(v->out, "d/one\t" KEY "\tm\t9\t2097152\t1048576\t40\t5\tpinned\tfull\n"
                                "d/two\t" KEY "\tm\t9\t2097152\t1048576\t40\t5\tpinned\tfull\n");
    assert_int_equal(run(v, "ls --json"), 0);
    assert_int_equal(strncmp(v->out, "{\"entries\":[{\"key\":\"aaaa", 22), 0);
    assert_int_equal(run(v, "show x"), 0);
    assert_non_null(strstr(v->out, "rows kept\t38.9 %: 3 to 4 per layer and KV head, 7 in all\n"));
    assert_non_null(strstr(v->out, "template\tt?[31m\n")); /* not the terminal's business */
    assert_int_equal(run(v, "show x --text"), 0);
    assert_string_equal(v->out, "line 1\nline 2\n");
    assert_int_equal(run(v, "show x --tokens"), 0);
    assert_string_equal(v->out, "5 6 7\n");
    assert_int_equal(run(v, "show --json x"), 0);
    assert_non_null(strstr(v->out, "\"rows\":[[3,4]]"));
    assert_int_equal(run(v, "show none"), 1);
    assert_string_equal(v->err, "larder: never stored (LARDER_ENOTFOUND)\n");
    assert_string_equal(v->out, "");
}

static void one_failed_entry_does_not_stop_the_others(void **state)
{
    struct env *v = *state;

    assert_int_equal(run(v, "show none/none"), 1);
    assert_non_null(strstr(v->err, "in the default one it is default/none/none"));
    assert_int_equal(run(v, "rm x none ../x y"), 1);
    assert_string_equal(v->out, "removed\tx\t0\nremoved\ty\t0\n");
    assert_non_null(strstr(v->err, "larder: none: never stored (LARDER_ENOTFOUND)\n"));
    assert_non_null(strstr(v->err, "(LARDER_EINVAL)\n"));
    assert_int_equal(run(v, "pin x --off"), 0);
    assert_string_equal(v->out, "unpinned\tx\n");
}

static void damage_is_told_and_is_a_failure(void **state)
{
    struct env *v = *state;

    assert_int_equal(run(v, "verify"), 1);
    assert_string_equal(v->out, "2\t99\t1\n");
    assert_string_equal(v->err, "larder: d/x: extent 3 (LARDER_EDAMAGED)\n");
}

static void misses_jobs_models_and_status_are_told(void **state)
{
    struct env *v = *state;

    put_file(v, "doc", "hello");
    assert_int_equal(run(v, "explain-miss --file doc"), 0);
    assert_string_equal(v->out, "other_policy\tstored with full\tfull\n");
    assert_int_equal(run(v, "explain-miss x --file doc"), 2);
    assert_int_equal(run(v, "explain-miss"), 2);
    assert_int_equal(run(v, "jobs"), 0);
    assert_string_equal(v->out, "3\trunning\td/x\tm\t-\t70\tprefill, layer 1 of 2\n");
    assert_int_equal(run(v, "cancel 3"), 0);
    assert_string_equal(v->out, "3\tcanceled\n");
    assert_int_equal(run(v, "cancel -- -3"), 2);
    assert_int_equal(run(v, "models"), 0);
    assert_string_equal(v->out, "m\tsmollm2\tref\tauto\t-\tstopped\tasl\t/models/m.gguf\n");
    assert_int_equal(run(v, "status"), 0);
    assert_non_null(strstr(v->out, "larderd\t1, process 7\n"));
    assert_int_equal(run(v, "status --json"), 0);
    assert_non_null(strstr(v->out, "{\"version\":\"1\""));
}

static void ask_hands_the_image_to_the_engine_beside_it(void **state)
{
    struct env *v = *state;
    char args[1024];

    put_file(v, "doc", "hello");
    assert_int_equal(run(v, "ask x 'why not?' --max-new 5"), 0);
    assert_string_equal(v->out, "42\n");
    slurp(v, "args", args, sizeof args);
    assert_non_null(strstr(args, "ask|--model|/models/m.gguf|--image-fd|"));
    assert_non_null(strstr(args, "|--template|t?[31m|--max-new|5|--backend|ref|--|why not?|"));
    slurp(v, "magic", args, sizeof args);
    assert_string_equal(args, "LARDERIM");
    assert_int_equal(run(v, "ask x 'why?' --json"), 0);
    assert_int_equal(strncmp(v->out, "{\"text\":\"42\",\"ttft_ms\":1.5,\"fetch_ms\":", 38), 0);
    assert_int_equal(run(v, "ask --file doc -- --what"), 0);
    slurp(v, "args", args, sizeof args);
    assert_string_equal(
        args, "ask|--model|/models/m.gguf|--file|doc|--template|smollm2|--backend|ref|--|--what|");
    assert_int_equal(run(v, "ask --file - q < doc"), 0);
    slurp(v, "args", args, sizeof args);
    assert_non_null(strstr(args, "|--file|/proc/self/fd/"));
    slurp(v, "stdin", args, sizeof args);
    assert_string_equal(args, "hello");
    assert_int_equal(run(v, "-S /nowhere ask --model ./f --file doc q --json"), 0);
    assert_string_equal(v->out, "{\"text\":\"42\",\"ttft_ms\":1.5}\n");
    assert_int_equal(run(v, "ask none q"), 1);
    assert_int_equal(run(v, "ask x q --model other"), 1);
    assert_non_null(strstr(v->err, "model 'other' is not configured"));
}

static void a_failing_engine_is_a_failure(void **state)
{
    struct env *v = *state;

    assert_int_equal(run(v, "ask x fail"), 1);
    assert_string_equal(v->err, "larder-prefill: no (LARDER_EMODEL)\n");
    assert_int_equal(run(v, "ask x fail --json"), 1);
    assert_string_equal(v->err, "larder-prefill: no (LARDER_EMODEL)\n");
    assert_int_equal(run(v, "ask x crash"), 1);
    assert_string_equal(v->err,
                        "larder: larder-prefill was ended by signal 9 (Killed) (LARDER_EWORKER)\n");
}

static void trace_passes_the_model_and_its_policy(void **state)
{
    struct env *v = *state;
    char args[1024];

    assert_int_equal(run(v, "trace --file doc --dtype f32 --json"), 0);
    assert_string_equal(v->out, "{\"sel_layer\":null}\n");
    slurp(v, "args", args, sizeof args);
    assert_string_equal(args, "trace|--model|/models/m.gguf|--file|doc|--policy|asl|--template|"
                              "smollm2|--dtype|f32|--backend|ref|--json|");
    assert_int_equal(run(v, "trace --file doc --model a.gguf"), 2);
    assert_int_equal(run(v, "trace --file doc --tokens doc --policy full"), 2);
}

static void nonsense_on_the_command_line_is_status_2(void **state)
{
    static const char *const bad[] = {
        "",
        "frob",
        "--frob",
        "ls --frob",
        "ls x",
        "ls -S",
        "show",
        "show a b",
        "put",
        "ask x",
        "put a b --name n",
        "put - ",
        "put a --name ../x",
        "put a --namespace a/b",
        "ask x q r",
        "ask --file a --doc-tokens b q",
        "ask x q --tokens t",
        "ask x q --policy full",
        "cancel x",
        "eval",
        "eval a b",
        "eval a --limit x",
        "eval a --seed",
        "eval a --namespace a/b",
        "eval --results r --policy full",
        "eval --results r --limit 3",
    };
    struct env *v = *state;

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(run(v, bad[i]), 2);
        assert_string_equal(v->out, "");
        assert_int_equal(strncmp(v->err, "larder: ", 8), 0);
        assert_ptr_equal(strchr(v->err, '\n'), v->err + strlen(v->err) - 1); /* one line */
    }
    assert_int_equal(run(v, "--help"), 0);
    assert_int_equal(run(v, "put --help"), 0);
    assert_int_equal(run(v, "--version"), 0);
    assert_int_equal(run(v, "-S /nowhere ls"), 1);
    assert_non_null(strstr(v->err, "cannot connect to /nowhere: "));
}

static bool find_program(void)
{
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);

    if (n < 0)
        return false;
    self[n] = '\0';
    snprintf(built, sizeof built, "%.4000s/../larder", dirname(self));
    return !access(built, X_OK);
}

int main(void)
{
#define CASE(f) cmocka_unit_test_setup_teardown(f, start, stop)
    const struct CMUnitTest tests[] = {
        CASE(put_tells_what_became_of_each_document),
        CASE(put_walks_directories_and_records_in_order),
        CASE(put_takes_token_ids_and_refuses_what_is_none),
        CASE(more_documents_than_are_kept_ahead_all_arrive),
        CASE(entries_are_listed_over_pages_and_shown),
        CASE(one_failed_entry_does_not_stop_the_others),
        CASE(damage_is_told_and_is_a_failure),
        CASE(misses_jobs_models_and_status_are_told),
        CASE(ask_hands_the_image_to_the_engine_beside_it),
        CASE(a_failing_engine_is_a_failure),
        CASE(trace_passes_the_model_and_its_policy),
        CASE(nonsense_on_the_command_line_is_status_2),
    };

    if (!find_program()) {
        fprintf(stderr, "%s is not built: run make all\n", built);
        return 77;
    }
    return cmocka_run_group_tests_name("client_cli", tests, NULL, NULL);
}
