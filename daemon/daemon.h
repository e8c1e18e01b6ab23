/* daemon.h - the parts of larderd and what they share.
 *
 * Threads    One loop thread owns every struct below except where a field says otherwise.
 *            Pools (task.h): `writer`, one thread, does all that ends in an fsync; `readers`,
 *            one per processor, decode images and read entries; `slow`, one thread, verifies.
 *            The store locks inside. A task owns what it points to until its done() runs.
 * Locks      task lists; the list of prepared files (image_file.c); the store's own. None is held
 *            while another is taken.
 */
#ifndef LARDER_DAEMON_H
#define LARDER_DAEMON_H

#include <event2/event.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "config.h"
#include "frame.h"
#include "geom.h"
#include "layer_file.h"
#include "log.h"
#include "path_id.h"
#include "profile_id.h"
#include "store.h"
#include "task.h"

#define MAX_GROUPS 64u
#define HISTORY 100u /* finished jobs that are remembered */

struct daemon;
struct client;
struct worker;
struct job;
struct images;

/* What is known of a configured model, from its worker's W_HELLO or, for the same file, from the
 * store's settings. */
struct model {
    const struct config_model *conf;
    bool known;
    struct path_id id; /* of what was hashed; size 0: nothing is known */
    uint8_t fp[32], tokenizer_fp[32], template_fp[32];
    char template[KV_MAX_TEMPLATE], backend[16], isa[32], dtype[8];
    char device[192]; /* of a backend that has one; "" */
    struct kv_geom geom;
    uint32_t n_vocab, n_positions;
    struct worker *worker; /* running or starting; NULL: none */
    bool refused;          /* its worker failed to start: see `why` */
    struct larder_err why;
    char *profile;          /* its calibration as JSON; NULL: none */
    uint8_t profile_fp[32]; /* of the bytes that it belongs to */
    char profile_id[PROFILE_ID_LEN + 1];
    bool profile_sent;   /* `worker` has it */
    bool profile_window; /* it says what `auto` stands for in window policies */
};

struct daemon {
    struct config conf;
    struct event_base *base;
    struct store *store;
    struct returns *returns;
    struct pool *writer, *readers, *slow;
    struct images *images;
    struct model model[CONFIG_MAX_MODELS];
    uint32_t n_models;
    uint64_t started; /* Unix seconds */
    uint64_t n_requests;
    bool stopping;

    int client_sock, worker_sock;
    struct event *client_ev, *worker_ev, *accept_pause;
    struct client *clients; /* list */
    uint32_t n_clients;

    struct worker *workers; /* list */

    struct job *jobs;    /* queued and running, oldest first */
    struct job *history; /* finished, newest first */
    uint32_t n_jobs, n_history;
    uint64_t next_job, n_done, n_failed;
};

/* ---- server.c: sockets and frames */
int server_open(struct daemon *d, struct larder_err *e);
void server_close(struct daemon *d);

/* One request of a client, until it is answered. Requests outlive their client: `client` turns
 * NULL when it goes, and answering then does nothing. */
struct request {
    struct daemon *d;
    struct client *client;
    uint32_t seq;
    enum frame_type type;
    json_t *body;
    int fd; /* -1: none came */
    uid_t uid;
    gid_t gid[MAX_GROUPS];
    uint32_t n_gids;
    struct request *next; /* the client's */
};

/* Answer and end the request; both take `body`. fd stays the caller's. */
void request_ok(struct request *r, json_t *body, int fd);
void request_fail(struct request *r, const struct larder_err *e);
/* End it without an answer. */
void request_end(struct request *r);
/* An EVENT before the answer. */
void request_event(struct request *r, json_t *body);
bool request_may_use(const struct request *r, const char *ns);

/* A lease of this request's connection; 0 when the client is gone. */
struct image;
uint64_t client_lease(struct client *c, struct image *im);
int client_release(struct client *c, uint64_t lease);
uint64_t server_n_leases(const struct daemon *d);

/* ---- requests.c: what each frame does; takes the request */
void request_dispatch(struct request *r);

/* Entry objects of PROTOCOL.md section 4. */
json_t *entry_summary(const struct store_info *in);
json_t *entry_full(const struct store_info *in, bool text, bool tokens);

/* ---- find.c: LOOKUP, EXPLAIN */
void handle_lookup(struct request *r);
void handle_explain(struct request *r);
/* Key from `key` or `name` of a body; LARDER_ENOTFOUND when it is missing or forbidden. */
int find_ref(struct request *r, uint8_t ret_key[32], struct larder_err *e);
/* The document that came with a request, checked and copied; mem_free() it. */
int read_document(struct request *r, bool *ret_tokens, void **ret, uint64_t *ret_len,
                  struct larder_err *e);
struct model *model_for(struct daemon *d, const char *name, struct larder_err *e);

