/* main_ask.c - larder-prefill ask: answer a question about a document or a stored image.
 *
 * The one idea: an image, a pruned prefill and a full one all end as past rows
 * (main_past.h), and the same decode goes on from there. Many questions at once, with
 * known answers, are main_score.c's. */
#include "main_common.h"

#include <stdio.h>
#include <string.h>

#include "main_past.h"
#include "mem.h"
#include "pass.h"

#define DEFAULT_MAX_NEW 128u

struct question {
    uint32_t *ids;
    size_t n;
};

/* One answer with what is said about it. */
struct reply {
    struct answer a;
    json_t *top; /* after the question */
    double first_ms, decode_ms;
};

struct ask {
    struct engine_setup s;
    struct weights *w;
    struct document doc;
    struct question q;
    uint32_t max_new;
    bool ignore_eos, json, trace;
    double load_ms;
};

/* ---- the answer */

static int generate(struct ask *a, struct decode *d, float *logits, double start, struct reply *r,
                    struct larder_err *e)
{
    double first;
    int rc = decode_step(d, a->q.ids, (uint32_t)a->q.n, logits, e);

    if (rc)
        return rc;
    r->top = json_top_logits(logits, a->s.backend->p->n_vocab);
    first = pass_clock_ms();
    r->first_ms = first - start;
    rc = answer_generate(&a->s, d, logits, &r->a, e);
    r->decode_ms = pass_clock_ms() - first;
    return rc;
}

static int answer(struct ask *a, const struct past *p, double start, struct reply *r,
                  struct larder_err *e)
{
    const struct model_params *mp = a->s.backend->p;
    struct decode *d = NULL;
    float *logits = mem_alloc(mp->n_vocab, sizeof *logits);
    uint64_t left = mp->n_positions > p->next_pos ? mp->n_positions - p->next_pos : 0;
    uint64_t room = a->q.n + (uint64_t)a->max_new;
    int rc = logits ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the answer");

    /* The answer may reach the model's last position; the question must fit. */
    if (a->q.n < left && room > left)
        room = left;
    if (!rc)
        rc = answer_init(&r->a, (uint32_t)(room - a->q.n), e);
    if (!rc)
        rc = decode_open(&d, a->s.backend, a->w, p->rows, p->next_pos, (uint32_t)room, e);
    if (!rc)
        rc = generate(a, d, logits, start, r, e);
    decode_close(d);
    mem_free(logits);
    return rc;
}

static json_t *json_answer(const struct ask *a, const struct policy *policy, const struct past *p,
                           const struct reply *reply)
{
    const struct backend *b = a->s.backend;
    const struct engine_result *r = &p->result;
    double steps = reply->a.n > 1 ? reply->a.n - 1 : 0;
    json_t *j = json_pack("{sI sI so sO so ss% sf sf sf sf so ss ss ss}", "n_ctx",
                          (json_int_t)p->n_ctx, "next_pos", (json_int_t)p->next_pos, "question_ids",
                          json_ids(a->q.ids, a->q.n), "top_logits", reply->top, "generated_ids",
                          json_ids(reply->a.ids, reply->a.n), "text", reply->a.text.buf,
                          reply->a.text.len, "ttft_ms", reply->first_ms - r->load_ms, "prefill_ms",
                          r->prefill_ms, "load_ms", a->load_ms, "decode_tokens_per_s",
                          reply->decode_ms > 0 ? steps * 1e3 / reply->decode_ms : 0.0, "sel_layer",
                          policy && r->sel_layer >= 0 ? json_integer(r->sel_layer) : json_null(),
                          "backend", b->ops->name, "dtype", kv_dtype_name(b->elem), "isa", b->isa);

    if (j && policy && a->trace &&
        json_object_set_new(j, "trace", json_trace(b, policy, r, &p->cache))) {
        json_decref(j);
        return NULL;
    }
    return j;
}

/* One answer. ttft counts from when the weights are loaded and the document is at hand: the
 * prefill reads every layer again, which a program with its weights in memory would not. */
static int ask_once(struct ask *a, const struct policy *policy, struct past *p, double start,
                    struct larder_err *e)
{
    struct reply r = {
        .a = {.ignore_eos = a->ignore_eos, .text = {.stream = a->json ? NULL : stdout}}};
    int rc = answer(a, p, start, &r, e);

    if (!rc && r.a.text.failed)
        rc = larder_fail(e, LARDER_EIO, "cannot write the answer");
    if (!rc && a->json)
        rc = json_print(json_answer(a, policy, p, &r), e);
    else if (!rc)
        putchar('\n');
    json_decref(r.top);
    answer_done(&r.a);
    return rc;
}

