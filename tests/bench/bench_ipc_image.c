/* bench_ipc_image.c - what a client pays for an image that the daemon has decoded already:
 * map, check, unmap. Prints CSV; the round trip of the socket comes on top.
 *
 * The image is that of 2,048 rows per head of SmolLM2-135M: 30 layers, 3 KV heads of 64.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "benchlib.h"
#include "image_plan.h"
#include "mem.h"
#include "memfile.h"

#define N_RUNS 301
#define N_LAYERS 30u
#define N_KV 3u
#define N_ROWS 2048u
#define N_CTX 5000u

static int make_image(bool has_bias, int *ret_fd, uint64_t *ret_bytes)
{
    static uint32_t rows[N_LAYERS * N_KV];
    struct image_spec s = {.geom = {N_LAYERS, 9, N_KV, 64},
                           .dtype = KV_BF16,
                           .has_bias = has_bias,
                           .n_ctx = N_CTX,
                           .next_pos = N_CTX,
                           .n_vocab = 49152,
                           .text_len = 20000,
                           .rows = rows};
    struct image_plan *p = NULL;
    void *map = NULL;
    int rc;

    for (uint32_t i = 0; i < N_LAYERS * N_KV; i++)
        rows[i] = N_ROWS;
    rc = image_plan_new(&p, &s, UINT64_MAX, NULL);
    if (!rc)
        rc = memfile_new("bench", p->n_bytes, 1, ret_fd, &map, NULL);
    if (rc)
        return rc;
    image_plan_write(p, map);
    for (uint32_t i = 0; i < N_LAYERS * N_KV; i++)
        for (uint32_t r = 0; r < N_ROWS; r++)
            ((uint32_t *)(void *)((char *)map + p->slot[i].position_off))[r] = 2 * r;
    *ret_bytes = p->n_bytes;
    rc = memfile_seal(*ret_fd, map, p->n_bytes, p->n_bytes, NULL);
    image_plan_free(p);
    return rc;
}

static int one_run(int fd, uint64_t n, double *us)
{
    struct larder_image im;
    const void *map = NULL;
    double t0 = now_us();
    int rc = memfile_map(fd, n, n, &map, NULL, NULL);

    if (!rc)
        rc = larder_image_check(map, n, &im, NULL);
    *us = now_us() - t0;
    memfile_unmap(map, n);
    return rc;
}

static int bench(const char *name, bool has_bias)
{
    double us[N_RUNS];
    uint64_t n = 0;
    int fd = -1;
    int rc = make_image(has_bias, &fd, &n);

    for (int i = -10; !rc && i < N_RUNS; i++)
        rc = one_run(fd, n, &us[i < 0 ? 0 : i]);
    if (rc)
        return rc;
    qsort(us, N_RUNS, sizeof *us, by_value);
    printf("%s,%.1f,%d,%.1f,%.1f\n", name, (double)n / (1 << 20), N_RUNS, us[0], us[N_RUNS / 2]);
    close(fd);
    return 0;
}

int main(void)
{
    printf("image,mib,runs,min_us,median_us\n");
    if (bench("map+check 2048 rows", false) || bench("map+check 2048 rows with bias", true)) {
        fprintf(stderr, "bench_ipc_image: failed\n");
        return 1;
    }
    return 0;
}
