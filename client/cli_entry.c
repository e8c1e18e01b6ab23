/* cli_entry.c - commands about entries: ls, show, rm, pin, verify, explain-miss.
 *
 * The one idea: --json prints the daemon's objects as PROTOCOL.md defines them; the
 * other form picks from the same objects, with units for people and bare numbers for
 * scripts.
 */
#include "cli.h"

#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "mem.h"

#define LS_PAGE 200

static json_t *entry_body(const char *ref, struct larder_err *e)
{
    json_t *body = NULL;

    return larder_ref_body(ref, &body, e) ? NULL : body;
}

/* ---- ls */

static const char *const ls_heading[] = {"NAME",  "KEY",    "MODEL",   "TOKENS", "FULL",
                                         "IMAGE", "STORED", "CREATED", "FLAGS",  "POLICY"};

static void ls_line(const struct cli *c, struct cli_table *t, const json_t *en)
{
    uint64_t full = cli_num(en, "full_bytes");

    cli_table_add(t, cli_text("%s", *cli_str(en, "name") ? cli_str(en, "name") : "-"));
    cli_table_add(t, cli_key(c, cli_str(en, "key")));
    cli_table_add(t, cli_text("%s", cli_str(en, "model")));
    cli_table_add(t, cli_text("%" PRIu64, cli_num(en, "n_ctx")));
    cli_table_add(t, cli_size(c, full));
    cli_table_add(t, cli_share(c, cli_num(en, "image_bytes"), full));
    cli_table_add(t, cli_share(c, cli_num(en, "stored_bytes"), full));
    cli_table_add(t, cli_time(c, cli_num(en, "created")));
    cli_table_add(t, cli_text("%s", cli_true(en, "damaged")  ? "DAMAGED"
                                    : cli_true(en, "pinned") ? "pinned"
                                                             : "-"));
    cli_table_add(t, cli_text("%s", cli_str(en, "policy"))); /* the longest: last */
}

/* One page after `after`; *ret is the answer. */
static int ls_page(struct cli *c, const char *after, json_t **ret, struct larder_err *e)
{
    json_t *body = json_pack("{s:i}", "limit", LS_PAGE);

    body = larder_body_str(body, "namespace", c->opt[OPT_NAMESPACE]);
    body = larder_body_str(body, "prefix", c->opt[OPT_PREFIX]);
    body = larder_body_str(body, "after", after);
    return cli_ask_daemon(c, FRAME_LS, body, CLI_WORK_MS, ret, e);
}

/* All entries, in one new array. */
static int ls_all(struct cli *c, json_t *all, struct larder_err *e)
{
    char after[65] = "";
    bool more = true;
    int rc = 0;

    while (!rc && more) {
        const json_t *entries = NULL;
        json_t *page = NULL;
        size_t n;

        rc = ls_page(c, *after ? after : NULL, &page, e);
        if (!rc)
            rc = field_array(page, "entries", FIELD_REQUIRED, LS_PAGE, &entries, e);
        if (rc) {
            json_decref(page);
            break;
        }
        n = json_array_size(entries);
        json_array_extend(all, (json_t *)(uintptr_t)entries);
        more = cli_true(page, "more") && n;
        if (more)
            snprintf(after, sizeof after, "%s", cli_str(json_array_get(entries, n - 1), "key"));
        json_decref(page);
    }
    return rc;
}

int cli_ls(struct cli *c, struct larder_err *e)
{
    json_t *all = json_array();
    struct cli_table t;
    int rc = all ? ls_all(c, all, e) : larder_fail(e, LARDER_ENOMEM, "no memory");

    if (!rc && c->opt[OPT_JSON]) {
        json_t *j = json_pack("{s:O}", "entries", all);

        cli_print_json(j);
        json_decref(j);
    } else if (!rc) {
        cli_table_start(&t, 10, ls_heading);
        for (size_t i = 0; i < json_array_size(all); i++)
            ls_line(c, &t, json_array_get(all, i));
        cli_table_print(&t, c);
        if (c->tty && !json_array_size(all))
            fprintf(stderr, "nothing is stored here; 'larder put FILE' stores a document\n");
    }
    json_decref(all);
    return rc;
}

/* ---- show */

