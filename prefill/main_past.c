/* main_past.c - past rows from an image or a prefill, and greedy generation on top of them.
 *
 * An image is used in place; a prefill's rows stay in the cache that collected them. */
#include "main_past.h"

#include <string.h>

#include "larder_image.h"
#include "mem.h"
#include "memfile.h"
#include "packed.h"
#include "sha256.h"
#include "tokenizer.h"

#define MAX_IMAGE_BYTES (1ull << 40)
#define MOST_TOGETHER 16u /* policies of one pass: each is a cache */

/* ---- what comes before the question */

void past_done(struct past *p)
{
    mem_free(p->rows);
    memfile_unmap(p->map, p->map_bytes);
    cache_done(&p->cache);
    engine_result_done(&p->result);
    *p = (struct past){0};
}

static int alloc_past(const struct engine_setup *s, struct past *p, struct larder_err *e)
{
    const struct kv_geom *g = &s->backend->p->geom;

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

static int check_image(const struct engine_setup *s, const struct larder_image *im,
                       struct larder_err *e)
{
    const struct model_params *p = model_params(s->model);
    uint8_t model[32], tok[32];
    int rc = model_fingerprint(s->model, model, e);

    if (!rc)
        rc = same_fingerprint("model", im->model_fingerprint, model, e);
    if (rc)
        return rc;
    tokenizer_fingerprint(model_tokenizer(s->model), tok);
    rc = same_fingerprint("tokenizer", im->tokenizer_fingerprint, tok, e);
    if (rc)
        return rc;
    if (im->n_layers != p->geom.n_layers || im->n_kv_heads != p->geom.n_kv_heads ||
        im->n_heads != p->geom.n_heads || im->head_dim != p->geom.head_dim)
        return larder_fail(e, LARDER_EDAMAGED, "the image's shape is not its model's");
    if (im->dtype == LARDER_ROWS_F16)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "rows in f16 cannot be resumed from yet; fetch "
                           "the entry as bf16");
    return 0;
}

int past_from_image(const struct engine_setup *s, int fd, struct past *p, struct larder_err *e)
{
    struct larder_image im;
    int rc = memfile_map_served(fd, UINT64_MAX, MAX_IMAGE_BYTES, &p->map, &p->map_bytes, e);

    if (!rc)
        rc = larder_image_check(p->map, p->map_bytes, &im, e);
    if (!rc)
        rc = check_image(s, &im, e);
    if (!rc)
        rc = alloc_past(s, p, e);
    if (rc)
        return rc;
    for (uint32_t l = 0; l < im.n_layers; l++) {
        for (uint32_t g = 0; g < im.n_kv_heads; g++) {
            struct larder_rows r = larder_image_rows(&im, l, g);

            p->rows[l * im.n_kv_heads + g] =
                (struct past_rows){r.n_rows, (enum kv_dtype)im.dtype, r.k, r.v, r.bias, r.position};
        }
    }
    p->tokens = larder_image_tokens(&im);
    p->n_ctx = im.n_ctx;
    p->next_pos = im.next_pos;
    return 0;
}

static void take_rows(const struct engine_setup *s, struct past *p)
{
    const struct kv_geom *g = &s->backend->p->geom;

    for (uint32_t i = 0; i < g->n_layers * g->n_kv_heads; i++) {
        const struct cached_head *h = &p->cache.head[i];

        p->rows[i] = (struct past_rows){h->n_rows, h->dtype, h->k, h->v, h->bias, h->position};
    }
    p->n_ctx = p->result.n_ctx;
    p->next_pos = p->result.next_pos;
}

/* p[n] of policies that share a pass. */
static int prefill_together(const struct engine_setup *s, const struct document *d,
                            const struct policy *policy, uint32_t n, bool with_kv, struct past *p,
                            struct larder_err *e)
{
    struct engine_doc doc = {d->ids, d->n, s->tmpl, s->shares};
    struct engine_sink *sink = mem_alloc(n, sizeof *sink);
    struct engine_result *result = mem_zalloc(n, sizeof *result);
    int rc = sink && result ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for %u policies", n);

    for (uint32_t i = 0; i < n && !rc; i++) {
        sink[i] = (struct engine_sink){&p[i].cache, cache_add, NULL};
        rc = cache_init(&p[i].cache, s->backend, with_kv, e);
        if (!rc)
            rc = alloc_past(s, &p[i], e);
    }
    if (!rc)
        rc = engine_prefill_each(s->backend, &doc, policy, sink, n, result, e);
    for (uint32_t i = 0; i < n && !rc; i++) {
        p[i].result = result[i];
        take_rows(s, &p[i]);
    }
    mem_free(sink);
    mem_free(result);
    return rc;
}

