/* test_store_all.c - entries in and out: round trips, names, prefixes, budget, jobs, crashes. */
#include "store_make.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

struct fixture {
    char *dir;
    struct store *s;
};

static struct store *open_at(const char *dir, uint64_t budget)
{
    struct store_opts o = {.dir = dir, .store_budget = budget, .allow_any_fs = true};
    struct larder_err e = {0, ""};
    struct store *s = NULL;

    if (store_open(&s, &o, &e))
        fprintf(stderr, "%s\n", e.msg);
    return must(s);
}

static int set_up(void **state)
{
    struct fixture *f = must(calloc(1, sizeof *f));

    f->dir = test_mkdir();
    f->s = open_at(f->dir, 64 << 20);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *f = *state;

    store_close(f->s);
    test_rmdir(f->dir);
    free(f);
    return 0;
}

static void reopen(struct fixture *f, uint64_t budget)
{
    store_close(f->s);
    f->s = open_at(f->dir, budget);
}

/* Store, read, read again after a restart; ends y. */
static void there_and_back(struct fixture *f, struct synthetic *y)
{
    struct larder_err e = {0, ""};
    uint8_t key[32];
    uint64_t bytes;

    assert_int_equal(synthetic_put(f->s, y, "a/b", false, key, &e), 0);
    assert_int_equal(synthetic_compare(f->s, y, key, &e), 0);
    reopen(f, 64 << 20);
    assert_int_equal(synthetic_compare(f->s, y, key, &e), 0);
    assert_int_equal(store_verify(f->s, key, &bytes, &e), 0);
    synthetic_free(y);
}

static void round_trip(struct fixture *f, uint32_t n, enum kv_dtype t, bool bias)
{
    there_and_back(f, synthetic_new(n, t, bias, n + t));
}

static void bf16_entries_come_back_bit_for_bit(void **state)
{
    round_trip(*state, 1, KV_BF16, false);
    round_trip(*state, 77, KV_BF16, true);
    round_trip(*state, 3000, KV_BF16, true); /* several extents, tiles across their borders */
}

static void packed_entries_come_back_as_their_codes_say(void **state)
{
    round_trip(*state, 3, KV_INT8, true);
    round_trip(*state, 500, KV_INT8, false);
    round_trip(*state, 3, KV_INT4, false);
    round_trip(*state, 2500, KV_INT4, true);
}

/* Two bytes a row: the V tiles of heads with an odd number of rows begin at odd offsets. */
static void tiles_of_any_size_come_back(void **state)
{
    for (uint32_t d = 2; d <= 6; d += 4) {
        there_and_back(*state, synthetic_of(40000, d, KV_INT4, true, d));
        there_and_back(*state, synthetic_of(40000, d, KV_INT8, true, d));
        there_and_back(*state, synthetic_of(37, d, KV_INT4, true, d));
    }
}

static void a_key_depends_on_every_part_of_its_identity(void **state)
{
    uint32_t tokens[3] = {1, 2, 3};
    struct store_ident id = {.policy = "p", .ns = "n", .tokens = tokens, .n_tokens = 3}, other;
    uint8_t a[32], b[32];

    (void)state;
    assert_int_equal(store_key(&id, a, NULL), 0);
#define DIFFERS(change)                                                                            \
    do {                                                                                           \
        other = id;                                                                                \
        change;                                                                                    \
        assert_int_equal(store_key(&other, b, NULL), 0);                                           \
        assert_memory_not_equal(a, b, 32);                                                         \
    } while (0)
    DIFFERS(other.model_fp[31] = 1);
    DIFFERS(other.tokenizer_fp[0] = 1);
    DIFFERS(other.template_fp[0] = 1);
    DIFFERS(other.policy = "pn"; other.ns = "");
    DIFFERS(other.ns = "m");
    DIFFERS(other.n_tokens = 2);
    DIFFERS(tokens[2] = 4);
}

static bool accept_all(void *arg, const struct store_info *info)
{
    (void)arg;
    (void)info;
    return true;
}

static bool accept_policy(void *arg, const struct store_info *info)
{
    return !strcmp(info->ident.policy, arg);
}

