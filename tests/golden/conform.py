#!/usr/bin/env python3
"""Golden conformance: the engine against recorded runs of the reference implementation.

Each recorded run (data/README.md) is repeated with `larder-prefill trace` and
`larder-prefill ask`; every quantity is compared with the tolerance that its noise
justifies. Prints TAP. In f32 sets must be equal outside the listed near-ties; in bf16
the selection layer must be the same and kept rows must overlap by 98 %.
"""
import argparse
import glob
import gzip
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(HERE, "data", "public")
MODEL = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")),
                     "larder", "SmolLM2-135M-Instruct.Q4_1.gguf")
LOGIT_TOL = 1e-3        # last document row, equal sets
QUESTION_TOL = 2e-3     # last question row, equal sets
NEAR_TIE_TOL = 0.05     # top 5 only, when a set differs inside its near-ties
VARIANCE_TOL = {"avgpool": 1e-3, "maxpool": 2e-2}
MIN_GAP = 5e-3          # greedy tokens count up to the first step closer than this
MIN_OVERLAP = 0.98      # bf16


def policy_of(run):
    """The policy string of a recorded run's parameters."""
    p, method = run["params"], run["method"]
    if method == "full":
        return "full"
    if method == "gemfilter":
        return "gemfilter,rows=%d,pool=%d,layer=%d" % (p["select_k"], p["S"], p["filter_layer"])
    keys = []
    rows = p["select_k"] if method == "asl_2pass" else p.get("cache_k")
    keys.append("rows=%s" % ("all" if rows is None else rows))
    if method not in ("snapkv", "asl_2pass"):
        keys.append("select=%d" % p["select_k"])
    keys += ["w=%d" % p["w"], "pool=%d" % p["S"], "poolkind=" + p["pool"].replace("pool", "")]
    if method in ("asl", "asl_2pass"):
        keys += ["lmin=%d" % p["L_min"], "lobs=%d" % p["L_obs"], "tau=%g" % p["tau"]]
    if method == "fastkv":
        keys.append("layer=%d" % p["tsp_layer"])
    return ",".join([method.replace("_", "")] + keys)


def positions(runs):
    """[start, len, start, len, ...] as a set."""
    out = set()
    for start, length in zip(runs[::2], runs[1::2]):
        out.update(range(start, start + length))
    return out


def kept_sets(run):
    """Recorded kept positions: [layer][head] sets."""
    everything, selected = set(range(run["n"])), positions(run.get("SEL") or [])
    heads = 3
    out = []
    for layer in run.get("keep", []):
        if layer == "all":
            out.append([everything] * heads)
        elif layer == "sel":
            out.append([selected] * heads)
        else:
            out.append([positions(h) for h in layer])
    return out


def near_ties(run):
    """Positions that may flip: [layer][head] sets, as kept_sets()."""
    out = []
    for layer in run.get("keep_margin", []):
        out.append([set()] * 3 if layer is None else [set(h[1]) for h in layer])
    return out


class Failed(Exception):
    """A comparison that did not hold; its text says which."""


def expect(holds, text):
    if not holds:
        raise Failed(text)


