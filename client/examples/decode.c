/* decode.c - what a decoder does with a stored cache: fetch it, walk its rows, attend to them.
 *
 *     cc -o decode decode.c $(pkg-config --cflags --libs larder) -lm
 *     ./decode manual
 *
 * A real decoder has queries of its own: rows of the new tokens, rotated for positions next_pos and
 * on. Here each KV head is asked with its own last key, so that the program needs no model; it
 * prints how many rows each layer kept and which position its first head attends to most.
 */
#include <larder.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TIMEOUT_MS 10000

/* bf16 is the upper half of a float. */
static float element(const void *rows, size_t i)
{
    uint32_t bits = (uint32_t)((const uint16_t *)rows)[i] << 16;
    float x;

    memcpy(&x, &bits, sizeof x);
    return x;
}

static float logit(const struct larder_rows *r, uint32_t row, const float *q, uint32_t d)
{
    float sum = 0;

    for (uint32_t c = 0; c < d; c++)
        sum += q[c] * element(r->k, (size_t)row * d + c);
    sum /= sqrtf((float)d);
    return r->bias ? sum + r->bias[row] : sum; /* for the rows that were dropped */
}

/* One query q[d] on all stored rows of its KV head: weights[n_rows] and the output out[d]. A decoder
 * goes on over the new tokens' own rows, causally, under the same maximum and sum. */
static void attend(const struct larder_rows *r, const float *q, uint32_t d, float *weights,
                   float *out)
{
    float most = -INFINITY, sum = 0;

    for (uint32_t i = 0; i < r->n_rows; i++) {
        weights[i] = logit(r, i, q, d);
        most = fmaxf(most, weights[i]);
    }
    for (uint32_t i = 0; i < r->n_rows; i++)
        sum += weights[i] = expf(weights[i] - most);
    for (uint32_t c = 0; c < d; c++)
        out[c] = 0;
    for (uint32_t i = 0; i < r->n_rows; i++) {
        weights[i] /= sum;
        for (uint32_t c = 0; c < d; c++)
            out[c] += weights[i] * element(r->v, (size_t)i * d + c);
    }
}

static uint32_t largest(const float *x, uint32_t n)
{
    uint32_t best = 0;

    for (uint32_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

/* Heads of a layer keep different numbers of rows, and may keep none. `room` has space for n_ctx
 * weights, a query and an output. */
static void walk_layer(const struct larder_image *im, uint32_t layer, float *room)
{
    struct larder_rows first = larder_image_rows(im, layer, 0);
    uint32_t d = im->head_dim, total = 0, top;
    float *weights = room, *q = room + im->n_ctx, *out = q + d, norm = 0;

    for (uint32_t g = 0; g < im->n_kv_heads; g++)
        total += larder_image_rows(im, layer, g).n_rows;
    printf("%5u  %8u", layer, total);
    if (first.n_rows) {
        for (uint32_t c = 0; c < d; c++)
            q[c] = element(first.k, (size_t)(first.n_rows - 1) * d + c);
        attend(&first, q, d, weights, out);
        top = largest(weights, first.n_rows);
        for (uint32_t c = 0; c < d; c++)
            norm += out[c] * out[c];
        printf("  %8u  %6.3f  %6.3f", first.position[top], weights[top], sqrtf(norm));
    }
    printf("\n");
}

static int walk(const struct larder_image *im)
{
    float *room = malloc(((size_t)im->n_ctx + 2 * im->head_dim) * sizeof *room);

    if (!room)
        return LARDER_ENOMEM;
    printf(
        "%u tokens, the next one at position %u; %u layers, %u KV heads for %u query heads of %u\n",
        im->n_ctx, im->next_pos, im->n_layers, im->n_kv_heads, im->n_heads, im->head_dim);
    printf("likeliest next token: %u\n", largest(larder_image_logits(im), im->n_vocab));
    printf("layer      rows  position  weight  output\n");
    for (uint32_t layer = 0; layer < im->n_layers; layer++)
        walk_layer(im, layer, room);
    free(room);
    return 0;
}

int main(int argc, char **argv)
{
    struct larder *c = NULL;
    struct larder_lease lease;
    struct larder_err e = {0, ""};
    int rc;

    if (argc != 2) {
        fprintf(stderr, "usage: decode NAME\n");
        return 2;
    }
    rc =
        larder_connect(&c, NULL, TIMEOUT_MS, &e); /* NULL: $LARDER_SOCKET, or the system's daemon */
    if (!rc)
        rc = larder_fetch(c, argv[1], TIMEOUT_MS, &lease, &e); /* checked; rows are bf16 */
    if (rc) {
        fprintf(stderr, "decode: %s (%s)\n", e.msg, larder_status_name(rc));
        larder_close(c);
        return 1;
    }
    rc = walk(&lease.image);
    larder_release(c, &lease, TIMEOUT_MS, NULL);
    larder_close(c);
    return rc ? 1 : 0;
}
