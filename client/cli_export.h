/* cli_export.h - what the formats of `larder export` are given. */
#ifndef LARDER_CLI_EXPORT_H
#define LARDER_CLI_EXPORT_H

#include "cli.h"

struct export
{
    const char *path; /* "-": standard output */
    bool force;
    const json_t *entry;              /* SHOW with text; borrowed */
    const struct larder_image *image; /* borrowed */
};

#endif
