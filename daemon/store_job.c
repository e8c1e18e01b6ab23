/* store_job.c - a job's rows on their way from the worker's files into the store.
 *
 * The one idea: everything here runs as tasks of the one writer thread, so layers are
 * written in the order in which they came and the loop never waits for a disk. What a
 * worker sends is checked as a stranger's bytes: sizes, order, positions, finite values. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon.h"
#include "mem.h"
#include "memfile.h"

struct entry_writer {
    struct daemon *d;
    struct job *j;
    struct store_put *put; /* the writer thread's */
    struct kv_geom geom;
    struct store_info info; /* strings borrowed from the job and this struct */
    char model[NAME_MAX_NS + 1], backend[64];
    struct layer_form form; /* the writer thread's, from the first layer on */
    uint32_t queued;        /* tasks under way */
    bool aborted;           /* the loop wants no more */
};

/* One step for the writer thread. */
struct step {
    struct task task;
    struct entry_writer *w;
    enum { STEP_LAYER, STEP_COMMIT, STEP_ABORT } kind;
    uint32_t layer;
    uint32_t *rows;
    struct layer_form form;
    int fd;
    char *extra;
    float *logits;
    uint8_t key[32];
    struct larder_err e;
    int rc;
};

static void step_free(struct step *s)
{
    if (s->fd >= 0)
        close(s->fd);
    mem_free(s->rows);
    mem_free(s->logits);
    free(s->extra);
    mem_free(s);
}

/* ---- on the writer thread */

static int write_layer(struct step *s, struct larder_err *e)
{
    struct entry_writer *w = s->w;
    uint64_t want = layer_file_bytes(&w->geom, w->form, s->rows);
    struct store_rows *h = mem_alloc(w->geom.n_kv_heads, sizeof *h);
    const void *map = NULL;
    int rc;

    if (!h)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a layer");
    rc = memfile_map(s->fd, want, want, &map, NULL, e);
    if (rc) {
        mem_free(h);
        return larder_fail_in(e, LARDER_EWORKER, "layer %u", s->layer);
    }
    rc = layer_file_read(map, want, &w->geom, w->form, s->rows, w->info.n_ctx, h, e);
    if (!rc)
        rc = store_put_layer(w->put, h, e);
    memfile_unmap(map, want);
    mem_free(h);
    return rc;
}

/* The first layer says what kind of entry it becomes. */
static int add_layer(struct step *s, struct larder_err *e)
{
    struct entry_writer *w = s->w;
    int rc = 0;

    if (!s->layer) {
        w->form = s->form;
        rc =
            store_put_begin(w->d->store, &w->put, &w->geom, w->form.precision, w->form.has_bias, e);
    }
    return rc || !w->put ? rc : write_layer(s, e);
}

static int commit(struct step *s, struct larder_err *e)
{
    struct entry_writer *w = s->w;
    struct job *j = w->j;
    struct store_put *put = w->put;
    uint64_t want = 4ull * w->info.n_vocab, got;
    const void *map;
    int rc = memfile_map(s->fd, want, want, &map, &got, e);

    if (rc)
        return larder_fail_in(e, LARDER_EWORKER, "logits");
    for (uint32_t i = 0; !rc && i < w->info.n_vocab; i++)
        if (!isfinite(((const float *)map)[i]))
            rc = larder_fail(e, LARDER_ENUMERIC,
                             "the prefill produced logits that are not finite; nothing was stored");
    if (!rc) {
        w->info.logits = map;
        w->info.extra = s->extra;
        w->info.created = (uint64_t)time(NULL);
        w->put = NULL; /* a commit always ends the put */
        rc = store_put_commit(put, &w->info, j->n_names ? j->name[0] : NULL, j->pin, s->key, e);
    }
    memfile_unmap(map, want);
    return rc;
}

static void step_run(struct task *t)
{
    struct step *s = (struct step *)t;
    struct entry_writer *w = s->w;

    switch (s->kind) {
    case STEP_LAYER:
        s->rc = add_layer(s, &s->e);
        break;
    case STEP_COMMIT:
        if (w->put)
            s->rc = commit(s, &s->e);
        break;
    case STEP_ABORT:
        store_put_abort(w->put);
        w->put = NULL;
    }
}

/* ---- on the loop */

static void step_done(struct task *t)
{
    struct step *s = (struct step *)t;
    struct entry_writer *w = s->w;

    w->queued--;
    if (s->kind == STEP_ABORT) {
        struct job *j = w->j;

        mem_free(w);
        job_unbusy(j);
    } else if (!w->aborted && w->j->worker) {
        if (s->kind == STEP_COMMIT)
            worker_committed(w->j->worker, s->key, s->rc ? &s->e : NULL);
        else
            worker_layer_written(w->j->worker, s->rc ? &s->e : NULL);
    }
    step_free(s);
}

