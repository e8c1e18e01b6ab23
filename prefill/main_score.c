/* main_score.c - larder-prefill ask --questions: many questions with known answers on one cache.
 *
 * The one idea: a document is prefilled once per policy - once for policies that share a replay -
 * and every question is asked on the same rows, in a session of its own. The known answer is
 * forced, token by token in one step, so that each of its positions has logits; where it stops
 * being what the model would say, the session is rewound and the model's own answer goes on from
 * there. The log-probabilities of the first policy, or of the first image, are the reference for
 * all later ones. */
#include "main_common.h"

#include <math.h>
#include <string.h>

#include "logprob.h"
#include "main_past.h"
#include "mem.h"

#define DEFAULT_MAX_NEW 128u
#define MAX_QUESTIONS 10000u
#define MAX_GOLD 1024u           /* tokens of one answer */
#define MAX_REFERENCE (1u << 14) /* answer tokens that are compared: each keeps a vocabulary */

struct question {
    char *id;
    uint32_t *ids; /* [n + n_gold]: the question, then the known answer */
    uint32_t n, n_gold;
    float *reference; /* [n_gold][n_vocab] log-probabilities on the first cache, or NULL */
};

struct gold {
    uint32_t rank; /* 1: the model's choice */
    double logprob;
    double kl; /* of the reference against this */
    bool agrees;
};

struct score {
    struct gold *gold; /* [n_gold] */
    bool compared;     /* kl and agrees are there */
    struct answer a;
};

struct batch {
    struct engine_setup s;
    struct weights *w;
    struct document doc;
    struct question *q;
    uint32_t n;
    uint32_t max_new;
    uint32_t image; /* which one is asked */
    bool ignore_eos, keep_reference;
};

/* ---- questions */

static void questions_done(struct batch *b)
{
    for (uint32_t i = 0; i < b->n; i++) {
        mem_free(b->q[i].id);
        mem_free(b->q[i].ids);
        mem_free(b->q[i].reference);
    }
    mem_free(b->q);
}

static int take_ids(const json_t *list, uint32_t n_vocab, uint32_t *to, struct larder_err *e)
{
    const json_t *v;
    size_t i;

    json_array_foreach (list, i, v) {
        json_int_t id = json_is_integer(v) ? json_integer_value(v) : -1;

        if (id < 0 || id >= (json_int_t)n_vocab)
            return larder_fail(e, LARDER_EINVAL, "entry %zu is not a token id below %u", i,
                               n_vocab);
        to[i] = (uint32_t)id;
    }
    return 0;
}

static int take_question(const json_t *o, const struct model_params *p, struct question *q,
                         struct larder_err *e)
{
    const json_t *ask = json_object_get(o, "question_ids"), *gold = json_object_get(o, "gold_ids");
    const char *id = json_string_value(json_object_get(o, "id"));
    size_t n = json_array_size(ask), n_gold = json_array_size(gold);
    int rc;

    if (!id || !json_is_array(ask) || (gold && !json_is_array(gold)))
        return larder_fail(e, LARDER_EINVAL,
                           "a question is {\"id\": text, \"question_ids\": [...], \"gold_ids\": "
                           "[...]}");
    if (!n)
        return larder_fail(e, LARDER_EEMPTY, "the question has no tokens");
    if (n > p->n_positions || n_gold > MAX_GOLD)
        return larder_fail(e, LARDER_ETOOBIG,
                           "%zu question and %zu answer tokens; at most %u and %u", n, n_gold,
                           p->n_positions, MAX_GOLD);
    q->id = mem_strdup(id);
    q->ids = mem_alloc(n + n_gold, sizeof *q->ids);
    if (!q->id || !q->ids)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the questions");
    rc = take_ids(ask, p->n_vocab, q->ids, e);
    if (!rc)
        rc = take_ids(gold, p->n_vocab, q->ids + n, e);
    q->n = (uint32_t)n;
    q->n_gold = (uint32_t)n_gold;
    return rc;
}

