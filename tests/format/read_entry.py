#!/usr/bin/python3
"""A second reader of the store, written from store/FORMAT.md alone: no code of ours.

read_entry.py STORE_DIR KEY_HEX prints the entry as JSON: identity, rows, positions, a SHA-256 of
the K and V tile as stored of every (layer, KV head), and of the first and the last one as bf16.
"""
import hashlib
import json
import struct
import sys

import lmdb
import xxhash
import zstandard

MIB = 1 << 20
NAMES = ("namespace", "policy", "model", "template", "backend")


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        self.at += n
        return self.data[self.at - n:self.at]

    def num(self, fmt):
        return struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt)))[0]

    def varint(self):
        value = shift = 0
        while True:
            byte = self.num("B")
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


def manifest(data):
    assert hashlib.sha256(data[:-32]).digest() == data[-32:], "manifest hash"
    r, m = Reader(data[:-32]), {}
    assert r.num("I") == 0x4d44524c and r.num("I") == 1
    m["id"] = r.num("Q")
    for name in ("key", "model_fp", "tokenizer_fp", "template_fp"):
        m[name] = r.take(32).hex()
    for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "precision", "flags", "n_ctx", "next_pos", "n_vocab"):
        m[name] = r.num("I")
    m["sel_layer"] = r.num("i")
    for name in ("created", "prefill_ms", "text_len", "positions_len", "extra_len"):
        m[name] = r.num("Q")
    for name in NAMES:
        m[name] = r.take(r.num("H")).decode()
    m["rows"] = [r.num("I") for _ in range(m["n_layers"] * m["n_kv_heads"])]
    m["extents"] = [(r.num("B"), r.num("B"), r.num("H"), r.num("I"), r.num("I"), r.take(16)) for _ in range(r.num("I"))]
    assert r.at == len(r.data)
    return m


def inflate(frame, size):
    out = zstandard.ZstdDecompressor().decompress(frame)
    assert len(out) == size
    return out


