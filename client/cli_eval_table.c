/* cli_eval_table.c - what results say: one row per policy.
 *
 * The one idea: a section is what one model gave on one kind of machine, and everything that
 * is printed (cli_eval_write.c) or drawn (cli_eval_page.c) is made from its rows. "Kept
 * right" is the share of the questions that the full cache answers right and the pruned
 * one still does; documents are counted once where sizes and times are meant. */
#include "cli_eval.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cli_eval_stat.h"
#include "mem.h"

/* ---- sums over the questions of one policy */

/* What a document adds. */
struct doc_sum {
    struct stat_pair kept, rows, bytes, disk;
    struct stat_mean kl; /* over its questions that the full cache answers right */
    double certified;    /* NAN: no certificate */
    double prefill_ms, fetch_ms;
};

struct sums {
    json_t *place; /* of a document in `doc`, by its name */
    struct doc_sum *doc;
    size_t n_docs, n, n_right;
    struct stat_mean found, kl, agree, nll;
    double *rank;
    size_t n_ranks;
};

static struct doc_sum *doc_of(struct sums *s, const json_t *full, const json_t *pruned)
{
    const char *name = cli_str(full, "doc");
    const json_t *known = json_object_get(s->place, name);
    struct doc_sum *d;

    if (known)
        return &s->doc[json_integer_value(known)];
    json_object_set_new(s->place, name, json_integer((json_int_t)s->n_docs));
    d = &s->doc[s->n_docs++];
    *d = (struct doc_sum){
        .rows = {eval_number(pruned, "rows"), eval_number(full, "rows")},
        .bytes = {eval_number(pruned, "row_bytes"), eval_number(pruned, "full_bytes")},
        .disk = {eval_number(pruned, "stored_bytes"), eval_number(pruned, "full_bytes")},
        .certified = eval_number(pruned, "cert_kl"),
        .prefill_ms = eval_number(pruned, "prefill_ms"),
        .fetch_ms = eval_number(pruned, "fetch_ms")};
    return d;
}

static double worst_rank(const json_t *result)
{
    const json_t *rank;
    double worst = NAN;
    size_t i;

    json_array_foreach (json_object_get(result, "ranks"), i, rank)
        worst = fmax(worst, json_number_value(rank));
    return worst;
}

static void add_question(struct sums *s, const json_t *full, const json_t *pruned)
{
    struct doc_sum *d = doc_of(s, full, pruned);
    bool right = cli_true(full, "right");
    double kl = eval_number(pruned, "kl"), worst = worst_rank(pruned);

    s->n++;
    s->n_right += right;
    d->kept.part += right && cli_true(pruned, "right");
    d->kept.whole += right;
    stat_add(&d->kl, right ? kl : NAN);
    stat_add(&s->kl, right ? kl : NAN);
    stat_add(&s->agree, right ? eval_number(pruned, "top1_agree") : NAN);
    stat_add(&s->found, eval_number(pruned, "found"));
    stat_add(&s->nll, eval_number(pruned, "nll"));
    if (!isnan(worst))
        s->rank[s->n_ranks++] = worst;
}

static void sums_done(struct sums *s)
{
    json_decref(s->place);
    mem_free(s->doc);
    mem_free(s->rank);
}

static int sums_make(struct sums *s, const struct eval_results *r, const struct eval_section *sec,
                     const char *policy, struct larder_err *e)
{
    size_t n = json_array_size(sec->ids), i;
    const json_t *id;

    *s = (struct sums){.place = json_object(),
                       .doc = mem_alloc(n, sizeof *s->doc),
                       .rank = mem_alloc(n, sizeof *s->rank)};
    if (!s->place || !s->doc || !s->rank)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the table");
    json_array_foreach (sec->ids, i, id) {
        const json_t *full = eval_results_get(r, sec->what, json_string_value(id), EVAL_FULL);
        const json_t *pruned = eval_results_get(r, sec->what, json_string_value(id), policy);

        if (full && pruned)
            add_question(s, full, pruned);
    }
    return 0;
}

/* ---- a policy's row */

/* Of one member of every document's sum: its share, over those where it is known. */
static double share_of(const struct sums *s, size_t offset)
{
    struct stat_pair sum = {0, 0};

    for (size_t i = 0; i < s->n_docs; i++) {
        const struct stat_pair *p = (const void *)((const char *)&s->doc[i] + offset);

        if (isnan(p->part) || isnan(p->whole))
            continue;
        sum.part += p->part;
        sum.whole += p->whole;
    }
    return stat_share(&sum, 1);
}

static double mean_of(const struct sums *s, size_t offset)
{
    struct stat_mean m = {0, 0};

    for (size_t i = 0; i < s->n_docs; i++)
        stat_add(&m, *(const double *)(const void *)((const char *)&s->doc[i] + offset));
    return stat_mean(&m);
}

