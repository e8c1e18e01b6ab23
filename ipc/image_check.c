/* image_check.c - trusting a cache image: larder_image_check() and the accessors.
 *
 * The one idea: an image has exactly one legal layout, so the check lays it out anew
 * from the counts and compares every offset. That implies bounds, alignment and the
 * absence of overlap at once. Row data, logits and text are not looked at: any bytes
 * are legal there, the daemon has verified them (that the steps of packed rows are finite,
 * too), and touching 45 MiB would cost a thousand times what the check costs. Token ids,
 * positions and biases are looked at where an image comes from, and by whoever asks: a fetch
 * that reads them again takes three times as long.
 */
#include "larder_image.h"

#include <string.h>

#include "bytes.h"
#include "image_layout.h"
#include "packed.h"

/* Arrays are used in place, so their integers are the machine's. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "cache images are little-endian");

/* Vectors of the compiler, not of one processor: they become whatever the target has. */
typedef int32_t lanes __attribute__((vector_size(16)));
#define N_LANES 4u

static lanes load(const void *p)
{
    lanes v;

    memcpy(&v, p, sizeof v);
    return v;
}

static int any_lane(lanes v)
{
    int32_t any = 0;

    for (unsigned i = 0; i < N_LANES; i++)
        any |= v[i];
    return any != 0;
}

/* Strictly ascending and below n_ctx. Compared as signed: with a first element that is
 * not negative and a last one below n_ctx (at most 2^22), nothing in between is either. */
static int positions_ok(const uint32_t *p, uint32_t n, uint32_t n_ctx)
{
    lanes bad = {0};
    uint32_t i = 0;

    if (!n)
        return 1;
    for (; i + N_LANES < n; i += N_LANES)
        bad |= load(p + i) >= load(p + i + 1);
    for (; i + 1 < n; i++)
        if ((int32_t)p[i] >= (int32_t)p[i + 1])
            return 0;
    return !any_lane(bad) && (int32_t)p[0] >= 0 && p[n - 1] < n_ctx;
}

static int tokens_ok(const uint32_t *p, uint32_t n, uint32_t n_vocab)
{
    lanes bad = {0};
    uint32_t i = 0;

    for (; i + N_LANES <= n; i += N_LANES)
        bad |= (load(p + i) < 0) | (load(p + i) >= (int32_t)n_vocab);
    for (; i < n; i++)
        if (p[i] >= n_vocab)
            return 0;
    return !any_lane(bad);
}

/* Neither infinite nor NaN: not all exponent bits set. */
static int finite_ok(const float *p, uint32_t n)
{
    const uint32_t exponent = 0x7f800000u;
    lanes bad = {0};
    uint32_t i = 0;

    for (; i + N_LANES <= n; i += N_LANES)
        bad |= (load(p + i) & (int32_t)exponent) == (int32_t)exponent;
    for (; i < n; i++) {
        uint32_t u;

        memcpy(&u, p + i, sizeof u);
        if ((u & exponent) == exponent)
            return 0;
    }
    return !any_lane(bad);
}

static int all_zero(const uint8_t *p, size_t n)
{
    uint8_t any = 0;

    for (size_t i = 0; i < n; i++)
        any |= p[i];
    return !any;
}

static int damaged(struct larder_err *e, const char *what)
{
    return larder_fail(e, LARDER_EDAMAGED, "cache image: %s", what);
}

static int check_identity(struct rd *r, uint64_t n_bytes, struct larder_err *e)
{
    uint64_t magic = rd_u64(r);
    uint32_t version = rd_u32(r);
    uint32_t header = rd_u32(r);
    uint64_t total = rd_u64(r);

    if (magic != LARDER_IMAGE_MAGIC)
        return damaged(e, "wrong magic");
    if (version != LARDER_IMAGE_VERSION)
        return larder_fail(e, LARDER_EVERSION, "cache image of version %u; this library reads %u",
                           version, LARDER_IMAGE_VERSION);
    if (header != LARDER_IMAGE_HEADER_BYTES)
        return damaged(e, "wrong header size");
    if (total != n_bytes)
        return damaged(e, "its size is not the one it states");
    return 0;
}

