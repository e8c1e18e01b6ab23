/* test_client_eval.c - `larder eval` without a daemon: tasks, statistics, results, tables, page. */
#include "testlib.h"

#include <math.h>
#include <sys/stat.h>

#include "cli_eval.h"
#include "cli_eval_stat.h"

/* ---- statistics */

static void shares_need_a_whole(void **state)
{
    static const struct stat_pair p[] = {{1, 2}, {0, 1}, {3, 3}};

    (void)state;
    assert_true(fabs(stat_share(p, 3) - 4.0 / 6) < 1e-12);
    assert_true(isnan(stat_share(p, 0)));
    assert_true(isnan(stat_share(&(struct stat_pair){0, 0}, 1)));
}

static void an_interval_is_decided_by_its_seed_and_covers(void **state)
{
    struct stat_pair p[50];
    double low[3], high[3], all;

    (void)state;
    for (int i = 0; i < 50; i++)
        p[i] = (struct stat_pair){i % 7, 7 + i % 3};
    all = stat_share(p, 50);
    for (uint64_t i = 0; i < 3; i++)
        assert_int_equal(stat_bootstrap(p, 50, i / 2, &low[i], &high[i], NULL), 0);
    assert_true(low[0] == low[1] && high[0] == high[1]);
    assert_true(low[0] < all && all < high[0]);
    assert_true(low[2] != low[0] || high[2] != high[0]);
}

/* 40 documents of one question, half of them kept: a normal interval is 50 +- 15.5 %. */
static void an_interval_matches_the_binomial(void **state)
{
    struct stat_pair p[40];
    double low, high;

    (void)state;
    for (int i = 0; i < 40; i++)
        p[i] = (struct stat_pair){i < 20, 1};
    assert_int_equal(stat_bootstrap(p, 40, 1, &low, &high, NULL), 0);
    assert_true(fabs(low - 0.345) <= 0.03 && fabs(high - 0.655) <= 0.03);
    assert_int_equal(stat_bootstrap(p, 20, 1, &low, &high, NULL), 0);
    assert_true(low == 1 && high == 1);
    assert_int_equal(stat_bootstrap(p, 0, 1, &low, &high, NULL), 0);
    assert_true(isnan(low) && isnan(high));
}

static void ranks_are_correlated(void **state)
{
    static const double x[] = {106, 86, 100, 101, 99, 103, 97, 113, 112, 110};
    static const double y[] = {7, 0, 27, 50, 28, 29, 20, 12, 6, 17};
    static const double ties[] = {1, 2, 2, 3}, up[] = {1, 3, 5, 40}, down[] = {9, 2, 1, 0};
    double r;

    (void)state;
    assert_int_equal(stat_spearman(x, y, 10, &r, NULL), 0); /* the textbook's: -29/165 */
    assert_true(fabs(r + 29.0 / 165) < 1e-12);
    assert_int_equal(stat_spearman(up, down, 4, &r, NULL), 0);
    assert_true(r == -1);
    assert_int_equal(stat_spearman(ties, up, 4, &r, NULL), 0);
    assert_true(fabs(r - 4.5 / sqrt(4.5 * 5)) < 1e-12);
    assert_int_equal(stat_spearman(up, down, 2, &r, NULL), 0);
    assert_true(isnan(r));
    assert_int_equal(stat_spearman((const double[]){1, 1, 1}, up, 3, &r, NULL), 0);
    assert_true(isnan(r));
}

static void medians_and_means(void **state)
{
    double x[] = {5, 1, 4, 2};
    struct stat_mean m = {0, 0};

    (void)state;
    assert_true(stat_median(x, 4) == 2 && stat_median(x, 3) == 2 && isnan(stat_median(x, 0)));
    assert_true(isnan(stat_mean(&m)));
    stat_add(&m, NAN);
    stat_add(&m, 1);
    stat_add(&m, 2);
    assert_true(stat_mean(&m) == 1.5);
}

/* ---- tasks */

#define TASK(id, doc)                                                                              \
    "{\"id\":\"" id "\",\"task\":\"t\",\"prefix_ids\":[" doc "],\"tail_ids\":[5,6],"               \
    "\"gold\":\"42\",\"gold_ids\":[4,2]}\n"

