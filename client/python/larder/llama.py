"""Caches for llama.cpp through llama-cpp-python: load(cache, llm) puts one into its memory.

    larder.llama.load(cache, llm)
    question_ids = larder.llama.question(cache, llm, cache.text + "And why?")
    answer = llm.create_completion(cache.prompt(question_ids).tolist(), max_tokens=64)

The one idea: llama.cpp takes a sequence's state as bytes (llama_state_seq_set_data). Its cells are
one table for all layers and KV heads, but since keys are rotated already, a cell may hold another
row of the document in each of them: so a cache with equally many rows everywhere and no bias is
such a state, its cells numbered as the last positions before next_pos. The state's layout is not
promised by llama.cpp; so the installed library first writes the state of a few tokens itself, it
must read as expected to the last byte, and its keys must be the cache's.

Tested with llama-cpp-python 0.3.36. llm.generate() and create_completion() find the document's ids
at the front of their prompt and evaluate the rest alone. Rows become f16 or f32, as the context
keeps them.
"""
from __future__ import annotations

import ctypes
import dataclasses
import struct
from typing import Any, Optional

import llama_cpp
import numpy as np
import numpy.typing as npt

from .cache import Cache
from .errors import InternalError, Unsupported
from .models import check_geometry, check_keys, check_weights, rest_of_prompt

ELEMENTS = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # by ggml's numbers of types
SEQUENCE = 0


@dataclasses.dataclass
class _State:
    """A sequence's state: what comes before the cells, and K and V of each layer.

    k: [n_layers] of [cells, n_kv_heads, head_dim]; v: the same.
    """

    head: bytes
    transposed: bool  # V is stored channel by channel (no flash attention)
    kind: int
    k: list[npt.NDArray[Any]]
    v: list[npt.NDArray[Any]]


class _Reader:
    def __init__(self, raw: bytes):
        self.raw, self.at = raw, 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        if self.at + size > len(self.raw):
            raise Unsupported("it ends early")
        self.at += size
        return struct.unpack_from(form, self.raw, self.at - size)

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        size = dtype.itemsize * int(np.prod(shape))
        if self.at + size > len(self.raw):
            raise Unsupported("it ends early")
        self.at += size
        return np.frombuffer(self.raw, dtype, int(np.prod(shape)), self.at - size).reshape(shape)

    def expect(self, form: str, want: tuple[Any, ...], what: str) -> None:
        got = self.numbers(form)
        if got != want:
            raise Unsupported("%s is %s, not %s" % (what, got, want))


def _read_plane(r: _Reader, n: int, shape: tuple[int, int],
                transposed: bool) -> tuple[int, npt.NDArray[Any]]:
    """K or V of a layer: its type, and [n cells, n_kv_heads, head_dim]."""
    kind, = r.numbers("<i")
    if kind not in ELEMENTS:
        raise Unsupported("its rows are of type %d: open the model with type_k and type_v f16 or "
                          "f32" % kind)
    dtype, width = ELEMENTS[kind], shape[0] * shape[1]
    if transposed:
        r.expect("<II", (dtype.itemsize, width), "the size of a column")
        return kind, r.array(dtype, (width, n)).T.reshape(n, *shape)
    r.expect("<Q", (dtype.itemsize * width,), "the size of a row")
    return kind, r.array(dtype, (n, *shape))


def _read(raw: bytes, first: int, n: int, n_layers: int, shape: tuple[int, int]) -> _State:
    """The state of n tokens from position `first`, which must be this and nothing else."""
    r = _Reader(raw)
    r.numbers("<II")  # a magic number and a version or sequence: kept as they are
    r.expect("<II", (1, n), "the number of streams and cells")
    head = raw[:r.at - 4]
    for i in range(n):
        r.expect("<iIi", (first + i, 1, SEQUENCE), "cell %d" % i)
    transposed, layers = r.numbers("<II")
    if transposed not in (0, 1) or layers != n_layers:
        raise Unsupported("%d layers, of form %d" % (layers, transposed))
    planes = [_read_plane(r, n, shape, False) for _ in range(n_layers)]
    planes += [_read_plane(r, n, shape, bool(transposed)) for _ in range(n_layers)]
    kinds = {kind for kind, _ in planes}
    if r.at != len(raw) or len(kinds) != 1:
        raise Unsupported("%d bytes are left, rows of %d types" % (len(raw) - r.at, len(kinds)))
    return _State(head, bool(transposed), kinds.pop(), [x for _, x in planes[:n_layers]],
                  [x for _, x in planes[n_layers:]])


