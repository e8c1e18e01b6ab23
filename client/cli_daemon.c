/* cli_daemon.c - commands about the daemon: status, models, jobs, cancel.
 *
 * The one idea: as in cli_entry.c, --json prints the daemon's objects, the other form
 * picks from them.
 */
#include "cli.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "mem.h"

static int ask_status(struct cli *c, json_t **ret, struct larder_err *e)
{
    return cli_ask_daemon(c, FRAME_STATUS, json_object(), CLI_SOON_MS, ret, e);
}

/* ---- status */

static void print_store(const struct cli *c, const json_t *st)
{
    uint64_t budget = cli_num(st, "budget_bytes");
    char *size = cli_size(c, budget);

    cli_pair(c, "store", cli_text("%s", cli_str(st, "dir")));
    cli_pair(c, "budget", size);
    cli_pair(c, "used", cli_share(c, cli_num(st, "used_bytes"), budget));
    cli_pair(c, "entries", cli_text("%" PRIu64, cli_num(st, "entries")));
    cli_pair(c, "pinned", cli_text("%" PRIu64, cli_num(st, "pinned")));
    cli_pair(c, "evicted", cli_text("%" PRIu64, cli_num(st, "evicted")));
    cli_pair(c, "damaged", cli_text("%" PRIu64, cli_num(st, "damaged")));
}

static void print_activity(const struct cli *c, const json_t *st)
{
    const json_t *images = json_object_get(st, "images"), *jobs = json_object_get(st, "jobs");

    cli_pair(c, "images cached", cli_text("%" PRIu64, cli_num(images, "cached")));
    cli_pair(c, "images bytes", cli_size(c, cli_num(images, "bytes")));
    cli_pair(c, "leases", cli_text("%" PRIu64, cli_num(images, "leases")));
    cli_pair(c, "clients", cli_text("%" PRIu64, cli_num(st, "clients")));
    cli_pair(c, "requests", cli_text("%" PRIu64, cli_num(st, "requests")));
    cli_pair(c, "jobs queued", cli_text("%" PRIu64, cli_num(jobs, "queued")));
    cli_pair(c, "jobs running", cli_text("%" PRIu64, cli_num(jobs, "running")));
    cli_pair(c, "jobs done", cli_text("%" PRIu64, cli_num(jobs, "done")));
    cli_pair(c, "jobs failed", cli_text("%" PRIu64, cli_num(jobs, "failed")));
}

int cli_status(struct cli *c, struct larder_err *e)
{
    const json_t *model;
    json_t *st = NULL;
    size_t i;
    int rc = ask_status(c, &st, e);

    if (rc)
        return rc;
    if (c->opt[OPT_JSON]) {
        cli_print_json(st);
        json_decref(st);
        return 0;
    }
    cli_pair(c, "larderd",
             cli_text("%s, process %" PRIu64, cli_str(st, "version"), cli_num(st, "pid")));
    cli_pair(c, "socket", cli_text("%s", larder_path(c->conn)));
    cli_pair(c, "up", cli_duration(c, 1000 * cli_num(st, "uptime_s")));
    print_store(c, json_object_get(st, "store"));
    print_activity(c, st);
    json_array_foreach (json_object_get(st, "models"), i, model)
        cli_pair(c, "model",
                 cli_text("%s, worker %s%s%s", cli_str(model, "name"), cli_str(model, "worker"),
                          *cli_str(model, "device") ? ", " : "", cli_str(model, "device")));
    json_decref(st);
    return 0;
}

/* ---- models */

/* What the daemon does not know yet is absent. */
static char *number_or_dash(const json_t *j, const char *key)
{
    return cli_num(j, key) ? cli_text("%" PRIu64, cli_num(j, key)) : cli_text("-");
}

int cli_models(struct cli *c, struct larder_err *e)
{
    static const char *const heading[] = {"NAME",      "TEMPLATE", "BACKEND", "DTYPE",
                                          "POSITIONS", "WORKER",   "POLICY",  "PATH"};
    const json_t *m, *models;
    struct cli_table t;
    json_t *st = NULL;
    size_t i;
    int rc = ask_status(c, &st, e);

    if (rc)
        return rc;
    models = json_object_get(st, "models");
    if (c->opt[OPT_JSON]) {
        json_t *j = json_pack("{s:O}", "models", models);

        cli_print_json(j);
        json_decref(j);
        json_decref(st);
        return 0;
    }
    cli_table_start(&t, 8, heading);
    json_array_foreach (models, i, m) {
        cli_table_add(&t, cli_text("%s", cli_str(m, "name")));
        cli_table_add(&t, cli_text("%s", cli_str(m, "template")));
        cli_table_add(&t, cli_text("%s", cli_str(m, "backend")));
        cli_table_add(&t, cli_text("%s", cli_str(m, "dtype")));
        cli_table_add(&t, number_or_dash(m, "n_positions"));
        cli_table_add(&t, cli_text("%s", cli_str(m, "worker")));
        cli_table_add(&t, cli_text("%s", cli_str(m, "policy")));
        cli_table_add(&t, cli_text("%s", cli_str(m, "path")));
    }
    cli_table_print(&t, c);
    json_decref(st);
    return 0;
}