static int parse(struct eval_set *s, const char *text, size_t limit, struct larder_err *e)
{
    char *copy = mem_dup(text, strlen(text)); /* without NUL: a reader past the end is caught */
    int rc;

    memset(s, 0, sizeof *s);
    rc = eval_set_parse(s, "f", copy, strlen(text), limit, e);
    mem_free(copy);
    return rc;
}

static void tasks_are_grouped_by_document(void **state)
{
    static const char text[] = TASK("a", "1,2,3") "\n \t\n" TASK("b", "9") TASK("c", "1,2,3");
    struct eval_set s;

    (void)state;
    assert_int_equal(parse(&s, text, 0, NULL), 0);
    assert_int_equal(s.n_docs, 2);
    assert_int_equal(s.n_tasks, 3);
    assert_string_equal(s.task[0].id, "a");
    assert_string_equal(s.task[1].id, "c");
    assert_int_equal(s.task[1].line, 5);
    assert_int_equal(s.doc[0].n_tasks, 2);
    assert_int_equal(s.doc[1].first, 2);
    assert_int_equal(s.doc[0].n_ids, 3);
    assert_int_equal(s.doc[0].ids[2], 3);
    assert_string_equal(s.doc[0].name, "7c8f5059290305ce"); /* public.py's, of "1 2 3" */
    assert_null(eval_set_strings(&s));
    eval_set_done(&s);
    assert_int_equal(parse(&s, text, 1, NULL), 0); /* all questions of the first document */
    assert_int_equal(s.n_docs, 1);
    assert_int_equal(s.n_tasks, 2);
    eval_set_done(&s);
}

static void bad_lines_are_told_with_their_number(void **state)
{
#define REST "\"tail_ids\":[5],\"gold\":\"42\"}"
    static const struct {
        const char *line, *says;
        int code;
    } bad[] = {
        {"{\"id\":", "no JSON object", LARDER_EINVAL},
        {"[1]", "no JSON object", LARDER_EINVAL},
        {"{\"id\":\"x\",\"id\":\"y\"}", "no JSON object", LARDER_EINVAL},
        {"{\"prefix_ids\":[1]," REST, "no \"id\"", LARDER_EINVAL},
        {"{\"id\":7,\"prefix_ids\":[1]," REST, "\"id\"", LARDER_EINVAL},
        {"{\"id\":\"a\",\"prefix_ids\":[1]," REST, "earlier line", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[]," REST, "prefix_ids", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":\"1\"," REST, "prefix_ids", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1,-2]," REST, "entry 1 of", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[4294967296]," REST, "entry 0 of", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1e3]," REST, "entry 0 of", LARDER_EINVAL},
        {"{\"id\":\"x\"," REST, "nor \"document\"", LARDER_EINVAL},
        {"{\"id\":\"x\",\"document\":\"\"," REST, "\"document\"", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1],\"gold\":\"42\"}", "nor \"question\"", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1],\"tail_ids\":[5]}", "gold", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1],\"tail_ids\":[5],\"gold\":[]}", "gold", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1],\"tail_ids\":[5],\"gold\":[3]}", "gold", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1],\"depth\":1.5," REST, "depth", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1],\"length\":\"9\"," REST, "length", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1],\"max_new\":0," REST, "max_new", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1],\"any\":1," REST, "any", LARDER_EINVAL},
        {"{\"id\":\"x\",\"prefix_ids\":[1],\"task\":[]," REST, "task", LARDER_EINVAL},
        {"{\"id\":\"caf\xe9\",\"prefix_ids\":[1]," REST, "no JSON object", LARDER_EINVAL},
    };
    struct larder_err e;
    struct eval_set s;

    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[600];

        snprintf(text, sizeof text, "%s\n%s\n", TASK("a", "1"), bad[i].line);
        assert_int_equal(parse(&s, text, 0, &e), bad[i].code);
        assert_int_equal(strncmp(e.msg, "f, line 3: ", 11), 0);
        assert_non_null(strstr(e.msg, bad[i].says));
        eval_set_done(&s);
    }
    assert_int_equal(parse(&s, "\n\n", 0, &e), LARDER_EEMPTY);
    eval_set_done(&s);
}

static void every_truncation_is_refused_or_whole(void **state)
{
    static const char text[] = TASK("a", "1,2,3") TASK("b", "7");
    size_t first = strchr(text, '\n') - text;
    struct eval_set s;

    (void)state;
    for (size_t n = 0; n < sizeof text - 2; n++) {
        char *cut = mem_dup(text, n);
        int rc;

        memset(&s, 0, sizeof s);
        rc = eval_set_parse(&s, "f", cut, n, 0, NULL);
        assert_int_equal(rc, !n ? LARDER_EEMPTY : n == first || n == first + 1 ? 0 : LARDER_EINVAL);
        eval_set_done(&s);
        mem_free(cut);
    }
}

