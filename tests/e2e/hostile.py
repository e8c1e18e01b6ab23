#!/usr/bin/env python3
"""What a hostile client may try on larder.sock; ends with 0 when an honest one is still served."""
import array
import json
import os
import socket
import struct
import sys
import time

MAGIC = 0x4452524c


def connect():
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.settimeout(10)
    s.connect(sys.argv[1])
    return s


def frame(kind, body=b"{}", magic=MAGIC, version=1, length=None, seq=1):
    return struct.pack("<IHHII", magic, version, kind, seq, len(body) if length is None else length) + body


def reply(s):
    data = s.recv(1 << 16)
    return struct.unpack("<IHHII", data[:16])[2], json.loads(data[16:])


def ends(s):
    """The daemon closes the connection, after at most one ERROR frame."""
    try:
        data = s.recv(1 << 16)
        assert not data or struct.unpack_from("<H", data, 6)[0] == 101, data
        assert not data or not s.recv(1 << 16)
    except ConnectionResetError:
        pass
    s.close()


def bad_packets():
    yield b"x"
    yield b"\0" * 16
    yield frame(14, magic=1)
    yield frame(14, version=0)
    yield frame(14, version=65535)
    yield frame(14, length=0)
    yield frame(14, length=2 ** 32 - 1)
    yield frame(14, length=2 ** 31)
    yield frame(14, b"{} trailing")
    yield frame(14, b"[]")
    yield frame(14, b"")
    yield frame(14, b'{"a":1,"a":2}')
    yield frame(14, b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}")
    yield frame(14, b"\xff\xfe")
    yield frame(0)
    yield frame(99)
    yield frame(100)
    yield frame(200)
    yield frame(206)


def send_fds(s, data, fds):
    s.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def hostile_descriptors():
    put = json.dumps({"source": "text", "bytes": 5}).encode()
    for path in ("/dev/zero", "/proc/self/mem", "/", sys.argv[1]):
        flags = os.O_PATH if path == sys.argv[1] else os.O_RDONLY
        fd = os.open(path, flags)
        s = connect()
        send_fds(s, frame(2, put), [fd])
        kind, _ = reply(s)
        assert kind == 101, path
        s.close()
        os.close(fd)
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.write(fd, b"hello")
    s = connect()
    send_fds(s, frame(2, put), [fd])
    assert reply(s)[0] == 101
    s.close()
    for n in (2, 3, 200):
        s = connect()
        send_fds(s, frame(14), [fd] * n)
        ends(s)
    s = connect()
    send_fds(s, frame(14), [fd])  # none belongs here
    ends(s)
    os.close(fd)


def floods():
    s = connect()
    s.setblocking(False)
    try:
        for _ in range(20000):  # never reads
            s.send(frame(14))
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        pass
    s.close()
    for _ in range(300):
        try:
            connect().close()
        except BlockingIOError:
            pass  # the backlog is full, as it may be
    crowd = []
    try:
        for _ in range(400):
            crowd.append(connect())
    except OSError:
        pass
    for s in crowd:
        s.close()


def fields():
    for kind, body in ((8, {"key": "zz"}), (8, {"name": "../x"}), (8, {}), (9, {"lease": -1}), (9, {"lease": 2 ** 53}),
                       (8, {"name": "x", "rows": 4}), (10, {"limit": 2 ** 40}), (3, {"job": -5}), (2, {"source": "text", "bytes": 2 ** 52}),
                       (2, {"source": "text", "bytes": -1}), (13, {"name": "x", "pin": 3}), (14, {"surprise": 1})):
        s = connect()
        s.send(frame(kind, json.dumps(body).encode()))
        assert reply(s)[0] == 101, body
        s.close()


def main():
    for packet in bad_packets():
        s = connect()
        s.send(packet)
        ends(s)
    hostile_descriptors()
    fields()
    floods()
    time.sleep(1)
    s = connect()
    s.send(frame(1, b'{"client":"honest"}'))
    assert reply(s)[0] == 100
    s.send(frame(14))
    kind, status = reply(s)
    assert kind == 100 and status["clients"] <= 2, status


if __name__ == "__main__":
    main()
