#!/usr/bin/python3
"""A decoder's view, written from ipc/PROTOCOL.md and ipc/IMAGE.md alone: no code of ours.

read_image.py SOCKET NAME [packed] fetches an image and prints as JSON its header, the number of
rows of every (layer, KV head), and a SHA-256 of each K and V.
"""
import array
import hashlib
import json
import mmap
import os
import socket
import struct
import sys

from read_entry import tile_bytes

FIELDS = ("magic version header_bytes n_bytes flags dtype n_layers n_heads n_kv_heads head_dim n_ctx next_pos "
          "n_vocab n_tokens text_len tokens_off text_off logits_off heads_off").split()


def ask(sock, kind, body):
    text = json.dumps(body).encode()
    sock.send(struct.pack("<IHHII", 0x4452524c, 1, kind, 1, len(text)) + text)
    data, ancillary, _, _ = sock.recvmsg(1 << 16, socket.CMSG_SPACE(4))
    fds = array.array("i")
    for level, what, payload in ancillary:
        if level == socket.SOL_SOCKET and what == socket.SCM_RIGHTS:
            fds.frombytes(payload)
    answer = json.loads(data[16:])
    assert struct.unpack("<IHHII", data[:16])[2] == 100, answer
    return answer, fds[0] if fds else None


def main():
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(sys.argv[1])
    ask(sock, 1, {"client": "read_image.py"})
    body = {"name": sys.argv[2]}
    if len(sys.argv) > 3:
        body["rows"] = sys.argv[3]
    answer, fd = ask(sock, 8, body)
    assert os.fstat(fd).st_size == answer["bytes"]
    im = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    out = dict(zip(FIELDS, struct.unpack_from("<QIIQ10I5Q", im)))
    assert out["magic"] == 0x4d4952454452414c and out["version"] == 1 and out["n_bytes"] == len(im)
    out["rows"], out["k"], out["v"] = [], [], []
    precision = {1: 1, 4: 4, 5: 5}[out["dtype"]]
    for i in range(out["n_layers"] * out["n_kv_heads"]):
        n, zero, k_off, v_off, _, _ = struct.unpack_from("<IIQQQQ", im, out["heads_off"] + 40 * i)
        assert not zero
        out["rows"].append(n)
        for name, off in (("k", k_off), ("v", v_off)):
            size = tile_bytes(precision, name == "k", n, out["head_dim"])
            assert off % 64 == 0 and off + size <= len(im)
            out[name].append(hashlib.sha256(im[off:off + size]).hexdigest())
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
