/* main_common.h - what the subcommands of larder-prefill share.
 *
 * Purpose    Options, an opened model with its backend, documents, rows kept in memory.
 * Ownership  x_open/x_done pair up; done accepts what was never opened (zeroed).
 * Threads    The program has one thread of its own; backends have theirs.
 * Errors     A negative LARDER_E*, or MAIN_USAGE for a command line that cannot be meant.
 */
#ifndef LARDER_MAIN_COMMON_H
#define LARDER_MAIN_COMMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "backend.h"
#include "calibrate.h"
#include "cache.h"
#include "engine.h"
#include "larder_status.h"
#include "model.h"
#include "policy.h"
#include "template.h"

#define MAIN_USAGE 2 /* exit status, and the return value that leads to it */
#define MAIN_MAX_LIST 64
#define MAIN_MAX_DOCUMENT (64u << 20) /* bytes; far above any model's positions */

/* X(name, takes an argument, text in --help) */
#define OPTION_LIST(X)                                                                             \
    X(MODEL, "model", 1, "PATH",                                                                   \
      "GGUF file or directory (worker: NAME=PATH[,template=T], repeatable)")                       \
    X(FILE, "file", 1, "F", "the document, UTF-8 text")                                            \
    X(DOC_TOKENS, "doc-tokens", 1, "F", "the document as whitespace-separated token ids")          \
    X(TOKENS, "tokens", 1, "F", "token ids (trace: the document; ask: the question)")              \
    X(QUESTIONS, "questions", 1, "F", "JSONL of questions with known answers, scored one by one")  \
    X(STRINGS, "strings", 1, "F", "JSONL of strings to tokenise")                                  \
    X(IMAGE_FD, "image-fd", 1, "N", "a sealed cache image; --questions takes several")             \
    X(POLICY, "policy", 1, "P", "pruning policy; may be given several times")                      \
    X(TEMPLATE, "template", 1, "T", "chat template (default: the model's)")                        \
    X(BACKEND, "backend", 1, "B", "cpu (default), ref, or cuda in larder-prefill-cuda")            \
    X(DTYPE, "dtype", 1, "D", "auto, bf16 or f32; auto is bf16 where the processor has it")        \
    X(THREADS, "threads", 1, "N", "threads (default: one per processor)")                          \
    X(STREAM, "stream", 0, "", "cuda: do not keep all weights on the device")                      \
    X(MAX_NEW, "max-new", 1, "N", "tokens to generate at most (default: 128)")                     \
    X(IGNORE_EOS, "ignore-eos", 0, "", "go on after the end token")                                \
    X(TRACE, "trace", 0, "", "add the document's trace to the JSON answer")                        \
    X(PROFILE, "profile", 1, "F", "the model's calibration (calibrate writes it)")                 \
    X(NO_BUILTIN, "no-builtin", 0, "", "measure on the given texts alone")                         \
    X(FD, "fd", 1, "N", "connected worker socket")                                                 \
    X(CONNECT, "connect", 1, "PATH", "worker socket to connect to")                                \
    X(KNOWN, "known", 1, "ID", "NAME=DEV:INO:SIZE:MTIME_NS:HEX, a fingerprint known already")      \
    X(JSON, "json", 0, "", "print JSON")                                                           \
    X(HELP, "help", 0, "", "print this help")

enum option_id {
#define X(name, text, arg, value, help) OPTION_##name,
    OPTION_LIST(X)
#undef X
        N_OPTIONS,
};

/* Every value given for an option, in order; flags count only. */
struct options {
    const char *value[N_OPTIONS][MAIN_MAX_LIST];
    uint32_t n[N_OPTIONS];
    char **arg; /* what is not an option */
    int n_args;
};

static inline const char *option_get(const struct options *o, enum option_id k)
{
    return o->n[k] ? o->value[k][o->n[k] - 1] : NULL;
}

/* Decimal number up to max; leaves *ret untouched when the option is absent. */
int option_number(const struct options *o, enum option_id k, uint64_t max, uint64_t *ret,
                  struct larder_err *e);
/* The same of the i-th value, which is there. */
int option_number_at(const struct options *o, enum option_id k, uint32_t i, uint64_t max,
                     uint64_t *ret, struct larder_err *e);

/* Set the message and return MAIN_USAGE. */
int main_usage(struct larder_err *e, const char *fmt, ...) LARDER_PRINTF(2, 3);

struct command {
    const char *name;
    const char *usage; /* without the program's name */
    uint64_t options;  /* bit mask of enum option_id */
    int (*run)(const struct options *o, struct larder_err *e);
};

