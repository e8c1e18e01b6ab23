/* hf_config.h - config.json and its neighbours: what a Hugging Face directory says in words.
 *
 * Purpose    Turn the JSON files of a directory into parameters, and refuse by name what would
 *            make the model compute something else. Defaults are those of the architecture's
 *            configuration class in transformers 4.57; both spellings of RoPE's parameters
 *            (rope_scaling, rope_parameters) are read.
 * Threads    No state.
 * Errors     LARDER_EMODEL (a key is missing or out of range), LARDER_EUNSUPPORTED (a feature),
 *            LARDER_ENOMEM.
 */
#ifndef LARDER_HF_CONFIG_H
#define LARDER_HF_CONFIG_H

#include <jansson.h>

#include "model_file.h"

struct hf_config {
    const struct model_arch *arch;
    bool tied; /* the output matrix is the embedding */
    bool has_bias;
};

#define HF_MAX_JSON (16u << 20) /* bytes of a file */

/* A JSON object, each key once, from the text of file `name`; *ret is the caller's. */
int hf_parse_json(const char *name, const char *text, size_t len, json_t **ret,
                  struct larder_err *e);
/* The same from a file below `dir`; LARDER_ENOTFOUND without a message where it is not there. */
int hf_read_json(int dir, const char *name, json_t **ret, struct larder_err *e);

/* config.json: m->p, all tables, and *ret. */
int hf_read_config(const json_t *config, struct model *m, struct hf_config *ret,
                   struct larder_err *e);

/* eos_token_id of generation_config.json or config.json, one id or several, as ends of the model's
 * turn. */
int hf_read_ends(const json_t *config, struct model *m, struct larder_err *e);

#endif
