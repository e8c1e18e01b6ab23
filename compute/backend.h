/* backend.h - what a compute backend does: one table of functions over rows of a layer.
 *
 * Purpose    The engine (engine.h) decides what happens to which rows in which order;
 *            a backend computes. `ref` is plain C in f32 and the oracle; `cpu` uses
 *            oneDNN and vector kernels, in bf16 or f32; `cuda` (program larder-prefill-cuda)
 *            a GPU. A backend is chosen by configuration and never replaced silently.
 * Shapes     n rows (tokens) enter a call. hidden: [n][n_hidden] f32.
 *            q: [n_heads][stride][head_dim], k and v: [n_kv_heads][stride][head_dim], of the
 *            backend's element type, rotate-half RoPE applied to q and k.
 *            o: [n][n_heads * head_dim], element type. `stride` is the row capacity of the
 *            buffers (>= rows used).
 * Memory     Every pointer of a call is a host address. Rows that live through many calls are
 *            best allocated by backend_buffer_new(): a backend with memory of its own then
 *            keeps them there, and whoever looks at them calls backend_view() first.
 * Ownership  open/close, layer_load/layer_free, head_load/head_free pair up; frees accept NULL.
 * Threads    One caller at a time; a backend spreads work over its own threads. Results are
 *            bit-identical for any thread count.
 * Errors     LARDER_EBACKEND (what is missing on this machine), LARDER_ENOMEM,
 *            LARDER_EMODEL, LARDER_EIO.
 */
#ifndef LARDER_BACKEND_H
#define LARDER_BACKEND_H

#include <stdbool.h>
#include <stdint.h>

#include "geom.h"
#include "larder_status.h"
#include "model.h"

struct backend; /* one open backend, bound to one model's shape */
struct layer;   /* one layer's weights in the backend's own form */
struct head;    /* output norm and output matrix */
struct select_ops;

struct backend_opts {
    enum kv_dtype dtype; /* KV_F32 or KV_BF16: weights, activations and K/V; sums are f32 */
    uint32_t n_threads;  /* 0: one per processor this process may use */
    bool stream;         /* cuda: read weights layer by layer even where all of them would fit */
};

/* Rows that enter a layer. */
struct project {
    const float *hidden;     /* [n][n_hidden] */
    const uint32_t *pos;     /* [n] rotation positions */
    const struct rope *rope; /* the document's table (model.h) */
    uint32_t n, stride;
    void *q, *k, *v; /* written at rows 0..n-1 of `stride` per head */
};

/* Stored rows of one KV head that new rows attend to. */
struct past_rows {
    uint32_t n_rows;
    enum kv_dtype dtype;      /* KV_BF16, KV_F32, KV_INT8 or KV_INT4 */
    const void *k, *v;        /* [n_rows][head_dim], or tiles (packed.h) */
    const float *bias;        /* [n_rows] added to the logits, or NULL */
    const uint32_t *position; /* [n_rows], ascending; NULL only where no layer slides */
};

/* In both, `sliding` is the layer's window: a row sees keys less than so many positions before
 * it, itself included; 0: all. */
struct attend {
    const void *q; /* rows row0..n-1 are computed */
    const void *k, *v;
    uint32_t n, row0; /* rows at consecutive positions where `sliding` is not 0 */
    uint32_t stride;
    void *o; /* rows row0..n-1 are written (at o + i * n_heads * head_dim) */
    uint32_t sliding;
};

struct resume {
    const void *q;     /* n_new rows */
    const void *k, *v; /* the private tail: n_tail rows, the last n_new of them are the new ones */
    uint32_t n_new, n_tail;
    uint32_t q_stride, stride;
    const struct past_rows *past; /* [n_kv_heads] */
    void *o;                      /* [n_new][n_heads * head_dim] */
    uint32_t sliding;
    uint32_t pos0; /* position of the tail's first row; the others follow. Used with `sliding` */
};

/* Of n rows at consecutive positions the last w are looked at, and what they look at. */
struct window_mass {
    const void *q, *k;
    uint32_t n, stride, w;
    uint32_t sliding; /* as in struct attend */
    float *mass;      /* [n_heads][n - w] */
};

/* First of the keys that row `i` of a sequence sees. */
static inline uint32_t sliding_from(uint32_t sliding, uint32_t i)
{
    return sliding && i >= sliding ? i - sliding + 1 : 0;
}

typedef void backend_item_fn(void *arg, uint32_t item, uint32_t worker);

enum backend_view { VIEW_READ, VIEW_WRITE };

struct backend_ops {
    const char *name;

    int (*open)(struct backend **ret, const struct model *m, const struct backend_opts *o,
                struct larder_err *e);
    void (*close)(struct backend *b);

