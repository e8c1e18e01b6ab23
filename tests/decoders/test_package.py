#!/usr/bin/env python3
"""The Python package against a scripted daemon: no model, no larderd. test_package.py BUILD"""
import contextlib
import ctypes
import ctypes.util
import gc
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
import warnings

from claims import ROOT, Skip, claim, raises, run_claims

BUILD = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "build"))
PACKAGE = os.path.join(ROOT, "client/python")
os.environ["LARDER_LIBRARY"] = os.path.join(BUILD, "liblarder.so")
sys.path.insert(0, PACKAGE)
try:
    import numpy as np
except ImportError:
    print("the package needs numpy: sh etc/setup.sh", file=sys.stderr)
    sys.exit(77)
import fake
import larder
from larder import errors, library, packed

RNG = np.random.default_rng(7)
D = 32


def bf16_rows(n):
    return RNG.integers(0, 0x7f80, (n, D), dtype=np.uint16)


ROWS = [[3, 0], [5, 41]]
ELEMENTS = {(l, h): (bf16_rows(ROWS[l][h]), bf16_rows(ROWS[l][h])) for l in (0, 1) for h in (0, 1)}


def biases(layer, head):
    return [layer - head - i / 4 for i in range(ROWS[layer][head])]


def plain_image(bias=biases):
    return fake.ImageWriter(ROWS, D, lambda l, h: [x.tobytes() for x in ELEMENTS[l, h]], bias)


def serving(data, sealed=True, **answer):
    return fake.Daemon(lambda *_: (fake.fetch_answer(data, **answer),
                                   fake.memory_file(data, sealed)))


@contextlib.contextmanager
def fetched(data, packed=False):
    with serving(data) as daemon, larder.Client(daemon.path) as client, \
            client.get("x", packed=packed) as cache:
        yield cache


# ---- the library

STRUCTS = {"larder_err": library.Err, "larder_job": library.CJob, "larder_entry": library.CEntry,
           "larder_put_options": library.PutOptions, "larder_image": library.Image,
           "larder_lookup_options": library.LookupOptions, "larder_rows": library.Rows,
           "larder_lease": library.Lease, "larder_fetch_options": library.FetchOptions}


@claim
def structs_are_laid_out_as_the_headers_say():
    lines, mine = [], []
    for name, kind in STRUCTS.items():
        lines.append('printf("%s %%zu\\n", sizeof(struct %s));' % (name, name))
        mine.append("%s %d" % (name, ctypes.sizeof(kind)))
        for field, _ in kind._fields_:
            lines.append('printf("%s.%s %%zu\\n", offsetof(struct %s, %s));'
                         % (name, field, name, field))
            mine.append("%s.%s %d" % (name, field, getattr(kind, field).offset))
    source = "#include <stdio.h>\n#include \"larder.h\"\nint main(void) { %s }\n" % "\n".join(lines)
    with tempfile.TemporaryDirectory() as tmp:
        program = os.path.join(tmp, "p")
        command = ["cc", "-x", "c", "-", "-o", program] + ["-I" + os.path.join(ROOT, d)
                                                           for d in ("client", "base", "ipc")]
        try:
            subprocess.run(command, input=source, text=True, check=True)
        except FileNotFoundError:
            raise Skip("no C compiler")
        out = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert out.split("\n")[:-1] == mine


@claim
def every_status_has_its_class():
    with open(os.path.join(ROOT, "base/larder_status.h"), encoding="utf-8") as f:
        listed = {int(n): "LARDER_" + s for s, n in re.findall(r"X\((\w+), (-?\d+), ", f.read())}
    del listed[0]
    assert {code: cls.status for code, cls in errors.BY_CODE.items()} == listed
    for code, cls in errors.BY_CODE.items():
        e = errors.from_code(code, "why")
        assert type(e) is cls and isinstance(e, larder.LarderError) and e.code == code
        assert str(e) == cls.status + ": why", str(e)
        assert library.library().larder_status_name(code).decode() == cls.status
    new = errors.from_code(-999, "a newer library's")
    assert type(new) is larder.LarderError and new.code == -999


@claim
def package_library_and_tree_have_one_version():
    with open(os.path.join(ROOT, "VERSION"), encoding="utf-8") as f:
        version = f.read().strip()
    assert larder.__version__ == version == library.library().larder_version().decode()


