/* bench_prefill_resume.c - new rows on stored ones in backend cpu, by the type of the stored rows:
 * the attention of all layers of one step. Prints CSV.
 *
 *     bench_prefill_resume MODEL.gguf [ROWS [NEW_ROWS [THREADS]]]
 *
 * The model gives the shape alone; rows are random. Every layer has rows of its own, so that
 * they come from memory as they do in a decoder. Types take turns within a run, so that a slow
 * moment of the machine hits all of them.
 */
#include <stdio.h>
#include <stdlib.h>

#include "backend.h"
#include "benchlib.h"
#include "half.h"
#include "mem.h"
#include "packed.h"

#define N_RUNS 21

static const enum kv_dtype types[] = {KV_F32, KV_BF16, KV_INT8, KV_INT4};
#define N_TYPES (sizeof types / sizeof types[0])

static void *need(void *p)
{
    if (!p) {
        fprintf(stderr, "bench_prefill_resume: no memory\n");
        exit(1);
    }
    return p;
}

static float *random_rows(uint64_t n)
{
    static uint64_t s = 1;
    float *x = need(mem_aligned(n, sizeof *x));

    for (uint64_t i = 0; i < n; i++) {
        s = s * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)(int32_t)(s >> 32) / 2147483648.0f;
    }
    return x;
}

/* One head's rows as a type. */
static struct past_rows make_past(enum kv_dtype t, const float *x, uint32_t n, uint32_t d)
{
    uint8_t *k = need(mem_aligned(tile_bytes_k(t, n, d), 1));
    uint8_t *v = need(mem_aligned(tile_bytes_v(t, n, d), 1));

    for (uint64_t i = 0; t == KV_F32 && i < (uint64_t)n * d; i++)
        ((float *)(void *)k)[i] = ((float *)(void *)v)[i] = x[i];
    for (uint64_t i = 0; t == KV_BF16 && i < (uint64_t)n * d; i++)
        ((uint16_t *)(void *)k)[i] = ((uint16_t *)(void *)v)[i] = f32_to_bf16(x[i]);
    if (packed_type(t)) {
        packed_from_k(t, x, n, d, k);
        packed_from_v(t, x, n, d, v);
    }
    return (struct past_rows){n, t, k, v, NULL, NULL};
}

/* The attention of every layer. */
static double step_us(struct backend *b, struct resume *r, const struct past_rows *past)
{
    const struct kv_geom *g = &b->p->geom;
    double t0 = now_us();

    for (uint32_t l = 0; l < g->n_layers; l++) {
        r->past = past + l * g->n_kv_heads;
        if (b->ops->resume(b, r, NULL))
            exit(1);
    }
    return now_us() - t0;
}

static void bench(struct backend *b, uint32_t rows, uint32_t n_new)
{
    const struct kv_geom *g = &b->p->geom;
    uint32_t n = g->n_layers * g->n_kv_heads;
    float *x = random_rows((uint64_t)rows * g->head_dim);
    float *q = random_rows((uint64_t)g->n_heads * n_new * g->head_dim);
    struct past_rows *past[N_TYPES];
    double us[N_TYPES][N_RUNS];
    struct resume r = {.q = q,
                       .k = q,
                       .v = q,
                       .n_new = n_new,
                       .n_tail = n_new,
                       .q_stride = n_new,
                       .stride = n_new};

    r.o = need(mem_aligned((uint64_t)g->n_heads * n_new * g->head_dim, sizeof(float)));
    for (size_t t = 0; t < N_TYPES; t++) {
        past[t] = need(mem_alloc(n, sizeof **past));
        for (uint32_t i = 0; i < n; i++)
            past[t][i] = make_past(types[t], x, rows, g->head_dim);
    }
    for (int i = -2; i < N_RUNS; i++)
        for (size_t t = 0; t < N_TYPES; t++)
            us[t][i < 0 ? 0 : i] = step_us(b, &r, past[t]);
    for (size_t t = 0; t < N_TYPES; t++) {
        uint64_t bytes =
            tile_bytes_k(types[t], rows, g->head_dim) + tile_bytes_v(types[t], rows, g->head_dim);

        qsort(us[t], N_RUNS, sizeof *us[t], by_value);
        printf("%s,%u,%u,%u,%.1f,%.0f,%.0f\n", kv_dtype_name(types[t]), rows, n_new, b->n_threads,
               (double)bytes * n / (1 << 20), us[t][0], us[t][N_RUNS / 2]);
    }
}

int main(int argc, char **argv)
{
    struct backend_opts o = {.dtype = KV_F32};
    struct larder_err e = {0, ""};
    struct model *m = NULL;
    struct backend *b = NULL;

    if (argc < 2) {
        fprintf(stderr, "usage: bench_prefill_resume MODEL [ROWS [NEW_ROWS [THREADS]]]\n");
        return 2;
    }
    o.n_threads = argc > 4 ? (uint32_t)atoi(argv[4]) : 0;
    if (model_open(&m, argv[1], &e) || backend_find("cpu")->open(&b, m, &o, &e)) {
        fprintf(stderr, "bench_prefill_resume: %s\n", e.msg);
        return 1;
    }
    printf("rows,n_rows,new_rows,threads,mib,min_us,median_us\n");
    bench(b, argc > 2 ? (uint32_t)atoi(argv[2]) : 2048, argc > 3 ? (uint32_t)atoi(argv[3]) : 1);
    b->ops->close(b);
    model_close(m);
    return 0;
}