static void read_header(struct rd *r, struct larder_image *im)
{
    im->flags = rd_u32(r);
    im->dtype = rd_u32(r);
    im->n_layers = rd_u32(r);
    im->n_heads = rd_u32(r);
    im->n_kv_heads = rd_u32(r);
    im->head_dim = rd_u32(r);
    im->n_ctx = rd_u32(r);
    im->next_pos = rd_u32(r);
    im->n_vocab = rd_u32(r);
    im->n_tokens = rd_u32(r);
    im->text_len = rd_u64(r);
    im->tokens_off = rd_u64(r);
    im->text_off = rd_u64(r);
    im->logits_off = rd_u64(r);
    im->heads_off = rd_u64(r);
    memcpy(im->key, im->base + IMAGE_AT_KEY, 32);
    memcpy(im->model_fingerprint, im->base + IMAGE_AT_KEY + 32, 32);
    memcpy(im->tokenizer_fingerprint, im->base + IMAGE_AT_KEY + 64, 32);
}

static int check_counts(const struct larder_image *im, struct larder_err *e)
{
    struct kv_geom g = {im->n_layers, im->n_heads, im->n_kv_heads, im->head_dim};
    struct larder_err why;

    if (kv_geom_check(&g, &why))
        return damaged(e, why.msg);
    if (!kv_dtype_bytes((enum kv_dtype)im->dtype) && !packed_type((enum kv_dtype)im->dtype))
        return damaged(e, "unknown element type");
    if (im->flags & ~(LARDER_IMAGE_HAS_BIAS | LARDER_IMAGE_RENUMBERED))
        return damaged(e, "unknown flags");
    if (!im->n_ctx || im->n_ctx > KV_MAX_CTX || im->n_tokens != im->n_ctx)
        return damaged(e, "impossible number of tokens");
    if (!im->n_vocab || im->n_vocab > KV_MAX_VOCAB)
        return damaged(e, "impossible vocabulary");
    if (im->next_pos > KV_MAX_CTX ||
        (!(im->flags & LARDER_IMAGE_RENUMBERED) && im->next_pos < im->n_ctx))
        return damaged(e, "impossible next position");
    if (!all_zero(im->base + IMAGE_AT_ZERO1, IMAGE_AT_KEY - IMAGE_AT_ZERO1) ||
        !all_zero(im->base + IMAGE_AT_ZERO2, LARDER_IMAGE_HEADER_BYTES - IMAGE_AT_ZERO2))
        return damaged(e, "reserved header bytes are not zero");
    return 0;
}

static int check_front(const struct larder_image *im, struct image_cursor *c, struct larder_err *e)
{
    struct kv_geom g = {im->n_layers, im->n_heads, im->n_kv_heads, im->head_dim};
    struct image_front f = image_take_front(c, &g, im->n_ctx, im->n_vocab, im->text_len);

    if (c->bad || c->at > im->n_bytes || f.heads_off != im->heads_off ||
        f.tokens_off != im->tokens_off || f.logits_off != im->logits_off ||
        f.text_off != im->text_off)
        return damaged(e, "an offset in its header is wrong");
    return 0;
}

struct head_entry {
    uint32_t n_rows, zero;
    uint64_t k_off, v_off, position_off, bias_off;
};

static struct head_entry read_head(const struct larder_image *im, uint32_t i)
{
    struct rd r =
        rd_init(im->base + im->heads_off + (uint64_t)i * IMAGE_HEAD_BYTES, IMAGE_HEAD_BYTES);
    struct head_entry h;

    h.n_rows = rd_u32(&r);
    h.zero = rd_u32(&r);
    h.k_off = rd_u64(&r);
    h.v_off = rd_u64(&r);
    h.position_off = rd_u64(&r);
    h.bias_off = rd_u64(&r);
    return h;
}

/* The small arrays: where they are. */
static int check_small(const struct larder_image *im, uint32_t i, struct image_cursor *c,
                       struct larder_err *e)
{
    const int has_bias = (im->flags & LARDER_IMAGE_HAS_BIAS) != 0;
    struct head_entry h = read_head(im, i);
    uint64_t position_off, bias_off;

    if (h.zero || h.n_rows > im->n_ctx)
        return damaged(e, "impossible number of rows");
    if ((im->flags & LARDER_IMAGE_RENUMBERED) && h.n_rows > im->next_pos)
        return damaged(e, "impossible next position");
    position_off = image_take(c, LARDER_IMAGE_ALIGN, h.n_rows, 4);
    bias_off = has_bias ? image_take(c, LARDER_IMAGE_ALIGN, h.n_rows, 4) : 0;
    if (c->bad || c->at > im->n_bytes || h.position_off != position_off || h.bias_off != bias_off)
        return damaged(e, "an offset in its head table is wrong");
    return 0;
}

