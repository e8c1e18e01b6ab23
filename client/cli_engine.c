/* cli_engine.c - `larder ask` and `larder trace`: run larder-prefill as a program.
 *
 * The one idea: the image is fetched here, a sealed file, and the engine inherits its descriptor;
 * the lease stays open meanwhile. What the engine prints goes straight through, except that
 * --json adds fetch_ms.
 */
#include "cli_run.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

#include "mem.h"

/* --file: the engine reads files only, so standard input becomes one. */
static int add_document(struct engine *en, const char *file, struct larder_err *e)
{
    char *text = NULL;
    size_t len = 0;
    int rc;

    if (!file || strcmp(file, "-")) {
        engine_option(en, "--file", file);
        return 0;
    }
    rc = cli_read_file(file, &text, &len, e);
    if (rc)
        return rc;
    rc = engine_file(en, "--file", text, len, e);
    mem_free(text);
    return rc;
}

/* ---- ask */

struct ask {
    const char *ref;      /* a stored entry, or NULL: the document is on the command line */
    const char *question; /* or NULL: --tokens */
    struct engine_model model;
    double fetch_ms; /* < 0: nothing was fetched */
    struct larder_lease lease;
};

static int check_ask(const struct cli *c, struct ask *a, struct larder_err *e)
{
    bool file = c->opt[OPT_FILE] || c->opt[OPT_DOC_TOKENS];
    int n_named = file ? 0 : 1;

    if (c->opt[OPT_FILE] && c->opt[OPT_DOC_TOKENS])
        return cli_usage(e, "--file and --doc-tokens exclude each other");
    if (c->n_args < n_named)
        return cli_usage(e, "ask needs the NAME of a stored entry, --file or --doc-tokens");
    if (!file && c->opt[OPT_POLICY])
        return cli_usage(e, "--policy goes with --file: a stored entry has its policy");
    if (c->n_args > n_named + 1)
        return cli_usage(e, "unexpected argument '%.64s'; put the question in quotes",
                         c->arg[n_named + 1]);
    a->ref = file ? NULL : c->arg[0];
    a->question = c->n_args > n_named ? c->arg[n_named] : NULL;
    if ((a->question != NULL) == (c->opt[OPT_QUESTION_TOKENS] != NULL))
        return cli_usage(e, "ask needs a QUESTION or --tokens, and not both");
    return 0;
}

/* What the entry was made with: its model, unless --model names a file, and its template. */
static int describe_entry(struct cli *c, struct ask *a, struct larder_err *e)
{
    json_t *body = NULL, *answer = NULL;
    const json_t *en;
    int rc = larder_ref_body(a->ref, &body, e);

    if (!rc)
        rc = cli_ask_daemon(c, FRAME_SHOW, body, CLI_WORK_MS, &answer, e);
    if (rc)
        return cli_hint_namespace(rc, a->ref, e);
    en = json_object_get(answer, "entry");
    rc = engine_model_find(c, c->opt[OPT_MODEL] ? c->opt[OPT_MODEL] : cli_str(en, "model"),
                           &a->model, e);
    if (!rc && !c->opt[OPT_TEMPLATE]) {
        mem_free(a->model.tmpl);
        a->model.tmpl = cli_text("%s", cli_str(en, "template"));
    }
    json_decref(answer);
    return rc;
}

static int fetch_entry(struct cli *c, struct ask *a, struct larder_err *e)
{
    static const struct larder_fetch_options as_stored = {.packed = 1}; /* the engine reads both */
    struct timespec t0;
    int rc = describe_entry(c, a, e);

    if (rc)
        return rc;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    rc = larder_fetch_with(c->conn, a->ref, &as_stored, CLI_WORK_MS, &a->lease, e);
    a->fetch_ms = cli_ms_since(&t0);
    return rc;
}