static void the_longest_stored_prefix_is_found(void **state)
{
    struct fixture *f = *state;
    static const uint32_t length[] = {5, 63, 64, 65, 200, 700};
    struct larder_err e = {0, ""};
    uint32_t *prompt = must(mem_alloc(800, 4));
    uint8_t key[6][32], got[32];
    uint64_t matched, seed = 3;

    for (int i = 0; i < 800; i++)
        prompt[i] = (uint32_t)(test_rand(&seed) % VOCAB);
    for (int i = 0; i < 6; i++) {
        struct synthetic *y = synthetic_new(length[i], KV_BF16, false, 1);

        memcpy(y->tokens, prompt, 4 * length[i]);
        y->info.text = (const char *)prompt;
        y->info.text_len = 3 * length[i]; /* any bytes will do */
        assert_int_equal(synthetic_put(f->s, y, NULL, false, key[i], &e), 0);
        synthetic_free(y);
    }
    for (int i = 0; i < 6; i++)
        for (uint32_t n = length[i]; n < (i < 5 ? length[i + 1] : 800); n += 13) {
            assert_int_equal(store_find_prefix(f->s, STORE_PREFIX_TOKENS, prompt, 4 * n, accept_all,
                                               NULL, got, &matched, &e),
                             0);
            assert_memory_equal(got, key[i], 32);
            assert_int_equal(matched, 4 * length[i]);
            assert_int_equal(store_find_prefix(f->s, STORE_PREFIX_TEXT, prompt, 3 * n, accept_all,
                                               NULL, got, &matched, &e),
                             0);
            assert_memory_equal(got, key[i], 32);
        }
    assert_int_equal(store_find_prefix(f->s, STORE_PREFIX_TOKENS, prompt, 16, accept_all, NULL, got,
                                       &matched, &e),
                     LARDER_ENOTFOUND);
    prompt[300] ^= 1;
    assert_int_equal(store_find_prefix(f->s, STORE_PREFIX_TOKENS, prompt, 3200, accept_all, NULL,
                                       got, &matched, &e),
                     0);
    assert_memory_equal(got, key[4], 32);
    assert_int_equal(store_find_prefix(f->s, STORE_PREFIX_TOKENS, prompt, 3200, accept_policy,
                                       (void *)(uintptr_t) "other", got, &matched, &e),
                     LARDER_ENOTFOUND);
    assert_int_equal(store_delete(f->s, key[4], &matched, &e), 0);
    assert_int_equal(store_find_prefix(f->s, STORE_PREFIX_TOKENS, prompt, 3200, accept_all, NULL,
                                       got, &matched, &e),
                     0);
    assert_memory_equal(got, key[3], 32);
    mem_free(prompt);
}

static void names_move_and_die_with_their_entry(void **state)
{
    struct fixture *f = *state;
    struct synthetic *a = synthetic_new(10, KV_BF16, false, 1),
                     *b = synthetic_new(11, KV_BF16, false, 2);
    struct larder_err e = {0, ""};
    uint8_t ka[32], kb[32], got[32];
    uint64_t freed, when;
    char why;

    assert_int_equal(synthetic_put(f->s, a, "doc", false, ka, &e), 0);
    assert_int_equal(store_find_name(f->s, "default", "doc", got, &e), 0);
    assert_memory_equal(got, ka, 32);
    assert_int_equal(store_set_name(f->s, ka, "default", "alias", &e), 0);
    assert_int_equal(synthetic_put(f->s, b, "doc", false, kb, &e), 0);
    assert_int_equal(store_find_name(f->s, "default", "doc", got, &e), 0);
    assert_memory_equal(got, kb, 32);
    assert_int_equal(store_delete(f->s, ka, &freed, &e), 0);
    assert_true(freed > 0);
    assert_int_equal(store_find_name(f->s, "default", "alias", got, &e), LARDER_ENOTFOUND);
    assert_int_equal(store_find_name(f->s, "other", "doc", got, &e), LARDER_ENOTFOUND);
    assert_int_equal(store_tombstone(f->s, ka, &why, &when, &e), 0);
    assert_int_equal(why, 'r');
    assert_int_equal(store_delete(f->s, ka, &freed, &e), LARDER_ENOTFOUND);
    assert_int_equal(store_tombstone(f->s, kb, &why, &when, &e), LARDER_ENOTFOUND);
    synthetic_free(a);
    synthetic_free(b);
}