def channel_bases(r, n):
    """The base of each of n values."""
    bases = bytearray()
    for _ in range(r.num("H")):
        elements, width = r.num("I"), r.num("H")
        base = r.take(width)
        bases += (base * (elements // width + 1))[:elements]
    assert len(bases) == n, "channels"
    return bases


def low_bits(group):
    return [group[i % 16] >> i // 16 * 2 & 3 for i in range(64)]


def untier(coded, n):
    r = Reader(coded)
    m, first, second = r.num("I"), r.take(3), r.take(7)
    assert r.num("H") == 0
    ones = [c for _ in range(-(-n // 64)) for c in low_bits(r.take(16))]
    twos = []
    for _ in range(-(-m // 64)):
        low, third = low_bits(r.take(16)), r.num("Q")
        twos += [c | (third >> i & 1) << 2 for i, c in enumerate(low)]
    escaped = iter([second[c] if c < 7 else r.take(1)[0] for c in twos])
    assert ones.count(3) == m and r.at == len(coded), "tiers"
    return [first[c] if c < 3 else next(escaped) for c in ones][:n]


def decode(codec, stored, raw_len):
    if codec == 0:
        return stored
    if codec == 2:
        return inflate(stored, raw_len)
    r, n = Reader(stored), raw_len // 2
    coded_len = r.num("I")
    bases = channel_bases(r, n)
    coded, rest = r.take(coded_len), r.take(n)
    assert codec in (1, 3) and r.at == len(stored), "planes"
    exponent = inflate(coded, n) if codec == 1 else untier(coded, n)
    out = bytearray(raw_len)
    for i in range(n):
        e = (exponent[i] + bases[i]) & 255
        struct.pack_into("<H", out, 2 * i, e << 7 | rest[i] >> 1 | (rest[i] & 1) << 15)
    return bytes(out)


def streams(txn, extents, m):
    out = [b"", b""]
    for index, (stream, codec, _, raw_len, stored_len, digest) in enumerate(m["extents"]):
        stored = txn.get(struct.pack(">QI", m["id"], index), db=extents)
        assert len(stored) == stored_len
        raw = decode(codec, bytes(stored), raw_len)
        assert len(raw) == raw_len <= MIB and xxhash.xxh3_128(raw).digest() == digest, "extent hash"
        out[stream] += raw
    return out


def positions(data, m):
    r, out = Reader(data), []
    for rows in m["rows"]:
        runs, at, mine = r.varint(), 0, []
        if not runs and rows:
            mine = next(p for p in reversed(out) if p)
        for _ in range(runs):
            at += r.varint()
            length = r.varint() + 1
            mine = mine + list(range(at, at + length))
            at += length
        assert len(mine) == rows
        out.append(mine)
    return out


def tile_bytes(precision, keys, rows, dim):
    exact, packed = min(4, rows), rows - min(4, rows)
    if precision == 1:
        return 2 * rows * dim
    if precision == 4:
        return 2 * exact * dim + 2 * ((dim if packed else 0) if keys else packed) + packed * dim
    assert precision == 5, "unknown precision"
    pairs = -(-packed // 32) * dim if keys else packed * -(-dim // 32)
    return 2 * exact * dim + 4 * pairs + packed * dim // 2


def bf16(x):
    """The bits of a number, rounded to f32 and then to the nearest bf16, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16


def expand(precision, keys, rows, dim, tile):
    """A tile as bf16 bytes. Products are exact in f32, and sums are rounded once by bf16()."""
    if precision == 1:
        return tile
    exact, packed = min(4, rows), rows - min(4, rows)
    r = Reader(tile)
    out = list(struct.unpack("<%dH" % (exact * dim), r.take(2 * exact * dim)))
    if precision == 4:
        count = (dim if packed else 0) if keys else packed
        steps = struct.unpack("<%de" % count, r.take(2 * count))
        codes = struct.unpack("<%db" % (packed * dim), r.take(packed * dim))
        out += [bf16(q * steps[i % dim if keys else i // dim]) for i, q in enumerate(codes)]
    else:
        groups = -(-dim // 32)
        count = -(-packed // 32) * dim if keys else packed * groups
        scales = struct.unpack("<%de" % (2 * count), r.take(4 * count))
        codes = r.take(packed * dim // 2)
        for i in range(packed * dim):
            row, c = divmod(i, dim)
            at = row // 32 * dim + c if keys else row * groups + c // 32
            out.append(bf16(scales[2 * at] + (codes[i // 2] >> i % 2 * 4 & 15) * scales[2 * at + 1]))
    assert r.at == len(tile)
    return struct.pack("<%dH" % (rows * dim), *out)


def main():
    env = lmdb.open(sys.argv[1], readonly=True, max_dbs=16, lock=False)
    entries, extents = env.open_db(b"entries", create=False), env.open_db(b"extents", create=False)
    with env.begin() as txn:
        m = manifest(bytes(txn.get(bytes.fromhex(sys.argv[2]), db=entries)))
        rows, aux = streams(txn, extents, m)
    a = Reader(aux)
    m["tokens"] = list(struct.unpack("<%dI" % m["n_ctx"], a.take(4 * m["n_ctx"])))
    m["text"] = a.take(m["text_len"]).decode()
    m["positions"] = positions(a.take(m["positions_len"]), m)
    m["logits"] = list(struct.unpack("<%de" % m["n_vocab"], a.take(2 * m["n_vocab"])))
    m["extra"] = json.loads(a.take(m["extra_len"]))
    r = Reader(rows)
    m["k"], m["v"], m["bf16"] = [], [], {}
    for i, n in enumerate(m["rows"]):
        for name in ("k", "v"):
            shape = m["precision"], name == "k", n, m["head_dim"]
            tile = r.take(tile_bytes(*shape))
            m[name].append(hashlib.sha256(tile).hexdigest())
            if i in (0, len(m["rows"]) - 1):
                m["bf16"]["%s%d" % (name, i)] = hashlib.sha256(expand(*shape, tile)).hexdigest()
        r.take(2 * n if m["flags"] & 1 else 0)
    assert r.at == len(rows)
    m["row_codecs"] = sorted({codec for stream, codec, *_ in m["extents"] if stream == 0})
    m["extents"] = len(m["extents"])
    json.dump(m, sys.stdout)


if __name__ == "__main__":
    main()
