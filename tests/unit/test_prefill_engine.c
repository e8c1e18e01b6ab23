/* The engine on a small random model, on every backend of the build: rules that must hold
 * whatever the numbers are, and bad input. */
#include "testlib.h"

#include "engine_fixture.h"

/* ---- policies */

static void full_keeps_every_row(void **state)
{
    struct model m = fake_model();
    struct outcome o = run(&m, N, "full");

    (void)state;
    assert_int_equal(o.r.n_ctx, N);
    assert_int_equal(o.r.next_pos, N);
    assert_int_equal(o.r.sel_layer, -1);
    assert_null(o.r.selected);
    assert_int_equal(o.r.n_trace, 0);
    assert_int_equal(o.n_progress, FAKE_LAYERS);
    for (int i = 0; i < HEADS; i++) {
        assert_int_equal(o.head[i].n_rows, N);
        for (uint32_t j = 0; j < N; j++)
            assert_int_equal(o.head[i].position[j], j);
    }
    drop(&o);
}

static void budget_bounds_every_head_and_the_window_stays(void **state)
{
    const char *policies[] = {"snapkv,rows=40,w=8,pool=3", ASL ",rows=40,tau=9",
                              ASL ",rows=30,select=60,tau=9",
                              "fastkv,rows=40,select=70,w=8,pool=3,layer=2"};
    struct model m = fake_model();

    (void)state;
    for (size_t p = 0; p < sizeof policies / sizeof policies[0]; p++) {
        struct outcome o = run(&m, N, policies[p]);
        uint32_t budget = p == 2 ? 30 : 40;

        for (int i = 0; i < HEADS; i++) {
            const struct kept *h = &o.head[i];

            assert_int_equal(h->n_rows, budget);
            for (uint32_t j = 1; j < h->n_rows; j++)
                assert_true(h->position[j] > h->position[j - 1]);
            for (uint32_t j = 0; j < 8; j++)
                assert_int_equal(h->position[budget - 1 - j], N - 1 - j);
        }
        drop(&o);
    }
}

static void pruning_what_is_kept_does_not_change_the_prefill(void **state)
{
    struct model m = fake_model();
    struct outcome full = run(&m, N, "full"), pruned = run(&m, N, "snapkv,rows=40,w=8,pool=3");

    (void)state;
    assert_same_logits(&full, &pruned);
    for (int i = 0; i < HEADS; i++) {
        for (uint32_t j = 0; j < pruned.head[i].n_rows; j++) {
            uint32_t at = pruned.head[i].position[j];

            assert_memory_equal(pruned.head[i].k + j * FAKE_HEAD_DIM,
                                full.head[i].k + at * FAKE_HEAD_DIM, FAKE_HEAD_DIM * sizeof(float));
        }
    }
    drop(&full);
    drop(&pruned);
}

static void selecting_all_tokens_changes_nothing(void **state)
{
    struct model m = fake_model();
    struct outcome full = run(&m, N, "full"), all = run(&m, N, ASL ",rows=400,tau=9");

    (void)state;
    assert_int_equal(all.r.sel_layer, 3);
    assert_int_equal(all.r.n_selected, N);
    assert_same_logits(&full, &all);
    assert_same_rows(&full, &all);
    assert_same_positions(&full, &all);
    drop(&full);
    drop(&all);
}

static void tau_zero_never_selects(void **state)
{
    struct model m = fake_model();
    struct outcome o = run(&m, N, ASL ",rows=40,tau=0");

    (void)state;
    assert_int_equal(o.r.sel_layer, -1);
    assert_null(o.r.selected);
    assert_int_equal(o.r.n_trace, FAKE_LAYERS - 3);
    for (uint32_t i = 0; i < o.r.n_trace; i++)
        assert_int_equal(o.r.trace[i].layer, 3 + i);
    drop(&o);
}