static void no_memory_is_an_error_wherever_it_strikes(void **state)
{
    static const char text[] =
        TASK("a", "1,2,3") "{\"id\":\"b\",\"document\":\"d\",\"tail_ids\":[1],"
                           "\"gold\":\"x\"}\n";
    struct eval_set s;
    int rc = LARDER_ENOMEM;
    long n = 0;

    (void)state;
    for (; rc == LARDER_ENOMEM; n++) {
        long left = n;

        memset(&s, 0, sizeof s);
        mem_set_hook(test_fail_nth, &left);
        rc = eval_set_parse(&s, "f", text, strlen(text), 0, NULL);
        mem_set_hook(NULL, NULL);
        eval_set_done(&s);
    }
    assert_int_equal(rc, 0);
    assert_true(n > 4);
}

static void texts_are_tokenised_in_order(void **state)
{
    static const char text[] =
        "{\"id\":\"a\",\"document\":\"d\",\"question\":\"q\",\"answer_prefix\":\"p\",\"gold\":"
        "\"x\"}\n"
        "{\"id\":\"b\",\"document\":\"d\",\"tail_ids\":[5],\"gold\":[\"x\",\"y\"]}\n";
    struct eval_set s;
    json_t *ids = json_pack("{s:[i,i]}", "ids", 7, 8);
    char *strings;

    (void)state;
    assert_int_equal(parse(&s, text, 0, NULL), 0);
    strings = eval_set_strings(&s);
    assert_string_equal(strings, "{\"document\":\"d\"}\n{\"question\":\"q\",\"answer\":\"p\"}\n"
                                 "{\"text\":\" x\"}\n");
    free(strings);
    for (int i = 0; i < 3; i++)
        assert_int_equal(eval_set_take(&s, ids, NULL), 0);
    assert_int_equal(eval_set_take(&s, ids, NULL), LARDER_EWORKER);
    assert_int_equal(s.doc[0].n_ids, 2);
    assert_int_equal(json_array_size(json_object_get(s.task[0].o, "tail_ids")), 2);
    assert_int_equal(json_array_size(json_object_get(s.task[0].o, "gold_ids")), 2);
    assert_null(json_object_get(s.task[1].o, "gold_ids"));
    eval_set_done(&s);
    json_decref(ids);
}

static void single_answers_are_strict_and_lists_are_looked_for(void **state)
{
    static const char text[] =
        "{\"id\":\"a\",\"prefix_ids\":[1],\"tail_ids\":[5],\"gold\":\"42\"}\n"
        "{\"id\":\"b\",\"prefix_ids\":[1],\"tail_ids\":[5],\"gold\":[\"Alpha\",\"beta\"]}\n"
        "{\"id\":\"c\",\"prefix_ids\":[1],\"tail_ids\":[5],\"gold\":[\"Alpha\",\"beta\"],"
        "\"any\":true}\n";
    struct eval_set s;

    (void)state;
    assert_int_equal(parse(&s, text, 0, NULL), 0);
    assert_false(eval_is_right(&s.task[0], false, " 42."));
    assert_true(eval_is_right(&s.task[0], true, ""));
    assert_true(eval_found(&s.task[0], "it is 42.") == 1);
    assert_true(eval_found(&s.task[1], "ALPHA only") == 0.5);
    assert_false(eval_is_right(&s.task[1], true, "alpha"));
    assert_true(eval_is_right(&s.task[1], false, "beta, alpha"));
    assert_true(eval_is_right(&s.task[2], false, "beta"));
    eval_set_done(&s);
}

/* ---- results */

static json_t *what(void)
{
    return json_pack("{s:s, s:s, s:s, s:s}", "model", "m", "backend", "cpu", "dtype", "f32", "isa",
                     "x");
}

