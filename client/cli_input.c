/* cli_input.c - what `larder` reads: documents, token lists, and names made of paths.
 *
 * The one idea: read whole, then say exactly what is wrong and where; nothing is cut to
 * fit.
 */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "geom.h"
#include "mem.h"

/* Above any document a model has positions for; keeps a mistaken path from filling memory. */
#define MAX_FILE_BYTES (1u << 30)

static int read_all(int fd, const char *path, char **ret, size_t *ret_len, struct larder_err *e)
{
    size_t len = 0, cap = 1 << 16;
    char *buf = mem_alloc(cap, 1), *more;
    ssize_t n = 1;

    while (buf && n) {
        n = read(fd, buf + len, cap - len);
        if (n < 0 && errno == EINTR) {
            n = 1;
            continue;
        }
        if (n < 0 || len + (size_t)n > MAX_FILE_BYTES) {
            mem_free(buf);
            return n < 0 ? larder_fail(e, LARDER_EIO, "cannot read %s: %s", path, strerror(errno))
                         : larder_fail(e, LARDER_ETOOBIG, "%s is larger than %u bytes", path,
                                       MAX_FILE_BYTES);
        }
        len += (size_t)n;
        if (len < cap)
            continue;
        cap *= 2;
        more = mem_grow(buf, cap, 1);
        if (!more)
            mem_free(buf);
        buf = more;
    }
    if (!buf)
        return larder_fail(e, LARDER_ENOMEM, "no memory to read %s", path);
    *ret = buf;
    *ret_len = len;
    return 0;
}

int cli_read_file(const char *path, char **ret, size_t *ret_len, struct larder_err *e)
{
    struct stat st;
    int fd, rc;

    if (!strcmp(path, "-"))
        return read_all(STDIN_FILENO, "standard input", ret, ret_len, e);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return larder_fail(e, LARDER_EIO, "cannot open %s: %s", path, strerror(errno));
    if (!fstat(fd, &st) && S_ISDIR(st.st_mode))
        rc = larder_fail(e, LARDER_EINVAL, "%s is a directory, not a document", path);
    else
        rc = read_all(fd, path, ret, ret_len, e);
    close(fd);
    return rc;
}

static bool is_space(char c)
{
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

/* The id at *p; moves *p past it. */
static int read_id(const char *text, const char **p, const char *end, uint32_t *ret,
                   struct larder_err *e)
{
    const char *s = *p;
    uint64_t v = 0;

    for (; s < end && *s >= '0' && *s <= '9' && v <= UINT32_MAX; s++)
        v = 10 * v + (uint64_t)(*s - '0');
    if (s == *p || (s < end && !is_space(*s)) || v > UINT32_MAX)
        return larder_fail(e, LARDER_EINVAL, "no token id at byte %zu", (size_t)(*p - text));
    *ret = (uint32_t)v;
    *p = s;
    return 0;
}

static int parse_tokens(const char *text, size_t len, uint32_t **ret, size_t *ret_n,
                        struct larder_err *e)
{
    const char *p = text, *end = text + len;
    uint32_t *ids = mem_alloc(len / 2 + 1, sizeof *ids); /* an id and a space: two bytes */
    size_t n = 0;
    int rc = ids ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for token ids");

    while (!rc) {
        while (p < end && is_space(*p))
            p++;
        if (p == end)
            break;
        rc = read_id(text, &p, end, &ids[n++], e);
    }
    if (rc) {
        mem_free(ids);
        return rc;
    }
    *ret = ids;
    *ret_n = n;
    return 0;
}

int cli_read_tokens(const char *path, uint32_t **ret, size_t *ret_n, struct larder_err *e)
{
    size_t len = 0;
    char *text = NULL;
    int rc = cli_read_file(path, &text, &len, e);

    if (rc)
        return rc;
    rc = parse_tokens(text, len, ret, ret_n, e);
    mem_free(text);
    return rc ? larder_fail_in(e, rc, "%s", path) : 0;
}

const char *cli_basename(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash ? slash + 1 : path;
}

int cli_name_of(const char *path, char out[NAME_MAX_ENTRY + 1], struct larder_err *e)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    size_t n = 0;

    if (!*path || strlen(path) > NAME_MAX_ENTRY)
        return larder_fail(e, LARDER_ETOOBIG,
                           "'%.80s...' cannot be a name: more than %u bytes (or none); use --name",
                           path, NAME_MAX_ENTRY);
    for (; path[n]; n++) {
        bool ok = strchr(plain, path[n]) || (n && strchr("/+@:,=", path[n]));

        /* No "..", wherever it stands. */
        if (path[n] == '.' && n && out[n - 1] == '.')
            ok = false;
        out[n] = ok ? path[n] : '_';
    }
    out[n] = '\0';
    return 0;
}

int cli_document(const struct cli *c, enum cli_opt file, enum cli_opt tokens,
                 struct larder_document *ret, struct larder_err *e)
{
    uint32_t *ids = NULL;
    char *text = NULL;
    size_t n = 0;
    int rc;

    if (c->opt[file]) {
        rc = cli_read_file(c->opt[file], &text, &n, e);
        if (!rc)
            *ret = (struct larder_document){text, n, "text"};
        return rc;
    }
    rc = cli_read_tokens(c->opt[tokens], &ids, &n, e);
    if (!rc)
        *ret = (struct larder_document){ids, (uint64_t)n * sizeof *ids, "tokens"};
    return rc;
}
