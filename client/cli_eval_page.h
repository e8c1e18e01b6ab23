/* cli_eval_page.h - parts of the page that `larder eval --html` writes.
 *
 * Purpose    cli_eval_page.c writes the page and its tables, cli_eval_draw.c the drawings.
 * Ownership  Everything is borrowed.
 * Threads    One.
 * Errors     The file's error flag.
 */
#ifndef LARDER_CLI_EVAL_PAGE_H
#define LARDER_CLI_EVAL_PAGE_H

#include "cli_eval.h"

/* Text as it may stand between tags and in attributes. */
void page_esc(FILE *f, const char *s);

/* Answers kept, and KL, over stored bytes; a legend. Nothing where there is nothing to draw. */
void page_curves(FILE *f, const struct eval_section *s);

/* A heat map for each policy, of the tasks that have a length and a depth. */
void page_maps(FILE *f, const struct eval_section *s, const struct eval_results *r);

#endif
