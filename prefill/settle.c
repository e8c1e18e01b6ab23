/* settle.c - the peak of the variance, and the threshold that finds its way down.
 *
 * The one idea: early layers attend to few tokens whose ranks stay as they are, so variance is
 * small there for a reason that says nothing; it rises while tokens are sorted out and comes down
 * when that is done. What comes down is compared with the peak. The smallest tau that still
 * fires in time is the most careful one: it cuts late. */
#include "settle.h"

#define TAU_STEP 50u /* thousandths */

static const double *trace(const struct traces *t, uint32_t i)
{
    return t->variance + (uint64_t)i * (t->n_layers - t->first);
}

/* The mean over the traces of the variance in a layer, as shares of each trace's mean. */
static double height(const struct traces *t, uint32_t layer)
{
    double sum = 0;

    for (uint32_t i = 0; i < t->n; i++) {
        const double *v = trace(t, i);
        double all = 0;

        for (uint32_t l = 0; l < t->n_layers - t->first; l++)
            all += v[l];
        sum += v[layer - t->first] / all;
    }
    return sum;
}

static uint32_t peak(const struct traces *t)
{
    uint32_t best = t->first;
    double most = 0;

    for (uint32_t l = t->first; 3 * l < 2 * t->n_layers; l++) {
        double h = height(t, l);

        if (h > most) {
            most = h;
            best = l;
        }
    }
    return best;
}

/* The layer of the cut, averaged over the traces; the same comparison as in cut.c. */
static double mean_cut(const struct traces *t, uint32_t l_min, double tau)
{
    double sum = 0;

    for (uint32_t i = 0; i < t->n; i++) {
        const double *v = trace(t, i);
        double limit = tau * v[l_min - t->first];
        uint32_t l = l_min + 1;

        while (l < t->n_layers && !(v[l - t->first] < limit))
            l++;
        sum += l;
    }
    return sum / t->n;
}

bool settle_choose(const struct traces *t, struct profile_window *w)
{
    uint32_t l_min;

    if (!t->n || 3 * t->first >= 2 * t->n_layers)
        return false;
    l_min = peak(t);
    for (uint32_t tau = TAU_STEP; tau < 1000; tau += TAU_STEP) {
        double cut = mean_cut(t, l_min, tau / 1000.0);

        if (4 * cut > 3.0 * t->n_layers)
            continue;
        if (2 * cut < t->n_layers)
            return false;
        w->l_min = l_min;
        w->tau_milli = tau;
        return true;
    }
    return false;
}
