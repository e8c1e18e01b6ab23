/* model.h - a model file: parameters, tokenizer, and weights read on demand.
 *
 * Purpose    Hide the file format. Weights are never mapped and never read whole:
 *            each request preads the rows it needs and dequantises them, because
 *            prefill is layer-major and a model may be larger than the memory (and
 *            because a mapped file that somebody truncates would kill the process).
 * Ownership  model_open() allocates, model_close() frees (NULL allowed). What the
 *            accessors return is borrowed from the model.
 * Threads    Read-only after open; any number of threads may read weights.
 * Errors     LARDER_EMODEL (says what in the file is wrong), LARDER_EUNSUPPORTED (names
 *            the feature), LARDER_EIO, LARDER_ENOMEM.
 */
#ifndef LARDER_MODEL_H
#define LARDER_MODEL_H

#include <stdint.h>

#include "geom.h"
#include "larder_status.h"

struct model;
struct tensor_format;
struct tokenizer;

struct model_params {
    const char *arch; /* "llama" */
    const char *name; /* general.name, "" when absent */
    struct kv_geom geom;
    uint32_t n_hidden;
    uint32_t n_ff;
    uint32_t n_vocab;
    uint32_t n_positions; /* longest sequence the model was made for */
    uint32_t rope_dims;   /* rotated elements of a head (== head_dim here) */
    double rope_theta;
    double norm_eps;
};

/* One per layer. Matrices are [n_out][n_in], row-major; MODEL_Q and MODEL_K rows come
 * in rotate-half (Hugging Face) order whatever the file's order is. */
enum model_weight {
    MODEL_ATTN_NORM, /* [n_hidden] */
    MODEL_Q,         /* [n_heads * head_dim][n_hidden] */
    MODEL_K,         /* [n_kv_heads * head_dim][n_hidden] */
    MODEL_V,
    MODEL_O,        /* [n_hidden][n_heads * head_dim] */
    MODEL_FFN_NORM, /* [n_hidden] */
    MODEL_GATE,     /* [n_ff][n_hidden] */
    MODEL_UP,
    MODEL_DOWN, /* [n_hidden][n_ff] */
    MODEL_LAYER_WEIGHTS,
    /* not of a layer; pass layer 0 */
    MODEL_EMBED = MODEL_LAYER_WEIGHTS, /* [n_vocab][n_hidden] */
    MODEL_OUT_NORM,                    /* [n_hidden] */
    MODEL_HEAD,                        /* [n_vocab][n_hidden]; the embedding when tied */
    MODEL_WEIGHTS,
};

int model_open(struct model **ret, const char *path, struct larder_err *e);
void model_close(struct model *m);

const struct model_params *model_params(const struct model *m);
const struct tokenizer *model_tokenizer(const struct model *m);

/* Name of the chat template that the file's own template amounts to (template_recognise()), or
 * "plain" where it is none of ours. */
const char *model_template_name(const struct model *m);

/* Identity of the file: as fstat() gave it at open. */
struct model_file_id {
    uint64_t dev, ino, size, mtime_ns;
};
struct model_file_id model_file_id(const struct model *m);

/* SHA-256 of the whole file; reads it (computed once, then kept). */
int model_fingerprint(struct model *m, uint8_t ret[32], struct larder_err *e);
/* Take a fingerprint from a caller who hashed this very file id before. */
void model_fingerprint_known(struct model *m, const uint8_t fp[32]);

/* Shape of a weight: rows x cols (vectors have one row). */
void model_weight_shape(const struct model *m, enum model_weight w, uint32_t *rows, uint32_t *cols);

/* Rows row0 .. row0+n-1 as f32 [n][cols], exactly dequantised. */
int model_read_f32(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                   uint32_t n, float *dst, struct larder_err *e);

/* How the file stores a weight (dequant.h); a row is cols / block_len blocks. */
const struct tensor_format *model_weight_format(const struct model *m, uint32_t layer,
                                                enum model_weight w);

/* The same rows as stored, one after the other. */
int model_read_stored(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                      uint32_t n, uint8_t *dst, struct larder_err *e);

/* The same rounded to bf16 (nearest even). */
int model_read_bf16(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                    uint32_t n, uint16_t *dst, struct larder_err *e);

#endif
