/* cuda.h - private to backend `cuda`: the device behind a table, memory, weights, geometry.
 *
 * Purpose    Everything that decides is plain C and asks a device through struct cuda_driver
 *            (cuda_device.h), so that planning, streaming and every error path run in unit tests.
 * Units      Bytes, rows, elements.
 * Ownership  Device memory is the backend's; `rooms` only grow and live until close.
 * Threads    One thread owns the device. A reader thread fills pinned memory with stored weights
 *            and touches nothing else.
 * Errors     LARDER_EBACKEND: no device, or it failed (with the driver's own words).
 *            LARDER_ENOMEM: device memory; the message says what was asked for and what is free.
 */
#ifndef LARDER_CUDA_H
#define LARDER_CUDA_H

#include <pthread.h>
#include <stdatomic.h>

#include "backend.h"
#include "cuda_device.h"
#include "dequant.h"

#define CUDA_ROWS 4096u /* rows that go through a product at once */
#define CUDA_RESIDENT_PERCENT                                                                      \
    60u                                  /* all weights stay if they fit in this share of the
                                            * memory that was free at the start */
#define CUDA_WINDOW_BYTES (256ull << 20) /* logits of the window that exist at once */
#define CUDA_HEAD_ROWS 8192u             /* rows of the output matrix read at once */
#define CUDA_LEAST_MAJOR 8               /* compute capability: bf16 tensor cores, cp.async */

#define CUDA_MARK_CHOSEN (CUDA_MARKS - 2) /* what leaves is there */
#define CUDA_MARK_LEFT (CUDA_MARKS - 1)   /* and has left */

/* ---- memory (cuda_memory.c) */

enum cuda_room {
    ROOM_X,    /* activations T that enter a product */
    ROOM_WIDE, /* f32 that leave one */
    ROOM_ACT,  /* after SwiGLU */
    ROOM_POS,
    ROOM_ANGLES,
    ROOM_FREQ,
    ROOM_HIDDEN, /* what a caller keeps in host memory */
    ROOM_Q,
    ROOM_K,
    ROOM_V,
    ROOM_O,
    ROOM_PAST,       /* stored rows of a layer that nobody holds, as they came, */
    ROOM_PAST_TABLE, /* and where they are */
    ROOM_PART,
    ROOM_LOGIT,
    ROOM_STAT,
    ROOM_MASS,
    ROOM_RAW, /* stored weights of a layer */
    ROOM_HEAD_RAW,
    ROOM_HEAD,
    ROOM_NORM,
    ROOM_LOGITS,
    ROOM_SCORE, /* of callers in host memory: scores, ranks, lists */
    ROOM_INDEX,
    ROOM_COUNTS,
    ROOM_BAD,
    ROOM_SUMS,
    ROOM_SUMS_OUT,
    ROOM_MOVED, /* rows on their way to where they came from */
    ROOM_FROM,
    ROOM_WORTH,
    ROOM_LENGTH,
    ROOM_KEYS, /* of what is kept, as they will be read back */
    ROOM_TILES,
    ROOM_PACK_TABLE,
    ROOM_PACK_RANGES,
    ROOM_TO_K,
    ROOM_TO_V,
    ROOM_BIAS,
    CUDA_ROOMS,
};

/* Memory in two places: at `host`, by whose address callers know it, and on the device. */
struct cuda_twin {
    struct cuda_twin *next;
    uint8_t *host, *device; /* device NULL: not yet */
    uint64_t bytes;
    bool on_host, on_device; /* where it is valid */
    bool blank;              /* zeros that nobody has written to */
    bool staging;            /* host memory is page-locked, */
    bool leaving;            /* and what the device has is on its way there */
};

/* ---- planning (cuda_plan.c) */

/* Bytes of the weights of a model in a backend's form. */
struct cuda_weights_size {
    uint64_t layer;      /* of T, on the device */
    uint64_t raw;        /* as stored, of the largest layer */
    uint64_t head;       /* of T */
    uint64_t all_stored; /* layers as stored */
};

struct cuda_plan {
    uint64_t hidden, kv, weights, workspace;
    uint64_t chosen; /* scores, ranks, and the rows that leave, at most */
    uint64_t held;   /* stored rows of sessions */
    uint64_t total;
    bool resident;
};

