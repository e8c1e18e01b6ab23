#!/usr/bin/env python3
"""The first fetch of an entry after a start of the machine, beside reading a plain file.

Each run stops larderd, drops its store from the page cache (nobody maps it then), starts it and
fetches once. The plain file, beside the store, has as many bytes as the image and is dropped and
read likewise, into memory that has been touched before.
"""
import os
import subprocess
import sys

from peers import Daemon, Missed, arguments, session, timed

BLOCK = 1 << 20


def drop(path):
    """Out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def fetch(args, home):
    """(microseconds, MiB) of the first fetch."""
    drop(os.path.join(home, "store", "data.mdb"))
    daemon = Daemon(args.build, home, args.model)
    try:
        done = subprocess.run([os.path.join(args.build, "bench", "bench_client_fetch"), "--cold",
                               args.name], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, env=dict(os.environ, LARDER_SOCKET=daemon.socket))
    finally:
        daemon.close()
    if done.returncode:
        raise Missed(done.stderr.strip())
    head, row = (line.split(",") for line in done.stdout.split())
    row = dict(zip(head, row))
    return float(row["median_us"]), float(row["mib"])


def read(path, into):
    drop(path)
    fd = os.open(path, os.O_RDONLY)
    try:
        ms, _ = timed(lambda: [os.preadv(fd, [part], i * BLOCK) for i, part in enumerate(into)])
    finally:
        os.close(fd)
    return ms * 1e3


def main():
    parser = arguments(__doc__, 5)
    parser.add_argument("--home", required=True, help="directory of a private daemon, stopped")
    parser.add_argument("--name", required=True, help="the entry")
    args = parser.parse_args()
    with session(args) as (out, directory, missed, _):
        try:
            fetched = [fetch(args, args.home) for _ in range(args.runs)]
        except Missed as why:
            missed["a cold fetch"] = str(why)
            return 0
        mib = fetched[0][1]
        into = [bytearray(os.urandom(BLOCK)) for _ in range(round(mib))]
        path = os.path.join(args.home, "plain")
        with open(path, "wb") as f:
            f.writelines(into)
        plain = [read(path, into) for _ in range(args.runs)]
        os.unlink(path)
        for name, us in (("cold", [x for x, _ in fetched]), ("cold plain file", plain)):
            us.sort()
            out.writerow(["fetch", name, "MiB", "%.1f" % mib, "us", "%.1f" % us[0],
                          "%.1f" % us[len(us) // 2], len(us), ""])
    return 0


if __name__ == "__main__":
    sys.exit(main())
