/* Every observation and shape on a small random model, on every backend of the build: rules
 * that must hold whatever the numbers are. That the numbers are right is compared elsewhere,
 * with recorded runs and with plain formulas (tests/golden). */
#include "testlib.h"

#include "engine_fixture.h"

/* Rows of each head where they are equal; of a layer or of all heads where heads compete. */
enum budget { PER_HEAD, PER_LAYER, IN_ALL };

static const struct {
    const char *text;
    uint32_t rows, first, last; /* budget; rows that stay */
    enum budget budget;
} plain[] = {
    {"streaming,rows=30", 30, 4, 26, PER_HEAD},
    {"keydiff,rows=30", 30, 4, 0, PER_HEAD},
    {"keydiff,rows=30,sink=0", 30, 0, 0, PER_HEAD},
    {"knorm,rows=30", 30, 4, 0, PER_HEAD},
    {"tova,rows=30", 30, 0, 1, PER_HEAD},
    {"observed,rows=30", 30, 0, 0, PER_HEAD},
    {"expected,rows=30", 30, 4, 0, PER_HEAD},
    {"snapkv,rows=30,w=8,sink=3", 30, 3, 8, PER_HEAD},
    {"snapkv,rows=30,obs=dot", 30, 0, 0, PER_HEAD},
    {"criticalkv,rows=30,w=8", 30, 0, 8, PER_HEAD},
    {"criticalkv,rows=30,obs=expected", 30, 4, 0, PER_HEAD},
    {"pyramidkv,rows=30,w=8", 30, 0, 8, IN_ALL},
    {"adakv,rows=30,w=8", 30, 0, 8, PER_LAYER},
    {"adakv,rows=30,obs=expected", 30, 4, 0, PER_LAYER},
    {"adakv,rows=20%,obs=keys,guard=0%", 30, 4, 0, PER_LAYER},
    {"criticalkv,rows=30,w=8,shape=layer", 30, 0, 8, PER_LAYER},
    {"defensive,rows=30,w=8", 30, 0, 8, PER_LAYER},
    {"defensive,rows=30,w=8,shape=global", 30, 0, 8, IN_ALL},
    {"keydiff,rows=30,shape=global", 30, 4, 0, IN_ALL},
    {"observed,rows=20%,shape=global", 30, 0, 0, IN_ALL},
    {"criticalkv,rows=30,w=8,shape=global", 30, 0, 8, IN_ALL},
};
enum { N_PLAIN = sizeof plain / sizeof plain[0] };

/* What each of them keeps on each backend, computed once. */
static const struct outcome *outcome_of(int p, const char *backend)
{
    static struct outcome all[2][N_PLAIN];
    struct outcome *o = &all[!strcmp(backend, "cpu")][p];
    struct model m = fake_model();
    const char *mine = backend_name;

    if (!o->n_layers) {
        backend_name = backend;
        *o = run(&m, N, plain[p].text);
        backend_name = mine;
    }
    return o;
}

static void assert_stays(const struct kept *h, uint32_t first, uint32_t last)
{
    for (uint32_t j = 1; j < h->n_rows; j++)
        assert_true(h->position[j] > h->position[j - 1]);
    for (uint32_t j = 0; j < first; j++)
        assert_int_equal(h->position[j], j);
    for (uint32_t j = 0; j < last; j++)
        assert_int_equal(h->position[h->n_rows - 1 - j], N - 1 - j);
}

static void budgets_are_used_and_never_exceeded(void **state)
{
    (void)state;
    for (int p = 0; p < N_PLAIN; p++) {
        const struct outcome *o = outcome_of(p, backend_name);
        uint32_t all = 0;

        for (int i = 0; i < HEADS; i++) {
            assert_stays(&o->head[i], plain[p].first, plain[p].last);
            all += o->head[i].n_rows;
            if (plain[p].budget == PER_HEAD)
                assert_int_equal(o->head[i].n_rows, plain[p].rows);
            if (plain[p].budget == PER_LAYER && i % FAKE_KV_HEADS == FAKE_KV_HEADS - 1)
                assert_int_equal(all, (i + 1) * plain[p].rows);
        }
        assert_int_equal(all, HEADS * plain[p].rows);
    }
}

