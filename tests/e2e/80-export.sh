#!/bin/bash
# Entries leave as files that others can read, and come back as entries that nobody takes for the
# daemon's own work.
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

cat >"$dir/arrays.py" <<'PY'
# Reads a NumPy archive as numpy does, and compares every number with an exported image.
import json, struct, sys, zipfile
import numpy as np

z, image = np.load(sys.argv[1]), open(sys.argv[2], "rb").read()
with zipfile.ZipFile(sys.argv[1]) as f:
    assert f.testzip() is None and all(i.compress_type == zipfile.ZIP_STORED for i in f.infolist())
u32 = lambda at: struct.unpack_from("<I", image, at)[0]
u64 = lambda at: struct.unpack_from("<Q", image, at)[0]
flags, layers, kv, dim, n_ctx, n_vocab = u32(24), u32(32), u32(40), u32(44), u32(48), u32(56)
meta = json.loads(z["metadata"].item())
assert meta["format"] == "larder-hf-npz-1" and meta["key"] == image[128:160].hex(), meta
assert [meta[k] for k in ("n_layers", "n_kv_heads", "head_dim", "n_ctx", "next_pos", "has_bias")] == [
    layers, kv, dim, n_ctx, u32(52), bool(flags & 1)]
assert meta["text"].encode() == image[u64(80):][:u64(64)]
array = lambda dtype, n, at: np.frombuffer(image, dtype, n, at)
same = lambda a, b: np.array_equal(a, b) and np.array_equal(np.signbit(a), np.signbit(b))
assert z["tokens"].dtype == np.int64 and np.array_equal(z["tokens"], array("<u4", n_ctx, u64(72)))
assert z["logits"].dtype == np.float32 and same(z["logits"], array("<f4", n_vocab, u64(88)))
seen, ragged = {"metadata", "tokens", "logits"}, 0
for layer in range(layers):
    heads = [struct.unpack_from("<IIQQQQ", image, u64(96) + 40 * (layer * kv + g)) for g in range(kv)]
    most = max(h[0] for h in heads)
    some_less = min(h[0] for h in heads) < most
    ragged += some_less
    position = z[f"position.{layer}"]
    assert position.shape == (kv, most) and position.dtype == np.int64
    seen |= {f"{what}.{layer}" for what in ("key", "value", "position")}
    if flags & 1 or some_less:
        seen.add(f"bias.{layer}")
        assert z[f"bias.{layer}"].shape == (1, kv, 1, most) and z[f"bias.{layer}"].dtype == np.float32
    for g, (n, _, k, v, pos, bias) in enumerate(heads):
        assert np.array_equal(position[g, :n], array("<u4", n, pos)) and (position[g, n:] == -1).all()
        if f"bias.{layer}" in seen:
            b = z[f"bias.{layer}"][0, g, 0]
            assert same(b[:n], array("<f4", n, bias) if flags & 1 else np.zeros(n)) and (b[n:] == -np.inf).all()
        for what, at in (("key", k), ("value", v)):
            a = z[f"{what}.{layer}"]
            assert a.shape == (1, kv, most, dim) and a.dtype == np.float32
            rows = (array("<u2", n * dim, at).astype(np.uint32) << 16).view(np.float32)
            assert same(a[0, g, :n], rows.reshape(n, dim)) and not a[0, g, n:].any()
assert set(z.files) == seen, set(z.files) ^ seen
assert bool(ragged) == (sys.argv[3] == "ragged"), ragged
PY

put() { larder put "$dir/doc" --name "$1" --policy "$2" --wait; }
both() { # NAME [--packed]
    larder export "$1" --format image -o "$dir/$1.img" --force "${@:2}" &&
        larder export "$1" -o "$dir/$1.st" --force "${@:2}" && python3 "$dir/tensors.py" "$dir/$1.st" "$dir/$1.img"
}
claim "the daemon starts" start_daemon
claim "a full entry is stored" put full full
claim "an entry of asl is stored" put asl asl,rows=50%,lmin=14,tau=0.8
claim "an entry with heads of different length is stored" put ragged keydiff,rows=25%,shape=global
claim "an entry with biases and four bits is stored" put fitted matching,rows=25%,shape=uniform,precision=int4
for n in full asl ragged fitted; do
    claim "$n: its tensors are those of its image" both $n
done
numpy() {
    larder export "$1" --format hf-npz -o "$dir/$1.npz" && larder export "$1" --format hf-npz -o - >"$dir/piped" &&
        cmp "$dir/piped" "$dir/$1.npz" && /usr/bin/python3 "$dir/arrays.py" "$dir/$1.npz" "$dir/$1.img" "$1"
}
for n in full asl ragged fitted; do
    claim "$n: numpy reads every row of its image" numpy $n
