/* main_worker.h - the worker's models: opened once, described in W_HELLO.
 *
 * Ownership  worker_open_models() fills `model`, worker_close_models() empties it.
 * Threads    One.
 * Errors     A model that cannot be opened is named in the message.
 */
#ifndef LARDER_MAIN_WORKER_H
#define LARDER_MAIN_WORKER_H

#include "main_common.h"

#define WORKER_MAX_MODELS MAIN_MAX_LIST

struct served {
    char *name, *path, *tmpl; /* owned; tmpl NULL: the model's own */
    struct engine_setup s;
};

struct worker {
    int sock;
    bool said_hello;
    void *packet; /* [FRAME_MAX_BYTES] */
    struct served model[WORKER_MAX_MODELS];
    uint32_t n_models;
};

/* From --model and --known. */
int worker_open_models(struct worker *w, const struct options *o, struct larder_err *e);
void worker_close_models(struct worker *w);

/* The body of W_HELLO; NULL when memory is out. */
json_t *worker_hello(const struct worker *w);

int worker_template_hex(const struct template *t, char out[65], struct larder_err *e);

#endif