static void tau_above_one_selects_at_l_min(void **state)
{
    struct model m = fake_model();
    struct outcome o = run(&m, N, ASL ",rows=40,tau=1.01");

    (void)state;
    assert_int_equal(o.r.sel_layer, 3);
    assert_int_equal(o.r.n_trace, 1);
    assert_true(o.r.trace[0].ratio == 1 && o.r.trace[0].value > 0);
    assert_int_equal(o.r.n_selected, 40);
    assert_int_equal(o.r.next_pos, N); /* nothing is renumbered */
    assert_false(o.r.renumbered);
    drop(&o);
}

static void tau_one_does_not_select_at_l_min(void **state)
{
    struct model m = fake_model();
    struct outcome o = run(&m, N, ASL ",rows=40,tau=1");

    (void)state;
    assert_true(o.r.sel_layer != 3);
    drop(&o);
}

static void constant_ranks_select_one_layer_after_l_min(void **state)
{
    struct model m = fake_model();
    struct outcome o;

    (void)state;
    m.frozen = true;
    o = run(&m, N, ASL ",rows=40,tau=0.1");
    assert_int_equal(o.r.n_trace, 2);
    assert_true(o.r.trace[0].value == 0 && o.r.trace[0].ratio == 1);
    assert_true(o.r.trace[1].value == 0 && o.r.trace[1].ratio == 0);
    assert_int_equal(o.r.sel_layer, 4);
    drop(&o);
}

static void query_heads_of_a_group_may_be_swapped(void **state)
{
    struct model m = fake_model();
    struct outcome a = run(&m, N, ASL ",rows=40,tau=1.01"), b;

    (void)state;
    m.swapped_heads = true;
    b = run(&m, N, ASL ",rows=40,tau=1.01");
    assert_int_equal(a.r.sel_layer, b.r.sel_layer);
    assert_same_positions(&a, &b);
    for (int i = 0; i < FAKE_VOCAB; i++)
        assert_true(fabsf(a.r.logits[i] - b.r.logits[i]) < 1e-4f);
    drop(&a);
    drop(&b);
}

/* Scaling by a power of two is exact, so O can take it back exactly. */
static void scaling_v_changes_no_selection(void **state)
{
    struct model m = fake_model();
    struct outcome a = run(&m, N, ASL ",rows=40,tau=1.01"), b;

    (void)state;
    m.v_scale = 4;
    b = run(&m, N, ASL ",rows=40,tau=1.01");
    assert_same_positions(&a, &b);
    assert_same_logits(&a, &b);
    assert_true(b.head[0].v[0] == 4 * a.head[0].v[0]);
    drop(&a);
    drop(&b);
}

static void layers_above_the_cut_see_the_selected_tokens_only(void **state)
{
    struct model m = fake_model();
    struct outcome full = run(&m, N, "full"), o = run(&m, N, ASL ",rows=all,select=40,tau=9");

    (void)state;
    assert_int_equal(o.r.sel_layer, 3);
    for (int i = 0; i < HEADS; i++) {
        bool above = i / FAKE_KV_HEADS > 3;

        assert_int_equal(o.head[i].n_rows, above ? 40 : N);
        if (above)
            assert_memory_equal(o.head[i].position, o.r.selected, 40 * sizeof(uint32_t));
        else
            assert_memory_equal(o.head[i].k, full.head[i].k, N * FAKE_HEAD_DIM * sizeof(float));
    }
    /* just above the cut, hidden states and positions are still those of the full prefill */
    for (uint32_t j = 0; j < 40; j++)
        assert_memory_equal(o.head[4 * FAKE_KV_HEADS].k + j * FAKE_HEAD_DIM,
                            full.head[4 * FAKE_KV_HEADS].k + o.r.selected[j] * FAKE_HEAD_DIM,
                            FAKE_HEAD_DIM * sizeof(float));
    drop(&full);
    drop(&o);
}

