"""Is a cache of this model, tokenizer and template? What the adapters ask before they hand it over.

The one idea: besides the geometry, the keys themselves are compared. Keys of layer 0 depend on a
token, its position and the model's weights and RoPE alone, so a decoder can compute a few of them
again without the document; those of another model, or with another RoPE, come out differently. A
tokenizer has to read the document's tokens as the document, and a prompt to begin with it as the
template rendered it then.
"""
from __future__ import annotations

import hashlib
import os
from typing import Callable, Union

import numpy as np
import numpy.typing as npt

from .cache import Cache
from .errors import InvalidArgument, ModelMismatch

ROWS_COMPARED = 2  # at either end of a head
# Mean squared difference over mean square. Measured (SmolLM2-135M, 724 tokens, transformers, f32):
# 3e-6 for bf16 rows, 5e-4 for int4 ones; with a RoPE base of 1e4 in place of 1e5 from 0.47 on.
MOST_DIFFERENT = 0.05
SHOWN = 24  # characters of a difference


def fingerprint(path: Union[str, "os.PathLike[str]"]) -> str:
    """SHA-256 of a weights file, as Cache.model_fingerprint: reads all of it."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while True:
            block = f.read(1 << 20)
            if not block:
                return digest.hexdigest()
            digest.update(block)


def check_weights(cache: Cache, path: Union[str, "os.PathLike[str]"]) -> None:
    """Refuse a cache of other weights than those of this file."""
    mine = fingerprint(path)
    if mine != cache.model_fingerprint:
        raise ModelMismatch("the cache was made with weights %s..., '%s' is %s..."
                            % (cache.model_fingerprint[:12], os.fspath(path), mine[:12]))


def check_geometry(cache: Cache, model: dict[str, int], n_positions: int) -> None:
    """Refuse a cache of another shape; `model` has the attributes of Cache that are known."""
    other = ["%s %d, the model %d" % (name, getattr(cache, name), value)
             for name, value in model.items() if getattr(cache, name) != value]
    if other:
        raise ModelMismatch("the cache is another model's: it has " + "; ".join(other))
    if cache.next_pos >= n_positions:
        raise ModelMismatch("the cache ends at position %d, and the decoder has %d: none is left "
                            "for a question" % (cache.next_pos, n_positions))


def _some_rows(n_rows: int) -> list[int]:
    return sorted({*range(min(ROWS_COMPARED, n_rows)),
                   *range(max(0, n_rows - ROWS_COMPARED), n_rows)})


def check_keys(cache: Cache, keys_of: Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]],
                                               npt.NDArray[np.float32]]) -> None:
    """Refuse a cache whose keys the model does not compute.

    keys_of(tokens [n], positions [n]) returns the model's keys of layer 0 after RoPE, f32
    [n_kv_heads, n, head_dim] in rotate-half order.
    """
    rows = [_some_rows(int(n)) for n in cache.n_rows[0]]
    stored = np.concatenate([cache.keys_f32(0, h)[r] for h, r in enumerate(rows)])
    if not len(stored):
        return
    where = [cache.positions(0, h)[r].astype(np.int64) for h, r in enumerate(rows)]
    tokens = np.concatenate([cache.tokens[p] for p in where]).astype(np.int64)
    angle = np.concatenate(rows if cache.renumbered else where).astype(np.int64)
    head = np.repeat(np.arange(cache.n_kv_heads), [len(r) for r in rows])
    computed = keys_of(tokens, angle)[head, np.arange(len(tokens))]
    off = float(np.square(computed - stored).mean() / max(np.square(stored).mean(), 1e-30))
    if not off <= MOST_DIFFERENT:
        raise ModelMismatch("the cache is another model's: the keys that this model computes for "
                            "its tokens and positions differ by %.2g of their mean square (other "
                            "weights, or another RoPE)" % off)


def _difference(mine: str, stored: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(mine, stored)) if a != b),
              min(len(mine), len(stored)))
    return "from character %d on it is %r, and was stored as %r" % (
        at, mine[at:at + SHOWN], stored[at:at + SHOWN])


def rest_of_prompt(cache: Cache, prompt: str, read: Callable[[list[int]], str]) -> str:
    """What a prompt says behind the cache's document.

    read(ids) is the text of token ids, special tokens and all, as the decoder's tokenizer has it.
    ModelMismatch: it does not read the document's tokens as the document (another tokenizer), or
    the prompt begins otherwise (another document or template).
    """
    ids, text = cache.tokens.tolist(), cache.text
    whole = read(ids)  # a first token may stand for no text, and a first space for none of it
    if text.lstrip(" ") not in (whole.lstrip(" "), read(ids[1:]).lstrip(" ")):
        raise ModelMismatch("the cache is another tokenizer's, which reads the document's tokens "
                            "otherwise: " + _difference(whole, text))
    if not prompt.startswith(text):
        raise ModelMismatch("the prompt does not begin with the document as its template rendered "
                            "it: " + _difference(prompt, text))
    if len(prompt) == len(text):
        raise InvalidArgument("the prompt ends with the document: there is no question")
    return prompt[len(text):]