/* "512" or "128-512", and how many in all. */
static char *rows_text(const json_t *rows, uint64_t total, uint64_t n_ctx)
{
    const json_t *layer, *head;
    uint64_t min = UINT64_MAX, max = 0, n_heads = 0;
    double percent;
    size_t l, h;

    json_array_foreach (rows, l, layer) {
        json_array_foreach (layer, h, head) {
            uint64_t n = (uint64_t)json_integer_value(head);

            min = n < min ? n : min;
            max = n > max ? n : max;
            n_heads++;
        }
    }
    percent = n_heads && n_ctx ? 100.0 * (double)total / ((double)n_heads * (double)n_ctx) : 0;
    if (min == max)
        return cli_text("%.1f %%: %" PRIu64 " per layer and KV head, %" PRIu64 " in all", percent,
                        max, total);
    return cli_text("%.1f %%: %" PRIu64 " to %" PRIu64 " per layer and KV head, %" PRIu64 " in all",
                    percent, n_heads ? min : 0, max, total);
}

/* Where the policy leaves numbers open: whose they were. */
static void show_auto(const struct cli *c, const json_t *en)
{
    static const char *const keys[] = {"pool", "lmin", "tau"};
    const char *policy = cli_str(en, "policy");
    char *open = cli_text("%s", "");

    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        char *is = cli_text(",%s=auto", keys[i]), *more;

        more = cli_text("%s%s%s", open, strstr(policy, is) && *open ? ", " : "",
                        strstr(policy, is) ? keys[i] : "");
        mem_free(is);
        mem_free(open);
        open = more;
    }
    if (*open && strstr(policy, ",profile="))
        cli_pair(c, "auto", cli_text("%s: as the profile says that the policy names", open));
    else if (*open)
        cli_pair(c, "auto",
                 cli_text("%s: documented defaults; larder calibrate measures them", open));
    mem_free(open);
}

static void show_source(const struct cli *c, const json_t *en)
{
    const json_t *sel = json_object_get(en, "sel_layer");

    cli_pair(c, "name", cli_text("%s", cli_str(en, "name")));
    cli_pair(c, "key", cli_text("%s", cli_str(en, "key")));
    cli_pair(c, "model", cli_text("%s", cli_str(en, "model")));
    cli_pair(c, "template", cli_text("%s", cli_str(en, "template")));
    cli_pair(c, "policy", cli_text("%s", cli_str(en, "policy")));
    if (cli_true(en, "imported"))
        cli_pair(c, "imported", cli_text("yes: computed elsewhere"));
    show_auto(c, en);
    cli_pair(c, "tokens", cli_text("%" PRIu64, cli_num(en, "n_ctx")));
    cli_pair(c, "next position", cli_text("%" PRIu64, cli_num(en, "next_pos")));
    cli_pair(c, "selection layer",
             json_is_integer(sel) ? cli_text("%" PRIu64, cli_num(en, "sel_layer"))
                                  : cli_text("none"));
    cli_pair(
        c, "rows kept",
        rows_text(json_object_get(en, "rows"), cli_num(en, "rows_total"), cli_num(en, "n_ctx")));
}

static double real(const json_t *o, const char *key)
{
    return json_number_value(json_object_get(o, key));
}

/* What the kept rows lose on questions made from the document itself. */
static void show_certificate(const struct cli *c, const json_t *cert)
{
    if (!json_is_object(cert))
        return;
    cli_pair(c, "certificate",
             cli_text("%.0f recall probes: %.1f %% same next token as the full cache, KL %.4f",
                      real(cert, "probes"), 100 * real(cert, "agreement"), real(cert, "kl")));
    cli_pair(c, "worst probe",
             cli_text("KL %.4f, at token %.0f", real(cert, "worst_kl"), real(cert, "worst_at")));
}

static void show_sizes(const struct cli *c, const json_t *en)
{
    uint64_t full = cli_num(en, "full_bytes");

    cli_pair(c, "full cache", cli_size(c, full));
    cli_pair(c, "image", cli_share(c, cli_num(en, "image_bytes"), full));
    cli_pair(c, "stored", cli_share(c, cli_num(en, "stored_bytes"), full));
    cli_pair(c, "precision", cli_text("%s", cli_str(en, "precision")));
    cli_pair(c, "prefill", cli_duration(c, cli_num(en, "prefill_ms")));
    cli_pair(c, "backend", cli_text("%s", cli_str(en, "backend")));
    cli_pair(c, "created", cli_time(c, cli_num(en, "created")));
    cli_pair(c, "hits", cli_text("%" PRIu64, cli_num(en, "hits")));
    cli_pair(c, "pinned", cli_text("%s", cli_true(en, "pinned") ? "yes" : "no"));
    if (cli_true(en, "damaged"))
        cli_pair(c, "DAMAGED", cli_text("yes: it is not served; put the document again"));
    show_certificate(c, json_object_get(en, "certificate"));
}