static void fastkv_cuts_where_it_is_told(void **state)
{
    struct model m = fake_model();
    struct outcome o = run(&m, N, "fastkv,rows=all,select=50,w=8,layer=0");

    (void)state;
    assert_int_equal(o.r.sel_layer, 0);
    assert_int_equal(o.r.n_trace, 0);
    assert_int_equal(o.head[0].n_rows, N);
    assert_int_equal(o.head[HEADS - 1].n_rows, 50);
    drop(&o);
}

static void a_cut_after_the_last_layer_keeps_the_logits(void **state)
{
    struct model m = fake_model();
    struct outcome full = run(&m, N, "full"), o = run(&m, N, "fastkv,rows=all,select=50,layer=7");

    (void)state;
    assert_int_equal(o.r.sel_layer, 7);
    assert_int_equal(o.r.n_selected, 50);
    assert_same_logits(&full, &o);
    drop(&full);
    drop(&o);
}

static void short_documents_are_kept_whole(void **state)
{
    const uint32_t lengths[] = {1, 2, 7, 8};
    struct model m = fake_model();

    (void)state;
    for (int i = 0; i < 4; i++) {
        struct outcome full = run(&m, lengths[i], "full");
        struct outcome o = run(&m, lengths[i], ASL ",rows=9,tau=9");

        assert_int_equal(o.r.sel_layer, -1); /* nothing but window: nothing to rank */
        assert_same_logits(&full, &o);
        assert_same_rows(&full, &o);
        drop(&full);
        drop(&o);
    }
}

static void one_token_beyond_the_window_can_be_ranked(void **state)
{
    struct model m = fake_model();
    struct outcome o = run(&m, 9, ASL ",rows=9,tau=9");

    (void)state;
    assert_int_equal(o.r.sel_layer, 3);
    assert_int_equal(o.r.n_selected, 9);
    drop(&o);
}

/* Rows of the second pass are those of an ordinary prefill of the chosen tokens. */
static void two_pass_policies_renumber(void **state)
{
    const char *policies[] = {"gemfilter,rows=40,pool=3,layer=4",
                              "asl2pass,rows=40,w=8,pool=3,lmin=3,lobs=3,tau=9",
                              "asl2pass,rows=40,w=8,pool=3,lmin=3,lobs=3,tau=0"};
    const int32_t sel_layer[] = {4, 3, -1};
    struct model m = fake_model();

    (void)state;
    for (int p = 0; p < 3; p++) {
        struct backend *b = open_backend(&m, 1);
        struct outcome o = run(&m, N, policies[p]), plain = {0};
        uint32_t ids[N], chosen[40];

        assert_int_equal(o.r.sel_layer, sel_layer[p]);
        assert_true(o.r.renumbered);
        assert_int_equal(o.r.n_ctx, N);
        assert_int_equal(o.r.next_pos, 40);
        assert_int_equal(o.r.n_selected, 40);
        assert_string_equal(o.passes, "select prefill ");
        make_ids(ids, N);
        for (int i = 0; i < 40; i++)
            chosen[i] = ids[o.r.selected[i]];
        prefill_ids(b, chosen, 40, "full", &plain);
        assert_same_logits(&o, &plain);
        assert_same_rows(&o, &plain);
        for (int i = 0; i < HEADS; i++)
            assert_memory_equal(o.head[i].position, o.r.selected, 40 * sizeof(uint32_t));
        drop(&plain);
        drop(&o);
        b->ops->close(b);
    }
}

static void asl2pass_chooses_what_asl_chooses(void **state)
{
    struct model m = fake_model();
    struct outcome a = run(&m, N, ASL ",rows=40,tau=9");
    struct outcome b = run(&m, N, "asl2pass,rows=40,w=8,pool=3,lmin=3,lobs=3,tau=9");

    (void)state;
    assert_memory_equal(a.r.selected, b.r.selected, 40 * sizeof(uint32_t));
    drop(&a);
    drop(&b);
}

