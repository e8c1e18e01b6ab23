/* template_form.h - the texts that the named chat forms put around turns.
 *
 * Purpose    What template.c composes prompts from; facts of the published templates.
 * Threads    Read-only.
 */
#ifndef LARDER_TEMPLATE_FORM_H
#define LARDER_TEMPLATE_FORM_H

#include <stdbool.h>

enum { OPENS, CLOSES };

struct template_form {
    const char *name;
    const char *begin;     /* before the first turn */
    const char *system[2]; /* NULL: the form has no turns */
    const char *user[2];
    const char *assistant[2];
    const char *generate;       /* where an answer begins */
    const char *default_system; /* a system turn that is there when nobody writes one, or NULL */
    bool in_user;               /* the system text stands inside the first user turn */
};

/* NULL when unknown. */
const struct template_form *template_form_find(const char *name, unsigned len);

#endif