static json_t *result(const char *id, const char *policy, const char *doc, bool right, int bytes)
{
    json_t *j = what();

    json_object_update_new(
        j, json_pack("{s:s, s:s, s:s, s:s, s:b, s:f, s:f, s:i, s:i, s:i, s:i, s:[i,i]}", "id", id,
                     "policy", policy, "doc", doc, "task", "t", "right", right, "found", 1.0, "kl",
                     right ? 0.1 : 0.5, "rows", bytes, "row_bytes", bytes, "full_bytes", 100,
                     "stored_bytes", bytes / 2, "ranks", 1, right ? 1 : 7));
    if (strcmp(policy, "full"))
        json_object_set_new(j, "cert_kl", json_real(bytes / (double)(10 + strlen(doc))));
    return j;
}

static void a_torn_line_is_passed_over_and_the_next_is_whole(void **state)
{
    char *dir = test_mkdir(), path[300];
    struct eval_results r;
    json_t *w = what();
    FILE *f;

    (void)state;
    snprintf(path, sizeof path, "%s/r", dir);
    assert_int_equal(eval_results_open(&r, path, true, NULL), 0);
    assert_int_equal(eval_results_add(&r, result("a", "full", "d", true, 100), NULL), 0);
    eval_results_done(&r);
    f = fopen(path, "a");
    fputs("{\"id\":\"b\",\"pol", f);
    fclose(f);
    assert_int_equal(eval_results_open(&r, path, true, NULL), 0);
    assert_int_equal(json_object_size(r.by_key), 1);
    assert_int_equal(eval_results_add(&r, result("c", "full", "d", true, 100), NULL), 0);
    assert_int_equal(eval_results_add(&r, result("c", "full", "d", false, 100), NULL), 0);
    eval_results_done(&r);
    assert_int_equal(eval_results_open(&r, path, false, NULL), 0);
    assert_int_equal(json_object_size(r.by_key), 2);
    assert_false(cli_true(eval_results_get(&r, w, "c", "full"), "right")); /* the last one counts */
    assert_true(eval_result_is_stored(eval_results_get(&r, w, "a", "full")));
    assert_null(eval_results_get(&r, w, "a", "other"));
    json_object_set_new(w, "isa", json_string("y"));
    assert_null(eval_results_get(&r, w, "a", "full"));
    assert_false(eval_result_is_stored(NULL));
    eval_results_done(&r);
    json_decref(w);
    test_rmdir(dir);
}

static void a_file_of_something_else_is_no_results_file(void **state)
{
    char *dir = test_mkdir(), path[300];
    struct eval_results r;
    struct larder_err e;
    FILE *f;

    (void)state;
    snprintf(path, sizeof path, "%s/r", dir);
    assert_int_equal(eval_results_open(&r, path, false, &e), LARDER_EIO);
    eval_results_done(&r);
    f = fopen(path, "w");
    fputs(TASK("a", "1"), f);
    fclose(f);
    assert_int_equal(eval_results_open(&r, path, true, &e), LARDER_EINVAL);
    eval_results_done(&r);
    test_rmdir(dir);
}

/* ---- sections */

struct made {
    char *dir, path[300];
    struct eval_results r;
    struct eval_section s;
};

/* Documents d (two questions) and ee, fff (one each); the full cache misses fff's. */
static void make_section(struct made *m)
{
    static const char *const ids[] = {"a", "b", "c", "e"}, *const docs[] = {"d", "d", "ee", "fff"};
    json_t *w = what(), *list = json_pack("[s,s,s,s,s]", "a", "b", "c", "e", "absent");
    json_t *policies = json_pack("[s,s,s,s]", "full", "p,rows=50%", "p,rows=25%", "<q>");

    m->dir = test_mkdir();
    snprintf(m->path, sizeof m->path, "%s/r", m->dir);
    assert_int_equal(eval_results_open(&m->r, m->path, true, NULL), 0);
    for (int i = 0; i < 4; i++) {
        json_t *j[3] = {result(ids[i], "full", docs[i], i != 3, 100),
                        result(ids[i], "p,rows=50%", docs[i], i != 1, 50),
                        result(ids[i], "p,rows=25%", docs[i], i == 2, 25)};

        for (int k = 0; k < 3; k++) {
            json_object_set_new(j[k], "length", json_integer(100 * (i / 2 + 1)));
            json_object_set_new(j[k], "depth", json_real(i % 2));
            assert_int_equal(eval_results_add(&m->r, j[k], NULL), 0);
        }
    }
    assert_int_equal(eval_section_make(&m->s, &m->r, w, list, policies, 1, NULL), 0);
    json_decref(w);
    json_decref(list);
    json_decref(policies);
}

static void section_done(struct made *m)
{
    eval_section_done(&m->s);
    eval_results_done(&m->r);
    test_rmdir(m->dir);
}