static void what_is_dropped_does_not_change_the_prefill(void **state)
{
    struct model m = fake_model();
    struct outcome full = run(&m, N, "full");

    (void)state;
    for (int p = 0; p < N_PLAIN; p++) {
        const struct outcome *o = outcome_of(p, backend_name);

        assert_same_logits(&full, o);
        for (int i = 0; i < HEADS; i++) {
            for (uint32_t j = 0; j < o->head[i].n_rows; j++) {
                size_t at = o->head[i].position[j] * (size_t)FAKE_HEAD_DIM;

                assert_memory_equal(o->head[i].k + j * FAKE_HEAD_DIM, full.head[i].k + at,
                                    FAKE_HEAD_DIM * sizeof(float));
                assert_memory_equal(o->head[i].v + j * FAKE_HEAD_DIM, full.head[i].v + at,
                                    FAKE_HEAD_DIM * sizeof(float));
            }
        }
    }
    drop(&full);
}

static void budgets_beyond_the_document_keep_everything(void **state)
{
    static const char *const policies[] = {"keydiff,rows=all", "observed,rows=150,shape=global",
                                           "adakv,rows=400", "pyramidkv,rows=all"};
    struct model m = fake_model();
    struct outcome full = run(&m, N, "full");

    (void)state;
    for (size_t p = 0; p < sizeof policies / sizeof policies[0]; p++) {
        struct outcome o = run(&m, N, policies[p]);

        assert_same_rows(&full, &o);
        drop(&o);
    }
    drop(&full);
}

static void threads_do_not_change_a_choice(void **state)
{
    struct model m = fake_model();
    struct backend *one = open_backend(&m, 1);
    uint32_t ids[N];

    (void)state;
    make_ids(ids, N);
    for (int p = 0; p < N_PLAIN; p++) {
        struct outcome o = {0};

        prefill_ids(one, ids, N, plain[p].text, &o);
        assert_same_positions(&o, outcome_of(p, backend_name)); /* of two threads */
        drop(&o);
    }
    one->ops->close(one);
}

/* Sums over a group are taken in another order; scores of a random model are not that close. */
static void query_heads_of_a_group_may_be_swapped(void **state)
{
    struct model swapped = fake_model();

    (void)state;
    swapped.swapped_heads = true;
    for (int p = 0; p < N_PLAIN; p++) {
        struct outcome o = run(&swapped, N, plain[p].text);

        assert_same_positions(&o, outcome_of(p, backend_name));
        drop(&o);
    }
}

static void backends_choose_the_same_rows(void **state)
{
    (void)state;
    for (int p = 0; p < N_PLAIN; p++)
        assert_same_positions(outcome_of(p, "ref"), outcome_of(p, backend_name));
}

/* ---- axes that meet */

static void any_observation_can_cut(void **state)
{
    static const char *const policies[] = {
        "asl,obs=keys,rows=30,select=60,lmin=3,lobs=3,tau=9",
        "asl,obs=norm,rows=30,select=60,lmin=3,lobs=3,tau=9",
        "asl,obs=expected,rows=30,select=60,lmin=3,lobs=3,tau=9",
        "asl,obs=all,rows=30,select=60,lmin=3,lobs=3,tau=9",
        "snapkv,cut=adaptive,w=8,sink=4,rows=30,select=60,lmin=3,lobs=3,tau=9",
        "fastkv,obs=last,rows=30,select=60,layer=3",
        "streaming,cut=fixed,rows=30,select=60,layer=3",
        "defensive,cut=fixed,w=8,rows=30,select=60,layer=3",
        "keydiff,shape=global,cut=fixed,rows=30,select=60,layer=3",
        "criticalkv,w=8,cut=fixed,rows=30,select=60,layer=3",
    };
    struct model m = fake_model();

    (void)state;
    for (size_t p = 0; p < sizeof policies / sizeof policies[0]; p++) {
        struct outcome o = run(&m, N, policies[p]);
        uint32_t all = 0;

        assert_int_equal(o.r.sel_layer, 3);
        assert_int_equal(o.r.n_selected, 60);
        assert_int_equal(o.r.selected[59], N - 1); /* the row that the answer follows */
        assert_false(o.r.renumbered);
        for (int i = 0; i < HEADS; i++)
            all += o.head[i].n_rows;
        assert_int_equal(all, HEADS * 30);
        drop(&o);
    }
}