/* ---- images.c: decoded images, leases */
int images_new(struct daemon *d, struct larder_err *e);
void images_free(struct daemon *d);
void handle_fetch(struct request *r);
void image_lease(struct image *im);
void image_release(struct daemon *d, struct image *im);
void images_forget(struct daemon *d, const uint8_t key[32]); /* the entry is gone or replaced */
json_t *images_status(const struct daemon *d);

/* ---- jobs.c: the queue */
enum job_state { JOB_QUEUED, JOB_RUNNING, JOB_DONE, JOB_FAILED, JOB_CANCELED };

struct watcher {
    struct request *r;
    struct watcher *next;
};

struct job {
    struct daemon *d;
    uint64_t id;
    enum job_state state;
    char *ns, *model, *policy, *template; /* as asked; template NULL: the model's */
    char **name;                          /* without namespace */
    uint32_t n_names;
    bool tokens, pin;
    uint8_t doc_digest[32];
    void *doc; /* NULL until needed after a restart */
    uint64_t doc_len;
    char profile[PROFILE_ID_LEN + 1]; /* the model's when the job was started; "": none */
    uint32_t tries;
    char pass[24];
    uint32_t layer, n_layers, n_ctx;
    bool has_key, stored_already, cancel;
    uint8_t key[32];
    uint64_t prefill_ms, created_ms, ended_ms;
    struct larder_err why;
    struct worker *worker;
    struct watcher *watchers;
    struct job *next;
    /* prepared: what the entry will say */
    char *canonical, *text, *template_used;
    uint8_t template_fp[32];
    uint64_t text_len;
    uint32_t *ids;
    uint32_t busy; /* tasks that still point here */
    bool ended;    /* finish when busy reaches 0 */
};

void handle_put(struct request *r);
void handle_job(struct request *r);  /* JOB, WATCH, CANCEL */
void handle_jobs(struct request *r); /* JOBS */
int jobs_load(struct daemon *d, struct larder_err *e);
void jobs_free(struct daemon *d);
void jobs_start(struct daemon *d); /* give work to idle workers */
void job_changed(struct job *j);   /* tell watchers */
void job_unbusy(struct job *j);    /* a task that pointed at it is over */
void job_end(struct job *j, enum job_state state, const struct larder_err *why);
json_t *job_object(const struct job *j);
struct job *job_find(struct daemon *d, uint64_t id);
void job_forget_request(struct daemon *d, struct request *r);
/* The entry exists already: name it, pin it, remember its source, end the job. */
void job_already_stored(struct job *j);
void job_source_digest(const struct job *j, const struct model *m, uint8_t ret[32]);
json_t *jobs_status(const struct daemon *d);

/* ---- profiles.c: calibrations of models */
void handle_profile(struct request *r);
void profiles_free(struct daemon *d);
/* The part of a canonical policy that names a profile, ",profile=..."; NULL: none. */
const char *policy_profile(const char *policy, size_t *ret_len);
/* The policy without it. */
void policy_any_profile(const char *policy, char *out, size_t cap);
/* Is an entry of policy `have` what `want` asks for? If that names no profile, any will do, or,
 * where a model is given that has one, what it would be made with now. */
bool policy_serves(const char *want, const char *have, const struct model *m);

/* ---- import.c */
void handle_import(struct request *r);

/* ---- workers.c: prefill processes */
int workers_probe(struct daemon *d, struct larder_err *e);
void workers_stop(struct daemon *d);
void workers_accept(struct daemon *d, int sock);
/* Give the job to its model's worker, starting one if needed; false: not now. */
bool worker_take(struct daemon *d, struct job *j);
void worker_cancel(struct worker *w);
void models_configure(struct daemon *d);
void models_recall(struct daemon *d); /* from the settings */

/* ---- store_job.c: a job's rows on their way into the store (writer tasks) */
struct entry_writer;
int entry_writer_begin(struct job *j, const struct model *m, struct entry_writer **ret,
                       struct larder_err *e);
/* Takes fd. worker_layer_written() is called on the loop when the layer is written or failed. The
 * first layer begins the entry: its form is the entry's. */
void entry_writer_layer(struct entry_writer *w, uint32_t layer, const uint32_t *rows,
                        struct layer_form form, int fd);
void entry_writer_commit(struct entry_writer *w, const json_t *done_body, int fd);
/* Ends the writer, committed or not: what was written without a commit is removed. Accepts NULL. */
void entry_writer_abort(struct entry_writer *w);
uint32_t entry_writer_queued(const struct entry_writer *w);

/* workers.c hears from the writer. */
void worker_layer_written(struct worker *w, const struct larder_err *e);
void worker_committed(struct worker *w, const uint8_t key[32], const struct larder_err *e);

/* A writer task that runs `fn` and forgets: settings, names, quarantine. */
typedef int quiet_fn(struct daemon *d, void *arg, struct larder_err *e);
void write_quietly(struct daemon *d, quiet_fn *fn, void *arg, size_t arg_len, const char *what);

#endif