done
no_tiles() { fails_with LARDER_EUNSUPPORTED larder export fitted --packed --format hf-npz -o "$dir/x" && [ ! -e "$dir/x" ]; }
claim "packed tiles are no arrays" no_tiles
full() {
    ! larder export asl --format hf-npz -o - 2>"$dir/e" >/dev/full && same lines "$(wc -l <"$dir/e")" 1 && grep -q LARDER_EIO "$dir/e"
}
claim "an archive that does not fit is an error" full
claim "fitted, packed: its tiles are those of its image" both fitted --packed
as_fetched() {
    larder export asl --format image -o - >"$dir/piped" && cmp "$dir/piped" "$dir/asl.img" &&
        same size "$(stat -c %s "$dir/piped")" "$(larder show asl --json | field image_bytes)"
}
claim "an image goes to standard output, too" as_fetched

kept() { cp "$dir/full.st" "$dir/was" && fails_with LARDER_EINVAL larder export asl -o "$dir/full.st" && cmp "$dir/was" "$dir/full.st"; }
claim "a file that exists is left alone" kept
no_rest() { same files "$(ls "$dir" | grep -c '\.\(st\|img\|npz\)\.')" 0; }
claim "nothing is left beside the files" no_rest
claim "a directory that is not there is an error" fails_with LARDER_EIO larder export asl -o "$dir/none/x"
claim "so is an entry that is not there" fails_with LARDER_ENOTFOUND larder export nobody -o "$dir/x"
bad_format() { larder export asl --format pickle -o "$dir/x" 2>"$dir/e"; [ $? -eq 2 ] && grep -q "'pickle'" "$dir/e"; }
claim "so is a format that is not known" bad_format

# ---- and back, into another store
ask() { larder ask "$1" "What is the name of the programming language?" --max-new 8 --json | field generated_ids; }
for n in full asl ragged fitted; do
    ask $n >"$dir/$n.answer"
    larder show $n --json | field key >"$dir/$n.key"
done
larder export fitted --packed -o "$dir/packed.st"
claim "the daemon stops" stop_daemon TERM
rm -rf "$dir/d"
claim "another one starts, which takes no imports" start_daemon --set allow_import=no
claim "and says so" fails_with LARDER_EUNSUPPORTED larder import "$dir/full.st"
stop_daemon TERM
claim "it starts with a store that takes them" start_daemon

cat >"$dir/damage.py" <<'PY'
import json, struct, sys

kind, source, target = sys.argv[1:]
b = open(source, "rb").read()
n = struct.unpack("<Q", b[:8])[0]
h, data = json.loads(b[8:8 + n]), bytearray(b[8 + n:])
last = "layers.29.heads.2."
meta = h["__metadata__"]
if kind == "short":
    del data[-1:]
elif kind == "offset":
    h["logits"]["data_offsets"][0] -= 4
elif kind == "dtype":
    h[last + "v"]["dtype"] = "F16"
elif kind == "bias":
    at = h[last + "bias"]["data_offsets"][0]
    data[at:at + 4] = struct.pack("<f", float("nan"))
elif kind == "row":
    at = h[last + "k"]["data_offsets"][0]
    data[at:at + 2] = b"\x80\x7f"
elif kind == "position":
    at = h[last + "position"]["data_offsets"][0]
    data[at:at + 4] = struct.pack("<I", 1 << 20)
elif kind == "key":
    meta["key"] = "0" * 64
elif kind == "policy":
    meta["policy"] = "full"
elif kind == "missing":
    del h[last + "v"]
elif kind == "more":
    h["x"] = dict(h[last + "v"])
elif kind == "meta":
    meta["x"] = "y"
text = json.dumps(h).encode()
length = len(text)
if kind == "length":
    length = 1 << 60
if kind == "twice":
    text = text[:-1] + b', "tokens": 1}'
    length = len(text)
open(target, "wb").write(struct.pack("<Q", length) + text + data)
PY
refused() { # KIND STATUS
    python3 "$dir/damage.py" "$1" "$dir/fitted.st" "$dir/bad.st" && fails_with "$2" larder import "$dir/bad.st" &&
        same entries "$(larder status --json | field store.entries)" 0
}
for k in short offset dtype key policy missing more meta length twice; do
    claim "a damaged file is refused: $k" refused $k LARDER_EINVAL
done
claim "a damaged file is refused: position" refused position LARDER_E
claim "a bias that is not finite is refused" refused bias LARDER_E
claim "a row that is not finite is refused" refused row LARDER_ENUMERIC
undamaged() { python3 "$dir/damage.py" none "$dir/asl.st" "$dir/good.st" && larder import "$dir/good.st" && larder rm asl; }
claim "the same file without damage is not" undamaged

