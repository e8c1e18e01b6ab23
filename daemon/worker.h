/* worker.h - a prefill process as larderd sees it; shared by workers.c, worker_process.c and
 * models.c, all on the loop thread. */
#ifndef LARDER_WORKER_H
#define LARDER_WORKER_H

#include "daemon.h"

#define WORKER_LINE_MAX 400 /* bytes kept of a line of its stderr */

enum worker_state {
    STARTING, /* before W_HELLO */
    IDLE,
    PREPARING,  /* W_JOB sent */
    COMPUTING,  /* W_GO sent */
    COMMITTING, /* W_DONE came, the store writes */
    DRAINING,   /* canceled: waiting for the worker to notice */
};

struct worker {
    struct daemon *d;
    struct worker *next;
    pid_t pid; /* 0: not our child */
    int sock, err_fd;
    struct event *read_ev, *err_ev, *timer;
    enum worker_state state;
    bool paused;            /* not reading: the store is behind */
    struct model *starting; /* the model it was started for */
    struct job *job;
    struct model *model; /* of the job */
    struct entry_writer *writer;
    uint32_t next_layer;
    struct layer_form form;              /* of the layers so far */
    char last_line[WORKER_LINE_MAX + 1]; /* of its stderr */
    size_t line_len;
    char line[WORKER_LINE_MAX + 1];
};

/* workers.c: the protocol. */
/* A packet waits on its socket: libevent's callback, arg: the worker. */
void worker_readable(evutil_socket_t sock, short what, void *arg);
/* It said nothing in time. */
void worker_overdue(evutil_socket_t sock, short what, void *arg);
void worker_set_timer(struct worker *w, uint64_t seconds);
/* Takes `body`; NULL means that it could not be built. fd stays the caller's. */
int worker_send(struct worker *w, enum frame_type type, json_t *body, int fd, struct larder_err *e);
/* Take its job away; what of the entry is written so far goes. NULL: it had none. */
struct job *worker_release_job(struct worker *w);

/* worker_process.c: processes. */
struct worker *worker_start(struct daemon *d, struct model *m, struct larder_err *e);
bool worker_listed(const struct daemon *d, const struct worker *w);
/* End it and free it; its job is tried again or fails. why: NULL when it closed the connection
 * itself. */
void worker_end(struct worker *w, const char *why);

/* models.c */
/* Take over what W_HELLO says of one model. */
int model_hello(struct worker *w, const json_t *hello, const json_t *o, struct larder_err *e);
bool model_same_file(const struct model *m);

/* profiles.c */
/* What the settings have for a model whose fingerprint is known now. */
void profile_recall(struct daemon *d, struct model *m);
/* W_PROFILE to an idle worker, unless it has this one. */
int profile_tell(struct worker *w, struct model *m, struct larder_err *e);
/* The worker has calibrated the model of its job. */
int profile_from_worker(struct worker *w, const json_t *body, int fd, struct larder_err *e);

#endif
