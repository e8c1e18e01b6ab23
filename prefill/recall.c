/* recall.c - where a document is worth asking about, the probes' tokens, and the sums.
 *
 * The one idea: what a pruned cache loses first is what stands in the document once: names,
 * numbers, rare words. So each part of the document is asked for the passage whose tokens are
 * rarest in the document itself. */
#include "recall.h"

#include <ctype.h>
#include <math.h>

#include "logprob.h"
#include "mem.h"
#include "tokenizer.h"

#define PROBE_EVERY 64u /* document tokens for each probe, */
#define PROBES_LEAST 4u /* but no fewer than these */
#define EXTRA_DIGIT 2.0
#define EXTRA_CAPITAL 1.0

static const char request[] = "Quote the passage that begins with: ";

/* ---- where */

static double word_weight(const struct tokenizer *t, uint32_t id)
{
    size_t len = 0;
    const char *s = t ? tokenizer_piece(t, id, &len) : NULL;
    double extra = 0;

    for (size_t i = 0; s && i < len; i++) {
        if (isdigit((unsigned char)s[i]))
            extra = fmax(extra, EXTRA_DIGIT);
        else if (isupper((unsigned char)s[i]))
            extra = fmax(extra, EXTRA_CAPITAL);
    }
    return extra;
}

/* How much each token of the document is worth asking for. */
static int weigh(const struct model *m, const uint32_t *ids, uint32_t n, double *weight,
                 struct larder_err *e)
{
    const struct tokenizer *t = model_tokenizer(m);
    uint32_t *count = mem_zalloc(model_params(m)->n_vocab, sizeof *count);

    if (!count)
        return larder_fail(e, LARDER_ENOMEM, "no memory to choose probes");
    for (uint32_t i = 0; i < n; i++)
        count[ids[i]]++;
    for (uint32_t i = 0; i < n; i++)
        weight[i] = log((double)n / count[ids[i]]) + word_weight(t, ids[i]);
    mem_free(count);
    return 0;
}

/* The start of the heaviest quote in lo..hi; a tie goes to the earlier one. */
static uint32_t heaviest(const double *weight, uint32_t lo, uint32_t hi)
{
    uint32_t best = lo;
    double most = -1;

    for (uint32_t at = lo; at < hi; at++) {
        double sum = 0;

        for (uint32_t i = 0; i < PROBE_QUOTE; i++)
            sum += weight[at + i];
        if (sum > most) {
            most = sum;
            best = at;
        }
    }
    return best;
}

/* ---- rows */

struct around {
    uint32_t *head, *tail;
    size_t n_head, n_tail;
};

static int encode_around(const struct model *m, const struct template *tmpl, struct around *a,
                         struct larder_err *e)
{
    const struct tokenizer *t = model_tokenizer(m);
    const char *head = tmpl ? tmpl->ask_head : "\n\n", *tail = tmpl ? tmpl->ask_tail : "\n";
    int rc;

    if (!t)
        return 0;
    rc = template_join(t, head, request, &a->head, &a->n_head, e);
    return rc ? rc : template_join(t, tail, "", &a->tail, &a->n_tail, e);
}

static void append(struct probes *p, struct probe *b, uint32_t n_doc, const uint32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        p->ids[p->n_rows] = ids[i];
        p->pos[p->n_rows++] = n_doc + b->n++;
    }
}

/* Head, cue, tail, then cue and quote but for the last token, which is only predicted. */
static void add_probe(struct probes *p, const struct around *a, const uint32_t *ids, uint32_t n,
                      uint32_t at)
{
    struct probe *b = &p->probe[p->n++];

    *b = (struct probe){.at = at, .first = p->n_rows};
    append(p, b, n, a->head, a->n_head);
    append(p, b, n, ids + at - PROBE_CUE, PROBE_CUE);
    append(p, b, n, a->tail, a->n_tail);
    append(p, b, n, ids + at - PROBE_CUE, PROBE_CUE + PROBE_QUOTE - 1);
    b->scored = b->n - PROBE_QUOTE;
}

static int fill(struct probes *p, const struct model *m, const struct around *a,
                const uint32_t *ids, uint32_t n, struct larder_err *e)
{
    size_t rows = a->n_head + a->n_tail + 2 * PROBE_CUE + PROBE_QUOTE - 1;
    uint32_t n_parts = PROBES, room;
    double *weight;
    int rc;

    if (n <= PROBE_CUE + PROBE_QUOTE || n + rows > model_params(m)->n_positions)
        return 0;
    room = n - PROBE_CUE - PROBE_QUOTE;
    if (n / PROBE_EVERY < n_parts) /* a short document is not asked more than it says */
        n_parts = n / PROBE_EVERY > PROBES_LEAST ? n / PROBE_EVERY : PROBES_LEAST;
    n_parts = room < n_parts ? room : n_parts;
    weight = mem_alloc(n, sizeof *weight);
    p->ids = mem_alloc(PROBES * rows, sizeof *p->ids);
    p->pos = mem_alloc(PROBES * rows, sizeof *p->pos);
    rc = weight && p->ids && p->pos ? weigh(m, ids, n, weight, e)
                                    : larder_fail(e, LARDER_ENOMEM, "no memory for probes");
    for (uint32_t i = 0; i < n_parts && !rc; i++) {
        uint32_t lo = PROBE_CUE + (uint32_t)((uint64_t)room * i / n_parts);
        uint32_t hi = PROBE_CUE + (uint32_t)((uint64_t)room * (i + 1) / n_parts);

        add_probe(p, a, ids, n, heaviest(weight, lo, hi));
    }
    mem_free(weight);
    return rc;
}

int probes_make(struct probes **ret, const struct model *m, const struct template *tmpl,
                const uint32_t *ids, uint32_t n, struct larder_err *e)
{
    struct probes *p = mem_zalloc(1, sizeof *p);
    struct around a = {0};
    int rc = p ? encode_around(m, tmpl, &a, e) : larder_fail(e, LARDER_ENOMEM, "no memory");

    if (!rc)
        rc = fill(p, m, &a, ids, n, e);
    mem_free(a.head);
    mem_free(a.tail);
    if (rc) {
        probes_free(p);
        return rc;
    }
    *ret = p;
    return 0;
}

void probes_free(struct probes *p)
{
    if (!p)
        return;
    mem_free(p->ids);
    mem_free(p->pos);
    mem_free(p);
}

/* ---- the certificate */

void certificate_add(struct certificate *c, const struct probe *p, float *full, float *kept,
                     uint32_t n_vocab)
{
    double all = c->kl * c->n_tokens, agree = c->agreement * c->n_tokens, own = 0;

    for (uint32_t t = 0; t < PROBE_QUOTE; t++) {
        float *a = full + (uint64_t)t * n_vocab, *b = kept + (uint64_t)t * n_vocab;

        agree += logprob_from(a, n_vocab) == logprob_from(b, n_vocab);
        own += logprob_kl(a, b, n_vocab);
    }
    c->n_tokens += PROBE_QUOTE;
    c->n_probes++;
    c->kl = (all + own) / c->n_tokens;
    c->agreement = agree / c->n_tokens;
    if (c->n_probes == 1 || own / PROBE_QUOTE > c->worst_kl) {
        c->worst_kl = own / PROBE_QUOTE;
        c->worst_at = p->at;
    }
}
