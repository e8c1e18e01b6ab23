/* main_ask.c - larder-prefill ask: answer a question about a document or a stored image.
 *
 * The one idea: an image, a pruned prefill and a full one all end as a list of past
 * rows per (layer, KV head), and the same decode goes on from there. Greedy: the most
 * likely token, ties to the lower id. */
#include "main_common.h"

#include <stdio.h>
#include <string.h>

#include "decode.h"
#include "larder_image.h"
#include "textout.h"
#include "mem.h"
#include "memfile.h"
#include "sha256.h"
#include "tokenizer.h"

#define MAX_IMAGE_BYTES (1ull << 40)
#define DEFAULT_MAX_NEW 128u

struct question {
    uint32_t *ids;
    size_t n;
};

struct answer {
    uint32_t *ids; /* [max] */
    uint32_t n, max;
    struct text_out text;
    json_t *top; /* after the question */
    double first_ms, decode_ms;
};

/* What the question attends to. */
struct past {
    struct past_rows *rows; /* [n_layers * n_kv_heads], owned */
    uint32_t n_ctx, next_pos;
    const void *map; /* the image's */
    uint64_t map_bytes;
    struct cache cache; /* the prefill's */
    struct engine_result result;
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

/* ---- what comes before the question */

static void past_done(struct past *p)
{
    mem_free(p->rows);
    memfile_unmap(p->map, p->map_bytes);
    cache_done(&p->cache);
    engine_result_done(&p->result);
    *p = (struct past){0};
}

static int alloc_past(const struct ask *a, struct past *p, struct larder_err *e)
{
    const struct kv_geom *g = &a->s.backend->p->geom;

    p->rows = mem_zalloc((uint64_t)g->n_layers * g->n_kv_heads, sizeof *p->rows);
    return p->rows ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the list of rows");
}

static int same_fingerprint(const char *what, const uint8_t image[32], const uint8_t model[32],
                            struct larder_err *e)
{
    char a[65], b[65];

    if (!memcmp(image, model, 32))
        return 0;
    sha256_hex(image, a);
    sha256_hex(model, b);
    return larder_fail(e, LARDER_EINVAL,
                       "the image was made with %s %.16s..., this model has %.16s...; name the "
                       "model it was made with",
                       what, a, b);
}

static int check_image(struct ask *a, const struct larder_image *im, struct larder_err *e)
{
    const struct model_params *p = model_params(a->s.model);
    uint8_t model[32], tok[32];
    int rc = model_fingerprint(a->s.model, model, e);

    if (!rc)
        rc = same_fingerprint("model", im->model_fingerprint, model, e);
    if (rc)
        return rc;
    tokenizer_fingerprint(model_tokenizer(a->s.model), tok);
    rc = same_fingerprint("tokenizer", im->tokenizer_fingerprint, tok, e);
    if (rc)
        return rc;
    if (im->n_layers != p->geom.n_layers || im->n_kv_heads != p->geom.n_kv_heads ||
        im->n_heads != p->geom.n_heads || im->head_dim != p->geom.head_dim)
        return larder_fail(e, LARDER_EDAMAGED, "the image's shape is not its model's");
    if (im->dtype != LARDER_ROWS_BF16 && im->dtype != LARDER_ROWS_F32)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "rows in f16 cannot be resumed from yet; fetch "
                           "the entry as bf16");
    return 0;
}

static int past_from_image(struct ask *a, int fd, struct past *p, struct larder_err *e)
{
    struct larder_image im;
    int rc = memfile_map(fd, UINT64_MAX, MAX_IMAGE_BYTES, &p->map, &p->map_bytes, e);

    if (!rc)
        rc = larder_image_check(p->map, p->map_bytes, &im, e);
    if (!rc)
        rc = check_image(a, &im, e);
    if (!rc)
        rc = alloc_past(a, p, e);
    if (rc)
        return rc;
    for (uint32_t l = 0; l < im.n_layers; l++) {
        for (uint32_t g = 0; g < im.n_kv_heads; g++) {
            struct larder_rows r = larder_image_rows(&im, l, g);

            p->rows[l * im.n_kv_heads + g] = (struct past_rows){
                r.n_rows, im.dtype == LARDER_ROWS_F32 ? KV_F32 : KV_BF16, r.k, r.v, r.bias};
        }
    }
    p->n_ctx = im.n_ctx;
    p->next_pos = im.next_pos;
    return 0;
}

static int past_from_document(struct ask *a, const struct policy *policy, struct past *p,
                              struct larder_err *e)
{
    const struct kv_geom *g = &a->s.backend->p->geom;
    struct engine_sink sink = {&p->cache, cache_add, NULL};
    int rc = cache_init(&p->cache, a->s.backend, true, e);

    if (!rc)
        rc = alloc_past(a, p, e);
    if (!rc)
        rc = engine_prefill(a->s.backend, a->doc.ids, a->doc.n, policy, &sink, &p->result, e);
    if (rc)
        return rc;
    for (uint32_t i = 0; i < g->n_layers * g->n_kv_heads; i++) {
        const struct cached_head *h = &p->cache.head[i];

        p->rows[i] = (struct past_rows){h->n_rows, p->cache.elem, h->k, h->v, NULL};
    }
    p->n_ctx = p->result.n_ctx;
    p->next_pos = p->result.next_pos;
    return 0;
}

/* ---- the answer */

