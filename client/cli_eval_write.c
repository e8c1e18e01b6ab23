/* cli_eval_write.c - the rows of a section as a table on a terminal, Markdown, CSV and JSON.
 *
 * The one idea: one list of columns for people (rounded, in percent) and one of fields for
 * programs (from 0 to 1, under stable names); each form walks one of them. */
#include "cli_eval.h"

#include <math.h>
#include <string.h>

#include "mem.h"

/* ---- cells */

static char *number(double x, int digits)
{
    return isnan(x) ? cli_text("%s", "") : cli_text("%.*f", digits, x);
}

static char *interval(const struct eval_row *r)
{
    return isnan(r->low) ? cli_text("%s", "") : cli_text("%.0f-%.0f", 100 * r->low, 100 * r->high);
}

const char *const eval_column[EVAL_COLUMNS] = {
    "policy",    "questions",  "full right", "kept right %", "95 %",   "found %",
    "KL",        "top-1 %",    "NLL",        "rank",         "rows %", "bytes %",
    "on disk %", "prefill ms", "fetch ms",   "certified KL",
};

char *eval_cell(const struct eval_row *r, unsigned column)
{
    switch (column) {
    case 0:
        return cli_text("%s", r->policy);
    case 1:
        return cli_text("%zu", r->n);
    case 2:
        return cli_text("%zu", r->n_full_right);
    case 3:
        return number(100 * r->kept, 0);
    case 4:
        return interval(r);
    case 5:
        return number(100 * r->found, 0);
    case 6:
        return number(r->kl, 3);
    case 7:
        return number(100 * r->agree, 0);
    case 8:
        return number(r->nll, 3);
    case 9:
        return number(r->rank, 0);
    case 10:
        return number(100 * r->rows, 1);
    case 11:
        return number(100 * r->bytes, 1);
    case 12:
        return number(100 * r->disk, 1);
    case 13:
        return number(r->prefill_ms, 0);
    case 14:
        return number(r->fetch_ms, 1);
    default:
        return number(r->certified, 4);
    }
}

char *eval_title(const struct eval_section *s)
{
    size_t n = s->n_rows ? s->row[0].n : 0;

    for (size_t i = 1; i < s->n_rows; i++)
        n = s->row[i].n > n ? s->row[i].n : n;
    return cli_text("%zu questions on %zu documents; model %.16s..., %s, %s, %s", n, s->n_docs,
                    cli_str(s->what, "model"), cli_str(s->what, "backend"),
                    cli_str(s->what, "dtype"), cli_str(s->what, "isa"));
}

static char *rho(double x)
{
    return isnan(x) ? cli_text("%s", "no rank correlation") : cli_text("rank correlation %.2f", x);
}

char *eval_ranks_text(const struct eval_section *s)
{
    char *kl = rho(s->ranks.kl), *lost = rho(s->ranks.lost), *text;

    if (s->ranks.n_kl)
        text = cli_text("certified KL against measured KL: %s over %zu entries; against lost "
                        "answers: %s over %zu",
                        kl, s->ranks.n_kl, lost, s->ranks.n_lost);
    else
        text = cli_text("%s", "no entry has a certificate");
    mem_free(kl);
    mem_free(lost);
    return text;
}

/* ---- printed */

void eval_print(const struct eval_section *s, const struct cli *c)
{
    char *title = eval_title(s), *ranks = eval_ranks_text(s);
    struct cli_table t;

    if (c->tty)
        printf("%s\n\n", title);
    cli_table_start(&t, EVAL_COLUMNS, eval_column);
    for (size_t i = 0; i < s->n_rows; i++)
        for (unsigned k = 0; k < EVAL_COLUMNS; k++)
            cli_table_add(&t, eval_cell(&s->row[i], k));
    cli_table_print(&t, c);
    if (c->tty)
        printf("\n%s\n", ranks);
    mem_free(title);
    mem_free(ranks);
}

