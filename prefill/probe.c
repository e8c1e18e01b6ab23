/* probe.c - the text of the probe.
 *
 * It names the kinds of things that questions ask for. Entries scored by it depend on its
 * wording, so a change needs a policy key of its own. */
#include "probe.h"

#include <string.h>

#include "tokenizer.h"

int probe_ids(const struct model *m, uint32_t **ret, size_t *ret_n, struct larder_err *e)
{
    static const char text[] = "\n\nGo through the text above and list every name, number, date, "
                               "place, definition, rule and exception that it gives, word by word:";
    const struct tokenizer *t = model_tokenizer(m);

    if (!t)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "obs=probe needs a tokenizer; the model has none");
    return tokenizer_encode(t, text, strlen(text), false, ret, ret_n, e);
}
