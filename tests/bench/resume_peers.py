#!/usr/bin/env python3
"""First token of a question behind a long document, and tokens per second from there on.

The document is stored with larderd in advance, whole and pruned, and a decoder that has its model
open fetches it from two daemons: one that still has the image decoded, and one that keeps none and
reads, decompresses and verifies the entry each time (fresh). Beside it: llama.cpp with a state of
the same document that it saved to a file next to the store. All take turns (peers.py). What a
prefill of the document takes instead is prefill_peers.py's.
"""
import os
import shutil
import sys

from peers import (Daemon, Missed, Process, arguments, measure, open_peers, session, token_ids,
                   write_ids, write_row)

ENTRIES = {"full": "full", "rows512": "snapkv,rows=512", "offline": "offline,rows=25%"}
EXACT = ("llama.cpp", "full, decoded", "full, fresh")
N_QUESTION = 20


class Stored:
    """An entry of one daemon, asked by the decoder."""

    def __init__(self, name, decoder, daemon, entry, n_new, question):
        self.name, self.decoder, self.about = name, decoder, ""
        self.line = " ".join([daemon.socket, entry, str(n_new)] + [str(i) for i in question])

    def run(self, _):
        result = self.decoder.ask(self.line)
        self.about = "%s, image of %.1f MiB" % (result["about"], result["mib"])
        return result

    def close(self):
        pass


class Restored:
    """llama.cpp with a state that it saved."""

    def __init__(self, peer, n, n_new, path):
        self.peer, self.name = peer, peer.name
        self.command = ["resume", n, path, N_QUESTION, n_new]
        mib = peer.call("save", n, path)["mib"]
        self.about = "%s, state of %.1f MiB" % (peer.about, mib)

    def run(self, _):
        return self.peer.call(*self.command)

    def close(self):
        self.peer.close()


def store(args, directory):
    """Entries of the document in DIRECTORY/a, and a copy of them in DIRECTORY/b."""
    first, second = (os.path.join(directory, x) for x in "ab")
    daemon = Daemon(args.build, first, args.model)
    try:
        for name, policy in ENTRIES.items():
            print("storing %d tokens: %s" % (args.tokens, policy), flush=True)
            daemon.put(write_ids(directory, args.tokens), name, policy)
    finally:
        daemon.close()
    shutil.rmtree(second, ignore_errors=True)
    shutil.copytree(os.path.join(first, "store"), os.path.join(second, "store"))
    return first, second


def open_stored(args, directory, opened):
    """The decoder's subjects; what they need is added to `opened`."""
    first, second = store(args, directory)
    question = token_ids(args.tokens + N_QUESTION)[args.tokens:]
    decoder = Process("decoder", [os.path.join(args.build, "bench", "bench_all_resume"),
                                  args.model], directory)
    opened.append(decoder)
    subjects = []
    for kind, where, settings in (("decoded", first, []), ("fresh", second,
                                                           ["image_cache_bytes=0"])):
        daemon = Daemon(args.build, where, args.model, *settings)
        opened.append(daemon)
        subjects += [Stored("%s, %s" % (name, kind), decoder, daemon, name, args.new, question)
                     for name in ENTRIES]
    return subjects


def open_subjects(args, directory, missed, opened):
    subjects = open_stored(args, directory, opened)
    longest = args.tokens + N_QUESTION + args.new
    for peer in open_peers(("llama.cpp",), args.model, longest, directory, missed):
        opened.append(peer)
        subjects.append(Restored(peer, args.tokens, args.new, os.path.join(directory, "state")))
    return subjects


def write_rows(out, args, results, about):
    for name, runs in results.items():
        label = "llama.cpp, restored" if name == "llama.cpp" else "larder, " + name

        def row(stage, subject, unit, values, digits=1):
            write_row(out, stage, subject, args.tokens, unit, values, about[name], digits)
        row("first token", label, "ms", [r["ms"] for r in runs])
        row("first token", label + ": fetch", "ms", [r["fetch_ms"] for r in runs], 3)
        row("decode", label, "tokens/s", [args.new * 1e3 / r["decode_ms"] for r in runs])
    tokens = {name: runs[0]["token"] for name, runs in results.items() if name in EXACT}
    if len(set(tokens.values())) > 1:
        print("the first token differs: %s" % tokens)


def main():
    parser = arguments(__doc__, 5)
    parser.add_argument("--tokens", type=int, default=5000, help="length of the document")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate after the first")
    parser.add_argument("--store", help="directory for the store, kept and used again")
    args = parser.parse_args()
    with session(args) as (out, directory, missed, opened):
        try:
            subjects = open_subjects(args, args.store or directory, missed, opened)
            print("a question on %d tokens: %s" % (args.tokens,
                                                   "; ".join(s.name for s in subjects)), flush=True)
            results = measure(subjects, args.tokens + N_QUESTION, args.runs, missed)
            write_rows(out, args, results, {s.name: s.about for s in subjects})
        except Missed as why:
            missed["a stored document"] = str(why)
    return 0


if __name__ == "__main__":
    sys.exit(main())
