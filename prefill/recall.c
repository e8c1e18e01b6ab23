/* recall.c - where a document is worth asking about, the probes' tokens, and the sums.
 *
 * The one idea: what a pruned cache loses first is what stands in the document once: names,
 * numbers, rare words. So each part of the document is asked for the passage whose tokens are
 * rarest in the document itself. */
#include "recall.h"

#include <ctype.h>
#include <math.h>
#include <string.h>

#include "logprob.h"
#include "mem.h"
#include "tokenizer.h"

#define PROBE_EVERY 64u /* document tokens for each probe, */
#define PROBES_LEAST 4u /* but no fewer than these */
#define EXTRA_DIGIT 2.0
#define EXTRA_CAPITAL 1.0

static const char request[] = "Quote some passages of the text exactly.";
static const char between[] = "\n";

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

/* Token ids around the quotes. */
struct around {
    uint32_t *head, *between;
    size_t n_head, n_between;
};

static void around_done(struct around *a)
{
    mem_free(a->head);
    mem_free(a->between);
}

/* The request, and the form in which the answer begins. */
static int encode_head(const struct tokenizer *t, const struct template *tmpl, struct around *a,
                       struct larder_err *e)
{
    const char *head = tmpl ? tmpl->ask_head : "\n\n", *tail = tmpl ? tmpl->ask_tail : "\n";
    uint32_t *more = NULL, *all;
    size_t n = 0;
    int rc = template_join(t, head, request, &a->head, &a->n_head, e);

    if (!rc)
        rc = template_join(t, tail, "", &more, &n, e);
    if (rc)
        return rc;
    all = mem_grow(a->head, a->n_head + n, sizeof *all);
    if (all) {
        memcpy(all + a->n_head, more, n * sizeof *all);
        a->head = all;
        a->n_head += n;
    }
    mem_free(more);
    return all ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for probes");
}

static int encode_around(const struct model *m, const struct template *tmpl, struct around *a,
                         struct larder_err *e)
{
    const struct tokenizer *t = model_tokenizer(m);
    int rc;

    if (!t)
        return 0;
    rc = encode_head(t, tmpl, a, e);
    return rc ? rc : template_join(t, between, "", &a->between, &a->n_between, e);
}

static void append(struct probes *p, uint32_t n_doc, const uint32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++, p->n_rows++) {
        p->ids[p->n_rows] = ids[i];
        p->pos[p->n_rows] = n_doc + p->n_rows;
    }
}

/* Cue and quote. The row before a token predicts it. */
static void add_probe(struct probes *p, const struct around *a, const uint32_t *ids, uint32_t n,
                      uint32_t at)
{
    struct probe *b = &p->probe[p->n++];

    if (p->n > 1)
        append(p, n, a->between, a->n_between);
    append(p, n, ids + at - PROBE_CUE, PROBE_CUE);
    *b = (struct probe){.at = at, .scored = p->n_rows - 1};
    append(p, n, ids + at, PROBE_QUOTE);
}

/* Tokens at which a quote may begin. */
static uint32_t room_of(uint32_t from, uint32_t n)
{
    uint32_t around = from + PROBE_CUE + PROBE_QUOTE;

    return n > around ? n - around : 0;
}

/* Probes for a document of n tokens in the model's positions: one in each of so many parts. */
static uint32_t count_probes(const struct model *m, const struct around *a, uint32_t from,
                             uint32_t n)
{
    uint64_t each = PROBE_CUE + PROBE_QUOTE + a->n_between;
    uint32_t n_positions = model_params(m)->n_positions, n_parts = PROBES;
    uint32_t room = room_of(from, n);
    uint64_t left = n_positions > n ? n_positions - n : 0;

    if (left < a->n_head + each)
        return 0;
    if (n / PROBE_EVERY < n_parts) /* a short document is not asked more than it says */
        n_parts = n / PROBE_EVERY > PROBES_LEAST ? n / PROBE_EVERY : PROBES_LEAST;
    n_parts = room < n_parts ? room : n_parts;
    left = (left - a->n_head) / each;
    return left < n_parts ? (uint32_t)left : n_parts;
}

static int fill(struct probes *p, const struct model *m, const struct around *a,
                const uint32_t *ids, uint32_t from, uint32_t n, struct larder_err *e)
{
    uint32_t n_parts = count_probes(m, a, from, n), room = room_of(from, n);
    uint64_t rows = a->n_head + n_parts * (PROBE_CUE + PROBE_QUOTE + (uint64_t)a->n_between);
    double *weight;
    int rc;

    if (!n_parts)
        return 0;
    weight = mem_alloc(n, sizeof *weight);
    p->ids = mem_alloc(rows, sizeof *p->ids);
    p->pos = mem_alloc(rows, sizeof *p->pos);
    rc = weight && p->ids && p->pos ? weigh(m, ids, n, weight, e)
                                    : larder_fail(e, LARDER_ENOMEM, "no memory for probes");
    if (!rc)
        append(p, n, a->head, a->n_head);
    for (uint32_t i = 0; i < n_parts && !rc; i++) {
        uint32_t lo = from + PROBE_CUE + (uint32_t)((uint64_t)room * i / n_parts);
        uint32_t hi = from + PROBE_CUE + (uint32_t)((uint64_t)room * (i + 1) / n_parts);

        add_probe(p, a, ids, n, heaviest(weight, lo, hi));
    }
    mem_free(weight);
    return rc;
}

int probes_make(struct probes **ret, const struct model *m, const struct template *tmpl,
                const uint32_t *ids, uint32_t from, uint32_t n, struct larder_err *e)
{
    struct probes *p = mem_zalloc(1, sizeof *p);
    struct around a = {0};
    int rc = p ? encode_around(m, tmpl, &a, e) : larder_fail(e, LARDER_ENOMEM, "no memory");

    if (!rc)
        rc = fill(p, m, &a, ids, from, n, e);
    around_done(&a);
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

static uint32_t best_of(const float *x, uint32_t n)
{
    uint32_t best = 0;

    for (uint32_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

void certificate_reference(float *full, uint32_t n_vocab)
{
    for (uint32_t t = 0; t < PROBE_QUOTE; t++)
        logprob_from(full + (uint64_t)t * n_vocab, n_vocab);
}

void certificate_add(struct certificate *c, const struct probe *p, const float *full, float *kept,
                     uint32_t n_vocab)
{
    double all = c->kl * c->n_tokens, agree = c->agreement * c->n_tokens, own = 0;

    for (uint32_t t = 0; t < PROBE_QUOTE; t++) {
        const float *a = full + (uint64_t)t * n_vocab;
        float *b = kept + (uint64_t)t * n_vocab;

        agree += best_of(a, n_vocab) == logprob_from(b, n_vocab);
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
