#!/usr/bin/env python3
"""Prefill of the same tokens by larder, PyTorch with transformers, and llama.cpp (peers.py)."""
import statistics
import sys

from peers import PEERS, Larder, arguments, measure, open_peers, session, write_row

# larder is compared with the fastest peer. One that loses to another by this factor at the shortest
# length is not measured at the others: it would take most of the run.
HOPELESS = 1.5


def write_rows(out, n, results, about):
    for name, runs in results.items():
        def row(stage, subject, key, unit):
            write_row(out, stage, subject, n, unit, [r[key] for r in runs], about[name])
        row("prefill", name, "ms", "ms")
        if name == "larder":
            row("prefill", "larder: reading weights", "load", "ms")
            row("memory", "larder-prefill trace", "peak", "MiB")
    tokens = {name: runs[0]["token"] for name, runs in results.items()}
    if len(set(tokens.values())) > 1:
        print("next token after %d tokens differs: %s" % (n, tokens))


def drop_hopeless(subjects, n, results, missed):
    peers = {s.name: statistics.median(r["ms"] for r in results[s.name])
             for s in subjects if s.name in PEERS}
    best = min(peers, key=peers.get, default=None)
    for s in list(subjects):
        if s.name in peers and peers[s.name] > HOPELESS * peers[best]:
            missed[s.name] = "beyond %d tokens: it takes %.0f ms for them, %s %.0f" \
                             % (n, peers[s.name], best, peers[best])
            s.close()
            subjects.remove(s)


def main():
    parser = arguments(__doc__, 5)
    parser.add_argument("--tokens", default="512,2048,5000")
    args = parser.parse_args()
    lengths = [int(n) for n in args.tokens.split(",")]
    with session(args) as (out, directory, missed, subjects):
        subjects.append(Larder(args.build, args.model, directory))
        subjects += open_peers(PEERS, args.model, max(lengths), directory, missed)
        for n in lengths:
            print("prefill of %d tokens: %s" % (n, ", ".join(s.name for s in subjects)),
                  flush=True)
            results = measure(subjects, n, args.runs, missed)
            write_rows(out, n, results, {s.name: s.about for s in subjects})
            if n == lengths[0]:
                drop_hopeless(subjects, n, results, missed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
