/* fake_image.h - a small cache image under key 0xaa... and the answer to FETCH that carries it. */
#ifndef LARDER_FAKE_IMAGE_H
#define LARDER_FAKE_IMAGE_H

#include "fake_daemon.h"
#include "image_plan.h"

#define KEY "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
#define ENTRY                                                                                      \
    "{\"key\":\"" KEY "\",\"name\":\"default/doc\",\"model\":\"m\",\"policy\":\"full\","           \
    "\"n_ctx\":9,\"next_pos\":9,\"sel_layer\":null,\"full_bytes\":100,\"image_bytes\":50,"         \
    "\"stored_bytes\":40,"                                                                         \
    "\"rows_total\":7,\"precision\":\"bf16\",\"pinned\":true,\"created\":5,\"prefill_ms\":6,"      \
    "\"hits\":3,\"damaged\":false,\"from_the_future\":1}"

static enum kv_dtype image_rows_type = KV_BF16; /* a fake daemon's own */

/* A small image under key 0xaa..., changed by `spoil`. */
static inline uint8_t *image_bytes(uint64_t *ret_n, void (*spoil)(uint8_t *base, uint64_t n))
{
    static const uint32_t rows[2] = {3, 2};
    struct image_spec s = {.geom = {2, 2, 1, 4},
                           .dtype = image_rows_type,
                           .n_ctx = 9,
                           .next_pos = 9,
                           .n_vocab = 5,
                           .text_len = 4,
                           .rows = rows};
    struct image_plan *p = NULL;
    uint8_t *base;

    memset(s.key, 0xaa, sizeof s.key);
    if (image_plan_new(&p, &s, 1 << 20, NULL))
        abort();
    base = mem_aligned(p->n_bytes, 1);
    image_plan_write(p, base);
    for (int i = 0; i < 2; i++)
        for (uint32_t r = 0; r < rows[i]; r++)
            ((uint32_t *)(void *)(base + p->slot[i].position_off))[r] = 2 * r;
    memcpy(base + p->text_off, "text", 4);
    if (spoil)
        spoil(base, p->n_bytes);
    *ret_n = p->n_bytes;
    image_plan_free(p);
    return base;
}

static inline int image_file(void (*spoil)(uint8_t *, uint64_t))
{
    uint64_t n = 0;
    uint8_t *base = image_bytes(&n, spoil);
    int fd = -1;

    if (memfile_from("image", base, n, &fd, NULL))
        abort();
    mem_free(base);
    return fd;
}

static inline void answer_fetch(int sock, uint32_t seq, int fd, uint64_t bytes)
{
    char json[2048];

    snprintf(json, sizeof json, "{\"lease\":77,\"bytes\":%llu,\"entry\":" ENTRY "}",
             (unsigned long long)bytes);
    fake_send(sock, FRAME_OK, seq, json, fd);
}

#endif
