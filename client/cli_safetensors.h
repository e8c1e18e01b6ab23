/* cli_safetensors.h - a cache image as a safetensors file, and back.
 *
 * Purpose    A file has one legal list of tensors, which follows from the layout of the image
 *            (image_plan.h): the writer generates it, the reader generates it again and compares.
 * Shapes     tokens U32 [n_ctx]; logits F32 [n_vocab]; for each layer L and KV head H, under
 *            "layers.L.heads.H.": position U32 [rows], bias F32 [rows] where there are biases,
 *            k and v BF16 [rows, head_dim] or, packed, U8 [bytes of the tile]. In the file: tokens,
 *            logits, all positions, all biases, then k and v in turn, without gaps.
 * Ownership  JSON results are new references; plans are image_plan_free()d.
 * Threads    No state.
 * Errors     LARDER_EINVAL: not a file that export wrote; LARDER_ETOOBIG, LARDER_ENOMEM.
 */
#ifndef LARDER_CLI_SAFETENSORS_H
#define LARDER_CLI_SAFETENSORS_H

#include <jansson.h>
#include <stdint.h>

#include "image_plan.h"

#define ST_MAX_HEADER 100000000u /* what readers of the format accept */
#define ST_FORMAT "larder-1"

struct st_tensor {
    char name[64];
    const char *dtype;
    unsigned n_dims;
    uint64_t dim[2];
    uint64_t n_bytes;
    uint64_t at; /* in the image */
};

/* Tensors of an image, in the order of the file: i is below st_count(). */
uint64_t st_count(const struct image_plan *p);
void st_tensor_at(const struct image_plan *p, uint64_t i, struct st_tensor *ret);

/* The plan by which a checked image is laid out. */
int st_plan_of(const struct larder_image *im, struct image_plan **ret, struct larder_err *e);

/* Members of what SHOW with text gave that identify the entry, as they are: a new object.
 * LARDER_EUNSUPPORTED: the text is no JSON string. */
int st_metadata(const json_t *entry, json_t **ret, struct larder_err *e);

/* Length word and header, padded to a multiple of 8; mem_free() it. st_metadata() of
 * `entry`, each as a string, becomes the metadata. */
int st_header(const struct image_plan *p, const json_t *entry, char **ret, uint64_t *ret_len,
              struct larder_err *e);

/* Parse a header (without its length word) of a file whose tensors take data_bytes, check all of it
 * and lay out the image. *ret_meta: "__metadata__", every member a string. */
int st_parse(const char *header, uint64_t len, uint64_t data_bytes, json_t **ret_meta,
             struct image_plan **ret, struct larder_err *e);

#endif
