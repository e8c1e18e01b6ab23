"""Cache: a mapped image (IMAGE.md) as numpy arrays, without a copy.

The one idea: liblarder maps and checks the image; the same sealed file is then mapped once more
through Python's mmap, and every array is a view of that mapping and holds it. So arrays stay valid
as long as they are there, after the lease, the connection and the daemon have ended. Offsets are
those that the library's checked pointers have from its own mapping.
"""
from __future__ import annotations

import ctypes as c
import mmap
import warnings
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import numpy.typing as npt

from . import packed
from .errors import InvalidArgument, Unsupported
from .library import Lease, Rows, library
from .objects import Entry, entry_from

if TYPE_CHECKING:
    from .client import Client

DTYPES = {1: "bf16", 2: "f16", 3: "f32", 4: "int8", 5: "int4"}
NUMPY_TYPES = {"bf16": "<u2", "f16": "<f2", "f32": "<f4"}
HAS_BIAS, RENUMBERED = 1, 2


class Cache:
    """A leased image. Reading is for any thread; arrays are read-only and outlive close().

    Geometry: n_layers, n_heads, n_kv_heads, head_dim, n_vocab; query head h reads KV head
    h // (n_heads // n_kv_heads). n_ctx: tokens of the document. next_pos: position of the first
    new token. dtype: "bf16", or "int8" and "int4" where packed rows were asked for. has_bias: a
    bias is to be added to each row's attention logit. renumbered: keys are rotated by row index,
    not by position. key and fingerprints are hex digits. n_rows: int array [n_layers, n_kv_heads].
    """

    def __init__(self, client: "Client", lease: Lease):
        im = lease.image
        self._client, self._lease = client, lease
        self._map: Optional[mmap.mmap] = None
        self.entry: Entry = entry_from(lease.entry)
        self.n_layers, self.n_heads, self.n_kv_heads = im.n_layers, im.n_heads, im.n_kv_heads
        self.head_dim, self.n_vocab, self.n_ctx, self.next_pos = (im.head_dim, im.n_vocab,
                                                                  im.n_ctx, im.next_pos)
        self.has_bias, self.renumbered = bool(im.flags & HAS_BIAS), bool(im.flags & RENUMBERED)
        self.key = bytes(im.key).hex()
        self.model_fingerprint = bytes(im.model_fingerprint).hex()
        self.tokenizer_fingerprint = bytes(im.tokenizer_fingerprint).hex()
        try:
            if im.dtype not in DTYPES:
                raise Unsupported("this package does not know rows of type %d" % im.dtype)
            self.dtype = DTYPES[im.dtype]
            self._map = mmap.mmap(lease.fd, im.n_bytes, prot=mmap.PROT_READ)
            rows = library().larder_image_rows
            self._rows: list[Rows] = [rows(c.byref(im), layer, head)
                                      for layer in range(im.n_layers)
                                      for head in range(im.n_kv_heads)]
        except BaseException:
            self.close()
            raise
        self.n_rows: npt.NDArray[np.int64] = np.array(
            [r.n_rows for r in self._rows]).reshape(im.n_layers, im.n_kv_heads)
        self._base, self._image = im.base, (im.tokens_off, im.text_off, im.text_len,
                                            im.logits_off)

    # ---- the lease

    def close(self) -> None:
        """Give the lease back. Arrays that were taken stay valid, new ones are refused."""
        lease, self._lease, self._map = self._lease, None, None
        if lease is not None:
            self._client._release(lease)

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        lease = getattr(self, "_lease", None)
        if lease is not None:
            warnings.warn("a larder.Cache was not closed; use 'with'", ResourceWarning)
            library().larder_release(None, c.byref(lease), 0, None)

    # ---- arrays

    def _view(self, offset: int, dtype: str, shape: Any) -> npt.NDArray[Any]:
        if self._map is None:
            raise InvalidArgument("this Cache is closed")
        return np.ndarray(shape, dtype=dtype, buffer=self._map, offset=offset)

    def _record(self, layer: int, head: int) -> Rows:
        if not (0 <= layer < self.n_layers and 0 <= head < self.n_kv_heads):
            raise InvalidArgument("layer %d, KV head %d: the cache has %d layers and %d KV heads"
                                  % (layer, head, self.n_layers, self.n_kv_heads))
        return self._rows[layer * self.n_kv_heads + head]

    def _elements(self, pointer: int, n_rows: int, is_key: bool) -> npt.NDArray[Any]:
        offset = pointer - self._base
        if self.dtype in packed.BITS:
            size = packed.tile_bytes(self.dtype, is_key, n_rows, self.head_dim)
            return self._view(offset, "u1", (size,))
        return self._view(offset, NUMPY_TYPES[self.dtype], (n_rows, self.head_dim))

    def keys(self, layer: int, head: int) -> npt.NDArray[Any]:
        """K of a KV head after RoPE (rotate-half order): [rows, head_dim] of uint16 bf16 bits
        (widen() makes float32 of them), or the bytes of a packed tile."""
        r = self._record(layer, head)
        return self._elements(r.k, r.n_rows, True)

    def values(self, layer: int, head: int) -> npt.NDArray[Any]:
        """V of a KV head, as keys()."""
        r = self._record(layer, head)
        return self._elements(r.v, r.n_rows, False)

    def _f32(self, raw: npt.NDArray[Any], n_rows: int, is_key: bool) -> npt.NDArray[np.float32]:
        if self.dtype in packed.BITS:
            return packed.expand(raw, self.dtype, is_key, n_rows, self.head_dim)
        return packed.widen(raw) if self.dtype == "bf16" else raw.astype(np.float32)

    def keys_f32(self, layer: int, head: int) -> npt.NDArray[np.float32]:
        """K as float32 [rows, head_dim], of rows of any type: a copy."""
        return self._f32(self.keys(layer, head), self._record(layer, head).n_rows, True)

    def values_f32(self, layer: int, head: int) -> npt.NDArray[np.float32]:
        """V as float32 [rows, head_dim], of rows of any type: a copy."""
        return self._f32(self.values(layer, head), self._record(layer, head).n_rows, False)

    def positions(self, layer: int, head: int) -> npt.NDArray[np.uint32]:
        """Positions of the rows in the document, ascending."""
        r = self._record(layer, head)
        return self._view(r.position - self._base, "<u4", (r.n_rows,))

    def bias(self, layer: int, head: int) -> Optional[npt.NDArray[np.float32]]:
        """To be added to the attention logit of each row; None: nothing."""
        r = self._record(layer, head)
        return self._view(r.bias - self._base, "<f4", (r.n_rows,)) if self.has_bias else None

    @property
    def tokens(self) -> npt.NDArray[np.uint32]:
        """Token ids of the document, [n_ctx]."""
        return self._view(self._image[0], "<u4", (self.n_ctx,))

    @property
    def text(self) -> str:
        """The rendered document: what was tokenised."""
        return bytes(self._view(self._image[1], "u1", (self._image[2],))).decode()

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Of the document's last row, [n_vocab]: they choose the token at next_pos."""
        return self._view(self._image[3], "<f4", (self.n_vocab,))

    # ---- for decoders

    @property
    def rectangular(self) -> bool:
        """Have all layers and heads the same number of rows, and none a bias?"""
        return not self.has_bias and int(self.n_rows.min()) == int(self.n_rows.max())

    def prompt(self, question: npt.ArrayLike) -> npt.NDArray[np.uint32]:
        """The ids that a decoder takes for document and question: next_pos ids that stand for the
        document, then the question's. They are the document's own ids wherever these count
        positions; a renumbered cache has fewer, so they are cut to its length."""
        ids = np.resize(self.tokens, self.next_pos)
        return np.concatenate([ids, np.asarray(question, dtype=np.uint32)])
