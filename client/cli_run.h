/* cli_run.h - larder-prefill as a program: its arguments, its model, running it.
 *
 * Purpose    What ask, trace, calibrate and eval share.
 * Ownership  engine_done() and engine_model_done() free; both accept what was never filled
 *            (ENGINE_NONE, zeroed).
 * Threads    One.
 * Errors     As cli.h; CLI_REPORTED when the engine has told its failure itself.
 */
#ifndef LARDER_CLI_RUN_H
#define LARDER_CLI_RUN_H

#include "cli.h"

#define ENGINE_MAX_ARGS 300
#define ENGINE_MAX_FDS 40 /* an image for each policy of eval, and a few files */

struct engine {
    char *arg[ENGINE_MAX_ARGS + 1]; /* owned, NULL-terminated; the first is the program */
    int n;
    bool cuda; /* the program is larder-prefill-cuda */
    int fd[ENGINE_MAX_FDS]; /* owned, to be inherited */
    int n_fds;
};

/* A command of the engine with no arguments yet. */
void engine_start(struct engine *en, const char *command);
void engine_done(struct engine *en);

void engine_add(struct engine *en, const char *s);
/* --name value, if there is a value; a flag when the value is "". */
void engine_option(struct engine *en, const char *name, const char *value);
/* --name PATH of a memory file with these bytes: the engine reads files only. */
int engine_file(struct engine *en, const char *name, const void *bytes, size_t len,
                struct larder_err *e);
/* An own descriptor of the same file is inherited and its number returned. */
int engine_inherit(struct engine *en, int fd, int *ret, struct larder_err *e);

/* A model, and what the daemon's configuration says of it; strings are owned or NULL. */
struct engine_model {
    char *path;
    char *name; /* NULL: a file that is not configured */
    char *tmpl, *policy, *backend, *dtype;
    bool has_profile;
};

int engine_model_find(struct cli *c, const char *name, struct engine_model *ret,
                      struct larder_err *e);
void engine_model_done(struct engine_model *m);

/* Options that say how to compute. */
void engine_options(struct engine *en, const struct cli *c, const struct engine_model *m);

/* --profile, if the daemon has one of the model. */
int engine_profile(struct engine *en, struct cli *c, const struct engine_model *m,
                   struct larder_err *e);

/* Run it; with `ret`, its standard output is read as one JSON object. */
int engine_run(struct engine *en, json_t **ret, struct larder_err *e);

/* Called for each object that the engine prints; `j` is borrowed. An error ends the engine. */
typedef int engine_line(void *arg, json_t *j, struct larder_err *e);

/* Run it and take its output line by line, as it comes. When stop_fd (-1: none) is readable, the
 * engine is ended: LARDER_ECANCELED. */
int engine_lines(struct engine *en, int stop_fd, engine_line *line, void *arg,
                 struct larder_err *e);

#endif
