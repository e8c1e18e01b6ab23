"""Caches for Hugging Face transformers: load(cache, model) gives what generate() takes.

    past = larder.hf.load(cache, model)
    question_ids = larder.hf.question(cache, tokenizer, cache.text + "And why?")
    ids = model.generate(**past.inputs(question_ids), max_new_tokens=64)

The one idea: transformers counts positions, masks and ids by the length that a cache reports, so
this one reports the document's (next_pos) whatever rows are left of it. Where all heads of all
layers have equally many rows and no bias, nothing else is needed: the mask of transformers starts
behind the dropped rows. Otherwise (and where layers have a sliding window) heads are padded to
their layer's longest, transformers makes the mask of the new tokens alone, and a hook before each
attention puts in front of it the bias of every row, or minus infinity where there is none or where
it has left the window; that takes `sdpa` or `eager` attention. The hook does nothing for other
caches, and a cache that needs it takes no keys that did not pass it.

Tested with transformers 5.24.0 and torch 2.15, and with 4.57.6 and 2.9. One document for all
sequences of a batch: where there are several, past.batch_repeat_interleave(n) first.
"""
from __future__ import annotations

import inspect
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache as TransformersCache
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .cache import Cache
from .errors import InvalidArgument, Unsupported
from .models import check_geometry, check_keys, check_weights, rest_of_prompt

MASKING = ("sdpa", "eager")


class StoredLayer(DynamicLayer):
    """Rows of the document, [1, n_kv_heads, n_rows, head_dim], and behind them the new ones.

    rows_mask: additive, [1, n_heads, 1, n_rows]; None: every row counts as it is. last_seen: where
    the layer has a sliding window, the last position that sees each row, [1, n_heads, 1, n_rows].
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, next_pos: int,
                 rows_mask: Optional[torch.Tensor], last_seen: Optional[torch.Tensor],
                 alone: bool):
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.is_initialized = keys, values, True
        self.n_rows, self.next_pos = keys.shape[-2], next_pos
        self.rows_mask, self.last_seen = rows_mask, last_seen
        self.masks_new_alone = alone  # the mask of transformers leaves the document out
        self.masked = False  # the hook has made the mask of the keys that come next

    @property
    def n_new(self) -> int:
        return self.keys.shape[-2] - self.n_rows

    def get_seq_length(self, *_: Any) -> int:
        return self.next_pos + self.n_new

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        n_query = query if isinstance(query, int) else query.shape[0]
        if self.masks_new_alone:
            return self.n_new + n_query, self.next_pos
        return self.keys.shape[-2] + n_query, self.next_pos - self.n_rows

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.masks_new_alone and not self.masked:
            raise Unsupported("the model's attention did not pass its cache through the hook that "
                              "masks this document: nothing was computed")
        self.masked = False
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, length: int) -> None:
        """0 or less: drop so many of the last positions; more (transformers 4): keep so many."""
        if length <= 0:
            length += self.get_seq_length()
        if length < self.next_pos:
            raise InvalidArgument("a pruned document cannot be cropped: keep its %d positions"
                                  % self.next_pos)
        end = self.n_rows + length - self.next_pos
        self.keys, self.values = self.keys[..., :end, :], self.values[..., :end, :]

    def reset(self) -> None:
        """Back to the document."""
        self.crop(-self.n_new)

    def mask(self, new: Optional[torch.Tensor], n_query: int) -> Optional[torch.Tensor]:
        """The layer's mask [batch, n_heads, n_query, rows and new tokens] from that of the new
        tokens, [batch, 1, n_query, n_new + n_query], boolean, additive or None (causal)."""
        if new is None and n_query == 1 and self.rows_mask is None and self.last_seen is None:
            return None
        if new is None:
            new = torch.ones(1, 1, n_query, self.n_new + n_query, dtype=torch.bool,
                             device=self.device).tril(self.n_new)
        if new.dtype == torch.bool:
            new = torch.zeros(new.shape, dtype=self.dtype, device=self.device).masked_fill(
                ~new.to(self.device), -torch.inf)
        rows = self.rows_mask
        if rows is None:
            rows = new.new_zeros(1, 1, 1, self.n_rows)
        if self.last_seen is not None:
            first = self.get_seq_length()
            query = torch.arange(first, first + n_query, device=self.device)[:, None]
            rows = torch.where(self.last_seen < query, -torch.inf, rows)
        n_batch, n_heads = new.shape[0], rows.shape[1]
        return torch.cat([rows.to(new.dtype).expand(n_batch, n_heads, n_query, self.n_rows),
                          new.expand(n_batch, n_heads, n_query, new.shape[-1])], dim=-1)


class StoredCache(DynamicCache):
    """A document's cache; generate() appends to it, forget() takes it back to the document."""

    def __init__(self, layers: list[StoredLayer], prompt: npt.NDArray[np.uint32], argument: str):
        TransformersCache.__init__(self, layers=layers)
        self.document = prompt
        self.next_pos = layers[0].next_pos
        self.argument = argument  # the name under which the model takes a cache

    def inputs(self, question: Union[torch.Tensor, npt.ArrayLike]) -> dict[str, Any]:
        """What generate() takes: input_ids and attention_mask of the document and a question's
        ids, and this cache; what it returns begins with these ids."""
        if isinstance(question, torch.Tensor):
            question = question.detach().cpu().numpy()
        ids = np.asarray(question).reshape(-1).astype(np.int64)
        if not ids.size:
            raise InvalidArgument("the question has no tokens")
        whole = np.concatenate([self.document.astype(np.int64), ids])
        input_ids = torch.from_numpy(whole)[None].to(self.layers[0].device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids),
                self.argument: self}

    def forget(self) -> None:
        """Drop what came after the document, for the next question."""
        self.reset()