/* Room for one more, zeroed. */
static int more_questions(struct batch *b, struct larder_err *e)
{
    struct question *q;

    if (b->n == MAX_QUESTIONS)
        return larder_fail(e, LARDER_ETOOBIG, "more than %u questions", MAX_QUESTIONS);
    q = mem_grow(b->q, b->n + 1, sizeof *q);
    if (!q)
        return larder_fail(e, LARDER_ENOMEM, "no memory for the questions");
    b->q = q;
    b->q[b->n++] = (struct question){0};
    return 0;
}

static int read_questions(struct batch *b, const char *path, struct larder_err *e)
{
    struct json_lines lines;
    uint64_t n_gold = 0;
    json_t *o = NULL;
    int rc = json_lines_open(&lines, path, e);

    while (!rc && !(rc = json_lines_next(&lines, &o, e)) && o) {
        rc = more_questions(b, e);
        if (!rc)
            rc = take_question(o, b->s.backend->p, &b->q[b->n - 1], e);
        if (rc)
            larder_fail_in(e, rc, "%.200s, line %u", path, lines.line);
        else
            n_gold += b->q[b->n - 1].n_gold;
        json_decref(o);
    }
    json_lines_done(&lines);
    if (!rc && !b->n)
        rc = larder_fail(e, LARDER_EEMPTY, "%.200s has no questions", path);
    if (!rc && b->keep_reference && n_gold > MAX_REFERENCE)
        rc = larder_fail(e, LARDER_ETOOBIG,
                         "%llu answer tokens are too many to compare policies on; at most %u",
                         (unsigned long long)n_gold, MAX_REFERENCE);
    return rc;
}

/* ---- one question on one cache */

static uint32_t rank_of(const float *x, uint32_t n, uint32_t id)
{
    uint32_t rank = 1;

    for (uint32_t i = 0; i < n; i++)
        rank += x[i] > x[id] || (x[i] == x[id] && i < id);
    return rank;
}

/* The known answer's tokens; rows [n_gold][n_vocab] are logits, and log-probabilities after. */
static void score_gold(const struct question *q, float *rows, uint32_t n_vocab, struct score *s)
{
    s->compared = q->reference;
    for (uint32_t i = 0; i < q->n_gold; i++) {
        float *x = rows + (uint64_t)i * n_vocab;
        const float *ref = q->reference ? q->reference + (uint64_t)i * n_vocab : NULL;
        uint32_t id = q->ids[q->n + i];

        logprob_from(x, n_vocab);
        s->gold[i] = (struct gold){.rank = rank_of(x, n_vocab, id), .logprob = x[id]};
        if (ref) {
            s->gold[i].kl = logprob_kl(ref, x, n_vocab);
            s->gold[i].agrees = answer_best(ref, n_vocab) == answer_best(x, n_vocab);
        }
    }
}

/* The model's own answer. It is the known one as long as that is the model's choice, so the
 * rows that were forced serve it too, and only what comes after is computed. */
static int own_answer(const struct batch *b, const struct question *q, struct decode *d,
                      float *rows, struct score *s, struct larder_err *e)
{
    uint32_t i = 0;

    while (i + 1 < q->n_gold && s->gold[i].rank == 1) {
        if (!answer_take(&b->s, &s->a, q->ids[q->n + i])) {
            text_out_end(&s->a.text);
            return 0;
        }
        i++;
    }
    decode_rewind(d, q->n + i);
    return answer_generate(&b->s, d, rows + (uint64_t)i * b->s.backend->p->n_vocab, &s->a, e);
}

static int keep_reference(struct question *q, const float *rows, uint32_t n_vocab,
                          struct larder_err *e)
{
    q->reference = mem_dup(rows, (uint64_t)q->n_gold * n_vocab * sizeof *rows);
    return q->reference
               ? 0
               : larder_fail(e, LARDER_ENOMEM, "no memory for the reference's probabilities");
}

/* Tokens that the session must hold: the forced answer, and as much of the model's own as fits. */
static uint32_t session_room(const struct batch *b, const struct question *q, const struct past *p)
{
    uint32_t n_positions = b->s.backend->p->n_positions;
    uint64_t left = n_positions > p->next_pos ? n_positions - p->next_pos : 0;
    uint64_t forced = q->n + (q->n_gold ? q->n_gold - 1 : 0), own = q->n + (uint64_t)b->max_new;

    if (own > left)
        own = left;
    return (uint32_t)(own > forced ? own : forced);
}