static void storing_again_replaces_and_keeps_name_and_pin(void **state)
{
    struct fixture *f = *state;
    struct synthetic *a = synthetic_new(300, KV_BF16, false, 1);
    struct larder_err e = {0, ""};
    struct store_stats first, second;
    uint8_t key[32], again[32], got[32];

    assert_int_equal(synthetic_put(f->s, a, "doc", true, key, &e), 0);
    assert_int_equal(store_stats(f->s, &first, &e), 0);
    assert_int_equal(synthetic_put(f->s, a, NULL, false, again, &e), 0);
    assert_memory_equal(key, again, 32);
    assert_int_equal(store_stats(f->s, &second, &e), 0);
    assert_int_equal(second.entries, 1);
    assert_int_equal(second.pinned, 1);
    assert_true(first.used == second.used);
    assert_int_equal(store_find_name(f->s, "default", "doc", got, &e), 0);
    assert_int_equal(synthetic_compare(f->s, a, key, &e), 0);
    synthetic_free(a);
}

static void the_budget_holds_to_the_byte_and_spares_pins(void **state)
{
    struct fixture *f = *state;
    struct larder_err e = {0, ""};
    struct store_stats st;
    uint8_t key[12][32], got[32];
    uint64_t one, when;
    char why;

    struct synthetic *y = synthetic_new(500, KV_BF16, false, 100);
    assert_int_equal(synthetic_put(f->s, y, NULL, true, key[0], &e), 0);
    assert_int_equal(store_stats(f->s, &st, &e), 0);
    one = st.used;
    reopen(f, 4 * one);
    for (uint64_t i = 1; i < 12; i++) {
        struct synthetic *z = synthetic_new(500, KV_BF16, false, 100 + i);

        z->info.created = 1000 + i;
        assert_int_equal(synthetic_put(f->s, z, NULL, false, key[i], &e), 0);
        assert_int_equal(store_stats(f->s, &st, &e), 0);
        assert_true(st.used <= st.budget);
        assert_int_equal(synthetic_compare(f->s, z, key[i], &e), 0);
        synthetic_free(z);
    }
    assert_int_equal(synthetic_compare(f->s, y, key[0], &e), 0); /* pinned */
    assert_int_equal(store_tombstone(f->s, key[1], &why, &when, &e), 0);
    assert_int_equal(why, 'e');
    synthetic_free(y);

    /* too large for what pins leave: refused, nothing lost */
    y = synthetic_new(3000, KV_BF16, false, 500);
    assert_int_equal(store_stats(f->s, &st, &e), 0);
    assert_int_equal(synthetic_put(f->s, y, "big", false, got, &e), LARDER_EFULL);
    one = st.used;
    assert_int_equal(store_stats(f->s, &st, &e), 0);
    assert_true(st.used == one);
    assert_int_equal(store_find_name(f->s, "default", "big", got, &e), LARDER_ENOTFOUND);
    synthetic_free(y);
}

static void use_decides_who_is_evicted(void **state)
{
    struct fixture *f = *state;
    struct larder_err e = {0, ""};
    struct store_stats st;
    struct store_entry *en;
    uint8_t key[4][32];

    for (uint64_t i = 0; i < 4; i++) {
        struct synthetic *y = synthetic_new(400, KV_BF16, false, 7); /* equal sizes */

        y->tokens[0] = (uint32_t)i;
        if (i == 3) {
            assert_int_equal(store_stats(f->s, &st, &e), 0);
            reopen(f, st.used + 100);
            store_touch(f->s, key[0], 1000);
            store_touch(f->s, key[2], 1000);
            assert_int_equal(store_setting_put(f->s, "flush", "1", &e), 0);
        }
        assert_int_equal(synthetic_put(f->s, y, NULL, false, key[i], &e), 0);
        synthetic_free(y);
    }
    assert_int_equal(store_entry_open(f->s, key[1], &en, &e), LARDER_ENOTFOUND);
    assert_int_equal(store_entry_open(f->s, key[0], &en, &e), 0);
    assert_int_equal(store_entry_info(en)->hits, 1);
    store_entry_close(en);
}

/* Entry i of entries of about the same size. */
static void put_equal(struct fixture *f, uint32_t i, uint8_t key[32])
{
    struct synthetic *y = synthetic_new(400, KV_BF16, false, 7);
    struct larder_err e = {0, ""};

    y->tokens[0] = i;
    assert_int_equal(synthetic_put(f->s, y, NULL, false, key, &e), 0);
    synthetic_free(y);
}

