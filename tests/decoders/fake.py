"""fake.py - images written from ipc/IMAGE.md, and a scripted daemon that hands them out.

The daemon is a thread with a SEQPACKET socket; a script is a function from (type, body) to an
answer: a body, (body, descriptor), or an exception's worth of ERROR. It knows nothing of liblarder.
"""
import array
import fcntl
import json
import os
import socket
import struct
import tempfile
import threading

MAGIC = 0x4452524c
HELLO, PUT, JOB, FETCH, RELEASE, LS, OK, ERROR = 1, 2, 3, 8, 9, 10, 100, 101
SEALS = 0x0001 | 0x0002 | 0x0004 | 0x0008
F_ADD_SEALS = 1033
KEY = bytes(range(32))


def aligned(n, to):
    return -(-n // to) * to


class ImageWriter:
    """A tiny image with ragged heads; `tiles` gives the bytes of K and V by (layer, head)."""

    def __init__(self, rows, head_dim, tiles, bias=None, dtype=1, n_heads=4, n_ctx=128):
        self.rows, self.head_dim, self.tiles, self.bias = rows, head_dim, tiles, bias
        self.n_layers, self.n_kv = len(rows), len(rows[0])
        self.dtype, self.n_heads, self.n_ctx, self.n_vocab = dtype, n_heads, n_ctx, 100
        self.text = "Ein Text über Körner.".encode()
        self.tokens = [(7 * i) % self.n_vocab for i in range(n_ctx)]
        self.logits = [i / 8 for i in range(self.n_vocab)]

    def positions(self, layer, head):
        return [3 * i + head for i in range(self.rows[layer][head])]

    def heads(self):
        return [(l, h) for l in range(self.n_layers) for h in range(self.n_kv)]

    def place(self, data, align=64):
        self.out += bytes(aligned(len(self.out), align) - len(self.out))
        at = len(self.out)
        self.out += data
        return at

    def bytes(self):
        self.out = bytearray(256 + 40 * len(self.heads()))
        tokens = self.place(struct.pack("<%dI" % self.n_ctx, *self.tokens))
        logits = self.place(struct.pack("<%df" % self.n_vocab, *self.logits))
        text = self.place(self.text)
        where = {}
        for l, h in self.heads():
            p = self.positions(l, h)
            pos = self.place(struct.pack("<%dI" % len(p), *p))
            b = self.bias and self.bias(l, h)
            where[l, h] = [pos, self.place(struct.pack("<%df" % len(b), *b)) if self.bias else 0]
        for i, (l, h) in enumerate(self.heads()):
            k, v = self.tiles(l, h)
            k_off = self.place(k, 64 if h else 4096)
            v_off = self.place(v)
            struct.pack_into("<IIQQQQ", self.out, 256 + 40 * i, self.rows[l][h], 0, k_off, v_off,
                             *where[l, h])
        self.place(b"", 4096)
        struct.pack_into("<QIIQ10I5Q", self.out, 0, 0x4d4952454452414c, 1, 256, len(self.out),
                         bool(self.bias), self.dtype, self.n_layers, self.n_heads, self.n_kv,
                         self.head_dim, self.n_ctx, self.n_ctx, self.n_vocab, self.n_ctx,
                         len(self.text), tokens, text, logits, 256)
        struct.pack_into("<32s32s32s", self.out, 128, KEY, b"\1" * 32, b"\2" * 32)
        return bytes(self.out)


def memory_file(data, sealed=True):
    fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if sealed:
        fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
    return fd


def fetch_answer(data, n_bytes=None, key=KEY, **entry):
    entry = dict({"key": key.hex(), "n_ctx": 128, "next_pos": 128, "name": "default/x"}, **entry)
    return {"lease": 1, "bytes": len(data) if n_bytes is None else n_bytes, "entry": entry}


class Refusal(Exception):
    def __init__(self, code, status, message):
        super().__init__(message)
        self.body = {"code": code, "status": status, "message": message}


class Daemon:
    """`script(kind, body, document)` answers; None: no answer. `seen` holds the requests."""

    def __init__(self, script):
        self.dir = tempfile.TemporaryDirectory(prefix="larder-fake-")
        self.path = os.path.join(self.dir.name, "s")
        self.script, self.seen = script, []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.path)
        self.listener.listen(8)
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()
        self.dir.cleanup()

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        with sock:
            while self.one(sock):
                pass

    def one(self, sock):
        """Answer a request; False at the end of the connection."""
        data, ancillary, _, _ = sock.recvmsg(1 << 16, socket.CMSG_SPACE(4))
        if data:
            _, _, kind, seq, _ = struct.unpack_from("<IHHII", data)
            body, document = json.loads(data[16:]), None
            for _, _, payload in ancillary:
                fds = array.array("i", payload)
                document = os.pread(fds[0], 1 << 20, 0)
                os.close(fds[0])
            self.seen.append((kind, body, document))
            self.answer(sock, kind, seq, body, document)
        return bool(data)

    def answer(self, sock, kind, seq, body, document):
        status, fd = OK, None
        try:
            if kind == HELLO:
                reply = {"server": "fake", "protocol": 1, "namespaces_restricted": False}
            elif kind == RELEASE:
                reply = {}
            else:
                reply = self.script(kind, body, document)
        except Refusal as why:
            status, reply = ERROR, why.body
        if reply is None:
            return
        if isinstance(reply, tuple):
            reply, fd = reply
        text = json.dumps(reply).encode()
        packet = struct.pack("<IHHII", MAGIC, 1, status, seq, len(text)) + text
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd else []
        sock.sendmsg([packet], rights)
        if fd:
            os.close(fd)
