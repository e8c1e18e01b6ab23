/* bench_store_codec.c - coding the rows of a stored entry, one core: encode, decode, size. Prints
 * CSV.
 *
 *     bench_store_codec STORE NAME [RUNS]
 *
 * STORE is the directory of a store that no larderd has open; NAME an entry of bf16 rows in
 * namespace "default". Decoding goes extent by extent into one destination of the size of all rows,
 * as a fetch does, hash included. Beside the codecs: memcpy of the same bytes into that
 * destination, and zstd of level 3 over the bytes as they are. All take turns, so that a slow
 * moment of the machine hits each of them.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <zstd.h>

#include "benchlib.h"
#include "codec.h"
#include "mem.h"
#include "store.h"
#include "tiers.h"

#define MAX_RUNS 101

enum subject { S_MEMCPY, S_ZSTD3, S_PLANES, S_TIERS, N_SUBJECTS };
static const char *const subject_name[] = {"memcpy", "zstd -3", "zstd", "fast"};

struct coded {
    enum codec_kind kind;
    uint8_t *bytes;
    uint32_t len;
    uint8_t hash[EXTENT_HASH_LEN];
};

struct bench {
    uint8_t *raw, *dst; /* the row stream; where it is decoded to */
    uint64_t n_bytes;
    uint32_t n_extents;
    struct channel_rows *rows;       /* [n_extents] */
    struct coded *coded[N_SUBJECTS]; /* [n_extents] */
    uint64_t stored[N_SUBJECTS];     /* bytes */
    double encode_us[N_SUBJECTS][MAX_RUNS], decode_us[N_SUBJECTS][MAX_RUNS];
    struct codec *codec;
    ZSTD_CCtx *cctx;
};

static void die(const char *what)
{
    fprintf(stderr, "bench_store_codec: %s\n", what);
    exit(1);
}

static void *need(void *p)
{
    if (!p)
        die("no memory");
    return p;
}

/* ---- the rows */

static void note_tile(struct bench *b, uint64_t at, uint64_t n, uint32_t width)
{
    while (n) {
        uint64_t room = EXTENT_RAW_MAX - at % EXTENT_RAW_MAX, take = n < room ? n : room;

        channels_add(&b->rows[at / EXTENT_RAW_MAX], (uint32_t)take / 2, width);
        at += take;
        n -= take;
    }
}

static void load(struct bench *b, const char *dir, const char *name)
{
    struct store_opts o = {.dir = dir, .store_budget = 1ull << 40, .allow_any_fs = true};
    struct larder_err e = {0, ""};
    struct store_entry *en = NULL;
    struct store *s = NULL;
    const struct store_info *in;
    struct store_target *t;
    uint8_t key[STORE_KEY_LEN];
    uint64_t at = 0;
    uint32_t heads, d;

    if (store_open(&s, &o, &e) || store_find_name(s, "default", name, key, &e) ||
        store_entry_open(s, key, &en, &e))
        die(e.msg);
    in = store_entry_info(en);
    if (in->precision != KV_BF16 || in->has_bias)
        die("the entry has other rows than plain bf16 ones");
    heads = in->geom.n_layers * in->geom.n_kv_heads;
    d = in->geom.head_dim;
    for (uint32_t i = 0; i < heads; i++)
        b->n_bytes += 4ull * in->rows[i] * d;
    b->n_extents = (uint32_t)((b->n_bytes + EXTENT_RAW_MAX - 1) / EXTENT_RAW_MAX);
    b->raw = need(mem_aligned(b->n_bytes, 1));
    b->dst = need(mem_aligned(b->n_bytes, 1));
    b->rows = need(mem_zalloc(b->n_extents, sizeof *b->rows));
    t = need(mem_zalloc(heads, sizeof *t));
    for (uint32_t i = 0; i < heads; i++) {
        uint64_t n = 2ull * in->rows[i] * d;

        t[i] = (struct store_target){.k = at, .v = at + n};
        note_tile(b, at, n, d);
        note_tile(b, at + n, n, d);
        at += 2 * n;
    }
    for (uint32_t i = 0; i < store_entry_n_extents(en, KV_BF16); i++)
        if (store_entry_decode(en, KV_BF16, i, &(struct store_sink){.base = b->raw, .target = t},
                               &e))
            die(e.msg);
    mem_free(t);
    store_entry_close(en);
    store_close(s);
    memset(b->dst, 1, b->n_bytes);
}

