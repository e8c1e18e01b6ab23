#!/usr/bin/env python3
"""What a hostile client may bring in IMPORT frames and files; an entry of an unknown model.

    hostile_import.py SOCKET LARDER    speaks TAP

The entry is made here, by IMAGE.md, PROTOCOL.md and larder(1) alone: two layers of two KV heads
with rows of different number, four elements a row.
"""
import fcntl
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

import hostile

LAYERS, HEADS, KV, DIM = 2, 4, 2, 4
ROWS = (3, 0, 5, 2)
CTX, VOCAB = 5, 16
TEXT = b"a rendered text"
MODEL, TOKENIZER, TEMPLATE = (bytes([n]) * 32 for n in (1, 2, 3))
IMPORT, LOOKUP, OK, ERROR = 18, 7, 100, 101
SEALS = 1033, 15  # F_ADD_SEALS; seal, shrink, grow, write


def key_of(policy, ns, tokens):
    h = hashlib.sha256()
    for part in (b"larder-key-1", MODEL, TOKENIZER, TEMPLATE, policy.encode(), ns.encode(),
                 struct.pack("<%dI" % len(tokens), *tokens)):
        h.update(struct.pack("<I", len(part)) + part)
    return h.digest()


class Entry:
    """Body and image of an IMPORT, and the same as a safetensors file."""

    def __init__(self, policy="full", tokens=(3, 1, 4, 1, 5), name="found", bias=True, rows=ROWS):
        self.tokens, self.bias, self.rows = tokens, bias, rows
        self.key = key_of(policy, "default", tokens)
        self.body = {"namespace": "default", "source_namespace": "default", "key": self.key.hex(),
                     "policy": policy, "model": "smollm2", "template": "plain",
                     "template_fingerprint": TEMPLATE.hex(), "backend": "ref/f32/c",
                     "sel_layer": None, "rank_variance": [], "certificate": None, "prefill_ms": 7}
        if name:
            self.body["name"] = name
        self.at = 0
        self.parts = []
        self.image = bytearray(self.lay_out())

    def take(self, align, data):
        self.at = -(-self.at // align) * align
        self.parts.append((self.at, data))
        self.at += len(data)
        return self.parts[-1][0]

    def lay_out(self):
        self.at = 256
        heads = self.take(64, bytes(40 * LAYERS * KV))
        tokens = self.take(64, struct.pack("<%dI" % CTX, *self.tokens))
        logits = self.take(64, struct.pack("<%df" % VOCAB, *range(VOCAB)))
        text = self.take(64, TEXT)
        small, large, table = [], [], b""
        for n in self.rows:
            small.append((self.take(64, struct.pack("<%dI" % n, *range(n))),
                          self.take(64, struct.pack("<%df" % n, *[0.5] * n)) if self.bias else 0))
        for i, n in enumerate(self.rows):
            large.append([self.take(64 if i % KV or v else 4096, b"\x80\x3f" * (n * DIM))
                          for v in (0, 1)])
        for n, (position, bias), (k, v) in zip(self.rows, small, large):
            table += struct.pack("<IIQQQQ", n, 0, k, v, position, bias)
        size = -(-self.at // 4096) * 4096
        out = bytearray(size)
        for at, data in self.parts:
            out[at:at + len(data)] = data
        out[heads:heads + len(table)] = table
        out[:256] = struct.pack("<8sIIQ", b"LARDERIM", 1, 256, size) + struct.pack(
            "<10I", self.bias, 1, LAYERS, HEADS, KV, DIM, CTX, CTX, VOCAB, CTX) + struct.pack(
            "<5Q24x", len(TEXT), tokens, text, logits, heads) + \
            self.key + MODEL + TOKENIZER + bytes(32)
        return out

    def safetensors(self):
        """Header and data of the file; the order of the tensors is export's."""
        meta = {k: v if isinstance(v, str) else json.dumps(v) for k, v in self.body.items()
                if k != "source_namespace"}
        meta.update(format="larder-1", n_layers=str(LAYERS), n_heads=str(HEADS), head_dim=str(DIM),
                    n_kv_heads=str(KV), n_vocab=str(VOCAB), n_ctx=str(CTX), next_pos=str(CTX),
                    renumbered="false", has_bias="true" if self.bias else "false",
                    precision="bf16", created="1", name="default/" + self.body["name"],
                    model_fingerprint=MODEL.hex(), tokenizer_fingerprint=TOKENIZER.hex(),
                    text=TEXT.decode())
        head = ["layers.%d.heads.%d." % divmod(i, KV) for i in range(LAYERS * KV)]
        n_small = 1 + self.bias
        small, large = self.parts[4:-2 * len(head)], self.parts[-2 * len(head):]
        tensors = [("tokens", "U32", [CTX], self.parts[1]), ("logits", "F32", [VOCAB],
                                                             self.parts[2])]
        for j, (what, dtype) in enumerate((("position", "U32"), ("bias", "F32"))[:n_small]):
            tensors += [(head[i] + what, dtype, [n], small[n_small * i + j])
                        for i, n in enumerate(self.rows)]
        for i, n in enumerate(self.rows):
            tensors += [(head[i] + what, "BF16", [n, DIM], large[2 * i + j])
                        for j, what in enumerate("kv")]
        header, data = {"__metadata__": meta}, b""
        for name, dtype, shape, (_, part) in tensors:
            header[name] = {"dtype": dtype, "shape": shape,
                            "data_offsets": [len(data), len(data) + len(part)]}
            data += part
        return header, data


# ---- frames

def memory_file(data, seal=True):
    fd = os.memfd_create("import", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if seal:
        fcntl.fcntl(fd, *SEALS)
    return fd


def send(s, kind, body, fd=None, seq=1):
    data = hostile.frame(kind, json.dumps(body).encode(), seq=seq)
    if fd is None:
        s.send(data)
    else:
        hostile.send_fds(s, data, [fd])


def ask(kind, body, data=None, seal=True):
    """The status of an error, or the answer."""
    s = hostile.connect()
    fd = None if data is None else memory_file(data, seal)
    send(s, kind, body, fd)
    kind, answer = hostile.reply(s)
    s.close()
    if fd is not None:
        os.close(fd)
    return answer["status"] if kind == ERROR else answer


def bring(entry, image=None, seal=True, **changes):
    image = entry.image if image is None else image
    body = dict(entry.body, bytes=len(image))
    body.update(changes)
    return ask(IMPORT, {k: v for k, v in body.items() if v != "left out"}, image, seal)


def n_entries():
    return ask(14, {})["store"]["entries"]


def changed(image, at, form, value):
    out = bytearray(image)
    struct.pack_into("<" + form, out, at, value)
    return out


def spoiled(entry, at, size, keep=()):
    """Each value of a field of `size` bytes that is off: next to its own, and at the ends."""
    form = {4: "I", 8: "Q"}[size]
    was = struct.unpack_from("<" + form, entry.image, at)[0]
    top = 2 ** (8 * size)
    values = {was + 1, was - 1, 0, 1, was * 2, was + 64, was ^ top // 2, top // 2, top - 1,
              top - 64}
    for v in sorted({v % top for v in values} - {was} - set(keep)):
        yield v, changed(entry.image, at, form, v)


# ---- claims

failed = False


def claim(name, bad):
    """`bad`: what is wrong, nothing when it holds."""
    global failed
    failed |= bool(bad)
    print(("not ok - " if bad else "ok - ") + name, flush=True)
    if bad:
        print(name, str(bad)[:2000], sep=": ", file=sys.stderr, flush=True)


# field: offset, size, values that say something else that is possible
HEADER = {
    "magic": (0, 8, ()), "header_bytes": (12, 4, ()), "n_bytes": (16, 8, ()),
    "flags": (24, 4, ()), "dtype": (28, 4, (2,)), "n_layers": (32, 4, ()),
    "n_heads": (36, 4, (2, 8, 68)), "n_kv_heads": (40, 4, ()), "head_dim": (44, 4, ()),
    "n_ctx": (48, 4, ()), "next_pos": (52, 4, (6, 10, 69)), "n_vocab": (56, 4, (15,)),
    "n_tokens": (60, 4, ()), "text_len": (64, 8, (0, 1, 14, 16, 30)), "tokens_off": (72, 8, ()),
    "text_off": (80, 8, ()), "logits_off": (88, 8, ()), "heads_off": (96, 8, ()),
    "reserved bytes": (104, 8, ()), "last bytes": (248, 8, ()),
}


def header_fields(entry):
    for name, (at, size, possible) in HEADER.items():
        got = {v: bring(entry, image) for v, image in spoiled(entry, at, size, possible)}
        claim("an image is refused with another %s" % name,
              {v: s for v, s in got.items() if s != "LARDER_EDAMAGED"})
    got = {v: bring(entry, image) for v, image in spoiled(entry, 8, 4)}
    claim("an image is refused with another version",
          {v: s for v, s in got.items() if s != "LARDER_EVERSION"})
    claim("rows in f16 are refused", bring(entry, changed(entry.image, 28, "I", 2)) !=
          "LARDER_EUNSUPPORTED")
    for name, at in (("key", 128), ("model fingerprint", 160), ("tokenizer fingerprint", 192)):
        claim("an image is refused with another " + name,
              bring(entry, changed(entry.image, at + 31, "B", 9)) != "LARDER_EINVAL")


def head_table(entry):
    bad = {}
    for i in range(LAYERS * KV):
        for at, size in ((0, 4), (4, 4), (8, 8), (16, 8), (24, 8), (32, 8)):
            # arrays are padded: a few rows less or more may be another legal entry
            for v, image in spoiled(entry, 256 + 40 * i + at, size, () if at else range(CTX + 1)):
                got = bring(entry, image)
                if got != "LARDER_EDAMAGED":
                    bad[i, at, v] = got
    claim("an image is refused with another number in its head table", bad)


def contents(entry):
    at = {name: entry.parts[i][0] for i, name in enumerate(("heads", "tokens", "logits", "text",
                                                           "position", "bias"))}
    cases = (("a token beyond the vocabulary", at["tokens"], "I", VOCAB, "LARDER_EDAMAGED"),
             ("another token", at["tokens"], "I", 2, "LARDER_EINVAL"),
             ("a position twice", at["position"] + 4, "I", 0, "LARDER_EDAMAGED"),
             ("a position beyond the document", at["position"] + 8, "I", CTX, "LARDER_EDAMAGED"),
             ("a bias that is infinite", at["bias"], "f", float("inf"), "LARDER_EDAMAGED"),
             ("a logit that is no number", at["logits"] + 60, "f", float("nan"), "LARDER_ENUMERIC"),
             ("a key that is no number", entry.parts[-8][0], "H", 0x7fc0, "LARDER_ENUMERIC"),
             ("a value that is infinite", entry.parts[-1][0] + 14, "H", 0xff80, "LARDER_ENUMERIC"),
             ("text that is not UTF-8", at["text"], "B", 0xff, "LARDER_ETEXT"))
    for name, where, form, value, want in cases:
        got = bring(entry, changed(entry.image, where, form, value))
        claim("an image is refused with " + name, got != want and got)


def sizes(entry):
    image = entry.image
    bad = {}
    for n in (1, 64, 255, 256, 257, 512, 4095, 4096, len(image) - 4096, len(image) - 1):
        for stated in (n, len(image)):
            got = bring(entry, image[:n], bytes=stated)
            if not isinstance(got, str):
                bad[n, stated] = got
    claim("an image is refused that ends early", bad)
    for n in (1, 4096):
        got = bring(entry, image + bytes(n))
        claim("an image is refused with %d bytes more" % n, got != "LARDER_EDAMAGED" and got)
    got = {n: bring(entry, bytes=n) for n in (0, 1, 4096, len(image) + 1, 2 ** 40, 2 ** 53, -1)}
    claim("so is one of another size than it says", {n: s for n, s in got.items()
                                                     if not isinstance(s, str)})
    claim("so is one that can still be written", isinstance(bring(entry, seal=False), dict))
    s = hostile.connect()
    send(s, IMPORT, dict(entry.body, bytes=len(image)))
    got = hostile.reply(s)
    claim("and none at all", got[0] != ERROR or got[1]["status"] != "LARDER_EPROTO")
    for path in ("/dev/zero", "/proc/self/mem", "/"):
        fd = os.open(path, os.O_RDONLY)
        s = hostile.connect()
        send(s, IMPORT, dict(entry.body, bytes=len(image)), fd)
        claim("%s is no image" % path, hostile.reply(s)[0] != ERROR)
        os.close(fd)


def bodies(entry):
    bad = {k: got for k in list(entry.body) + ["bytes"] if k != "name"
           for got in [bring(entry, **{k: "left out"})] if isinstance(got, dict)}
    claim("a frame is refused without any of its fields", bad)
    wrong = [(k, v) for k in entry.body for v in ([], {}, True, 1.5, -1, 2 ** 60, "", "x" * 5000)
             if not (k == "rank_variance" and v == [] or k == "certificate" and v == {} or
                     k == "template" and v == "")]
    bad = [(k, str(v)[:20], got) for k, v in wrong for got in [bring(entry, **{k: v})]
           if isinstance(got, dict)]
    claim("and with a field of another kind, or too long", bad)
    cases = (("namespace", "../x"), ("namespace", "a b"), ("name", "+x"), ("name", "a/../b"),
             ("name", "a\nb"), ("policy", "full\n"), ("policy", "full,rows=1"),
             ("policy", "p" * 257), ("key", "0" * 64), ("key", entry.key.hex().upper()),
             ("model", "a b"), ("source_namespace", "other"), ("template_fingerprint", "0" * 64),
             ("sel_layer", LAYERS), ("sel_layer", 512), ("rank_variance", [1]),
             ("rank_variance", [{"value": "x"}]), ("rank_variance", [{}] * 513),
             ("certificate", {"kl": []}), ("certificate", [1]), ("surprise", 1))
    bad = [(k, str(v)[:20], got) for k, v in cases for got in [bring(entry, **{k: v})]
           if isinstance(got, dict)]
    claim("and with values that are not possible", bad)
    long = Entry(policy="full," + "x" * 240, name=None)
    claim("a policy without room for its mark is refused", bring(long) != "LARDER_ETOOBIG")


def sequences(entry):
    """Frames in ways that no client of ours sends them; none may leave anything behind."""
    body = dict(entry.body, bytes=len(entry.image))
    for _ in range(20):  # gone before it is answered
        s = hostile.connect()
        fd = memory_file(changed(entry.image, 160, "B", 9))
        send(s, IMPORT, body, fd)
        s.close()
        os.close(fd)
    s = hostile.connect()
    fd = memory_file(entry.image)
    hostile.send_fds(s, hostile.frame(IMPORT, json.dumps(body).encode()), [fd, fd])
    hostile.ends(s)
    for kind in (OK, ERROR, 206, 19):  # what only the other side sends, and what nobody does
        s = hostile.connect()
        send(s, kind, body, fd)
        hostile.ends(s)
    s = hostile.connect()
    try:
        for seq in range(200):  # more than may be in flight, unread
            send(s, IMPORT, dict(body, key="0" * 64), fd, seq)
    except (BrokenPipeError, ConnectionResetError):
        pass
    s.close()
    os.close(fd)
    claim("frames out of order store nothing", n_entries())


def flips(entry, rounds):
    """Any bits of header and head table: refused, or another entry that is possible."""
    r = random.Random(11)
    stored = 0
    for _ in range(rounds):
        image = bytearray(entry.image)
        for _ in range(r.choice((1, 1, 1, 2, 5))):
            image[r.randrange(256 + 40 * LAYERS * KV)] ^= 1 << r.randrange(8)
        stored += isinstance(bring(entry, image, name="left out"), dict)
    claim("of %d images with flipped bits few say something possible" % rounds,
          stored > rounds // 20 and stored)


# ---- files

def write(path, header, data, length=None):
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text) if length is None else length) + text + data)


def larder(*words):
    return subprocess.run([sys.argv[2], *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, check=False)


def refuses(path, want="(LARDER_E"):
    """Nothing if the file is refused in one line, else what happened."""
    p = larder("import", path)
    lines = p.stderr.splitlines()
    if p.returncode == 1 and len(lines) == 1 and want in lines[0] and not p.stdout:
        return None
    return p


STRICT = ("format", "key", "namespace", "policy", "n_layers", "n_heads", "n_kv_heads", "head_dim",
          "n_vocab", "n_ctx", "next_pos", "sel_layer", "renumbered", "has_bias", "prefill_ms",
          "certificate", "rank_variance", "model_fingerprint", "tokenizer_fingerprint",
          "template_fingerprint")


def files(entry, folder):
    path = os.path.join(folder, "file")
    header, data = entry.safetensors()
    meta = header["__metadata__"]

    def with_meta(key, value):
        new = {k: v for k, v in meta.items() if k != key}
        if value is not None:
            new[key] = value
        write(path, dict(header, __metadata__=new), data)
        return refuses(path)

    for what, value in (("left out", None), ("that is empty", ""), ("of another kind", 1),
                        ("that is too large", "9" * 400), ("that is text", "garbage")):
        keys = [k for k in meta if k != "name" or value is not None] if not isinstance(
            value, str) else STRICT
        claim("a file is refused with metadata " + what,
              [p for p in (with_meta(k, value) for k in keys) if p])
    write(path, header, data)
    with open(path, "rb") as f:
        whole = f.read()
    bad = []
    for n in (*range(16), *range(16, len(whole), 97), len(whole) - 1):
        with open(path, "wb") as f:
            f.write(whole[:n])
        bad += filter(None, [refuses(path)])
    claim("a file is refused wherever it ends early", bad)
    with open(path, "wb") as f:
        f.write(whole + b"\0")
    claim("and with a byte more", refuses(path))
    bad = []
    for length in (0, 1, len(whole), 2 ** 31, 2 ** 63, 2 ** 64 - 1):
        write(path, header, data, length)
        bad += filter(None, [refuses(path)])
    claim("and where its header is said to have another length", bad)
    bad = []
    for text in (b"", b"[]", b"{", b"null", b'"x"', b"\xff", b"[" * 50000, b'{"__metadata__":[]}',
                 b'{"a":1,"a":2}'):
        with open(path, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text + data)
        bad += filter(None, [refuses(path, "(LARDER_EINVAL)")])
    claim("and where its header is no object of tensors", bad)
    for name in ("/dev/null", folder, os.path.join(folder, "none")):
        claim("%s is no file to import" % os.path.basename(name), refuses(name))
    with open(path, "wb") as f:
        f.write(entry.image)
    claim("nor is an image", refuses(path, "(LARDER_EINVAL)"))


# ---- what is good

def finds(tokens, **fields):
    """The key that a look-up for token ids gives; None: nothing."""
    data = struct.pack("<%dI" % len(tokens), *tokens)
    got = ask(LOOKUP, dict(fields, source="tokens", bytes=len(data)), data)
    return None if got == "LARDER_ENOTFOUND" else got["entry"]["key"] if isinstance(
        got, dict) else got


def known_by_nobody(entry, folder):
    path = os.path.join(folder, "good")
    write(path, *entry.safetensors())
    p = larder("import", path)
    claim("an entry of a model that is not configured comes in, with a warning",
          (p.returncode or len(p.stderr.splitlines()) != 1 or "warning" not in p.stderr or
           "model is not configured" not in p.stderr) and p)
    shown = json.loads(larder("show", "found", "--json").stdout)
    claim("under a name for its model that no configured one has",
          shown["model"] != "imported:smollm2" and shown)
    claim("and is marked in its policy", not shown["policy"].startswith("full,imported=") and shown)
    p = larder("import", path, "--json")
    claim("JSON says so, too", json.loads(p.stdout)["model_known"] is not False)
    by_frame = bring(entry)
    claim("the same by frame is the same entry", by_frame["entry"]["key"] != shown["key"])
    return shown


def look_ups(entry, shown):
    key = shown["key"]
    tokens = entry.tokens + (7, 8)
    claim("a look-up that asks for no policy finds it", finds(tokens) != key)
    claim("one for the policy that it was made by does not", finds(tokens, policy="full"))
    claim("nor one for the model whose name it came with", finds(tokens, model="smollm2"))
    claim("one for its own policy does", finds(tokens, policy=shown["policy"]) != key)
    for name in (dict(name="found"), dict(key=key)):
        claim("by %s it is found" % list(name)[0], ask(LOOKUP, name)["entry"]["key"] != key)
    policy = "matching,rows=25%,profile=0123456789ab"
    other = Entry(policy, (2, 2, 6, 6, 1), "measured")
    marked = bring(other)["entry"]
    got = {p: finds(other.tokens, policy=p) for p in (
        "matching", "matching,rows=25%", policy, "offline", "full")}
    claim("a profile in its policy does not change that", {p: k for p, k in got.items() if k})
    claim("and all of its policy finds it",
          finds(other.tokens, policy=marked["policy"]) != marked["key"])


def main():
    entry = Entry()
    header_fields(entry)
    head_table(entry)
    contents(entry)
    sizes(entry)
    bodies(entry)
    sequences(entry)
    with tempfile.TemporaryDirectory(prefix="larder-import.") as folder:
        files(entry, folder)
        claim("nothing of all that was stored", n_entries())
        shown = known_by_nobody(entry, folder)
    look_ups(entry, shown)
    flips(entry, 1500)
    p = larder("verify")
    claim("every byte that is stored is good", p.returncode and p)
    return failed


if __name__ == "__main__":
    sys.exit(main())
