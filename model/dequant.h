/* dequant.h - the tensor types of GGUF and their exact values.
 *
 * Purpose    Turn quantised blocks into f32 (exactly as the format defines them) or bf16
 *            (that value, rounded to nearest even).
 * Threads    No state.
 */
#ifndef LARDER_DEQUANT_H
#define LARDER_DEQUANT_H

#include <stddef.h>
#include <stdint.h>

/* The numbers of the file format. */
enum tensor_type {
    TENSOR_F32 = 0,
    TENSOR_F16 = 1,
    TENSOR_Q4_0 = 2,
    TENSOR_Q4_1 = 3,
    TENSOR_Q5_0 = 6,
    TENSOR_Q5_1 = 7,
    TENSOR_Q8_0 = 8,
    TENSOR_Q4_K = 12,
    TENSOR_Q5_K = 13,
    TENSOR_Q6_K = 14,
    TENSOR_BF16 = 30,
};

struct tensor_format {
    uint32_t type;
    const char *name;
    uint32_t block_len; /* elements */
    uint32_t block_bytes;
    void (*to_f32)(const uint8_t *src, size_t n_blocks, float *dst);
};

/* NULL for a type that is not supported. */
const struct tensor_format *tensor_format(uint32_t type);

/* n f32 values to bf16, round to nearest even. */
void dequant_round_bf16(const float *src, size_t n, uint16_t *dst);

#endif
