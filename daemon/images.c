/* images.c - decoded images: filled once, sealed, leased, kept while there is room.
 *
 * The one idea: a fetch takes a memory file whose pages are there (image_file.h), all readers
 * decode extents straight into it, the last of them seals it, and one file serves all who ask. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon.h"
#include "image_file.h"
#include "image_plan.h"
#include "mem.h"

#define BUCKETS 4096u
#define IMAGE_MAX_BYTES (1ull << 40)

struct waiter {
    struct waiter *next;
    struct request *r;
};

struct image {
    struct image *next;          /* in its bucket */
    struct image *newer, *older; /* use order */
    uint8_t key[32];
    enum kv_dtype rows; /* as it was asked for: KV_BF16, or the entry's precision */
    int fd;             /* -1 while it is filled */
    uint64_t bytes;
    uint32_t leases;
    bool forgotten; /* out of the table; goes with its last lease */
    struct waiter *waiters;
    json_t *entry; /* summary */
};

struct images {
    struct image *bucket[BUCKETS];
    struct image *newest, *oldest;
    uint64_t n, bytes;
    struct image_files *files;
};

int images_new(struct daemon *d, struct larder_err *e)
{
    struct images *s = mem_zalloc(1, sizeof *s);
    int rc;

    if (!s)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    rc = image_files_new(&s->files, (uint32_t)d->conf.prepared_files, d->conf.prepared_bytes, e);
    if (rc)
        mem_free(s);
    else
        d->images = s;
    return rc;
}

/* ---- table */

static uint32_t bucket_of(const uint8_t key[32])
{
    return (uint32_t)(key[0] | key[1] << 8) % BUCKETS;
}

static struct image *find_image(const struct images *s, const uint8_t key[32], enum kv_dtype rows)
{
    struct image *im = s->bucket[bucket_of(key)];

    while (im && (im->rows != rows || memcmp(im->key, key, 32)))
        im = im->next;
    return im;
}

static void unlink_use(struct images *s, struct image *im)
{
    *(im->newer ? &im->newer->older : &s->newest) = im->older;
    *(im->older ? &im->older->newer : &s->oldest) = im->newer;
    im->newer = im->older = NULL;
}

static void link_use(struct images *s, struct image *im)
{
    im->older = s->newest;
    im->newer = NULL;
    *(s->newest ? &s->newest->newer : &s->oldest) = im;
    s->newest = im;
}

static struct image *add_image(struct images *s, const uint8_t key[32], enum kv_dtype rows)
{
    struct image *im = mem_zalloc(1, sizeof *im);
    uint32_t b = bucket_of(key);

    if (!im)
        return NULL;
    im->fd = -1;
    im->rows = rows;
    memcpy(im->key, key, 32);
    im->next = s->bucket[b];
    s->bucket[b] = im;
    link_use(s, im);
    s->n++;
    return im;
}

static void free_image(struct images *s, struct image *im)
{
    if (im->fd >= 0)
        image_files_drop(s->files, &(struct image_file){.fd = im->fd});
    json_decref(im->entry);
    mem_free(im);
}

/* Out of the table; freed now, or with its last lease. */
static void drop_image(struct images *s, struct image *im)
{
    struct image **at = &s->bucket[bucket_of(im->key)];

    while (*at != im)
        at = &(*at)->next;
    *at = im->next;
    unlink_use(s, im);
    s->n--;
    s->bytes -= im->bytes;
    im->forgotten = true;
    if (!im->leases)
        free_image(s, im);
}

void image_lease(struct image *im)
{
    im->leases++;
}

static void shrink(struct daemon *d)
{
    struct images *s = d->images;

    for (struct image *im = s->oldest, *newer; im && s->bytes > d->conf.image_cache_bytes;
         im = newer) {
        newer = im->newer;
        if (!im->leases && im->fd >= 0)
            drop_image(s, im);
    }
}

void image_release(struct daemon *d, struct image *im)
{
    im->leases--;
    if (im->forgotten && !im->leases)
        free_image(d->images, im);
    else
        shrink(d);
}

void images_forget(struct daemon *d, const uint8_t key[32])
{
    struct image *next;

    for (struct image *im = d->images->bucket[bucket_of(key)]; im; im = next) {
        next = im->next;
        if (im->fd >= 0 && !memcmp(im->key, key, 32))
            drop_image(d->images, im);
    }
}