int main_trace(const struct options *o, struct larder_err *e);
int main_ask(const struct options *o, struct larder_err *e);
int main_score(const struct options *o, struct larder_err *e); /* ask --questions */
int main_tokenize(const struct options *o, struct larder_err *e);
int main_calibrate(const struct options *o, struct larder_err *e);
int main_info(const struct options *o, struct larder_err *e);
int main_worker(const struct options *o, struct larder_err *e);

/* ---- a model with a backend */

struct engine_setup {
    struct model *model;
    struct template *tmpl;
    struct backend *backend;
    struct shares *shares; /* the model's calibration, or NULL */
};

/* By a template's string; NULL: the model's own. */
int setup_template(const struct model *m, const char *text, struct template **ret,
                   struct larder_err *e);

/* By the options --backend, --dtype and --threads. */
int setup_backend(const struct options *o, const struct model *m, struct backend **ret,
                  struct larder_err *e);

/* A policy string for this setup: parsed, and the profile at hand named in it. */
int setup_policy(const struct engine_setup *s, const char *text, struct policy *ret,
                 struct larder_err *e);

int setup_open(const struct options *o, struct engine_setup *ret, struct larder_err *e);
void setup_done(struct engine_setup *s);

/* ---- profiles (main_profile.c) */

/* One that was made elsewhere, as a table for this model; whatever is wrong with it is said. */
int profile_take(const char *text, size_t len, struct model *m, struct shares **ret,
                 struct larder_err *e);
/* The same from a file. */
int profile_read(const char *path, struct model *m, struct shares **ret, struct larder_err *e);

/* A calibration as it goes on: the built-in texts and others, and their names. */
struct measuring {
    const struct engine_setup *s;
    struct calibration *c;
    json_t *texts; /* for the profile */
};

int measuring_open(struct measuring *m, const struct engine_setup *s, uint32_t n_texts,
                   const struct calibrate_watch *watch, struct larder_err *e);
int measuring_builtin(struct measuring *m, struct larder_err *e);
int measuring_file(struct measuring *m, const char *path, struct larder_err *e);
/* The table, and the profile that says how it came about; both are the caller's. */
int measuring_end(struct measuring *m, struct shares **ret_shares, json_t **ret_profile,
                  struct larder_err *e);
void measuring_done(struct measuring *m);

/* A profile in the bytes that it is kept and hashed in; free() them. NULL: no memory. */
char *profile_text(const json_t *profile);

/* ---- documents */

struct document {
    uint32_t *ids; /* owned */
    uint32_t n;
    char *text; /* rendered; owned, NULL for tokens */
    size_t text_len;
};

int document_from_text(const struct engine_setup *s, const char *text, size_t len,
                       struct document *ret, struct larder_err *e);
/* text_path or ids_path, whichever is not NULL. */
int document_read(const struct engine_setup *s, const char *text_path, const char *ids_path,
                  struct document *ret, struct larder_err *e);
void document_done(struct document *d);

/* A whole file of at most `max` bytes, NUL-terminated. */
int file_read(const char *path, uint64_t max, char **ret, size_t *ret_len, struct larder_err *e);

/* ---- answers */

#define TOP_LOGITS 20u

/* [[id, logit] x 20], best first, ties to the lower id. */
json_t *json_top_logits(const float *logits, uint32_t n_vocab);
/* [{"layer","value","ratio"}] */
json_t *json_variance(const struct engine_result *r);
/* The certificate's object, or null. */
json_t *json_certificate(const struct certificate *c);
/* The object that `trace` prints. */
/* Name and memory of the backend's device; NULL where it has none. */
json_t *json_device(const struct backend *b);
json_t *json_trace(const struct backend *b, const struct policy *p, const struct engine_result *r,
                   const struct cache *c);
/* Print compactly on one line and release `j`; NULL means that memory ran out. */
int json_print(json_t *j, struct larder_err *e);

/* A file with one JSON object per line; empty lines are skipped. */
struct json_lines {
    const char *path; /* borrowed */
    char *text;       /* owned */
    size_t len, at;
    uint32_t line; /* of the object given last, from 1 */
};

int json_lines_open(struct json_lines *l, const char *path, struct larder_err *e);
/* *ret is the caller's; NULL at the end. */
int json_lines_next(struct json_lines *l, json_t **ret, struct larder_err *e);
void json_lines_done(struct json_lines *l);

uint64_t peak_bytes(void); /* of this process */

#endif
