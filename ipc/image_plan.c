/* image_plan.c - laying out a new cache image and writing its header.
 *
 * The one idea: offsets follow from counts. Small arrays that the check must read
 * (positions, biases) stand together in front, so that checking an image faults in
 * a few pages instead of two per head; rows follow, each layer on its own pages.
 */
#include "image_plan.h"

#include <string.h>

#include "bytes.h"
#include "image_layout.h"
#include "mem.h"
#include "packed.h"
#include "size.h"

uint64_t image_take(struct image_cursor *c, uint64_t align, uint64_t count, uint64_t size)
{
    uint64_t at = 0, end;

    if (c->bad || !size_align(c->at, align, &at)) {
        c->bad = true;
        return 0;
    }
    end = at;
    if (!size_mac(&end, count, size)) {
        c->bad = true;
        return 0;
    }
    c->at = end;
    return at;
}

struct image_front image_take_front(struct image_cursor *c, const struct kv_geom *g, uint32_t n_ctx,
                                    uint32_t n_vocab, uint64_t text_len)
{
    struct image_front f;

    *c = (struct image_cursor){LARDER_IMAGE_HEADER_BYTES, false};
    f.heads_off =
        image_take(c, LARDER_IMAGE_ALIGN, (uint64_t)g->n_layers * g->n_kv_heads, IMAGE_HEAD_BYTES);
    f.tokens_off = image_take(c, LARDER_IMAGE_ALIGN, n_ctx, 4);
    f.logits_off = image_take(c, LARDER_IMAGE_ALIGN, n_vocab, 4);
    f.text_off = image_take(c, LARDER_IMAGE_ALIGN, text_len, 1);
    return f;
}

static int check_spec(const struct image_spec *s, struct larder_err *e)
{
    uint32_t most = 0;
    int rc = kv_geom_check(&s->geom, e);

    if (rc)
        return rc;
    if (!kv_dtype_bytes(s->dtype) && !packed_type(s->dtype))
        return larder_fail(e, LARDER_EINVAL, "an image holds no rows of type %d", (int)s->dtype);
    if (!s->n_ctx || s->n_ctx > KV_MAX_CTX || !s->n_vocab || s->n_vocab > KV_MAX_VOCAB)
        return larder_fail(e, LARDER_EINVAL, "%u tokens, %u token ids; at most %u and %u", s->n_ctx,
                           s->n_vocab, KV_MAX_CTX, KV_MAX_VOCAB);
    for (uint32_t i = 0; i < s->geom.n_layers * s->geom.n_kv_heads; i++)
        most = s->rows[i] > most ? s->rows[i] : most;
    if (most > s->n_ctx)
        return larder_fail(e, LARDER_EINVAL, "%u rows of %u tokens", most, s->n_ctx);
    if (s->next_pos < (s->renumbered ? most : s->n_ctx) || s->next_pos > KV_MAX_CTX)
        return larder_fail(e, LARDER_EINVAL, "next position %u after %u tokens", s->next_pos,
                           s->n_ctx);
    return 0;
}

static void lay_out(struct image_plan *p, const uint32_t *rows, struct image_cursor *c)
{
    const struct image_spec *s = &p->spec;
    uint32_t n_heads = s->geom.n_kv_heads, n = s->geom.n_layers * n_heads;
    uint32_t d = s->geom.head_dim;
    struct image_front f = image_take_front(c, &s->geom, s->n_ctx, s->n_vocab, s->text_len);

    p->heads_off = f.heads_off;
    p->tokens_off = f.tokens_off;
    p->logits_off = f.logits_off;
    p->text_off = f.text_off;
    for (uint32_t i = 0; i < n; i++) {
        struct image_slot *t = &p->slot[i];

        t->n_rows = rows[i];
        t->position_off = image_take(c, LARDER_IMAGE_ALIGN, t->n_rows, 4);
        t->bias_off = s->has_bias ? image_take(c, LARDER_IMAGE_ALIGN, t->n_rows, 4) : 0;
    }
    for (uint32_t i = 0; i < n; i++) {
        struct image_slot *t = &p->slot[i];
        uint64_t first = i % n_heads ? LARDER_IMAGE_ALIGN : LARDER_IMAGE_PAGE;

        t->k_off = image_take(c, first, tile_bytes_k(s->dtype, t->n_rows, d), 1);
        t->v_off = image_take(c, LARDER_IMAGE_ALIGN, tile_bytes_v(s->dtype, t->n_rows, d), 1);
    }
    p->n_bytes = image_take(c, LARDER_IMAGE_PAGE, 0, 0);
}