class Engine:
    def __init__(self, args, directory):
        self.program = os.path.join(args.build, "larder-prefill")
        self.options = ["--model", MODEL, "--backend", args.backend, "--dtype", args.dtype, "--json"]
        self.directory = directory

    def ids_file(self, name, ids):
        path = os.path.join(self.directory, name)
        if not os.path.exists(path):
            with open(path, "w") as f:
                f.write(" ".join(map(str, ids)))
        return path

    def run(self, *args):
        done = subprocess.run([self.program, *args, *self.options], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
        expect(done.returncode == 0, done.stderr.strip() or "exit %d" % done.returncode)
        return json.loads(done.stdout)


def check_trace(run, got):
    """Selection layer, variance of every tested layer, selected tokens, kept rows.
    True when every set is exactly equal."""
    exact = True
    if run["method"] == "asl":
        expect(got["sel_layer"] == run["L_sel"],
               "sel_layer %s, recorded %s" % (got["sel_layer"], run["L_sel"]))
        tol = VARIANCE_TOL[run["params"]["pool"]]
        expect(len(got["rank_variance"]) == len(run["rel_trace"]),
               "%d points in the trace, recorded %d" % (len(got["rank_variance"]), len(run["rel_trace"])))
        for point, want in zip(got["rank_variance"], run["rel_trace"]):
            expect(point["layer"] == want[0], "trace layer %d, recorded %d" % (point["layer"], want[0]))
            expect(abs(point["value"] - want[3]) <= tol * want[3] + 1e-12
                   and abs(point["ratio"] - want[4]) <= tol * want[4] + 1e-12,
                   "variance of layer %d: %g (%g), recorded %g (%g)"
                   % (want[0], point["value"], point["ratio"], want[3], want[4]))
    if "SEL" in run:
        if run["SEL"] is None:
            expect(got["selected"] is None, "a cut where none is recorded")
        else:
            flips = set(got["selected"] or []) ^ positions(run["SEL"])
            expect(flips <= set(run["SEL_margin"][1]), "selected tokens differ at %s" % sorted(flips)[:8])
            exact &= not flips
    for layer, (want, ties) in enumerate(zip(kept_sets(run), near_ties(run))):
        for head in range(len(want)):
            flips = set(got["rows"][layer][head]) ^ want[head]
            expect(flips <= ties[head], "layer %d head %d: rows differ at %s"
                   % (layer, head, sorted(flips)[:8]))
            exact &= not flips
    return exact


def check_logits(got, want, tol, exact, what):
    """Top-20 within tol, by token id; after a near-tie flip only the top 5, loosely."""
    mine = dict((int(i), v) for i, v in got)
    if not exact:
        want, tol = want[:5], NEAR_TIE_TOL
    for token, value in want[:-2]:  # the last two may leave the list by rounding
        expect(token in mine, "%s: token %d is not among the top" % (what, token))
        expect(abs(mine[token] - value) <= tol,
               "%s: token %d has %.5f, recorded %.5f" % (what, token, mine[token], value))


def check_greedy(got, resume):
    for step, (mine, want, gap) in enumerate(zip(got, resume["greedy"], resume["greedy_gap"])):
        if gap < MIN_GAP:
            return
        expect(mine == want, "greedy step %d: token %d, recorded %d" % (step, mine, want))


def conform_f32(engine, run, ids):
    trace = engine.run("trace", "--tokens", ids, "--policy", policy_of(run))
    expect(trace["n_ctx"] == run["n"], "n_ctx %d, recorded %d" % (trace["n_ctx"], run["n"]))
    expect(trace["next_pos"] == run["resume"][0]["question_pos0"], "next_pos %d" % trace["next_pos"])
    exact = check_trace(run, trace)
    check_logits(trace["top_logits"], run["logits_doc_end"], LOGIT_TOL, exact, "document end")
    resume = run["resume"][0]
    question = engine.ids_file("q_" + run["doc"], resume["question_ids"])
    answer = engine.run("ask", "--doc-tokens", ids, "--policy", policy_of(run), "--tokens", question,
                        "--max-new", str(len(resume["greedy"])), "--ignore-eos")
    expect(answer["question_ids"] == resume["question_ids"], "question ids changed")
    check_logits(answer["top_logits"], resume["logits_question"], QUESTION_TOL, exact, "question")
    if exact:
        expect(len(answer["generated_ids"]) == len(resume["greedy"]), "too few tokens generated")
        check_greedy(answer["generated_ids"], resume)


def conform_bf16(engine, run, ids):
    trace = engine.run("trace", "--tokens", ids, "--policy", policy_of(run))
    if run["method"] == "asl":
        expect(trace["sel_layer"] == run["L_sel"],
               "sel_layer %s, recorded %s" % (trace["sel_layer"], run["L_sel"]))
    same = total = 0
    for layer, want in enumerate(kept_sets(run)):
        for head in range(len(want)):
            same += len(set(trace["rows"][layer][head]) & want[head])
            total += len(want[head])
    if run.get("SEL") and not total:  # two-pass methods record the selected tokens only
        same, total = len(set(trace["selected"]) & positions(run["SEL"])), len(positions(run["SEL"]))
    expect(same >= MIN_OVERLAP * total, "%.2f %% of the kept rows agree" % (100 * same / max(total, 1)))


def chosen(args):
    """Recorded runs; the subset covers every method, cut or not, on the larger document."""
    names = sorted(glob.glob(os.path.join(DATA, "asl_*.json.gz")))
    if not args.subset:
        return names
    b2000 = ["full", "asl_k512_m14_t0.5", "asl_k256_m7_t0.5", "asl_k512_m14_t0.8_nobudget", "fastkv_k256",
             "snapkv_k1024", "gemfilter_k512", "asl2pass_k512_m14_t0.8"]
    a700 = ["full", "asl_k256_m14_t0.5", "asl_k256_m14_t0.8_maxpool", "asl_k256_m14_t0.8_ck128",
            "fastkv_k128", "snapkv_k256", "gemfilter_k256", "asl2pass_k128_m14_t0.8"]
    keep = ["asl_a700_%s.json.gz" % n for n in a700]
    if args.backend == "cpu":
        keep += ["asl_b2000_%s.json.gz" % n for n in b2000]
        if args.dtype == "f32":
            keep += [os.path.basename(n) for n in names if "_a700_" in n]
    return [n for n in names if os.path.basename(n) in keep]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default="build")
    parser.add_argument("--backend", choices=("ref", "cpu"), default="cpu")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--subset", action="store_true", help="a covering choice, for make check")
    args = parser.parse_args()
    if not os.path.exists(MODEL):
        print("no model at %s; run: sh etc/setup.sh" % MODEL, file=sys.stderr)
        sys.exit(77)
    failures = 0
    with tempfile.TemporaryDirectory(prefix="larder-golden-") as directory:
        engine = Engine(args, directory)
        for path in chosen(args):
            with gzip.open(path, "rt") as f:
                run = json.load(f)
            with open(os.path.join(DATA, "doc_%s.json" % run["doc"])) as f:
                ids = engine.ids_file("d_" + run["doc"], json.load(f)["ids"])
            name = "%s %s: %s" % (args.backend, args.dtype, os.path.basename(path)[4:-8])
            try:
                (conform_bf16 if args.dtype == "bf16" else conform_f32)(engine, run, ids)
                print("ok - " + name, flush=True)
            except Failed as failed:
                failures += 1
                print("not ok - %s # %s" % (name, failed), flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
