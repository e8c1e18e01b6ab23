/* cpu_output.c - logits: the output matrix kept by a decoder, or read in slices once.
 *
 * A kept matrix stays in the file's blocks where the backend computes in f32, and becomes bf16
 * where it computes in that. Few rows of logits take a dot product per row of the matrix;
 * more share an expanded panel. */
#include "cpu.h"
#include "half.h"
#include "mem.h"

#define LOAD_ROWS 64u    /* rows of the matrix that an item takes */
#define HEAD_SLICE 4096u /* rows per slice */
#define MANY_LOGITS 4u   /* rows of logits from which packing the matrix pays */

/* `struct head` of this backend; ref has its own. */
struct cpu_head {
    float *norm;
    void *rows;             /* bf16: [n_vocab][n_hidden] */
    struct cpu_blocks kept; /* f32 */
};

void cpu_head_free(struct backend *b, struct head *head)
{
    struct cpu_head *h = (struct cpu_head *)(void *)head;

    (void)b;
    if (!h)
        return;
    mem_free(h->norm);
    mem_free(h->rows);
    cpu_blocks_done(&h->kept);
    mem_free(h);
}

static int read_rows(struct backend *b, uint32_t row, uint32_t n, void *to, struct larder_err *e)
{
    return cpu_read(cpu_of(b), 0, &(struct cpu_part){MODEL_HEAD, row, n, to, 0}, 1, e);
}

int cpu_head_load(struct backend *b, struct head **ret, struct larder_err *e)
{
    struct cpu_head *h = mem_zalloc(1, sizeof *h);
    int rc;

    if (h && b->elem == KV_BF16)
        h->rows = mem_aligned((uint64_t)b->p->n_vocab * b->p->n_hidden, kv_dtype_bytes(b->elem));
    if (!h || (b->elem == KV_BF16 && !h->rows)) {
        mem_free(h);
        return larder_fail(e, LARDER_ENOMEM, "no memory for the output matrix");
    }
    rc = cpu_read_norm(b, 0, MODEL_OUT_NORM, &h->norm, e);
    if (!rc)
        rc = h->rows ? read_rows(b, 0, b->p->n_vocab, h->rows, e)
                     : cpu_blocks_load(cpu_of(b), 0, MODEL_HEAD, &h->kept, e);
    if (rc) {
        cpu_head_free(b, (struct head *)(void *)h);
        return rc;
    }
    *ret = (struct head *)(void *)h;
    return 0;
}

struct output {
    struct backend *b;
    const void *rows; /* n_rows of the matrix from `first` on */
    uint32_t first, n_rows, n;
    const float *x; /* [n][n_hidden], normalised */
    float *out;
    float *panel; /* [n_threads][LOAD_ROWS * n_hidden]; NULL: few rows, one dot product each */
};

/* Many rows: LOAD_ROWS of the matrix into panels, once for all of them. */
static void multiply_rows(const struct output *o, uint32_t row, uint32_t n, float *panel)
{
    uint32_t n_hidden = o->b->p->n_hidden;

    for (uint32_t r = 0; r < n; r++) {
        uint64_t at = (uint64_t)(row + r) * n_hidden;
        float *to = panel + (uint64_t)(r / MUL_WIDE) * n_hidden * MUL_WIDE + r % MUL_WIDE;

        for (uint32_t k = 0; k < n_hidden; k++)
            to[(uint64_t)k * MUL_WIDE] = o->b->elem == KV_F32
                                             ? ((const float *)o->rows)[at + k]
                                             : bf16_to_f32(((const uint16_t *)o->rows)[at + k]);
    }
    cpu_of(o->b)->mul(&(struct mul){.a = o->x,
                                    .a_row = n_hidden,
                                    .a_k = 1,
                                    .a_panel = MUL_WIDE * n_hidden,
                                    .b = panel,
                                    .b_k = MUL_WIDE,
                                    .b_panel = MUL_WIDE * (uint64_t)n_hidden,
                                    .c = o->out + o->first + row,
                                    .c_row = o->b->p->n_vocab,
                                    .c_panel = MUL_WIDE,
                                    .m = o->n,
                                    .n = n,
                                    .k = n_hidden});
}

static void output_item(void *arg, uint32_t item, uint32_t worker)
{
    const struct output *o = arg;
    uint32_t n_hidden = o->b->p->n_hidden;
    uint32_t end = (item + 1) * LOAD_ROWS < o->n_rows ? (item + 1) * LOAD_ROWS : o->n_rows;

    if (o->panel) {
        multiply_rows(o, item * LOAD_ROWS, end - item * LOAD_ROWS,
                      o->panel + (uint64_t)worker * LOAD_ROWS * n_hidden);
        return;
    }
    for (uint32_t r = item * LOAD_ROWS; r < end; r++)
        for (uint64_t i = 0; i < o->n; i++)
            o->out[i * o->b->p->n_vocab + o->first + r] =
                cpu_dot(o->rows, o->b->elem, (uint64_t)r * n_hidden, o->x + i * n_hidden, n_hidden);
}

/* `rows`: those of the whole matrix; NULL: they are read slice by slice. */
static int multiply_all(struct backend *b, const void *rows, const float *x, uint32_t n, float *out,
                        struct larder_err *e)
{
    const struct model_params *p = b->p;
    uint32_t step = rows ? p->n_vocab : HEAD_SLICE;
    void *slice =
        rows ? NULL : mem_aligned((uint64_t)HEAD_SLICE * p->n_hidden, kv_dtype_bytes(b->elem));
    bool many = n >= MANY_LOGITS;
    float *panel =
        many ? mem_aligned((uint64_t)b->n_threads * LOAD_ROWS * p->n_hidden, sizeof *panel) : NULL;
    int rc = (rows || slice) && (!many || panel)
                 ? 0
                 : larder_fail(e, LARDER_ENOMEM, "no memory for logits");

    for (uint32_t r = 0; !rc && r < p->n_vocab; r += step) {
        uint32_t n_rows = p->n_vocab - r < step ? p->n_vocab - r : step;
        struct output o = {b, rows ? rows : slice, r, n_rows, n, x, out, panel};

        if (!rows)
            rc = read_rows(b, r, n_rows, slice, e);
        if (!rc)
            pool_for(cpu_of(b)->pool, (n_rows + LOAD_ROWS - 1) / LOAD_ROWS, output_item, &o);
    }
    mem_free(slice);
    mem_free(panel);
    return rc;
}

int cpu_logits(struct backend *b, const struct head *head, const float *hidden, uint32_t n,
               float *out, struct larder_err *e)
{
    const struct cpu_head *h = (const struct cpu_head *)(const void *)head;
    float *x = mem_aligned((uint64_t)n * b->p->n_hidden, sizeof *x), *norm = NULL;
    int rc = x ? 0 : larder_fail(e, LARDER_ENOMEM, "no memory for logits");

    if (!rc && !h)
        rc = cpu_read_norm(b, 0, MODEL_OUT_NORM, &norm, e);
    if (!rc)
        cpu_normalise(b, hidden, h ? h->norm : norm, n, x);
    if (!rc && h && h->kept.rows)
        rc = cpu_blocks_multiply(cpu_of(b), &(struct cpu_product){&h->kept, out, b->p->n_vocab, 0},
                                 1, x, n, e);
    else if (!rc)
        rc = multiply_all(b, h ? h->rows : NULL, x, n, out, e);
    mem_free(x);
    mem_free(norm);
    return rc;
}