int cuda_weights_size(const struct model *m, enum kv_dtype elem, struct cuda_weights_size *ret,
                      struct larder_err *e);
bool cuda_plan_resident(const struct cuda_weights_size *w, uint32_t n_layers, uint64_t free_bytes);
/* What n rows take at their peak, beside `held` bytes. */
struct cuda_plan cuda_plan_rows(const struct model_params *p, const struct cuda_weights_size *w,
                                enum kv_dtype elem, bool resident, uint64_t n, uint64_t held);
/* LARDER_ENOMEM, with every part of the plan, unless it fits. */
int cuda_plan_check(const struct cuda_plan *plan, uint64_t n, const struct cuda_info *info,
                    struct larder_err *e);

/* ---- weights (cuda_weights.c) */

struct layer {
    uint32_t index;
    uint8_t *memory;
    float *attn_norm, *ffn_norm;
    float *bias;                    /* of q, k and v; NULL where the model has none */
    float *q_norm, *k_norm;         /* NULL likewise */
    void *qkv, *o, *gate_up, *down; /* [n_out][n_in] T; gate above up */
    bool own;                       /* not of a slot: freed by layer_free() */
};

struct head {
    float *norm;
    void *out; /* [n_vocab][n_hidden] T */
};

/* A matrix, or a part of one, on its way to the device. */
struct cuda_part {
    enum model_weight which;
    uint32_t rows, cols;
    const struct tensor_format *format;
    uint64_t at, row_bytes; /* in the stage */
    uint64_t to;            /* bytes into a layer's memory */
};

#define CUDA_PARTS (unsigned)MODEL_LAYER_WEIGHTS /* at most */

struct cuda_layout {
    struct cuda_part part[CUDA_PARTS];
    uint32_t n_parts;
    uint64_t raw, bytes; /* of the stage, and on the device */
};

enum cuda_stage_state { STAGE_EMPTY, STAGE_READING, STAGE_FULL };

/* Where stored weights of one layer wait in pinned memory. */
struct cuda_stage {
    uint8_t *memory;
    uint32_t layer;
    enum cuda_stage_state state;
    struct cuda_layout layout;
};

struct cuda_slot {
    struct layer l;
    bool holds, in_use;
};

struct cuda_reader {
    pthread_t thread;
    struct backend *b;
    struct thread_pool *pool; /* its own: the backend's may be at work */
    struct cuda_stage *stage;
    atomic_bool done;
    atomic_int rc;
    pthread_mutex_t lock; /* guards e */
    struct larder_err e;
};

/* ---- stored rows (cuda_past.c) */

/* Rows of all layers that a session reads at each of its steps. */
struct cuda_hold {
    struct cuda_hold *next;
    const struct past_rows *rows; /* [n_layers * n_kv_heads]; known by this address */
    uint32_t n_users;
    uint32_t n_sent;          /* layers that are there or on their way */
    uint8_t *memory;          /* on the device */
    uint64_t bytes;           /* of it */
    uint64_t at;              /* where the next layer begins */
    struct cuda_past *host;   /* where the rows are, [n_layers * n_kv_heads], in host memory ... */
    struct cuda_past *device; /* ... and on the device */
};

struct replay_ask; /* select_ops.h */
struct fit_rows;
struct pack_rows;

struct cuda_backend {
    struct backend base; /* first, so that it is one */
    const struct cuda_driver *d;
    void *device;
    struct cuda_info info;
    bool bf16;
    uint64_t elem; /* bytes */
    struct thread_pool *pool;

    void *room[CUDA_ROOMS];
    uint64_t room_bytes[CUDA_ROOMS];
    struct cuda_twin *twins;
    struct cuda_hold *holds;
    uint64_t used, peak;
    bool poison;          /* tests: what is not valid on the host is NaN */
    uint64_t logit_bytes; /* logits of a replay that exist at once; tests have less */

    struct cuda_weights_size size;
    bool stream, resident;
    uint64_t planned_rows;
    struct cuda_plan plan;

    struct cuda_slot *slot; /* [n_slots]: two, or one per layer */
    uint32_t n_slots;
    struct cuda_stage stage[2];
    struct cuda_reader reader;
    struct head *head; /* kept when weights are resident */
};