static int ask_question(const struct batch *b, struct question *q, const struct past *p,
                        struct score *s, struct larder_err *e)
{
    uint32_t n_vocab = b->s.backend->p->n_vocab, n_rows = q->n_gold ? q->n_gold : 1;
    uint32_t room = session_room(b, q, p),
             own = room - q->n < b->max_new ? room - q->n : b->max_new;
    float *rows = mem_alloc(n_rows, (uint64_t)n_vocab * sizeof *rows);
    struct decode *d = NULL;
    int rc;

    s->a.ignore_eos = b->ignore_eos;
    s->gold = mem_zalloc(n_rows, sizeof *s->gold);
    rc = rows && s->gold ? answer_init(&s->a, own, e)
                         : larder_fail(e, LARDER_ENOMEM, "no memory for %u answer tokens", n_rows);
    if (!rc)
        rc = decode_open(&d, b->s.backend, b->w, p->rows, p->next_pos, room, e);
    if (!rc)
        rc = decode_step_rows(d, q->ids, q->n + n_rows - 1, n_rows, rows, e);
    if (!rc)
        score_gold(q, rows, n_vocab, s);
    if (!rc && b->keep_reference && !q->reference && q->n_gold)
        rc = keep_reference(q, rows, n_vocab, e);
    if (!rc)
        rc = own_answer(b, q, d, rows, s, e);
    if (!rc && s->a.text.failed)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for the answer");
    decode_close(d);
    mem_free(rows);
    return rc;
}

/* ---- what is printed */

static json_t *json_gold(const struct question *q, const struct score *s)
{
    json_t *all = json_array();

    for (uint32_t i = 0; i < q->n_gold; i++)
        json_array_append_new(all, json_pack("{sI sI sf}", "id", (json_int_t)q->ids[q->n + i],
                                             "rank", (json_int_t)s->gold[i].rank, "logprob",
                                             s->gold[i].logprob));
    return all;
}

/* Means over the known answer's tokens; there is nothing to say without one. */
static json_t *json_means(const struct question *q, const struct score *s)
{
    double nll = 0, kl = 0, agrees = 0, n = q->n_gold;
    bool top1 = true;

    for (uint32_t i = 0; i < q->n_gold; i++) {
        top1 &= s->gold[i].rank == 1;
        nll -= s->gold[i].logprob;
        kl += s->gold[i].kl;
        agrees += s->gold[i].agrees;
    }
    if (!q->n_gold)
        return json_pack("{sn sn}", "all_top1", "nll");
    if (!s->compared)
        return json_pack("{sb sf}", "all_top1", top1, "nll", nll / n);
    return json_pack("{sb sf sf sf}", "all_top1", top1, "nll", nll / n, "kl", kl / n, "top1_agree",
                     agrees / n);
}

static json_t *json_score(const struct batch *b, const struct question *q, const char *policy,
                          const struct past *p, const struct score *s)
{
    const struct kv_geom *g = &b->s.backend->p->geom;
    uint64_t all_rows = (uint64_t)g->n_layers * g->n_kv_heads * p->n_ctx;
    json_t *j = json_pack(
        "{ss ss? sI sI sI sI sI so so ss% sf ss ss ss}", "id", q->id, "policy", policy, "n_ctx",
        (json_int_t)p->n_ctx, "next_pos", (json_int_t)p->next_pos, "rows",
        (json_int_t)past_n_rows(&b->s, p), "row_bytes", (json_int_t)past_row_bytes(&b->s, p),
        "full_bytes", (json_int_t)(all_rows * 2 * g->head_dim * kv_dtype_bytes(KV_BF16)),
        "generated_ids", json_ids(s->a.ids, s->a.n), "gold", json_gold(q, s), "text", s->a.text.buf,
        s->a.text.len, "prefill_ms", p->result.prefill_ms, "backend", b->s.backend->ops->name,
        "dtype", kv_dtype_name(b->s.backend->elem), "isa", b->s.backend->isa);
    json_t *means = json_means(q, s);

    if (!j || !means || json_object_update(j, means) ||
        json_object_set_new(j, "certificate", json_certificate(&p->result.certificate)) ||
        (!policy && json_object_set_new(j, "image", json_integer(b->image)))) {
        json_decref(j);
        j = NULL;
    }
    json_decref(means);
    return j;
}

