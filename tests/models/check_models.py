#!/usr/bin/env python3
"""Models of every architecture against what transformers computed for them.

    check_models.py --build BUILD                 the small ones that are part of the tree
    check_models.py --build BUILD --make          those that make_models.py makes now
    check_models.py --build BUILD --backend cuda  by BUILD/larder-prefill-cuda

Logits in f32 - of `ref` and `cpu`, unless a backend is named - are within 1e-4 of the largest,
after 1, 7 and 300 tokens, and the 16 tokens after that are the same, from a prefill of 290 of them
and a question of ten. Speaks TAP.
Exit status 77: --make, and there is no Python with torch, transformers and gguf.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
PEERS = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
                     "larder", "peers", "bin", "python")
CLOSE = 1e-4
QUESTION = 10

failed = 0


def claim(name, why):
    global failed
    failed += why is not None
    print("ok - " + name if why is None else "not ok - %s # %s" % (name, why), flush=True)


class Run:
    """larder-prefill on one model with one backend."""

    def __init__(self, build, model, backend, tmp):
        self.words = ["--model", model, "--backend", backend, "--dtype", "f32", "--json"]
        program = "larder-prefill-cuda" if backend == "cuda" else "larder-prefill"
        self.program = os.path.join(build, program)
        self.tmp = tmp

    def file(self, name, ids):
        path = os.path.join(self.tmp, name)
        with open(path, "w") as f:
            f.write(" ".join(map(str, ids)))
        return path

    def answer(self, *words):
        p = subprocess.run([self.program, *words, *self.words], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
        if p.returncode:
            raise RuntimeError(p.stderr.strip())
        return json.loads(p.stdout)

    def logits(self, ids):
        return self.answer("trace", "--policy", "full", "--tokens",
                           self.file("doc", ids))["top_logits"]

    def go_on(self, ids, n):
        doc = self.file("doc", ids[:-QUESTION])
        return self.answer("ask", "--ignore-eos", "--max-new", str(n), "--doc-tokens", doc,
                           "--tokens", self.file("question", ids[-QUESTION:]))["generated_ids"]


def compare(ours, theirs):
    top = max(map(abs, theirs))
    worst = max(abs(x - theirs[i]) for i, x in ours) / top
    best = sorted(range(len(theirs)), key=lambda i: -theirs[i])[:5]
    if not worst <= CLOSE:
        return "a logit differs by %.2g of the largest" % worst
    if [i for i, _ in ours[:5]] != best:
        return "the best tokens are others"
    return None


def check(build, backends, model, want, tmp):
    name = os.path.basename(model)
    for backend in backends:
        run = Run(build, model, backend, tmp)
        try:
            for n, theirs in want["logits"].items():
                claim("%s, %s: logits after %s tokens" % (name, backend, n),
                      compare(run.logits(want["ids"][:int(n)]), theirs))
            ours = run.go_on(want["ids"], len(want["next"]))
            claim("%s, %s: the next %d tokens" % (name, backend, len(ours)),
                  None if ours == want["next"] else "%s, not %s" % (ours, want["next"]))
        except RuntimeError as why:
            claim("%s, %s" % (name, backend), str(why))


def check_all(build, backends, folder):
    with tempfile.TemporaryDirectory(prefix="larder-models.") as tmp:
        for file in sorted(os.listdir(folder)):
            if not file.endswith(".json"):
                continue
            with open(os.path.join(folder, file)) as f:
                want = json.load(f)
            model = os.path.join(folder, file[:-len(".json")])
            check(build, backends, model, want, tmp)
            if os.path.exists(model + ".gguf"):
                check(build, backends, model + ".gguf", want, tmp)


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--build", default="build")
    a.add_argument("--make", action="store_true")
    a.add_argument("--backend", action="append")
    args = a.parse_args()
    backends = args.backend or ["ref", "cpu"]
    if not args.make:
        check_all(args.build, backends, os.path.join(HERE, "small"))
        return 1 if failed else 0
    if not os.path.exists(PEERS):
        print("no torch and transformers at %s; tests/bench/setup-peers.sh installs them" % PEERS,
              file=sys.stderr)
        return 77
    with tempfile.TemporaryDirectory(prefix="larder-made.") as made:
        subprocess.run([PEERS, os.path.join(HERE, "make_models.py"), made], check=True,
                       stdout=sys.stderr)
        check_all(args.build, backends, made)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
