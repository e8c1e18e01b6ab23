/* cli_eval.c - `larder eval`: measure what stored caches still answer, or report what was.
 *
 * The one idea: measuring and reporting meet in the results file. With TASKS, what that does
 * not have yet is measured first (cli_eval_run.c); without, it is reported as it is, one
 * section for each model and kind of machine that it has results of. */
#include "cli_eval.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "mem.h"

#define MAX_SECTIONS 64

struct eval {
    struct cli *c;
    struct eval_options o;
    struct eval_results results;
    char *path; /* of the results */
    uint64_t seed;
    struct eval_section section[MAX_SECTIONS];
    size_t n_sections, n_failed;
};

/* ---- the command line */

static int number(const struct cli *c, enum cli_opt o, const char *name, uint64_t *ret,
                  struct larder_err *e)
{
    const char *s = c->opt[o];
    uint64_t v = 0;

    for (const char *p = s; p && (*p || p == s); p++) {
        if (*p < '0' || *p > '9' || v > KV_MAX_CTX)
            return cli_usage(e, "--%s takes a number up to %u, not '%.40s'", name, KV_MAX_CTX, s);
        v = 10 * v + (uint64_t)(*p - '0');
    }
    if (v > KV_MAX_CTX)
        return cli_usage(e, "--%s takes a number up to %u", name, KV_MAX_CTX);
    if (s)
        *ret = v;
    return 0;
}

/* "docs/a.jsonl" -> "a.results.jsonl", in the working directory */
static char *default_results(const char *tasks)
{
    const char *base = cli_basename(tasks);
    size_t n = strlen(base);

    if (n > 6 && !strcmp(base + n - 6, ".jsonl"))
        n -= 6;
    return cli_text("%.*s.results.jsonl", (int)n, base);
}

/* Results appended to the tasks would be the end of them. */
static int check_paths(const struct eval *v, struct larder_err *e)
{
    struct stat tasks, results;

    if (v->o.tasks && !stat(v->o.tasks, &tasks) && !stat(v->path, &results) &&
        tasks.st_dev == results.st_dev && tasks.st_ino == results.st_ino)
        return cli_usage(e, "--results is the file of the tasks");
    return 0;
}

/* A file that cannot be written is better known before hours of measuring. */
static int check_output(const char *path, struct larder_err *e)
{
    FILE *f = path ? fopen(path, "ae") : NULL;

    if (path && !f)
        return larder_fail(e, LARDER_EIO, "cannot write %s: %s", path, strerror(errno));
    if (f)
        fclose(f);
    return 0;
}

static int read_options(struct eval *v, struct larder_err *e)
{
    const struct cli *c = v->c;
    int rc;

    v->o = (struct eval_options){.tasks = c->n_args ? c->arg[0] : NULL,
                                 .model = c->opt[OPT_MODEL],
                                 .ns = c->opt[OPT_NAMESPACE],
                                 .keep = c->opt[OPT_KEEP] != NULL};
    v->seed = 1;
    if (!v->o.tasks && !c->opt[OPT_RESULTS])
        return cli_usage(e, "eval needs a file of tasks, or --results to report");
    if (!v->o.tasks && (c->n_policies || c->opt[OPT_LIMIT] || c->opt[OPT_MODEL]))
        return cli_usage(e, "--policy, --limit and --model go with a file of tasks");
    if (v->o.ns && !name_is_namespace(v->o.ns))
        return cli_usage(e, "'%.64s' is no namespace: use letters, digits, . _ -", v->o.ns);
    rc = number(c, OPT_LIMIT, "limit", &v->o.limit, e);
    if (!rc)
        rc = number(c, OPT_MAX_NEW, "max-new", &v->o.max_new, e);
    if (!rc)
        rc = number(c, OPT_SEED, "seed", &v->seed, e);
    v->path = c->opt[OPT_RESULTS] ? cli_text("%s", c->opt[OPT_RESULTS])
                                  : default_results(v->o.tasks ? v->o.tasks : "");
    if (!rc)
        rc = check_paths(v, e);
    for (int o = OPT_CSV; !rc && o <= OPT_HTML; o++)
        rc = check_output(c->opt[o], e);
    return rc;
}

/* ---- sections */

static int add_section(struct eval *v, json_t *what, json_t *ids, json_t *policies,
                       struct larder_err *e)
{
    if (v->n_sections == MAX_SECTIONS)
        return larder_fail(e, LARDER_ETOOBIG, "%s has results of more than %u models and machines",
                           v->path, MAX_SECTIONS);
    return eval_section_make(&v->section[v->n_sections++], &v->results, what, ids, policies,
                             v->seed, e);
}

