/* cli_eval_run.c - the measuring of `larder eval`: documents, policies, questions.
 *
 * The one idea: a document is stored once per policy (cli_eval_entry.c), and one run of the
 * engine asks all questions of every image, the full cache first, which the others are
 * compared with. Only what the results do not have is measured. */
#include "cli_eval_run.h"

#include <stdlib.h>
#include <string.h>

#include "mem.h"

static const char *canonical(const struct eval_run *r, size_t policy)
{
    return json_string_value(json_array_get(r->policy, policy));
}

/* ---- telling */

static void tell_failed(struct eval_run *r, const char *policy, int rc, struct larder_err *why)
{
    const struct eval_task *t = &r->set.task[r->doc->first];

    r->n_failed++;
    if (rc == CLI_REPORTED) /* the engine has said what it was; say where */
        larder_fail(why, LARDER_EWORKER, "the questions could not be asked");
    larder_fail_in(why, why->code, "the document of line %u%s%s", t->line,
                   policy ? ", policy " : "", policy ? policy : "");
    cli_print_error(NULL, why);
}

/* ---- the engine before anything is measured */

/* A policy that is given twice, or spelled in two ways, is measured once. */
static void drop_repeated(struct eval_run *r)
{
    for (size_t i = 1, j; i < r->n_policies;) {
        for (j = 0; j < i && strcmp(canonical(r, i), canonical(r, j));)
            j++;
        if (j == i) {
            i++;
            continue;
        }
        json_array_remove(r->policy, i);
        r->n_policies--;
        memmove(&r->asked[i], &r->asked[i + 1], (r->n_policies - i) * sizeof *r->asked);
    }
}

static int take_info(void *arg, json_t *j, struct larder_err *e)
{
    struct eval_run *r = arg;
    json_t *policies = json_object_get(j, "policies");

    if (r->what)
        return larder_fail(e, LARDER_EWORKER, "larder-prefill info answered twice");
    r->what =
        json_pack("{s:s, s:s, s:s, s:s}", "model", cli_str(j, "fingerprint"), "backend",
                  cli_str(j, "backend"), "dtype", cli_str(j, "dtype"), "isa", cli_str(j, "isa"));
    for (size_t i = 0; i < r->n_policies; i++)
        if (!json_is_string(json_array_get(policies, i)))
            policies = NULL;
    if (!r->what || !policies)
        return larder_fail(e, LARDER_EWORKER, "larder-prefill info did not name the policies");
    r->policy = json_incref(policies);
    drop_repeated(r);
    return 0;
}

static int identify(struct eval_run *r, struct larder_err *e)
{
    struct engine en;
    int rc;

    engine_start(&en, "info");
    engine_option(&en, "--model", r->model.path);
    for (size_t i = 0; i < r->n_policies; i++)
        engine_option(&en, "--policy", r->asked[i]);
    engine_options(&en, r->c, &r->model);
    engine_option(&en, "--json", "");
    rc = engine_profile(&en, r->c, &r->model, e);
    if (!rc)
        rc = engine_lines(&en, r->stop_fd, take_info, r, e);
    engine_done(&en);
    if (!rc && !r->policy)
        rc = larder_fail(e, LARDER_EWORKER, "larder-prefill info did not answer");
    return rc;
}

static int take_tokens(void *arg, json_t *j, struct larder_err *e)
{
    return eval_set_take(&((struct eval_run *)arg)->set, j, e);
}

static int tokenise(struct eval_run *r, struct larder_err *e)
{
    char *strings = eval_set_strings(&r->set);
    struct engine en;
    int rc;

    if (!strings)
        return 0;
    engine_start(&en, "tokenize");
    engine_option(&en, "--model", r->model.path);
    engine_option(&en, "--template", r->model.tmpl);
    engine_option(&en, "--json", "");
    rc = engine_file(&en, "--strings", strings, strlen(strings), e);
    free(strings);
    if (!rc)
        rc = engine_lines(&en, r->stop_fd, take_tokens, r, e);
    engine_done(&en);
    if (!rc && r->set.n_got < r->set.n_wants)
        rc = larder_fail(e, LARDER_EWORKER, "the tokeniser answered less than it was asked");
    return rc;
}

/* The policies of the command line, else the model's, behind the full cache. */
static int choose_policies(struct eval_run *r, struct larder_err *e)
{
    r->asked[r->n_policies++] = EVAL_FULL;
    for (int i = 0; i < r->c->n_policies; i++)
        if (strcmp(r->c->policy[i], EVAL_FULL))
            r->asked[r->n_policies++] = r->c->policy[i];
    if (!r->c->n_policies && r->model.policy)
        r->asked[r->n_policies++] = r->model.policy;
    return r->model.name
               ? 0
               : larder_fail(e, LARDER_EUNKNOWNMODEL,
                             "eval measures through larderd: name a configured model, not a file");
}