def without_library(**env):
    code = "import larder\ntry: larder.Client()\nexcept larder.LibraryNotFound as e: print(e)"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LD_")}
    clean.update(env, PYTHONPATH=PACKAGE)
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                          env=clean, check=True).stdout


@claim
def a_library_that_is_not_there_is_said_clearly():
    assert "$LARDER_LIBRARY is '/nowhere'" in without_library(LARDER_LIBRARY="/nowhere")
    other = ctypes.util.find_library("c") or "libc.so.6"
    assert "not a liblarder" in without_library(LARDER_LIBRARY=other)


@claim
def pkg_config_finds_an_installed_library():
    with tempfile.TemporaryDirectory() as tmp:
        os.symlink(os.environ["LARDER_LIBRARY"], os.path.join(tmp, library.SONAME))
        with open(os.path.join(tmp, "larder.pc"), "w", encoding="utf-8") as f:
            f.write("libdir=%s\nName: x\nDescription: x\nVersion: 0\n" % tmp)
        code = "from larder.library import _from_pkg_config as f; print(f())"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                              env=dict(os.environ, PYTHONPATH=PACKAGE, PKG_CONFIG_PATH=tmp))
        assert done.stdout.strip() == os.path.join(tmp, library.SONAME), done


# ---- arrays

@claim
def arrays_are_those_of_the_image():
    image = plain_image()
    with fetched(image.bytes()) as cache:
        assert (cache.n_layers, cache.n_heads, cache.n_kv_heads, cache.head_dim) == (2, 4, 2, D)
        assert (cache.dtype, cache.n_ctx, cache.next_pos, cache.n_vocab) == ("bf16", 128, 128, 100)
        assert cache.n_rows.tolist() == ROWS and cache.key == fake.KEY.hex()
        assert cache.text.encode() == image.text and cache.tokens.tolist() == image.tokens
        assert cache.logits.tolist() == image.logits and not cache.rectangular
        for (l, h), (k, v) in ELEMENTS.items():
            assert (cache.keys(l, h) == k).all() and (cache.values(l, h) == v).all()
            assert cache.keys(l, h).shape == (ROWS[l][h], D)
            assert cache.positions(l, h).tolist() == image.positions(l, h)
            assert cache.bias(l, h).tolist() == biases(l, h)
            assert (cache.keys_f32(l, h) == larder.widen(k)).all()
        assert cache.prompt([5, 6]).tolist() == image.tokens + [5, 6]
    with fetched(plain_image(None).bytes()) as cache:
        assert cache.bias(0, 0) is None and not cache.has_bias


@claim
def arrays_cannot_be_written():
    with fetched(plain_image().bytes()) as cache:
        for a in (cache.keys(1, 1), cache.positions(1, 1), cache.tokens, cache.logits):
            raises(ValueError, a.__setitem__, 0, 1)


@claim
def arrays_are_views_and_outlive_cache_client_and_daemon():
    with fetched(plain_image().bytes()) as cache:
        keys, tokens = cache.keys(1, 1), cache.tokens[3:5]
        assert keys.base is tokens.base or keys.base is tokens.base.base  # one mapping
    del cache
    gc.collect()
    assert (keys == ELEMENTS[1, 1][0]).all() and tokens.tolist() == [21, 28]


@claim
def a_closed_cache_gives_nothing():
    with fetched(plain_image().bytes()) as cache:
        pass
    assert "closed" in raises(errors.InvalidArgument, cache.keys, 0, 0)
    cache.close()


