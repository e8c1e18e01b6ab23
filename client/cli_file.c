/* cli_file.c - output files that are there whole or not at all.
 *
 * The one idea: bytes go to a new file beside the target, which takes its name when all of them
 * are on the disk. Whatever fails leaves what was there before. */
#include "cli_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mem.h"

#define CHUNK (8u << 20)             /* bytes between two looks at the progress */
#define PROGRESS_BYTES (64ull << 20) /* smaller files are written before anybody reads it */

static int failed(const struct cli_file *f, const char *what, struct larder_err *e)
{
    return larder_fail(e, LARDER_EIO, "cannot %s %.200s: %s", what, f->path, strerror(errno));
}

int cli_file_open(struct cli_file *f, const char *path, bool force, uint64_t n_bytes,
                  struct larder_err *e)
{
    *f = (struct cli_file){.path = path, .fd = STDOUT_FILENO, .n_bytes = n_bytes, .force = force};
    if (!strcmp(path, "-")) {
        if (isatty(STDOUT_FILENO))
            return larder_fail(e, LARDER_EINVAL, "standard output is a terminal; name a file");
        return 0;
    }
    if (!force && !access(path, F_OK))
        return larder_fail(e, LARDER_EINVAL, "%.200s exists; --force replaces it", path);
    f->temp = cli_text("%s.XXXXXX", path);
    f->fd = mkostemp(f->temp, O_CLOEXEC);
    if (f->fd >= 0)
        return 0;
    mem_free(f->temp);
    f->temp = NULL;
    return failed(f, "write beside", e);
}

static int write_all(struct cli_file *f, const char *p, uint64_t n, struct larder_err *e)
{
    while (n) {
        ssize_t w = write(f->fd, p, n);

        if (w < 0 && errno != EINTR)
            return failed(f, "write", e);
        p += w > 0 ? w : 0;
        n -= w > 0 ? (uint64_t)w : 0;
    }
    return 0;
}

int cli_file_write(struct cli_file *f, const void *p, uint64_t n, struct larder_err *e)
{
    const char *at = p;
    int rc = 0;

    while (!rc && n) {
        uint64_t some = n < CHUNK ? n : CHUNK;

        rc = write_all(f, at, some, e);
        at += some;
        n -= some;
        f->done += some;
        if (f->n_bytes >= PROGRESS_BYTES)
            cli_progress(f->path, f->done, f->n_bytes);
    }
    return rc;
}

/* The name in its directory is durable, too. */
static int sync_directory(const struct cli_file *f, struct larder_err *e)
{
    const char *base = cli_basename(f->path);
    char *dir = cli_text("%.*s", base == f->path ? 1 : (int)(base - f->path),
                         base == f->path ? "." : f->path);
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC), rc = 0;

    if (fd < 0 || fsync(fd))
        rc = failed(f, "sync the directory of", e);
    if (fd >= 0)
        close(fd);
    mem_free(dir);
    return rc;
}

/* link() refuses a name that somebody took meanwhile; rename() replaces it. */
static int take_name(struct cli_file *f, struct larder_err *e)
{
    if (f->force)
        return rename(f->temp, f->path) ? failed(f, "replace", e) : 0;
    if (link(f->temp, f->path))
        return failed(f, "create", e);
    unlink(f->temp);
    return 0;
}

int cli_file_close(struct cli_file *f, int rc, struct larder_err *e)
{
    if (!f->temp)
        return rc;
    if (!rc && fsync(f->fd))
        rc = failed(f, "write", e);
    if (close(f->fd) && !rc)
        rc = failed(f, "write", e);
    if (!rc)
        rc = take_name(f, e);
    if (rc)
        unlink(f->temp);
    else
        rc = sync_directory(f, e);
    mem_free(f->temp);
    return rc;
}
