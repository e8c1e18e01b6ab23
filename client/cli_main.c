/* cli_main.c - `larder`: the tables of commands and options, and main().
 *
 * The one idea: one table says what each command takes; parsing, usage lines and --help
 * follow from it. A command works, or fails with one line on stderr.
 */
#include "cli.h"

#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct option_row {
    const char *name;
    const char *value; /* placeholder; NULL for a flag */
    const char *help;
};

static const struct option_row options[N_OPTS] = {
    [OPT_JSON] = {"json", NULL, "print JSON (stable; see larder(1))"},
    [OPT_SOCKET] = {"socket", "PATH", "larderd's socket, also -S; default $LARDER_SOCKET"},
    [OPT_HELP] = {"help", NULL, "this text, also -h"},
    [OPT_VERSION] = {"version", NULL, "the version, also -V"},
    [OPT_NAME] = {"name", "NAME", "name of the entry; default: made of the file's name"},
    [OPT_NAMESPACE] = {"namespace", "NS", "namespace; default: 'default'"},
    [OPT_POLICY] = {"policy", "P", "pruning policy, such as 'asl,rows=25%'; default: the model's"},
    [OPT_MODEL] = {"model", "M", "a configured model (or, for the engine, a file's path)"},
    [OPT_TEMPLATE] = {"template", "T", "prompt template; default: the model's"},
    [OPT_PIN] = {"pin", NULL, "never evict the entry"},
    [OPT_WAIT] = {"wait", NULL, "wait until everything is stored"},
    [OPT_TOKENS_FILE] = {"tokens", "FILE", "the document as whitespace-separated token ids"},
    [OPT_PREFIX] = {"prefix", "TEXT", "only names that begin so"},
    [OPT_SHOW_TEXT] = {"text", NULL, "the rendered text instead"},
    [OPT_SHOW_TOKENS] = {"tokens", NULL, "the token ids instead"},
    [OPT_OFF] = {"off", NULL, "unpin"},
    [OPT_FILE] = {"file", "FILE", "the document, as text ('-': standard input)"},
    [OPT_DOC_TOKENS] = {"doc-tokens", "FILE", "the document as whitespace-separated token ids"},
    [OPT_QUESTION_TOKENS] = {"tokens", "FILE", "the question as token ids, used as they are"},
    [OPT_MAX_NEW] = {"max-new", "N", "generate at most N tokens"},
    [OPT_IGNORE_EOS] = {"ignore-eos", NULL, "generate on after the end-of-text token"},
    [OPT_DTYPE] = {"dtype", "TYPE", "auto, bf16 or f32"},
    [OPT_BACKEND] = {"backend", "NAME", "ref, cpu or cuda"},
    [OPT_THREADS] = {"threads", "N", "threads; default: one per processor"},
    [OPT_NO_BUILTIN] = {"no-builtin", NULL, "measure on the given texts alone"},
    [OPT_EXPORT] = {"export", "FILE", "write the profile to a file ('-': standard output)"},
    [OPT_RESULTS] = {"results", "FILE", "what was measured, and is not measured again"},
    [OPT_LIMIT] = {"limit", "N", "only the first N documents"},
    [OPT_KEEP] = {"keep", NULL, "leave the entries stored"},
    [OPT_SEED] = {"seed", "N", "of the intervals; default: 1"},
    [OPT_CSV] = {"csv", "FILE", "write the table as CSV"},
    [OPT_MARKDOWN] = {"markdown", "FILE", "write the table as Markdown"},
    [OPT_FORMAT] = {"format", "F", "safetensors (default), hf-npz or image"},
    [OPT_OUTPUT] = {"output", "FILE", "where to, also -o ('-': standard output)"},
    [OPT_FORCE] = {"force", NULL, "replace the file if it exists"},
    [OPT_PACKED] = {"packed", NULL, "int8 and int4 rows as they are stored, not as bf16"},
    [OPT_HTML] = {"html", "FILE", "write a page with drawings"},
};

#define MAX_COMMAND_OPTS 16
#define NONE N_OPTS /* ends a list */

struct command_row {
    const char *name;
    const char *args;
    const char *help;
    cli_command *run;
    int min_args, max_args; /* max -1: any number */
    enum cli_opt opts[MAX_COMMAND_OPTS];
};