static int add_step(struct entry_writer *w, struct step **ret, struct larder_err *e)
{
    struct step *s = mem_zalloc(1, sizeof *s);

    if (!s)
        return larder_fail(e, LARDER_ENOMEM, "no memory to store an entry");
    s->task = (struct task){step_run, step_done, NULL};
    s->w = w;
    s->fd = -1;
    *ret = s;
    return 0;
}

static void run_step(struct step *s)
{
    s->w->queued++;
    task_run(s->w->d->writer, &s->task);
}

int entry_writer_begin(struct job *j, const struct model *m, struct entry_writer **ret,
                       struct larder_err *e)
{
    struct entry_writer *w = mem_zalloc(1, sizeof *w);

    if (!w)
        return larder_fail(e, LARDER_ENOMEM, "no memory to store an entry");
    w->d = j->d;
    w->j = j;
    w->geom = m->geom;
    snprintf(w->model, sizeof w->model, "%s", m->conf->name);
    snprintf(w->backend, sizeof w->backend, "%s/%s/%s", m->backend, m->dtype, m->isa);
    w->info = (struct store_info){
        .ident = {.policy = j->canonical, .ns = j->ns, .tokens = j->ids, .n_tokens = j->n_ctx},
        .n_ctx = j->n_ctx,
        .n_vocab = m->n_vocab,
        .model = w->model,
        .tmpl = j->template_used,
        .backend = w->backend,
        .text = j->text,
        .text_len = j->text_len};
    memcpy(w->info.ident.model_fp, m->fp, 32);
    memcpy(w->info.ident.tokenizer_fp, m->tokenizer_fp, 32);
    memcpy(w->info.ident.template_fp, j->template_fp, 32);
    j->busy++; /* until the writer is gone */
    *ret = w;
    return 0;
}

void entry_writer_layer(struct entry_writer *w, uint32_t layer, const uint32_t *rows,
                        struct layer_form form, int fd)
{
    struct larder_err e;
    struct step *s = NULL;

    if (add_step(w, &s, &e)) {
        close(fd);
        worker_layer_written(w->j->worker, &e);
        return;
    }
    s->kind = STEP_LAYER;
    s->layer = layer;
    s->form = form;
    s->fd = fd;
    s->rows = mem_dup(rows, w->geom.n_kv_heads * sizeof *rows);
    if (!s->rows) {
        step_free(s);
        larder_fail(&e, LARDER_ENOMEM, "no memory to store an entry");
        worker_layer_written(w->j->worker, &e);
        return;
    }
    run_step(s);
}

void entry_writer_commit(struct entry_writer *w, const json_t *done, int fd)
{
    const json_t *sel = json_object_get(done, "sel_layer");
    json_t *extra;
    struct larder_err e;
    struct step *s = NULL;

    if (add_step(w, &s, &e)) {
        close(fd);
        worker_committed(w->j->worker, NULL, &e);
        return;
    }
    w->info.next_pos = (uint32_t)json_integer_value(json_object_get(done, "next_pos"));
    w->info.sel_layer = json_is_integer(sel) ? (int32_t)json_integer_value(sel) : -1;
    w->info.renumbered = json_is_true(json_object_get(done, "renumbered"));
    w->info.prefill_ms = (uint64_t)json_integer_value(json_object_get(done, "prefill_ms"));
    s->kind = STEP_COMMIT;
    s->fd = fd;
    extra = json_pack("{sO sO}", "rank_variance", json_object_get(done, "rank_variance"),
                      "certificate", json_object_get(done, "certificate"));
    s->extra = extra ? json_dumps(extra, JSON_COMPACT) : NULL;
    json_decref(extra);
    if (!s->extra) {
        step_free(s);
        larder_fail(&e, LARDER_ENOMEM, "no memory to store an entry");
        worker_committed(w->j->worker, NULL, &e);
        return;
    }
    run_step(s);
}

void entry_writer_abort(struct entry_writer *w)
{
    struct step *s = NULL;

    if (!w)
        return;
    w->aborted = true;
    if (add_step(w, &s, NULL))
        return; /* leaks one struct when memory is out; the extents go at the next start */
    s->kind = STEP_ABORT;
    run_step(s);
}

uint32_t entry_writer_queued(const struct entry_writer *w)
{
    return w->queued;
}