static int add_image(struct engine *en, const struct ask *a, struct larder_err *e)
{
    char number[16];
    int fd = -1, rc = a->ref ? engine_inherit(en, a->lease.fd, &fd, e) : 0;

    if (rc)
        return rc;
    snprintf(number, sizeof number, "%d", fd);
    engine_option(en, "--image-fd", a->ref ? number : NULL);
    return 0;
}

static int ask_arguments(struct engine *en, struct cli *c, const struct ask *a,
                         struct larder_err *e)
{
    int rc;

    engine_start(en, "ask");
    engine_option(en, "--model", a->model.path);
    rc = add_image(en, a, e);
    if (!rc && c->opt[OPT_POLICY])
        rc = engine_profile(en, c, &a->model, e);
    if (!rc)
        rc = add_document(en, c->opt[OPT_FILE], e);
    if (rc)
        return rc;
    engine_option(en, "--doc-tokens", c->opt[OPT_DOC_TOKENS]);
    engine_option(en, "--policy", c->opt[OPT_POLICY]);
    engine_option(en, "--template", a->model.tmpl);
    engine_option(en, "--tokens", c->opt[OPT_QUESTION_TOKENS]);
    engine_option(en, "--max-new", c->opt[OPT_MAX_NEW]);
    engine_option(en, "--ignore-eos", c->opt[OPT_IGNORE_EOS]);
    engine_options(en, c, &a->model);
    engine_option(en, "--json", c->opt[OPT_JSON]);
    if (a->question) {
        engine_add(en, "--"); /* a question may begin with a dash */
        engine_add(en, a->question);
    }
    return 0;
}

static int ask_engine(struct cli *c, const struct ask *a, struct larder_err *e)
{
    struct engine en = {.n = 0};
    json_t *answer = NULL;
    int rc = ask_arguments(&en, c, a, e);

    if (!rc)
        rc = engine_run(&en, c->opt[OPT_JSON] ? &answer : NULL, e);
    if (!rc && answer) {
        if (a->fetch_ms >= 0)
            json_object_set_new(answer, "fetch_ms", json_real(a->fetch_ms));
        cli_print_json(answer);
    }
    json_decref(answer);
    engine_done(&en);
    return rc;
}

int cli_ask(struct cli *c, struct larder_err *e)
{
    struct ask a = {.fetch_ms = -1, .lease = {.fd = -1}};
    int rc = check_ask(c, &a, e);

    if (!rc)
        rc = a.ref ? fetch_entry(c, &a, e) : engine_model_find(c, c->opt[OPT_MODEL], &a.model, e);
    if (!rc)
        rc = ask_engine(c, &a, e);
    if (a.lease.fd >= 0)
        larder_release(c->conn, &a.lease, CLI_SOON_MS, NULL);
    engine_model_done(&a.model);
    return rc;
}

/* ---- trace */

int cli_trace(struct cli *c, struct larder_err *e)
{
    struct engine en = {.n = 0};
    struct engine_model m = {0};
    int rc;

    if (!c->opt[OPT_FILE] == !c->opt[OPT_TOKENS_FILE])
        return cli_usage(e, "trace needs one of --file and --tokens");
    rc = engine_model_find(c, c->opt[OPT_MODEL], &m, e);
    if (!rc && !m.policy)
        rc = cli_usage(e, "trace needs --policy when --model is a file");
    if (!rc) {
        engine_start(&en, "trace");
        engine_option(&en, "--model", m.path);
        rc = add_document(&en, c->opt[OPT_FILE], e);
        engine_option(&en, "--tokens", c->opt[OPT_TOKENS_FILE]);
        engine_option(&en, "--policy", m.policy);
        engine_option(&en, "--template", m.tmpl);
        engine_options(&en, c, &m);
        engine_option(&en, "--json", c->opt[OPT_JSON]);
    }
    if (!rc)
        rc = engine_profile(&en, c, &m, e);
    if (!rc)
        rc = engine_run(&en, NULL, e);
    engine_done(&en);
    engine_model_done(&m);
    return rc;
}