static inline struct cuda_backend *cuda_of(struct backend *b)
{
    return (struct cuda_backend *)b;
}

/* 0, or an error that names the step; `rc` is the driver's number. */
int cuda_check(struct cuda_backend *b, int rc, const char *step, struct larder_err *e);

int cuda_alloc(struct cuda_backend *b, uint64_t bytes, const char *what, void **ret,
               struct larder_err *e);
void cuda_release(struct cuda_backend *b, void *p, uint64_t bytes);
/* At least `bytes` of a room. Growing loses what was in it. */
int cuda_room(struct cuda_backend *b, enum cuda_room r, uint64_t bytes, void **ret,
              struct larder_err *e);
/* Both wait until it is there: callers' memory may change or end after the call. */
int cuda_up(struct cuda_backend *b, void *to, const void *from, uint64_t bytes,
            struct larder_err *e);
int cuda_down(struct cuda_backend *b, void *to, const void *from, uint64_t bytes,
              struct larder_err *e);

/* Device address of host address p, if it is a twin's; *ret NULL otherwise. The device copy is
 * made valid; `writes`: and the host's is not any more. */
int cuda_twin_find(struct cuda_backend *b, const void *p, bool writes, uint8_t **ret,
                   struct larder_err *e);
/* The same for memory that has to be a twin's. */
int cuda_twin_need(struct cuda_backend *b, const void *p, uint8_t **ret, struct larder_err *e);
void cuda_memory_close(struct cuda_backend *b);

/* Device memory for what a call writes to p: that of a twin, whatever was in it before, or a room
 * of `bytes`. */
int cuda_target(struct cuda_backend *b, void *p, enum cuda_room room, uint64_t bytes, uint8_t **ret,
                struct larder_err *e);
/* What was written there: it stays where it is, or is on its way (staging), or is copied to p. */
int cuda_deliver(struct cuda_backend *b, void *p, const void *device, uint64_t bytes,
                 struct larder_err *e);
/* A part of a staging buffer from anywhere on the device. */
int cuda_leave(struct cuda_backend *b, struct cuda_twin *t, void *to, const void *device,
               uint64_t bytes, struct larder_err *e);
/* The device writes to it: the host's copy is not valid any more. */
void cuda_taken(const struct cuda_backend *b, struct cuda_twin *t);
struct cuda_twin *cuda_twin_of(struct cuda_backend *b, const void *p);
/* `bytes` at p on the device: those of a twin, which a call may write to, or copied to a room. */
int cuda_source(struct cuda_backend *b, const void *p, enum cuda_room room, uint64_t bytes,
                bool writes, uint8_t **ret, struct larder_err *e);

void *cuda_buffer_new(struct backend *b, uint64_t count, uint64_t size, bool staging);
void cuda_buffer_free(struct backend *b, void *p);
int cuda_buffer_view(struct backend *b, const void *p, enum backend_view how, struct larder_err *e);

int cuda_layer_load(struct backend *b, uint32_t layer, bool kept, struct layer **ret,
                    struct larder_err *e);
void cuda_layer_free(struct backend *b, struct layer *l);
int cuda_layer_layout(const struct model *m, uint32_t layer, enum kv_dtype elem,
                      struct cuda_layout *ret, struct larder_err *e);
int cuda_weights_open(struct cuda_backend *b, struct larder_err *e);
void cuda_weights_close(struct cuda_backend *b);
int cuda_head_load(struct backend *b, struct head **ret, struct larder_err *e);
void cuda_head_free(struct backend *b, struct head *h);
/* Rows row0.. of a weight to T at `to` on the device; waits. */
int cuda_read_rows(struct cuda_backend *b, uint32_t layer, enum model_weight which, uint32_t row0,
                   uint32_t n, void *to, struct larder_err *e);
int cuda_read_norm(struct cuda_backend *b, uint32_t layer, enum model_weight which, void *to,
                   struct larder_err *e);