/* ---- questions */

static uint64_t answer_room(const struct eval_run *r)
{
    uint64_t most = 0;

    for (size_t i = 0; i < r->doc->n_tasks && !r->o->max_new; i++) {
        const json_t *o = r->set.task[r->doc->first + i].o;
        uint64_t n = cli_num(o, "max_new");

        if (!n)
            n = json_array_size(json_object_get(o, "gold_ids")) + EVAL_SPARE;
        most = n > most ? n : most;
    }
    return r->o->max_new ? r->o->max_new : most;
}

/* The engine's questions file; the caller's to free(). */
static char *questions(const struct eval_run *r)
{
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);

    for (size_t i = 0; f && i < r->doc->n_tasks; i++) {
        const struct eval_task *t = &r->set.task[r->doc->first + i];
        json_t *gold = json_object_get(t->o, "gold_ids");
        json_t *q =
            json_pack("{s:s, s:O}", "id", t->id, "question_ids", json_object_get(t->o, "tail_ids"));

        json_object_set_new(q, "gold_ids", gold ? json_incref(gold) : json_array());
        json_dumpf(q, f, JSON_COMPACT);
        fputc('\n', f);
        json_decref(q);
    }
    if (f)
        fclose(f);
    return text;
}

static const struct eval_task *find_task(const struct eval_run *r, const char *id)
{
    for (size_t i = 0; i < r->doc->n_tasks; i++)
        if (!strcmp(r->set.task[r->doc->first + i].id, id))
            return &r->set.task[r->doc->first + i];
    return NULL;
}

static json_t *ranks_of(const json_t *scored)
{
    json_t *ranks = json_array();
    const json_t *g;
    size_t i;

    json_array_foreach (json_object_get(scored, "gold"), i, g)
        json_array_append(ranks, json_object_get(g, "rank"));
    return ranks;
}

static void copy_fields(json_t *to, const json_t *from, const char *const *keys, size_t n,
                        bool nulls)
{
    for (size_t i = 0; i < n; i++) {
        json_t *v = json_object_get(from, keys[i]);

        if (v || nulls)
            json_object_set_new(to, keys[i], v ? json_incref(v) : json_null());
    }
}

static json_t *make_result(const struct eval_run *r, const struct eval_task *t,
                           const struct eval_entry *en, const json_t *scored)
{
    static const char *const of_score[] = {"n_ctx", "rows", "row_bytes",  "full_bytes", "all_top1",
                                           "nll",   "kl",   "top1_agree", "text"};
    static const char *const of_entry[] = {"policy", "stored_bytes", "prefill_ms", "certificate"};
    static const char *const of_task[] = {"task", "length", "depth"};
    const char *text = cli_str(scored, "text");
    json_t *j = json_copy(r->what);

    json_object_set_new(j, "id", json_string(t->id));
    json_object_set_new(j, "doc", json_string(r->doc->name));
    json_object_set_new(j, "entry", json_string(en->key));
    copy_fields(j, en->shown, of_entry, sizeof of_entry / sizeof *of_entry, true);
    copy_fields(j, scored, of_score, sizeof of_score / sizeof *of_score, true);
    copy_fields(j, t->o, of_task, sizeof of_task / sizeof *of_task, false);
    if (!json_object_get(j, "task"))
        json_object_set_new(j, "task", json_string("task"));
    json_object_set(j, "cert_kl", json_object_get(json_object_get(j, "certificate"), "kl"));
    json_object_set_new(j, "fetch_ms", json_real(en->fetch_ms));
    json_object_set_new(j, "ranks", ranks_of(scored));
    json_object_set_new(j, "found", json_real(eval_found(t, text)));
    json_object_set_new(j, "right",
                        json_boolean(eval_is_right(t, cli_true(scored, "all_top1"), text)));
    return j;
}

static bool is_there(const struct eval_run *r, const struct eval_task *t, size_t policy)
{
    return eval_result_is_stored(
        eval_results_get(r->results, r->what, t->id, canonical(r, policy)));
}

static int take_score(void *arg, json_t *scored, struct larder_err *e)
{
    struct eval_run *r = arg;
    uint64_t image = cli_num(scored, "image");
    const struct eval_task *t = find_task(r, cli_str(scored, "id"));

    if (!t || image >= r->n_entries)
        return larder_fail(e, LARDER_EWORKER, "the engine answered what was not asked");
    if (is_there(r, t, r->entry[image].policy)) /* the reference is asked with every new policy */
        return 0;
    return eval_results_add(r->results, make_result(r, t, &r->entry[image], scored), e);
}

