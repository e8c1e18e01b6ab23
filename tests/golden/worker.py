"""A second writer of PROTOCOL.md section 5 and IMAGE.md, in 130 lines of Python.

Plays the daemon towards `larder-prefill worker` and fills a cache image from what comes
back, so that frames, layer files and the image are checked by code that shares nothing
with the C side.
"""
import fcntl
import json
import os
import socket
import struct
import subprocess

MAGIC = 0x4452524C
F_ADD_SEALS, ALL_SEALS = 1033, 0xF
W_HELLO, W_JOB, W_PREPARED, W_GO, W_SKIP = 200, 201, 202, 203, 204
W_PROGRESS, W_LAYER, W_DONE, W_FAIL, W_CANCEL = 205, 206, 207, 208, 209


def memfile(data):
    fd = os.memfd_create("larder-test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]
    fcntl.fcntl(fd, F_ADD_SEALS, ALL_SEALS)
    return fd


def take(fd):
    """The bytes of a received file, which is closed."""
    try:
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


class Worker:
    def __init__(self, program, model, options):
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [program, "worker", "--fd", str(theirs.fileno()), "--model", "m=" + model]
                + options,
                pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
        kind, self.hello, _ = self.recv()
        assert kind == W_HELLO

    def send(self, kind, body, fd=None):
        text = json.dumps(body).encode()
        packet = struct.pack("<IHHII", MAGIC, 1, kind, 1, len(text)) + text
        socket.send_fds(self.sock, [packet], [] if fd is None else [fd])
        if fd is not None:
            os.close(fd)

    def recv(self):
        packet, fds, _, _ = socket.recv_fds(self.sock, 65536, 2)
        if not packet:
            raise RuntimeError("the worker ended: " + self.process.stderr.read().strip())
        magic, version, kind, _, n = struct.unpack_from("<IHHII", packet)
        assert (magic, version, n) == (MAGIC, 1, len(packet) - 16) and len(fds) <= 1
        return kind, json.loads(packet[16:]), fds[0] if fds else None

    def close(self):
        """-> the worker's exit status after the socket is gone"""
        self.sock.close()
        self.process.stderr.close()
        return self.process.wait(timeout=60)

    def prepare(self, job, policy, ids):
        data = struct.pack("<%dI" % len(ids), *ids)
        self.send(W_JOB, {"job": job, "model": "m", "policy": policy, "source": "tokens",
                          "bytes": len(data)}, memfile(data))
        kind, body, fd = self.recv()
        if kind == W_PREPARED:
            assert take(fd) == data and body["n_ctx"] == len(ids)
        return kind, body

    def prefill(self, job, policy, ids, cancel_at=None):
        """-> (last frame's kind and body, layers as (row counts, bytes), logits)"""
        kind, body = self.prepare(job, policy, ids)
        if kind != W_PREPARED:
            return kind, body, [], b""
        self.send(W_GO, {"job": job})
        layers = []
        while True:
            kind, body, fd = self.recv()
            assert body["job"] == job
            if kind == W_LAYER:
                assert body["layer"] == len(layers) and body["has_bias"] is False
                layers.append((body["rows"], take(fd)))
            elif kind == W_PROGRESS:
                if body["layer"] == cancel_at:
                    self.send(W_CANCEL, {"job": job})
            else:
                return kind, body, layers, take(fd) if fd is not None else b""


def align(n, to):
    return (n + to - 1) // to * to


def image(model, ids, done, layers, logits):
    """The one legal layout of IMAGE.md, as bytes."""
    geometry = [model[k] for k in ("n_layers", "n_heads", "n_kv_heads", "head_dim")]
    width = 2 * geometry[3]
    heads = []  # (positions, K, V) in bytes
    for rows, data in layers:
        at = 0
        for n in rows:
            parts = []
            for size in (4 * n, n * width, n * width):
                parts.append(data[at:at + size])
                at += size
            heads.append((n, parts))
        assert at == len(data)
    out = bytearray(256 + 40 * len(heads))

    def put(data, to):
        off = align(len(out), to)
        out.extend(bytes(off - len(out)))
        out.extend(data)
        return off

    tokens_off = put(struct.pack("<%dI" % len(ids), *ids), 64)
    logits_off = put(logits, 64)
    text_off = put(b"", 64)
    position_off = [put(parts[0], 64) for _, parts in heads]
    for i, (n, parts) in enumerate(heads):
        k_off = put(parts[1], 4096 if i % geometry[2] == 0 else 64)
        v_off = put(parts[2], 64)
        struct.pack_into("<IIQQQQ", out, 256 + 40 * i, n, 0, k_off, v_off, position_off[i], 0)
    put(b"", 4096)
    struct.pack_into("<8sIIQII4IIIIIQQQQQ", out, 0, b"LARDERIM", 1, 256, len(out),
                     2 if done["renumbered"] else 0, 1, *geometry, len(ids), done["next_pos"],
                     len(logits) // 4, len(ids), 0, tokens_off, text_off, logits_off, 256)
    out[160:192] = bytes.fromhex(model["fingerprint"])
    out[192:224] = bytes.fromhex(model["tokenizer_fingerprint"])
    return bytes(out)
