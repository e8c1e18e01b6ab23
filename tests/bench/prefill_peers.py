#!/usr/bin/env python3
"""Prefill of the same tokens by larder, PyTorch with transformers, and llama.cpp.

Every peer loads the model file once, in a process of its own (--serve), so that one that
crashes is a line of the result and not the end of the run. Rounds visit all subjects in turn:
what else the machine does then hits all of them. Only the standard library is needed here;
the peers run in the environment that setup-peers.sh makes.
"""
import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "larder")
PEERS_PYTHON = os.path.join(CACHE, "peers", "bin", "python")
PEERS = ("torch-f32", "torch-bf16", "llama.cpp")
# A precision that the processor lacks is emulated and takes minutes; one that loses by this
# factor at the shortest length is not measured at the others.
HOPELESS = 2.0
ANSWER_LIMIT_S = 600
REST_S = 0.3  # thread pools spin for a while after their work


def token_ids(n):
    """n ids of real text: the two public documents of the recorded runs, again and again."""
    ids = []
    for doc in ("b2000", "a700"):
        path = os.path.join(ROOT, "tests/golden/data/public/doc_%s.json" % doc)
        with open(path, encoding="utf-8") as f:
            ids += json.load(f)["ids"]
    return (ids * (n // len(ids) + 1))[:n]


# ---- inside a peer's process: prefill functions take ids and return the likeliest next token

def open_torch(model, dtype):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    m = transformers.AutoModelForCausalLM.from_pretrained(
        os.path.dirname(model), gguf_file=os.path.basename(model), dtype=getattr(torch, dtype))
    m.eval()

    def prefill(ids):
        with torch.inference_mode():
            out = m(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())
    return prefill, "torch %s, transformers %s" % (torch.__version__, transformers.__version__)


def open_llama(model, longest):
    import llama_cpp
    import numpy

    n = len(os.sched_getaffinity(0))
    m = llama_cpp.Llama(model_path=model, n_ctx=longest, n_batch=512, n_ubatch=512, n_threads=n,
                        n_threads_batch=n, verbose=False)

    def prefill(ids):
        m.reset()
        m.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(m.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, (m.n_vocab(),)).argmax())
    return prefill, "llama-cpp-python %s" % llama_cpp.__version__


def serve(peer, model, longest):
    """Answer each length on standard input with milliseconds and the next token."""
    if peer == "llama.cpp":
        prefill, about = open_llama(model, longest)
    else:
        prefill, about = open_torch(model, {"f32": "float32", "bf16": "bfloat16"}[peer[6:]])
    ids = token_ids(longest)
    print(about, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        token = prefill(ids[:int(line)])
        print((time.perf_counter() - start) * 1e3, token, flush=True)


# ---- the subjects, as the run sees them

class Missed(Exception):
    """A subject that gives no figure, and why."""


class Peer:
    def __init__(self, name, model, longest, log_dir):
        self.name = name
        self.log_path = os.path.join(log_dir, name + ".log")
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [PEERS_PYTHON, os.path.abspath(__file__), "--serve", name, "--model", model,
                 "--longest", str(longest)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, env=dict(os.environ, HF_HUB_OFFLINE="1"))
        self.about = self.line()

    def line(self):
        # A peer that hangs is ended, which ends the wait for its line.
        signal.signal(signal.SIGALRM, lambda *_: self.process.kill())
        signal.alarm(ANSWER_LIMIT_S)
        text = self.process.stdout.readline().strip()
        signal.alarm(0)
        if text:
            return text
        with open(self.log_path, encoding="utf-8", errors="replace") as log:
            last = (log.read().strip().splitlines() or [""])[-1]
        raise Missed("ended with status %d %s" % (self.process.wait(), last[:200]))

    def run(self, n):
        try:
            print(n, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # line() says why
        ms, token = self.line().split()
        return {"ms": float(ms), "token": int(token)}

    def close(self):
        self.process.kill()
        self.process.wait()


class Larder:
    """One process a run: its time to read and unpack the weights is told apart."""
    name = "larder"

    def __init__(self, build, model, longest, directory):
        self.command = [os.path.join(build, "larder-prefill"), "trace", "--model", model,
                        "--policy", "full", "--json", "--tokens"]
        self.directory = directory
        self.ids = token_ids(longest)
        self.about = ""

    def run(self, n):
        path = os.path.join(self.directory, "%d.ids" % n)
        with open(path, "w", encoding="utf-8") as f:
            f.write(" ".join(map(str, self.ids[:n])))
        done = subprocess.run(self.command + [path], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise Missed(done.stderr.strip() or "ended with status %d" % done.returncode)
        j = json.loads(done.stdout)
        self.about = "%s %s %s" % (j["backend"], j["dtype"], j["isa"])
        return {"ms": j["prefill_ms"] - j["load_ms"], "token": j["top_logits"][0][0],
                "load": j["load_ms"], "peak": j["peak_bytes"] / 1048576}

    def close(self):
        pass


# ---- the run

def measure(subjects, n, n_runs, missed):
    """n_runs rounds after one that warms up; results by subject. Ends what fails."""
    results = {s.name: [] for s in subjects}
    for turn in range(-1, n_runs):
        for s in list(subjects):
            time.sleep(REST_S)
            try:
                result = s.run(n)
            except Missed as why:
                missed[s.name] = "%d tokens: %s" % (n, why)
                s.close()
                subjects.remove(s)
                del results[s.name]
                continue
            if turn >= 0:
                results[s.name].append(result)
    return results


def write_rows(out, n, results, about):
    for name, runs in results.items():
        def row(stage, subject, key, unit):
            values = [r[key] for r in runs]
            out.writerow([stage, subject, "tokens", n, unit, "%.1f" % min(values),
                          "%.1f" % statistics.median(values), len(values), about[name]])
        row("prefill", name, "ms", "ms")
        if name == "larder":
            row("prefill", "larder: reading weights", "load", "ms")
            row("memory", "larder-prefill trace", "peak", "MiB")
    tokens = {name: runs[0]["token"] for name, runs in results.items()}
    if len(set(tokens.values())) > 1:
        print("next token after %d tokens differs: %s" % (n, tokens))


def open_subjects(args, longest, directory, missed):
    subjects = [Larder(args.build, args.model, longest, directory)]
    if not os.path.exists(PEERS_PYTHON):
        print("peers: not installed (tests/bench/setup-peers.sh)")
        return subjects
    for name in PEERS:
        try:
            subjects.append(Peer(name, args.model, longest, directory))
        except Missed as why:
            missed[name] = str(why)
    return subjects


def drop_hopeless(subjects, n, results, missed):
    torch = {s.name: statistics.median(r["ms"] for r in results[s.name])
             for s in subjects if s.name.startswith("torch")}
    for s in list(subjects):
        if torch.get(s.name, 0) > HOPELESS * min(torch.values(), default=0):
            missed[s.name] = "beyond %d tokens: it takes %.0f ms for them, torch's other " \
                             "precision %.0f" % (n, torch[s.name], min(torch.values()))
            s.close()
            subjects.remove(s)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", default="build")
    parser.add_argument("--model", required=True)
    parser.add_argument("--csv", help="file to append rows to")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", default="512,2048,5000")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--longest", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.model, args.longest)
    # An exit rather than death, so that the processes below are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    lengths = [int(n) for n in args.tokens.split(",")]
    missed, subjects = {}, []
    with tempfile.TemporaryDirectory(prefix="larder-bench-") as directory, \
            open(args.csv or os.devnull, "a", newline="", encoding="utf-8") as f:
        out = csv.writer(f, lineterminator="\n")
        try:
            subjects = open_subjects(args, max(lengths), directory, missed)
            for n in lengths:
                print("prefill of %d tokens: %s" % (n, ", ".join(s.name for s in subjects)),
                      flush=True)
                results = measure(subjects, n, args.runs, missed)
                write_rows(out, n, results, {s.name: s.about for s in subjects})
                f.flush()
                if n == lengths[0]:
                    drop_hopeless(subjects, n, results, missed)
        finally:
            for s in subjects:
                s.close()
        for name, why in missed.items():
            print("not measured: %s: %s" % (name, why))
            out.writerow(["not measured", name, "", "", "", "", "", "", why])
    return 0


if __name__ == "__main__":
    sys.exit(main())
