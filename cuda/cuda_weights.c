/* cuda_weights.c - weights of backend `cuda`: stored blocks on the host, T on the device.
 *
 * The one idea: while layer l computes, the stored blocks of l+1 are copied and dequantised on a
 * second stream, and a reader thread brings those of l+2 into pinned memory. There are two slots
 * of device memory and two stages of pinned memory; when the whole model fits there is a
 * slot for each layer, and nothing is read twice. */
#include "cuda.h"

#include <string.h>

#include "mem.h"
#include "pool.h"

#define SLICE 256u /* rows that one item of reading takes */
#define ALIGN 256u
#define READERS 8u /* threads that read at most */

static uint64_t aligned(uint64_t n)
{
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

/* Marks of a slot: its weights are there; nobody reads them any more. */
static uint32_t mark_ready(uint32_t slot)
{
    return 2 * slot;
}

static uint32_t mark_free(uint32_t slot)
{
    return 2 * slot + 1;
}

/* ---- what is where */

/* A layer's norms and biases are f32 in any case. */
static bool is_vector(enum model_weight w)
{
    return w == MODEL_ATTN_NORM || w == MODEL_FFN_NORM ||
           (w >= MODEL_Q_BIAS && w < MODEL_LAYER_WEIGHTS);
}

/* In the order of a layer's memory: Q, K and V are one matrix, their biases one vector, gate and up
 * another matrix. */
static const enum model_weight order[CUDA_PARTS] = {
    MODEL_ATTN_NORM, MODEL_FFN_NORM, MODEL_Q_NORM, MODEL_K_NORM, MODEL_Q_BIAS,
    MODEL_K_BIAS,    MODEL_V_BIAS,   MODEL_Q,      MODEL_K,      MODEL_V,
    MODEL_O,         MODEL_GATE,     MODEL_UP,     MODEL_DOWN};

static bool has_part(const struct model_params *p, enum model_weight w)
{
    if (w == MODEL_Q_NORM || w == MODEL_K_NORM)
        return p->has_qk_norm;
    return w == MODEL_Q_BIAS || w == MODEL_K_BIAS || w == MODEL_V_BIAS ? p->has_qkv_bias : true;
}

/* Not behind the part before it. */
static bool starts(enum model_weight w)
{
    return w != MODEL_K && w != MODEL_V && w != MODEL_UP && w != MODEL_K_BIAS && w != MODEL_V_BIAS;
}

static int add_part(const struct model *m, uint32_t layer, enum kv_dtype elem, enum model_weight w,
                    struct cuda_layout *y, struct larder_err *e)
{
    struct cuda_part *p = &y->part[y->n_parts++];

    p->which = w;
    model_weight_shape(m, w, &p->rows, &p->cols);
    p->format = is_vector(w) ? tensor_format(TENSOR_F32) : model_weight_format(m, layer, w);
    if (!p->format || p->cols % p->format->block_len)
        return larder_fail(e, LARDER_EUNSUPPORTED,
                           "backend cuda cannot read weight %d of layer %u: its rows of %u are "
                           "no whole blocks",
                           (int)w, layer, p->cols);
    p->row_bytes = (uint64_t)p->cols / p->format->block_len * p->format->block_bytes;
    p->at = y->raw;
    y->raw += aligned(p->rows * p->row_bytes);
    p->to = starts(w) ? aligned(y->bytes) : y->bytes;
    y->bytes = p->to + (uint64_t)p->rows * p->cols * kv_dtype_bytes(is_vector(w) ? KV_F32 : elem);
    return 0;
}

int cuda_layer_layout(const struct model *m, uint32_t layer, enum kv_dtype elem,
                      struct cuda_layout *ret, struct larder_err *e)
{
    int rc = 0;

    *ret = (struct cuda_layout){0};
    for (uint32_t i = 0; i < CUDA_PARTS && !rc; i++)
        if (has_part(model_params(m), order[i]))
            rc = add_part(m, layer, elem, order[i], ret, e);
    return rc;
}

static void *part_of(const struct layer *l, const struct cuda_layout *y, enum model_weight w)
{
    for (uint32_t i = 0; i < y->n_parts; i++)
        if (y->part[i].which == w)
            return l->memory + y->part[i].to;
    return NULL;
}

static void point_into(struct layer *l, const struct cuda_layout *y)
{
    l->attn_norm = part_of(l, y, MODEL_ATTN_NORM);
    l->ffn_norm = part_of(l, y, MODEL_FFN_NORM);
    l->bias = part_of(l, y, MODEL_Q_BIAS);
    l->q_norm = part_of(l, y, MODEL_Q_NORM);
    l->k_norm = part_of(l, y, MODEL_K_NORM);
    l->qkv = part_of(l, y, MODEL_Q);
    l->o = part_of(l, y, MODEL_O);
    l->gate_up = part_of(l, y, MODEL_GATE);
    l->down = part_of(l, y, MODEL_DOWN);
}

/* ---- reading */

struct reading {
    struct cuda_reader *r;
    uint32_t first[CUDA_PARTS + 1]; /* number of the part's first item */
};

static void read_failed(struct cuda_reader *r, int rc, const struct larder_err *e)
{
    pthread_mutex_lock(&r->lock);
    if (!atomic_exchange(&r->rc, rc))
        r->e = *e;
    pthread_mutex_unlock(&r->lock);
}

static void read_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct reading *x = arg;
    struct cuda_stage *s = x->r->stage;
    struct larder_err e = {0, ""};
    uint32_t i = 0, row, n;
    const struct cuda_part *p;
    uint8_t *to;
    int rc;

    (void)worker;
    while (item >= x->first[i + 1])
        i++;
    p = &s->layout.part[i];
    row = (item - x->first[i]) * SLICE;
    n = p->rows - row < SLICE ? p->rows - row : SLICE;
    to = s->memory + p->at + row * p->row_bytes;
    if (is_vector(p->which))
        rc = model_read_f32(x->r->b->model, s->layer, p->which, row, n, (float *)(void *)to, &e);
    else
        rc = model_read_stored(x->r->b->model, s->layer, p->which, row, n, to, &e);
    if (rc)
        read_failed(x->r, rc, &e);
}

