/* task.h - threads that run what must not block the event loop, and hand results back to it.
 *
 * Purpose    A pool runs tasks in order of arrival; when one is finished its `done` runs on
 *            the loop thread. A pool with one thread is a queue: the store's writer is one.
 * Ownership  pool_new() allocates, pool_free() waits for running tasks and frees.
 * Threads    task_run() from the loop thread or from a task.
 */
#ifndef LARDER_TASK_H
#define LARDER_TASK_H

#include <event2/event.h>
#include <stdbool.h>
#include <stdint.h>

#include "larder_status.h"

struct pool;
struct returns; /* finished tasks on their way to the loop */

struct task {
    void (*run)(struct task *t);  /* on a thread of the pool */
    void (*done)(struct task *t); /* on the loop; frees the task. NULL: run() frees it */
    struct task *next;            /* the pool's */
};

int returns_new(struct returns **ret, struct event_base *base, struct larder_err *e);
void returns_free(struct returns *r);

/* Call every done() that is waiting; the loop does this by itself. */
void returns_drain(struct returns *r);

int pool_new(struct pool **ret, struct returns *r, uint32_t n_threads, struct larder_err *e);

/* Runs what is queued to its end, then ends the threads. Accepts NULL. */
void pool_free(struct pool *p);

void task_run(struct pool *p, struct task *t);

#endif
