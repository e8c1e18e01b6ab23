#!/usr/bin/env python3
"""What a policy costs beside a prefill of the same tokens, and how a prefill's time grows.

Policies take turns (peers.py), after one calibration as a daemon makes it. A cut policy is compared
with its share of the full prefill's operations: layers above the cut see the tokens that passed it.
"""
import json
import os
import subprocess
import sys

from peers import Larder, Missed, arguments, measure, session, write_row

POLICIES = {"full": "full", "snapkv": "snapkv,rows=25%", "asl": "asl,rows=25%",
            "cheap": "keydiff,rows=75%,shape=shares,precision=int4",
            "offline,rows=25%,fit=none": "offline,rows=25%,fit=none", "offline": "offline"}


def program(args, *command):
    done = subprocess.run([os.path.join(args.build, "larder-prefill"), *command, "--model",
                           args.model], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Missed(done.stderr.strip())
    return done.stdout


def operations(shape, n):
    """Of one layer and n tokens: its matrices, and causal attention."""
    heads = shape["n_heads"] * shape["head_dim"]
    kv = shape["n_kv_heads"] * shape["head_dim"]
    matrices = shape["n_hidden"] * (2 * heads + 2 * kv + 3 * shape["n_ff"])
    return 2 * n * matrices + 2 * n * n * heads


def share_of(shape, n, result):
    """Of the operations of a full prefill, those that a cut leaves."""
    if result["sel_layer"] is None:
        return 1.0
    above = shape["n_layers"] - 1 - result["sel_layer"]
    left = operations(shape, len(result["selected"])) / operations(shape, n)
    return 1 - above / shape["n_layers"] * (1 - left)


def costs(args, shape, out, directory, missed):
    profile = os.path.join(directory, "profile.json")
    with open(profile, "w", encoding="utf-8") as f:
        f.write(program(args, "calibrate"))
    subjects = [Larder(args.build, args.model, directory, name, policy, ("--profile", profile))
                for name, policy in POLICIES.items()]
    print("policies on %d tokens: %s" % (args.tokens, "; ".join(POLICIES)), flush=True)
    results = measure(subjects, args.tokens, args.runs, missed, warm=0)
    for name, runs in results.items():
        cut = runs[0]["sel_layer"]
        note = "" if cut is None else "%d tokens after layer %d" % (len(runs[0]["selected"]), cut)
        write_row(out, "policy", name, args.tokens, "ms", [r["ms"] for r in runs], note)
    if "asl" in results and "full" in results:
        share = share_of(shape, args.tokens, results["asl"][0])
        write_row(out, "policy", "asl: its share of full", args.tokens, "ms",
                  [share * r["ms"] for r in results["full"]], "%.3f" % share)


def growth(args, shape, out, directory, missed):
    larder = Larder(args.build, args.model, directory)
    for n in map(int, args.growth.split(",")):
        print("prefill of %d tokens" % n, flush=True)
        runs = measure([larder], n, args.runs, missed, warm=0).get("larder")
        if not runs:
            return
        ms = [r["ms"] for r in runs]
        work = shape["n_layers"] * operations(shape, n)
        write_row(out, "prefill growth", "larder", n, "ms", ms, "")
        write_row(out, "prefill growth", "larder: operations", n, "GFLOP/s",
                  [work / x / 1e6 for x in ms], "")


def main():
    parser = arguments(__doc__, 3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--growth", default="1024,2048,4096,8000", help="lengths of prefills")
    args = parser.parse_args()
    with session(args) as (out, directory, missed, _):
        try:
            shape = json.loads(program(args, "info", "--json"))
            costs(args, shape, out, directory, missed)
            growth(args, shape, out, directory, missed)
        except Missed as why:
            missed["policies"] = str(why)
    return 0


if __name__ == "__main__":
    sys.exit(main())