int past_from_document(const struct engine_setup *s, const struct document *d,
                       const struct policy *policy, struct past *p, struct larder_err *e)
{
    return prefill_together(s, d, policy, 1, true, p, e);
}

static int run_together(const struct engine_setup *s, const struct document *d,
                        const struct policy *policy, uint32_t n, bool with_kv, past_run *run,
                        void *arg, struct larder_err *e)
{
    struct past *p = mem_zalloc(n, sizeof *p);
    int rc = p ? prefill_together(s, d, policy, n, with_kv, p, e)
               : larder_fail(e, LARDER_ENOMEM, "no memory for %u policies", n);

    for (uint32_t i = 0; i < n && !rc; i++)
        rc = run(arg, &policy[i], &p[i], e);
    for (uint32_t i = 0; p && i < n; i++)
        past_done(&p[i]);
    mem_free(p);
    return rc;
}

static uint32_t neighbours(const struct policy *p, uint32_t n)
{
    uint32_t many = 1;

    while (many < n && many < MOST_TOGETHER && policy_same_pass(p, p + many))
        many++;
    return many;
}

int past_each(const struct engine_setup *s, const struct document *d, const char *const *text,
              uint32_t n, bool with_kv, past_run *run, void *arg, struct larder_err *e)
{
    struct policy *p = mem_alloc(n, sizeof *p);
    int rc = p ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for %u policies", n);

    for (uint32_t i = 0; i < n && !rc; i++)
        rc = setup_policy(s, text[i], &p[i], e);
    for (uint32_t i = 0, many; i < n && !rc; i += many) {
        many = neighbours(p + i, n - i);
        rc = run_together(s, d, p + i, many, with_kv, run, arg, e);
    }
    mem_free(p);
    return rc;
}

/* ---- how much it is */

static uint32_t n_heads(const struct engine_setup *s)
{
    return s->backend->p->geom.n_layers * s->backend->p->geom.n_kv_heads;
}

uint64_t past_n_rows(const struct engine_setup *s, const struct past *p)
{
    uint64_t n = 0;

    for (uint32_t i = 0; i < n_heads(s); i++)
        n += p->rows[i].n_rows;
    return n;
}

/* Rows that are not packed are stored in bf16 whatever they were computed in; a bias takes two
 * bytes more. */
uint64_t past_row_bytes(const struct engine_setup *s, const struct past *p)
{
    uint32_t d = s->backend->p->geom.head_dim;
    uint64_t n = 0;

    for (uint32_t i = 0; i < n_heads(s); i++) {
        const struct past_rows *r = &p->rows[i];
        enum kv_dtype t = packed_type(r->dtype) ? r->dtype : KV_BF16;

        n += tile_bytes_k(t, r->n_rows, d) + tile_bytes_v(t, r->n_rows, d) +
             (r->bias ? 2ull * r->n_rows : 0);
    }
    return n;
}

/* ---- the answer */

int answer_init(struct answer *a, uint32_t max, struct larder_err *e)
{
    a->ids = mem_alloc(max, sizeof *a->ids);
    a->max = max;
    return a->ids ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the answer");
}

void answer_done(struct answer *a)
{
    text_out_done(&a->text);
    mem_free(a->ids);
}

uint32_t answer_best(const float *logits, uint32_t n_vocab)
{
    uint32_t best = 0;

    for (uint32_t i = 1; i < n_vocab; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

bool answer_take(const struct engine_setup *s, struct answer *a, uint32_t id)
{
    const struct tokenizer *t = model_tokenizer(s->model);
    size_t len = 0;
    const char *piece;

    if (a->n == a->max || (!a->ignore_eos && model_is_end(s->model, id)))
        return false;
    a->ids[a->n++] = id;
    piece = tokenizer_piece(t, id, &len);
    if (piece && !tokenizer_is_special(t, id))
        text_out_add(&a->text, piece, len);
    return a->n < a->max;
}

int answer_generate(const struct engine_setup *s, struct decode *d, float *logits, struct answer *a,
                    struct larder_err *e)
{
    uint32_t id = answer_best(logits, s->backend->p->n_vocab);

    while (answer_take(s, a, id)) {
        int rc = decode_step(d, &id, 1, logits, e);

        if (rc)
            return rc;
        id = answer_best(logits, s->backend->p->n_vocab);
    }
    text_out_end(&a->text);
    return 0;
}

json_t *json_ids(const uint32_t *ids, size_t n)
{
    json_t *all = json_array();

    for (size_t i = 0; i < n; i++)
        json_array_append_new(all, json_integer(ids[i]));
    return all;
}