static int add_images(struct engine *en, const struct eval_run *r, struct larder_err *e)
{
    char number[16];
    int fd = -1, rc = 0;

    for (size_t i = 0; !rc && i < r->n_entries; i++) {
        rc = engine_inherit(en, r->entry[i].lease.fd, &fd, e);
        snprintf(number, sizeof number, "%d", fd);
        if (!rc)
            engine_option(en, "--image-fd", number);
    }
    return rc;
}

static int ask_all(struct eval_run *r, struct larder_err *e)
{
    char *text = questions(r), *n = cli_text("%llu", (unsigned long long)answer_room(r));
    struct engine en;
    int rc;

    eval_show_step(r, r->n_policies, "questions");
    engine_start(&en, "ask");
    engine_option(&en, "--model", r->model.path);
    engine_option(&en, "--template", r->model.tmpl);
    engine_option(&en, "--max-new", n);
    engine_options(&en, r->c, &r->model);
    rc = add_images(&en, r, e);
    if (!rc)
        rc = text ? engine_file(&en, "--questions", text, strlen(text), e)
                  : larder_fail(e, LARDER_ENOMEM, "no memory for the questions");
    if (!rc)
        rc = engine_lines(&en, r->stop_fd, take_score, r, e);
    engine_done(&en);
    mem_free(n);
    free(text);
    return rc;
}

/* ---- documents */

static bool is_missing(const struct eval_run *r, size_t policy)
{
    for (size_t i = 0; i < r->doc->n_tasks; i++)
        if (!is_there(r, &r->set.task[r->doc->first + i], policy))
            return true;
    return false;
}

static int measure_document(struct eval_run *r, struct larder_err *e)
{
    bool todo[CLI_MAX_POLICIES + 1], any = false;
    int rc;

    for (size_t i = 0; i < r->n_policies; i++)
        any |= todo[i] = is_missing(r, i);
    if (!any)
        return 0;
    rc = eval_add_entry(r, 0, e);
    for (size_t i = 1; !rc && i < r->n_policies; i++) {
        rc = todo[i] ? eval_add_entry(r, i, e) : 0;
        if (rc && !eval_is_fatal(rc)) { /* the others may do */
            tell_failed(r, r->asked[i], rc, e);
            rc = 0;
        }
    }
    if (!rc && (todo[0] || r->n_entries > 1))
        rc = ask_all(r, e);
    if (rc && !eval_is_fatal(rc) && rc != LARDER_EIO) {
        tell_failed(r, NULL, rc, e);
        rc = 0;
    }
    eval_drop_entries(r);
    return rc;
}

static int measure_all(struct eval_run *r, struct larder_err *e)
{
    int rc = 0;

    for (r->doc_at = 0; !rc && r->doc_at < r->set.n_docs; r->doc_at++) {
        r->doc = &r->set.doc[r->doc_at];
        eval_show_step(r, 0, "looking");
        rc = eval_check_stopped(r, e);
        if (!rc)
            rc = measure_document(r, e);
    }
    cli_progress_end();
    if (rc == LARDER_ECANCELED)
        larder_fail(e, rc, "interrupted; what is measured is in %s: run it again to go on",
                    r->results->path);
    return rc;
}

static int fill_outcome(const struct eval_run *r, struct eval_outcome *ret, struct larder_err *e)
{
    *ret = (struct eval_outcome){json_incref(r->what), json_array(), json_incref(r->policy),
                                 r->n_failed};
    if (!ret->ids)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the table");
    for (size_t i = 0; i < r->set.n_tasks; i++)
        json_array_append_new(ret->ids, json_string(r->set.task[i].id));
    return 0;
}

static void run_done(struct eval_run *r)
{
    eval_set_done(&r->set);
    engine_model_done(&r->model);
    json_decref(r->what);
    json_decref(r->policy);
    eval_release_signals(r);
    mem_free(r);
}

int eval_measure(struct cli *c, const struct eval_options *o, struct eval_results *results,
                 struct eval_outcome *ret, struct larder_err *e)
{
    struct eval_run *r = mem_zalloc(1, sizeof *r); /* leases are large */
    int rc;

    if (!r)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    r->c = c;
    r->o = o;
    r->results = results;
    rc = eval_catch_signals(r, e);
    if (!rc)
        rc = eval_set_read(&r->set, o->tasks, o->limit, e);
    if (!rc)
        rc = engine_model_find(c, o->model, &r->model, e);
    if (!rc)
        rc = choose_policies(r, e);
    if (!rc)
        rc = identify(r, e);
    if (!rc)
        rc = tokenise(r, e);
    if (!rc)
        rc = measure_all(r, e);
    if (!rc)
        rc = fill_outcome(r, ret, e);
    run_done(r);
    return rc;
}
