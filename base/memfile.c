/* memfile.c - sealed memory files: made, checked, mapped.
 *
 * The one idea: a file sealed with SEAL, SHRINK, GROW and WRITE can neither be cut
 * short under a reader (SIGBUS) nor changed, so what was checked stays true. A
 * receiver accepts exactly that set - from the daemon also FUTURE_WRITE for WRITE -
 * and F_SEAL_EXEC, which newer kernels add to files born without the execute bit.
 */
#include "memfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Younger than Debian 12's headers. */
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef F_SEAL_EXEC
#define F_SEAL_EXEC 0x0020
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define SIZE_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW)
#define SEALS (SIZE_SEALS | F_SEAL_WRITE)
#define SERVED_SEALS (SIZE_SEALS | F_SEAL_FUTURE_WRITE)

/* What stands for the content of an empty file, which cannot be mapped. */
static const uint64_t nothing[8] __attribute__((aligned(64)));

static int create(const char *label, int *ret_fd, struct larder_err *e)
{
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    int fd = memfd_create(label, flags | MFD_NOEXEC_SEAL);

    /* Kernels before 6.3 do not know the flag. */
    if (fd < 0 && errno == EINVAL)
        fd = memfd_create(label, flags);
    if (fd < 0)
        return larder_fail(e, errno == ENOMEM ? LARDER_ENOMEM : LARDER_EIO, "memfd_create: %s",
                           strerror(errno));
    *ret_fd = fd;
    return 0;
}

static int no_room(struct larder_err *e, const char *what, uint64_t n_bytes)
{
    int code = errno == ENOSPC || errno == ENOMEM || errno == EFBIG ? LARDER_ENOMEM : LARDER_EIO;

    return larder_fail(e, code, "memory file of %llu bytes: %s: %s", (unsigned long long)n_bytes,
                       what, strerror(errno));
}

static int seal(int fd, int seals, struct larder_err *e)
{
    /* 0400: another user who finds it in /proc cannot reopen it for writing. */
    if (fchmod(fd, 0400))
        return larder_fail(e, LARDER_EIO, "memory file: fchmod: %s", strerror(errno));
    if (fcntl(fd, F_ADD_SEALS, seals))
        return larder_fail(e, LARDER_EIO, "memory file: sealing: %s", strerror(errno));
    return 0;
}

static int write_all(int fd, const void *buf, uint64_t len, struct larder_err *e)
{
    const uint8_t *p = buf;

    for (uint64_t done = 0; done < len;) {
        ssize_t n = pwrite(fd, p + done, len - done, (off_t)done);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return no_room(e, "write", len);
        done += (uint64_t)n;
    }
    return 0;
}

int memfile_cut(int fd, uint64_t n_bytes, struct larder_err *e)
{
    return ftruncate(fd, (off_t)n_bytes) ? no_room(e, "ftruncate", n_bytes) : 0;
}

int memfile_from(const char *label, const void *buf, uint64_t len, int *ret_fd,
                 struct larder_err *e)
{
    int fd = -1;
    int rc = create(label, &fd, e);

    if (!rc)
        rc = write_all(fd, buf, len, e);
    if (!rc)
        rc = seal(fd, SEALS, e);
    if (!rc) {
        *ret_fd = fd;
        fd = -1;
    }
    if (fd >= 0)
        close(fd);
    return rc;
}

static int check_size_wanted(uint64_t n_bytes, struct larder_err *e)
{
    return n_bytes && n_bytes <= PTRDIFF_MAX
               ? 0
               : larder_fail(e, LARDER_EINVAL, "a memory file of %llu bytes",
                             (unsigned long long)n_bytes);
}

int memfile_populate(void *map, uint64_t at, uint64_t len, struct larder_err *e)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), begin = at / page * page;

    return len && madvise((uint8_t *)map + begin, at + len - begin, MADV_POPULATE_WRITE)
               ? no_room(e, "madvise", len)
               : 0;
}

int memfile_new(const char *label, uint64_t n_bytes, int populate, int *ret_fd, void **ret_map,
                struct larder_err *e)
{
    void *map = MAP_FAILED;
    int fd = -1, rc = check_size_wanted(n_bytes, e);

