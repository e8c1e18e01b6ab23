/* path_id.h - whether a file, or a directory of files, may still be what it was.
 *
 * Purpose    What was learnt by reading gigabytes (a model's fingerprint) is believed as long as
 *            this does not change.
 * Units      Bytes and nanoseconds since 1970.
 * Threads    No state.
 */
#ifndef LARDER_PATH_ID_H
#define LARDER_PATH_ID_H

#include <stdbool.h>
#include <stdint.h>

/* Of a directory: its own device and inode; the sizes of the regular files in it, added up; the
 * latest time of any of them and of the directory. */
struct path_id {
    uint64_t dev, ino, size, mtime_ns;
};

/* Links are followed. False: errno says why not. */
bool path_id_get(const char *path, struct path_id *ret);

static inline bool path_id_same(const struct path_id *a, const struct path_id *b)
{
    return a->dev == b->dev && a->ino == b->ino && a->size == b->size && a->mtime_ns == b->mtime_ns;
}

#endif