void eval_write_markdown(FILE *f, const struct eval_section *s, size_t n)
{
    for (; n--; s++) {
        char *title = eval_title(s), *ranks = eval_ranks_text(s);

        fprintf(f, "%s\n\n|", title);
        for (unsigned k = 0; k < EVAL_COLUMNS; k++)
            fprintf(f, " %s |", eval_column[k]);
        fputs("\n|---|", f);
        for (unsigned k = 1; k < EVAL_COLUMNS; k++)
            fputs("---:|", f);
        for (size_t i = 0; i < s->n_rows; i++) {
            fputs("\n|", f);
            for (unsigned k = 0; k < EVAL_COLUMNS; k++) {
                char *cell = eval_cell(&s->row[i], k);

                fprintf(f, k ? " %s |" : " `%s` |", cell);
                mem_free(cell);
            }
        }
        fprintf(f, "\n\n%s\n%s", ranks, n ? "\n" : "");
        mem_free(title);
        mem_free(ranks);
    }
}

/* ---- for programs: numbers from 0 to 1, under stable names */

#define FIELDS(X)                                                                                  \
    X(kept_right, kept)                                                                            \
    X(low, low)                                                                                    \
    X(high, high)                                                                                  \
    X(kl, kl)                                                                                      \
    X(top1_agree, agree)                                                                           \
    X(found, found)                                                                                \
    X(nll, nll)                                                                                    \
    X(rank, rank)                                                                                  \
    X(rows, rows)                                                                                  \
    X(bytes, bytes)                                                                                \
    X(disk, disk)                                                                                  \
    X(prefill_ms, prefill_ms)                                                                      \
    X(fetch_ms, fetch_ms)                                                                          \
    X(cert_kl, certified)

static json_t *number_or_null(double x)
{
    return isnan(x) ? json_null() : json_real(x);
}

static json_t *row_json(const struct eval_row *r)
{
    json_t *j =
        json_pack("{s:s, s:I, s:I, s:I}", "policy", r->policy, "n", (json_int_t)r->n, "documents",
                  (json_int_t)r->n_docs, "full_right", (json_int_t)r->n_full_right);

#define X(name, member) json_object_set_new(j, #name, number_or_null(r->member));
    FIELDS(X)
#undef X
    return j;
}

json_t *eval_json(const struct eval_section *s)
{
    json_t *j = json_copy(s->what), *rows = json_array();

    for (size_t i = 0; i < s->n_rows; i++)
        json_array_append_new(rows, row_json(&s->row[i]));
    json_object_set_new(j, "policies", rows);
    json_object_set_new(j, "certificates",
                        json_pack("{s:I, s:o, s:I, s:o}", "entries", (json_int_t)s->ranks.n_kl,
                                  "kl", number_or_null(s->ranks.kl), "entries_lost",
                                  (json_int_t)s->ranks.n_lost, "lost",
                                  number_or_null(s->ranks.lost)));
    return j;
}

static const char *const what_keys[4] = {"model", "backend", "dtype", "isa"};

static void csv_text(FILE *f, const char *s)
{
    fputc('"', f);
    for (; *s; s++)
        fputs(*s == '"' ? "\"\"" : (char[]){*s, '\0'}, f);
    fputc('"', f);
}

static void csv_number(FILE *f, double x)
{
    if (isnan(x))
        fputc(',', f);
    else
        fprintf(f, ",%.6g", x);
}

void eval_write_csv(FILE *f, const struct eval_section *s, size_t n)
{
    fputs("policy,n,documents,full_right", f);
#define X(name, member) fputs("," #name, f);
    FIELDS(X)
#undef X
    for (int k = 0; k < 4; k++)
        fprintf(f, k < 3 ? ",%s" : ",%s\n", what_keys[k]);
    for (; n--; s++) {
        for (size_t i = 0; i < s->n_rows; i++) {
            const struct eval_row *r = &s->row[i];

            csv_text(f, r->policy);
            fprintf(f, ",%zu,%zu,%zu", r->n, r->n_docs, r->n_full_right);
#define X(name, member) csv_number(f, r->member);
            FIELDS(X)
#undef X
            for (int k = 0; k < 4; k++) {
                fputc(',', f);
                csv_text(f, cli_str(s->what, what_keys[k]));
            }
            fputc('\n', f);
        }
    }
}
