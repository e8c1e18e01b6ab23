/* reach.c - the ends of some facts, put through the tokenizer.
 *
 * The one idea: seven digits are about the longest value that texts give in running words (a
 * price, a telephone number, a part number), and digits are where tokenizers differ most.
 * Several numbers, because a vocabulary may have some groups of digits and not others. */
#include "reach.h"

#include <string.h>

#include "mem.h"

#define MAX_KERNEL 1023u

static const char *const ends[] = {" is: 4805317", " is: 7120946", " is: 3967258", " is: 1543862"};

int reach_kernel(const struct tokenizer *t, uint32_t *ret, struct larder_err *e)
{
    size_t most = 0;

    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        uint32_t *ids = NULL;
        size_t n = 0;
        int rc = tokenizer_encode(t, ends[i], strlen(ends[i]), false, &ids, &n, e);

        mem_free(ids);
        if (rc)
            return rc;
        most = n > most ? n : most;
    }
    *ret = 2 * most + 1 < MAX_KERNEL ? (uint32_t)(2 * most + 1) : MAX_KERNEL;
    return 0;
}
