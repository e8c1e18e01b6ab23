/* Policy strings: parsing, the canonical spelling, and the checks against model and document. */
#include "testlib.h"

#include "policy.h"

static struct policy parsed(const char *text)
{
    struct policy p;
    struct larder_err e;

    if (policy_parse(text, &p, &e))
        fail_msg("%s: %s", text, e.msg);
    return p;
}

static void assert_prints(const char *text, const char *canonical)
{
    struct policy p = parsed(text);
    char out[POLICY_TEXT_MAX];

    policy_print(&p, out);
    assert_string_equal(out, canonical);
    p = parsed(canonical); /* which means the same */
    policy_print(&p, out);
    assert_string_equal(out, canonical);
}

static void assert_refused(const char *text, const char *why)
{
    struct policy p;
    struct larder_err e = {0, ""};

    assert_int_equal(policy_parse(text, &p, &e), LARDER_EPOLICY);
    if (!strstr(e.msg, why))
        fail_msg("%s: '%s' does not say '%s'", text, e.msg, why);
}

static void defaults_are_written_out(void **state)
{
    (void)state;
    assert_prints("full", "full");
    assert_prints(
        "asl", "asl,rows=2048,select=2048,w=32,pool=auto,poolkind=avg,lmin=auto,lobs=8,tau=auto");
    assert_prints("snapkv", "snapkv,rows=2048,w=32,pool=auto,poolkind=avg");
    assert_prints("fastkv", "fastkv,rows=2048,select=2048,w=32,pool=auto,poolkind=avg,layer=auto");
    assert_prints("gemfilter", "gemfilter,rows=2048,pool=5,layer=auto");
    assert_prints("asl2pass",
                  "asl2pass,rows=2048,w=32,pool=auto,poolkind=avg,lmin=auto,lobs=8,tau=auto");
}

#define TAIL64 "rows=2048,w=64,pool=5,poolkind=avg"
#define REPLAY "chunk=512,replay=100%"

/* Fixed for ever: keys of stored entries contain these strings. */
static void every_name_has_its_spelling(void **state)
{
    (void)state;
    assert_prints("pyramidinfer", "pyramidinfer,sink=4,recent=20%,decay=0.9,context=64,weight=1.2");
    assert_prints("streaming", "streaming,rows=2048,sink=4");
    assert_prints("keydiff", "keydiff,rows=2048,sink=4");
    assert_prints("expected", "expected,rows=2048,sink=4,eps=0");
    assert_prints("tova", "tova,rows=2048");
    assert_prints("knorm", "knorm,rows=2048,sink=4");
    assert_prints("observed", "observed,rows=2048");
    assert_prints("adakv", "adakv," TAIL64 ",obs=tail,guard=20%");
    assert_prints("pyramidkv", "pyramidkv," TAIL64);
    assert_prints("criticalkv", "criticalkv," TAIL64 ",obs=tail,shape=uniform");
    assert_prints("defensive", "defensive,rows=2048,w=32,pool=5,shape=layer,guard=20%");
    assert_prints("duo", "duo,rows=50%,w=32,sink=4");
    assert_prints("kvzip", "kvzip,rows=50%,shape=global,sink=4,chunk=2048,replay=100%");
    assert_prints("kvzip+", "kvzip+,rows=50%,shape=global,sink=4,chunk=2048,replay=100%");
    assert_prints("matching",
                  "matching,rows=25%,shape=shares,sink=4," REPLAY ",fit=matching,precision=bf16");
    assert_prints("offline", "offline,rows=auto,obs=replay,shape=shares,cut=off,sink=4," REPLAY
                             ",max_kl=0.006,fit=matching,precision=int4");
}

