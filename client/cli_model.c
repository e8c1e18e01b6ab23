/* cli_model.c - commands about one model: calibrate, show-model.
 *
 * The one idea: the engine measures, the daemon keeps; this carries the profile from one to the
 * other, and shows it to whoever wants to know why a head keeps more than another.
 */
#include "cli_run.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mem.h"
#include "memfile.h"

#define MAX_TEXTS 200
#define SHOWN_BUDGET 0.25

char *cli_profile_text(const json_t *profile)
{
    char *raw = json_dumps(profile, JSON_COMPACT | JSON_REAL_PRECISION(9)); /* of an f32 */
    char *text = cli_text("%s", raw ? raw : "");

    free(raw);
    return text;
}

int cli_profile(struct cli *c, const char *model, const char *text, json_t **ret,
                struct larder_err *e)
{
    struct larder_request q = {.type = FRAME_PROFILE, .fd = -1, .timeout_ms = CLI_SOON_MS};
    size_t len = text ? strlen(text) : 0;
    int rc = cli_connect(c, e);

    if (!rc && text)
        rc = memfile_from("larder-profile", text, len, &q.fd, e);
    if (rc)
        return rc;
    q.body = json_pack("{s:s}", "model", model);
    if (text && q.body)
        json_object_set_new(q.body, "bytes", json_integer((json_int_t)len));
    rc = larder_ask_json(c->conn, &q, ret, NULL, e);
    if (q.fd >= 0)
        close(q.fd);
    return rc;
}

/* ---- what is printed */

/* "a.txt (730 tokens), b.txt (12 tokens)" */
static char *texts_of(const json_t *profile)
{
    char *all = cli_text("%s", "");
    const json_t *t;
    size_t i;

    json_array_foreach (json_object_get(profile, "texts"), i, t) {
        char *more = cli_text("%s%s%s (%" PRIu64 " tokens)", all, i ? ", " : "", cli_str(t, "name"),
                              cli_num(t, "n_tokens"));

        mem_free(all);
        all = more;
    }
    return all;
}

/* What stands for `auto` in policies that look at a window of queries. */
static void show_window(const struct cli *c, const json_t *w, const char *model)
{
    const json_t *pool = json_object_get(w, "pool"), *tau = json_object_get(w, "tau");

    if (pool)
        cli_pair(
            c, "pooling",
            cli_text("kernel %" PRIu64 ", from a key to the end of its value", cli_num(w, "pool")));
    else
        cli_pair(c, "pooling",
                 cli_text("documented defaults; 'larder calibrate %s' measures it", model));
    if (tau)
        cli_pair(
            c, "adaptive cut",
            cli_text("lmin %" PRIu64 ", tau %.3g", cli_num(w, "lmin"), json_number_value(tau)));
    else if (pool)
        cli_pair(
            c, "adaptive cut",
            cli_text("documented defaults; ranks did not settle in the middle of the model, or "
                     "the texts were too short"));
    else
        cli_pair(c, "adaptive cut",
                 cli_text("documented defaults; 'larder calibrate %s' measures it", model));
}

static void show_profile(const struct cli *c, const json_t *answer)
{
    const json_t *p = json_object_get(answer, "profile");

    cli_pair(c, "model", cli_text("%s", cli_str(answer, "model")));
    cli_pair(c, "fingerprint", cli_text("%s", cli_str(answer, "fingerprint")));
    if (!json_is_object(p)) {
        cli_pair(c, "profile",
                 cli_text("none; 'larder calibrate %s' measures one", cli_str(answer, "model")));
        return;
    }
    cli_pair(c, "profile", cli_text("%s", cli_str(p, "id")));
    cli_pair(c, "measured", cli_time(c, cli_num(p, "measured")));
    cli_pair(c, "computed",
             cli_text("%s, %s, template %s", cli_str(p, "backend"), cli_str(p, "dtype"),
                      cli_str(p, "template")));
    cli_pair(c, "texts", texts_of(p));
    show_window(c, json_object_get(p, "window"), cli_str(answer, "model"));
}

/* The shares of the budget that is nearest to what is shown. */
static const json_t *shown_shares(const json_t *profile)
{
    const json_t *b, *best = NULL;
    double near = INFINITY;
    size_t i;

    json_array_foreach (json_object_get(profile, "shares"), i, b) {
        double d = fabs(json_number_value(json_object_get(b, "budget")) - SHOWN_BUDGET);

        if (d < near) {
            near = d;
            best = b;
        }
    }
    return best;
}