static void two_pass_budget_above_the_document_is_a_full_prefill(void **state)
{
    struct model m = fake_model();
    struct outcome full = run(&m, N, "full"), o = run(&m, N, "gemfilter,rows=150");

    (void)state;
    assert_false(o.r.renumbered);
    assert_same_logits(&full, &o);
    assert_same_rows(&full, &o);
    drop(&full);
    drop(&o);
}

static void threads_do_not_change_a_bit(void **state)
{
    struct model m = fake_model();
    uint32_t ids[N];
    struct outcome o[3] = {0};

    (void)state;
    make_ids(ids, N);
    for (uint32_t t = 0; t < 3; t++) {
        struct backend *b = open_backend(&m, t + 1);

        prefill_ids(b, ids, N, ASL ",rows=40,tau=1.01", &o[t]);
        b->ops->close(b);
        assert_int_equal(o[t].rc, 0);
        assert_same_logits(&o[0], &o[t]);
        assert_same_rows(&o[0], &o[t]);
    }
    for (int t = 0; t < 3; t++)
        drop(&o[t]);
}

/* ---- bad input */

static void assert_fails(const struct model *m, uint32_t n, const char *policy, int code)
{
    struct outcome o = prefill(m, n, policy);

    if (o.rc != code)
        fail_msg("%s of %u tokens: %s, expected %s", policy, n, larder_status_name(o.rc),
                 larder_status_name(code));
    assert_true(o.e.msg[0]);
    assert_null(o.r.logits);
    drop(&o);
}

static void bad_documents_and_budgets_fail(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 1);
    const uint32_t stray[3] = {1, FAKE_VOCAB, 2};
    struct outcome o = {0};

    (void)state;
    assert_fails(&m, 0, "full", LARDER_EEMPTY);
    assert_fails(&m, FAKE_POSITIONS + 1, "full", LARDER_ETOOLONG);
    assert_fails(&m, N, "snapkv,rows=8,w=8", LARDER_EBUDGET);
    assert_fails(&m, N, ASL ",rows=40,select=8", LARDER_EBUDGET);
    assert_fails(&m, N, ASL ",rows=3%,select=40", LARDER_EBUDGET);
    assert_fails(&m, N, "asl,rows=40,lmin=8,lobs=3", LARDER_EPOLICY);
    assert_fails(&m, N, "fastkv,layer=8", LARDER_EPOLICY);
    prefill_ids(b, stray, 3, "full", &o);
    assert_int_equal(o.rc, LARDER_EINVAL);
    assert_non_null(strstr(o.e.msg, "token 1 is 203"));
    b->ops->close(b);
}

static void values_that_are_not_finite_fail(void **state)
{
    struct model m = fake_model();

    (void)state;
    m.nan_layer = 5;
    assert_fails(&m, N, "full", LARDER_ENUMERIC);
    assert_fails(&m, N, "snapkv,rows=40", LARDER_ENUMERIC);
    assert_fails(&m, N, "gemfilter,rows=40,layer=5", LARDER_ENUMERIC);
}

static void progress_can_cancel_before_any_layer(void **state)
{
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 1);
    uint32_t ids[N];

    (void)state;
    make_ids(ids, N);
    for (uint32_t at = 1; at <= 13;
         at += 4) { /* five layers of the first pass, eight of the second */
        struct outcome o = {.cancel_at = at};

        prefill_ids(b, ids, N, "gemfilter,rows=40,layer=4", &o);
        assert_int_equal(o.rc, LARDER_ECANCELED);
        assert_int_equal(o.n_progress, at);
        drop(&o);
    }
    b->ops->close(b);
}

