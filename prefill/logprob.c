/* logprob.c - one softmax and one sum. */
#include "logprob.h"

#include <math.h>

uint32_t logprob_from(float *x, uint32_t n)
{
    uint32_t best = 0;
    double sum = 0, shift;

    for (uint32_t i = 1; i < n; i++)
        best = x[i] > x[best] ? i : best;
    shift = x[best];
    for (uint32_t i = 0; i < n; i++)
        sum += exp(x[i] - shift);
    shift += log(sum);
    for (uint32_t i = 0; i < n; i++)
        x[i] = (float)(x[i] - shift);
    return best;
}

double logprob_kl(const float *p, const float *q, uint32_t n)
{
    double sum = 0;

    for (uint32_t i = 0; i < n; i++)
        sum += exp(p[i]) * ((double)p[i] - q[i]);
    return sum;
}
