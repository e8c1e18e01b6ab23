/* reach.h - how far from a key its value ends, in tokens: the kernel that pools scores.
 *
 * Purpose    A question attends to the words that it repeats; the answer stands after them.
 *            Pooling must lift the whole answer with its key, or the key is kept and the answer
 *            is not. How many tokens that is depends on the tokenizer: some give each digit its
 *            own token.
 * Threads    No state.
 * Errors     LARDER_ENOMEM.
 */
#ifndef LARDER_REACH_H
#define LARDER_REACH_H

#include <stdint.h>

#include "larder_status.h"
#include "tokenizer.h"

/* An odd kernel, 1 to 1023: 2 r + 1, where r tokens are what " is: " and a number of seven digits
 * take, the most of some such numbers. A token that is attended to lifts r tokens behind it. */
int reach_kernel(const struct tokenizer *t, uint32_t *ret, struct larder_err *e);

#endif