static bool is_path(const char *model)
{
    size_t n = strlen(model);

    return strchr(model, '/') || (n > 5 && !strcmp(model + n - 5, ".gguf"));
}

/* The model of that name, or the only one; borrowed from `models`. */
static const json_t *pick_model(const json_t *models, const char *name, struct larder_err *e)
{
    const json_t *m;
    size_t i;

    if (!name && json_array_size(models) == 1)
        return json_array_get(models, 0);
    if (!name) {
        larder_fail(e, LARDER_EUNKNOWNMODEL, "%zu models are configured; choose with --model",
                    json_array_size(models));
        return NULL;
    }
    json_array_foreach (models, i, m) {
        if (!strcmp(cli_str(m, "name"), name))
            return m;
    }
    larder_fail(e, LARDER_EUNKNOWNMODEL,
                "model '%.64s' is not configured; 'larder models' lists those that are", name);
    return NULL;
}

int cli_model_path(struct cli *c, const char *model, char **ret_path, json_t **ret_model,
                   struct larder_err *e)
{
    const json_t *m;
    json_t *st = NULL;
    int rc;

    if (model && is_path(model)) {
        *ret_path = cli_text("%s", model);
        if (ret_model)
            *ret_model = NULL;
        return 0;
    }
    rc = ask_status(c, &st, e);
    if (rc)
        return rc;
    m = pick_model(json_object_get(st, "models"), model, e);
    if (m) {
        *ret_path = cli_text("%s", cli_str(m, "path"));
        if (ret_model)
            *ret_model = json_incref((json_t *)(uintptr_t)m);
    }
    json_decref(st);
    return m ? 0 : e->code;
}

/* ---- jobs, cancel */

static char *job_progress(const json_t *j)
{
    if (!strcmp(cli_str(j, "state"), "failed"))
        return cli_text("%s", cli_str(j, "message"));
    if (strcmp(cli_str(j, "state"), "running"))
        return cli_text("%s", cli_true(j, "stored_already") ? "stored already" : "");
    if (!cli_num(j, "layers"))
        return cli_text("%s", cli_str(j, "pass"));
    return cli_text("%s, layer %" PRIu64 " of %" PRIu64, cli_str(j, "pass"), cli_num(j, "layer"),
                    cli_num(j, "layers"));
}

int cli_jobs(struct cli *c, struct larder_err *e)
{
    static const char *const heading[] = {"JOB",    "STATE", "NAME",  "MODEL",
                                          "TOKENS", "TIME",  "DETAIL"};
    json_t *answer = NULL;
    const json_t *j;
    struct cli_table t;
    size_t i;
    int rc = cli_ask_daemon(c, FRAME_JOBS, json_object(), CLI_SOON_MS, &answer, e);

    if (rc)
        return rc;
    if (c->opt[OPT_JSON]) {
        cli_print_json(answer);
        json_decref(answer);
        return 0;
    }
    cli_table_start(&t, 7, heading);
    json_array_foreach (json_object_get(answer, "jobs"), i, j) {
        cli_table_add(&t, cli_text("%" PRIu64, cli_num(j, "job")));
        cli_table_add(&t, cli_text("%s", cli_str(j, "state")));
        cli_table_add(&t, cli_text("%s", *cli_str(j, "name") ? cli_str(j, "name") : "-"));
        cli_table_add(&t, cli_text("%s", cli_str(j, "model")));
        cli_table_add(&t, number_or_dash(j, "n_ctx"));
        cli_table_add(&t, cli_duration(c, cli_num(j, "elapsed_ms")));
        cli_table_add(&t, job_progress(j));
    }
    cli_table_print(&t, c);
    json_decref(answer);
    return 0;
}

static int parse_job(const char *s, uint64_t *ret, struct larder_err *e)
{
    unsigned long long v;
    char *end;

    errno = 0;
    v = strtoull(s, &end, 10);
    if (*s < '0' || *s > '9' || *end || errno || v > 1ULL << 53)
        return cli_usage(e, "'%.40s' is no job number; 'larder jobs' lists them", s);
    *ret = v;
    return 0;
}

int cli_cancel(struct cli *c, struct larder_err *e)
{
    int n_failed = 0;
    uint64_t id = 0;
    int rc = 0;

    for (int i = 0; !rc && i < c->n_args; i++)
        rc = parse_job(c->arg[i], &id, e);
    for (int i = 0; !rc && i < c->n_args; i++) {
        json_t *answer = NULL;

        parse_job(c->arg[i], &id, e);
        rc = cli_ask_daemon(c, FRAME_CANCEL, json_pack("{s:I}", "job", (json_int_t)id), CLI_SOON_MS,
                            &answer, e);
        if (rc == LARDER_ENOTFOUND) {
            cli_print_error(c->arg[i], e);
            n_failed++;
            rc = 0;
        } else if (!rc && c->opt[OPT_JSON]) {
            cli_print_json(answer);
        } else if (!rc) {
            printf(c->tty ? "job %s: %s\n" : "%s\t%s\n", c->arg[i], cli_str(answer, "state"));
        }
        json_decref(answer);
    }
    return rc ? rc : n_failed ? CLI_REPORTED : 0;
}
