"""Packed rows: tiles of int8 and int4 codes (FORMAT.md, "Packed tiles") as float32.

The one idea: a tile is its exact first rows (bf16), steps and minima (f16), and codes; each part
is a numpy view whose place follows from the counts, and x = code * step (+ minimum) is computed in
float32 as larder's own decoder does, without the last rounding to bf16.
"""
from __future__ import annotations

import numpy as np
import numpy.typing as npt

EXACT_ROWS = 4
GROUP = 32
BITS = {"int8": 8, "int4": 4}


def widen(bits: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """float32 of the same shape from bf16 bit patterns (uint16): exact."""
    wide = np.asarray(bits, dtype=np.uint16).astype(np.uint32)
    return (wide << np.uint32(16)).view(np.float32)


def _scale_bytes(dtype: str, is_key: bool, n_packed: int, head_dim: int) -> int:
    if dtype == "int4":
        groups = -(-n_packed // GROUP) * head_dim if is_key else n_packed * -(-head_dim // GROUP)
        return 4 * groups
    if is_key:
        return 2 * head_dim if n_packed else 0
    return 2 * n_packed


def tile_bytes(dtype: str, is_key: bool, n_rows: int, head_dim: int) -> int:
    """Bytes of a K or V tile of n_rows rows; dtype is "int8" or "int4"."""
    n_exact = min(EXACT_ROWS, n_rows)
    n_packed = n_rows - n_exact
    return (2 * n_exact * head_dim + _scale_bytes(dtype, is_key, n_packed, head_dim) +
            n_packed * head_dim * BITS[dtype] // 8)


def _nibbles(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """int4 codes one a byte: the even one is the low nibble."""
    return np.stack((codes & 15, codes >> 4), axis=-1).reshape(-1)


def _scales(raw: npt.NDArray[np.uint8], dtype: str, is_key: bool, n_packed: int,
            head_dim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Minimum and step of each element, broadcastable to [n_packed, head_dim]."""
    numbers = raw.view("<f2").astype(np.float32)
    if dtype == "int8":
        return np.float32(0), numbers if is_key else numbers[:, None]
    if is_key:  # groups of rows: [groups][head_dim][2], each for 32 rows
        pairs = numbers.reshape(-1, head_dim, 2).repeat(GROUP, axis=0)[:n_packed]
    else:  # groups of channels: [n_packed][groups][2], each for 32 channels
        pairs = numbers.reshape(n_packed, -1, 2).repeat(GROUP, axis=1)[:, :head_dim]
    return pairs[..., 0], pairs[..., 1]


def expand(tile: npt.NDArray[np.uint8], dtype: str, is_key: bool, n_rows: int,
           head_dim: int) -> npt.NDArray[np.float32]:
    """Rows of a tile, [n_rows, head_dim] float32."""
    n_exact = min(EXACT_ROWS, n_rows)
    n_packed = n_rows - n_exact
    rows = np.empty((n_rows, head_dim), dtype=np.float32)
    scales_at = 2 * n_exact * head_dim
    codes_at = scales_at + _scale_bytes(dtype, is_key, n_packed, head_dim)
    raw = np.ascontiguousarray(tile)
    rows[:n_exact] = widen(raw[:scales_at].view("<u2")).reshape(n_exact, head_dim)
    if not n_packed:
        return rows
    codes = raw[codes_at:].view(np.int8) if dtype == "int8" else _nibbles(raw[codes_at:])
    low, step = _scales(raw[scales_at:codes_at], dtype, is_key, n_packed, head_dim)
    rows[n_exact:] = codes.reshape(n_packed, head_dim).astype(np.float32) * step + low
    return rows