hollow() { # an entry of which a layer keeps nothing
    python3 -c 'import sys
sys.path.insert(0, "tests/e2e")
import hostile_import as h
h.write(sys.argv[2], *h.Entry(name="hollow", rows=(0, 0, 5, 2), bias=sys.argv[3] == "ragged").safetensors())' \
        "$LARDER_SOCKET" "$dir/hollow.st" "$1" && larder import "$dir/hollow.st" 2>/dev/null &&
        larder export hollow --format image -o "$dir/hollow.img" --force && larder export hollow --format hf-npz -o "$dir/hollow.npz" --force &&
        /usr/bin/python3 "$dir/arrays.py" "$dir/hollow.npz" "$dir/hollow.img" ragged && larder rm hollow
}
claim "numpy reads an entry of which a layer keeps nothing" hollow ragged
claim "and one of these without biases" hollow none
comes_back() { # NAME
    larder import "$dir/$1.st" --json >"$dir/in" && same known "$(field model_known <"$dir/in")" True &&
        same imported "$(larder show "$1" --json | field imported)" True && larder show "$1" | grep -q "^imported" &&
        larder show "$1" --json | field policy | grep -q ',imported=[0-9a-f]\{16\}$' &&
        larder export "$1" --format image -o "$dir/back.img" --force &&
        cmp <(head -c 128 "$dir/back.img") <(head -c 128 "$dir/$1.img") &&
        cmp <(tail -c +161 "$dir/back.img") <(tail -c +161 "$dir/$1.img") && same answer "$(ask "$1")" "$(cat "$dir/$1.answer")"
}
claim "full: comes back, byte for byte but for its key, and answers as before" comes_back full
claim "asl: does, too" comes_back asl
claim "heads of different length: do, too" comes_back ragged
# as tiles: bf16 rows of an int4 entry are rounded once more, so another answer is possible
packed() {
    larder import "$dir/packed.st" && larder export fitted --packed -o "$dir/again.st" --force &&
        python3 - "$dir/packed.st" "$dir/again.st" <<'PY'
import json, struct, sys

def data(path):
    b = open(path, "rb").read()
    return b[8 + struct.unpack("<Q", b[:8])[0]:]

assert data(sys.argv[1]) == data(sys.argv[2])
PY
}
claim "packed rows come back as they were" packed
answers() { ask fitted >"$dir/now" && [ -s "$dir/now" ] && cmp "$dir/now" "$dir/fitted.answer"; }
claim "and answer as before" answers
claim "verify finds every byte good" larder verify
not_found() { fails_with LARDER_ENOTFOUND larder show "$(cat "$dir/full.key")"; }
claim "nobody finds it under the key of the computed one" not_found
other() { same reason "$(larder explain-miss --file "$dir/doc" --policy full --json | field reason)" other_policy; }
claim "nor as the answer to its policy" other
finds() { # POLICY: the key that a look-up of the document's tokens gives
    larder show full --tokens >"$dir/ids" && python3 -c 'import sys
sys.path.insert(0, "tests/e2e")
import hostile_import
print(hostile_import.finds([int(i) for i in open(sys.argv[2]).read().split()], policy=sys.argv[3]))' \
        "$LARDER_SOCKET" "$dir/ids" "$1"
}
passed_over() { same key "$(finds full)" None && same key "$(finds "$(larder show full --json | field policy)")" "$(larder show full --json | field key)"; }
claim "a look-up for its policy passes it over, one for all of its policy does not" passed_over
asked() { fails_with LARDER_EPOLICY larder put "$dir/doc" --name x --wait --policy "$(larder show full --json | field policy)"; }
claim "a put cannot ask for what is imported" asked
computed() { larder put "$dir/doc" --name full2 --policy full --wait --json | field result >"$dir/r" && same result "$(cat "$dir/r")" stored; }
claim "a put of the same document computes" computed
itself() { same key "$(finds full)" "$(cat "$dir/full.key")"; }
claim "and a look-up finds what was computed" itself
taken() { fails_with LARDER_EINVAL larder import "$dir/asl.st" --name full2 && larder show full2 --json | field policy | grep -qx full; }
claim "an import does not take another entry's name" taken
twice() {
    n=$(larder status --json | field store.entries) && larder import "$dir/full.st" && larder export full -o "$dir/full2.st" &&
        larder import "$dir/full2.st" && same entries "$(larder status --json | field store.entries)" "$n"
}
claim "what is imported again, or comes back, is the same entry" twice
exit $rc
