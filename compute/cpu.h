/* cpu.h - private to backend `cpu`: packed matrices, row kernels, attention kernels.
 *
 * Threads    Kernels are called by pool items; each item has a worker number and with it
 *            scratch of its own. Block sizes are fixed, so results do not depend on threads.
 * Errors     LARDER_EBACKEND when oneDNN refuses, LARDER_ENOMEM, and the model reader's.
 */
#ifndef LARDER_CPU_H
#define LARDER_CPU_H

#include <dnnl.h>

#include "mul.h"
#include "packed.h"
#include "pool.h"
#include "ref.h"

#define CPU_ROWS 128u       /* rows of a pipeline item: its activations stay in L2 */
#define CPU_MAX_SHAPES 256u /* primitives kept */

/* W [n_out][n_in] as its product wants it. */
struct cpu_matrix {
    uint32_t n_in, n_out;
    dnnl_memory_t packed; /* bf16: in oneDNN's own layout */
    float *panel;         /* f32: W^T in panels for mul.h, [n_out / 16][n_in][16], zero-padded */
};

/* A product for one number of rows, created on first use and kept. f32 needs no primitive. */
struct cpu_shape {
    uint32_t m, n_in, n_out;
    bool add; /* to what is there */
    dnnl_primitive_t primitive;
    dnnl_memory_desc_t src, dst, scratch;
    dnnl_memory_desc_t weights;
};

struct cpu_backend {
    struct ref_backend ref; /* its product serves the window; first, so that it is one */
    struct thread_pool *pool;
    mul_fn *mul;
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    struct cpu_shape shape[CPU_MAX_SHAPES];
    uint32_t n_shapes;
    const struct rope *rope_of; /* the angles are those of this table, */
    uint32_t *rope_pos;         /* for these positions */
    uint32_t n_rope, cap_rope;
    float *rope;    /* [n_rope][2][rope_dims / 2]: cos, sin */
    float *scratch; /* cpu_scratch() */
    uint64_t n_scratch;
};

static inline struct cpu_backend *cpu_of(struct backend *b)
{
    return (struct cpu_backend *)b;
}

/* n floats for the duration of a call, kept from call to call; NULL: LARDER_ENOMEM. */
float *cpu_scratch(struct cpu_backend *b, uint64_t n, struct larder_err *e);

/* ---- cpu_gemm.c */
int cpu_gemm_open(struct cpu_backend *b, struct larder_err *e);
void cpu_gemm_close(struct cpu_backend *b);

/* Pack rows from a plain [n_out][n_in] buffer of the backend's element type. */
int cpu_matrix_pack(struct cpu_backend *b, struct cpu_matrix *w, const void *plain,
                    struct larder_err *e);
void cpu_matrix_done(struct cpu_matrix *w);

/* Make sure the product of m rows exists; not from pool items. *ret is borrowed. */
int cpu_shape_get(struct cpu_backend *b, const struct cpu_matrix *w, uint32_t m, bool add,
                  const struct cpu_shape **ret, struct larder_err *e);
size_t cpu_shape_scratch(const struct cpu_shape *s);

/* dst[m][n_out] (+)= src[m][n_in] W^T; rows dense. From any pool item; 0 or -1. */
int cpu_multiply(struct cpu_backend *b, const struct cpu_shape *s, const struct cpu_matrix *w,
                 const void *src, void *dst, void *scratch);

/* ---- cpu_load.c: weights, read by all threads */
struct cpu_part {
    enum model_weight which;
    uint32_t row, n;     /* its rows ... */
    uint8_t *to;         /* ... in the element type, or as stored */
    uint64_t stored_row; /* bytes of a stored row; 0: the element type */
};
int cpu_read(struct cpu_backend *b, uint32_t layer, const struct cpu_part *part, uint32_t n_parts,
             struct larder_err *e);
/* *ret [cols of the weight] is the caller's, also on failure. */
int cpu_read_norm(struct backend *b, uint32_t layer, enum model_weight which, float **ret,
                  struct larder_err *e);

/* ---- cpu_blocks.c: products of a few rows with weights as the file stores them */

/* Sum over a row of n_blocks of value * x; sums[i]: that of x over block i. */
typedef float cpu_dot_fn(const uint8_t *blocks, uint32_t n_blocks, const float *x,
                         const float *sums);

/* W [n_out][n_in] in blocks. */
struct cpu_blocks {
    const struct tensor_format *format;
    uint32_t n_in, n_out, n_blocks; /* of a row */
    uint64_t row_bytes;
    uint8_t *rows;
    cpu_dot_fn *dot; /* NULL: none for this format and processor */
};

/* y[n][ld] (+)= x[n][n_in] W^T */
struct cpu_product {
    const struct cpu_blocks *w;
    float *y;
    uint64_t ld;
    bool add;
};

/* Room for the rows, and how they are multiplied. */
int cpu_blocks_init(struct cpu_blocks *w, const struct tensor_format *f, uint32_t n_out,
                    uint32_t n_in, struct larder_err *e);
/* The same with the rows of a weight. */
int cpu_blocks_load(struct cpu_backend *b, uint32_t layer, enum model_weight which,
                    struct cpu_blocks *w, struct larder_err *e);
void cpu_blocks_done(struct cpu_blocks *w);
/* Products of the same n rows x; not from pool items. */
int cpu_blocks_multiply(struct cpu_backend *b, const struct cpu_product *p, uint32_t n_products,
                        const float *x, uint32_t n, struct larder_err *e);