def _write(like: _State, first: int, k: list[npt.NDArray[Any]],
           v: list[npt.NDArray[Any]]) -> bytes:
    """As _read(), of other rows."""
    n, dtype = len(k[0]), ELEMENTS[like.kind]
    cells = np.array([(first + i, 1, SEQUENCE) for i in range(n)], "<i4")
    parts = [like.head, struct.pack("<I", n), cells.tobytes(),
             struct.pack("<II", like.transposed, len(k))]
    width = k[0].shape[1] * k[0].shape[2]
    row = struct.pack("<iQ", like.kind, dtype.itemsize * width)
    column = struct.pack("<iII", like.kind, dtype.itemsize, width)
    for x in k:
        parts += [row, x.tobytes()]
    for x in v:
        parts += [column, x.reshape(n, width).T.tobytes()] if like.transposed else [row,
                                                                                    x.tobytes()]
    return b"".join(parts)


# ---- the library's own state

class _Context:
    """The memory of an open model."""

    def __init__(self, llm: llama_cpp.Llama):
        self.llm, model = llm, llm.model
        self.n_layers = llama_cpp.llama_model_n_layer(model)
        self.n_heads = llama_cpp.llama_model_n_head(model)
        self.n_kv_heads = llama_cpp.llama_model_n_head_kv(model)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llm.ctx), True)
        self.llm.n_tokens = 0

    def evaluate(self, tokens: list[int], first: int) -> bytes:
        """The state of these tokens at positions from `first`; the memory is empty afterwards."""
        self.clear()
        self.llm.n_tokens = first
        self.llm.eval(tokens)
        size = llama_cpp.llama_state_seq_get_size(self.llm.ctx, SEQUENCE)
        raw = (ctypes.c_uint8 * size)()
        got = llama_cpp.llama_state_seq_get_data(self.llm.ctx, raw, size, SEQUENCE)
        self.clear()
        if got != size:
            raise InternalError("llama.cpp wrote %d bytes of a state of %d" % (got, size))
        return bytes(raw)

    def restore(self, raw: bytes) -> None:
        self.clear()
        data = (ctypes.c_uint8 * len(raw)).from_buffer_copy(raw)
        if llama_cpp.llama_state_seq_set_data(self.llm.ctx, data, len(raw), SEQUENCE) != len(raw):
            self.clear()
            raise InternalError("llama.cpp did not take a state of %d bytes" % len(raw))


def _runs(positions: npt.NDArray[np.int64]) -> list[list[int]]:
    """Ascending positions as runs without gaps."""
    runs: list[list[int]] = []
    for p in sorted(set(positions.tolist())):
        if runs and runs[-1][-1] == p - 1:
            runs[-1].append(p)
        else:
            runs.append([p])
    return runs