static void what_was_replaced_or_removed_makes_room(void **state)
{
    struct fixture *f = *state;
    struct larder_err e = {0, ""};
    struct store_stats st;
    uint8_t key[32];

    put_equal(f, 0, key);
    assert_int_equal(store_stats(f->s, &st, &e), 0);
    reopen(f, 3 * st.used + 100);
    for (int i = 0; i < 4; i++)
        put_equal(f, 0, key);
    put_equal(f, 1, key);
    assert_int_equal(store_delete(f->s, key, NULL, &e), 0);
    put_equal(f, 2, key);
    put_equal(f, 3, key);
    assert_int_equal(store_stats(f->s, &st, &e), 0);
    assert_int_equal(st.entries, 3);
    assert_int_equal(st.evicted, 0);
    put_equal(f, 4, key);
    put_equal(f, 5, key);
    assert_int_equal(store_stats(f->s, &st, &e), 0);
    assert_int_equal(st.entries, 3);
    assert_int_equal(st.evicted, 2);
}

static void an_aborted_put_leaves_nothing(void **state)
{
    struct fixture *f = *state;
    struct synthetic *y = synthetic_new(3000, KV_BF16, false, 1);
    struct store_put *p;
    struct store_rows r[HEADS];
    struct store_stats a, b;
    struct larder_err e = {0, ""};

    assert_int_equal(store_stats(f->s, &a, &e), 0);
    assert_int_equal(store_put_begin(f->s, &p, &y->geom, KV_BF16, false, &e), 0);
    for (int h = 0; h < HEADS; h++)
        r[h] = (struct store_rows){y->rows[0][h], y->position[0][h], y->k[0][h], y->v[0][h], NULL};
    assert_int_equal(store_put_layer(p, r, &e), 0);
    store_put_abort(p);
    assert_int_equal(store_put_begin(f->s, &p, &y->geom, KV_BF16, false, &e), 0);
    assert_int_equal(store_put_layer(p, r, &e), 0);
    uint8_t key[32];
    assert_int_equal(store_put_commit(p, &y->info, NULL, false, key, &e),
                     LARDER_EINVAL); /* layers are missing */
    reopen(f, 64 << 20);
    assert_int_equal(store_stats(f->s, &b, &e), 0);
    assert_int_equal(b.entries, 0);
    assert_true(a.used == b.used);
    synthetic_free(y);
}

static void positions_out_of_order_are_refused(void **state)
{
    struct fixture *f = *state;
    struct synthetic *y = synthetic_new(20, KV_BF16, false, 1);
    struct larder_err e = {0, ""};
    uint8_t key[32];

    y->position[1][0][1] = y->position[1][0][0];
    assert_int_equal(synthetic_put(f->s, y, NULL, false, key, &e), LARDER_EINVAL);
    synthetic_free(y);
}

static bool count_visit(void *arg, const struct store_info *info)
{
    uint32_t *n = arg;

    assert_string_equal(info->ident.policy, "full");
    return ++*n < 3;
}

static void lists_page_in_key_order(void **state)
{
    struct fixture *f = *state;
    struct larder_err e = {0, ""};
    uint8_t key[32];
    uint32_t n = 0;

    for (uint64_t i = 0; i < 5; i++) {
        struct synthetic *y = synthetic_new(10, KV_BF16, false, i);

        assert_int_equal(synthetic_put(f->s, y, NULL, false, key, &e), 0);
        synthetic_free(y);
    }
    assert_int_equal(store_list(f->s, NULL, 100, count_visit, &n, &e), 0);
    assert_int_equal(n, 3);
    n = 0;
    assert_int_equal(store_list(f->s, NULL, 2, count_visit, &n, &e), 0);
    assert_int_equal(n, 2);
    memset(key, 0xff, 32);
    n = 0;
    assert_int_equal(store_list(f->s, key, 100, count_visit, &n, &e), 0);
    assert_int_equal(n, 0);
}

static bool see_job(void *arg, uint64_t id, const char *json)
{
    *(uint64_t *)arg = *(uint64_t *)arg * 10 + id;
    assert_int_equal(json[0], '{');
    return true;
}

