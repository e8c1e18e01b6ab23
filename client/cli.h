/* cli.h - what the commands of `larder` share: options, output, files.
 *
 * Purpose    cli_main.c owns the tables of commands and options; a command gets its options
 *            parsed and a connection when it asks for one.
 * Ownership  cli_text() and cli_read_file() results are mem_free()d; a table by cli_table_print().
 * Threads    One.
 * Errors     A command returns 0, or a negative LARDER_E* with the reason in `e`; main() prints it.
 *            CLI_REPORTED: what went wrong has been printed already. Out of memory for a line of
 *            output ends the program.
 */
#ifndef LARDER_CLI_H
#define LARDER_CLI_H

#include <stdio.h>
#include <time.h>

#include "lib.h"

/* Waits: for answers out of the daemon's tables, and for answers that read an entry. */
#define CLI_SOON_MS 30000
#define CLI_WORK_MS 300000

#define CLI_REPORTED (-1000) /* exit status 1 */
#define CLI_USAGE (-1001)    /* exit status 2; the message is in `e` */

enum cli_opt {
    OPT_JSON,
    OPT_SOCKET,
    OPT_HELP,
    OPT_VERSION,
    OPT_NAME,
    OPT_NAMESPACE,
    OPT_POLICY,
    OPT_MODEL,
    OPT_TEMPLATE,
    OPT_PIN,
    OPT_WAIT,
    OPT_TOKENS_FILE,
    OPT_PREFIX,
    OPT_SHOW_TEXT,
    OPT_SHOW_TOKENS,
    OPT_OFF,
    OPT_FILE,
    OPT_DOC_TOKENS,
    OPT_QUESTION_TOKENS,
    OPT_MAX_NEW,
    OPT_IGNORE_EOS,
    OPT_DTYPE,
    OPT_BACKEND,
    OPT_THREADS,
    OPT_NO_BUILTIN,
    OPT_EXPORT,
    OPT_RESULTS,
    OPT_LIMIT,
    OPT_KEEP,
    OPT_SEED,
    OPT_CSV,
    OPT_MARKDOWN,
    OPT_HTML,
    OPT_FORMAT,
    OPT_OUTPUT,
    OPT_FORCE,
    OPT_PACKED,
    N_OPTS
};

#define CLI_MAX_POLICIES 32

struct cli {
    const char *opt[N_OPTS]; /* value, "" for a flag that is given, NULL when absent */
    const char *policy[CLI_MAX_POLICIES]; /* every --policy, in order */
    int n_policies;
    const char **arg;        /* what is left: [n_args] */
    int n_args;
    bool tty;            /* stdout is a terminal and --json is off: tables, readable units */
    struct larder *conn; /* see cli_connect() */
};

typedef int cli_command(struct cli *c, struct larder_err *e);

cli_command cli_put, cli_ls, cli_show, cli_rm, cli_pin, cli_ask, cli_trace, cli_status, cli_verify,
    cli_explain, cli_jobs, cli_cancel, cli_models, cli_calibrate, cli_show_model,
    cli_eval, cli_export, cli_import;

/* c->conn, connected on first use. */
int cli_connect(struct cli *c, struct larder_err *e);

/* Connect and ask a question without descriptor. */
int cli_ask_daemon(struct cli *c, enum frame_type type, json_t *body, int timeout_ms, json_t **ret,
                   struct larder_err *e);

/* Add to an LARDER_ENOTFOUND what a reference with a slash may have been meant as. Returns rc. */
int cli_hint_namespace(int rc, const char *ref, struct larder_err *e);

/* CLI_USAGE with a message. */
int cli_usage(struct larder_err *e, const char *fmt, ...) LARDER_PRINTF(2, 3);

/* One line to stderr: "larder: [context: ]message (LARDER_EXXX)". */
void cli_print_error(const char *context, const struct larder_err *e);

/* The path of a configured model, or the path itself when `model` is one; NULL: the only one that
 * is configured. *ret_model (may be NULL) is its object from STATUS, NULL for a path. */
int cli_model_path(struct cli *c, const char *model, char **ret_path, json_t **ret_model,
                   struct larder_err *e);

/* ---- cli_model.c */

/* PROFILE: store `text` (NULL: ask only) for a configured model; *ret is the daemon's answer. */
int cli_profile(struct cli *c, const char *model, const char *text, json_t **ret,
                struct larder_err *e);

/* A profile as it is stored. */
char *cli_profile_text(const json_t *profile);

/* ---- cli_output.c */

/* printf into new memory. */
char *cli_text(const char *fmt, ...) LARDER_PRINTF(1, 2);

/* One JSON value on one line; steals nothing. */
void cli_print_json(const json_t *j);

/* "12.3 MiB" on a terminal, else the bare number. */
char *cli_size(const struct cli *c, uint64_t bytes);
/* "12.3 MiB (8.1 %)" of `whole` on a terminal. */
char *cli_share(const struct cli *c, uint64_t bytes, uint64_t whole);
/* "3.2 s" on a terminal, else milliseconds. */
char *cli_duration(const struct cli *c, uint64_t ms);
/* Local time on a terminal, else Unix seconds. */
char *cli_time(const struct cli *c, uint64_t unix_seconds);
/* A key: 12 digits on a terminal, else all. */
char *cli_key(const struct cli *c, const char *hex);

/* Milliseconds since a time of CLOCK_MONOTONIC. */
double cli_ms_since(const struct timespec *t0);

/* Members of a received object, for display: "" or 0 when absent or of another type. */
const char *cli_str(const json_t *j, const char *key);
uint64_t cli_num(const json_t *j, const char *key);
bool cli_true(const json_t *j, const char *key);

/* Lines of cells, owned by the table; the first line is the heading and is printed on a terminal
 * only. Cells that begin with a digit are set flush right. */
#define CLI_MAX_COLS 20
struct cli_table {
    unsigned n_cols;
    size_t n_cells, cap;
    char **cell;
};
void cli_table_start(struct cli_table *t, unsigned n_cols, const char *const *heading);
void cli_table_add(struct cli_table *t, char *cell);            /* takes it over */
void cli_table_print(struct cli_table *t, const struct cli *c); /* and frees it */

/* "label: value" lines: aligned on a terminal, tab-separated elsewhere. Takes `value` over. */
void cli_pair(const struct cli *c, const char *label, char *value);

/* A progress line on stderr, if that is a terminal: text and a bar of done/of. */
void cli_progress(const char *text, uint64_t done, uint64_t of);
void cli_progress_end(void);

/* ---- cli_input.c */

/* A whole file ("-": standard input). */
int cli_read_file(const char *path, char **ret, size_t *ret_len, struct larder_err *e);

/* A file of whitespace-separated token ids. */
int cli_read_tokens(const char *path, uint32_t **ret, size_t *ret_n, struct larder_err *e);

/* A legal entry name made of `path`: other bytes become '_'. LARDER_ETOOBIG. */
int cli_name_of(const char *path, char out[NAME_MAX_ENTRY + 1], struct larder_err *e);

/* Part of a path after the last slash. */
const char *cli_basename(const char *path);

/* A document argument for a request: --file or --tokens. Takes bytes over. */
int cli_document(const struct cli *c, enum cli_opt file, enum cli_opt tokens,
                 struct larder_document *ret, struct larder_err *e);

#endif