def _interleaved(k: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rotate-half order, [..., head_dim], as pairs that stand together."""
    half = k.shape[-1] // 2
    return k.reshape(*k.shape[:-1], 2, half).swapaxes(-1, -2).reshape(k.shape)


def _halves(k: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The other way round."""
    half = k.shape[-1] // 2
    return k.reshape(*k.shape[:-1], half, 2).swapaxes(-1, -2).reshape(k.shape)


def _rope_in_pairs(llm: llama_cpp.Llama) -> bool:
    """Does the model's file keep K so that RoPE turns neighbours (NORM), or halves (NEOX)?"""
    kind = llama_cpp.llama_model_rope_type(llm.model)
    if kind not in (llama_cpp.LLAMA_ROPE_TYPE_NORM, llama_cpp.LLAMA_ROPE_TYPE_NEOX):
        raise Unsupported("the model's RoPE is of type %d" % kind)
    return bool(kind == llama_cpp.LLAMA_ROPE_TYPE_NORM)


def _check_and_probe(cache: Cache, context: _Context, pairs: bool) -> _State:
    """Compare what the library writes with the cache; one of its states."""
    shape = (cache.n_kv_heads, cache.head_dim)
    seen: list[_State] = []

    def keys_of(tokens: npt.NDArray[np.int64],
                positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        token_at = dict(zip(positions.tolist(), tokens.tolist()))
        key_at = {}
        for run in _runs(positions):
            raw = context.evaluate([token_at[p] for p in run], run[0])
            try:
                seen.append(_read(raw, run[0], len(run), cache.n_layers, shape))
            except Unsupported as why:
                raise Unsupported("this llama.cpp (llama-cpp-python %s) writes another state "
                                  "than is known here: %s" % (llama_cpp.__version__,
                                                              why.message)) from None
            key_at.update(zip(run, seen[-1].k[0].astype(np.float32)))
        k = np.stack([key_at[p] for p in positions.tolist()], axis=1)
        return _halves(k) if pairs else k
    check_keys(cache, keys_of)
    return seen[-1]


def _rows(cache: Cache, kind: int, layer: int, is_key: bool,
          pairs: bool) -> npt.NDArray[Any]:
    """[rows, n_kv_heads, head_dim] as the context keeps them."""
    get = cache.keys_f32 if is_key else cache.values_f32
    wide = np.stack([get(layer, head) for head in range(cache.n_kv_heads)], axis=1)
    with np.errstate(over="ignore"):
        rows = (_interleaved(wide) if is_key and pairs else wide).astype(ELEMENTS[kind])
    if not np.isfinite(rows).all():
        raise Unsupported("layer %d has elements beyond f16: open the model with type_k and type_v "
                          "f32" % layer)
    return rows


def _check_shape(cache: Cache, context: _Context) -> None:
    llm = context.llm
    check_geometry(cache, {"n_layers": context.n_layers, "n_heads": context.n_heads,
                           "n_kv_heads": context.n_kv_heads, "n_vocab": llm.n_vocab()},
                   min(llm.n_ctx(), llama_cpp.llama_model_n_ctx_train(llm.model)))
    for key, window in (llm.metadata or {}).items():
        if key.endswith(".attention.sliding_window") and 0 < int(window) < llm.n_ctx():
            raise Unsupported("the model has sliding windows of %s positions, which llama.cpp does "
                              "not keep as this cache needs it: open it with n_ctx of at most %s, "
                              "or use larder.hf" % (window, window))
    if cache.rectangular and cache.n_rows.min() > 0:
        return
    what = ("from %d to %d rows a head" % (cache.n_rows.min(), cache.n_rows.max()) +
            (", and a bias for every row" if cache.has_bias else ""))
    raise Unsupported("the cache has %s, and llama.cpp has one table of cells for all heads: store "
                      "the document with a policy of equal shares and no bias, such as "
                      "offline,rows=25%%,shape=uniform,fit=values or snapkv,rows=25%% (this one is "
                      "%s)" % (what, cache.entry.policy))


def load(cache: Cache, llm: llama_cpp.Llama, *, weights: Optional[str] = None) -> None:
    """Put the rows of a larder.Cache into the memory of an open model, in place of what is there,
    so that its next prompt may go on from the document: cache.prompt(question_ids). Rows are
    copied; close the cache when you like.

    Unsupported: heads with different numbers of rows, or a bias; another form of state or of RoPE.
    ModelMismatch: the cache is another model's (with `weights`, a file such as llm.model_path, it
    must be the one that the cache was made with, byte by byte).
    """
    if weights is not None:
        check_weights(cache, weights)
    context = _Context(llm)
    _check_shape(cache, context)
    pairs = _rope_in_pairs(llm)
    like = _check_and_probe(cache, context, pairs)
    k, v = ([_rows(cache, like.kind, layer, is_key, pairs) for layer in range(cache.n_layers)]
            for is_key in (True, False))
    context.restore(_write(like, cache.next_pos - len(k[0]), k, v))
    llm.input_ids[:cache.next_pos] = cache.prompt([])
    llm.n_tokens = cache.next_pos


def question(cache: Cache, llm: llama_cpp.Llama, prompt: str) -> list[int]:
    """Token ids of what a prompt, as the model's template renders document and question, says
    behind the cache's document.

    ModelMismatch: the tokenizer is another than the cache's, or the prompt begins otherwise.
    """
    def read(ids: list[int]) -> str:
        return llm.detokenize(ids, special=True).decode("utf-8", "replace")
    rest = rest_of_prompt(cache, prompt, read)
    return llm.tokenize(rest.encode(), add_bos=False, special=True)