void images_free(struct daemon *d)
{
    struct images *s = d->images;

    if (!s)
        return;
    while (s->newest)
        drop_image(s, s->newest);
    image_files_free(s->files);
    mem_free(s);
    d->images = NULL;
}

json_t *images_status(const struct daemon *d)
{
    const struct images *s = d->images;

    return json_pack("{sI sI sI sI}", "cached", (json_int_t)s->n, "bytes", (json_int_t)s->bytes,
                     "leases", (json_int_t)server_n_leases(d), "prepared",
                     (json_int_t)d->conf.prepared_files);
}

/* ---- filling */

struct fill {
    struct task task; /* runs nothing: its done() reports to the loop */
    struct daemon *d;
    struct image *image;
    uint8_t key[32];
    enum kv_dtype rows; /* wanted */
    struct store_entry *en;
    struct image_plan *plan;
    struct store_target *target;
    struct store_sink to;      /* the mapped file */
    struct image_file file;    /* of at least the plan's size */
    atomic_uint next, running; /* extents handed out; readers still at it */
    atomic_int rc;             /* first failure */
    pthread_mutex_t lock;      /* of e */
    struct larder_err e;
    json_t *entry;
};

/* One reader's share of a fill. */
struct hand {
    struct task task;
    struct fill *f;
};

static void fill_fail(struct fill *f, int rc, const struct larder_err *e)
{
    int none = 0;

    if (atomic_compare_exchange_strong(&f->rc, &none, rc)) {
        pthread_mutex_lock(&f->lock);
        f->e = *e;
        pthread_mutex_unlock(&f->lock);
    }
}

static int room(void *arg, uint64_t at, uint64_t n, struct larder_err *e)
{
    return image_file_room(&((const struct fill *)arg)->file, at, n, e);
}

/* What is not rows; and what a ready file has too much of goes. */
static int fill_rest(struct fill *f, struct larder_err *e)
{
    const struct store_info *in = store_entry_info(f->en);
    const struct image_plan *p = f->plan;
    uint32_t heads = in->geom.n_kv_heads;
    int rc = image_file_cut(&f->file, p->n_bytes, e);

    if (!rc)
        rc = store_entry_load(f->en, e);
    if (!rc) /* header and head table: what lies before the first array */
        rc = image_file_room(&f->file, 0, p->tokens_off, e);
    if (!rc) {
        image_plan_write(p, f->file.map);
        rc = store_sink_put(&f->to, p->tokens_off, in->ident.tokens, 4ull * in->n_ctx, e);
    }
    if (!rc)
        rc = store_sink_put(&f->to, p->text_off, in->text, in->text_len, e);
    if (!rc)
        rc = store_sink_put(&f->to, p->logits_off, in->logits, 4ull * in->n_vocab, e);
    for (uint32_t i = 0; !rc && i < in->geom.n_layers * heads; i++)
        rc = store_sink_put(&f->to, p->slot[i].position_off,
                            store_entry_positions(f->en, i / heads, i % heads),
                            4ull * p->slot[i].n_rows, e);
    return rc;
}

/* By the last reader to leave: all that clients rely on is looked at once. */
static void seal(struct fill *f)
{
    struct image_files *files = f->d->images->files;
    struct larder_image im;
    struct larder_err e;
    int rc = 0;

    if (!atomic_load(&f->rc)) {
        rc = larder_image_check(f->file.map, f->plan->n_bytes, &im, &e);
        if (!rc)
            rc = image_files_seal(files, &f->file, &e);
    }
    if (rc)
        fill_fail(f, rc, &e);
    if (atomic_load(&f->rc))
        image_files_drop(files, &f->file);
}

static void work(struct fill *f)
{
    uint32_t n = store_entry_n_extents(f->en, f->rows);
    struct larder_err e;
    unsigned i;

    while (!atomic_load(&f->rc) && (i = atomic_fetch_add(&f->next, 1)) <= n) {
        int rc = i == 0 ? fill_rest(f, &e) : store_entry_decode(f->en, f->rows, i - 1, &f->to, &e);

        if (rc)
            fill_fail(f, rc, &e);
    }
}

static void hand_run(struct task *t)
{
    struct hand *h = (struct hand *)t;
    struct fill *f = h->f;

    mem_free(h);
    work(f);
    if (atomic_fetch_sub(&f->running, 1) == 1) {
        seal(f);
        task_run(f->d->readers, &f->task); /* an empty run() whose done() is on the loop */
    }
}

