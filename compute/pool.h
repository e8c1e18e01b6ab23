/* pool.h - threads that take blocks of work as they come free.
 *
 * Purpose    Spread independent items over the processors without barriers that spin: a
 *            thread that loses its processor to somebody else delays its own item only.
 * Ownership  pool_open() allocates, pool_close() ends the threads and frees (NULL allowed).
 * Threads    pool_for() from one thread at a time.
 */
#ifndef LARDER_POOL_H
#define LARDER_POOL_H

#include <stdint.h>

#include "larder_status.h"

struct thread_pool;

typedef void pool_item_fn(void *arg, uint32_t item, uint32_t worker);

/* n_threads counts the caller, who works too. */
int pool_open(struct thread_pool **ret, uint32_t n_threads, struct larder_err *e);
void pool_close(struct thread_pool *p);

/* fn(arg, item, worker) for each item below n, worker < n_threads; returns when all are done. */
void pool_for(struct thread_pool *p, uint32_t n, pool_item_fn *fn, void *arg);

#endif
