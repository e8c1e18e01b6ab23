#!/usr/bin/env python3
"""leases.py SOCKET NAME - releases that are not answered, on larder.sock itself.

Ends with 0 when each did what PROTOCOL.md says.
"""
import json
import socket
import struct
import sys

HELLO, FETCH, RELEASE, STATUS, OK, ERROR = 1, 8, 9, 14, 100, 101


class Connection:
    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(30)
        self.sock.connect(path)
        self.seq = 0

    def send(self, kind, **body):
        self.seq += 1
        text = json.dumps(body).encode()
        self.sock.send(struct.pack("<IHHII", 0x4452524C, 1, kind, self.seq, len(text)) + text)

    def answer(self):
        """Kind and body of the next frame, which must answer the last request."""
        data, _, _, _ = socket.recv_fds(self.sock, 1 << 16, 1)
        kind, seq = struct.unpack_from("<HI", data, 6)
        assert seq == self.seq, (seq, self.seq)
        return kind, json.loads(data[16:])

    def ask(self, kind, **body):
        self.send(kind, **body)
        return self.answer()

    def leases(self):
        return self.ask(STATUS)[1]["images"]["leases"]


def main():
    path, name = sys.argv[1:]
    c = Connection(path)
    assert c.ask(HELLO, client="test")[1]["quiet_release"] is True
    kind, body = c.ask(FETCH, name=name)
    assert kind == OK and c.leases() == 1, body
    c.send(RELEASE, lease=body["lease"], quiet=True)
    assert c.leases() == 0, "a quiet release is a release, and STATUS is what is answered next"
    kind, _ = c.ask(RELEASE, lease=body["lease"], quiet=True)
    assert kind == ERROR, "what fails is answered"
    kind, body = c.ask(FETCH, name=name)
    assert c.ask(RELEASE, lease=body["lease"], quiet=False)[0] == OK and c.leases() == 0
    assert c.ask(RELEASE, lease=body["lease"], quiet="yes")[0] == ERROR


main()
