/* name.c - what may be called what: namespaces and entry names of PROTOCOL.md section 2.
 *
 * The one idea: a name is safe to print, to pass on a command line and to use as a
 * relative path, so ".." is refused wherever it stands.
 */
#include "frame.h"

#include <string.h>

static bool is_plain(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
}

static bool is_legal(const char *s, size_t max_len, const char *extra)
{
    size_t n = strnlen(s, max_len + 1);

    if (!n || n > max_len || strstr(s, ".."))
        return false;
    for (size_t i = 0; i < n; i++)
        if (!is_plain(s[i]) && (!i || !strchr(extra, s[i])))
            return false;
    return true;
}

bool name_is_namespace(const char *s)
{
    return is_legal(s, NAME_MAX_NS, "");
}

bool name_is_entry(const char *s)
{
    return is_legal(s, NAME_MAX_ENTRY, "/+@:,=");
}

int name_split(const char *full, char *ns, char *name, struct larder_err *e)
{
    const char *slash = strchr(full, '/');
    const char *rest = slash ? slash + 1 : full;
    char space[NAME_MAX_NS + 1] = "default";
    size_t n = slash ? (size_t)(slash - full) : 0;

    if (n > NAME_MAX_NS)
        return larder_fail(e, LARDER_EINVAL, "the namespace of '%.64s...' is longer than %u bytes",
                           full, NAME_MAX_NS);
    if (slash) {
        memcpy(space, full, n);
        space[n] = '\0';
    }
    if (!name_is_namespace(space))
        return larder_fail(e, LARDER_EINVAL,
                           "'%.128s' is no namespace: use 1 to %u letters, digits, . _ -", space,
                           NAME_MAX_NS);
    if (!name_is_entry(rest))
        return larder_fail(e, LARDER_EINVAL,
                           "'%.128s' is no name: use 1 to %u letters, digits, . _ - and, not "
                           "first, / + @ : , =",
                           rest, NAME_MAX_ENTRY);
    memcpy(ns, space, strlen(space) + 1);
    memcpy(name, rest, strlen(rest) + 1);
    return 0;
}
