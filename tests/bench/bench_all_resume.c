/* bench_all_resume.c - a decoder that has its model open: from the fetch of a stored cache to the
 * first token of an answer, and on.
 *
 * bench_all_resume MODEL answers lines of standard input, "SOCKET ENTRY N_NEW ID...": it fetches
 * ENTRY from the larderd at SOCKET as it is stored, asks the question of these token ids, generates
 * N_NEW more tokens greedily and prints one line of JSON. ms: from the request to the first
 * token, fetch_ms of them until the image was mapped and checked; decode_ms: of the others.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "benchlib.h"
#include "decode.h"
#include "larder.h"
#include "mem.h"
#include "model.h"

#define WAIT_MS 60000
#define MAX_QUESTION 4096u
#define MAX_LINE (1u << 16)
#define MAX_SOCKETS 4

struct decoder {
    struct model *model;
    struct backend *b;
    struct weights *w;
    uint8_t fingerprint[32];
    struct past_rows *past; /* [n_layers * n_kv_heads] */
    float *logits;
    struct {
        char *path;
        struct larder *c;
    } peer[MAX_SOCKETS]; /* connected once, as a decoder would be */
};

struct question {
    char *socket, *entry;
    uint32_t id[MAX_QUESTION], n, n_new;
};

static int open_decoder(struct decoder *d, const char *path, struct larder_err *e)
{
    const struct backend_ops *cpu = backend_find("cpu");
    struct backend_opts o = {.dtype = KV_BF16};
    int rc = model_open(&d->model, path, e);

    if (!rc)
        rc = model_fingerprint(d->model, d->fingerprint, e);
    if (rc)
        return rc;
    /* as dtype auto does */
    if (cpu->open(&d->b, d->model, &o, e)) {
        o.dtype = KV_F32;
        rc = cpu->open(&d->b, d->model, &o, e);
    }
    if (!rc)
        rc = weights_load(&d->w, d->b, e);
    if (rc)
        return rc;
    d->past =
        mem_alloc((uint64_t)d->b->p->geom.n_layers * d->b->p->geom.n_kv_heads, sizeof *d->past);
    d->logits = mem_alloc(d->b->p->n_vocab, sizeof *d->logits);
    return d->past && d->logits ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory");
}

static void close_decoder(struct decoder *d)
{
    for (int i = 0; i < MAX_SOCKETS; i++) {
        larder_close(d->peer[i].c);
        free(d->peer[i].path);
    }
    mem_free(d->past);
    mem_free(d->logits);
    weights_free(d->w);
    if (d->b)
        d->b->ops->close(d->b);
    model_close(d->model);
}

static int connection(struct decoder *d, const char *path, struct larder **ret,
                      struct larder_err *e)
{
    int i = 0, rc = 0;

    for (; i < MAX_SOCKETS && d->peer[i].path; i++)
        if (!strcmp(d->peer[i].path, path))
            break;
    if (i == MAX_SOCKETS)
        return larder_fail(e, LARDER_ELIMIT, "more than %d sockets", MAX_SOCKETS);
    if (!d->peer[i].path) {
        rc = larder_connect(&d->peer[i].c, path, WAIT_MS, e);
        d->peer[i].path = rc ? NULL : strdup(path);
    }
    if (!rc)
        *ret = d->peer[i].c;
    return rc;
}

static int use_image(struct decoder *d, const struct larder_image *im, struct larder_err *e)
{
    const struct kv_geom *g = &d->b->p->geom;

    if (memcmp(im->model_fingerprint, d->fingerprint, sizeof d->fingerprint) ||
        im->n_layers != g->n_layers || im->n_kv_heads != g->n_kv_heads)
        return larder_fail(e, LARDER_EINVAL, "the entry was made with another model");
    for (uint32_t i = 0; i < g->n_layers * g->n_kv_heads; i++) {
        struct larder_rows r = larder_image_rows(im, i / g->n_kv_heads, i % g->n_kv_heads);

        d->past[i] = (struct past_rows){r.n_rows, (enum kv_dtype)im->dtype, r.k, r.v, r.bias, r.position};
    }
    return 0;
}

static uint32_t best(const struct decoder *d)
{
    uint32_t id = 0;

    for (uint32_t i = 1; i < d->b->p->n_vocab; i++)
        if (d->logits[i] > d->logits[id])
            id = i;
    return id;
}

static int generate(struct decoder *d, const struct question *q, struct larder_lease *l, double t0,
                    struct larder_err *e)
{
    double fetched = now_us(), first;
    struct decode *s = NULL;
    uint32_t token, id;
    int rc = use_image(d, &l->image, e);

    if (!rc)
        rc = decode_open(&s, d->b, d->w, d->past, l->image.next_pos, q->n + q->n_new, e);
    if (!rc)
        rc = decode_step(s, q->id, q->n, d->logits, e);
    token = id = best(d);
    first = now_us();
    for (uint32_t i = 0; i < q->n_new && !rc; i++) {
        rc = decode_step(s, &id, 1, d->logits, e);
        id = best(d);
    }
    if (!rc)
        printf("{\"ms\": %.3f, \"fetch_ms\": %.3f, \"decode_ms\": %.3f, \"token\": %u, "
               "\"mib\": %.1f, \"about\": \"%s %s %s\"}\n",
               (first - t0) / 1e3, (fetched - t0) / 1e3, (now_us() - first) / 1e3, token,
               (double)l->image.n_bytes / (1 << 20), d->b->ops->name, kv_dtype_name(d->b->elem),
               d->b->isa);
    decode_close(s);
    return rc;
}

static int answer(struct decoder *d, const struct question *q, struct larder_err *e)
{
    static const struct larder_fetch_options as_stored = {.packed = 1};
    struct larder_lease lease;
    struct larder *c = NULL;
    double t0;
    int rc = connection(d, q->socket, &c, e);

    if (rc)
        return rc;
    t0 = now_us();
    rc = larder_fetch_with(c, q->entry, &as_stored, WAIT_MS, &lease, e);
    if (rc)
        return rc;
    rc = generate(d, q, &lease, t0, e);
    larder_release(c, &lease, WAIT_MS, NULL);
    return rc;
}

static bool parse(char *line, struct question *q)
{
    char *at, *word;

    q->n = 0;
    q->socket = strtok_r(line, " \n", &at);
    q->entry = strtok_r(NULL, " \n", &at);
    word = strtok_r(NULL, " \n", &at);
    if (!word)
        return false;
    q->n_new = (uint32_t)strtoul(word, NULL, 10);
    while (q->n < MAX_QUESTION && (word = strtok_r(NULL, " \n", &at)))
        q->id[q->n++] = (uint32_t)strtoul(word, NULL, 10);
    return q->n > 0;
}

int main(int argc, char **argv)
{
    static char line[MAX_LINE];
    static struct question q;
    struct larder_err e = {0, ""};
    struct decoder d = {0};
    int rc;

    if (argc != 2) {
        fprintf(stderr, "usage: bench_all_resume MODEL.gguf\n");
        return 77;
    }
    rc = open_decoder(&d, argv[1], &e);
    while (!rc && fgets(line, sizeof line, stdin)) {
        rc = parse(line, &q) ? answer(&d, &q, &e)
                             : larder_fail(&e, LARDER_EINVAL, "not a question: %s", line);
        fflush(stdout);
    }
    close_decoder(&d);
    if (rc)
        fprintf(stderr, "bench_all_resume: %s (%s)\n", e.msg, larder_status_name(rc));
    return rc != 0;
}
