#!/usr/bin/env python3
"""Write a GGUF file of random weights in the shape of Llama-3.1-8B (or what the options say).

For speed only: nothing is downloaded, and what the model says means nothing. Matrices are Q4_0,
one random pattern over and over whose length is prime in blocks, so that no two rows are
alike; written as a stream, in little memory. Positions rotate without scaling.
"""
import argparse
import os
import random
import struct
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden"))
import gguf_file
from gguf_file import F32

Q4_0 = 2
BLOCK, BLOCK_BYTES = 32, 18
PATTERN_BLOCKS = 233021  # 4 MB, prime
CHUNK = 64  # patterns written at once


def metadata(a):
    tokens = gguf_file.byte_tokens() + ["<%d>" % i for i in range(256, a.vocab)]
    return gguf_file.llama_keys("random weights", tokens, block_count=a.layers,
                                embedding_length=a.hidden, feed_forward_length=a.ff,
                                context_length=a.positions, heads=a.heads, kv_heads=a.kv_heads,
                                head_dim=a.head_dim, theta=5e5, eps=1e-5)


def tensors(a):
    """(name, dims in the file's order, type)"""
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    yield "token_embd", (a.hidden, a.vocab), Q4_0
    yield "output_norm", (a.hidden,), F32
    yield "output", (a.hidden, a.vocab), Q4_0
    for i in range(a.layers):
        for name, dims, kind in (("attn_norm", (a.hidden,), F32), ("attn_q", (a.hidden, q), Q4_0),
                                 ("attn_k", (a.hidden, kv), Q4_0), ("attn_v", (a.hidden, kv), Q4_0),
                                 ("attn_output", (q, a.hidden), Q4_0), ("ffn_norm", (a.hidden,), F32),
                                 ("ffn_gate", (a.hidden, a.ff), Q4_0),
                                 ("ffn_up", (a.hidden, a.ff), Q4_0),
                                 ("ffn_down", (a.ff, a.hidden), Q4_0)):
            yield "blk.%d.%s" % (i, name), dims, kind


def n_elements(dims):
    return dims[0] * (dims[1] if len(dims) > 1 else 1)


def n_bytes(dims, kind):
    n = n_elements(dims)
    return 4 * n if kind == F32 else n // BLOCK * BLOCK_BYTES


def make_pattern(seed, hidden):
    """Blocks whose elements have a standard deviation of 1 / sqrt(hidden)."""
    scale = struct.pack("<e", 1 / (4.6 * hidden ** 0.5))
    codes = random.Random(seed).randbytes(16 * PATTERN_BLOCKS)
    return b"".join(scale + codes[16 * i:16 * i + 16] for i in range(PATTERN_BLOCKS))


def write(path, a):
    keys, table, at = metadata(a), [], 0
    for name, dims, kind in tensors(a):
        table.append(gguf_file.entry(name, dims, kind, at))
        at += -(-n_bytes(dims, kind) // 32) * 32
    many = make_pattern(a.seed, a.hidden) * CHUNK
    with open(path, "wb") as f:
        f.write(gguf_file.head(keys, len(table), b"".join(table)))
        for _, dims, kind in tensors(a):
            left = n_bytes(dims, kind)
            if kind == F32:
                f.write(struct.pack("<f", 1) * n_elements(dims))
            while kind != F32 and left:
                left -= f.write(memoryview(many)[:left])
            f.write(bytes(-n_bytes(dims, kind) % 32))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("out")
    for name, value in (("layers", 32), ("hidden", 4096), ("ff", 14336), ("heads", 32),
                        ("kv-heads", 8), ("head-dim", 128), ("vocab", 128256),
                        ("positions", 132096), ("seed", 1)):
        p.add_argument("--" + name, type=int, default=value)
    a = p.parse_args()
    write(a.out, a)


if __name__ == "__main__":
    main()