static void jobs_settings_and_sources_survive_a_restart(void **state)
{
    struct fixture *f = *state;
    struct larder_err e = {0, ""};
    uint64_t len = (5u << 20) / 2, got_len, seen = 0;
    uint8_t *doc = must(mem_alloc(len, 1)), digest[32] = {9}, key[32], got[32];
    struct synthetic *y = synthetic_new(10, KV_BF16, false, 1);
    char *json, *value;
    void *got_doc;

    for (uint64_t i = 0; i < len; i++)
        doc[i] = (uint8_t)(i * 7 >> 3);
    assert_int_equal(store_job_put(f->s, 1, "{\"a\":1}", doc, len, &e), 0);
    assert_int_equal(store_job_put(f->s, 2, "{}", "x", 1, &e), 0);
    assert_int_equal(store_job_put(f->s, 1, "{\"a\":2}", NULL, 0, &e), 0);
    assert_int_equal(store_setting_put(f->s, "k", "v", &e), 0);
    assert_int_equal(synthetic_put(f->s, y, NULL, false, key, &e), 0);
    assert_int_equal(store_set_source(f->s, digest, key, &e), 0);
    reopen(f, 64 << 20);
    assert_int_equal(store_job_get(f->s, 1, &json, &got_doc, &got_len, &e), 0);
    assert_string_equal(json, "{\"a\":2}");
    assert_true(got_len == len);
    assert_memory_equal(got_doc, doc, len);
    mem_free(json);
    mem_free(got_doc);
    assert_int_equal(store_job_list(f->s, see_job, &seen, &e), 0);
    assert_int_equal(seen, 12);
    assert_int_equal(store_job_delete(f->s, 1, &e), 0);
    assert_int_equal(store_job_get(f->s, 1, &json, NULL, NULL, &e), LARDER_ENOTFOUND);
    assert_int_equal(store_setting_get(f->s, "k", &value, &e), 0);
    assert_string_equal(value, "v");
    mem_free(value);
    assert_int_equal(store_setting_put(f->s, "k", NULL, &e), 0);
    assert_int_equal(store_setting_get(f->s, "k", &value, &e), LARDER_ENOTFOUND);
    assert_int_equal(store_find_source(f->s, digest, got, &e), 0);
    assert_memory_equal(got, key, 32);
    assert_int_equal(store_delete(f->s, key, &got_len, &e), 0);
    assert_int_equal(store_find_source(f->s, digest, got, &e), LARDER_ENOTFOUND);
    synthetic_free(y);
    mem_free(doc);
}

static void a_second_opener_is_refused(void **state)
{
    struct fixture *f = *state;
    struct store_opts o = {.dir = f->dir, .store_budget = 1 << 20, .allow_any_fs = true};
    struct larder_err e = {0, ""};
    struct store *s;

    assert_int_equal(store_open(&s, &o, &e), LARDER_EBUSY);
    o.store_budget = 0;
    assert_int_equal(store_open(&s, &o, &e), LARDER_EINVAL);
    o.store_budget = 1;
    o.dir = "/nonexistent/dir";
    assert_int_equal(store_open(&s, &o, &e), LARDER_EIO);
}

static void quarantine_lasts(void **state)
{
    struct fixture *f = *state;
    struct synthetic *y = synthetic_new(10, KV_BF16, false, 1);
    struct larder_err e = {0, ""};
    struct store_stats st;
    uint8_t key[32];

    assert_int_equal(synthetic_put(f->s, y, NULL, false, key, &e), 0);
    assert_int_equal(store_quarantine(f->s, key, &e), 0);
    reopen(f, 64 << 20);
    assert_int_equal(store_stats(f->s, &st, &e), 0);
    assert_int_equal(st.damaged, 1);
    assert_int_equal(synthetic_put(f->s, y, NULL, false, key, &e), 0);
    assert_int_equal(store_stats(f->s, &st, &e), 0);
    assert_int_equal(st.damaged, 0);
    synthetic_free(y);
}

static void every_failing_allocation_is_reported_and_undone(void **state)
{
    struct fixture *f = *state;
    struct synthetic *y = synthetic_new(60, KV_BF16, true, 1);
    struct larder_err e = {0, ""};
    uint8_t key[32];
    int rc = LARDER_ENOMEM;

    for (long n = 0; rc; n++) {
        long left = n;

        assert_true(n < 10000);
        mem_set_hook(test_fail_nth, &left);
        rc = synthetic_put(f->s, y, "n", false, key, &e);
        mem_set_hook(NULL, NULL);
        assert_true(rc == 0 || rc == LARDER_ENOMEM);
    }
    assert_int_equal(synthetic_compare(f->s, y, key, &e), 0);
    reopen(f, 64 << 20);
    assert_int_equal(synthetic_compare(f->s, y, key, &e), 0);
    synthetic_free(y);
}