static int ask_document(struct ask *a, const char *text, struct larder_err *e)
{
    struct past past = {0};
    double start = pass_clock_ms();
    struct policy policy;
    int rc = setup_policy(&a->s, text, &policy, e);

    if (!rc)
        rc = past_from_document(&a->s, &a->doc, &policy, &past, e);
    if (!rc)
        rc = ask_once(a, &policy, &past, start, e);
    past_done(&past);
    return rc;
}

static int ask_image(struct ask *a, uint64_t fd, struct larder_err *e)
{
    struct past past = {0};
    int rc = past_from_image(&a->s, (int)fd, &past, e);

    if (!rc)
        rc = ask_once(a, NULL, &past, pass_clock_ms(), e);
    past_done(&past);
    return rc;
}

/* ---- the command */

static int check(const struct options *o, struct larder_err *e)
{
    struct policy p;
    int rc = 0;

    if ((o->n[OPTION_IMAGE_FD] > 0) + o->n[OPTION_FILE] + o->n[OPTION_DOC_TOKENS] != 1)
        return main_usage(e, "ask needs one of --image-fd, --file and --doc-tokens");
    if (o->n_args > 1)
        return main_usage(e, "unexpected argument '%.64s'; put the question in quotes", o->arg[1]);
    if (o->n_args + o->n[OPTION_TOKENS] + o->n[OPTION_QUESTIONS] != 1)
        return main_usage(e, "ask needs one of QUESTION, --tokens and --questions");
    if (o->n[OPTION_QUESTIONS] && o->n[OPTION_TRACE])
        return main_usage(e, "--trace goes with one question");
    if (o->n[OPTION_IMAGE_FD] > 1 && !o->n[OPTION_QUESTIONS])
        return main_usage(e, "several --image-fd go with --questions");
    if (o->n[OPTION_IMAGE_FD] && o->n[OPTION_POLICY])
        return main_usage(e, "--policy goes with a document: an image has its policy");
    for (uint32_t i = 0; i < o->n[OPTION_POLICY] && !rc; i++)
        rc = policy_parse(o->value[OPTION_POLICY][i], &p, e);
    return rc;
}

static int read_question(const struct options *o, struct ask *a, struct larder_err *e)
{
    struct document d = {0};
    int rc;

    if (o->n_args)
        return template_question(a->s.tmpl, model_tokenizer(a->s.model), o->arg[0],
                                 strlen(o->arg[0]), &a->q.ids, &a->q.n, e);
    rc = document_read(&a->s, NULL, option_get(o, OPTION_TOKENS), &d, e);
    if (rc)
        return rc;
    a->q = (struct question){d.ids, d.n};
    return d.n ? 0 : larder_fail(e, LARDER_EEMPTY, "the question has no tokens");
}

static int load_weights(struct ask *a, struct larder_err *e)
{
    double start = pass_clock_ms();
    int rc = weights_load(&a->w, a->s.backend, e);

    a->load_ms = pass_clock_ms() - start;
    return rc;
}

static int ask_all(const struct options *o, struct ask *a, uint64_t fd, struct larder_err *e)
{
    int rc = 0;

    if (o->n[OPTION_IMAGE_FD])
        return ask_image(a, fd, e);
    if (!o->n[OPTION_POLICY])
        return ask_document(a, "full", e);
    for (uint32_t i = 0; i < o->n[OPTION_POLICY] && !rc; i++)
        rc = ask_document(a, o->value[OPTION_POLICY][i], e);
    return rc;
}

int main_ask(const struct options *o, struct larder_err *e)
{
    uint64_t fd = 0, max_new = DEFAULT_MAX_NEW;
    struct ask a = {.ignore_eos = o->n[OPTION_IGNORE_EOS],
                    .json = o->n[OPTION_JSON],
                    .trace = o->n[OPTION_TRACE]};
    int rc = check(o, e);

    if (!rc && o->n[OPTION_QUESTIONS])
        return main_score(o, e);
    if (!rc)
        rc = option_number(o, OPTION_IMAGE_FD, 1u << 20, &fd, e);
    if (!rc)
        rc = option_number(o, OPTION_MAX_NEW, KV_MAX_CTX, &max_new, e);
    a.max_new = (uint32_t)max_new;
    if (!rc)
        rc = setup_open(o, &a.s, e);
    if (!rc)
        rc = read_question(o, &a, e);
    if (!rc && !o->n[OPTION_IMAGE_FD])
        rc = document_read(&a.s, option_get(o, OPTION_FILE), option_get(o, OPTION_DOC_TOKENS),
                           &a.doc, e);
    if (!rc)
        rc = load_weights(&a, e);
    if (!rc)
        rc = ask_all(o, &a, fd, e);
    mem_free(a.q.ids);
    document_done(&a.doc);
    weights_free(a.w);
    setup_done(&a.s);
    return rc;
}
