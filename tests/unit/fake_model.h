/* fake_model.h - a random model without a file: replaces model.c in an engine test.
 *
 * Defining every function of model.h here keeps the archive's model.o out of the link.
 * Weights are a hash of (layer, matrix, row, column), so that any part can be read at any
 * time and nothing depends on the order. Knobs make the properties that tests need.
 */
#ifndef LARDER_FAKE_MODEL_H
#define LARDER_FAKE_MODEL_H

#include <math.h>

#include "dequant.h"
#include "half.h"
#include "model.h"
#include "rope.h"
#include "testlib.h"

struct model {
    struct model_params p;
    bool frozen;        /* every layer has the same weights and leaves the hidden states alone */
    bool swapped_heads; /* query heads of a group in reverse order */
    float v_scale;      /* of V; O takes it back */
    int nan_layer;      /* a layer whose K weights are not finite; -1: none */
};

enum {
    FAKE_LAYERS = 8,
    FAKE_HEADS = 6,
    FAKE_KV_HEADS = 2,
    FAKE_HEAD_DIM = 32,
    FAKE_HIDDEN = 64,
    FAKE_FF = 96,
    FAKE_VOCAB = 203,
    FAKE_POSITIONS = 512,
};

static inline struct model fake_model(void)
{
    static double freq[FAKE_HEAD_DIM / 2];

    rope_plain(1e4, FAKE_HEAD_DIM, freq);
    return (struct model){
        .p = {.arch = "llama",
              .name = "fake",
              .geom = {FAKE_LAYERS, FAKE_HEADS, FAKE_KV_HEADS, FAKE_HEAD_DIM},
              .n_hidden = FAKE_HIDDEN,
              .n_ff = FAKE_FF,
              .n_vocab = FAKE_VOCAB,
              .n_positions = FAKE_POSITIONS,
              .rope_dims = FAKE_HEAD_DIM,
              .rope_theta = 1e4,
              .rope = {freq, 1},
              .norm_eps = 1e-5},
        .v_scale = 1,
        .nan_layer = -1,
    };
}

enum { FAKE_WINDOW = 48 };

static const uint32_t fake_every_second[FAKE_LAYERS] = {FAKE_WINDOW, 0, FAKE_WINDOW, 0,
                                                        FAKE_WINDOW, 0, FAKE_WINDOW, 0};

/* Every second layer slides. */
static inline struct model fake_sliding_model(void)
{
    struct model m = fake_model();

    m.p.sliding = fake_every_second;
    return m;
}

/* Everything that architectures differ in, at once. */
static inline struct model fake_rich_model(void)
{
    static double freq[FAKE_HEAD_DIM / 2];
    struct model m = fake_sliding_model();

    rope_plain(500, 20, freq);
    m.p.rope_dims = 20;
    m.p.rope = (struct rope){freq, 1.25};
    m.p.has_qkv_bias = m.p.has_qk_norm = true;
    return m;
}

const struct model_params *model_params(const struct model *m)
{
    return &m->p;
}

const struct tokenizer *model_tokenizer(const struct model *m)
{
    (void)m;
    return NULL;
}

/* The query head whose weights head h has. */
static inline uint32_t fake_head(const struct model *m, uint32_t row)
{
    uint32_t d = m->p.geom.head_dim, group = m->p.geom.n_heads / m->p.geom.n_kv_heads;
    uint32_t h = row / d, first = h / group * group;

    return m->swapped_heads ? (2 * first + group - 1 - h) * d + row % d : row;
}

/* What keeps matrices apart; fixed, so that a new one leaves the others as they are. */
static const uint8_t fake_salt[MODEL_WEIGHTS] = {
    [MODEL_Q] = 1,        [MODEL_K] = 2,         [MODEL_V] = 3,       [MODEL_O] = 4,
    [MODEL_FFN_NORM] = 5, [MODEL_GATE] = 6,      [MODEL_UP] = 7,      [MODEL_DOWN] = 8,
    [MODEL_EMBED] = 9,    [MODEL_OUT_NORM] = 10, [MODEL_HEAD] = 11,   [MODEL_Q_BIAS] = 12,
    [MODEL_K_BIAS] = 13,  [MODEL_V_BIAS] = 14,   [MODEL_Q_NORM] = 15, [MODEL_K_NORM] = 16,
};

static inline float fake_weight(const struct model *m, uint32_t layer, enum model_weight w,
                                uint32_t row, uint32_t col)
{
    static const float scale[MODEL_WEIGHTS] = {
        [MODEL_Q] = .45f,   [MODEL_K] = .45f,   [MODEL_V] = .15f,    [MODEL_O] = .15f,
        [MODEL_GATE] = .2f, [MODEL_UP] = .2f,   [MODEL_DOWN] = .15f, [MODEL_EMBED] = 1,
        [MODEL_HEAD] = .3f, [MODEL_Q_BIAS] = 1, [MODEL_K_BIAS] = 1,  [MODEL_V_BIAS] = .3f,
    };
    uint64_t seed;
    float x;

    if (m->frozen && (w == MODEL_O || w == MODEL_DOWN))
        return 0;
    if (w == MODEL_Q)
        row = fake_head(m, row);
    if (w == MODEL_O)
        col = fake_head(m, col);
    if (w == MODEL_HEAD || w == MODEL_EMBED || w == MODEL_OUT_NORM || m->frozen)
        layer = 0;
    seed = ((uint64_t)layer << 48 | (uint64_t)fake_salt[w] << 40 | (uint64_t)row << 20 | col) + 1;
    seed *= 0x9e3779b97f4a7c15ULL;
    test_rand(&seed);
    x = test_randf(&seed);
    if (w == MODEL_ATTN_NORM || w == MODEL_FFN_NORM || w == MODEL_OUT_NORM || w == MODEL_Q_NORM ||
        w == MODEL_K_NORM)
        return 1 + x / 4;
    x *= scale[w];
    if (w == MODEL_V)
        return x * m->v_scale;
    return w == MODEL_O ? x / m->v_scale : x;
}

int model_read_f32(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                   uint32_t n, float *dst, struct larder_err *e)
{
    uint32_t rows, cols;

    (void)e;
    model_weight_shape(m, w, &rows, &cols);
    assert_true(row0 + n <= rows && layer < m->p.geom.n_layers);
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < cols; j++)
            *dst++ = w == MODEL_K && (int)layer == m->nan_layer
                         ? NAN
                         : fake_weight(m, layer, w, row0 + i, j);
    return 0;
}

const struct tensor_format *model_weight_format(const struct model *m, uint32_t layer,
                                                enum model_weight w)
{
    (void)m;
    (void)layer;
    (void)w;
    return tensor_format(TENSOR_F32);
}

int model_read_stored(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                      uint32_t n, uint8_t *dst, struct larder_err *e)
{
    return model_read_f32(m, layer, w, row0, n, (float *)(void *)dst, e);
}

int model_read_bf16(const struct model *m, uint32_t layer, enum model_weight w, uint32_t row0,
                    uint32_t n, uint16_t *dst, struct larder_err *e)
{
    uint32_t rows, cols;
    float *x;

    model_weight_shape(m, w, &rows, &cols);
    x = malloc((size_t)n * cols * sizeof *x);
    assert_non_null(x);
    model_read_f32(m, layer, w, row0, n, x, e);
    for (size_t i = 0; i < (size_t)n * cols; i++)
        dst[i] = f32_to_bf16(x[i]);
    free(x);
    return 0;
}

#endif
