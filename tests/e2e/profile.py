#!/usr/bin/env python3
"""What clients and workers may try with profiles.

profile.py send SOCKET MODEL FILE   sends PROFILE with the file and prints what came back
profile.py worker --fd 3 ...        as larderd starts it: a worker of a small model that answers
                                    its jobs with a W_PROFILE; $PROFILE_CASES is a file with the
                                    number of the case, which each start raises by one
"""
import array
import fcntl
import hashlib
import json
import os
import socket
import struct
import sys

MAGIC, ALL_SEALS = 0x4452524C, 0xF
PROFILE = 17
W_HELLO, W_JOB, W_FAIL, W_PROFILE = 200, 201, 208, 210
LAYERS, HEADS = 2, 2
FINGERPRINT = "ab" * 32


def memfile(data, seals=ALL_SEALS):
    fd = os.memfd_create("larder-test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, data)
    if seals:
        fcntl.fcntl(fd, 1033, seals)
    return fd


def send(s, kind, body, fd=None):
    text = json.dumps(body).encode()
    packet = struct.pack("<IHHII", MAGIC, 1, kind, 1, len(text)) + text
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    s.sendmsg([packet], rights)


def recv(s):
    packet, fds, _, _ = socket.recv_fds(s, 65536, 2)
    for fd in fds:
        os.close(fd)
    return (struct.unpack_from("<H", packet, 6)[0], json.loads(packet[16:])) if packet else (None, None)


def send_profile(path, model, data):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect(path)
    send(s, PROFILE, {"model": model, "bytes": len(data)}, memfile(data))
    _, body = recv(s)
    print(json.dumps(body))


def make(share=0.25, **other):
    """A profile of the small model."""
    numbers = struct.pack("<3I%df" % (1 + LAYERS * HEADS), 1, LAYERS * HEADS, 1, 0.25,
                          *[share] * (LAYERS * HEADS))
    p = {"version": 1, "model_fingerprint": FINGERPRINT,
         "id": hashlib.sha256(numbers).hexdigest()[:12], "n_layers": LAYERS, "n_kv_heads": HEADS,
         "measured": 1, "backend": "cpu", "dtype": "f32", "template": "plain",
         "texts": [{"name": "t", "n_tokens": 3}],
         "shares": [{"budget": 0.25, "share": [share] * (LAYERS * HEADS)}]}
    p.update(other)
    return json.dumps(p).encode()


def cases():
    """Name of the model in the frame, announced size, bytes, seals; the last one is good."""
    good = make()
    yield "m", len(good) + 1, good, ALL_SEALS
    yield "m", len(good), good, 0
    yield "m", 1 << 40, good, ALL_SEALS
    yield "other", len(good), good, ALL_SEALS
    for text in (b"{", b"[" * 100000, b'{"id":1,"id":1}', make(model_fingerprint="00" * 32), make(n_layers=4),
                 make(share=2), make(id="0123456789ab"), make(surprise=1)):
        yield "m", len(text), text, ALL_SEALS
    yield "m", len(good), good, ALL_SEALS


def hello():
    m = {"name": "m", "path": "m", "dev": 1, "ino": 1, "size": 1, "mtime_ns": 1,
         "fingerprint": FINGERPRINT, "tokenizer_fingerprint": "00" * 32, "template": "plain",
         "template_fingerprint": "00" * 32, "n_layers": LAYERS, "n_heads": HEADS,
         "n_kv_heads": HEADS, "head_dim": 8, "n_vocab": 10, "n_positions": 100, "arch": "llama"}
    return {"pid": os.getpid(), "backend": "cpu", "isa": "none", "dtype": "f32", "threads": 1,
            "models": [m]}


def next_case():
    path = os.environ["PROFILE_CASES"]
    every = list(cases())
    with open(path) as f:
        n = int(f.read())
    return every[min(n, len(every) - 1)], n


def worker():
    s = socket.socket(fileno=3)
    send(s, W_HELLO, hello())
    while True:
        kind, body = recv(s)
        if kind is None:
            return
        if kind != W_JOB:  # what it was told is told on
            print("was sent frame", kind, file=sys.stderr, flush=True)
            continue
        (model, size, data, seals), n = next_case()
        with open(os.environ["PROFILE_CASES"], "w") as f:
            f.write(str(n + 1))
        send(s, W_PROFILE, {"model": model, "bytes": size}, memfile(data, seals))
        send(s, W_FAIL, {"job": body["job"], "code": -1, "message": "enough of case %d" % n})


if __name__ == "__main__":
    worker() if sys.argv[1] == "worker" else send_profile(
        sys.argv[2], sys.argv[3], open(sys.argv[4], "rb").read())