/* One command, one paragraph. */
/* clang-format off */
static const struct command_row commands[] = {
    {"put", "FILE|DIR|JSONL...", "Store documents: prefill them once, keep the pruned cache.",
     cli_put, 0, -1,
     {OPT_NAME, OPT_NAMESPACE, OPT_POLICY, OPT_MODEL, OPT_TEMPLATE, OPT_PIN, OPT_WAIT,
      OPT_TOKENS_FILE, NONE}},
    {"ls", "", "List stored entries.", cli_ls, 0, 0, {OPT_NAMESPACE, OPT_PREFIX, NONE}},
    {"show", "NAME|KEY", "Describe an entry.", cli_show, 1, 1,
     {OPT_SHOW_TEXT, OPT_SHOW_TOKENS, NONE}},
    {"rm", "NAME|KEY...", "Delete entries.", cli_rm, 1, -1, {NONE}},
    {"pin", "NAME|KEY...", "Protect entries from eviction.", cli_pin, 1, -1, {OPT_OFF, NONE}},
    {"ask", "NAME|KEY [QUESTION], or --file FILE [QUESTION]",
     "Answer a question from a stored cache, or after a full prefill.", cli_ask, 0, 2,
     {OPT_FILE, OPT_DOC_TOKENS, OPT_MODEL, OPT_POLICY, OPT_TEMPLATE, OPT_QUESTION_TOKENS,
      OPT_MAX_NEW, OPT_IGNORE_EOS, OPT_DTYPE, OPT_BACKEND, OPT_THREADS, NONE}},
    {"trace", "--file FILE | --tokens FILE",
     "Run prefill and selection without storing; print what would be kept.", cli_trace, 0, 0,
     {OPT_FILE, OPT_TOKENS_FILE, OPT_MODEL, OPT_POLICY, OPT_TEMPLATE, OPT_DTYPE, OPT_BACKEND,
      OPT_THREADS, NONE}},
    {"status", "", "What larderd is doing.", cli_status, 0, 0, {NONE}},
    {"verify", "[NAME|KEY]", "Read and hash everything again.", cli_verify, 0, 1, {NONE}},
    {"explain-miss", "NAME|KEY, or --file FILE", "Say why a document is not served.", cli_explain,
     0, 1,
     {OPT_FILE, OPT_TOKENS_FILE, OPT_MODEL, OPT_POLICY, OPT_TEMPLATE, OPT_NAMESPACE, NONE}},
    {"jobs", "", "List queued, running and recent jobs.", cli_jobs, 0, 0, {NONE}},
    {"cancel", "JOB...", "Cancel jobs.", cli_cancel, 1, -1, {NONE}},
    {"models", "", "List the configured models.", cli_models, 0, 0, {NONE}},
    {"calibrate", "MODEL [TEXT...]", "Measure what a model's heads need, for policies that ask.",
     cli_calibrate, 1, -1, {OPT_NO_BUILTIN, OPT_TEMPLATE, OPT_THREADS, NONE}},
    {"show-model", "MODEL", "Describe a model and its profile.", cli_show_model, 1, 1,
     {OPT_EXPORT, NONE}},
    {"eval", "[TASKS.jsonl]", "Measure what stored caches still answer.", cli_eval, 0, 1,
     {OPT_POLICY, OPT_MODEL, OPT_TEMPLATE, OPT_NAMESPACE, OPT_LIMIT, OPT_MAX_NEW, OPT_THREADS,
      OPT_KEEP, OPT_RESULTS, OPT_SEED, OPT_CSV, OPT_MARKDOWN, OPT_HTML, NONE}},
    {"export", "NAME|KEY", "Write an entry to a file.", cli_export, 1, 1,
     {OPT_FORMAT, OPT_OUTPUT, OPT_FORCE, OPT_PACKED, NONE}},
    {"import", "FILE", "Store an entry that export wrote as safetensors.", cli_import, 1, 1,
     {OPT_NAME, OPT_NAMESPACE, NONE}},
};
/* clang-format on */
#define N_COMMANDS (sizeof commands / sizeof *commands)