int image_plan_new(struct image_plan **ret, const struct image_spec *spec, uint64_t max_bytes,
                   struct larder_err *e)
{
    struct image_cursor c;
    struct image_plan *p = NULL;
    int rc = check_spec(spec, e);

    if (rc)
        return rc;
    p = mem_zalloc(1, sizeof *p);
    if (p)
        p->slot =
            mem_zalloc((uint64_t)spec->geom.n_layers * spec->geom.n_kv_heads, sizeof *p->slot);
    if (!p || !p->slot) {
        image_plan_free(p);
        return larder_fail(e, LARDER_ENOMEM, "no memory to plan an image");
    }
    p->spec = *spec;
    p->spec.rows = NULL;
    lay_out(p, spec->rows, &c);
    if (c.bad || p->n_bytes > max_bytes) {
        rc = larder_fail(e, LARDER_ETOOBIG, "an image of %llu bytes; the limit is %llu",
                         c.bad ? ~0ULL : (unsigned long long)p->n_bytes,
                         (unsigned long long)max_bytes);
        image_plan_free(p);
        return rc;
    }
    *ret = p;
    return 0;
}

void image_plan_free(struct image_plan *p)
{
    if (p)
        mem_free(p->slot);
    mem_free(p);
}

static void write_header(const struct image_plan *p, void *base)
{
    static const uint8_t zero[32];
    const struct image_spec *s = &p->spec;
    struct wr w = wr_init(base, LARDER_IMAGE_HEADER_BYTES);

    wr_u64(&w, LARDER_IMAGE_MAGIC);
    wr_u32(&w, LARDER_IMAGE_VERSION);
    wr_u32(&w, LARDER_IMAGE_HEADER_BYTES);
    wr_u64(&w, p->n_bytes);
    wr_u32(&w, (s->has_bias ? LARDER_IMAGE_HAS_BIAS : 0) |
                   (s->renumbered ? LARDER_IMAGE_RENUMBERED : 0));
    wr_u32(&w, s->dtype);
    wr_u32(&w, s->geom.n_layers);
    wr_u32(&w, s->geom.n_heads);
    wr_u32(&w, s->geom.n_kv_heads);
    wr_u32(&w, s->geom.head_dim);
    wr_u32(&w, s->n_ctx);
    wr_u32(&w, s->next_pos);
    wr_u32(&w, s->n_vocab);
    wr_u32(&w, s->n_ctx); /* n_tokens */
    wr_u64(&w, s->text_len);
    wr_u64(&w, p->tokens_off);
    wr_u64(&w, p->text_off);
    wr_u64(&w, p->logits_off);
    wr_u64(&w, p->heads_off);
    wr_bytes(&w, zero, IMAGE_AT_KEY - IMAGE_AT_ZERO1);
    wr_bytes(&w, s->key, 32);
    wr_bytes(&w, s->model_fingerprint, 32);
    wr_bytes(&w, s->tokenizer_fingerprint, 32);
    wr_bytes(&w, zero, LARDER_IMAGE_HEADER_BYTES - IMAGE_AT_ZERO2);
}

void image_plan_write(const struct image_plan *p, void *base)
{
    uint32_t n = p->spec.geom.n_layers * p->spec.geom.n_kv_heads;
    struct wr w = wr_init((uint8_t *)base + p->heads_off, (size_t)n * IMAGE_HEAD_BYTES);

    write_header(p, base);
    for (uint32_t i = 0; i < n; i++) {
        const struct image_slot *t = &p->slot[i];

        wr_u32(&w, t->n_rows);
        wr_u32(&w, 0);
        wr_u64(&w, t->k_off);
        wr_u64(&w, t->v_off);
        wr_u64(&w, t->position_off);
        wr_u64(&w, t->bias_off);
    }
}