static uint32_t extent_len(const struct bench *b, uint32_t i)
{
    uint64_t left = b->n_bytes - (uint64_t)i * EXTENT_RAW_MAX;

    return left < EXTENT_RAW_MAX ? (uint32_t)left : EXTENT_RAW_MAX;
}

/* ---- the subjects */

/* Coded bytes are copied out of the codec, as a put does. */
static void encode(struct bench *b, enum subject who)
{
    b->stored[who] = 0;
    for (uint32_t i = 0; i < b->n_extents; i++) {
        struct coded *c = &b->coded[who][i];
        struct codec_input in = {b->raw + (uint64_t)i * EXTENT_RAW_MAX, extent_len(b, i),
                                 &b->rows[i]};
        const void *stored = in.raw;
        uint32_t n = in.len;

        if (who == S_ZSTD3) {
            n = (uint32_t)ZSTD_compressCCtx(b->cctx, c->bytes, EXTENT_STORED_MAX, in.raw, in.len,
                                            3);
            stored = c->bytes;
        } else if (who != S_MEMCPY &&
                   codec_encode(b->codec, who == S_PLANES ? CODEC_PLANES : CODEC_TIERS, &in,
                                &c->kind, &stored, &n, c->hash, NULL)) {
            die("an extent does not code");
        }
        if (stored != c->bytes)
            memcpy(c->bytes, stored, n);
        c->len = n;
        b->stored[who] += n;
    }
}

static void decode(struct bench *b, enum subject who)
{
    for (uint32_t i = 0; i < b->n_extents; i++) {
        struct coded *c = &b->coded[who][i];
        uint8_t *dst = b->dst + (uint64_t)i * EXTENT_RAW_MAX;
        uint32_t len = extent_len(b, i);
        struct codec_piece to = {dst, len};

        if (who == S_MEMCPY)
            memcpy(dst, c->bytes, len);
        else if (who == S_ZSTD3)
            ZSTD_decompress(dst, len, c->bytes, c->len);
        else if (codec_decode(b->codec, c->kind, c->bytes, c->len, len, c->hash, &to, NULL))
            die("an extent does not decode");
    }
}

static void run(struct bench *b, int n_runs)
{
    for (int i = -1; i < n_runs; i++)
        for (int who = 0; who < N_SUBJECTS; who++) {
            double t0 = now_us(), t1;

            encode(b, (enum subject)who);
            t1 = now_us();
            decode(b, (enum subject)who);
            b->encode_us[who][i < 0 ? 0 : i] = t1 - t0;
            b->decode_us[who][i < 0 ? 0 : i] = now_us() - t1;
            if (memcmp(b->raw, b->dst, b->n_bytes))
                die("what was decoded differs");
        }
}

int main(int argc, char **argv)
{
    int n_runs = argc > 3 ? atoi(argv[3]) : 11;
    struct bench *b = need(mem_zalloc(1, sizeof *b));

    if (argc < 3 || n_runs < 1 || n_runs > MAX_RUNS) {
        fprintf(stderr, "usage: bench_store_codec STORE NAME [RUNS]\n");
        return 2;
    }
    b->codec = need(codec_new());
    b->cctx = need(ZSTD_createCCtx());
    load(b, argv[1], argv[2]);
    for (int who = 0; who < N_SUBJECTS; who++) {
        b->coded[who] = need(mem_zalloc(b->n_extents, sizeof *b->coded[who]));
        for (uint32_t i = 0; i < b->n_extents; i++)
            b->coded[who][i].bytes = need(mem_alloc(EXTENT_STORED_MAX, 1));
    }
    run(b, n_runs);
    printf("codec,mib,runs,min_us,median_us,encode_us,ratio\n");
    for (int who = 0; who < N_SUBJECTS; who++) {
        qsort(b->encode_us[who], (size_t)n_runs, sizeof(double), by_value);
        qsort(b->decode_us[who], (size_t)n_runs, sizeof(double), by_value);
        printf("%s,%.1f,%d,%.0f,%.0f,%.0f,%.3f\n", subject_name[who],
               (double)b->n_bytes / (1 << 20), n_runs, b->decode_us[who][0],
               b->decode_us[who][n_runs / 2], b->encode_us[who][n_runs / 2],
               (double)b->n_bytes / (double)b->stored[who]);
    }
    return 0;
}
