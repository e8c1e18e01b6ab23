/* calibrate.c - scores of a replay, layer by layer, into shares of every head. */
#include "calibrate.h"

#include <string.h>

#include "geom.h"
#include "mem.h"
#include "offline.h"

#define CHUNK 512u
#define SINK 4u

static const double budgets[] = {0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.75};
#define N_BUDGETS (sizeof budgets / sizeof budgets[0])

struct calibration {
    struct backend *b;
    uint32_t n_heads, n_texts, n_done;
    struct calibrate_watch watch;
    double *sum; /* [N_BUDGETS][n_heads] */
    /* of the text under way */
    uint32_t n;
    float **score; /* [n_heads][n], both levels owned */
};

int calibrate_open(struct calibration **ret, struct backend *b, uint32_t n_texts,
                   const struct calibrate_watch *watch, struct larder_err *e)
{
    struct calibration *c = mem_zalloc(1, sizeof *c);

    if (!c)
        return larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");
    c->b = b;
    c->n_texts = n_texts;
    if (watch)
        c->watch = *watch;
    c->n_heads = b->p->geom.n_layers * b->p->geom.n_kv_heads;
    c->sum = mem_zalloc(N_BUDGETS * (uint64_t)c->n_heads, sizeof *c->sum);
    c->score = mem_zalloc(c->n_heads, sizeof *c->score);
    if (!c->sum || !c->score) {
        calibrate_free(c);
        return larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");
    }
    *ret = c;
    return 0;
}

static void drop_scores(struct calibration *c)
{
    for (uint32_t h = 0; c->score && h < c->n_heads; h++) {
        mem_free(c->score[h]);
        c->score[h] = NULL;
    }
}

void calibrate_free(struct calibration *c)
{
    if (!c)
        return;
    drop_scores(c);
    mem_free(c->score);
    mem_free(c->sum);
    mem_free(c);
}

/* Layers of all texts in one count, which stays within what a frame may say. */
static int on_progress(void *arg, const char *pass, uint32_t layer, uint32_t n_layers)
{
    struct calibration *c = arg;
    uint32_t texts = c->n_texts > c->n_done ? c->n_texts : c->n_done + 1;

    (void)pass;
    if (!c->watch.progress)
        return 0;
    if ((uint64_t)texts * n_layers > KV_MAX_LAYERS)
        return c->watch.progress(c->watch.arg, "calibrate", layer, n_layers);
    return c->watch.progress(c->watch.arg, "calibrate", c->n_done * n_layers + layer,
                             texts * n_layers);
}

static int take_layer(void *arg, uint32_t layer, const float *score, struct larder_err *e)
{
    struct calibration *c = arg;
    uint32_t n_kv_heads = c->b->p->geom.n_kv_heads;

    for (uint32_t g = 0; g < n_kv_heads; g++) {
        float **to = &c->score[layer * n_kv_heads + g];

        *to = mem_dup(score + (uint64_t)g * c->n, c->n * sizeof *score);
        if (!*to)
            return larder_fail(e, LARDER_ENOMEM, "no memory for scores of layer %u", layer);
    }
    return 0;
}

static int add_budget(struct calibration *c, uint32_t i, float *share, struct larder_err *e)
{
    int rc = shares_measure((const float *const *)c->score, c->n_heads, c->n, SINK, budgets[i],
                            share, e);

    for (uint32_t h = 0; h < c->n_heads && !rc; h++)
        c->sum[i * c->n_heads + h] += share[h];
    return rc;
}

int calibrate_add(struct calibration *c, const struct engine_doc *doc, struct larder_err *e)
{
    const struct offline_watch watch = {c, take_layer, on_progress};
    float *share = mem_alloc(c->n_heads, sizeof *share);
    int rc = share ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory to calibrate");

    c->n = doc->n;
    if (!rc)
        rc = offline_scores(c->b, doc, CHUNK, &watch, e);
    for (uint32_t i = 0; i < N_BUDGETS && !rc; i++)
        rc = add_budget(c, i, share, e);
    if (!rc)
        c->n_done++;
    drop_scores(c);
    mem_free(share);
    return rc;
}

int calibrate_shares(const struct calibration *c, struct shares **ret, struct larder_err *e)
{
    float *share = mem_alloc(c->n_heads, sizeof *share);
    struct shares *s = NULL;
    int rc = share ? shares_new(&s, c->n_heads, e)
                   : larder_fail(e, LARDER_ENOMEM, "no memory for a table of shares");

    for (uint32_t i = 0; i < N_BUDGETS && !rc; i++) {
        for (uint32_t h = 0; h < c->n_heads; h++)
            share[h] = (float)(c->sum[i * c->n_heads + h] / c->n_done);
        rc = shares_add(s, budgets[i], share, e);
    }
    mem_free(share);
    if (rc) {
        shares_free(s);
        return rc;
    }
    *ret = s;
    return 0;
}