/* ---- cpu_dot_avx2.c (needs AVX2, FMA and F16C); NULL where the format has none */
cpu_dot_fn *cpu_dot_avx2(uint32_t type);

/* ---- cpu_kept.c: a layer made of those; f32 backends */
struct cpu_kept;
int cpu_kept_load(struct cpu_backend *b, uint32_t layer, struct cpu_kept **ret,
                  struct larder_err *e);
void cpu_kept_free(struct cpu_kept *l);
/* y[n]: q, k and v of all heads, one after the other, not rotated yet. */
int cpu_kept_qkv(struct cpu_backend *b, const struct cpu_kept *l, const float *norm,
                 const float *hidden, uint32_t n, float *y, struct larder_err *e);
int cpu_kept_finish(struct cpu_backend *b, const struct cpu_kept *l, const float *norm,
                    float *hidden, const float *o, uint32_t n, struct larder_err *e);

/* ---- cpu_output.c: logits */
int cpu_logits(struct backend *b, const struct head *head, const float *hidden, uint32_t n,
               float *out, struct larder_err *e);
int cpu_head_load(struct backend *b, struct head **ret, struct larder_err *e);
void cpu_head_free(struct backend *b, struct head *head);

/* ---- cpu_rows.c: vectorised row kernels */
void cpu_rmsnorm(const float *x, const float *w, uint32_t n, double eps, float *out);
/* n rows of hidden states in f32 */
void cpu_normalise(const struct backend *b, const float *in, const float *norm, uint32_t n,
                   float *out);
void cpu_rmsnorm_bf16(const float *x, const float *w, uint32_t n, double eps, uint16_t *out);
void cpu_to_bf16(const float *x, uint64_t n, uint16_t *out);
void cpu_to_f32(const uint16_t *x, uint64_t n, float *out);
/* Rotate-half of the first `dims` of d elements; cs: cos [dims / 2], sin [dims / 2]. */
void cpu_rope(const float *x, const float *cs, uint32_t dims, uint32_t d, float *out);
void cpu_add(const float *x, uint32_t n, float *to);
/* row: gate[n_ff], up[n_ff] -> out[n_ff] = silu(gate) * up */
void cpu_swiglu(const float *row, uint32_t n_ff, float *out);
void cpu_swiglu_bf16(const float *row, uint32_t n_ff, uint16_t *out);
/* x[i] = exp(x[i] - max), sum returned; x[i] for i >= n are set to 0 up to `wide`. */
float cpu_softmax_exp(float *x, uint32_t n, uint32_t wide, float max);
float cpu_max(const float *x, uint32_t n);
/* Attention of a row so far, relative to the largest logit so far. */
struct cpu_running {
    float *max, *sum; /* -INFINITY and 0 at first */
    float *o;         /* [pad], scaled with them */
    uint32_t pad;
};
/* x[n], the next logits, become weights; those before `from` and from `to` on are not seen. */
void cpu_soften(float *x, uint32_t n, uint32_t from, uint32_t to, const struct cpu_running *r);

/* ---- cpu_attend_avx512bf16.c: causal attention in bf16 (needs AVX-512-BF16) */
#define CPU_ATTEND_Q 48u  /* query rows of an item */
#define CPU_ATTEND_K 256u /* keys of a step */

/* Bytes of a packed KV head of n rows, and of an item's scratch. */
uint64_t cpu_attend_pack_bytes(uint32_t n, uint32_t d);
uint64_t cpu_attend_scratch_bytes(uint32_t d);
/* Pack K and V [n][d] of one KV head. */
void cpu_attend_pack(const uint16_t *k, const uint16_t *v, uint32_t n, uint32_t d, uint8_t *packed);
/* o rows of query rows row .. row+rows-1 of one query head; q: [..][d], o: row stride o_stride;
 * sliding as in struct attend. */
struct cpu_attend_item {
    const uint16_t *q;
    const uint8_t *packed;
    uint32_t n, d, row, rows, sliding;
    uint16_t *o;
    uint64_t o_stride;
    uint8_t *scratch;
};
void cpu_attend_rows(const struct cpu_attend_item *x);

/* ---- cpu_attend.c: many rows, in f32 whatever the element type */
#define CPU_MANY_ROWS 256u /* from here on gathering the keys pays */
int cpu_attend_f32(struct backend *b, const struct attend *a, struct larder_err *e);
int cpu_resume_many(struct backend *b, const struct resume *r, struct larder_err *e);

/* ---- cpu_packed.c: rows of int8 and int4 tiles as f32; those after the exact ones */
struct packed_rows {
    enum kv_dtype t;
    const uint8_t *tile;
    struct packed_parts parts;
    uint32_t d;
};
/* n keys from packed row `row` (a multiple of PACKED_GROUP) on, in panels: [n / 16][d][16];
 * what fills the last of them up is finite. */
void cpu_packed_keys(const struct packed_rows *p, uint32_t row, uint32_t n, float *panel);
/* n values, [n][d padded to 16]; what is beyond d is not written. */
void cpu_packed_values(const struct packed_rows *p, uint32_t row, uint32_t n, float *out);

/* ---- cpu_score.c: window mass, single dot products */
/* rows[at .. at + n) · x, rows of the given type. */
float cpu_dot(const void *rows, enum kv_dtype t, uint64_t at, const float *x, uint32_t n);
int cpu_window(struct backend *b, const struct window_mass *x, struct larder_err *e);

/* ---- cpu_resume.c: new rows on stored ones, by the kernel that suits their number */
int cpu_resume(struct backend *b, const struct resume *r, struct larder_err *e);

#endif