static int measure(struct eval *v, struct larder_err *e)
{
    struct eval_outcome out = {0};
    int rc = eval_measure(v->c, &v->o, &v->results, &out, e);

    if (!rc)
        rc = add_section(v, out.what, out.ids, out.policies, e);
    v->n_failed = out.n_failed;
    json_decref(out.what);
    json_decref(out.ids);
    json_decref(out.policies);
    return rc;
}

/* Sections as the results come: {what as text: {"what", "ids": {...}, "policies": {...}}}; keys of
 * an object keep their order. */
static json_t *group_of(json_t *groups, const json_t *result)
{
    static const char *const keys[] = {"model", "backend", "dtype", "isa"};
    json_t *what = json_object(), *group;
    char *key;

    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        json_object_set(what, keys[i], json_object_get(result, keys[i]));
    key = json_dumps(what, JSON_COMPACT);
    group = json_object_get(groups, key);
    if (!group) {
        group = json_pack("{s:O, s:{}, s:{s:b}}", "what", what, "ids", "policies", EVAL_FULL, 1);
        json_object_set_new(groups, key, group);
    }
    free(key);
    json_decref(what);
    return group;
}

static json_t *names(const json_t *object)
{
    json_t *list = json_array();
    const char *key;
    json_t *unused;

    json_object_foreach ((json_t *)(uintptr_t)object, key, unused)
        json_array_append_new(list, json_string(key));
    return list;
}

static int sections_of_file(struct eval *v, struct larder_err *e)
{
    json_t *groups = json_object(), *result, *group;
    size_t n_rows = 0;
    const char *key;
    int rc = 0;

    json_object_foreach (v->results.by_key, key, result) {
        group = group_of(groups, result);
        json_object_set_new(json_object_get(group, "ids"), cli_str(result, "id"), json_true());
        json_object_set_new(json_object_get(group, "policies"), cli_str(result, "policy"),
                            json_true());
    }
    json_object_foreach (groups, key, group) {
        json_t *ids = names(json_object_get(group, "ids"));
        json_t *policies = names(json_object_get(group, "policies"));

        if (!rc)
            rc = add_section(v, json_object_get(group, "what"), ids, policies, e);
        json_decref(ids);
        json_decref(policies);
    }
    json_decref(groups);
    for (size_t i = 0; i < v->n_sections; i++)
        n_rows += v->section[i].n_rows;
    if (!rc && !n_rows)
        rc = larder_fail(e, LARDER_EEMPTY, "%s has no results of the full cache to compare with",
                         v->path);
    return rc;
}

/* ---- what is printed and written */

static int write_file(const struct eval *v, enum cli_opt o, struct larder_err *e)
{
    const char *path = v->c->opt[o];
    FILE *f = path ? fopen(path, "we") : NULL;
    bool bad;

    if (!path)
        return 0;
    if (!f)
        return larder_fail(e, LARDER_EIO, "cannot write %s: %s", path, strerror(errno));
    if (o == OPT_CSV)
        eval_write_csv(f, v->section, v->n_sections);
    else if (o == OPT_MARKDOWN)
        eval_write_markdown(f, v->section, v->n_sections);
    else
        eval_write_html(f, v->section, v->n_sections, &v->results);
    bad = ferror(f);
    if (fclose(f) || bad)
        return larder_fail(e, LARDER_EIO, "cannot write %s", path);
    return 0;
}

static void print_sections(const struct eval *v)
{
    for (size_t i = 0; i < v->n_sections; i++) {
        if (v->c->opt[OPT_JSON]) {
            json_t *j = eval_json(&v->section[i]);

            cli_print_json(j);
            json_decref(j);
            continue;
        }
        if (i && v->c->tty)
            putchar('\n');
        eval_print(&v->section[i], v->c);
    }
}

static int report(const struct eval *v, struct larder_err *e)
{
    int rc = 0;

    print_sections(v);
    for (int o = OPT_CSV; !rc && o <= OPT_HTML; o++)
        rc = write_file(v, (enum cli_opt)o, e);
    if (!rc && v->n_failed) {
        fflush(stdout);
        rc = larder_fail(e, LARDER_EWORKER, "%zu documents or policies failed", v->n_failed);
    }
    return rc;
}

int cli_eval(struct cli *c, struct larder_err *e)
{
    struct eval *v = mem_zalloc(1, sizeof *v);
    int rc;

    if (!v)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    v->c = c;
    rc = read_options(v, e);
    if (!rc)
        rc = eval_results_open(&v->results, v->path, v->o.tasks != NULL, e);
    if (!rc)
        rc = v->o.tasks ? measure(v, e) : sections_of_file(v, e);
    if (!rc)
        rc = report(v, e);
    for (size_t i = 0; i < v->n_sections; i++)
        eval_section_done(&v->section[i]);
    eval_results_done(&v->results);
    mem_free(v->path);
    mem_free(v);
    return rc;
}
