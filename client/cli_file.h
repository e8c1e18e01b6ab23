/* cli_file.h - output files that are there whole or not at all.
 *
 * Ownership  cli_file_close() ends what cli_file_open() began; `path` is borrowed until then.
 * Threads    One.
 * Errors     LARDER_EIO; LARDER_EINVAL: the file exists, or standard output is a terminal.
 */
#ifndef LARDER_CLI_FILE_H
#define LARDER_CLI_FILE_H

#include "cli.h"

struct cli_file {
    const char *path;
    char *temp; /* NULL: standard output */
    int fd;
    uint64_t done, n_bytes;
    bool force;
};

/* "-": standard output. n_bytes: what will be written, for the progress line. */
int cli_file_open(struct cli_file *f, const char *path, bool force, uint64_t n_bytes,
                  struct larder_err *e);
int cli_file_write(struct cli_file *f, const void *p, uint64_t n, struct larder_err *e);

/* rc 0: sync and take the name; else remove what was written. Returns rc or what failed. */
int cli_file_close(struct cli_file *f, int rc, struct larder_err *e);

#endif