/* The document itself, unchanged: for a file or a pipe. */
static void show_document(const struct cli *c, const json_t *en)
{
    const json_t *text = json_object_get(en, "text"), *id;
    size_t i;

    if (c->opt[OPT_SHOW_TEXT] && json_is_string(text))
        fwrite(json_string_value(text), 1, json_string_length(text), stdout);
    if (!c->opt[OPT_SHOW_TOKENS])
        return;
    json_array_foreach (json_object_get(en, "tokens"), i, id)
        printf("%s%" JSON_INTEGER_FORMAT, i ? " " : "", json_integer_value(id));
    putchar('\n');
}

int cli_show(struct cli *c, struct larder_err *e)
{
    json_t *body = entry_body(c->arg[0], e), *answer = NULL;
    const json_t *en;
    int rc;

    if (!body)
        return e->code;
    if (c->opt[OPT_SHOW_TEXT])
        body = larder_body_bool(body, "text", true);
    if (c->opt[OPT_SHOW_TOKENS])
        body = larder_body_bool(body, "tokens", true);
    rc = cli_ask_daemon(c, FRAME_SHOW, body, CLI_WORK_MS, &answer, e);
    if (rc)
        return cli_hint_namespace(rc, c->arg[0], e);
    en = json_object_get(answer, "entry");
    if (c->opt[OPT_JSON]) {
        cli_print_json(en);
    } else if (c->opt[OPT_SHOW_TEXT] || c->opt[OPT_SHOW_TOKENS]) {
        show_document(c, en);
    } else {
        show_source(c, en);
        show_sizes(c, en);
    }
    json_decref(answer);
    return 0;
}

/* ---- rm, pin */

/* Ask `type` about each argument; a failed one is told and does not stop the others. */
static int each_entry(struct cli *c, enum frame_type type, const char *done, struct larder_err *e)
{
    int n_failed = 0;
    int rc = cli_connect(c, e);

    for (int i = 0; !rc && i < c->n_args; i++) {
        json_t *body = entry_body(c->arg[i], e), *answer = NULL;

        rc = body ? 0 : e->code;
        if (!rc && type == FRAME_PIN)
            body = larder_body_bool(body, "pin", !c->opt[OPT_OFF]);
        if (!rc)
            rc = cli_ask_daemon(c, type, body, CLI_SOON_MS, &answer, e);
        cli_hint_namespace(rc, c->arg[i], e);
        if (rc == LARDER_ENOTFOUND || rc == LARDER_EINVAL || rc == LARDER_EBUSY) {
            cli_print_error(c->arg[i], e);
            n_failed++;
            rc = 0;
        } else if (!rc && c->opt[OPT_JSON]) {
            json_object_set_new(answer, "entry", json_string(c->arg[i]));
            cli_print_json(answer);
        } else if (!rc && type == FRAME_RM) {
            char *size = cli_size(c, cli_num(answer, "freed_bytes"));

            printf(c->tty ? "%s %s, %s freed\n" : "%s\t%s\t%s\n", done, c->arg[i], size);
            mem_free(size);
        } else if (!rc) {
            printf(c->tty ? "%s %s\n" : "%s\t%s\n", done, c->arg[i]);
        }
        json_decref(answer);
    }
    return rc ? rc : n_failed ? CLI_REPORTED : 0;
}

int cli_rm(struct cli *c, struct larder_err *e)
{
    return each_entry(c, FRAME_RM, "removed", e);
}

int cli_pin(struct cli *c, struct larder_err *e)
{
    return each_entry(c, FRAME_PIN, c->opt[OPT_OFF] ? "unpinned" : "pinned", e);
}

/* ---- verify */

static void verify_event(void *arg, const json_t *body)
{
    (void)arg;
    cli_progress("verifying", cli_num(body, "done"), cli_num(body, "of"));
}

