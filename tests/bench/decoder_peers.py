#!/usr/bin/env python3
"""First token of a question from a stored cache, in each decoder beside its own prefill.

larder's own decoder, transformers and llama.cpp, each with its model open, answer a question about
a document: after a prefill of both, and from entries of the document that larderd has decoded,
fetched and handed over anew each time. All take turns (peers.py); one table. What a decoder cannot
take is a dash.
"""
import os
import statistics
import sys

from peers import (ROOT, Daemon, Larder, Missed, Process, arguments, measure, open_peers, session,
                   token_ids, write_ids, write_row)
from resume_peers import N_QUESTION, Stored

ENTRIES = {"full": "full", "even": "offline,rows=25%,shape=uniform,fit=values",
           "ragged": "offline,rows=25%"}
PEERS = {"torch-f32": "transformers", "llama.cpp": "llama.cpp"}
TAKES = {"larder": ENTRIES, "transformers": ENTRIES, "llama.cpp": ("full", "even")}


class Resumed:
    """An entry in a peer: fetched, handed over, and asked."""

    def __init__(self, peer, daemon, entry, n):
        self.peer, self.name, self.about = peer, "%s, %s" % (PEERS[peer.name], entry), peer.about
        self.command = ["stored", daemon.socket, entry, n, N_QUESTION]

    def run(self, _):
        return self.peer.call(*self.command)

    def close(self):
        pass


class Prefill:
    """A subject's own prefill of document and question."""

    def __init__(self, subject, decoder):
        self.subject, self.name, self.about = subject, decoder + ", prefill", subject.about

    def run(self, n):
        return self.subject.run(n)

    def close(self):
        self.subject.close()


def subjects_of(args, directory, missed, opened):
    daemon = Daemon(args.build, os.path.join(directory, "d"), args.model)
    opened.append(daemon)
    ids = write_ids(directory, args.tokens)
    for name, policy in ENTRIES.items():
        print("storing %d tokens: %s" % (args.tokens, policy), flush=True)
        daemon.put(ids, name, policy)
    decoder = Process("decoder", [os.path.join(args.build, "bench", "bench_all_resume"),
                                  args.model], directory)
    opened.append(decoder)
    question = token_ids(args.tokens + N_QUESTION)[args.tokens:]
    subjects = [Prefill(Larder(args.build, args.model, directory), "larder")]
    subjects += [Stored("larder, " + e, decoder, daemon, e, 0, question) for e in ENTRIES]
    os.environ["PYTHONPATH"] = os.path.join(ROOT, "client/python")
    os.environ["LARDER_LIBRARY"] = os.path.abspath(os.path.join(args.build, "liblarder.so"))
    for peer in open_peers(PEERS, args.model, args.tokens + N_QUESTION + 8, directory, missed):
        opened.append(peer)
        name = PEERS[peer.name]
        subjects += [Prefill(peer, name)]
        subjects += [Resumed(peer, daemon, e, args.tokens) for e in TAKES[name]]
    return subjects


def cell(runs):
    if not runs:
        return "-"
    return "%.0f (%.0f)" % (statistics.median(r["ms"] for r in runs), min(r["ms"] for r in runs))


def print_table(results, n):
    print("\nFirst token in ms, median (minimum), %d tokens and a question of %d:\n"
          % (n, N_QUESTION))
    print("| decoder | own prefill | %s |" % " | ".join("stored: " + p for p in ENTRIES.values()))
    print("|---" * (2 + len(ENTRIES)) + "|")
    for decoder in TAKES:
        print("| %s | %s |" % (decoder, " | ".join(
            cell(results.get("%s, %s" % (decoder, e))) for e in ("prefill", *ENTRIES))))


def main():
    parser = arguments(__doc__, 5)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the document")
    args = parser.parse_args()
    with session(args) as (out, directory, missed, opened):
        print("load of the machine before: %.2f" % os.getloadavg()[0])
        try:
            subjects = subjects_of(args, directory, missed, opened)
            results = measure(subjects, args.tokens + N_QUESTION, args.runs, missed)
            for s in subjects:
                write_row(out, "first token", s.name, args.tokens, "ms",
                          [r["ms"] for r in results[s.name]], s.about)
            print_table(results, args.tokens)
        except Missed as why:
            missed["stored documents"] = str(why)
    return 0


if __name__ == "__main__":
    sys.exit(main())
