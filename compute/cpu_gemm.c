/* cpu_gemm.c - matrix products: bf16 through oneDNN, f32 through mul.h.
 *
 * The one idea: weights are laid out once per layer in the form the product wants. bf16 products
 * are oneDNN primitives of a fixed number of rows, made once and then executed by many
 * threads, each with scratch memory of its own; oneDNN picks AMX or AVX-512-BF16 itself. Its
 * f32 product packs the weights again in every call, which at blocks of 128 rows costs a third
 * of the time; ours reads panels that are packed already. */
#include <string.h>

#include "cpu.h"
#include "mem.h"
#include "mul.h"

static int refuse(struct larder_err *e, const char *what, dnnl_status_t rc)
{
    if (rc == dnnl_out_of_memory)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a matrix product");
    return larder_fail(e, LARDER_EBACKEND, "oneDNN refused %s (status %d)", what, (int)rc);
}

int cpu_gemm_open(struct cpu_backend *b, struct larder_err *e)
{
    dnnl_status_t rc = dnnl_engine_create(&b->engine, dnnl_cpu, 0);

    if (!rc)
        rc = dnnl_stream_create(&b->stream, b->engine, dnnl_stream_default_flags);
    return rc ? refuse(e, "to start", rc) : 0;
}

void cpu_gemm_close(struct cpu_backend *b)
{
    for (uint32_t i = 0; i < b->n_shapes; i++)
        dnnl_primitive_destroy(b->shape[i].primitive);
    if (b->stream)
        dnnl_stream_destroy(b->stream);
    if (b->engine)
        dnnl_engine_destroy(b->engine);
}

/* ---- primitives */

static dnnl_status_t describe(struct cpu_shape *s)
{
    dnnl_dims_t src = {s->m, s->n_in}, dst = {s->m, s->n_out};
    dnnl_status_t rc = dnnl_memory_desc_init_by_tag(&s->src, 2, src, dnnl_bf16, dnnl_ab);

    return rc ? rc : dnnl_memory_desc_init_by_tag(&s->dst, 2, dst, dnnl_f32, dnnl_ab);
}

static dnnl_status_t attributes(const struct cpu_shape *s, dnnl_primitive_attr_t *ret)
{
    dnnl_post_ops_t ops = NULL;
    dnnl_status_t rc = dnnl_primitive_attr_create(ret);

    if (!rc)
        rc = dnnl_primitive_attr_set_scratchpad_mode(*ret, dnnl_scratchpad_mode_user);
    if (!rc && s->add) {
        rc = dnnl_post_ops_create(&ops);
        if (!rc)
            rc = dnnl_post_ops_append_sum(ops, 1.0f);
        if (!rc)
            rc = dnnl_primitive_attr_set_post_ops(*ret, ops);
        dnnl_post_ops_destroy(ops);
    }
    return rc;
}

/* weights: in what layout; any lets oneDNN choose. */
static dnnl_status_t make(struct cpu_backend *b, struct cpu_shape *s,
                          const dnnl_memory_desc_t *weights)
{
    dnnl_primitive_attr_t attr = NULL;
    dnnl_primitive_desc_t pd = NULL;
    dnnl_matmul_desc_t desc;
    dnnl_status_t rc = describe(s);

    if (!rc)
        rc = attributes(s, &attr);
    if (!rc)
        rc = dnnl_matmul_desc_init(&desc, &s->src, weights, NULL, &s->dst);
    if (!rc)
        rc = dnnl_primitive_desc_create(&pd, &desc, attr, b->engine, NULL);
    if (!rc) {
        s->weights = *dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
        s->scratch = *dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
        rc = dnnl_primitive_create(&s->primitive, pd);
    }
    dnnl_primitive_desc_destroy(pd);
    dnnl_primitive_attr_destroy(attr);
    return rc;
}

int cpu_shape_get(struct cpu_backend *b, const struct cpu_matrix *w, uint32_t m, bool add,
                  const struct cpu_shape **ret, struct larder_err *e)
{
    const dnnl_memory_desc_t *weights;
    struct cpu_shape *s;
    dnnl_status_t rc;

    for (uint32_t i = 0; i < b->n_shapes; i++) {
        s = &b->shape[i];
        if (s->m == m && s->n_in == w->n_in && s->n_out == w->n_out && s->add == add) {
            *ret = s;
            return 0;
        }
    }
    if (b->n_shapes == CPU_MAX_SHAPES) /* many question lengths: start over */
        while (b->n_shapes)
            dnnl_primitive_destroy(b->shape[--b->n_shapes].primitive);
    s = &b->shape[b->n_shapes];
    *s = (struct cpu_shape){.m = m, .n_in = w->n_in, .n_out = w->n_out, .add = add};
    rc = w->panel ? dnnl_success : dnnl_memory_get_memory_desc(w->packed, &weights);
    if (!rc && !w->panel)
        rc = make(b, s, weights);
    if (rc)
        return refuse(e, "a matrix product", rc);
    b->n_shapes++;
    *ret = s;
    return 0;
}

size_t cpu_shape_scratch(const struct cpu_shape *s)
{
    return s->primitive ? dnnl_memory_desc_get_size(&s->scratch) : 0;
}