static int open_entry(struct fill *f, struct larder_err *e)
{
    const struct store_info *in;
    struct image_spec spec = {0};
    int rc = store_entry_open(f->d->store, f->key, &f->en, e);

    if (rc)
        return rc == LARDER_ENOTFOUND ? larder_fail(e, rc, "no such entry") : rc;
    in = store_entry_info(f->en);
    if (in->damaged)
        return larder_fail(e, LARDER_EDAMAGED,
                           "the entry's stored bytes are damaged; put the document again");
    spec = (struct image_spec){.geom = in->geom,
                               .dtype = f->rows,
                               .has_bias = in->has_bias,
                               .renumbered = in->renumbered,
                               .n_ctx = in->n_ctx,
                               .next_pos = in->next_pos,
                               .n_vocab = in->n_vocab,
                               .text_len = in->text_len,
                               .rows = in->rows};
    memcpy(spec.key, in->key, 32);
    memcpy(spec.model_fingerprint, in->ident.model_fp, 32);
    memcpy(spec.tokenizer_fingerprint, in->ident.tokenizer_fp, 32);
    f->entry = entry_summary(in);
    return image_plan_new(&f->plan, &spec, IMAGE_MAX_BYTES, e);
}

static int set_targets(struct fill *f, struct larder_err *e)
{
    const struct image_plan *p = f->plan;
    uint32_t n = p->spec.geom.n_layers * p->spec.geom.n_kv_heads;
    int rc;

    f->target = mem_alloc(n, sizeof *f->target);
    if (!f->target)
        return larder_fail(e, LARDER_ENOMEM, "no memory to decode an entry");
    for (uint32_t i = 0; i < n; i++)
        f->target[i] =
            (struct store_target){p->slot[i].k_off, p->slot[i].v_off, p->slot[i].bias_off};
    rc = image_files_take(f->d->images->files, p->n_bytes, &f->file, e);
    f->to = (struct store_sink){f->file.map, f->target, room, f};
    return rc;
}

static void nothing(struct task *t)
{
    (void)t;
}

/* On a reader: open and lay out, then call the other readers in. */
static void fill_begin(struct fill *f)
{
    long n_cpu = sysconf(_SC_NPROCESSORS_ONLN);
    uint32_t helpers;
    struct larder_err e;
    int rc = open_entry(f, &e);

    if (!rc)
        rc = set_targets(f, &e);
    if (rc) {
        fill_fail(f, rc, &e);
        task_run(f->d->readers, &f->task);
        return;
    }
    helpers = n_cpu > 1 && store_entry_n_extents(f->en, f->rows) > 1 ? (uint32_t)n_cpu - 1 : 0;
    atomic_store(&f->running, 1 + helpers);
    for (uint32_t i = 0; i < helpers; i++) {
        struct hand *h = mem_alloc(1, sizeof *h);

        if (!h) {
            atomic_fetch_sub(&f->running, 1);
            continue;
        }
        *h = (struct hand){{hand_run, NULL, NULL}, f};
        task_run(f->d->readers, &h->task);
    }
    work(f);
    if (atomic_fetch_sub(&f->running, 1) == 1) {
        seal(f);
        task_run(f->d->readers, &f->task);
    }
}

static void begin_run(struct task *t)
{
    struct hand *h = (struct hand *)t;
    struct fill *f = h->f;

    mem_free(h);
    fill_begin(f);
}

static void fill_free(struct fill *f)
{
    store_entry_close(f->en);
    image_plan_free(f->plan);
    mem_free(f->target);
    json_decref(f->entry);
    pthread_mutex_destroy(&f->lock);
    mem_free(f);
}

static void answer_with(struct request *r, struct image *im)
{
    struct daemon *d = r->d;
    uint64_t lease = client_lease(r->client, im);

    store_touch(d->store, im->key, (uint64_t)time(NULL));
    unlink_use(d->images, im);
    link_use(d->images, im);
    request_ok(r,
               json_pack("{sI sI sO}", "lease", (json_int_t)lease, "bytes", (json_int_t)im->bytes,
                         "entry", im->entry),
               im->fd);
}

static int quarantine(struct daemon *d, void *arg, struct larder_err *e)
{
    return store_quarantine(d->store, arg, e);
}