    /* Weights of one layer: dequantised and packed for one pass, or in the form that suits who
     * keeps all layers and multiplies a row at a time (`kept`). */
    int (*layer_load)(struct backend *b, uint32_t layer, bool kept, struct layer **ret,
                      struct larder_err *e);
    void (*layer_free)(struct backend *b, struct layer *l);

    /* q, k, v = RoPE(norm(W · rmsnorm(hidden) + bias)), the inner norm (of q and k, per head) and
     * the bias where the model has them. */
    int (*qkv)(struct backend *b, const struct layer *l, const struct project *p,
               struct larder_err *e);

    /* Causal attention inside one sequence. */
    int (*attend)(struct backend *b, const struct attend *a, struct larder_err *e);

    /* hidden += Wo · o; hidden += MLP(rmsnorm(hidden)), rows 0..n-1. */
    int (*finish)(struct backend *b, const struct layer *l, float *hidden, const void *o,
                  uint32_t n, struct larder_err *e);

    /* Window attention mass (notes: PRUNING 1): for the last w of n rows, softmax over all
     * visible keys, summed over the w rows, f32, summed in f64 or f32. */
    int (*window)(struct backend *b, const struct window_mass *x, struct larder_err *e);

    /* New rows attend to all past rows of their KV head (logit + bias) and causally to the tail. In
     * a layer that slides, to those of both that lie within its window: what was pruned never
     * moves the others. */
    int (*resume)(struct backend *b, const struct resume *r, struct larder_err *e);

    /* Logits of n rows: out[n][n_vocab] f32. `head` may be NULL: then the output matrix is
     * read in slices and not kept, which suits one row per document. */
    int (*logits)(struct backend *b, const struct head *h, const float *hidden, uint32_t n,
                  float *out, struct larder_err *e);
    int (*head_load)(struct backend *b, struct head **ret, struct larder_err *e);
    void (*head_free)(struct backend *b, struct head *h);

    /* fn(arg, item, worker) for each item below n on the backend's threads, worker < n_threads:
     * for work of the engine that is not a backend's (replay scores, matching). */
    void (*parallel)(struct backend *b, uint32_t n, backend_item_fn *fn, void *arg);

    /* Buffers with a copy elsewhere; NULL where host memory is all there is. Callers use the
     * functions below. */
    void *(*buffer_new)(struct backend *b, uint64_t count, uint64_t size, bool staging);
    void (*buffer_free)(struct backend *b, void *p);
    int (*view)(struct backend *b, const void *p, enum backend_view how, struct larder_err *e);

    /* Stored rows of all layers, [n_layers * n_kv_heads], that many calls of resume() will read and
     * nobody changes until hold_end(): they are sent to the device once. Pairs nest. NULL likewise.
     */
    int (*hold)(struct backend *b, const struct past_rows *past, struct larder_err *e);
    void (*hold_end)(struct backend *b, const struct past_rows *past);

    /* Scores and rows where K and V are (select_ops.h); NULL: on the host. */
    const struct select_ops *select;
};

/* What every backend starts with, so that callers can ask. */
struct backend {
    const struct backend_ops *ops;
    const struct model *model;    /* borrowed */
    const struct model_params *p; /* borrowed */
    enum kv_dtype elem;           /* of q, k, v, o: KV_F32 or KV_BF16 */
    uint32_t n_threads;
    char isa[32]; /* "generic", "avx2", "avx512", "avx512_bf16", "amx_bf16", "sm_90" */

    /* Of a backend with a device; empty and 0 otherwise. */
    char device[192];                     /* its name, driver and memory */
    uint64_t device_planned, device_peak; /* bytes: of the largest pass so far */
};

extern const struct backend_ops backend_ref;
extern const struct backend_ops backend_cpu;

extern const struct backend_ops backend_cuda; /* linked into larder-prefill-cuda only */

/* By name; NULL when there is no such backend in this build. */
const struct backend_ops *backend_find(const char *name);
/* "ref and cpu": those of this build. */
const char *backend_names(void);

/* count * size bytes, zeroed and 64-byte aligned, for rows that calls of the table read and write;
 * NULL when memory is out. Freed with backend_buffer_free() (NULL allowed), before the backend. */
void *backend_buffer_new(struct backend *b, uint64_t count, uint64_t size);
/* The same, for what leaves for the host as soon as it is there (select_ops.h): page-locked. */
void *backend_staging_new(struct backend *b, uint64_t count, uint64_t size);
void backend_buffer_free(struct backend *b, void *p);

/* Before the caller reads, or (VIEW_WRITE) also writes, memory of the buffer that holds p: after
 * each call of the table that wrote to it, and until the next one that does. Does nothing for other
 * memory. */
int backend_view(struct backend *b, const void *p, enum backend_view how, struct larder_err *e);

#endif
