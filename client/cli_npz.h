/* cli_npz.h - a cache image as a NumPy archive, in the shapes of Hugging Face caches.
 *
 * Purpose    What numpy.load() reads without larder: for each layer arrays that a cache of
 *            transformers takes as they are. bf16 is no type of NumPy, so rows are float32, in
 *            which each bf16 number is exact.
 * Shapes     metadata S[bytes] (one JSON object); tokens int64 [n_ctx]; logits float32 [n_vocab];
 *            for each layer N, with R the most rows that a KV head of it keeps: key.N and value.N
 *            float32 [1, n_kv_heads, R, head_dim]; position.N int64 [n_kv_heads, R]; and, where
 *            there are biases or heads with fewer rows, bias.N float32 [1, n_kv_heads, 1, R],
 *            added to attention logits. Rows that a head lacks are zero, at position -1, with bias
 *            -inf.
 * Threads    No state.
 * Errors     LARDER_EUNSUPPORTED: rows that are not bf16; LARDER_ETOOBIG: metadata above 2 GiB;
 *            else as st_metadata(), cli_file.h and cli_zip.h.
 */
#ifndef LARDER_CLI_NPZ_H
#define LARDER_CLI_NPZ_H

#include "cli_export.h"

int cli_npz_write(const struct export *x, struct larder_err *e);

#endif