int cuda_hold(struct backend *b, const struct past_rows *past, struct larder_err *e);
void cuda_hold_end(struct backend *b, const struct past_rows *past);
/* Bytes of all rows that are held. */
uint64_t cuda_held(const struct cuda_backend *b);
/* Table [n_kv_heads] of a layer's rows on the device, for what comes next on CUDA_COMPUTE. */
int cuda_past_find(struct cuda_backend *b, const struct past_rows *past, struct cuda_past **ret,
                   struct larder_err *e);
/* Send the held rows of the layer behind the one whose rows are `past`, while that one computes. */
int cuda_past_ahead(struct cuda_backend *b, const struct past_rows *past, struct larder_err *e);

/* ---- geometry (cuda_launch.c): grids and shared memory, from shapes alone */
static inline uint32_t cuda_blocks(uint64_t n, uint32_t per)
{
    return (uint32_t)((n + per - 1) / per);
}

struct cuda_launch cuda_grid_rows(enum cuda_kernel k, bool bf16, uint64_t rows, const void *args);
struct cuda_launch cuda_grid_flat(enum cuda_kernel k, bool bf16, uint64_t n, const void *args);
/* Blocks that share the keys, of which there are at most n_keys, of the same rows. */
uint32_t cuda_attend_splits(const struct cuda_attend_args *a, uint32_t n_keys);
/* bf16_past: what is stored, if anything is, is bf16. */
struct cuda_launch cuda_grid_attend(const struct cuda_attend_args *a, bool bf16, bool bf16_past);
struct cuda_launch cuda_grid_merge(const struct cuda_attend_args *a, bool bf16);
struct cuda_launch cuda_grid_window(enum cuda_kernel k, bool bf16,
                                    const struct cuda_window_args *a);
/* Heads whose window logits exist at once. */
uint32_t cuda_window_batch(uint32_t n_heads, uint32_t n, uint32_t w);

int cuda_run(struct cuda_backend *b, struct cuda_launch l, struct larder_err *e);

/* ---- steps (cuda_forward.c, cuda_attention.c) */
int cuda_qkv(struct backend *b, const struct layer *l, const struct project *p,
             struct larder_err *e);
int cuda_finish(struct backend *b, const struct layer *l, float *hidden, const void *o, uint32_t n,
                struct larder_err *e);
int cuda_logits(struct backend *b, const struct head *h, const float *hidden, uint32_t n,
                float *out, struct larder_err *e);
int cuda_attend(struct backend *b, const struct attend *a, struct larder_err *e);
int cuda_window(struct backend *b, const struct window_mass *x, struct larder_err *e);
/* The same; the mass stays on the device, in a room. */
int cuda_window_mass(struct cuda_backend *b, const struct window_mass *x, float **ret,
                     struct larder_err *e);
int cuda_resume(struct backend *b, const struct resume *r, struct larder_err *e);

extern const struct select_ops cuda_select; /* cuda_select.c */
int cuda_replay(struct backend *b, const struct replay_ask *x, struct larder_err *e);
int cuda_fit(struct backend *b, const struct fit_rows *x, struct larder_err *e);
int cuda_pack(struct backend *b, const struct pack_rows *x, struct larder_err *e);
/* ret [rows of all KV heads][head_dim]: keys[g][count[g]][head_dim], of T, as a decoder reads them
 * when they are stored as `to`. All but count on the device. */
int cuda_keys_read_back(struct cuda_backend *b, enum kv_dtype to, const void *const *keys,
                        const uint32_t *count, float *ret, struct larder_err *e);

/* Rows of a caller on the device: [heads][stride][d], in place or copied to a room. */
struct cuda_rows {
    uint8_t *device;
    uint64_t stride;
    bool copied;
};
int cuda_rows_in(struct cuda_backend *b, const void *p, enum cuda_room room, uint32_t heads,
                 uint64_t stride, uint32_t n, struct cuda_rows *ret, struct larder_err *e);
/* The same for rows that will be written, and back to the caller afterwards. */
int cuda_rows_out(struct cuda_backend *b, void *p, enum cuda_room room, uint32_t heads,
                  uint64_t stride, uint32_t n, struct cuda_rows *ret, struct larder_err *e);
int cuda_rows_back(struct cuda_backend *b, void *p, const struct cuda_rows *r, uint32_t heads,
                   uint64_t stride, uint32_t n, struct larder_err *e);

#endif
