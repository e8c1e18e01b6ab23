/* model.h - a model's files: parameters, tokenizer, and weights read on demand.
 *
 * Purpose    Hide the format: a GGUF file, or a directory as Hugging Face has it. Weights are
 *            never mapped and never read whole: each request preads the rows it needs and
 *            dequantises them, because prefill is layer-major and a model may be larger than
 *            the memory (and because a mapped file that somebody truncates would kill the
 *            process).
 * Ownership  model_open() allocates, model_close() frees (NULL allowed). What the
 *            accessors return is borrowed from the model.
 * Threads    Read-only after open; any number of threads may read weights.
 * Errors     LARDER_EMODEL (says what in the file is wrong), LARDER_EUNSUPPORTED (names
 *            the feature), LARDER_EIO, LARDER_ENOMEM.
 */
#ifndef LARDER_MODEL_H
#define LARDER_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "geom.h"
#include "larder_status.h"
#include "path_id.h"
#include "rope.h"

struct model;
struct tensor_format;
struct tokenizer;

struct model_params {
    const char *arch; /* "llama", "mistral", "qwen2", "qwen3", "phi3" */
    const char *name; /* as the files have it, "" when absent */
    struct kv_geom geom;
    uint32_t n_hidden;
    uint32_t n_ff;
    uint32_t n_vocab;
    uint32_t n_positions; /* longest sequence the model was made for */
    uint32_t rope_dims;   /* elements of a head that are rotated, the first ones; even */
    double rope_theta;
    struct rope rope;      /* of documents of at most n_rope_short tokens, ... */
    struct rope rope_long; /* ... and of longer ones */
    uint32_t n_rope_short; /* 0: one table for all */
    enum rope_scaling rope_scaling;
    double rope_stretch;     /* llama3: its factor; a table: that of the slowest pair; longrope:
                              * n_positions as a multiple of n_rope_short; else 1 */
    const uint32_t *sliding; /* [n_layers]; NULL: no layer has a sliding window */
    bool has_qkv_bias;       /* MODEL_Q_BIAS, MODEL_K_BIAS and MODEL_V_BIAS are there */
    bool has_qk_norm;        /* MODEL_Q_NORM and MODEL_K_NORM are there */
    bool tied;               /* MODEL_HEAD is MODEL_EMBED */
    double norm_eps;
};

/* The table that a document of n_ctx tokens and all that is asked about it are rotated with. What
 * follows a document never changes its rows, so it keeps the document's table however long. */
static inline const struct rope *model_rope(const struct model_params *p, uint32_t n_ctx)
{
    return p->n_rope_short && n_ctx > p->n_rope_short ? &p->rope_long : &p->rope;
}

/* Positions that a row of a layer sees, its own included; 0: all before it. */
static inline uint32_t model_sliding(const struct model_params *p, uint32_t layer)
{
    return p->sliding ? p->sliding[layer] : 0;
}

/* The least of them; 0: no layer slides. */
static inline uint32_t model_narrowest(const struct model_params *p)
{
    uint32_t least = 0;

    for (uint32_t l = 0; l < p->geom.n_layers; l++)
        if (model_sliding(p, l) && (!least || model_sliding(p, l) < least))
            least = model_sliding(p, l);
    return least;
}

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
    MODEL_DOWN,   /* [n_hidden][n_ff] */
    MODEL_Q_BIAS, /* [n_heads * head_dim][1], in the order of MODEL_Q; where has_qkv_bias */
    MODEL_K_BIAS,
    MODEL_V_BIAS,
    MODEL_Q_NORM, /* [head_dim], before rotation; where has_qk_norm */
    MODEL_K_NORM,
    MODEL_LAYER_WEIGHTS,
    /* not of a layer; pass layer 0 */
    MODEL_EMBED = MODEL_LAYER_WEIGHTS, /* [n_vocab][n_hidden] */
    MODEL_OUT_NORM,                    /* [n_hidden] */
    MODEL_HEAD,                        /* [n_vocab][n_hidden]; the embedding when tied */
    MODEL_WEIGHTS,
};

/* path: a GGUF file, or a directory with config.json, safetensors files and tokenizer.json.
 * Whatever would make the model compute something else is refused here. */
int model_open(struct model **ret, const char *path, struct larder_err *e);
void model_close(struct model *m);

const struct model_params *model_params(const struct model *m);
const struct tokenizer *model_tokenizer(const struct model *m);

/* Name of the chat template that the file's own template amounts to (template_recognise()), or
 * "plain" where it is none of ours. */
const char *model_template_name(const struct model *m);

/* Does the model end its turn with this token? */
bool model_is_end(const struct model *m, uint32_t id);

/* The path's state at open: whether it still is what was hashed (path_id.h). */
struct path_id model_path_id(const struct model *m);

/* SHA-256 of the whole file, or over the files of a directory that decide what is computed
 * (PROTOCOL.md section 2); reads them (computed once, then kept). */
int model_fingerprint(struct model *m, uint8_t ret[32], struct larder_err *e);
/* Take a fingerprint from a caller who hashed this very path id before. */
void model_fingerprint_known(struct model *m, const uint8_t fp[32]);

/* Shape of a weight: rows x cols (norms have one row, biases one column). */
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
