/* config.h - larder.conf: one table gives parser, defaults, limits and --dump-config.
 *
 * Ownership  config_init() sets defaults, config_done() frees. Strings belong to the config.
 * Threads    Read-only once loaded.
 * Errors     LARDER_ECONFIG with file and line.
 */
#ifndef LARDER_CONFIG_H
#define LARDER_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "larder_status.h"

#define CONFIG_MAX_MODELS 32u
#define CONFIG_MAX_NAMESPACES 64u
#define CONFIG_MAX_IDS 64u

struct config_model {
    char *name, *path, *backend, *dtype, *policy, *template;
    uint64_t threads; /* 0: one per processor */
    bool calibrate;   /* on its own, when a policy asks for it */
};

struct config_namespace {
    char *name;
    uid_t uid[CONFIG_MAX_IDS];
    gid_t gid[CONFIG_MAX_IDS];
    uint32_t n_uids, n_gids;
};

struct config {
    char *store, *socket, *worker_socket, *worker_program;
    uint64_t socket_mode;
    uint64_t store_budget;
    uint64_t codec; /* enum store_codec */
    bool allow_any_fs, allow_import;
    uint64_t image_cache_bytes, prepared_files, prepared_bytes;
    uint64_t max_clients, max_in_flight, max_queued_frames, max_document_bytes, max_jobs;
    uint64_t worker_idle_s, worker_timeout_s, worker_nice;
    struct config_model model[CONFIG_MAX_MODELS];
    uint32_t n_models;
    struct config_namespace ns[CONFIG_MAX_NAMESPACES];
    uint32_t n_ns;
};

int config_init(struct config *c, struct larder_err *e);
void config_done(struct config *c);

/* Read a file over what is there. */
int config_read(struct config *c, const char *path, struct larder_err *e);

/* "key=value" from the command line; `where` names it in messages. */
int config_set(struct config *c, const char *assignment, const char *where, struct larder_err *e);

/* "NAME=PATH" from the command line. */
int config_add_model(struct config *c, const char *spec, struct larder_err *e);

/* Every key with its value, as a file that reads back to the same configuration. */
void config_dump(const struct config *c, FILE *out);

const struct config_model *config_find_model(const struct config *c, const char *name);

/* May this peer use the namespace? One that is not configured is open to all clients. */
bool config_may_use(const struct config *c, const char *ns, uid_t uid, const gid_t *gid,
                    uint32_t n_gids);

#endif
