/* task.c - a mutex, a list, and an eventfd for the way back. */
#include "task.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "mem.h"

struct list {
    struct task *first, **last;
};

struct returns {
    pthread_mutex_t lock;
    struct list list;
    int fd;
    struct event *ev;
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct list list;
    struct returns *r;
    bool stop;
    uint32_t n;
    pthread_t thread[];
};

static void append(struct list *l, struct task *t)
{
    t->next = NULL;
    *l->last = t;
    l->last = &t->next;
}

static struct task *take(struct list *l)
{
    struct task *t = l->first;

    if (t) {
        l->first = t->next;
        if (!l->first)
            l->last = &l->first;
    }
    return t;
}

void returns_drain(struct returns *r)
{
    struct task *t;

    for (;;) {
        pthread_mutex_lock(&r->lock);
        t = take(&r->list);
        pthread_mutex_unlock(&r->lock);
        if (!t)
            return;
        t->done(t);
    }
}

static void on_return(evutil_socket_t fd, short what, void *arg)
{
    uint64_t n;

    (void)what;
    if (read(fd, &n, sizeof n) < 0 && errno != EAGAIN)
        return;
    returns_drain(arg);
}

int returns_new(struct returns **ret, struct event_base *base, struct larder_err *e)
{
    struct returns *r = mem_zalloc(1, sizeof *r);

    if (!r)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    pthread_mutex_init(&r->lock, NULL);
    r->list.last = &r->list.first;
    r->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r->ev = r->fd < 0 ? NULL : event_new(base, r->fd, EV_READ | EV_PERSIST, on_return, r);
    if (!r->ev || event_add(r->ev, NULL)) {
        returns_free(r);
        return larder_fail(e, LARDER_EIO, "eventfd: %s", strerror(errno));
    }
    *ret = r;
    return 0;
}

void returns_free(struct returns *r)
{
    if (!r)
        return;
    if (r->ev)
        event_free(r->ev);
    if (r->fd >= 0)
        close(r->fd);
    pthread_mutex_destroy(&r->lock);
    mem_free(r);
}

static void give_back(struct returns *r, struct task *t)
{
    uint64_t one = 1;

    pthread_mutex_lock(&r->lock);
    append(&r->list, t);
    pthread_mutex_unlock(&r->lock);
    if (write(r->fd, &one, sizeof one) < 0)
        return; /* full counter: the loop is awake anyway */
}

static void *work(void *arg)
{
    struct pool *p = arg;
    struct task *t;

    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (!(t = take(&p->list)) && !p->stop)
            pthread_cond_wait(&p->more, &p->lock);
        if (!t)
            break;
        pthread_mutex_unlock(&p->lock);
        if (t->done) {
            t->run(t);
            give_back(p->r, t);
        } else {
            t->run(t);
        }
        pthread_mutex_lock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

int pool_new(struct pool **ret, struct returns *r, uint32_t n_threads, struct larder_err *e)
{
    struct pool *p = mem_zalloc(1, sizeof *p + n_threads * sizeof p->thread[0]);

    if (!p)
        return larder_fail(e, LARDER_ENOMEM, "no memory");
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->more, NULL);
    p->list.last = &p->list.first;
    p->r = r;
    for (; p->n < n_threads; p->n++)
        if (pthread_create(&p->thread[p->n], NULL, work, p)) {
            pool_free(p);
            return larder_fail(e, LARDER_ENOMEM, "cannot start a thread: %s", strerror(errno));
        }
    *ret = p;
    return 0;
}

void pool_free(struct pool *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->more);
    pthread_mutex_unlock(&p->lock);
    for (uint32_t i = 0; i < p->n; i++)
        pthread_join(p->thread[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->more);
    mem_free(p);
}

void task_run(struct pool *p, struct task *t)
{
    pthread_mutex_lock(&p->lock);
    append(&p->list, t);
    pthread_cond_signal(&p->more);
    pthread_mutex_unlock(&p->lock);
}