/* Moving an axis brings the keys of its new place and drops those of the old one. */
static void keys_follow_the_axes(void **state)
{
    (void)state;
    assert_prints("snapkv,shape=layer,rows=64",
                  "snapkv,rows=64,w=32,pool=auto,poolkind=avg,shape=layer,guard=20%");
    assert_prints(
        "snapkv,cut=adaptive,sink=4,rows=25%",
        "snapkv,rows=25%,select=25%,w=32,pool=auto,poolkind=avg,lmin=auto,lobs=8,tau=auto,"
        "cut=adaptive,sink=4");
    assert_prints("asl,obs=keys,precision=int8,rows=9",
                  "asl,rows=9,select=9,lmin=auto,lobs=8,tau=auto,obs=keys,sink=4,precision=int8");
    assert_prints("adakv,obs=expected", "adakv,rows=2048,obs=expected,sink=4,guard=20%,eps=0.01");
    assert_prints("criticalkv,obs=expected,shape=layer",
                  "criticalkv,rows=2048,obs=expected,shape=layer,sink=4,guard=20%");
    assert_prints("asl,obs=keys,sink=0,rows=9,lmin=9,tau=0.3",
                  "asl,rows=9,select=9,lmin=9,lobs=8,tau=0.3,obs=keys,sink=0");
    assert_prints("kvzip,shape=layer,chunk=256,replay=50%",
                  "kvzip,rows=50%,shape=layer,sink=4,guard=0%,chunk=256,replay=50%");
    assert_prints("offline,obs=keys,shape=uniform",
                  "offline,rows=25%,obs=keys,shape=uniform,cut=off,sink=4,fit=none,precision=int4");
    assert_prints("matching,rows=auto,max_kl=0.050,fit=values",
                  "matching,rows=auto,shape=shares,sink=4," REPLAY
                  ",max_kl=0.05,fit=values,precision=bf16");
    assert_prints("full,precision=int8", "full,precision=int8");
    assert_prints("full,precision=bf16", "full");
    assert_prints("tova,sink=0,cut=off,shape=uniform", "tova,rows=2048");
}

static void combinations_without_meaning_are_refused(void **state)
{
    (void)state;
    assert_refused("offline,cut=fixed", "a replay must see every row");
    assert_refused("snapkv,obs=none", "that is policy full");
    assert_refused("streaming,cut=adaptive", "never change");
    assert_refused("snapkv,cut=adaptive2,shape=layer", "keeps all of its rows");
    assert_refused("criticalkv,cut=fixed2", "keeps all of its rows");
    assert_refused("snapkv,cut=decay", "pyramidinfer's own");
    assert_refused("snapkv,shape=heads", "duo's own");
    assert_refused("snapkv,obs=dot,shape=layer", "no common scale");
    assert_refused("criticalkv,obs=keys", "takes an attention");
    assert_refused("snapkv,rows=auto,cut=fixed", "goes by the certificate");
    assert_refused("pyramidkv,rows=auto", "goes by the certificate");
    assert_refused("asl,rows=auto", "goes by the certificate");
    assert_refused("matching,max_kl=0.1", "goes with rows=auto");
    assert_refused("keydiff,fit=matching", "keydiff does not take 'fit'");
    assert_refused("keydiff,obs=tail", "keydiff does not take 'obs'");
    assert_refused("adakv,shape=global", "adakv does not take 'shape'");
    assert_refused("snapkv,obs=keys,w=8", "snapkv does not take 'w'");
    assert_refused("snapkv,obs=query", "none, tail, probe");
    assert_refused("full,precision=f16", "bf16, int8 or int4");
    assert_refused("kvzip,replay=30%", "100%, 50% or 25%");
    assert_refused("kvzip,chunk=8", "chunk takes");
    assert_refused("adakv,guard=20", "a share");
    assert_refused("snapkv,sink=5000", "sink takes");
    assert_refused("fastkv,select=auto", "select takes");
}