static int row_make(struct eval_row *row, const struct sums *s, const char *policy, uint64_t seed,
                    struct larder_err *e)
{
    struct stat_pair *kept = mem_alloc(s->n_docs, sizeof *kept);
    int rc;

    if (!kept)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the table");
    for (size_t i = 0; i < s->n_docs; i++)
        kept[i] = s->doc[i].kept;
    *row = (struct eval_row){
        .policy = policy,
        .n = s->n,
        .n_docs = s->n_docs,
        .n_full_right = s->n_right,
        .kept = stat_share(kept, s->n_docs),
        .found = stat_mean(&s->found),
        .kl = stat_mean(&s->kl),
        .agree = stat_mean(&s->agree),
        .nll = stat_mean(&s->nll),
        .rank = stat_median(s->rank, s->n_ranks),
        .rows = share_of(s, offsetof(struct doc_sum, rows)),
        .bytes = share_of(s, offsetof(struct doc_sum, bytes)),
        .disk = share_of(s, offsetof(struct doc_sum, disk)),
        .prefill_ms = mean_of(s, offsetof(struct doc_sum, prefill_ms)),
        .fetch_ms = mean_of(s, offsetof(struct doc_sum, fetch_ms)),
        .certified = mean_of(s, offsetof(struct doc_sum, certified)),
    };
    rc = stat_bootstrap(kept, s->n_docs, seed, &row->low, &row->high, e);
    mem_free(kept);
    return rc;
}

/* ---- certificates against measurements, over the entries of all policies */

struct entries {
    double *certified[2], *measured[2]; /* [KL, share of lost answers] */
    size_t n[2], cap;
};

static void add_entries(struct entries *en, const struct sums *s)
{
    for (size_t i = 0; i < s->n_docs && en->n[0] < en->cap; i++) {
        const struct doc_sum *d = &s->doc[i];
        double measured[2] = {stat_mean(&d->kl), 1 - stat_share(&d->kept, 1)};

        for (int k = 0; k < 2; k++) {
            if (isnan(d->certified) || isnan(measured[k]))
                continue;
            en->certified[k][en->n[k]] = d->certified;
            en->measured[k][en->n[k]++] = measured[k];
        }
    }
}

static int entries_new(struct entries *en, size_t cap, struct larder_err *e)
{
    *en = (struct entries){.cap = cap};
    for (int k = 0; k < 2; k++) {
        en->certified[k] = mem_alloc(cap, sizeof(double));
        en->measured[k] = mem_alloc(cap, sizeof(double));
        if (!en->certified[k] || !en->measured[k])
            return larder_fail(e, LARDER_ENOMEM, "no memory for the certificates");
    }
    return 0;
}

static int compare_certificates(struct eval_section *s, const struct entries *en,
                                struct larder_err *e)
{
    int rc = stat_spearman(en->certified[0], en->measured[0], en->n[0], &s->ranks.kl, e);

    if (!rc)
        rc = stat_spearman(en->certified[1], en->measured[1], en->n[1], &s->ranks.lost, e);
    s->ranks.n_kl = en->n[0];
    s->ranks.n_lost = en->n[1];
    return rc;
}

static void entries_done(struct entries *en)
{
    for (int k = 0; k < 2; k++) {
        mem_free(en->certified[k]);
        mem_free(en->measured[k]);
    }
}

/* ---- the section */

static int add_row(struct eval_section *s, const struct eval_results *r, const char *policy,
                   uint64_t seed, struct entries *en, struct larder_err *e)
{
    struct sums sums;
    int rc = sums_make(&sums, r, s, policy, e);

    if (!rc && sums.n) {
        rc = row_make(&s->row[s->n_rows++], &sums, policy, seed, e);
        s->n_docs = sums.n_docs > s->n_docs ? sums.n_docs : s->n_docs;
        add_entries(en, &sums);
    }
    sums_done(&sums);
    return rc;
}

int eval_section_make(struct eval_section *s, const struct eval_results *r, json_t *what,
                      json_t *ids, json_t *policies, uint64_t seed, struct larder_err *e)
{
    size_t n = json_array_size(policies), i;
    struct entries en;
    const json_t *p;
    int rc;

    *s = (struct eval_section){.what = json_incref(what),
                               .ids = json_incref(ids),
                               .policies = json_incref(policies),
                               .row = mem_zalloc(n, sizeof *s->row)};
    rc = entries_new(&en, n * json_array_size(ids), e);
    if (!rc && !s->row)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for the table");
    for (i = 0; !rc && i < n; i++) {
        p = json_array_get(policies, i);
        rc = add_row(s, r, json_string_value(p), seed, &en, e);
    }
    if (!rc)
        rc = compare_certificates(s, &en, e);
    entries_done(&en);
    return rc;
}

void eval_section_done(struct eval_section *s)
{
    json_decref(s->what);
    json_decref(s->ids);
    json_decref(s->policies);
    mem_free(s->row);
    *s = (struct eval_section){0};
}