static uint32_t best_id(const float *logits, uint32_t n)
{
    uint32_t best = 0;

    for (uint32_t i = 1; i < n; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

/* Take a token: false when it ends the answer. */
static bool take_token(struct ask *a, struct answer *ans, uint32_t id)
{
    const struct tokenizer *t = model_tokenizer(a->s.model);
    size_t len = 0;
    const char *piece;

    if (!a->ignore_eos && (int64_t)id == tokenizer_eos(t))
        return false;
    ans->ids[ans->n++] = id;
    piece = tokenizer_piece(t, id, &len);
    if (piece && !tokenizer_is_special(t, id))
        text_out_add(&ans->text, piece, len);
    return true;
}

static int generate(struct ask *a, struct decode *d, float *logits, double start,
                    struct answer *ans, struct larder_err *e)
{
    uint32_t n_vocab = a->s.backend->p->n_vocab;
    double first;
    int rc = decode_step(d, a->q.ids, (uint32_t)a->q.n, logits, e);

    if (rc)
        return rc;
    ans->top = json_top_logits(logits, n_vocab);
    first = clock_ms();
    ans->first_ms = first - start;
    while (ans->n < ans->max) {
        uint32_t id = best_id(logits, n_vocab);

        if (!take_token(a, ans, id) || ans->n == ans->max)
            break;
        rc = decode_step(d, &id, 1, logits, e);
        if (rc)
            return rc;
    }
    ans->decode_ms = clock_ms() - first;
    text_out_end(&ans->text);
    return 0;
}

static int answer(struct ask *a, const struct past *p, double start, struct answer *ans,
                  struct larder_err *e)
{
    const struct model_params *mp = a->s.backend->p;
    struct decode *d = NULL;
    float *logits = mem_alloc(mp->n_vocab, sizeof *logits);
    uint64_t left = mp->n_positions > p->next_pos ? mp->n_positions - p->next_pos : 0;
    uint64_t room = a->q.n + (uint64_t)a->max_new;
    int rc = 0;

    /* The answer may reach the model's last position; the question must fit. */
    if (a->q.n < left && room > left)
        room = left;
    ans->max = (uint32_t)(room - a->q.n);
    ans->ids = mem_alloc(ans->max, sizeof *ans->ids);
    if (!logits || !ans->ids)
        rc = larder_fail(e, LARDER_ENOMEM, "no memory for the answer");
    if (!rc)
        rc = decode_open(&d, a->s.backend, a->w, p->rows, p->next_pos, (uint32_t)room, e);
    if (!rc)
        rc = generate(a, d, logits, start, ans, e);
    decode_close(d);
    mem_free(logits);
    return rc;
}

static json_t *json_ids(const uint32_t *ids, size_t n)
{
    json_t *all = json_array();

    for (size_t i = 0; i < n; i++)
        json_array_append_new(all, json_integer(ids[i]));
    return all;
}

static json_t *json_answer(const struct ask *a, const struct policy *policy, const struct past *p,
                           const struct answer *ans)
{
    const struct backend *b = a->s.backend;
    const struct engine_result *r = &p->result;
    double steps = ans->n > 1 ? ans->n - 1 : 0;
    json_t *j = json_pack(
        "{sI sI so sO so ss% sf sf sf sf so ss ss ss}", "n_ctx", (json_int_t)p->n_ctx, "next_pos",
        (json_int_t)p->next_pos, "question_ids", json_ids(a->q.ids, a->q.n), "top_logits", ans->top,
        "generated_ids", json_ids(ans->ids, ans->n), "text", ans->text.buf, ans->text.len,
        "ttft_ms", ans->first_ms - r->load_ms, "prefill_ms", r->prefill_ms, "load_ms", a->load_ms,
        "decode_tokens_per_s", ans->decode_ms > 0 ? steps * 1e3 / ans->decode_ms : 0.0, "sel_layer",
        policy && r->sel_layer >= 0 ? json_integer(r->sel_layer) : json_null(), "backend",
        b->ops->name, "dtype", kv_dtype_name(b->elem), "isa", b->isa);

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
    struct answer ans = {.text = {.stream = a->json ? NULL : stdout}};
    int rc = answer(a, p, start, &ans, e);

    if (!rc && ans.text.failed)
        rc = larder_fail(e, LARDER_EIO, "cannot write the answer");
    if (!rc && a->json)
        rc = json_print(json_answer(a, policy, p, &ans), e);
    else if (!rc)
        putchar('\n');
    json_decref(ans.top);
    text_out_done(&ans.text);
    mem_free(ans.ids);
    return rc;
}

static int ask_document(struct ask *a, const char *text, struct larder_err *e)
{
    struct past past = {0};
    double start = clock_ms();
    struct policy policy;
    int rc = policy_parse(text, &policy, e);

    if (!rc)
        rc = past_from_document(a, &policy, &past, e);
    if (!rc)
        rc = ask_once(a, &policy, &past, start, e);
    past_done(&past);
    return rc;
}

static int ask_image(struct ask *a, uint64_t fd, struct larder_err *e)
{
    struct past past = {0};
    int rc = past_from_image(a, (int)fd, &past, e);

    if (!rc)
        rc = ask_once(a, NULL, &past, clock_ms(), e);
    past_done(&past);
    return rc;
}

/* ---- the command */

static int check(const struct options *o, struct larder_err *e)
{
    struct policy p;
    int rc = 0;

    if (o->n[OPTION_IMAGE_FD] + o->n[OPTION_FILE] + o->n[OPTION_DOC_TOKENS] != 1)
        return main_usage(e, "ask needs one of --image-fd, --file and --doc-tokens");
    if (o->n_args > 1)
        return main_usage(e, "unexpected argument '%.64s'; put the question in quotes", o->arg[1]);
    if ((o->n_args == 1) == (o->n[OPTION_TOKENS] == 1))
        return main_usage(e, "ask needs a QUESTION or --tokens, and not both");
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
    double start = clock_ms();
    int rc = weights_load(&a->w, a->s.backend, e);

    a->load_ms = clock_ms() - start;
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