static void spelling_is_one_per_meaning(void **state)
{
    const char *canonical =
        "asl,rows=256,select=256,w=32,pool=auto,poolkind=avg,lmin=14,lobs=8,tau=0.3";

    (void)state;
    assert_prints("asl,rows=256,lmin=14,tau=0.3", canonical);
    assert_prints("asl,tau=0.300,lmin=014,rows=0256", canonical);
    assert_prints("asl,tau=.3,select=256,lmin=14,rows=256", canonical);
    assert_prints(canonical, canonical);
    assert_prints("snapkv,rows=25.0%,poolkind=max", "snapkv,rows=25%,w=32,pool=auto,poolkind=max");
    assert_prints("snapkv,rows=100%", "snapkv,rows=all,w=32,pool=auto,poolkind=avg");
    assert_prints("asl,tau=0",
                  "asl,rows=2048,select=2048,w=32,pool=auto,poolkind=avg,lmin=auto,lobs=8,tau=0");
    assert_prints("asl,tau=1.5",
                  "asl,rows=2048,select=2048,w=32,pool=auto,poolkind=avg,lmin=auto,lobs=8,tau=1.5");
}

static void select_follows_rows_unless_given(void **state)
{
    struct policy p = parsed("asl,rows=all,select=512");

    (void)state;
    assert_int_equal(p.rows.kind, ROWS_ALL);
    assert_int_equal(p.select.kind, ROWS_COUNT);
    p = parsed("asl,rows=12.5%");
    assert_int_equal(p.select.kind, ROWS_SHARE);
    assert_true(p.select.value == 12.5);
}

static void what_is_wrong_is_named(void **state)
{
    (void)state;
    assert_refused("", "there are full");
    assert_refused("aslx", "'aslx'");
    assert_refused("asl,", "key=value");
    assert_refused("asl,rows", "key=value");
    assert_refused("asl,row=3", "'row'; it takes rows, select, w");
    assert_refused("full,rows=3", "full does not take 'rows'; it takes precision");
    assert_refused("snapkv,tau=0.3", "snapkv does not take 'tau'");
    assert_refused("gemfilter,w=32", "gemfilter does not take 'w'");
    assert_refused("asl,w=32,w=32", "w is given twice");
    assert_refused("asl,pool=4", "an odd number");
    assert_refused("asl,pool=0", "an odd number");
    assert_refused("asl,pool=", "an odd number");
    assert_refused("asl,w=0", "w=0");
    assert_refused("asl,w=99999999999999999999", "w takes");
    assert_refused("asl,rows=0", "rows takes");
    assert_refused("asl,rows=-1", "rows takes");
    assert_refused("asl,rows=0%", "rows takes");
    assert_refused("asl,rows=101%", "rows takes");
    assert_refused("asl,rows=%", "rows takes");
    assert_refused("asl,rows=5000000", "rows takes");
    assert_refused("asl,poolkind=mean", "avg or max");
    assert_refused("asl,lmin=-3", "lmin takes");
    assert_refused("asl,lmin=10000", "lmin takes");
    assert_refused("asl,lobs=1", "lobs takes");
    assert_refused("asl,tau=-0.3", "tau takes");
    assert_refused("asl,tau=nan", "tau takes");
    assert_refused("asl,tau=1e-3", "tau takes");
    assert_refused("asl,tau=inf", "tau takes");
    assert_refused("asl,tau=0.1234567890123456789", "tau takes");
    assert_refused("fastkv,layer=last", "layer takes");
    assert_refused("asl rows=3", "no policy is named");
}

static void overlong_text_is_refused(void **state)
{
    char text[POLICY_TEXT_MAX + 1];

    (void)state;
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    assert_refused(text, "longer than");
}

static void longest_canonical_spelling_fits(void **state)
{
    char out[POLICY_TEXT_MAX];
    struct policy p = parsed("asl,rows=33.333333333333336%,select=66.66666666666667%,w=4096,"
                             "pool=1023,poolkind=max,lmin=512,lobs=512,tau=0.1234567890123456");

    (void)state;
    policy_print(&p, out);
    assert_prints(out, out);
    assert_non_null(strstr(out, "rows=33.333333333333336%,select=66.66666666666667%"));
}

