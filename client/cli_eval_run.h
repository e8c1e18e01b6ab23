/* cli_eval_run.h - a run of `larder eval` while it measures, shared by two files.
 *
 * Purpose    cli_eval_entry.c stores and fetches the entries of one document and removes them;
 *            cli_eval_run.c decides which, and asks the questions.
 * Ownership  The run owns everything but what its comments call borrowed.
 * Threads    One.
 * Errors     As cli.h; LARDER_ECANCELED once a signal has come.
 */
#ifndef LARDER_CLI_EVAL_RUN_H
#define LARDER_CLI_EVAL_RUN_H

#include <signal.h>

#include "cli_eval.h"
#include "cli_run.h"

struct eval_entry {
    size_t policy; /* in the run's list */
    bool made;     /* by us: it was not there before */
    char key[65];  /* empty: nothing is stored */
    json_t *shown; /* SHOW's object */
    struct larder_lease lease;
    double fetch_ms;
};

struct eval_run {
    struct cli *c; /* borrowed, as are the next two */
    const struct eval_options *o;
    struct eval_results *results;
    struct engine_model model;
    struct eval_set set;
    json_t *what;
    json_t *policy; /* canonical; [0] is the full cache */
    const char *asked[CLI_MAX_POLICIES + 1];
    size_t n_policies, n_failed;
    int stop_fd; /* readable once we are to end */
    sigset_t before;
    /* the document that is being measured */
    const struct eval_doc *doc;
    size_t doc_at;
    struct eval_entry entry[CLI_MAX_POLICIES + 1];
    size_t n_entries;
};

/* ---- interruption: SIGINT and SIGTERM are read from a descriptor, between steps */

int eval_catch_signals(struct eval_run *r, struct larder_err *e);
void eval_release_signals(struct eval_run *r);
/* LARDER_ECANCELED once one has come. */
int eval_check_stopped(const struct eval_run *r, struct larder_err *e);

/* Does this end the run, or only fail one document? */
bool eval_is_fatal(int rc);

/* ---- progress: what is being done for the document, as step `step` of it */

void eval_show_step(const struct eval_run *r, size_t step, const char *doing);

/* ---- entries */

/* Store the run's document under a policy, and fetch it: r->entry has one more. The canonical
 * spelling in r->policy becomes that of the entry. */
int eval_add_entry(struct eval_run *r, size_t policy, struct larder_err *e);
/* Give up all of them; what was made for the run is removed from the store. */
void eval_drop_entries(struct eval_run *r);

#endif