@claim
def an_unclosed_cache_is_warned_about_and_released():
    with serving(plain_image().bytes()) as daemon, larder.Client(daemon.path) as client:
        cache = client.get("x")
        keys = cache.keys(0, 0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            del cache
            gc.collect()
        assert [w.category for w in said] == [ResourceWarning]
        assert (keys == ELEMENTS[0, 0][0]).all()


@claim
def the_lease_is_given_back_once():
    with serving(plain_image().bytes()) as daemon, larder.Client(daemon.path) as client:
        with client.get("x") as cache:
            cache.close()
        assert [kind for kind, *_ in daemon.seen].count(fake.RELEASE) == 1


@claim
def a_cache_may_be_closed_after_its_client():
    with serving(plain_image().bytes()) as daemon:
        client = larder.Client(daemon.path)
        cache = client.get("x")
        client.close()
        assert cache.keys(0, 0).shape == (3, D)
        cache.close()
        assert "closed" in raises(errors.InvalidArgument, client.get, "x")


# ---- rows

@claim
def widening_is_exact_for_every_bit_pattern():
    bits = np.arange(1 << 16, dtype=np.uint16)
    want = np.frombuffer(b"".join(struct.pack("<HH", 0, b) for b in range(1 << 16)), "<u4")
    assert (larder.widen(bits).view(np.uint32) == want).all()


def half(raw, i):
    return np.float32(struct.unpack_from("<e", raw, 2 * i)[0])


def f32_of(bits):
    return np.float32(struct.unpack("<f", struct.pack("<HH", 0, bits))[0])


def slow_expand(tile, dtype, is_key, n, d):
    """FORMAT.md section 4 read word by word, an element at a time."""
    exact, p = min(4, n), n - min(4, n)
    rows = [[f32_of(struct.unpack_from("<H", tile, 2 * (r * d + c))[0]) for c in range(d)]
            for r in range(exact)]
    scales = tile[2 * exact * d:]
    if dtype == "int8":
        n_scales = (d if p else 0) if is_key else p
        codes = scales[2 * n_scales:]
        return rows + [[np.float32(struct.unpack_from("<b", codes, r * d + c)[0]) *
                        half(scales, c if is_key else r) for c in range(d)] for r in range(p)]
    groups = -(-p // 32) * d if is_key else p * -(-d // 32)
    codes = scales[4 * groups:]
    for r in range(p):
        row = []
        for c in range(d):
            g = r // 32 * d + c if is_key else r * -(-d // 32) + c // 32
            i = r * d + c
            code = codes[i // 2] >> 4 if i % 2 else codes[i // 2] & 15
            row.append(half(scales, 2 * g) + np.float32(code) * half(scales, 2 * g + 1))
        rows.append(row)
    return rows


def random_tile(dtype, is_key, n, d):
    """Any bytes, but finite steps, minima and exact rows."""
    size = packed.tile_bytes(dtype, is_key, n, d)
    raw = RNG.integers(0, 256, size, dtype=np.uint8)
    end = size - (n - min(4, n)) * d * packed.BITS[dtype] // 8
    raw[1:end:2] &= 0x3f
    return raw.tobytes()


@claim
def tiles_expand_as_the_format_says():
    for dtype in ("int8", "int4"):
        for n in (0, 1, 4, 5, 36, 37, 70):
            for d in (2, 34, 64):
                for is_key in (True, False):
                    tile = random_tile(dtype, is_key, n, d)
                    got = packed.expand(np.frombuffer(tile, np.uint8), dtype, is_key, n, d)
                    want = np.array(slow_expand(tile, dtype, is_key, n, d),
                                    np.float32).reshape(n, d)
                    assert (got == want).all(), (dtype, n, d, is_key)


@claim
def packed_images_are_read():
    for code, dtype in ((4, "int8"), (5, "int4")):
        tiles = {(l, h): (random_tile(dtype, True, ROWS[l][h], D),
                          random_tile(dtype, False, ROWS[l][h], D))
                 for l in (0, 1) for h in (0, 1)}
        image = fake.ImageWriter(ROWS, D, lambda l, h: tiles[l, h], biases, code)
        with fetched(image.bytes(), packed=True) as cache:
            assert cache.dtype == dtype
            for (l, h), (k, v) in tiles.items():
                assert cache.keys(l, h).tobytes() == k and cache.values(l, h).tobytes() == v
                want = np.array(slow_expand(v, dtype, False, ROWS[l][h], D), np.float32)
                assert (cache.values_f32(l, h) == want.reshape(-1, D)).all()


# ---- prompts

@claim
def a_prompt_of_another_tokenizer_or_template_is_refused_with_what_differs():
    from larder.models import rest_of_prompt
    image = plain_image()
    text = image.text.decode()
    with fetched(image.bytes()) as cache:
        def read(ids):
            return text if len(ids) in (127, 128) else None

        assert rest_of_prompt(cache, text + " Why?", read) == " Why?"
        with_mark = rest_of_prompt(cache, text + "!", lambda ids: "<s> " * (len(ids) > 127) + text)
        assert with_mark == "!"
        raises(errors.InvalidArgument, rest_of_prompt, cache, text, read)
        said = raises(errors.ModelMismatch, rest_of_prompt, cache, "Ein Wort", read)
        assert "template" in said and "character 4 on it is 'Wort'" in said, said
        said = raises(errors.ModelMismatch, rest_of_prompt, cache, text + "?",
                      lambda ids: "Ein T\u00e4xt")
        assert "tokenizer" in said and "character 5 on" in said and "'ext " in said, said


# ---- what must not be believed

def refused(error, data, packed=False, **how):
    """A fetch of this fails so, and nothing of it reaches Python."""
    with serving(data, **how) as daemon, larder.Client(daemon.path) as client:
        return raises(error, client.get, "x", packed=packed)


@claim
def truncated_images_never_reach_python():
    whole = plain_image().bytes()
    for n in (0, 1, 255, 256, 4095, 4096, len(whole) - 4096, len(whole) - 1):
        refused(errors.ProtocolViolation, whole[:n], n_bytes=len(whole))  # less than was said
        if n:
            with serving(whole[:n]) as daemon, larder.Client(daemon.path) as client:
                try:  # as much as was said, and still not all of it
                    client.get("x")
                    raise AssertionError("%d of %d bytes were accepted" % (n, len(whole)))
                except larder.LarderError as why:
                    assert type(why) in (errors.Damaged, errors.ProtocolViolation,
                                         errors.InvalidArgument), repr(why)


@claim
def damaged_headers_and_tables_never_reach_python():
    whole, rng = plain_image().bytes(), random.Random(3)
    for at in list(range(0, 104)) + list(range(256, 256 + 160)) + list(range(448, 700, 3)):
        bad = bytearray(whole)
        bad[at] ^= 1 << rng.randrange(8)
        with serving(bytes(bad)) as daemon, larder.Client(daemon.path) as client:
            try:
                with client.get("x") as cache:  # tokens and next_pos may be other legal ones
                    assert cache.n_rows.tolist() == ROWS and cache.tokens.max() < cache.n_vocab
                    for l, h in ELEMENTS:
                        assert cache.keys(l, h).shape[0] == cache.values(l, h).shape[0]
                        assert cache.positions(l, h).size == 0 or cache.positions(l, h).max() < 128
            except larder.LarderError:
                pass


@claim
def unsealed_foreign_and_unasked_images_are_refused():
    whole = plain_image().bytes()
    refused(errors.ProtocolViolation, whole, sealed=False)
    assert "another entry" in refused(errors.ProtocolViolation, whole, key=b"\7" * 32)
    tiles = fake.ImageWriter(ROWS, D, lambda l, h: (random_tile("int4", True, ROWS[l][h], D),
                                                    random_tile("int4", False, ROWS[l][h], D)),
                             dtype=5)
    assert "nobody asked" in refused(errors.ProtocolViolation, tiles.bytes())
    with fake.Daemon(lambda *_: fake.fetch_answer(whole)) as daemon, \
            larder.Client(daemon.path) as client:
        assert "descriptor" in raises(errors.ProtocolViolation, client.get, "x")


@claim
def nonsense_in_answers_is_a_protocol_violation():
    for page in ({}, {"entries": 3, "more": False}, {"entries": [3], "more": False},
                 {"entries": [{"key": 4}], "more": False}, {"entries": [], "more": "no"}):
        with fake.Daemon(lambda *_: page) as daemon, larder.Client(daemon.path) as client:
            raises(errors.ProtocolViolation, list, client.ls())


@claim
def errors_of_the_daemon_have_their_class():
    def script(*_):
        raise fake.Refusal(-4, "LARDER_ENOTFOUND", "it was never stored")
    with fake.Daemon(script) as daemon, larder.Client(daemon.path) as client:
        assert "never stored" in raises(errors.NotFound, client.get, "x")
        assert "never stored" in raises(errors.NotFound, client.lookup, "x")
    raises(errors.NoDaemon, larder.Client, "/nowhere/socket")


@claim
def a_deadline_breaks_the_connection_and_the_next_call_says_so():
    with fake.Daemon(lambda *_: None) as daemon, larder.Client(daemon.path) as client:
        raises(errors.DeadlinePassed, client.lookup, "x", timeout=0.05)
        raises(errors.DeadlinePassed, client.status)


@claim
def arguments_that_mean_nothing_are_refused_before_anything_is_sent():
    with serving(plain_image().bytes()) as daemon, larder.Client(daemon.path) as client:
        before = len(daemon.seen)
        for document in ([1, -1], [1.5], [[1], [2]], [1 << 32]):
            raises(errors.InvalidArgument, client.put, document)
        raises(errors.InvalidArgument, client.put, "text", "a\0b")
        raises(errors.InvalidArgument, client.get, "../x")
        raises(errors.EmptyDocument, client.put, "")
        raises(errors.EmptyDocument, client.put, [])
        assert len(daemon.seen) == before
        with client.get("x") as cache:
            for layer, head in ((2, 0), (0, 2), (-1, 0), (0, -1)):
                raises(errors.InvalidArgument, cache.keys, layer, head)


# ---- jobs

def job(state, **more):
    return dict({"job": 9, "state": state, "pass": "prefill", "layer": 1, "layers": 2}, **more)


@claim
def documents_are_handed_over_as_text_file_or_tokens():
    with fake.Daemon(lambda *_: job("queued")) as daemon, larder.Client(daemon.path) as client, \
            tempfile.NamedTemporaryFile() as f:
        f.write("Körner".encode())
        f.flush()
        import pathlib
        assert client.put("Körner", "a", policy="full", pin=True).state == "queued"
        client.put(pathlib.Path(f.name))
        client.put(np.array([5, 70000], np.int64), namespace="n")
        texts = [document for kind, _, document in daemon.seen if kind == fake.PUT]
        assert texts == ["Körner".encode()] * 2 + [struct.pack("<II", 5, 70000)]
        first, last = daemon.seen[1][1], daemon.seen[-1][1]
        assert first["name"] == "a" and first["policy"] == "full" and first["pin"] is True
        assert last["source"] == "tokens" and last["namespace"] == "n" and "name" not in last


@claim
def waiting_reports_progress_and_ends_as_the_job_does():
    ends = {"done": {"key": fake.KEY.hex()}, "failed": {"code": -13, "status": "LARDER_ETOOLONG",
                                                       "message": "too long"}, "canceled": {}}
    for end, more in ends.items():
        states = iter(["queued", "running", end])
        with fake.Daemon(lambda *_: job(next(states), **more)) as daemon, \
                larder.Client(daemon.path) as client:
            seen = []
            put = client.put("text")
            if end == "done":
                assert client.wait(put, progress=seen.append).key == fake.KEY.hex()
                assert [j.state for j in seen] == ["running", "done"] and seen[0].n_layers == 2
            else:
                raises({"failed": errors.TooLong, "canceled": errors.Canceled}[end], client.wait,
                       put)


@claim
def a_wait_that_takes_too_long_leaves_the_connection_usable():
    with fake.Daemon(lambda *_: job("running")) as daemon, larder.Client(daemon.path) as client:
        assert "still running" in raises(errors.DeadlinePassed, client.wait, 9, timeout=0)
        assert client.job(9).state == "running"


@claim
def threads_take_turns_on_one_client():
    def script(kind, body, _):
        return job("running", job=body["job"])
    with fake.Daemon(script) as daemon, larder.Client(daemon.path) as client:
        wrong = []

        def ask(start):
            for i in range(start, start + 50):
                if client.job(i).id != i:
                    wrong.append(i)
        threads = [threading.Thread(target=ask, args=(1000 * t,)) for t in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong and len(daemon.seen) == 201


@claim
def importing_needs_neither_library_nor_torch():
    code = ("import sys, larder; from larder import library; "
            "assert not library.library.cache_info().currsize and 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True,
                   env=dict(os.environ, PYTHONPATH=PACKAGE, LARDER_LIBRARY="/nowhere"))


if __name__ == "__main__":
    sys.exit(run_claims())
