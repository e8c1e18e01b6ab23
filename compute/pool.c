/* pool.c - a mutex, two conditions and a counter of items handed out.
 *
 * The one idea: a thread joins a round when it wakes, and whoever started the round waits for
 * those alone that have joined. A round of a few microseconds, of which a decoder has
 * many, then does not wait for a processor that somebody else has. */
#include "pool.h"

#include <errno.h>
#include <omp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#include "mem.h"

struct thread_pool {
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    uint64_t round; /* which pool_for() this is */
    uint32_t busy;  /* threads that have joined it and are not done */
    bool open;      /* threads may join it */
    bool stop;
    pool_item_fn *fn;
    void *arg;
    uint32_t n_items;
    atomic_uint next;
    uint32_t n_threads, n_started;
    struct member {
        struct thread_pool *p;
        uint32_t worker;
        pthread_t thread;
    } member[];
};

static void work(struct thread_pool *p, uint32_t worker)
{
    uint32_t i;

    while ((i = atomic_fetch_add(&p->next, 1)) < p->n_items)
        p->fn(p->arg, i, worker);
}

static void *member_run(void *arg)
{
    struct member *m = arg;
    struct thread_pool *p = m->p;
    uint64_t seen = 0;

    omp_set_num_threads(1); /* library calls inside an item stay on this thread */
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while ((p->round == seen || !p->open) && !p->stop)
            pthread_cond_wait(&p->start, &p->lock);
        if (p->stop)
            break;
        seen = p->round;
        p->busy++;
        pthread_mutex_unlock(&p->lock);
        work(p, m->worker);
        pthread_mutex_lock(&p->lock);
        if (--p->busy == 0)
            pthread_cond_signal(&p->done);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

int pool_open(struct thread_pool **ret, uint32_t n_threads, struct larder_err *e)
{
    struct thread_pool *p = mem_zalloc(1, sizeof *p + n_threads * sizeof p->member[0]);

    if (!p)
        return larder_fail(e, LARDER_ENOMEM, "no memory for threads");
    p->n_threads = n_threads;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->start, NULL);
    pthread_cond_init(&p->done, NULL);
    omp_set_num_threads(1);
    for (; p->n_started + 1 < n_threads; p->n_started++) {
        struct member *m = &p->member[p->n_started];

        m->p = p;
        m->worker = p->n_started + 1;
        if (pthread_create(&m->thread, NULL, member_run, m)) {
            pool_close(p);
            return larder_fail(e, LARDER_ENOMEM, "cannot start a thread: %s", strerror(errno));
        }
    }
    *ret = p;
    return 0;
}

void pool_close(struct thread_pool *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->start);
    pthread_mutex_unlock(&p->lock);
    for (uint32_t i = 0; i < p->n_started; i++)
        pthread_join(p->member[i].thread, NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->start);
    pthread_cond_destroy(&p->done);
    mem_free(p);
}

void pool_for(struct thread_pool *p, uint32_t n, pool_item_fn *fn, void *arg)
{
    if (n <= 1 || !p->n_started) {
        for (uint32_t i = 0; i < n; i++)
            fn(arg, i, 0);
        return;
    }
    pthread_mutex_lock(&p->lock);
    p->fn = fn;
    p->arg = arg;
    p->n_items = n;
    atomic_store(&p->next, 0);
    p->open = true;
    p->round++;
    pthread_cond_broadcast(&p->start);
    pthread_mutex_unlock(&p->lock);
    work(p, 0);
    pthread_mutex_lock(&p->lock);
    p->open = false;
    while (p->busy)
        pthread_cond_wait(&p->done, &p->lock);
    pthread_mutex_unlock(&p->lock);
}
