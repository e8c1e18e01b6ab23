/* image_file.h - memory files for images: ready before they are wanted, cleared away afterwards.
 *
 * Purpose    Pages of a memory file take longer to make, to map and to unmap than an image takes to
 *            decode into them, so a thread of its own does all three where nobody waits.
 * Ownership  image_files_take() gives a file away; image_files_seal() takes its mapping back,
 *            image_files_drop() what is left.
 * Threads    Any number of callers; one lock inside.
 * Errors     LARDER_ENOMEM, LARDER_EIO.
 */
#ifndef LARDER_IMAGE_FILE_H
#define LARDER_IMAGE_FILE_H

#include <stdbool.h>
#include <stdint.h>

#include "larder_status.h"

struct image_files;

struct image_file {
    int fd;
    uint8_t *map;   /* to be written to; NULL once it is sealed */
    uint64_t bytes; /* mapped */
    bool ready;     /* its pages are there and mapped */
};

/* Keep n_ready files, one of them of `bytes`, the others of what was last taken, at most that. */
int image_files_new(struct image_files **ret, uint32_t n_ready, uint64_t bytes,
                    struct larder_err *e);
void image_files_free(struct image_files *s); /* accepts NULL */

/* A file of at least n_bytes, zeroed. */
int image_files_take(struct image_files *s, uint64_t n_bytes, struct image_file *ret,
                     struct larder_err *e);

/* Before bytes [at, at + n) of it are written. Any number of threads at a time. */
int image_file_room(const struct image_file *f, uint64_t at, uint64_t n, struct larder_err *e);

/* Cut it to n_bytes; what is beyond is not written any more. */
int image_file_cut(const struct image_file *f, uint64_t n_bytes, struct larder_err *e);

/* Seal; f->map is gone. Where it fails, the caller drops the rest. */
int image_files_seal(struct image_files *s, struct image_file *f, struct larder_err *e);

/* The mapping, if it is there, and the descriptor. A file's pages go once nobody maps them. */
void image_files_drop(struct image_files *s, struct image_file *f);

/* An image is done: time to prepare and to clear away. */
void image_files_wake(struct image_files *s);

#endif
