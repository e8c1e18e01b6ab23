/* image_file.c - memory files for images: ready before they are wanted, cleared away afterwards.
 *
 * The one idea: a thread makes files whose pages are there and mapped, so that all readers decode
 * straight into them, and takes down the mappings and closes the files that are done with. One of
 * them has the largest size; the others that of the last images, since cutting a file takes as long
 * as making what is cut. A file is sealed while its mapping waits to go (FUTURE_WRITE), and never
 * filled twice: whoever kept a mapping must never see another entry's bytes. */
#include "image_file.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "mem.h"
#include "memfile.h"

#define MAX_READY 16u
#define MAX_OLD 64u
#define SMALL_SHARE 4u         /* of a ready file: what is smaller is not worth cutting it */
#define SMALL_BYTES (1u << 20) /* gets pages of its own */

static const struct image_file NO_FILE = {.fd = -1};

struct image_files {
    uint64_t max_bytes;
    uint32_t n_ready; /* places in `ready` */
    pthread_t thread;
    bool running;
    /* under `lock` */
    pthread_mutex_t lock;
    pthread_cond_t work;
    bool stop;
    uint64_t last, before;              /* sizes of images */
    struct image_file ready[MAX_READY]; /* fd -1: to be made */
    uint32_t n_old;
    struct image_file old[MAX_OLD]; /* mappings to take down, descriptors to close */
};

static void clear_away(struct image_file *f)
{
    memfile_unmap(f->map, f->bytes);
    if (f->fd >= 0)
        close(f->fd);
    f->map = NULL;
    f->fd = -1;
}

static int make(uint64_t n_bytes, bool ready, struct image_file *ret, struct larder_err *e)
{
    void *map = NULL;
    int rc = memfile_new("larder-image", n_bytes, ready, &ret->fd, &map, e);

    ret->map = map;
    ret->bytes = n_bytes;
    ret->ready = ready;
    return rc;
}

static uint64_t wanted(const struct image_files *s, uint32_t i)
{
    uint64_t fit = s->last > s->before ? s->last : s->before;

    return i && fit ? fit : s->max_bytes;
}

/* With the lock, which is let go meanwhile. */
static void clear_one(struct image_files *s)
{
    struct image_file f = s->old[--s->n_old];

    pthread_mutex_unlock(&s->lock);
    clear_away(&f);
    pthread_mutex_lock(&s->lock);
}

/* The same. */
static int make_one(struct image_files *s, uint32_t i)
{
    uint64_t n_bytes = wanted(s, i);
    struct image_file f = s->ready[i];
    int rc;

    s->ready[i] = NO_FILE;
    pthread_mutex_unlock(&s->lock);
    clear_away(&f);
    rc = make(n_bytes, true, &f, NULL);
    pthread_mutex_lock(&s->lock);
    if (!rc)
        s->ready[i] = f;
    return rc;
}

static void *run(void *arg)
{
    struct image_files *s = arg;

    pthread_mutex_lock(&s->lock);
    while (!s->stop) {
        uint32_t i = 0;

        if (s->n_old) {
            clear_one(s);
            continue;
        }
        while (i < s->n_ready && s->ready[i].bytes >= wanted(s, i))
            i++;
        /* no memory now: try again when one is used */
        if (i == s->n_ready || make_one(s, i))
            pthread_cond_wait(&s->work, &s->lock);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

int image_files_new(struct image_files **ret, uint32_t n_ready, uint64_t bytes,
                    struct larder_err *e)
{
    struct image_files *s = mem_zalloc(1, sizeof *s);
    int errnum;

    if (!s)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    s->n_ready = n_ready < MAX_READY ? n_ready : MAX_READY;
    s->max_bytes = bytes;
    for (uint32_t i = 0; i < MAX_READY; i++)
        s->ready[i] = NO_FILE;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->work, NULL);
    errnum = pthread_create(&s->thread, NULL, run, s);
    s->running = !errnum;
    if (errnum) {
        image_files_free(s);
        return larder_fail(e, LARDER_ENOMEM, "cannot start a thread: %s", strerror(errnum));
    }
    *ret = s;
    return 0;
}

void image_files_free(struct image_files *s)
{
    if (!s)
        return;
    if (s->running) {
        pthread_mutex_lock(&s->lock);
        s->stop = true;
        pthread_cond_signal(&s->work);
        pthread_mutex_unlock(&s->lock);
        pthread_join(s->thread, NULL);
    }
    while (s->n_old)
        clear_away(&s->old[--s->n_old]);
    for (uint32_t i = 0; i < s->n_ready; i++)
        clear_away(&s->ready[i]);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->work);
    mem_free(s);
}

/* The smallest that will do; n_ready: none. */
static uint32_t choose(const struct image_files *s, uint64_t n_bytes)
{
    uint32_t best = s->n_ready;

    for (uint32_t i = 0; i < s->n_ready; i++)
        if (s->ready[i].bytes >= n_bytes && s->ready[i].bytes / SMALL_SHARE <= n_bytes &&
            (best == s->n_ready || s->ready[i].bytes < s->ready[best].bytes))
            best = i;
    return best;
}

int image_files_take(struct image_files *s, uint64_t n_bytes, struct image_file *ret,
                     struct larder_err *e)
{
    uint32_t i;

    *ret = NO_FILE;
    if (n_bytes < SMALL_BYTES || n_bytes > s->max_bytes)
        return make(n_bytes, false, ret, e);
    pthread_mutex_lock(&s->lock);
    s->before = s->last;
    s->last = n_bytes;
    i = choose(s, n_bytes);
    if (i < s->n_ready) {
        *ret = s->ready[i];
        s->ready[i] = NO_FILE;
    }
    pthread_mutex_unlock(&s->lock);
    return ret->fd >= 0 ? 0 : make(n_bytes, false, ret, e);
}

int image_file_room(const struct image_file *f, uint64_t at, uint64_t n, struct larder_err *e)
{
    return f->ready ? 0 : memfile_populate(f->map, at, n, e);
}

int image_file_cut(const struct image_file *f, uint64_t n_bytes, struct larder_err *e)
{
    return n_bytes < f->bytes ? memfile_cut(f->fd, n_bytes, e) : 0;
}

/* Too many at once are waited for. */
static void clear_later(struct image_files *s, struct image_file f)
{
    pthread_mutex_lock(&s->lock);
    if (s->n_old < MAX_OLD) {
        s->old[s->n_old++] = f;
        f = NO_FILE;
    }
    pthread_mutex_unlock(&s->lock);
    clear_away(&f);
}

int image_files_seal(struct image_files *s, struct image_file *f, struct larder_err *e)
{
    int rc = memfile_seal_mapped(f->fd, e);

    clear_later(s, (struct image_file){.fd = -1, .map = f->map, .bytes = f->bytes});
    f->map = NULL;
    return rc;
}

void image_files_drop(struct image_files *s, struct image_file *f)
{
    clear_later(s, *f);
    *f = NO_FILE;
    image_files_wake(s);
}

void image_files_wake(struct image_files *s)
{
    pthread_mutex_lock(&s->lock);
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
}