static void add_layer(struct cli_table *t, uint64_t layer, const json_t *share, uint64_t n_heads)
{
    char *heads = cli_text("%s", ""), *more;
    double sum = 0;

    for (uint64_t h = 0; h < n_heads; h++) {
        double x = 100 * json_number_value(json_array_get(share, layer * n_heads + h));

        more = cli_text("%s%s%.1f", heads, h ? " " : "", x);
        mem_free(heads);
        heads = more;
        sum += x;
    }
    cli_table_add(t, cli_text("%" PRIu64, layer));
    cli_table_add(t, cli_text("%.1f", sum / (double)n_heads));
    cli_table_add(t, heads);
}

static void show_shares(const struct cli *c, const json_t *profile)
{
    static const char *const heading[] = {"LAYER", "MEAN %", "OF EACH KV HEAD %"};
    uint64_t n_layers = cli_num(profile, "n_layers"), n_heads = cli_num(profile, "n_kv_heads");
    const json_t *b = shown_shares(profile), *share = json_object_get(b, "share");
    struct cli_table t;

    if (!b || !n_heads || json_array_size(share) != n_layers * n_heads)
        return;
    if (c->tty)
        printf("\nRows kept of a document at a budget of %.0f %%:\n",
               100 * json_number_value(json_object_get(b, "budget")));
    cli_table_start(&t, 3, heading);
    for (uint64_t l = 0; l < n_layers; l++)
        add_layer(&t, l, share, n_heads);
    cli_table_print(&t, c);
}

/* ---- show-model */

static int export_profile(const char *path, const json_t *answer, struct larder_err *e)
{
    const json_t *p = json_object_get(answer, "profile");
    bool out = !strcmp(path, "-");
    char *text;
    FILE *f;
    int bad;

    if (!json_is_object(p))
        return larder_fail(e, LARDER_ENOTFOUND,
                           "model %s has no profile; 'larder calibrate %s' measures one",
                           cli_str(answer, "model"), cli_str(answer, "model"));
    f = out ? stdout : fopen(path, "we");
    if (!f)
        return larder_fail(e, LARDER_EIO, "%.200s: %s", path, strerror(errno));
    text = cli_profile_text(p);
    bad = fprintf(f, "%s\n", text) < 0;
    mem_free(text);
    bad |= out ? fflush(f) != 0 : fclose(f) != 0;
    return bad ? larder_fail(e, LARDER_EIO, "cannot write the profile to %.200s", path) : 0;
}

int cli_show_model(struct cli *c, struct larder_err *e)
{
    json_t *answer = NULL;
    int rc = cli_profile(c, c->arg[0], NULL, &answer, e);

    if (rc)
        return rc;
    if (c->opt[OPT_EXPORT]) {
        rc = export_profile(c->opt[OPT_EXPORT], answer, e);
    } else if (c->opt[OPT_JSON]) {
        cli_print_json(answer);
    } else {
        show_profile(c, answer);
        show_shares(c, json_object_get(answer, "profile"));
    }
    json_decref(answer);
    return rc;
}

/* ---- calibrate */

static int measure(struct cli *c, const struct engine_model *m, json_t **ret, struct larder_err *e)
{
    struct engine en;
    int rc;

    engine_start(&en, "calibrate");
    engine_option(&en, "--model", m->path);
    engine_option(&en, "--template", m->tmpl);
    engine_option(&en, "--no-builtin", c->opt[OPT_NO_BUILTIN]);
    engine_options(&en, c, m);
    engine_add(&en, "--"); /* a text's name may begin with a dash */
    for (int i = 1; i < c->n_args; i++)
        engine_add(&en, c->arg[i]);
    rc = engine_run(&en, ret, e);
    engine_done(&en);
    return rc;
}

static int store_profile(struct cli *c, const char *model, const json_t *profile,
                         struct larder_err *e)
{
    char *text = cli_profile_text(profile);
    json_t *answer = NULL;
    int rc = cli_profile(c, model, text, &answer, e);

    mem_free(text);
    if (rc)
        return rc;
    if (c->opt[OPT_JSON])
        cli_print_json(answer);
    else
        show_profile(c, answer);
    json_decref(answer);
    return 0;
}

int cli_calibrate(struct cli *c, struct larder_err *e)
{
    struct engine_model m = {0};
    json_t *profile = NULL;
    int rc;

    if (c->n_args > MAX_TEXTS)
        return cli_usage(e, "more than %d texts; a few are enough", MAX_TEXTS - 1);
    if (c->opt[OPT_NO_BUILTIN] && c->n_args < 2)
        return cli_usage(e, "--no-builtin leaves nothing to measure on; name a TEXT");
    rc = engine_model_find(c, c->arg[0], &m, e);
    if (!rc && !m.name)
        rc = cli_usage(e, "calibrate takes the name of a configured model; for a file run "
                          "larder-prefill calibrate");
    if (!rc)
        rc = measure(c, &m, &profile, e);
    if (!rc)
        rc = store_profile(c, m.name, profile, e);
    json_decref(profile);
    engine_model_done(&m);
    return rc;
}