static const enum cli_opt common[] = {OPT_JSON, OPT_SOCKET, OPT_HELP, OPT_VERSION};
#define N_COMMON (sizeof common / sizeof *common)

/* ---- help */

static void print_option(enum cli_opt o)
{
    const struct option_row *r = &options[o];

    printf("  --%s%s%-*s %s\n", r->name, r->value ? " " : "",
           18 - (int)strlen(r->name) - (r->value ? 1 : 0), r->value ? r->value : "", r->help);
}

static void print_help(void)
{
    printf("usage: larder COMMAND [OPTION...] [ARGUMENT...]\n\n"
           "Keeps pruned KV caches of documents, made ahead of time, and answers from them.\n\n");
    for (size_t i = 0; i < N_COMMANDS; i++)
        printf("  %-14s%s\n", commands[i].name, commands[i].help);
    printf("\nEvery command takes:\n");
    for (size_t i = 0; i < N_COMMON; i++)
        print_option(common[i]);
    printf("\n'larder COMMAND --help' describes a command, larder(1) all of them.\n");
}

static void print_command_help(const struct command_row *cmd)
{
    printf("usage: larder %s%s%s%s\n\n%s\n\n", cmd->name, *cmd->args ? " " : "", cmd->args,
           " [OPTION...]", cmd->help);
    for (int i = 0; cmd->opts[i] != NONE; i++)
        print_option(cmd->opts[i]);
    for (size_t i = 0; i < N_COMMON; i++)
        print_option(common[i]);
}

/* ---- errors */

int cli_usage(struct larder_err *e, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(e->msg, sizeof e->msg, fmt, ap);
    va_end(ap);
    e->code = CLI_USAGE;
    return CLI_USAGE;
}

void cli_print_error(const char *context, const struct larder_err *e)
{
    cli_progress_end();
    fflush(stdout);
    fprintf(stderr, "larder: %s%s%s (%s)\n", context ? context : "", context ? ": " : "", e->msg,
            larder_status_name(e->code));
}

/* The exit status for a command's result. */
static int conclude(const char *command, int rc, const struct larder_err *e)
{
    if (rc == CLI_USAGE) {
        fprintf(stderr, "larder: %s; see larder %s%s--help\n", e->msg, command ? command : "",
                command ? " " : "");
        return 2;
    }
    if (rc && rc != CLI_REPORTED)
        cli_print_error(NULL, e);
    if (!rc && (fflush(stdout) || ferror(stdout))) {
        fprintf(stderr, "larder: cannot write the output (LARDER_EIO)\n");
        return 1;
    }
    return rc ? 1 : 0;
}

/* ---- the connection */

int cli_connect(struct cli *c, struct larder_err *e)
{
    return c->conn ? 0 : larder_connect(&c->conn, c->opt[OPT_SOCKET], CLI_SOON_MS, e);
}

int cli_ask_daemon(struct cli *c, enum frame_type type, json_t *body, int timeout_ms, json_t **ret,
                   struct larder_err *e)
{
    int rc = cli_connect(c, e);

    if (rc) {
        json_decref(body);
        return rc;
    }
    return larder_ask_plain(c->conn, type, body, timeout_ms, ret, e);
}

int cli_hint_namespace(int rc, const char *ref, struct larder_err *e)
{
    const char *slash = strchr(ref, '/');
    size_t n = strlen(e->msg);

    /* The names of a directory's files have slashes of their own. */
    if (rc == LARDER_ENOTFOUND && slash && strncmp(ref, "default/", 8))
        snprintf(e->msg + n, sizeof e->msg - n,
                 "; '%.*s' was taken as the namespace, in the default one it is default/%.200s",
                 (int)(slash - ref < 60 ? slash - ref : 60), ref, ref);
    return rc;
}

/* ---- parsing */

static bool takes(const struct command_row *cmd, enum cli_opt o)
{
    for (size_t i = 0; i < N_COMMON; i++)
        if (common[i] == o)
            return true;
    for (int i = 0; cmd && cmd->opts[i] != NONE; i++)
        if (cmd->opts[i] == o)
            return true;
    return false;
}