static void *read_stage(void *arg)
{
    struct reading x = {arg, {0}};
    const struct cuda_layout *y = &x.r->stage->layout;

    for (uint32_t i = 0; i < y->n_parts; i++)
        x.first[i + 1] = x.first[i] + (y->part[i].rows + SLICE - 1) / SLICE;
    pool_for(x.r->pool, x.first[y->n_parts], read_item, &x);
    atomic_store(&x.r->done, true);
    return NULL;
}

/* Waits for the reader, if there is one. */
static int join_reader(struct cuda_backend *b, struct larder_err *e)
{
    struct cuda_reader *r = &b->reader;
    int rc;

    if (!r->stage)
        return 0;
    pthread_join(r->thread, NULL);
    rc = atomic_load(&r->rc);
    r->stage->state = rc ? STAGE_EMPTY : STAGE_FULL;
    r->stage = NULL;
    if (rc && e)
        *e = r->e;
    return rc;
}

/* Begin to read a layer. Nobody else reads, and nothing is copied from its stage any more. */
static int start_reader(struct cuda_backend *b, uint32_t layer, struct larder_err *e)
{
    struct cuda_stage *s = &b->stage[layer % 2];
    struct cuda_reader *r = &b->reader;
    void *memory = s->memory;
    int rc = cuda_layer_layout(b->base.model, layer, b->base.elem, &s->layout, e);

    if (!rc && !memory && b->d->pin(b->device, b->size.raw, &memory))
        rc = larder_fail(e, LARDER_ENOMEM, "no pinned host memory for a layer of %llu MiB",
                         (unsigned long long)(b->size.raw >> 20));
    if (rc)
        return rc;
    s->memory = memory;
    s->layer = layer;
    s->state = STAGE_READING;
    r->b = &b->base;
    r->stage = s;
    atomic_store(&r->done, false);
    atomic_store(&r->rc, 0);
    if (pthread_create(&r->thread, NULL, read_stage, r)) {
        r->stage = NULL;
        s->state = STAGE_EMPTY;
        return larder_fail(e, LARDER_ENOMEM, "no thread to read weights");
    }
    return 0;
}