/* ---- the whole batch */

static int score_past(struct batch *b, const char *policy, const struct past *p,
                      struct larder_err *e)
{
    int rc = 0;

    for (uint32_t i = 0; i < b->n && !rc; i++) {
        struct score s = {0};

        rc = ask_question(b, &b->q[i], p, &s, e);
        if (!rc)
            rc = json_print(json_score(b, &b->q[i], policy, p, &s), e);
        else
            larder_fail_in(e, rc, "question %.100s", b->q[i].id);
        answer_done(&s.a);
        mem_free(s.gold);
    }
    return rc;
}

static int score_policy(void *arg, const struct policy *policy, struct past *p,
                        struct larder_err *e)
{
    char canonical[POLICY_TEXT_MAX];

    policy_print(policy, canonical);
    return score_past(arg, canonical, p, e);
}

/* ---- images: of one document, the first of them the reference */

static int score_image(struct batch *b, int fd, const struct past *first, struct past *p,
                       struct larder_err *e)
{
    int rc = past_from_image(&b->s, fd, p, e);

    if (!rc && (p->n_ctx != first->n_ctx ||
                memcmp(p->tokens, first->tokens, (uint64_t)p->n_ctx * sizeof *p->tokens)))
        rc = larder_fail(e, LARDER_EINVAL, "image %u is not of the first one's document",
                         b->image + 1);
    return rc ? rc : score_past(b, NULL, p, e);
}

static int score_images(const struct options *o, struct batch *b, struct larder_err *e)
{
    struct past first = {0};
    int rc = 0;

    for (b->image = 0; b->image < o->n[OPTION_IMAGE_FD] && !rc; b->image++) {
        struct past later = {0};
        uint64_t fd = 0;

        rc = option_number_at(o, OPTION_IMAGE_FD, b->image, 1u << 20, &fd, e);
        if (!rc)
            rc = score_image(b, (int)fd, &first, b->image ? &later : &first, e);
        past_done(&later);
    }
    past_done(&first);
    return rc;
}

static int score_all(const struct options *o, struct batch *b, struct larder_err *e)
{
    static const char *const full = "full";
    uint32_t n = o->n[OPTION_POLICY];

    if (o->n[OPTION_IMAGE_FD])
        return score_images(o, b, e);
    return past_each(&b->s, &b->doc, n ? o->value[OPTION_POLICY] : &full, n ? n : 1, true,
                     score_policy, b, e);
}

int main_score(const struct options *o, struct larder_err *e)
{
    uint64_t max_new = DEFAULT_MAX_NEW;
    struct batch b = {.ignore_eos = o->n[OPTION_IGNORE_EOS],
                      .keep_reference = o->n[OPTION_POLICY] > 1 || o->n[OPTION_IMAGE_FD] > 1};
    int rc = option_number(o, OPTION_MAX_NEW, KV_MAX_CTX, &max_new, e);

    b.max_new = (uint32_t)max_new;
    if (!rc)
        rc = setup_open(o, &b.s, e);
    if (!rc)
        rc = read_questions(&b, option_get(o, OPTION_QUESTIONS), e);
    if (!rc && !o->n[OPTION_IMAGE_FD])
        rc = document_read(&b.s, option_get(o, OPTION_FILE), option_get(o, OPTION_DOC_TOKENS),
                           &b.doc, e);
    if (!rc)
        rc = weights_load(&b.w, b.s.backend, e);
    if (!rc)
        rc = score_all(o, &b, e);
    questions_done(&b);
    document_done(&b.doc);
    weights_free(b.w);
    setup_done(&b.s);
    return rc;
}
