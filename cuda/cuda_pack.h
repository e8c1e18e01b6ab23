/* cuda_pack.h - arguments of the kernels that pack kept rows and read them back.
 *
 * The part of cuda_kernel.h that belongs to cuda_pack.c. Tiles as packed.h says, of the same bytes.
 */
#ifndef LARDER_CUDA_PACK_H
#define LARDER_CUDA_PACK_H

#include "cuda_kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_PACK_ROWS 128u /* int8: rows whose ranges a block finds; int4 has its own groups */

/* A KV head: its rows, [n_rows][d] of T, and its tiles. Rows that are only read back are tiles
 * too, of their own type. */
struct cuda_pack_head {
    const void *k, *v;
    struct cuda_past to;
    uint64_t first; /* of the rows of all heads, its own first */
};

/* CUDA_PACK_RANGES: lo, hi of each channel over each block of rows after the exact ones;
 * CUDA_PACK_KEYS: tiles of keys, a block for each of these; CUDA_PACK_VALUES: tiles of values, a
 * thread for each range of a row; CUDA_UNPACK: `wide` from tiles of keys. */
struct cuda_pack_args {
    const struct cuda_pack_head *head; /* [n_heads] */
    float *lo, *hi;                    /* [n_heads][n_blocks][d] */
    uint32_t *bad;                     /* [n_heads]: set where something cannot be packed */
    float *wide;                       /* [rows of all heads][d] */
    uint32_t n_heads, d;
    uint32_t most;      /* rows of the largest head */
    uint32_t per_block; /* rows */
    uint32_t n_blocks;  /* of the largest head */
    bool four;          /* int4 */
    bool round;         /* CUDA_UNPACK: to what bf16 holds */
};

int cuda_launch_pack(const struct cuda_launch *l, void *stream);

#ifdef __cplusplus
}
#endif
#endif