static void kept_right_counts_only_what_the_full_cache_answers(void **state)
{
    const struct eval_row *half;
    struct made m;

    (void)state;
    make_section(&m);
    assert_int_equal(m.s.n_rows, 3); /* nothing was measured under <q> */
    half = &m.s.row[1];
    assert_string_equal(half->policy, "p,rows=50%");
    assert_int_equal(half->n, 4);
    assert_int_equal(half->n_docs, 3);
    assert_int_equal(half->n_full_right, 3);
    assert_true(fabs(half->kept - 2.0 / 3) < 1e-12);
    assert_true(half->low <= half->kept && half->kept <= half->high);
    assert_true(fabs(half->kl - 0.7 / 3) < 1e-12); /* of a, b, c */
    assert_true(half->rows == 0.5 && half->bytes == 0.5 && half->disk == 0.25);
    assert_true(half->rank == 1 && m.s.row[2].rank == 7);
    assert_true(m.s.row[0].kept == 1 && isnan(m.s.row[0].certified));
    assert_int_equal(m.s.ranks.n_kl, 4); /* fff has no answer to lose */
    assert_int_equal(m.s.ranks.n_lost, 4);
    section_done(&m);
}

static char *written(const struct made *m, int form)
{
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);

    if (form == OPT_CSV)
        eval_write_csv(f, &m->s, 1);
    else if (form == OPT_MARKDOWN)
        eval_write_markdown(f, &m->s, 1);
    else
        eval_write_html(f, &m->s, 1, &m->r);
    fclose(f);
    return text;
}

static void tables_are_written(void **state)
{
    struct made m;
    char *text;

    (void)state;
    make_section(&m);
    text = written(&m, OPT_CSV);
    assert_int_equal(strncmp(text, "policy,n,documents,full_right,kept_right,low,", 45), 0);
    assert_non_null(strstr(text, "\n\"p,rows=50%\",4,3,3,0.666667,"));
    free(text);
    text = written(&m, OPT_MARKDOWN);
    assert_non_null(strstr(text, "| `p,rows=50%` | 4 | 3 | 67 | "));
    free(text);
    section_done(&m);
}

static unsigned count(const char *text, const char *what_)
{
    unsigned n = 0;

    for (; (text = strstr(text, what_)); text++)
        n++;
    return n;
}

static void a_page_refers_to_nothing_and_draws_what_is_there(void **state)
{
    struct made m;
    char *text;

    (void)state;
    make_section(&m);
    m.s.row[2].policy = "<q>&\"";
    text = written(&m, OPT_HTML);
    assert_int_equal(count(text, "<svg "), 3 + 2); /* charts and legend; maps of two rows */
    assert_int_equal(count(text, "<svg "), count(text, "</svg>"));
    assert_null(strstr(text, "<q>"));
    assert_non_null(strstr(text, "&lt;q&gt;&amp;&quot;"));
    assert_null(strstr(text, "src="));
    assert_null(strstr(text, "href="));
    assert_null(strstr(text, "<script"));
    assert_null(strstr(text, "nan"));
    assert_null(strstr(text, "inf"));
    free(text);
    section_done(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shares_need_a_whole),
        cmocka_unit_test(an_interval_is_decided_by_its_seed_and_covers),
        cmocka_unit_test(an_interval_matches_the_binomial),
        cmocka_unit_test(ranks_are_correlated),
        cmocka_unit_test(medians_and_means),
        cmocka_unit_test(tasks_are_grouped_by_document),
        cmocka_unit_test(bad_lines_are_told_with_their_number),
        cmocka_unit_test(every_truncation_is_refused_or_whole),
        cmocka_unit_test(no_memory_is_an_error_wherever_it_strikes),
        cmocka_unit_test(texts_are_tokenised_in_order),
        cmocka_unit_test(single_answers_are_strict_and_lists_are_looked_for),
        cmocka_unit_test(a_torn_line_is_passed_over_and_the_next_is_whole),
        cmocka_unit_test(a_file_of_something_else_is_no_results_file),
        cmocka_unit_test(kept_right_counts_only_what_the_full_cache_answers),
        cmocka_unit_test(tables_are_written),
        cmocka_unit_test(a_page_refers_to_nothing_and_draws_what_is_there),
    };

    return cmocka_run_group_tests_name("client_eval", tests, NULL, NULL);
}