static void running_out_of_memory_leaves_nothing_behind(void **state)
{
    const char *policies[] = {ASL ",rows=20,tau=9", "gemfilter,rows=20,layer=2"};
    struct model m = fake_model();
    struct backend *b = open_backend(&m, 1);
    uint32_t ids[40];

    (void)state;
    make_ids(ids, 40);
    for (int p = 0; p < 2; p++) {
        struct outcome o = {.rc = LARDER_ENOMEM};

        for (long n = 0; o.rc; n++) {
            long left = n;

            drop(&o);
            mem_set_hook(test_fail_nth, &left);
            prefill_ids(b, ids, 40, policies[p], &o);
            mem_set_hook(NULL, NULL);
            if (o.rc && o.rc != LARDER_ENOMEM)
                fail_msg("allocation %ld: %s", n, o.e.msg);
        }
        drop(&o);
    }
    b->ops->close(b);
}

/* ---- between backends */

static void backends_agree(void **state)
{
    const char *policies[] = {"full", "snapkv,rows=40,w=8", ASL ",rows=30,select=60,tau=1.01"};
    struct model m = fake_model();

    (void)state;
    for (int p = 0; p < 3; p++) {
        const char *mine = backend_name;
        struct outcome a = run(&m, N, policies[p]), b;

        backend_name = "ref";
        b = run(&m, N, policies[p]);
        backend_name = mine;
        assert_same_positions(&a, &b);
        assert_true(worst(a.r.logits, b.r.logits) < 1e-3f);
        for (int i = 0; i < HEADS; i++)
            for (uint32_t j = 0; j < a.head[i].n_rows * FAKE_HEAD_DIM; j++)
                assert_true(fabsf(a.head[i].k[j] - b.head[i].k[j]) < 1e-3f);
        drop(&a);
        drop(&b);
    }
}

static void ref_has_no_bf16(void **state)
{
    struct model m = fake_model();
    struct backend_opts o = {.dtype = KV_BF16, .n_threads = 1};
    struct backend *b = NULL;

    (void)state;
    assert_int_equal(backend_find("ref")->open(&b, &m, &o, NULL), LARDER_EBACKEND);
    assert_null(b);
    assert_null(backend_find("gpu"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(full_keeps_every_row),
        cmocka_unit_test(budget_bounds_every_head_and_the_window_stays),
        cmocka_unit_test(pruning_what_is_kept_does_not_change_the_prefill),
        cmocka_unit_test(selecting_all_tokens_changes_nothing),
        cmocka_unit_test(tau_zero_never_selects),
        cmocka_unit_test(tau_above_one_selects_at_l_min),
        cmocka_unit_test(tau_one_does_not_select_at_l_min),
        cmocka_unit_test(constant_ranks_select_one_layer_after_l_min),
        cmocka_unit_test(query_heads_of_a_group_may_be_swapped),
        cmocka_unit_test(scaling_v_changes_no_selection),
        cmocka_unit_test(layers_above_the_cut_see_the_selected_tokens_only),
        cmocka_unit_test(fastkv_cuts_where_it_is_told),
        cmocka_unit_test(a_cut_after_the_last_layer_keeps_the_logits),
        cmocka_unit_test(short_documents_are_kept_whole),
        cmocka_unit_test(one_token_beyond_the_window_can_be_ranked),
        cmocka_unit_test(two_pass_policies_renumber),
        cmocka_unit_test(asl2pass_chooses_what_asl_chooses),
        cmocka_unit_test(two_pass_budget_above_the_document_is_a_full_prefill),
        cmocka_unit_test(threads_do_not_change_a_bit),
        cmocka_unit_test(bad_documents_and_budgets_fail),
        cmocka_unit_test(values_that_are_not_finite_fail),
        cmocka_unit_test(progress_can_cancel_before_any_layer),
        cmocka_unit_test(running_out_of_memory_leaves_nothing_behind),
        cmocka_unit_test(backends_agree),
        cmocka_unit_test(ref_has_no_bf16),
    };

    return run_on_every_backend(tests, sizeof tests / sizeof tests[0]);
}
