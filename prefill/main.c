/* main.c - larder-prefill: the engine as a program.
 *
 * The one idea: a table of subcommands and a table of options; a command states by a
 * bit mask which options it takes, and help, usage and parsing all come from there.
 * Errors end as one line on standard error here and nowhere else. */
#include "main_common.h"

#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROGRAM "larder-prefill"
#define BIT(k) (1ull << OPTION_##k)
#define ENGINE_BITS (BIT(BACKEND) | BIT(DTYPE) | BIT(THREADS) | BIT(STREAM) | BIT(HELP))

static const struct command commands[] = {
    {"trace", "--model PATH (--file F | --tokens F) --policy P... [--template T] [options]",
     ENGINE_BITS | BIT(MODEL) | BIT(FILE) | BIT(TOKENS) | BIT(POLICY) | BIT(TEMPLATE) |
         BIT(PROFILE) | BIT(JSON),
     main_trace},
    {"ask",
     "--model PATH (--image-fd N | --file F | --doc-tokens F) (--tokens F | --questions F | "
     "QUESTION) "
     "[options]",
     ENGINE_BITS | BIT(MODEL) | BIT(IMAGE_FD) | BIT(FILE) | BIT(DOC_TOKENS) | BIT(TOKENS) |
         BIT(QUESTIONS) | BIT(POLICY) | BIT(TEMPLATE) | BIT(MAX_NEW) | BIT(IGNORE_EOS) |
         BIT(TRACE) | BIT(PROFILE) | BIT(JSON),
     main_ask},
    {"calibrate", "--model PATH [--template T] [--no-builtin] [options] [TEXT...]",
     ENGINE_BITS | BIT(MODEL) | BIT(TEMPLATE) | BIT(NO_BUILTIN), main_calibrate},
    {"tokenize", "--model PATH (--file F | --strings F) [--template T] [--json]",
     BIT(MODEL) | BIT(FILE) | BIT(STRINGS) | BIT(TEMPLATE) | BIT(JSON) | BIT(HELP), main_tokenize},
    {"info", "--model PATH [--policy P]... [options]",
     ENGINE_BITS | BIT(MODEL) | BIT(POLICY) | BIT(TEMPLATE) | BIT(PROFILE) | BIT(JSON), main_info},
    {"worker", "(--fd N | --connect PATH) --model NAME=PATH[,template=T]... [options]",
     ENGINE_BITS | BIT(MODEL) | BIT(KNOWN) | BIT(FD) | BIT(CONNECT), main_worker},
};
#define N_COMMANDS (sizeof commands / sizeof commands[0])

static const struct option_text {
    const char *name, *value, *help;
    int has_arg;
} texts[N_OPTIONS] = {
#define X(id, text, arg, value, help) [OPTION_##id] = {text, value, help, arg},
    OPTION_LIST(X)
#undef X
};

int main_usage(struct larder_err *e, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    e->code = LARDER_EINVAL;
    vsnprintf(e->msg, sizeof e->msg, fmt, ap);
    va_end(ap);
    return MAIN_USAGE;
}

int option_number_at(const struct options *o, enum option_id k, uint32_t i, uint64_t max,
                     uint64_t *ret, struct larder_err *e)
{
    const char *s = o->value[k][i];
    uint64_t n = 0;

    for (const char *p = s; *p || p == s; p++) {
        if (*p < '0' || *p > '9' || n > (max - (uint64_t)(*p - '0')) / 10)
            return main_usage(e, "--%s takes a number from 0 to %llu, not '%.40s'", texts[k].name,
                              (unsigned long long)max, s);
        n = n * 10 + (uint64_t)(*p - '0');
    }
    *ret = n;
    return 0;
}

int option_number(const struct options *o, enum option_id k, uint64_t max, uint64_t *ret,
                  struct larder_err *e)
{
    return o->n[k] ? option_number_at(o, k, o->n[k] - 1, max, ret, e) : 0;
}

static void help(const struct command *c)
{
    printf("usage: " PROGRAM " %s %s\n\n", c->name, c->usage);
    for (int k = 0; k < N_OPTIONS; k++)
        if (c->options >> k & 1)
            printf("  --%-11s %-5s %s\n", texts[k].name, texts[k].value, texts[k].help);
}

static void help_all(FILE *f)
{
    fprintf(f, "usage: " PROGRAM " COMMAND [options]\n\n");
    for (size_t i = 0; i < N_COMMANDS; i++)
        fprintf(f, "  %s %s\n", commands[i].name, commands[i].usage);
    fprintf(f, "\n" PROGRAM " COMMAND --help lists the options of a command.\n");
}

static int take_option(const struct command *c, int k, const char *value, struct options *o,
                       struct larder_err *e)
{
    if (!(c->options >> k & 1))
        return main_usage(e, "%s does not take --%s", c->name, texts[k].name);
    if (o->n[k] == MAIN_MAX_LIST)
        return main_usage(e, "--%s is given more than %d times", texts[k].name, MAIN_MAX_LIST);
    o->value[k][o->n[k]++] = value;
    return 0;
}

static int parse(const struct command *c, int argc, char **argv, struct options *o,
                 struct larder_err *e)
{
    struct option longs[N_OPTIONS + 1] = {0};
    int k, rc;

    for (int i = 0; i < N_OPTIONS; i++)
        longs[i] = (struct option){texts[i].name, texts[i].has_arg, NULL, i};
    opterr = 0;
    while ((k = getopt_long(argc, argv, ":", longs, NULL)) != -1) {
        if (k == ':')
            return main_usage(e, "%.64s needs a value", argv[optind - 1]);
        if (k < 0 || k >= N_OPTIONS)
            return main_usage(e, "unknown option '%.64s'", argv[optind - 1]);
        rc = take_option(c, k, optarg, o, e);
        if (rc)
            return rc;
    }
    o->arg = argv + optind;
    o->n_args = argc - optind;
    return 0;
}

static int run(const struct command *c, int argc, char **argv)
{
    static struct options o; /* a few kilobytes of pointers */
    struct larder_err e = {0, ""};
    int rc = parse(c, argc, argv, &o, &e);

    if (!rc && o.n[OPTION_HELP]) {
        help(c);
        return 0;
    }
    if (!rc)
        rc = c->run(&o, &e);
    if (rc == MAIN_USAGE)
        fprintf(stderr, PROGRAM ": %s; usage: " PROGRAM " %s %s\n", e.msg, c->name, c->usage);
    else if (rc)
        fprintf(stderr, PROGRAM ": %s (%s)\n", e.msg, larder_status_name(rc));
    return rc == MAIN_USAGE ? MAIN_USAGE : rc ? 1 : 0;
}

int main(int argc, char **argv)
{
    if (argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "help"))) {
        help_all(stdout);
        return 0;
    }
    if (argc > 1 && !strcmp(argv[1], "--version")) {
        printf(PROGRAM " " LARDER_VERSION "\n");
        return 0;
    }
    for (size_t i = 0; argc > 1 && i < N_COMMANDS; i++)
        if (!strcmp(argv[1], commands[i].name))
            return run(&commands[i], argc - 1, argv + 1);
    if (argc > 1)
        fprintf(stderr, PROGRAM ": no command is named '%.64s'\n", argv[1]);
    help_all(stderr);
    return MAIN_USAGE;
}
