/* profile_id.c - numbers into bytes that are the same on every machine, and their hash. */
#include "profile_id.h"

#include <string.h>

#include "sha256.h"

#define VERSION_SHARES 1u /* of what is hashed: shares alone, */
#define VERSION_WINDOW 2u /* and what window policies take */

static void add_u32(struct sha256 *h, uint32_t v)
{
    uint8_t b[4];

    for (int i = 0; i < 4; i++)
        b[i] = (uint8_t)(v >> (8 * i));
    sha256_add(h, b, sizeof b);
}

static void add_floats(struct sha256 *h, const float *x, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        float v = x[i] == 0 ? 0 : x[i]; /* minus zero is the same share */
        uint32_t bits;

        memcpy(&bits, &v, sizeof bits);
        add_u32(h, bits);
    }
}

int profile_id(uint32_t n_heads, uint32_t n_budgets, const float *budget, const float *share,
               const struct profile_window *window, char out[PROFILE_ID_LEN + 1],
               struct larder_err *e)
{
    struct sha256 *h = sha256_new();
    uint8_t digest[SHA256_LEN];
    char hex[2 * SHA256_LEN + 1];

    if (!h)
        return larder_fail(e, LARDER_ENOMEM, "no memory to name a profile");
    add_u32(h, window->pool ? VERSION_WINDOW : VERSION_SHARES);
    add_u32(h, n_heads);
    add_u32(h, n_budgets);
    add_floats(h, budget, n_budgets);
    add_floats(h, share, (uint64_t)n_budgets * n_heads);
    if (window->pool) {
        add_u32(h, window->pool);
        add_u32(h, window->l_min);
        add_u32(h, window->tau_milli);
    }
    sha256_get(h, digest);
    sha256_free(h);
    sha256_hex(digest, hex);
    memcpy(out, hex, PROFILE_ID_LEN);
    out[PROFILE_ID_LEN] = '\0';
    return 0;
}

bool profile_id_valid(const char *s)
{
    return strspn(s, "0123456789abcdef") == PROFILE_ID_LEN && !s[PROFILE_ID_LEN];
}
