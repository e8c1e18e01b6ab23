/* model_file.h - private to model*.c: what a format's reader fills in.
 *
 * Purpose    A format is a row of functions (struct model_format); after open() a weight is a
 *            place in a file, and how it got there no longer matters. Which tensors an
 *            architecture has, and their shapes, is model_bind.c's, for all formats.
 * Ownership  A reader owns its files until close(); everything else is the model's.
 */
#ifndef LARDER_MODEL_FILE_H
#define LARDER_MODEL_FILE_H

#include "model.h"
#include "sha256.h"

#define MODEL_MAX_HIDDEN (1u << 17)
#define MODEL_MAX_FF (1u << 20)
#define MODEL_MAX_ENDS 32u

/* What architectures differ in beyond numbers. */
struct model_arch {
    const char *name;
    bool fused;    /* Q, K and V are one matrix, gate and up another */
    bool qkv_bias; /* always there; elsewhere it may be */
    bool qk_norm;
};

/* NULL: not one of them. */
const struct model_arch *model_arch(const char *name, size_t len);
int model_arch_unknown(const char *name, size_t len, struct larder_err *e);

/* Rows of a weight in a file. */
struct stored_weight {
    int fd;
    const struct tensor_format *format; /* NULL: the model has no such weight */
    uint64_t offset;                    /* of the first row */
    uint64_t row_bytes;
    uint32_t rows, cols;
    bool paired; /* rows of a head come in the order of interleaved RoPE */
};

struct model_format {
    /* Fills params, weights, tokenizer and template name of a zeroed model. */
    int (*open)(struct model *m, const char *path, struct larder_err *e);
    /* The bytes that decide what is computed. */
    int (*hash)(const struct model *m, struct sha256 *s, struct larder_err *e);
    void (*close)(struct model *m); /* also after a failed open */
};

extern const struct model_format model_format_gguf;
extern const struct model_format model_format_hf;

struct gguf;
struct hf_files;

struct model {
    const struct model_format *format;
    struct gguf *gguf;   /* that format's */
    struct hf_files *hf; /* that format's */
    struct model_params p;
    char *name;
    double *freq;                                       /* tables of p.rope and p.rope_long */
    uint32_t *sliding;                                  /* p.sliding */
    struct stored_weight (*layer)[MODEL_LAYER_WEIGHTS]; /* [n_layers] */
    struct stored_weight embed, out_norm, head;
    struct tokenizer *tok;
    const char *template_name;
    uint32_t end[MODEL_MAX_ENDS];
    uint32_t n_ends;
    struct path_id id;
    uint8_t fingerprint[32];
    bool has_fingerprint;
};

/* Hash `bytes` bytes of a file from its start. */
int model_hash_file(int fd, uint64_t bytes, struct sha256 *s, struct larder_err *e);

/* A file's own template (a Jinja program) decides the name, where it amounts to one of ours. */
void model_set_template(struct model *m, const char *text, size_t len);

/* ---- model_params.c: what both formats know alike */

int model_set_name(struct model *m, const char *name, size_t len, struct larder_err *e);

/* Numbers that no file may claim; head_dim and rope_dims are set. */
int model_check_params(const struct model_params *p, struct larder_err *e);

/* Tables for p.rope_dims and p.rope_theta: the plain one, and room for a second. */
int model_alloc_rope(struct model *m, struct larder_err *e);

/* p.rope is divided by factors [rope_dims / 2], finite and positive. */
int model_set_factors(struct model *m, const double *factor, struct larder_err *e);

/* p.rope becomes the table of documents up to n_original tokens, p.rope_long that of longer ones;
 * factor: the attention factor, or 0 for the one that follows from the lengths. */
int model_set_longrope(struct model *m, const double *short_factor, const double *long_factor,
                       uint32_t n_original, double factor, struct larder_err *e);

/* A window of `positions` in the layers from `first` on; no window where it hides nothing. */
int model_set_sliding(struct model *m, uint32_t positions, uint32_t first, struct larder_err *e);

/* ---- model_bind.c */

/* A tensor as a reader found it; vectors have one row. */
struct found_tensor {
    int fd;
    const struct tensor_format *format;
    uint64_t offset;
    uint64_t rows, cols;
};

struct tensor_names {
    const char *layer;                 /* "blk": then a dot, the layer's number, a dot */
    const char *weight[MODEL_WEIGHTS]; /* and this; of the whole model: alone */
    const char *qkv, *gate_up;         /* where fused */
};

struct tensor_source {
    void *arg;
    const struct tensor_names *names;
    /* LARDER_ENOTFOUND without a message. What was found counts as used. */
    int (*find)(void *arg, const char *name, struct found_tensor *ret, struct larder_err *e);
    /* A tensor that nobody found: false when all were used. */
    bool (*unused)(void *arg, char *name, size_t cap);
    const struct model_arch *arch;
    bool paired; /* Q and K come in the order of interleaved RoPE */
    bool tied;   /* the output matrix is the embedding, whatever else is there */
    bool may_have_bias;
};

/* All weights of the model. p.n_vocab 0 takes the embedding's. */
int model_bind(struct model *m, const struct tensor_source *s, struct larder_err *e);

/* A vector of n elements in f64, where it is there: LARDER_ENOTFOUND without a message. */
int model_read_vector(const struct tensor_source *s, const char *name, uint32_t n, double *ret,
                      struct larder_err *e);

#endif