static void multiply_f32(const struct cpu_backend *b, const struct cpu_shape *s,
                         const struct cpu_matrix *w, const float *src, float *dst)
{
    b->mul(&(struct mul){.a = src,
                         .a_row = s->n_in,
                         .a_k = 1,
                         .a_panel = MUL_WIDE * (uint64_t)s->n_in,
                         .b = w->panel,
                         .b_k = MUL_WIDE,
                         .b_panel = MUL_WIDE * (uint64_t)s->n_in,
                         .c = dst,
                         .c_row = s->n_out,
                         .c_panel = MUL_WIDE,
                         .m = s->m,
                         .n = s->n_out,
                         .k = s->n_in,
                         .add = s->add});
}

int cpu_multiply(struct cpu_backend *b, const struct cpu_shape *s, const struct cpu_matrix *w,
                 const void *src, void *dst, void *scratch)
{
    dnnl_exec_arg_t arg[4] = {{DNNL_ARG_SRC, NULL},
                              {DNNL_ARG_WEIGHTS, w->packed},
                              {DNNL_ARG_DST, NULL},
                              {DNNL_ARG_SCRATCHPAD, NULL}};
    dnnl_status_t rc;

    if (w->panel) {
        multiply_f32(b, s, w, src, dst);
        return 0;
    }
    rc = dnnl_memory_create(&arg[0].memory, &s->src, b->engine, (void *)(uintptr_t)src);
    if (!rc)
        rc = dnnl_memory_create(&arg[2].memory, &s->dst, b->engine, dst);
    if (!rc)
        rc = dnnl_memory_create(&arg[3].memory, &s->scratch, b->engine, scratch);
    if (!rc)
        rc = dnnl_primitive_execute(s->primitive, b->stream, 4, arg);
    dnnl_memory_destroy(arg[0].memory);
    dnnl_memory_destroy(arg[2].memory);
    dnnl_memory_destroy(arg[3].memory);
    return rc ? -1 : 0;
}

/* ---- weights */

/* The layout that the product of CPU_ROWS rows likes best; other row counts take it as it is. */
static dnnl_status_t best_layout(struct cpu_backend *b, const struct cpu_matrix *w,
                                 dnnl_memory_desc_t *ret)
{
    struct cpu_shape s = {.m = CPU_ROWS, .n_in = w->n_in, .n_out = w->n_out};
    dnnl_dims_t dims = {w->n_in, w->n_out};
    dnnl_memory_desc_t any;
    dnnl_status_t rc = dnnl_memory_desc_init_by_tag(&any, 2, dims, dnnl_bf16, dnnl_format_tag_any);

    if (!rc)
        rc = make(b, &s, &any);
    if (rc)
        return rc;
    *ret = s.weights;
    return dnnl_primitive_destroy(s.primitive);
}

static int pack_panels(struct cpu_matrix *w, const float *plain, struct larder_err *e)
{
    w->panel = mem_aligned((uint64_t)mul_padded(w->n_out) * w->n_in, sizeof *w->panel);
    if (!w->panel)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a weight matrix");
    for (uint32_t j = 0; j < w->n_out; j += MUL_WIDE) {
        const float *rows = plain + (uint64_t)j * w->n_in;
        float *to = w->panel + (uint64_t)j * w->n_in;
        uint32_t n = w->n_out - j < MUL_WIDE ? w->n_out - j : MUL_WIDE;

        for (uint32_t k = 0; k < w->n_in; k++, to += MUL_WIDE)
            for (uint32_t c = 0; c < n; c++)
                to[c] = rows[(uint64_t)c * w->n_in + k];
    }
    return 0;
}

static int pack_bf16(struct cpu_backend *b, struct cpu_matrix *w, const void *plain,
                     struct larder_err *e)
{
    dnnl_dims_t dims = {w->n_in, w->n_out};
    dnnl_memory_desc_t from, to;
    dnnl_memory_t src = NULL;
    dnnl_primitive_desc_t pd = NULL;
    dnnl_primitive_t reorder = NULL;
    dnnl_status_t rc = dnnl_memory_desc_init_by_tag(&from, 2, dims, dnnl_bf16, dnnl_ba);

    if (!rc)
        rc = best_layout(b, w, &to);
    if (!rc)
        rc = dnnl_memory_create(&src, &from, b->engine, (void *)(uintptr_t)plain);
    if (!rc)
        rc = dnnl_memory_create(&w->packed, &to, b->engine, DNNL_MEMORY_ALLOCATE);
    if (!rc)
        rc = dnnl_reorder_primitive_desc_create(&pd, &from, b->engine, &to, b->engine, NULL);
    if (!rc)
        rc = dnnl_primitive_create(&reorder, pd);
    if (!rc) {
        dnnl_exec_arg_t arg[2] = {{DNNL_ARG_FROM, src}, {DNNL_ARG_TO, w->packed}};

        rc = dnnl_primitive_execute(reorder, b->stream, 2, arg);
    }
    dnnl_primitive_destroy(reorder);
    dnnl_primitive_desc_destroy(pd);
    dnnl_memory_destroy(src);
    return rc ? refuse(e, "a weight matrix", rc) : 0;
}

int cpu_matrix_pack(struct cpu_backend *b, struct cpu_matrix *w, const void *plain,
                    struct larder_err *e)
{
    return b->ref.base.elem == KV_F32 ? pack_panels(w, plain, e) : pack_bf16(b, w, plain, e);
}

void cpu_matrix_done(struct cpu_matrix *w)
{
    mem_free(w->panel);
    w->panel = NULL;
    if (w->packed)
        dnnl_memory_destroy(w->packed);
    w->packed = NULL;
}