static bool staged(const struct cuda_backend *b, uint32_t layer)
{
    const struct cuda_stage *s = &b->stage[layer % 2];

    return s->state != STAGE_EMPTY && s->layer == layer;
}

/* ---- to the device */

static int dequantise(struct cuda_backend *b, const struct cuda_part *p, const uint8_t *raw,
                      void *to, enum cuda_lane lane, struct larder_err *e)
{
    struct cuda_dequant_args a = {.src = raw,
                                  .dst = to,
                                  .n = (uint64_t)p->rows * p->cols,
                                  .type = p->format->type,
                                  .block_len = p->format->block_len,
                                  .block_bytes = p->format->block_bytes};
    bool bf16 = b->bf16 && !is_vector(p->which);
    struct cuda_launch l = cuda_grid_flat(CUDA_DEQUANT, bf16, a.n, &a);

    l.lane = lane;
    return cuda_run(b, l, e);
}

/* Copy and dequantise a full stage into l on the copy lane. */
static int send_stage(struct cuda_backend *b, struct cuda_stage *s, struct layer *l,
                      struct larder_err *e)
{
    void *raw = NULL;
    int rc = cuda_room(b, ROOM_RAW, b->size.raw, &raw, e);

    if (!rc)
        rc = cuda_check(
            b, b->d->copy(b->device, raw, s->memory, s->layout.raw, CUDA_TO_DEVICE, CUDA_COPY),
            "a copy of weights", e);
    l->index = s->layer;
    point_into(l, &s->layout);
    for (uint32_t i = 0; i < s->layout.n_parts && !rc; i++)
        rc = dequantise(b, &s->layout.part[i], (uint8_t *)raw + s->layout.part[i].at,
                        l->memory + s->layout.part[i].to, CUDA_COPY, e);
    return rc;
}

static uint32_t slot_of(const struct cuda_backend *b, uint32_t layer)
{
    return layer % b->n_slots;
}

static bool is_there(const struct cuda_backend *b, uint32_t layer)
{
    const struct cuda_slot *s = &b->slot[slot_of(b, layer)];

    return s->holds && s->l.index == layer;
}

static int layer_memory(struct cuda_backend *b, struct layer *l, struct larder_err *e)
{
    void *memory = l->memory;
    int rc = memory ? 0 : cuda_alloc(b, b->size.layer, "a layer's weights", &memory, e);

    l->memory = memory;
    return rc;
}

/* A staged layer into its slot, which nobody uses. */
static int fill_slot(struct cuda_backend *b, uint32_t layer, struct larder_err *e)
{
    uint32_t i = slot_of(b, layer);
    struct cuda_slot *s = &b->slot[i];
    int rc = layer_memory(b, &s->l, e);

    s->holds = false;
    if (!rc) /* products of the layer that was there may still run */
        rc = cuda_check(b, b->d->wait(b->device, mark_free(i), CUDA_COPY), "waiting", e);
    if (!rc)
        rc = send_stage(b, &b->stage[layer % 2], &s->l, e);
    if (!rc)
        rc = cuda_check(b, b->d->mark(b->device, mark_ready(i), CUDA_COPY), "marking", e);
    s->holds = !rc;
    return rc;
}

/* Stored blocks of a layer in its stage, now. */
static int fetch(struct cuda_backend *b, uint32_t layer, struct larder_err *e)
{
    int rc = join_reader(b, e);

    if (!rc && !staged(b, layer)) {
        rc = cuda_check(b, b->d->sync(b->device, CUDA_COPY), "copying weights", e);
        if (!rc)
            rc = start_reader(b, layer, e);
        if (!rc)
            rc = join_reader(b, e);
    }
    return rc;
}

static bool may_fill(const struct cuda_backend *b, uint32_t layer)
{
    return layer < b->base.p->geom.n_layers && !is_there(b, layer) &&
           !b->slot[slot_of(b, layer)].in_use;
}

