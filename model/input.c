/* input.c - bounded reads of a model's files. */
#include "input.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mem.h"

#define AT_ONCE (1u << 30)

int input_open(int dir, const char *name, int *ret, uint64_t *ret_bytes, struct larder_err *e)
{
    /* not to wait for the writer of a FIFO that somebody put there */
    int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;

    if (fd < 0 && errno == ENOENT)
        return LARDER_ENOTFOUND;
    if (fd < 0)
        return larder_fail(e, LARDER_EIO, "%s: %s", name, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        return larder_fail(e, LARDER_EMODEL, "%s: not a regular file", name);
    }
    *ret = fd;
    *ret_bytes = (uint64_t)st.st_size;
    return 0;
}

int input_read_at(int fd, uint64_t offset, uint64_t n, void *dst, struct larder_err *e)
{
    uint8_t *p = dst;

    while (n) {
        ssize_t got = pread(fd, p, n > AT_ONCE ? AT_ONCE : (size_t)n, (off_t)offset);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return larder_fail(e, LARDER_EIO, "read: %s", strerror(errno));
        if (!got)
            return larder_fail(e, LARDER_EMODEL, "the file became shorter while it was read");
        p += got;
        offset += (uint64_t)got;
        n -= (uint64_t)got;
    }
    return 0;
}

int input_read_text(int dir, const char *name, uint64_t max, char **ret, size_t *ret_len,
                    struct larder_err *e)
{
    char *text = NULL;
    uint64_t n;
    int fd, rc = input_open(dir, name, &fd, &n, e);

    if (rc)
        return rc;
    if (n > max)
        rc = larder_fail(e, LARDER_EMODEL, "%s has %llu bytes; the limit is %llu", name,
                         (unsigned long long)n, (unsigned long long)max);
    else if (!(text = mem_alloc(n + 1, 1)))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to read %s", name);
    if (!rc && (rc = input_read_at(fd, 0, n, text, e)))
        larder_fail_in(e, rc, "%s", name);
    close(fd);
    if (rc) {
        mem_free(text);
        return rc;
    }
    text[n] = '\0';
    *ret = text;
    *ret_len = (size_t)n;
    return 0;
}
