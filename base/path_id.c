/* path_id.c - the state of a path, from stat() alone.
 *
 * A file that is changed in place changes its own time and not that of its directory; one that
 * is replaced changes the directory's: so the latest of all of them is taken. */
#include "path_id.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

static uint64_t time_of(const struct stat *st)
{
    return (uint64_t)st->st_mtim.tv_sec * 1000000000u + (uint64_t)st->st_mtim.tv_nsec;
}

static bool add_files(const char *path, struct path_id *id)
{
    DIR *dir = opendir(path);
    const struct dirent *f;
    struct stat st;

    if (!dir)
        return false;
    id->size = 0;
    while ((f = readdir(dir))) {
        if (fstatat(dirfd(dir), f->d_name, &st, 0) || !S_ISREG(st.st_mode))
            continue;
        id->size += (uint64_t)st.st_size;
        id->mtime_ns = time_of(&st) > id->mtime_ns ? time_of(&st) : id->mtime_ns;
    }
    closedir(dir);
    return true;
}

bool path_id_get(const char *path, struct path_id *ret)
{
    struct stat st;
    struct path_id id;

    if (stat(path, &st))
        return false;
    id = (struct path_id){st.st_dev, st.st_ino, (uint64_t)st.st_size, time_of(&st)};
    if (S_ISDIR(st.st_mode) && !add_files(path, &id))
        return false;
    *ret = id;
    return true;
}
