/* bench_device.c - what the card itself gives: cuBLAS' rate in bf16, and copies.
 *
 * Prints CSV: what, parameter, value, unit. Medians of 20 after 3 that do not count, of random
 * numbers: zeros run faster. Exit status 77: there is no GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cuda_device.h"

enum { RUNS = 20, WARM = 3 };

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

static void must(int rc, const char *what)
{
    if (!rc)
        return;
    fprintf(stderr, "bench_device: %s: %s\n", what, cuda_device.text(rc));
    exit(1);
}

/* Random bf16 between 1/2 and 2, either sign. */
static void *random_matrix(void *d, uint64_t n)
{
    uint16_t *x = malloc(n * sizeof *x);
    uint64_t s = 0x9e3779b97f4a7c15u;
    void *p;

    for (uint64_t i = 0; i < n; i++) {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        x[i] = (uint16_t)(0x3f00 | (s & 0x80ff));
    }
    must(cuda_device.alloc(d, n * 2, &p), "memory");
    must(cuda_device.copy(d, p, x, n * 2, CUDA_TO_DEVICE, CUDA_COMPUTE), "copy");
    must(cuda_device.sync(d, CUDA_COMPUTE), "copy");
    free(x);
    return p;
}

static void bench_gemm(void *d, uint32_t n, uint32_t n_in, uint32_t n_out)
{
    struct cuda_gemm g = {.ldx = n_in, .ldy = n_out, .n = n, .n_in = n_in, .n_out = n_out,
                          .bf16 = true};
    double took[RUNS];
    void *y;

    g.x = random_matrix(d, (uint64_t)n * n_in);
    g.w = random_matrix(d, (uint64_t)n_out * n_in);
    must(cuda_device.alloc(d, (uint64_t)n * n_out * 4, &y), "memory");
    g.y = y;
    for (int i = -WARM; i < RUNS; i++) {
        double start = now();

        for (int k = 0; k < 4; k++)
            must(cuda_device.gemm(d, &g), "product");
        must(cuda_device.sync(d, CUDA_COMPUTE), "product");
        if (i >= 0)
            took[i] = (now() - start) / 4;
    }
    qsort(took, RUNS, sizeof *took, ascending);
    printf("gemm,%ux%ux%u,%.1f,TFLOP/s\n", n, n_in, n_out,
           2e-12 * n * n_in * n_out / took[RUNS / 2]);
    cuda_device.release(d, (void *)(uintptr_t)g.x);
    cuda_device.release(d, (void *)(uintptr_t)g.w);
    cuda_device.release(d, y);
}

static void bench_copy(void *d, bool pinned, enum cuda_way way)
{
    const uint64_t bytes = 256 << 20;
    double took[RUNS];
    void *host = NULL, *p;

    must(pinned ? cuda_device.pin(d, bytes, &host) : !(host = malloc(bytes)), "host memory");
    memset(host, 0x5a, bytes);
    must(cuda_device.alloc(d, bytes, &p), "memory");
    for (int i = -WARM; i < RUNS; i++) {
        double start = now();

        if (way == CUDA_TO_DEVICE)
            must(cuda_device.copy(d, p, host, bytes, way, CUDA_COPY), "copy");
        else
            must(cuda_device.copy(d, host, p, bytes, way, CUDA_COPY), "copy");
        must(cuda_device.sync(d, CUDA_COPY), "copy");
        if (i >= 0)
            took[i] = now() - start;
    }
    qsort(took, RUNS, sizeof *took, ascending);
    printf("copy to %s,%s,%.1f,GB/s\n", way == CUDA_TO_DEVICE ? "device" : "host",
           pinned ? "pinned" : "pageable", 1e-9 * (double)bytes / took[RUNS / 2]);
    cuda_device.release(d, p);
    if (pinned)
        cuda_device.unpin(d, host);
    else
        free(host);
}

int main(void)
{
    struct cuda_info info;
    struct larder_err e = {0, ""};
    void *d;

    if (cuda_device.open(&d, &info, &e)) {
        fprintf(stderr, "nothing is measured: %s\n", e.msg);
        return 77;
    }
    printf("device,%s,%.1f,GiB free\n", info.name, (double)info.free / (1 << 30));
    bench_gemm(d, 4096, 4096, 28672);
    bench_gemm(d, 4096, 14336, 4096);
    bench_gemm(d, 4096, 4096, 6144);
    bench_gemm(d, 8192, 8192, 8192);
    bench_copy(d, true, CUDA_TO_DEVICE);
    bench_copy(d, false, CUDA_TO_DEVICE);
    bench_copy(d, true, CUDA_TO_HOST);
    cuda_device.close(d);
    return 0;
}