static void a_file_size_limit_is_a_full_store_and_loses_nothing(void **state)
{
    struct fixture *f = *state;
    struct rlimit old, small;
    struct larder_err e = {0, ""};
    uint8_t first[32], key[32];
    struct synthetic *a = synthetic_new(200, KV_BF16, false, 1),
                     *b = synthetic_new(3000, KV_BF16, false, 2);
    int rc;

    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(synthetic_put(f->s, a, "a", false, first, &e), 0);
    getrlimit(RLIMIT_FSIZE, &old);
    small = old;
    small.rlim_cur = 1 << 20;
    setrlimit(RLIMIT_FSIZE, &small);
    rc = synthetic_put(f->s, b, "b", false, key, &e);
    setrlimit(RLIMIT_FSIZE, &old);
    assert_true(rc == LARDER_EFULL || rc == LARDER_EIO);
    assert_int_equal(synthetic_compare(f->s, a, first, &e), 0);
    reopen(f, 64 << 20);
    assert_int_equal(synthetic_compare(f->s, a, first, &e), 0);
    assert_int_equal(synthetic_put(f->s, b, "b", false, key, &e), 0);
    assert_int_equal(synthetic_compare(f->s, b, key, &e), 0);
    synthetic_free(a);
    synthetic_free(b);
}

/* A child stores entries and reports each key once store_put_commit() has returned; it is
 * killed at a random moment. */
static void acknowledged_entries_survive_sigkill(void **state)
{
    struct fixture *f = *state;
    uint64_t seed = 77, acked = 0;

    store_close(f->s);
    f->s = NULL;
    for (uint64_t cycle = 0; cycle < 60; cycle++) {
        int pipe_fd[2];
        uint8_t key[32], early[2][32];
        uint64_t n = 0, n_early = cycle % 3; /* acknowledged before the blow, however slow it is */
        pid_t pid;

        assert_int_equal(pipe(pipe_fd), 0);
        pid = fork();
        if (!pid) {
            struct store *s = open_at(f->dir, 64 << 20);

            for (uint64_t i = 0;; i++) {
                struct synthetic *y =
                    synthetic_new(40 + (uint32_t)(cycle % 30), KV_BF16, false, cycle * 1000 + i);

                if (synthetic_put(s, y, NULL, false, key, NULL) || write(pipe_fd[1], key, 32) != 32)
                    _exit(1);
                synthetic_free(y);
            }
        }
        close(pipe_fd[1]);
        for (uint64_t i = 0; i < n_early; i++)
            assert_int_equal(read(pipe_fd[0], early[i], 32), 32);
        usleep((useconds_t)(test_rand(&seed) % 25000));
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        f->s = open_at(f->dir, 64 << 20);
        for (; n < n_early || read(pipe_fd[0], key, 32) == 32; n++, acked++) {
            struct synthetic *y =
                synthetic_new(40 + (uint32_t)(cycle % 30), KV_BF16, false, cycle * 1000 + n);

            assert_int_equal(synthetic_compare(f->s, y, n < n_early ? early[n] : key, NULL), 0);
            synthetic_free(y);
        }
        close(pipe_fd[0]);
        store_close(f->s);
        f->s = NULL;
    }
    assert_true(acked > 0);
    f->s = open_at(f->dir, 64 << 20);
}

#define CASE(fn) cmocka_unit_test_setup_teardown(fn, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(bf16_entries_come_back_bit_for_bit),
        CASE(packed_entries_come_back_as_their_codes_say),
        CASE(tiles_of_any_size_come_back),
        CASE(a_key_depends_on_every_part_of_its_identity),
        CASE(the_longest_stored_prefix_is_found),
        CASE(names_move_and_die_with_their_entry),
        CASE(storing_again_replaces_and_keeps_name_and_pin),
        CASE(the_budget_holds_to_the_byte_and_spares_pins),
        CASE(use_decides_who_is_evicted),
        CASE(what_was_replaced_or_removed_makes_room),
        CASE(an_aborted_put_leaves_nothing),
        CASE(positions_out_of_order_are_refused),
        CASE(lists_page_in_key_order),
        CASE(jobs_settings_and_sources_survive_a_restart),
        CASE(a_second_opener_is_refused),
        CASE(quarantine_lasts),
        CASE(every_failing_allocation_is_reported_and_undone),
        CASE(a_file_size_limit_is_a_full_store_and_loses_nothing),
        CASE(acknowledged_entries_survive_sigkill),
    };

    return cmocka_run_group_tests_name("store", tests, NULL, NULL);
}