static int report_verify(const struct cli *c, const json_t *answer)
{
    const json_t *damaged = json_object_get(answer, "damaged"), *d;
    struct larder_err e;
    char *size;
    size_t i;

    cli_progress_end();
    if (c->opt[OPT_JSON]) {
        cli_print_json(answer);
    } else {
        size = cli_size(c, cli_num(answer, "bytes"));
        printf(c->tty ? "%" PRIu64 " entries, %s read and verified, %zu damaged\n"
                      : "%" PRIu64 "\t%s\t%zu\n",
               cli_num(answer, "checked"), size, json_array_size(damaged));
        mem_free(size);
    }
    json_array_foreach (damaged, i, d) {
        char *what = cli_text("%s", *cli_str(d, "name") ? cli_str(d, "name") : cli_str(d, "key"));

        larder_fail(&e, LARDER_EDAMAGED, "%s", cli_str(d, "message"));
        cli_print_error(what, &e);
        mem_free(what);
    }
    return json_array_size(damaged) ? CLI_REPORTED : 0;
}

int cli_verify(struct cli *c, struct larder_err *e)
{
    /* However long the store takes to read. */
    struct larder_request q = {
        .type = FRAME_VERIFY, .fd = -1, .on_event = verify_event, .timeout_ms = -1};
    json_t *answer = NULL;
    int rc = cli_connect(c, e);

    if (rc)
        return rc;
    q.body = c->n_args ? entry_body(c->arg[0], e) : json_object();
    if (!q.body && c->n_args)
        return e->code;
    rc = larder_ask_json(c->conn, &q, &answer, NULL, e);
    if (!rc)
        rc = report_verify(c, answer);
    json_decref(answer);
    return rc;
}

/* ---- explain-miss */

/* The request for a document; the descriptor is in q->fd. */
static int explain_document(const struct cli *c, struct larder_request *q, struct larder_err *e)
{
    struct larder_document d;
    int rc = cli_document(c, OPT_FILE, OPT_TOKENS_FILE, &d, e);

    if (rc)
        return rc;
    rc = larder_document_file(&d, &q->fd, e);
    q->body = json_pack("{s:s, s:I}", "source", d.source, "bytes", (json_int_t)d.len);
    mem_free((void *)(uintptr_t)d.bytes);
    if (rc) {
        json_decref(q->body);
        q->body = NULL;
    }
    return rc;
}

/* What goes with the reason: how the stored entry differs, when it went, which job. */
static char *reason_detail(const struct cli *c, const json_t *answer)
{
    if (*cli_str(answer, "have"))
        return cli_text("%s", cli_str(answer, "have"));
    if (cli_num(answer, "when"))
        return cli_time(c, cli_num(answer, "when"));
    if (cli_num(answer, "job"))
        return cli_text(c->tty ? "job %" PRIu64 : "%" PRIu64, cli_num(answer, "job"));
    return cli_text("%s", "");
}

static void print_reason(const struct cli *c, const json_t *answer)
{
    char *text, *detail;

    if (c->opt[OPT_JSON]) {
        cli_print_json(answer);
        return;
    }
    text = cli_text("%s", cli_str(answer, "message"));
    detail = reason_detail(c, answer);
    if (c->tty)
        printf("%s: %s%s%s%s\n", cli_str(answer, "reason"), text, *detail ? " (" : "", detail,
               *detail ? ")" : "");
    else
        printf("%s\t%s\t%s\n", cli_str(answer, "reason"), text, detail);
    mem_free(text);
    mem_free(detail);
}

int cli_explain(struct cli *c, struct larder_err *e)
{
    struct larder_request q = {.type = FRAME_EXPLAIN, .fd = -1, .timeout_ms = CLI_WORK_MS};
    bool file = c->opt[OPT_FILE] || c->opt[OPT_TOKENS_FILE];
    json_t *answer = NULL;
    int rc;

    if (file == (c->n_args == 1) || (c->opt[OPT_FILE] && c->opt[OPT_TOKENS_FILE]))
        return cli_usage(e, "explain-miss needs one of NAME, --file and --tokens");
    rc = file ? explain_document(c, &q, e) : larder_ref_body(c->arg[0], &q.body, e);
    if (!rc)
        rc = cli_connect(c, e);
    if (rc) {
        json_decref(q.body);
    } else {
        q.body = larder_body_str(q.body, "model", c->opt[OPT_MODEL]);
        q.body = larder_body_str(q.body, "policy", c->opt[OPT_POLICY]);
        q.body = larder_body_str(q.body, "template", c->opt[OPT_TEMPLATE]);
        q.body = larder_body_str(q.body, "namespace", c->opt[OPT_NAMESPACE]);
        rc = larder_ask_json(c->conn, &q, &answer, NULL, e);
    }
    if (q.fd >= 0)
        close(q.fd);
    if (!rc)
        print_reason(c, answer);
    json_decref(answer);
    return rc;
}