static void auto_layers_depend_on_the_model(void **state)
{
    struct policy p = parsed("asl");

    (void)state;
    assert_int_equal(policy_resolve(&p, 30, NULL, NULL), 0);
    assert_int_equal(p.l_min, 10);
    p = parsed("fastkv");
    assert_int_equal(policy_resolve(&p, 30, NULL, NULL), 0);
    assert_int_equal(p.layer, 14);
    p = parsed("gemfilter");
    assert_int_equal(policy_resolve(&p, 30, NULL, NULL), 0);
    assert_int_equal(p.layer, 12);
    p = parsed("fastkv");
    assert_int_equal(policy_resolve(&p, 32, NULL, NULL), 0);
    assert_int_equal(p.layer, 15);
    p = parsed("snapkv");
    assert_int_equal(policy_resolve(&p, 1, NULL, NULL), 0);
}

/* Keys of entries that were made before a model was calibrated contain `auto` without a profile:
 * these numbers never change. */
static void without_a_profile_auto_is_the_authors_numbers(void **state)
{
    struct policy p = parsed("asl");

    (void)state;
    assert_int_equal(policy_resolve(&p, 32, NULL, NULL), 0);
    assert_int_equal(p.pool_kernel, 7);
    assert_int_equal(p.l_min, 10);
    assert_true(p.tau == 0.3);
    p = parsed("adakv,pool=auto");
    assert_int_equal(policy_resolve(&p, 32, NULL, NULL), 0);
    assert_int_equal(p.pool_kernel, 5);
}

static void auto_is_what_was_measured(void **state)
{
    const struct profile_window all = {21, 14, 450}, pool = {13, 0, 0};
    struct policy p = parsed("asl,shape=layer");

    (void)state;
    assert_true(policy_depends_on(&p, &all));
    assert_int_equal(policy_resolve(&p, 30, &all, NULL), 0);
    assert_int_equal(p.pool_kernel, 21);
    assert_int_equal(p.l_min, 14);
    assert_true(p.tau == 0.45);
    p = parsed("asl2pass");
    assert_int_equal(policy_resolve(&p, 30, &pool, NULL), 0);
    assert_int_equal(p.pool_kernel, 13);
    assert_int_equal(p.l_min, 10);
    assert_true(p.tau == 0.3);
}

static void what_is_written_out_is_not_measured(void **state)
{
    const struct profile_window all = {21, 14, 450}, pool = {21, 0, 0};
    struct policy p = parsed("asl,pool=7,lmin=10,tau=0.3");

    (void)state;
    assert_false(policy_uses_profile(&p));
    assert_false(policy_depends_on(&p, &all));
    assert_int_equal(policy_resolve(&p, 30, &all, NULL), 0);
    assert_int_equal(p.pool_kernel, 7);
    assert_int_equal(p.l_min, 10);
    assert_true(p.tau == 0.3);
    p = parsed("asl,pool=7"); /* depends on what the profile does not say */
    assert_true(policy_uses_profile(&p));
    assert_false(policy_depends_on(&p, &pool));
    p = parsed("snapkv");
    assert_true(policy_depends_on(&p, &pool));
    assert_false(policy_needs_profile(&p));
    p = parsed("snapkv,obs=keys"); /* pools nothing */
    assert_false(policy_uses_profile(&p));
    p = parsed("adakv");
    assert_false(policy_uses_profile(&p));
    assert_refused("asl,pool=7,lmin=10,tau=0.3,profile=0123456789ab", "written out");
}

static void layers_must_exist(void **state)
{
    struct policy p = parsed("asl,lmin=30");

    (void)state;
    assert_int_equal(policy_resolve(&p, 30, NULL, NULL), LARDER_EPOLICY);
    p = parsed("fastkv,layer=30");
    assert_int_equal(policy_resolve(&p, 30, NULL, NULL), LARDER_EPOLICY);
    p = parsed("fastkv,layer=29");
    assert_int_equal(policy_resolve(&p, 30, NULL, NULL), 0);
    p = parsed("asl,lmin=6"); /* eight layers up to the seventh do not exist */
    assert_int_equal(policy_resolve(&p, 30, NULL, NULL), LARDER_EPOLICY);
    p = parsed("asl,lmin=7");
    assert_int_equal(policy_resolve(&p, 30, NULL, NULL), 0);
}

