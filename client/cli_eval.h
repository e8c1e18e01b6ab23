/* cli_eval.h - what the files of `larder eval` share: tasks, results, what is said of them.
 *
 * Purpose    cli_eval.c is the command, cli_eval_run.c measures with the engine what
 *            cli_eval_entry.c has stored, cli_eval_task.c reads tasks, cli_eval_result.c keeps
 *            results, cli_eval_table.c sums them up, cli_eval_write.c and cli_eval_page.c print.
 * Ownership  x_done() frees what x_read()/x_open()/x_make() filled, and accepts zeroed structs.
 * Threads    One.
 * Errors     As cli.h.
 */
#ifndef LARDER_CLI_EVAL_H
#define LARDER_CLI_EVAL_H

#include "cli.h"

#define EVAL_FULL "full" /* the policy that all others are compared with */
#define EVAL_SPARE 4u    /* tokens generated beyond the known answer */

/* ---- tasks (cli_eval_task.c) */

struct eval_task {
    json_t *o;      /* checked: id, gold, tail_ids or question, ...; owned */
    const char *id; /* borrowed from it */
    unsigned line;
    size_t doc;
};

struct eval_doc {
    char name[17]; /* of its token ids; what results call it */
    uint32_t *ids; /* NULL until the text is tokenised */
    size_t n_ids;
    char *text;            /* or NULL */
    size_t first, n_tasks; /* in the set's list */
};

/* A string that is to become token ids. */
struct eval_want {
    enum { EVAL_WANT_DOC, EVAL_WANT_TAIL, EVAL_WANT_GOLD } what;
    size_t at; /* document or task */
};

struct eval_set {
    struct eval_doc *doc; /* in the file's order */
    size_t n_docs;
    struct eval_task *task; /* document by document */
    size_t n_tasks;
    struct eval_want *want;
    size_t n_wants, n_got;
};

/* `name` is for messages, which say in which line what is wrong. At most `limit` documents. */
int eval_set_parse(struct eval_set *s, const char *name, const char *text, size_t len, size_t limit,
                   struct larder_err *e);
int eval_set_read(struct eval_set *s, const char *path, size_t limit, struct larder_err *e);
void eval_set_done(struct eval_set *s);

/* What has to be tokenised, as `larder-prefill tokenize --strings` reads it; NULL: nothing. The
 * answers go to eval_set_take() one by one, in order. */
char *eval_set_strings(struct eval_set *s);
int eval_set_take(struct eval_set *s, const json_t *line, struct larder_err *e);

/* Share of the known answers that occur in `text`, whatever the case (of ASCII letters). A task
 * with "any" is content with one. */
double eval_found(const struct eval_task *t, const char *text);
/* Strict where there is one answer: every token of it is the model's choice. Several come in any
 * order and are looked for in the text. */
bool eval_is_right(const struct eval_task *t, bool all_top1, const char *text);

/* ---- results (cli_eval_result.c): one JSON object a line, in a file that only grows */

struct eval_results {
    const char *path; /* borrowed */
    int fd;           /* opened by the first result that is added */
    bool midline;     /* an interrupted run left the last line unfinished */
    json_t *by_key;   /* the last one of a key counts */
};

/* `what`: an object with model, backend, dtype and isa: what computed a result. */
int eval_results_open(struct eval_results *r, const char *path, bool may_be_new,
                      struct larder_err *e);
void eval_results_done(struct eval_results *r);
/* Steals `result`; the line is in the file when the call returns. */
int eval_results_add(struct eval_results *r, json_t *result, struct larder_err *e);
/* Borrowed, or NULL. */
const json_t *eval_results_get(const struct eval_results *r, const json_t *what, const char *id,
                               const char *policy);
/* Was it measured on a stored entry? */
bool eval_result_is_stored(const json_t *result);
/* A number of a result; NAN when absent. */
double eval_number(const json_t *o, const char *key);

/* ---- what they say (cli_eval_table.c) */

struct eval_row {
    const char *policy;             /* borrowed from the section */
    size_t n, n_docs, n_full_right; /* questions, documents, questions the full cache answers */
    double kept, low, high;         /* of those, still right; interval */
    double found, kl, agree, nll;   /* means over questions */
    double rank;                    /* median of the worst rank of an answer's tokens */
    double rows, bytes, disk;       /* shares of the full cache */
    double prefill_ms, fetch_ms, certified; /* means over documents */
};

/* Do certificates order entries as measurements do? */
struct eval_ranks {
    size_t n_kl, n_lost;
    double kl, lost; /* Spearman: against measured KL, against the share of lost answers */
};

/* What one model on one kind of machine gave. */
struct eval_section {
    json_t *what, *ids, *policies; /* owned; ids and policies are arrays of strings, full first */
    struct eval_row *row;
    size_t n_rows, n_docs;
    struct eval_ranks ranks;
};

/* Takes a reference to each. */
int eval_section_make(struct eval_section *s, const struct eval_results *r, json_t *what,
                      json_t *ids, json_t *policies, uint64_t seed, struct larder_err *e);
void eval_section_done(struct eval_section *s);

/* ---- as text (cli_eval_write.c) */

/* A table's cells: column names, and the text of one in a row (the caller's). */
#define EVAL_COLUMNS 16
extern const char *const eval_column[EVAL_COLUMNS];
char *eval_cell(const struct eval_row *row, unsigned column);

/* One sentence each; the caller's. */
char *eval_title(const struct eval_section *s);
char *eval_ranks_text(const struct eval_section *s);

void eval_print(const struct eval_section *s, const struct cli *c);
json_t *eval_json(const struct eval_section *s);
void eval_write_markdown(FILE *f, const struct eval_section *s, size_t n);
void eval_write_csv(FILE *f, const struct eval_section *s, size_t n);

/* ---- cli_eval_page.c */

void eval_write_html(FILE *f, const struct eval_section *s, size_t n, const struct eval_results *r);

/* ---- measuring (cli_eval_run.c) */

struct eval_options {
    const char *tasks, *model, *tmpl, *ns;
    uint64_t limit, max_new; /* 0: no limit; by the answers */
    bool keep;
};

struct eval_outcome {
    json_t *what, *ids, *policies; /* for a section; the caller's */
    size_t n_failed;               /* documents, or a policy of one */
};

/* Measure what `r` does not have. LARDER_ECANCELED: interrupted; what is measured is in the file,
 * and nothing that was stored for it is left. */
int eval_measure(struct cli *c, const struct eval_options *o, struct eval_results *r,
                 struct eval_outcome *ret, struct larder_err *e);

#endif