/* While `layer`, which is on its way or there, computes. */
static int look_ahead(struct cuda_backend *b, uint32_t layer, struct larder_err *e)
{
    bool send = may_fill(b, layer + 1) && staged(b, layer + 1);
    uint32_t next = layer + 1 + (send || is_there(b, layer + 1));
    int rc = 0;

    if (b->reader.stage) {
        if (!atomic_load(&b->reader.done))
            return 0; /* reading is slower than computing: the next load waits */
        rc = join_reader(b, e);
    }
    /* the stage that is read into next is the one that `layer` came from */
    if (!rc)
        rc = cuda_check(b, b->d->sync_mark(b->device, mark_ready(slot_of(b, layer))),
                        "copying weights", e);
    if (!rc && next < b->base.p->geom.n_layers && !is_there(b, next) && !staged(b, next))
        rc = start_reader(b, next, e);
    if (!rc && send)
        rc = fill_slot(b, layer + 1, e);
    return rc;
}

/* ---- layers */

/* A layer of its own: the slots are for others. */
static int load_own(struct cuda_backend *b, uint32_t layer, struct layer **ret,
                    struct larder_err *e)
{
    struct layer *l = mem_zalloc(1, sizeof *l);
    int rc = l ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for a layer");

    if (!rc)
        rc = layer_memory(b, l, e);
    if (!rc)
        rc = fetch(b, layer, e);
    if (!rc)
        rc = send_stage(b, &b->stage[layer % 2], l, e);
    if (!rc)
        rc = cuda_check(b, b->d->sync(b->device, CUDA_COPY), "copying weights", e);
    if (rc) {
        if (l)
            cuda_release(b, l->memory, b->size.layer);
        mem_free(l);
        return rc;
    }
    l->own = true;
    *ret = l;
    return 0;
}

int cuda_layer_load(struct backend *base, uint32_t layer, bool kept, struct layer **ret,
                    struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    uint32_t i = slot_of(b, layer);
    struct cuda_slot *s = &b->slot[i];
    int rc = 0;

    if (!b->resident && (kept || s->in_use))
        return load_own(b, layer, ret, e);
    if (!is_there(b, layer)) {
        rc = fetch(b, layer, e);
        if (!rc)
            rc = fill_slot(b, layer, e);
    }
    if (!rc)
        rc = cuda_check(b, b->d->wait(b->device, mark_ready(i), CUDA_COMPUTE), "waiting", e);
    if (rc)
        return rc;
    s->in_use = true;
    rc = look_ahead(b, layer, e);
    if (rc) {
        s->in_use = false;
        return rc;
    }
    *ret = &s->l;
    return 0;
}

void cuda_layer_free(struct backend *base, struct layer *l)
{
    struct cuda_backend *b = cuda_of(base);
    uint32_t i;

    if (!l)
        return;
    if (l->own) {
        cuda_release(b, l->memory, b->size.layer);
        mem_free(l);
        return;
    }
    i = slot_of(b, l->index);
    b->slot[i].in_use = false;
    /* A device that fails here fails at the next call too, which can say so. */
    b->d->mark(b->device, mark_free(i), CUDA_COMPUTE);
}

int cuda_weights_open(struct cuda_backend *b, struct larder_err *e)
{
    uint32_t n_layers = b->base.p->geom.n_layers;
    int rc = cuda_weights_size(b->base.model, b->base.elem, &b->size, e);

    if (rc)
        return rc;
    rc = pool_open(&b->reader.pool, b->base.n_threads < READERS ? b->base.n_threads : READERS, e);
    if (rc)
        return rc;
    pthread_mutex_init(&b->reader.lock, NULL);
    b->resident = !b->stream && cuda_plan_resident(&b->size, n_layers, b->info.free);
    b->n_slots = b->resident || n_layers < 2 ? n_layers : 2;
    b->slot = mem_zalloc(b->n_slots, sizeof *b->slot);
    return b->slot ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for %u layers", n_layers);
}

