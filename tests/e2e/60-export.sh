#!/bin/bash
# Entries leave as files that others can read.
. "$(dirname "$0")/lib.sh"
head -c 1500 "$docs/doc_a700.txt" >"$dir/doc"
cat >"$dir/tensors.py" <<'PY'
# Reads a safetensors file by its specification alone, and compares it with an exported image.
import json, struct, sys

st, image = (open(p, "rb").read() for p in sys.argv[1:3])
n = struct.unpack("<Q", st[:8])[0]
header, data = json.loads(st[8:8 + n]), st[8 + n:]
meta = header.pop("__metadata__")
assert n % 8 == 0 and all(isinstance(v, str) for v in meta.values()), meta
width = {"U8": 1, "BF16": 2, "U32": 4, "F32": 4}
end = 0
for name, t in header.items():
    a, b = t["data_offsets"]
    size = width[t["dtype"]]
    for d in t["shape"]:
        size *= d
    assert a == end and b == a + size, (name, t)
    end = b
assert end == len(data)


def tensor(name):
    a, b = header[name]["data_offsets"]
    return data[a:b]


u32 = lambda at: struct.unpack_from("<I", image, at)[0]
u64 = lambda at: struct.unpack_from("<Q", image, at)[0]
flags, dtype, layers, kv, dim, n_ctx = u32(24), u32(28), u32(32), u32(40), u32(44), u32(48)
assert meta["key"] == image[128:160].hex() and meta["model_fingerprint"] == image[160:192].hex()
assert [int(meta[k]) for k in ("n_layers", "n_kv_heads", "head_dim", "n_ctx", "next_pos")] == [
    layers, kv, dim, n_ctx, u32(52)]
assert tensor("tokens") == image[u64(72):][:4 * n_ctx]
assert tensor("logits") == image[u64(88):][:4 * u32(56)]
assert meta["text"].encode() == image[u64(80):][:u64(64)]
for i in range(layers * kv):
    at = u64(96) + 40 * i
    name = "layers.%d.heads.%d." % divmod(i, kv)
    rows = u32(at)
    assert tensor(name + "position") == image[u64(at + 24):][:4 * rows]
    if flags & 1:
        assert tensor(name + "bias") == image[u64(at + 32):][:4 * rows]
    for what, off in (("k", 8), ("v", 16)):
        t = header[name + what]
        assert t["shape"] == [rows, dim] and t["dtype"] == "BF16" if dtype == 1 else t["dtype"] == "U8"
        got = tensor(name + what)
        assert got == image[u64(at + off):][:len(got)]
assert (name + "bias" in header) == bool(flags & 1)
try:
    import safetensors
except ImportError:
    sys.exit(0)
with safetensors.safe_open(sys.argv[1], "np") as f:
    assert set(f.keys()) == set(header) and f.metadata() == meta
PY

put() { larder put "$dir/doc" --name "$1" --policy "$2" --wait; }
both() { # NAME [--packed]
    larder export "$1" --format image -o "$dir/$1.img" --force "${@:2}" &&
        larder export "$1" -o "$dir/$1.st" --force "${@:2}" && python3 "$dir/tensors.py" "$dir/$1.st" "$dir/$1.img"
}
claim "the daemon starts" start_daemon
claim "a full entry is stored" put full full
claim "an entry of asl is stored" put asl asl,rows=50%,lmin=14,tau=0.8
claim "an entry with biases, heads of different length and four bits is stored" put offline matching,rows=25%,shape=global,precision=int4
for n in full asl offline; do
    claim "$n: its tensors are those of its image" both $n
done
claim "offline, packed: its tiles are those of its image" both offline --packed
as_fetched() {
    larder export asl --format image -o - >"$dir/piped" && cmp "$dir/piped" "$dir/asl.img" &&
        same size "$(stat -c %s "$dir/piped")" "$(larder show asl --json | field image_bytes)"
}
claim "an image goes to standard output, too" as_fetched

kept() { cp "$dir/full.st" "$dir/was" && fails_with LARDER_EINVAL larder export asl -o "$dir/full.st" && cmp "$dir/was" "$dir/full.st"; }
claim "a file that exists is left alone" kept
no_rest() { same files "$(ls "$dir" | grep -c '\.\(st\|img\)\.')" 0; }
claim "nothing is left beside the files" no_rest
claim "a directory that is not there is an error" fails_with LARDER_EIO larder export asl -o "$dir/none/x"
claim "so is an entry that is not there" fails_with LARDER_ENOTFOUND larder export nobody -o "$dir/x"
bad_format() { larder export asl --format pickle -o "$dir/x" 2>"$dir/e"; [ $? -eq 2 ] && grep -q "'pickle'" "$dir/e"; }
claim "so is a format that is not known" bad_format
exit $rc
