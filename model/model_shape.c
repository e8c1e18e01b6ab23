/* model_shape.c - the shapes of a model's weights, which follow from its parameters whatever file
 * they stand in. */
#include "model.h"

void model_weight_shape(const struct model *m, enum model_weight w, uint32_t *rows, uint32_t *cols)
{
    const struct model_params *p = model_params(m);
    uint32_t q = p->geom.n_heads * p->geom.head_dim, kv = p->geom.n_kv_heads * p->geom.head_dim;
    const uint32_t shape[MODEL_WEIGHTS][2] = {
        [MODEL_ATTN_NORM] = {1, p->n_hidden},
        [MODEL_Q] = {q, p->n_hidden},
        [MODEL_K] = {kv, p->n_hidden},
        [MODEL_V] = {kv, p->n_hidden},
        [MODEL_O] = {p->n_hidden, q},
        [MODEL_FFN_NORM] = {1, p->n_hidden},
        [MODEL_GATE] = {p->n_ff, p->n_hidden},
        [MODEL_UP] = {p->n_ff, p->n_hidden},
        [MODEL_DOWN] = {p->n_hidden, p->n_ff},
        [MODEL_Q_BIAS] = {q, 1},
        [MODEL_K_BIAS] = {kv, 1},
        [MODEL_V_BIAS] = {kv, 1},
        [MODEL_Q_NORM] = {1, p->geom.head_dim},
        [MODEL_K_NORM] = {1, p->geom.head_dim},
        [MODEL_EMBED] = {p->n_vocab, p->n_hidden},
        [MODEL_OUT_NORM] = {1, p->n_hidden},
        [MODEL_HEAD] = {p->n_vocab, p->n_hidden},
    };

    *rows = shape[w][0];
    *cols = shape[w][1];
}
