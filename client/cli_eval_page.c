/* cli_eval_page.c - results as one HTML page that refers to nothing else.
 *
 * The one idea: tables and drawings (cli_eval_draw.c) are printed as they are thought of, with
 * no script and no style but the page's own; text goes out through page_esc() only. */
#include "cli_eval_page.h"

#include <string.h>

#include "mem.h"

static const char head[] =
    "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
    "<title>What stored caches still answer</title><style>\n"
    "body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 80em; margin: 2em auto;"
    " padding: 0 1em }\n"
    "table { border-collapse: collapse; margin: 1em 0 }\n"
    "th, td { padding: .25em .6em; text-align: right; border-bottom: 1px solid #ddd }\n"
    "th:first-child, td:first-child { text-align: left }\n"
    "code { font-size: .92em } .note { color: #666 } svg text { font: 12px system-ui, sans-serif "
    "}\n"
    ".maps { display: flex; flex-wrap: wrap; gap: 1.5em }\n"
    "</style></head><body>\n<h1>What stored caches still answer</h1>\n"
    "<p>Each document was pruned before any of its questions was known. Kept right: share of the "
    "questions that the full cache answers right and the pruned one still does; right means that "
    "every token of the answer is the model's first choice given those before it. The interval is "
    "a 95 % bootstrap over documents. KL and top-1 are against the full cache, on the answer's "
    "tokens. Found: share of answers that occur in the generated text. Rank: of the answer's worst "
    "token, median. Bytes: of the kept rows as stored, against all rows in bf16; on disk, after "
    "compression.</p>\n";

/* ---- text */

void page_esc(FILE *f, const char *s)
{
    for (; *s; s++) {
        if (*s == '<')
            fputs("&lt;", f);
        else if (*s == '>')
            fputs("&gt;", f);
        else if (*s == '&')
            fputs("&amp;", f);
        else if (*s == '"')
            fputs("&quot;", f);
        else
            fputc(*s, f);
    }
}

/* Print an owned text. */
static void esc_own(FILE *f, char *s)
{
    page_esc(f, s);
    mem_free(s);
}

/* ---- the table */

static void table(FILE *f, const struct eval_section *s)
{
    fputs("<table><tr>", f);
    for (unsigned k = 0; k < EVAL_COLUMNS; k++)
        fprintf(f, "<th>%s</th>", eval_column[k]);
    for (size_t i = 0; i < s->n_rows; i++) {
        fputs("</tr>\n<tr><td><code>", f);
        esc_own(f, eval_cell(&s->row[i], 0));
        fputs("</code></td>", f);
        for (unsigned k = 1; k < EVAL_COLUMNS; k++) {
            fputs("<td>", f);
            esc_own(f, eval_cell(&s->row[i], k));
            fputs("</td>", f);
        }
    }
    fputs("</tr></table>\n<p class=\"note\">", f);
    esc_own(f, eval_ranks_text(s));
    fputs("</p>\n", f);
}

/* ---- kinds of tasks */

static json_t *kinds_of(const struct eval_section *s, const struct eval_results *r)
{
    json_t *kinds = json_object();
    const json_t *id;
    size_t i;

    json_array_foreach (s->ids, i, id)
        json_object_set_new(
            kinds, cli_str(eval_results_get(r, s->what, json_string_value(id), EVAL_FULL), "task"),
            json_true());
    json_object_del(kinds, ""); /* there is no reference */
    return kinds;
}

static void kept_of_kind(FILE *f, const struct eval_section *s, const struct eval_results *r,
                         const char *policy, const char *kind)
{
    unsigned kept = 0, right = 0;
    const json_t *id;
    size_t i;

    json_array_foreach (s->ids, i, id) {
        const json_t *full = eval_results_get(r, s->what, json_string_value(id), EVAL_FULL);
        const json_t *mine = eval_results_get(r, s->what, json_string_value(id), policy);

        if (!mine || !cli_true(full, "right") || strcmp(cli_str(full, "task"), kind))
            continue;
        right++;
        kept += cli_true(mine, "right");
    }
    if (right)
        fprintf(f, "<td>%.0f (%u)</td>", 100.0 * kept / right, right);
    else
        fputs("<td></td>", f);
}

static void kinds_table(FILE *f, const struct eval_section *s, const struct eval_results *r)
{
    json_t *kinds = kinds_of(s, r), *unused;
    const char *kind;

    fputs("<h3>Kept right by kind of task, % (of)</h3>\n<table><tr><th>policy</th>", f);
    json_object_foreach (kinds, kind, unused) {
        fputs("<th>", f);
        page_esc(f, kind);
        fputs("</th>", f);
    }
    for (size_t i = 0; i < s->n_rows; i++) {
        fputs("</tr>\n<tr><td><code>", f);
        page_esc(f, s->row[i].policy);
        fputs("</code></td>", f);
        json_object_foreach (kinds, kind, unused)
            kept_of_kind(f, s, r, s->row[i].policy, kind);
    }
    fputs("</tr></table>\n", f);
    json_decref(kinds);
}

/* ---- the page */

void eval_write_html(FILE *f, const struct eval_section *s, size_t n, const struct eval_results *r)
{
    fputs(head, f);
    for (; n--; s++) {
        fputs("<h2>", f);
        esc_own(f, eval_title(s));
        fputs("</h2>\n", f);
        table(f, s);
        page_curves(f, s);
        kinds_table(f, s, r);
        page_maps(f, s, r);
    }
    fputs("</body></html>\n", f);
}