static int check_large(const struct larder_image *im, uint32_t i, struct image_cursor *c,
                       struct larder_err *e)
{
    enum kv_dtype t = (enum kv_dtype)im->dtype;
    uint64_t first = i % im->n_kv_heads ? LARDER_IMAGE_ALIGN : LARDER_IMAGE_PAGE;
    struct head_entry h = read_head(im, i);
    uint64_t k_off = image_take(c, first, tile_bytes_k(t, h.n_rows, im->head_dim), 1);
    uint64_t v_off = image_take(c, LARDER_IMAGE_ALIGN, tile_bytes_v(t, h.n_rows, im->head_dim), 1);

    if (c->bad || c->at > im->n_bytes || h.k_off != k_off || h.v_off != v_off)
        return damaged(e, "an offset in its head table is wrong");
    return 0;
}

static int check_heads(const struct larder_image *im, struct image_cursor *c, struct larder_err *e)
{
    uint32_t n = im->n_layers * im->n_kv_heads;
    int rc = 0;

    for (uint32_t i = 0; !rc && i < n; i++)
        rc = check_small(im, i, c, e);
    for (uint32_t i = 0; !rc && i < n; i++)
        rc = check_large(im, i, c, e);
    if (!rc && image_take(c, LARDER_IMAGE_PAGE, 0, 0) != im->n_bytes)
        rc = damaged(e, "it is longer than its arrays");
    return rc;
}

/* What is in the small arrays. */
static int check_content(const struct larder_image *im, struct larder_err *e)
{
    if (!tokens_ok(larder_image_tokens(im), im->n_tokens, im->n_vocab))
        return damaged(e, "a token id beyond its vocabulary");
    for (uint32_t i = 0; i < im->n_layers * im->n_kv_heads; i++) {
        struct head_entry h = read_head(im, i);

        if (!positions_ok((const void *)(im->base + h.position_off), h.n_rows, im->n_ctx))
            return damaged(e, "positions that do not ascend below its length");
        if (h.bias_off && !finite_ok((const void *)(im->base + h.bias_off), h.n_rows))
            return damaged(e, "a bias that is not finite");
    }
    return 0;
}

int image_check_layout(const void *mapping, uint64_t n_bytes, struct larder_image *ret,
                       struct larder_err *e)
{
    struct larder_image im = {.base = mapping, .n_bytes = n_bytes};
    struct image_cursor c;
    struct rd r;
    int rc;

    if (!mapping || (uintptr_t)mapping % LARDER_IMAGE_ALIGN)
        return larder_fail(e, LARDER_EINVAL, "an image must be mapped at a multiple of %u bytes",
                           LARDER_IMAGE_ALIGN);
    if (n_bytes < LARDER_IMAGE_HEADER_BYTES)
        return damaged(e, "shorter than its header");
    r = rd_init(mapping, LARDER_IMAGE_HEADER_BYTES);
    rc = check_identity(&r, n_bytes, e);
    if (rc)
        return rc;
    read_header(&r, &im);
    rc = check_counts(&im, e);
    if (!rc)
        rc = check_front(&im, &c, e);
    if (!rc)
        rc = check_heads(&im, &c, e);
    if (!rc)
        *ret = im;
    return rc;
}

int larder_image_check(const void *mapping, uint64_t n_bytes, struct larder_image *ret,
                       struct larder_err *e)
{
    struct larder_image im;
    int rc = image_check_layout(mapping, n_bytes, &im, e);

    if (!rc)
        rc = check_content(&im, e);
    if (!rc)
        *ret = im;
    return rc;
}

struct larder_rows larder_image_rows(const struct larder_image *im, uint32_t layer,
                                     uint32_t kv_head)
{
    struct head_entry h = read_head(im, layer * im->n_kv_heads + kv_head);
    struct larder_rows rows = {
        .n_rows = h.n_rows,
        .k = im->base + h.k_off,
        .v = im->base + h.v_off,
        .position = (const void *)(im->base + h.position_off),
        .bias = h.bias_off ? (const void *)(im->base + h.bias_off) : NULL,
    };

    return rows;
}

const uint32_t *larder_image_tokens(const struct larder_image *im)
{
    return (const void *)(im->base + im->tokens_off);
}

const char *larder_image_text(const struct larder_image *im)
{
    return (const char *)(im->base + im->text_off);
}

const float *larder_image_logits(const struct larder_image *im)
{
    return (const void *)(im->base + im->logits_off);
}