/* getopt_long()'s table for one command (NULL: what may precede one). */
static void long_options(const struct command_row *cmd, struct option out[N_OPTS + 1])
{
    int n = 0;

    for (int o = 0; o < N_OPTS; o++)
        if (takes(cmd, (enum cli_opt)o))
            out[n++] = (struct option){
                options[o].name, options[o].value ? required_argument : no_argument, NULL, 256 + o};
    memset(&out[n], 0, sizeof out[n]);
}

/* '+': what precedes the command stops at it. ':': say which value is missing. */
static const char *short_options(const struct command_row *cmd)
{
    if (!cmd)
        return "+:S:hV";
    return takes(cmd, OPT_OUTPUT) ? ":S:o:hV" : ":S:hV";
}

/* Read options into c->opt; optind is then at the first argument. */
static int parse(struct cli *c, const struct command_row *cmd, int argc, char **argv,
                 struct larder_err *e)
{
    struct option table[N_OPTS + 1];
    int v;

    long_options(cmd, table);
    opterr = 0;
    while ((v = getopt_long(argc, argv, short_options(cmd), table, NULL)) != -1) {
        if (v == '?')
            return cli_usage(e, "unknown option '%.64s'", argv[optind - 1]);
        if (v == ':')
            return cli_usage(e, "option '%.64s' needs a value", argv[optind - 1]);
        if (v == 'S')
            v = 256 + OPT_SOCKET;
        else if (v == 'o')
            v = 256 + OPT_OUTPUT;
        else if (v == 'h')
            v = 256 + OPT_HELP;
        else if (v == 'V')
            v = 256 + OPT_VERSION;
        c->opt[v - 256] = optarg ? optarg : "";
        if (v - 256 == OPT_POLICY && c->n_policies == CLI_MAX_POLICIES)
            return cli_usage(e, "more than %d times --policy", CLI_MAX_POLICIES);
        if (v - 256 == OPT_POLICY)
            c->policy[c->n_policies++] = optarg;
    }
    return 0;
}

static const struct command_row *find_command(const char *name)
{
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (!strcmp(commands[i].name, name))
            return &commands[i];
    return NULL;
}

static int check_arguments(const struct cli *c, const struct command_row *cmd, struct larder_err *e)
{
    if (c->n_args < cmd->min_args)
        return cli_usage(e, "%s needs %s", cmd->name, cmd->args);
    if (cmd->max_args >= 0 && c->n_args > cmd->max_args)
        return cli_usage(e, "unexpected argument '%.64s'", c->arg[cmd->max_args]);
    return 0;
}

static int run_command(struct cli *c, const struct command_row *cmd, int argc, char **argv)
{
    struct larder_err e = {0, ""};
    int rc;

    optind = 0; /* start over, with the command's own table */
    rc = parse(c, cmd, argc, argv, &e);
    if (!rc && c->opt[OPT_HELP]) {
        print_command_help(cmd);
        return 0;
    }
    c->arg = (const char **)argv + optind;
    c->n_args = argc - optind;
    c->tty = isatty(STDOUT_FILENO) && !c->opt[OPT_JSON];
    if (!rc)
        rc = check_arguments(c, cmd, &e);
    if (!rc)
        rc = cmd->run(c, &e);
    cli_progress_end();
    larder_close(c->conn);
    return conclude(cmd->name, rc, &e);
}

int main(int argc, char **argv)
{
    const struct command_row *cmd = NULL;
    struct larder_err e = {0, ""};
    struct cli c;
    int rc;

    memset(&c, 0, sizeof c);
    signal(SIGPIPE, SIG_DFL);
    rc = parse(&c, NULL, argc, argv, &e);
    if (rc)
        return conclude(NULL, rc, &e);
    if (c.opt[OPT_VERSION]) {
        printf("larder %s\n", larder_version());
        return 0;
    }
    if (c.opt[OPT_HELP] || (optind < argc && !strcmp(argv[optind], "help"))) {
        print_help();
        return 0;
    }
    if (optind >= argc)
        return conclude(NULL, cli_usage(&e, "no command given"), &e);
    cmd = find_command(argv[optind]);
    if (!cmd)
        return conclude(NULL, cli_usage(&e, "no command '%.64s'", argv[optind]), &e);
    return run_command(&c, cmd, argc - optind, argv + optind);
}