def _cache_argument(model: torch.nn.Module) -> str:
    """`past_key_values` became `cache` within transformers 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _mask_of_stored_rows(module: torch.nn.Module, args: tuple[Any, ...],
                         kwargs: dict[str, Any]) -> Any:
    """A hook before an attention module: its mask, where the cache is one that needs its own."""
    past = next((x for x in kwargs.values() if isinstance(x, StoredCache)), None)
    if past is None or not past.layers[module.layer_idx].masks_new_alone:
        return None
    layer = past.layers[module.layer_idx]
    hidden = args[0] if args else kwargs["hidden_states"]
    kwargs["attention_mask"] = layer.mask(kwargs.get("attention_mask"), hidden.shape[1])
    layer.masked = True
    return args, kwargs


def _attention_modules(model: torch.nn.Module, n_layers: int) -> list[torch.nn.Module]:
    found = {m.layer_idx: m for m in model.modules()
             if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")}
    if sorted(found) != list(range(n_layers)):
        raise Unsupported("%s does not have one attention module with grouped KV heads per layer"
                          % type(model).__name__)
    return [found[i] for i in range(n_layers)]


class _FirstKeys(DynamicCache):
    """Ends a forward pass once layer 0 has handed in its keys."""

    class Seen(Exception):
        pass

    def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise self.Seen(key_states)


def _windows(model: Any, n_layers: int) -> list[Optional[int]]:
    """The sliding window of each layer; None: it sees everything."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * n_layers
    other = set(kinds) - {"full_attention", "sliding_attention"}
    if other:
        raise Unsupported("%s has layers whose attention is neither full nor a sliding window: %s"
                          % (type(model).__name__, ", ".join(sorted(other))))
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _check_model(cache: Cache, model: Any) -> None:
    config = model.config.get_text_config()
    n_heads = config.num_attention_heads
    check_geometry(cache, {
        "n_layers": config.num_hidden_layers, "n_heads": n_heads,
        "n_kv_heads": getattr(config, "num_key_value_heads", None) or n_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        "n_vocab": config.vocab_size}, config.max_position_embeddings)

    def keys_of(tokens: npt.NDArray[np.int64],
                positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        device = _device(model.get_input_embeddings())
        ids, where = (torch.from_numpy(x)[None].to(device) for x in (tokens, positions))
        try:
            with torch.inference_mode():
                model(input_ids=ids, position_ids=where, use_cache=True,
                      **{_cache_argument(model): _FirstKeys()})
        except _FirstKeys.Seen as seen:
            return seen.args[0][0].float().cpu().numpy()
        raise Unsupported("%s does not use the cache that it is given" % type(model).__name__)
    check_keys(cache, keys_of)


def _rows(cache: Cache, layer: int, is_key: bool) -> torch.Tensor:
    """[1, n_kv_heads, longest head, head_dim] in bf16, or in f32 where rows are packed."""
    narrow = cache.dtype == "bf16"
    get = ((cache.keys if is_key else cache.values) if narrow else
           (cache.keys_f32 if is_key else cache.values_f32))
    out = np.zeros((1, cache.n_kv_heads, int(cache.n_rows[layer].max()), cache.head_dim),
                   np.int16 if narrow else np.float32)
    for head, n in enumerate(cache.n_rows[layer]):
        rows = get(layer, head)
        out[0, head, :n] = rows.view(np.int16) if narrow else rows
    tensor = torch.from_numpy(out)
    return tensor.view(torch.bfloat16) if narrow else tensor


def _rows_mask(cache: Cache, layer: int) -> Optional[torch.Tensor]:
    """Bias of the rows and minus infinity behind them, [1, n_heads, 1, longest head] f32."""
    n_rows = cache.n_rows[layer]
    if not cache.has_bias and n_rows.min() == n_rows.max():
        return None
    out = np.full((1, cache.n_kv_heads, 1, int(n_rows.max())), -np.inf, np.float32)
    for head, n in enumerate(n_rows):
        out[0, head, 0, :n] = cache.bias(layer, head) if cache.has_bias else 0
    return torch.from_numpy(out.repeat(cache.n_heads // cache.n_kv_heads, axis=1))


def _last_seen(cache: Cache, layer: int, window: Optional[int]) -> Optional[torch.Tensor]:
    """The last position whose window reaches back to each row, [1, n_heads, 1, longest head]."""
    if window is None:
        return None
    n_rows = cache.n_rows[layer]
    out = np.zeros((1, cache.n_kv_heads, 1, int(n_rows.max())), np.int64)
    for head, n in enumerate(n_rows):
        where = np.arange(n) if cache.renumbered else cache.positions(layer, head).astype(np.int64)
        out[0, head, 0, :n] = where + window - 1
    return torch.from_numpy(out.repeat(cache.n_heads // cache.n_kv_heads, axis=1))


def _layer(cache: Cache, index: int, window: Optional[int], alone: bool,
           like: torch.Tensor) -> StoredLayer:
    mask, last = _rows_mask(cache, index), _last_seen(cache, index, window)
    return StoredLayer(_rows(cache, index, True).to(like), _rows(cache, index, False).to(like),
                       cache.next_pos, mask if mask is None else mask.to(like),
                       last if last is None else last.to(like.device), alone)


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


def load(cache: Cache, model: Any, *, weights: Optional[str] = None) -> StoredCache:
    """A cache object for model.generate() with the rows of a larder.Cache, copied to the model's
    type and device. Close the larder.Cache when you like.

    ModelMismatch: the cache is another model's (with `weights`, a file, it must be the one that
    the cache was made with, byte by byte). Unsupported: attention that takes no mask per head.
    """
    if weights is not None:
        check_weights(cache, weights)
    _check_model(cache, model)
    modules = _attention_modules(model, cache.n_layers)
    windows = _windows(model, cache.n_layers)
    alone = not cache.rectangular or any(windows)
    attention = model.config._attn_implementation
    if alone and attention not in MASKING:
        raise Unsupported("the cache has a bias, heads of different length or sliding windows, and "
                          "the model's attention is '%s': model.set_attn_implementation('sdpa')"
                          % attention)
    layers = [_layer(cache, i, windows[i], alone,
                     torch.empty(0, dtype=model.dtype, device=_device(m)))
              for i, m in enumerate(modules)]
    for m in modules:
        if _mask_of_stored_rows not in m._forward_pre_hooks.values():
            m.register_forward_pre_hook(_mask_of_stored_rows, with_kwargs=True)
    return StoredCache(layers, cache.prompt([]), _cache_argument(model))


def question(cache: Cache, tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of what a prompt says behind the cache's document, such as tokenizer.
    apply_chat_template(messages, tokenize=False, add_generation_prompt=True) renders of document
    and question.

    ModelMismatch: the tokenizer is another than the cache's, or the prompt begins otherwise.
    """
    def read(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False,
                                clean_up_tokenization_spaces=False)
    return tokenizer(rest_of_prompt(cache, prompt, read), add_special_tokens=False).input_ids