static void any_observation_can_choose_for_a_second_pass(void **state)
{
    struct model m = fake_model();
    struct outcome o = run(&m, N, "keydiff,cut=fixed2,rows=40,layer=2");

    (void)state;
    assert_true(o.r.renumbered);
    assert_int_equal(o.r.next_pos, 40);
    for (uint32_t j = 0; j < 4; j++)
        assert_int_equal(o.r.selected[j], j);
    drop(&o);
    o = run(&m, N, "asl2pass,obs=norm,rows=40,lmin=3,lobs=3,tau=0");
    assert_int_equal(o.r.sel_layer, -1);
    assert_int_equal(o.r.n_selected, 40);
    drop(&o);
}

static void a_decay_drops_a_few_tokens_after_each_layer(void **state)
{
    struct model m = fake_model();
    struct outcome full = run(&m, N, "full");
    struct outcome o = run(&m, N, "pyramidinfer,recent=20%,context=16,decay=0.5");
    uint32_t n = N;

    (void)state;
    assert_int_equal(o.r.sel_layer, -1);
    for (int i = 0; i < HEADS; i++) {
        const struct kept *h = &o.head[i];

        assert_true(h->n_rows <= n && h->n_rows >= 31 + 16);
        assert_stays(h, 4, 31);
        assert_int_equal(h->n_rows, o.head[i / FAKE_KV_HEADS * FAKE_KV_HEADS].n_rows);
        n = h->n_rows;
    }
    assert_true(n < N / 2 + 31);
    drop(&o);
    o = run(&m, N, "pyramidinfer,decay=1");
    assert_same_rows(&full, &o);
    assert_same_logits(&full, &o);
    drop(&o);
    drop(&full);
}

/* ---- shares, which come with the model's calibration and not with the string */

/* `shares` in any unit: only their proportions matter. */
static struct outcome run_shares(const struct model *m, const char *text, const double *shares)
{
    struct backend *b = open_backend(m, 2);
    struct outcome o = {0};
    struct engine_sink sink = {&o, on_layer, on_progress};
    struct engine_doc doc = {NULL, N, NULL, NULL};
    struct shares *table = NULL;
    float part[HEADS];
    struct policy p;
    uint32_t ids[N];

    for (int i = 0; i < HEADS; i++)
        part[i] = (float)shares[i] / 8;
    assert_int_equal(shares_new(&table, HEADS, NULL), 0);
    assert_int_equal(shares_add(table, 0.25, part, NULL), 0);
    make_ids(ids, N);
    doc.ids = ids;
    doc.shares = table;
    assert_int_equal(policy_parse(text, &p, NULL), 0);
    o.rc = engine_prefill(b, &doc, &p, &sink, &o.r, &o.e);
    shares_free(table);
    b->ops->close(b);
    return o;
}

/* A budget that the document does not use up: rows are handed on where they are. */
static void a_replay_keeps_a_document_that_fits_its_budget(void **state)
{
    static const char *const policies[] = {"kvzip,rows=400", "kvzip,rows=all,shape=layer",
                                           "kvzip,rows=400,shape=uniform"};
    struct model m = fake_model();
    struct outcome full = run(&m, N, "full");

    (void)state;
    for (size_t p = 0; p < sizeof policies / sizeof policies[0]; p++) {
        struct outcome o = run(&m, N, policies[p]);

        assert_same_rows(&full, &o);
        assert_same_logits(&full, &o);
        drop(&o);
    }
    drop(&full);
}

static void shares_give_each_head_its_part(void **state)
{
    struct model m = fake_model();
    double shares[HEADS];
    struct outcome o;
    uint32_t all = 0;

    (void)state;
    for (int i = 0; i < HEADS; i++)
        shares[i] = 1 + i % 3;
    o = run_shares(&m, "keydiff,rows=20%,shape=shares", shares);
    assert_int_equal(o.rc, 0);
    for (int i = 0; i < HEADS; i++) {
        all += o.head[i].n_rows;
        assert_stays(&o.head[i], 4, 0);
        assert_in_range(o.head[i].n_rows, shares[i] * 30 / 2 - 1, shares[i] * 30 / 2 + 1);
    }
    assert_int_equal(all, HEADS * 30);
    drop(&o);
}

