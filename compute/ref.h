/* ref.h - private to backend `ref`: packed matrices, the one multiply, shared work.
 *
 * Purpose    Everything in `ref` is a product of f32 matrices plus row-wise formulas. The
 *            product accumulates each element in one chain, k ascending, without fused
 *            multiply-add: its bits depend on neither instruction set, threads nor the
 *            number of rows, so that a resumed row equals the same row of one long prefill.
 * Ownership  Callers own matrices; ref_pack() fills what ref_pack_bytes() sized.
 * Threads    ref_for() runs items on the backend's threads and returns when all are done.
 * Errors     LARDER_ENOMEM and what the model reader says.
 */
#ifndef LARDER_REF_H
#define LARDER_REF_H

#include <stdint.h>

#include "backend.h"

#define REF_WIDE 16u  /* columns of a panel: those of mul.h */
#define REF_BLOCK 64u /* rows that one item of work takes */

/* W^T in panels of REF_WIDE columns, zero-padded: [n_out / 16][n_in][16]. */
struct ref_matrix {
    uint32_t n_in, n_out;
    float *panel;
};

/* c[m][ldc] = a[m][lda] · b; b has `n` columns in panels `panel_stride` apart, whose rows are
 * `ldb` apart, and k rows. */
struct ref_mul {
    const float *a;
    uint64_t lda;
    uint32_t m;
    const float *b;
    uint64_t ldb, panel_stride;
    uint32_t k;
    float *c;
    uint64_t ldc;
    uint32_t n;
};

typedef void ref_mul_fn(const struct ref_mul *x);

/* The fastest multiply for this processor, and its name. */
ref_mul_fn *ref_mul_pick(const char **ret_isa);

struct ref_backend {
    struct backend base;
    ref_mul_fn *mul;
};

/* What happens to a projected row before it is rotated; NULL where the model has no such thing. */
struct ref_extras {
    float *bias;            /* [(n_heads + 2 n_kv_heads) head_dim]: of q, k and v */
    float *q_norm, *k_norm; /* [head_dim] */
};

struct layer {
    float *attn_norm, *ffn_norm;
    struct ref_extras extras;
    struct ref_matrix qkv, o, gate, up, down;
};

struct head {
    float *norm;
    struct ref_matrix out;
};

static inline struct ref_backend *ref_of(struct backend *b)
{
    return (struct ref_backend *)b;
}

static inline uint32_t ref_padded(uint32_t n)
{
    return (n + REF_WIDE - 1) / REF_WIDE * REF_WIDE;
}

static inline struct ref_mul ref_by(const struct ref_matrix *w, const float *a, uint64_t lda,
                                    uint32_t m, float *c, uint64_t ldc)
{
    return (struct ref_mul){a,       lda, m,   w->panel, REF_WIDE, (uint64_t)w->n_in * REF_WIDE,
                            w->n_in, c,   ldc, w->n_out};
}

/* Rows row0.. of the matrix from src[n][n_in]. */
void ref_pack_rows(struct ref_matrix *w, uint32_t row0, const float *src, uint32_t n);

/* out[i] = x[i] / rms(x) * w */
void ref_rmsnorm(const float *x, const float *w, uint32_t n, double eps, float *out);

/* A layer's extras; to be released also after a failure. */
int ref_extras_load(const struct backend *b, uint32_t layer, struct ref_extras *x,
                    struct larder_err *e);
void ref_extras_done(struct ref_extras *x);

/* fn(arg, item, worker) for each item below n; `worker` < the backend's n_threads. */
void ref_for(struct backend *b, uint32_t n, backend_item_fn *fn, void *arg);

/* Floats of scratch per worker, one block for all of them. */
float *ref_scratch(const struct backend *b, uint64_t per_worker);

int ref_layer_load(struct backend *b, uint32_t layer, bool kept, struct layer **ret,
                   struct larder_err *e);
void ref_layer_free(struct backend *b, struct layer *l);
int ref_head_load(struct backend *b, struct head **ret, struct larder_err *e);
void ref_head_free(struct backend *b, struct head *h);
int ref_logits(struct backend *b, const struct head *h, const float *hidden, uint32_t n, float *out,
               struct larder_err *e);

/* out[i] = scale * x[at + i], n elements of type t (KV_F32 or KV_BF16). */
void ref_scale(const void *x, enum kv_dtype t, uint64_t at, uint64_t n, float scale, float *out);

/* Keys and values of one KV head in the layout that products want: first the stored rows that
 * new ones attend to, then the sequence's own. */
struct ref_keys {
    float *k;          /* [n_keys / 16][head_dim][16], zero-padded */
    float *v;          /* [n_keys][padded head_dim], or NULL */
    const float *bias; /* of the first n_past keys, or NULL; borrowed */
    uint32_t n_past;
    const uint32_t *position; /* of the first n_past keys, or NULL; borrowed */
};

/* Which keys of such a list a row sees: those of a range that ends with its own. */
struct ref_sight {
    uint32_t sliding; /* the layer's window; 0: the range begins with the first key */
    uint32_t pos0;    /* position of the first key after the stored ones */
};

/* The first key that the row whose own key has number `own` sees. */
uint32_t ref_sees_from(const struct ref_sight *s, const struct ref_keys *g, uint32_t own);

struct ref_source {
    const void *k, *v; /* [n_kv_heads][stride][head_dim]; v NULL: keys only */
    enum kv_dtype dtype;
    uint32_t n;
    uint64_t stride;
    const struct past_rows *past; /* [n_kv_heads] or NULL */
};

/* *ret: [n_kv_heads], to be released with ref_gather_free() (accepts NULL). */
int ref_gather(const struct kv_geom *geom, const struct ref_source *s, struct ref_keys **ret,
               struct larder_err *e);
void ref_gather_free(struct ref_keys *g, uint32_t n_kv_heads);

int ref_attend(struct backend *b, const struct attend *a, struct larder_err *e);
int ref_resume(struct backend *b, const struct resume *r, struct larder_err *e);
int ref_window(struct backend *b, const struct window_mass *x, struct larder_err *e);

#endif