static void answer_waiters(struct image *im, const struct larder_err *e)
{
    struct waiter *w;

    while ((w = im->waiters)) {
        im->waiters = w->next;
        if (e)
            request_fail(w->r, e);
        else
            answer_with(w->r, im);
        mem_free(w);
    }
}

static void fill_done(struct task *t)
{
    struct fill *f = (struct fill *)t;
    struct daemon *d = f->d;
    struct image *im = f->image;
    int rc = atomic_load(&f->rc);

    if (rc) {
        if (rc == LARDER_EDAMAGED) {
            log_line(LOG_LEVEL_ERROR, "an entry is damaged and was not served: %s", f->e.msg);
            write_quietly(d, quarantine, f->key, 32, "quarantine");
        }
        answer_waiters(im, &f->e);
        drop_image(d->images, im);
    } else {
        im->fd = f->file.fd;
        im->bytes = f->plan->n_bytes;
        im->entry = f->entry;
        f->entry = NULL;
        d->images->bytes += im->bytes;
        im->leases++; /* stays while it is handed out */
        answer_waiters(im, NULL);
        image_release(d, im);
    }
    image_files_wake(d->images->files);
    fill_free(f);
}

static int start_fill(struct daemon *d, struct image *im, struct larder_err *e)
{
    struct fill *f = mem_zalloc(1, sizeof *f);
    struct hand *h = mem_alloc(1, sizeof *h);

    if (!f || !h) {
        mem_free(f);
        mem_free(h);
        return larder_fail(e, LARDER_ENOMEM, "no memory to decode an entry");
    }
    f->d = d;
    f->image = im;
    f->file.fd = -1;
    f->rows = im->rows;
    memcpy(f->key, im->key, 32);
    pthread_mutex_init(&f->lock, NULL);
    f->task = (struct task){nothing, fill_done, NULL};
    *h = (struct hand){{begin_run, NULL, NULL}, f};
    task_run(d->readers, &h->task);
    return 0;
}

static int wait_for(struct image *im, struct request *r, struct larder_err *e)
{
    struct waiter *w = mem_alloc(1, sizeof *w);

    if (!w)
        return larder_fail(e, LARDER_ENOMEM, "no memory to decode an entry");
    *w = (struct waiter){im->waiters, r};
    im->waiters = w;
    return 0;
}

/* "bf16": packed rows are expanded; "packed": rows as they are stored. */
static int rows_wanted(const struct request *r, const uint8_t key[32], enum kv_dtype *ret,
                       struct larder_err *e)
{
    const char *rows = "bf16";
    struct store_entry *en;
    int rc = field_str(r->body, "rows", FIELD_OPTIONAL, 16, &rows, e);

    if (!rc && strcmp(rows, "bf16") && strcmp(rows, "packed"))
        rc = larder_fail(e, LARDER_EINVAL, "rows are \"bf16\" or \"packed\", not \"%.16s\"", rows);
    *ret = KV_BF16;
    if (rc || *rows == 'b')
        return rc;
    /* where rows are stored as bf16, both are the same image */
    rc = store_entry_open(r->d->store, key, &en, e);
    if (rc)
        return rc == LARDER_ENOTFOUND ? larder_fail(e, rc, "no such entry") : rc;
    *ret = store_entry_info(en)->precision;
    store_entry_close(en);
    return 0;
}

void handle_fetch(struct request *r)
{
    struct daemon *d = r->d;
    enum kv_dtype rows;
    struct larder_err e;
    struct image *im;
    uint8_t key[32];
    int rc = find_ref(r, key, &e);

    if (!rc)
        rc = rows_wanted(r, key, &rows, &e);
    if (rc) {
        request_fail(r, &e);
        return;
    }
    im = find_image(d->images, key, rows);
    if (im && im->fd >= 0) {
        answer_with(r, im);
        return;
    }
    if (im) { /* somebody else's fetch is filling it */
        if (wait_for(im, r, &e))
            request_fail(r, &e);
        return;
    }
    im = add_image(d->images, key, rows);
    rc = im ? wait_for(im, r, &e) : larder_fail(&e, LARDER_ENOMEM, "no memory to decode an entry");
    if (rc) {
        request_fail(r, &e);
        return;
    }
    if (start_fill(d, im, &e)) {
        answer_waiters(im, &e);
        drop_image(d->images, im);
    }
}