static uint32_t rows_of(const char *text, uint32_t n)
{
    struct policy p = parsed(text);
    uint32_t rows = 0;

    assert_int_equal(policy_rows(&p, &p.rows, n, &rows, NULL), 0);
    return rows;
}

static void budgets_become_rows(void **state)
{
    (void)state;
    assert_int_equal(rows_of("snapkv,rows=100", 700), 100);
    assert_int_equal(rows_of("snapkv,rows=100", 70), 70);
    assert_int_equal(rows_of("snapkv,rows=all", 700), 700);
    assert_int_equal(rows_of("snapkv,rows=25%", 700), 175);
    assert_int_equal(rows_of("keydiff,rows=50%", 700), 350); /* kvpress, removing 0.5 */
    assert_int_equal(rows_of("keydiff,rows=25%", 700), 175);
    assert_int_equal(rows_of("keydiff,rows=12.5%", 700), 87);
    assert_int_equal(rows_of("keydiff,rows=12.5%", 2000), 250);
    assert_int_equal(rows_of("snapkv,rows=29%", 200), 58);
    assert_int_equal(rows_of("snapkv,rows=33%", 201), 66);
    assert_int_equal(rows_of("snapkv,rows=10", 10), 10); /* nothing to drop */
    assert_int_equal(rows_of("gemfilter,rows=1", 700), 1);
    assert_int_equal(rows_of("full", 700), 700);
}

static void budget_must_hold_more_than_the_window(void **state)
{
    struct policy p = parsed("snapkv,rows=32");
    struct larder_err e;
    uint32_t rows = 77;

    (void)state;
    assert_int_equal(policy_rows(&p, &p.rows, 700, &rows, &e), LARDER_EBUDGET);
    assert_non_null(strstr(e.msg, "32 of 700 rows"));
    assert_int_equal(rows, 77);
    assert_int_equal(policy_rows(&p, &p.rows, 33, &rows, &e), LARDER_EBUDGET);
    assert_int_equal(policy_rows(&p, &p.rows, 32, &rows, &e), 0);
    p = parsed("keydiff,rows=4"); /* more than the first four, which always stay */
    assert_int_equal(policy_rows(&p, &p.rows, 700, &rows, &e), LARDER_EBUDGET);
    assert_non_null(strstr(e.msg, "the first 4 and the last 0"));
    p = parsed("snapkv,rows=1%");
    assert_int_equal(policy_rows(&p, &p.rows, 700, &rows, &e), LARDER_EBUDGET);
    p = parsed("gemfilter,rows=1%");
    assert_int_equal(policy_rows(&p, &p.rows, 70, &rows, &e), LARDER_EBUDGET);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_are_written_out),
        cmocka_unit_test(every_name_has_its_spelling),
        cmocka_unit_test(keys_follow_the_axes),
        cmocka_unit_test(combinations_without_meaning_are_refused),
        cmocka_unit_test(spelling_is_one_per_meaning),
        cmocka_unit_test(select_follows_rows_unless_given),
        cmocka_unit_test(what_is_wrong_is_named),
        cmocka_unit_test(overlong_text_is_refused),
        cmocka_unit_test(longest_canonical_spelling_fits),
        cmocka_unit_test(auto_layers_depend_on_the_model),
        cmocka_unit_test(without_a_profile_auto_is_the_authors_numbers),
        cmocka_unit_test(auto_is_what_was_measured),
        cmocka_unit_test(what_is_written_out_is_not_measured),
        cmocka_unit_test(layers_must_exist),
        cmocka_unit_test(budgets_become_rows),
        cmocka_unit_test(budget_must_hold_more_than_the_window),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
