/* bench_prefill_gemm.c - the limit of a prefill: its operations at the rate of oneDNN's products.
 *
 *     bench_prefill_gemm MODEL.gguf TOKENS...
 *
 * Times oneDNN on the seven matrices of a layer, with weights in the layout it likes best and all
 * threads, in the element type that backend cpu computes in here, and prints CSV: for each length
 * the time that all layers' products and their causal attention would take at that rate.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include <oneapi/dnnl/dnnl.h>

#include "backend.h"
#include "benchlib.h"
#include "mem.h"

#define N_RUNS 21
#define N_ROWS 2048
#define N_MATRICES 7

static const enum model_weight matrices[N_MATRICES] = {
    MODEL_Q, MODEL_K, MODEL_V, MODEL_O, MODEL_GATE, MODEL_UP, MODEL_DOWN,
};

struct product {
    dnnl_primitive_t primitive;
    dnnl_exec_arg_t arg[3];
};

static void die(const char *what)
{
    fprintf(stderr, "bench_prefill_gemm: %s\n", what);
    exit(1);
}

static void must(dnnl_status_t rc)
{
    if (rc)
        die("oneDNN refused a product");
}

static dnnl_memory_desc_t plain(uint32_t rows, uint32_t cols, dnnl_data_type_t t)
{
    dnnl_memory_desc_t ret;
    dnnl_dims_t dims = {rows, cols};

    must(dnnl_memory_desc_init_by_tag(&ret, 2, dims, t, dnnl_ab));
    return ret;
}

/* Contents do not matter for the time, but not-a-numbers and denormals might. */
static dnnl_memory_t filled(const dnnl_memory_desc_t *d, dnnl_engine_t engine, bool f32)
{
    dnnl_memory_t ret;
    size_t n = dnnl_memory_desc_get_size(d);
    void *at;

    must(dnnl_memory_create(&ret, d, engine, DNNL_MEMORY_ALLOCATE));
    must(dnnl_memory_get_data_handle(ret, &at));
    for (size_t i = 0; f32 && i < n / sizeof(float); i++)
        ((float *)at)[i] = 0.5f;
    for (size_t i = 0; !f32 && i < n / sizeof(uint16_t); i++)
        ((uint16_t *)at)[i] = 0x3f00; /* 0.5 */
    return ret;
}

static void make(struct product *p, dnnl_engine_t engine, uint32_t n_out, uint32_t n_in, bool f32)
{
    dnnl_data_type_t type = f32 ? dnnl_f32 : dnnl_bf16;
    dnnl_memory_desc_t src = plain(N_ROWS, n_in, type), dst = plain(N_ROWS, n_out, dnnl_f32), any;
    dnnl_dims_t dims = {n_in, n_out};
    dnnl_matmul_desc_t desc;
    dnnl_primitive_desc_t pd;

    must(dnnl_memory_desc_init_by_tag(&any, 2, dims, type, dnnl_format_tag_any));
    must(dnnl_matmul_desc_init(&desc, &src, &any, NULL, &dst));
    must(dnnl_primitive_desc_create(&pd, &desc, NULL, engine, NULL));
    must(dnnl_primitive_create(&p->primitive, pd));
    p->arg[0] = (dnnl_exec_arg_t){DNNL_ARG_SRC, filled(&src, engine, f32)};
    p->arg[1] = (dnnl_exec_arg_t){
        DNNL_ARG_WEIGHTS,
        filled(dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0), engine, f32)};
    p->arg[2] = (dnnl_exec_arg_t){DNNL_ARG_DST, filled(&dst, engine, true)};
    must(dnnl_primitive_desc_destroy(pd));
}

/* Operations a second: in the best and in the median run. */
static void measure(const struct model *m, bool f32, double *best, double *usual)
{
    struct product p[N_MATRICES];
    double us[N_RUNS + 1], operations = 0;
    dnnl_engine_t engine;
    dnnl_stream_t stream;

    must(dnnl_engine_create(&engine, dnnl_cpu, 0));
    must(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags));
    for (int i = 0; i < N_MATRICES; i++) {
        uint32_t n_out, n_in;

        model_weight_shape(m, matrices[i], &n_out, &n_in);
        make(&p[i], engine, n_out, n_in, f32);
        operations += 2.0 * N_ROWS * n_out * n_in;
    }
    for (int r = 0; r <= N_RUNS; r++) { /* the first one warms up */
        us[r] = now_us();
        for (int i = 0; i < N_MATRICES; i++)
            must(dnnl_primitive_execute(p[i].primitive, stream, 3, p[i].arg));
        must(dnnl_stream_wait(stream));
        us[r] = now_us() - us[r];
    }
    qsort(us + 1, N_RUNS, sizeof *us, by_value);
    *best = operations / us[1] * 1e6;
    *usual = operations / us[1 + N_RUNS / 2] * 1e6;
}

/* Two products, scores and outputs, of half a square a head. */
static double operations(const struct model *m, double n)
{
    const struct kv_geom *g = &model_params(m)->geom;
    double sum = 2.0 * n * n * g->n_heads * g->head_dim;

    for (int i = 0; i < N_MATRICES; i++) {
        uint32_t n_out, n_in;

        model_weight_shape(m, matrices[i], &n_out, &n_in);
        sum += 2.0 * n * n_out * n_in;
    }
    return sum * g->n_layers;
}

int main(int argc, char **argv)
{
    struct larder_err e = {0, ""};
    struct backend *b = NULL;
    struct model *m = NULL;
    double best, usual;
    bool f32;

    if (argc < 3) {
        fprintf(stderr, "usage: bench_prefill_gemm MODEL.gguf TOKENS...\n");
        return 77;
    }
    if (model_open(&m, argv[1], &e))
        die(e.msg);
    f32 = backend_cpu.open(&b, m, &(struct backend_opts){.dtype = KV_BF16}, &e) != 0;
    if (b)
        backend_cpu.close(b);
    measure(m, f32, &best, &usual);
    printf("limit,tokens,runs,min_us,median_us,gflop_per_s\n");
    for (int i = 2; i < argc; i++) {
        double n = operations(m, atof(argv[i]));

        printf("oneDNN %s,%s,%d,%.0f,%.0f,%.1f\n", f32 ? "f32" : "bf16", argv[i], N_RUNS,
               n / best * 1e6, n / usual * 1e6, usual / 1e9);
    }
    model_close(m);
    return 0;
}