    if (!rc)
        rc = create(label, &fd, e);
    if (!rc)
        rc = memfile_cut(fd, n_bytes, e);
    if (!rc) {
        map = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        rc = map == MAP_FAILED ? no_room(e, "mmap", n_bytes) : 0;
    }
    if (!rc && populate)
        rc = memfile_populate(map, 0, n_bytes, e);
    if (!rc) {
        *ret_map = map;
        *ret_fd = fd;
        return 0;
    }
    if (map != MAP_FAILED)
        munmap(map, n_bytes);
    if (fd >= 0)
        close(fd);
    return rc;
}

int memfile_seal(int fd, void *map, uint64_t n_bytes, uint64_t keep_bytes, struct larder_err *e)
{
    int rc = 0;

    /* First of all: a file with a writable mapping cannot be sealed for writing. */
    memfile_unmap(map, n_bytes);
    if (keep_bytes > n_bytes)
        return larder_fail(e, LARDER_EINVAL, "keeping %llu of %llu bytes",
                           (unsigned long long)keep_bytes, (unsigned long long)n_bytes);
    if (keep_bytes < n_bytes)
        rc = memfile_cut(fd, keep_bytes, e);
    return rc ? rc : seal(fd, SEALS, e);
}

int memfile_seal_mapped(int fd, struct larder_err *e)
{
    return seal(fd, SERVED_SEALS, e);
}

static int check_seals(int fd, bool served, struct larder_err *e)
{
    int have = fcntl(fd, F_GET_SEALS);

    if (have < 0)
        return larder_fail(e, LARDER_EPROTO, "the descriptor is not a memory file");
    have &= ~F_SEAL_EXEC;
    if (have == SEALS || (served && have == SERVED_SEALS))
        return 0;
    return larder_fail(e, LARDER_EPROTO,
                       "the memory file has seals 0x%x, not exactly SEAL, SHRINK, GROW, WRITE",
                       (unsigned)have);
}

static int check_size(int fd, uint64_t want, uint64_t max, uint64_t *ret, struct larder_err *e)
{
    struct stat st;

    if (fstat(fd, &st) || st.st_size < 0)
        return larder_fail(e, LARDER_EIO, "memory file: fstat: %s", strerror(errno));
    if (want != UINT64_MAX && (uint64_t)st.st_size != want)
        return larder_fail(e, LARDER_EPROTO, "the memory file has %llu bytes, not %llu",
                           (unsigned long long)st.st_size, (unsigned long long)want);
    if ((uint64_t)st.st_size > max)
        return larder_fail(e, LARDER_EPROTO, "the memory file has %llu bytes; the limit is %llu",
                           (unsigned long long)st.st_size, (unsigned long long)max);
    *ret = (uint64_t)st.st_size;
    return 0;
}

static int map_checked(int fd, bool served, uint64_t n_bytes, uint64_t max_bytes,
                       const void **ret_map, uint64_t *ret_bytes, struct larder_err *e)
{
    const void *map = nothing;
    uint64_t size = 0;
    int rc = check_seals(fd, served, e);

    if (!rc)
        rc = check_size(fd, n_bytes, max_bytes, &size, e);
    if (rc)
        return rc;
    if (size) {
        map = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED)
            return no_room(e, "mmap", size);
    }
    *ret_map = map;
    if (ret_bytes)
        *ret_bytes = size;
    return 0;
}

int memfile_map(int fd, uint64_t n_bytes, uint64_t max_bytes, const void **ret_map,
                uint64_t *ret_bytes, struct larder_err *e)
{
    return map_checked(fd, false, n_bytes, max_bytes, ret_map, ret_bytes, e);
}

int memfile_map_served(int fd, uint64_t n_bytes, uint64_t max_bytes, const void **ret_map,
                       uint64_t *ret_bytes, struct larder_err *e)
{
    return map_checked(fd, true, n_bytes, max_bytes, ret_map, ret_bytes, e);
}

void memfile_unmap(const void *map, uint64_t n_bytes)
{
    if (map && n_bytes)
        munmap((void *)(uintptr_t)map, n_bytes);
}