void cuda_weights_close(struct cuda_backend *b)
{
    join_reader(b, NULL);
    for (uint32_t i = 0; b->slot && i < b->n_slots; i++)
        cuda_release(b, b->slot[i].l.memory, b->size.layer);
    for (int i = 0; i < 2; i++)
        if (b->stage[i].memory)
            b->d->unpin(b->device, b->stage[i].memory);
    pool_close(b->reader.pool);
    mem_free(b->slot);
}

/* ---- the output matrix, and weights that are read a part at a time */

int cuda_read_norm(struct cuda_backend *b, uint32_t layer, enum model_weight which, void *to,
                   struct larder_err *e)
{
    uint32_t n = b->base.p->n_hidden;
    float *x = mem_alloc(n, sizeof *x);
    int rc = x ? model_read_f32(b->base.model, layer, which, 0, 1, x, e)
               : larder_fail(e, LARDER_ENOMEM, "no memory for a norm");

    if (!rc)
        rc = cuda_up(b, to, x, (uint64_t)n * sizeof *x, e);
    if (!rc)
        rc = cuda_check(b, b->d->sync(b->device, CUDA_COMPUTE), "copying weights", e);
    mem_free(x);
    return rc;
}

int cuda_read_rows(struct cuda_backend *b, uint32_t layer, enum model_weight which, uint32_t row0,
                   uint32_t n, void *to, struct larder_err *e)
{
    struct cuda_part p = {.which = which, .rows = n};
    uint8_t *raw = NULL;
    void *device = NULL;
    uint32_t rows;
    int rc;

    model_weight_shape(b->base.model, which, &rows, &p.cols);
    p.format = model_weight_format(b->base.model, layer, which);
    p.row_bytes = (uint64_t)p.cols / p.format->block_len * p.format->block_bytes;
    rc = cuda_room(b, ROOM_HEAD_RAW, n * p.row_bytes, &device, e);
    if (!rc && !(raw = mem_alloc(n, p.row_bytes)))
        rc = larder_fail(e, LARDER_ENOMEM, "no memory to read weights");
    if (!rc)
        rc = model_read_stored(b->base.model, layer, which, row0, n, raw, e);
    if (!rc)
        rc = cuda_up(b, device, raw, n * p.row_bytes, e);
    if (!rc)
        rc = dequantise(b, &p, device, to, CUDA_COMPUTE, e);
    if (!rc)
        rc = cuda_check(b, b->d->sync(b->device, CUDA_COMPUTE), "copying weights", e);
    mem_free(raw);
    return rc;
}

int cuda_head_load(struct backend *base, struct head **ret, struct larder_err *e)
{
    struct cuda_backend *b = cuda_of(base);
    uint32_t n_vocab = b->base.p->n_vocab;
    uint64_t row = b->base.p->n_hidden * b->elem;
    struct head *h = mem_zalloc(1, sizeof *h);
    void *norm = NULL, *out = NULL;
    int rc = h ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for the output matrix");

    if (!rc)
        rc = cuda_alloc(b, b->base.p->n_hidden * sizeof(float), "a norm", &norm, e);
    if (!rc)
        rc = cuda_alloc(b, b->size.head, "the output matrix", &out, e);
    if (h)
        *h = (struct head){norm, out};
    if (!rc)
        rc = cuda_read_norm(b, 0, MODEL_OUT_NORM, norm, e);
    for (uint32_t i = 0; i < n_vocab && !rc; i += CUDA_HEAD_ROWS)
        rc = cuda_read_rows(b, 0, MODEL_HEAD, i,
                            n_vocab - i < CUDA_HEAD_ROWS ? n_vocab - i : CUDA_HEAD_ROWS,
                            (uint8_t *)out + i * row, e);
    if (rc) {
        cuda_head_free(base, h);
        return rc;
    }
    *ret = h;
    return 0;
}

void cuda_head_free(struct backend *base, struct head *h)
{
    struct cuda_backend *b = cuda_of(base);

    if (!h)
        return;
    cuda_release(b, h->norm, b->base.p->n_hidden * sizeof(float));
    cuda_release(b, h->out, b->size.head);
    mem_free(h);
}
