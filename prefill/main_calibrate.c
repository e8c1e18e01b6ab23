/* main_calibrate.c - larder-prefill calibrate: measure a model and print its profile.
 *
 * The measuring is calibrate.c's, the JSON main_profile.c's; a worker does the same without
 * this command when it is asked for a policy that needs a profile and has none. */
#include "main_common.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* A bar on a terminal: a large model takes minutes a text. */
static int show(void *arg, const char *pass, uint32_t layer, uint32_t n_layers)
{
    enum { CELLS = 24 };
    bool tty = *(const bool *)arg;

    if (!tty)
        return 0;
    fprintf(stderr, "\r%s  [", pass);
    for (uint32_t i = 0; i < CELLS; i++)
        fputc(i < (uint64_t)layer * CELLS / n_layers ? '#' : '.', stderr);
    fprintf(stderr, "] layer %u of %u\033[K", layer, n_layers);
    return 0;
}

static int print_profile(const json_t *profile, struct larder_err *e)
{
    char *text = profile_text(profile);
    int rc = 0;

    if (!text)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a profile");
    if (puts(text) == EOF || fflush(stdout))
        rc = larder_fail(e, LARDER_EIO, "cannot write the profile to standard output");
    free(text);
    return rc;
}

static int measure(const struct options *o, struct measuring *m, struct larder_err *e)
{
    int rc = o->n[OPTION_NO_BUILTIN] ? 0 : measuring_builtin(m, e);

    for (int i = 0; i < o->n_args && !rc; i++)
        rc = measuring_file(m, o->arg[i], e);
    return rc;
}

int main_calibrate(const struct options *o, struct larder_err *e)
{
    bool builtin = !o->n[OPTION_NO_BUILTIN], tty = isatty(STDERR_FILENO);
    const struct calibrate_watch watch = {&tty, show};
    struct engine_setup s = {0};
    struct measuring m = {0};
    struct shares *shares = NULL;
    json_t *profile = NULL;
    int rc;

    if (!builtin && !o->n_args)
        return main_usage(e, "--no-builtin leaves nothing to measure on; name a TEXT");
    rc = setup_open(o, &s, e);
    if (!rc)
        rc = measuring_open(&m, &s, (builtin ? CALIBRATION_TEXTS : 0) + (uint32_t)o->n_args, &watch,
                            e);
    if (!rc)
        rc = measure(o, &m, e);
    if (tty)
        fprintf(stderr, "\r\033[K");
    if (!rc)
        rc = measuring_end(&m, &shares, &profile, e);
    if (!rc)
        rc = print_profile(profile, e);
    json_decref(profile);
    shares_free(shares);
    measuring_done(&m);
    setup_done(&s);
    return rc;
}
