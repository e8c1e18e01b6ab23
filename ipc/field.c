/* field.c - typed, bounded access to the fields of a received body.
 *
 * The one idea: a field is absent, or of its one type and within its limit;
 * anything else ends the connection with a message that names the field. null is
 * a type of its own and not the same as absent.
 */
#include "frame.h"

#include <string.h>

/* Integers beyond 2^53 do not survive readers that use doubles (PROTOCOL.md). */
#define MAX_INT (1LL << 53)

/* 1: there; 0: absent and optional; LARDER_EPROTO: absent and required. */
static int find(const json_t *body, const char *key, enum field_need need, const json_t **ret,
                struct larder_err *e)
{
    const json_t *v = json_object_get(body, key);

    if (!v && need == FIELD_REQUIRED)
        return larder_fail(e, LARDER_EPROTO, "field '%s' is missing", key);
    *ret = v;
    return v != NULL;
}

static int mistyped(const char *key, const char *want, struct larder_err *e)
{
    return larder_fail(e, LARDER_EPROTO, "field '%s' is not %s", key, want);
}

int field_str(const json_t *body, const char *key, enum field_need need, size_t max_len,
              const char **ret, struct larder_err *e)
{
    const json_t *v = NULL;
    int rc = find(body, key, need, &v, e);

    if (rc <= 0)
        return rc;
    if (!json_is_string(v) || strlen(json_string_value(v)) != json_string_length(v))
        return mistyped(key, "a string", e);
    if (json_string_length(v) > max_len)
        return larder_fail(e, LARDER_EPROTO, "field '%s' has %zu bytes; the limit is %zu", key,
                           json_string_length(v), max_len);
    *ret = json_string_value(v);
    return 0;
}

static int find_int(const json_t *body, const char *key, enum field_need need, int64_t min,
                    int64_t max, int64_t *ret, struct larder_err *e)
{
    const json_t *v = NULL;
    int rc = find(body, key, need, &v, e);

    if (rc <= 0)
        return rc;
    if (!json_is_integer(v))
        return mistyped(key, "an integer", e);
    if (json_integer_value(v) < min || json_integer_value(v) > max)
        return larder_fail(e, LARDER_EPROTO, "field '%s' is %lld; must be %lld to %lld", key,
                           (long long)json_integer_value(v), (long long)min, (long long)max);
    *ret = json_integer_value(v);
    return 1;
}

int field_u64(const json_t *body, const char *key, enum field_need need, uint64_t max,
              uint64_t *ret, struct larder_err *e)
{
    int64_t v = 0;
    int rc = find_int(body, key, need, 0, max < (uint64_t)MAX_INT ? (int64_t)max : MAX_INT, &v, e);

    if (rc > 0)
        *ret = (uint64_t)v;
    return rc < 0 ? rc : 0;
}

int field_u32(const json_t *body, const char *key, enum field_need need, uint32_t max,
              uint32_t *ret, struct larder_err *e)
{
    int64_t v = 0;
    int rc = find_int(body, key, need, 0, max, &v, e);

    if (rc > 0)
        *ret = (uint32_t)v;
    return rc < 0 ? rc : 0;
}

int field_i64(const json_t *body, const char *key, enum field_need need, int64_t *ret,
              struct larder_err *e)
{
    int rc = find_int(body, key, need, -MAX_INT, MAX_INT, ret, e);

    return rc < 0 ? rc : 0;
}

int field_bool(const json_t *body, const char *key, enum field_need need, bool *ret,
               struct larder_err *e)
{
    const json_t *v = NULL;
    int rc = find(body, key, need, &v, e);

    if (rc <= 0)
        return rc;
    if (!json_is_boolean(v))
        return mistyped(key, "true or false", e);
    *ret = json_is_true(v);
    return 0;
}

/* 0 to 15, or -1: upper case is refused, so that a key has one spelling. */
static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool unhex32(const char *s, uint8_t out[32])
{
    for (int i = 0; i < 32; i++) {
        int hi = hex_digit(s[2 * i]);
        int lo = hi < 0 ? -1 : hex_digit(s[2 * i + 1]);

        if (lo < 0)
            return false;
        out[i] = (uint8_t)(hi << 4 | lo);
    }
    return s[64] == '\0';
}

int field_hex32(const json_t *body, const char *key, enum field_need need, uint8_t ret[32],
                bool *ret_present, struct larder_err *e)
{
    const char *s = NULL;
    uint8_t bytes[32];
    int rc = field_str(body, key, need, FRAME_MAX_BODY, &s, e);

    if (rc)
        return rc;
    if (s && !unhex32(s, bytes))
        return mistyped(key, "64 lower-case hex digits", e);
    if (s)
        memcpy(ret, bytes, sizeof bytes);
    if (ret_present)
        *ret_present = s != NULL;
    return 0;
}

int field_array(const json_t *body, const char *key, enum field_need need, size_t max_len,
                const json_t **ret, struct larder_err *e)
{
    const json_t *v = NULL;
    int rc = find(body, key, need, &v, e);

    if (rc <= 0)
        return rc;
    if (!json_is_array(v))
        return mistyped(key, "an array", e);
    if (json_array_size(v) > max_len)
        return larder_fail(e, LARDER_EPROTO, "field '%s' has %zu elements; the limit is %zu", key,
                           json_array_size(v), max_len);
    *ret = v;
    return 0;
}

static bool in_list(const char *key, const char *const *list)
{
    for (; *list; list++)
        if (!strcmp(key, *list))
            return true;
    return false;
}

int field_only(const json_t *body, const char *const *allowed, struct larder_err *e)
{
    const char *key;
    json_t *v;

    json_object_foreach ((json_t *)(uintptr_t)body, key, v) {
        if (!in_list(key, allowed))
            return larder_fail(e, LARDER_EPROTO, "unknown field '%.64s'", key);
    }
    return 0;
}
