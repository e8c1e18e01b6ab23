/* logprob.h - logits as log-probabilities, and how far two of them are apart.
 *
 * Units      Nats. Sums in double: a vocabulary has many small terms.
 * Threads    No state.
 */
#ifndef LARDER_LOGPROB_H
#define LARDER_LOGPROB_H

#include <stdint.h>

/* x becomes log-probabilities; returns the most likely index, the lower one of equals. */
uint32_t logprob_from(float *x, uint32_t n);

/* KL(p || q) of log-probabilities. */
double logprob_kl(const float *p, const float *q, uint32_t n);

#endif