static void duo_keeps_whole_heads_and_recent_rows(void **state)
{
    struct model m = fake_model();
    double shares[HEADS];
    struct outcome o;

    (void)state;
    for (int i = 0; i < HEADS; i++)
        shares[i] = i == 3 || i == 9 ? 2 : 0.5;
    o = run_shares(&m, "duo,rows=30%,w=8", shares);
    assert_int_equal(o.rc, 0);
    for (int i = 0; i < HEADS; i++) {
        assert_stays(&o.head[i], 4, 8);
        assert_true(o.head[i].n_rows == N || o.head[i].n_rows == 12);
    }
    assert_int_equal(o.head[3].n_rows, N);
    assert_int_equal(o.head[9].n_rows, N);
    assert_int_equal(o.head[15].n_rows, 12);
    drop(&o);
}

/* ---- what goes wrong */

static void policies_that_are_not_computed_are_refused_by_name(void **state)
{
    static const char *const policies[][2] = {{"matching", "calibration"},
                                              {"offline", "calibration"},
                                              {"duo", "calibration"},
                                              {"snapkv,shape=shares", "calibration"}};
    struct model m = fake_model();

    (void)state;
    for (size_t p = 0; p < sizeof policies / sizeof policies[0]; p++) {
        struct outcome o = prefill(&m, N, policies[p][0]);

        assert_int_equal(o.rc, LARDER_EUNSUPPORTED);
        assert_non_null(strstr(o.e.msg, policies[p][1]));
        assert_int_equal(o.n_progress, 0);
        drop(&o);
    }
}

static void scores_that_are_not_finite_fail(void **state)
{
    struct model m = fake_model();
    struct outcome o;

    (void)state;
    m.nan_layer = 5;
    for (int p = 0; p < N_PLAIN; p++) {
        o = prefill(&m, 50, plain[p].text);

        if (o.rc != LARDER_ENUMERIC)
            fail_msg("%s: %d", plain[p].text, o.rc);
        drop(&o);
    }
    o = prefill(&m, N, "pyramidinfer,context=16");
    assert_int_equal(o.rc, LARDER_ENUMERIC);
    drop(&o);
}

static void running_out_of_memory_leaves_nothing_behind(void **state)
{
    static const char *const policies[] = {
        "expected,rows=20",       "defensive,rows=20,w=8,shape=global", "criticalkv,rows=20,w=8",
        "pyramidinfer,context=8", "keydiff,rows=20,shape=layer",        "observed,rows=20"};
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 1);
    uint32_t ids[24];

    (void)state;
    make_ids(ids, 24);
    for (size_t p = 0; p < sizeof policies / sizeof policies[0]; p++) {
        struct outcome o = {.rc = LARDER_ENOMEM};

        /* layers repeat each other: every allocation of the first, some of the others */
        for (long n = 0; o.rc; n += n < 80 ? 1 : 7) {
            long left = n;

            drop(&o);
            mem_set_hook(test_fail_nth, &left);
            prefill_ids(b, ids, 24, policies[p], &o);
            mem_set_hook(NULL, NULL);
            if (o.rc && o.rc != LARDER_ENOMEM)
                fail_msg("%s, allocation %ld: %s", policies[p], n, o.e.msg);
        }
        drop(&o);
    }
    b->ops->close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(budgets_are_used_and_never_exceeded),
        cmocka_unit_test(what_is_dropped_does_not_change_the_prefill),
        cmocka_unit_test(budgets_beyond_the_document_keep_everything),
        cmocka_unit_test(threads_do_not_change_a_choice),
        cmocka_unit_test(query_heads_of_a_group_may_be_swapped),
        cmocka_unit_test(backends_choose_the_same_rows),
        cmocka_unit_test(any_observation_can_cut),
        cmocka_unit_test(any_observation_can_choose_for_a_second_pass),
        cmocka_unit_test(a_decay_drops_a_few_tokens_after_each_layer),
        cmocka_unit_test(a_replay_keeps_a_document_that_fits_its_budget),
        cmocka_unit_test(shares_give_each_head_its_part),
        cmocka_unit_test(duo_keeps_whole_heads_and_recent_rows),
        cmocka_unit_test(policies_that_are_not_computed_are_refused_by_name),
        cmocka_unit_test(scores_that_are_not_finite_fail),
        cmocka_unit_test(running_out_of_memory_leaves_nothing_behind),
    };

    return run_on_every_backend(tests, sizeof tests / sizeof tests[0]);
}
