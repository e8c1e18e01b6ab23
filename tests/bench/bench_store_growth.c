/* bench_store_growth.c - does a look-up in a store cost more when more is stored?
 *
 * bench_store_growth DIR ENTRIES..., with DIR a directory that is empty or holds a store of an
 * earlier call, and ascending numbers of entries. The store grows to each of them by durable puts;
 * then a sample of the entries, drawn anew, is looked up by key, by name and as the longest prefix
 * of a prompt of 2,048 tokens, and read whole. Prints CSV: minimum and median of each. All entries
 * begin with the same tokens and have 56 lengths (small_entry.h), so every prompt meets all of them
 * in one group of the prefix index.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "benchlib.h"
#include "small_entry.h"

#define N_RUNS 20001u
#define PROMPT_TOKENS 2048u
#define ENTRY_BYTES 4096ull /* more than one takes */
#define MAX_ENTRIES 10000000u
#define MAX_HEAD_BYTES 4096u

static const struct small_shape shape = {{1, 1, 1, 16}, 8};

struct growth {
    struct store *s;
    uint8_t (*key)[STORE_KEY_LEN]; /* of the entries, in the order of their puts */
    uint32_t n;
    uint64_t seed;
    uint32_t prompt[PROMPT_TOKENS];
};

/* One look-up of entry i, whose tokens begin the prompt. */
typedef int operation(struct growth *g, uint32_t i, struct larder_err *e);

static int by_key(struct growth *g, uint32_t i, struct larder_err *e)
{
    struct store_entry *en = NULL;
    int rc = store_entry_open(g->s, g->key[i], &en, e);

    store_entry_close(en);
    return rc;
}

static int same_key(const struct growth *g, uint32_t i, const uint8_t *key, struct larder_err *e)
{
    return memcmp(key, g->key[i], STORE_KEY_LEN)
               ? larder_fail(e, LARDER_EINTERNAL, "entry %u was not found", (unsigned)i)
               : 0;
}

static int by_name(struct growth *g, uint32_t i, struct larder_err *e)
{
    uint8_t key[STORE_KEY_LEN];
    char name[SMALL_NAME_BYTES];
    int rc;

    small_name(i, name);
    rc = store_find_name(g->s, "default", name, key, e);
    return rc ? rc : same_key(g, i, key, e);
}

static bool accept_all(void *arg, const struct store_info *info)
{
    (void)arg;
    (void)info;
    return true;
}

static int by_prefix(struct growth *g, uint32_t i, struct larder_err *e)
{
    uint8_t key[STORE_KEY_LEN];
    uint64_t matched;
    int rc = store_find_prefix(g->s, STORE_PREFIX_TOKENS, g->prompt, sizeof g->prompt, accept_all,
                               NULL, key, &matched, e);

    return rc ? rc : same_key(g, i, key, e);
}

static int fetch(struct growth *g, uint32_t i, struct larder_err *e)
{
    uint8_t rows[2 * MAX_HEAD_BYTES];
    struct store_target at = {0, MAX_HEAD_BYTES, 0};
    struct store_sink to = {.base = rows, .target = &at};
    struct store_entry *en = NULL;
    int rc = store_entry_open(g->s, g->key[i], &en, e);

    if (!rc)
        rc = store_entry_load(en, e);
    for (uint32_t x = 0; !rc && x < store_entry_n_extents(en, KV_BF16); x++)
        rc = store_entry_decode(en, KV_BF16, x, &to, e);
    store_entry_close(en);
    return rc;
}

/* Entries of an earlier call. */
static int recall(struct growth *g, uint32_t first, struct larder_err *e)
{
    struct store_stats st;
    int rc = store_stats(g->s, &st, e);

    if (!rc && st.entries > first)
        rc = larder_fail(e, LARDER_EINVAL, "the store has %llu entries already",
                         (unsigned long long)st.entries);
    for (; !rc && g->n < st.entries; g->n++) {
        char name[SMALL_NAME_BYTES];

        small_name(g->n, name);
        rc = store_find_name(g->s, "default", name, g->key[g->n], e);
    }
    return rc;
}

static int grow(struct growth *g, uint32_t n, struct larder_err *e)
{
    double t0 = now_us();
    uint32_t from = g->n;
    int rc = 0;

    for (; !rc && g->n < n; g->n++) {
        char name[SMALL_NAME_BYTES];

        small_name(g->n, name);
        rc = small_put(g->s, &shape, g->n, name, g->key[g->n], e);
    }
    if (!rc && g->n > from)
        fprintf(stderr, "%u entries: %.1f us a put\n", (unsigned)n, (now_us() - t0) / (n - from));
    return rc;
}

static int measure(struct growth *g, const char *what, operation *op, struct larder_err *e)
{
    static double us[N_RUNS];
    int rc = 0;

    for (uint32_t r = 0; !rc && r < N_RUNS; r++) {
        uint32_t i = (uint32_t)(small_rand(&g->seed) % g->n);
        double t0;

        small_tokens(i, g->prompt);
        t0 = now_us();
        rc = op(g, i, e);
        us[r] = now_us() - t0;
    }
    if (rc == LARDER_ENOTFOUND)
        larder_fail(e, rc, "%s: an entry is missing", what);
    if (rc)
        return rc;
    qsort(us, N_RUNS, sizeof *us, by_value);
    printf("%s,%u,%u,%.2f,%.2f\n", what, (unsigned)g->n, N_RUNS, us[0], us[N_RUNS / 2]);
    return 0;
}

static int grow_and_measure(struct growth *g, uint32_t n, struct larder_err *e)
{
    int rc = grow(g, n, e);

    if (!rc)
        rc = measure(g, "by key", by_key, e);
    if (!rc)
        rc = measure(g, "by name", by_name, e);
    if (!rc)
        rc = measure(g, "longest prefix", by_prefix, e);
    if (!rc)
        rc = measure(g, "fetch", fetch, e);
    return rc;
}

/* The numbers of entries, ascending; 0: they are not. */
static uint32_t largest(char **arg, int n)
{
    unsigned long last = 0;

    for (int i = 0; i < n; i++) {
        char *end;
        unsigned long v = strtoul(arg[i], &end, 10);

        if (*end || v <= last || v > MAX_ENTRIES)
            return 0;
        last = v;
    }
    return (uint32_t)last;
}

int main(int argc, char **argv)
{
    static struct growth g = {.seed = 20240229};
    uint32_t most = argc > 2 ? largest(argv + 2, argc - 2) : 0;
    struct store_opts o = {
        .dir = argv[1], .store_budget = most * ENTRY_BYTES, .allow_any_fs = true};
    struct larder_err e = {0, ""};
    int rc;

    if (!most) {
        fprintf(stderr, "usage: bench_store_growth DIR ENTRIES... (ascending)\n");
        return 77;
    }
    if (o.store_budget < 1 << 20)
        o.store_budget = 1 << 20;
    g.key = mem_alloc(most, sizeof *g.key);
    rc = g.key ? store_open(&g.s, &o, &e) : larder_fail(&e, LARDER_ENOMEM, "no memory for keys");
    if (!rc)
        rc = recall(&g, (uint32_t)strtoul(argv[2], NULL, 10), &e);
    printf("operation,entries,runs,min_us,median_us\n");
    for (int i = 2; !rc && i < argc; i++)
        rc = grow_and_measure(&g, (uint32_t)strtoul(argv[i], NULL, 10), &e);
    store_close(g.s);
    mem_free(g.key);
    if (rc) {
        fprintf(stderr, "bench_store_growth: %s (%s)\n", e.msg, larder_status_name(rc));
        return 1;
    }
    return 0;
}
