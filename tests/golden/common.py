"""What the scripts that repeat recorded runs share: claims in TAP, sets of positions written as
runs, and running larder-prefill."""
import argparse
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
DOCS = os.path.join(HERE, "data", "public")
MODEL = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
                     "larder", "SmolLM2-135M-Instruct.Q4_1.gguf")

failures = 0


class Skip(Exception):
    """Something that this machine or this build does not have."""


class Unsupported(Exception):
    """A policy that parses and that this build does not compute."""


def claim(name, why):
    """`why` is None when the claim holds."""
    global failures
    if why is None:
        print("ok - " + name)
    else:
        failures += 1
        print("not ok - %s # %s" % (name, why))


def skip(name, why):
    print("ok - %s # SKIP %s" % (name, why))


def unrun(runs):
    """[start, len, start, len, ...] -> positions"""
    out = []
    for start, count in zip(runs[::2], runs[1::2]):
        out.extend(range(start, start + count))
    return out


def differ(ours, golden, ambiguous):
    """Positions in one set only, of which none may be outside `ambiguous`: (all, outside)"""
    odd = set(ours) ^ set(golden)
    return odd, odd - set(ambiguous)


def check_logits(ours, golden, tol, n):
    mine = dict((i, x) for i, x in ours)
    last = ours[-1][1]
    for i, x in golden[:n]:
        if i not in mine and x < last + tol:
            continue  # a tie at the end of the list
        if i not in mine or abs(mine[i] - x) > tol:
            return "token %d: %s, recorded %.5f" % (i, mine.get(i), x)
    return None


# ---- running

def parser(doc):
    a = argparse.ArgumentParser(description=doc.split("\n")[0])
    a.add_argument("--build", default="build", help="build directory")
    a.add_argument("--backend", default="cpu", choices=["ref", "cpu", "cuda"])
    a.add_argument("--dtype", default="f32", choices=["f32", "bf16"])
    a.add_argument("--model", default=MODEL)
    a.add_argument("--threads", type=int, default=0)
    a.add_argument("--subset", action="store_true", help="a covering part of the runs")
    return a


def need_model(args):
    if not os.path.exists(args.model):
        raise Skip("the model is not at %s; etc/setup.sh fetches it" % args.model)


def program(args):
    """The program that has the backend."""
    path = os.path.join(args.build, "larder-prefill")
    if args.backend == "cuda":
        path += "-cuda"
        if not os.path.exists(path):
            raise Skip("the GPU is not tested: %s is not built; make CUDA=1 does" % path)
    return path


def options(args):
    words = ["--backend", args.backend, "--dtype", args.dtype]
    return words + (["--threads", str(args.threads)] if args.threads else [])


def engine(args, words, fds=()):
    """The objects that larder-prefill prints."""
    cmd = [program(args)] + words + [
        "--model", args.model, "--json"] + options(args)
    p = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=fds)
    if "LARDER_EBACKEND" in p.stderr and args.backend == "cuda":
        raise Skip("the GPU is not tested: " + p.stderr.strip())
    if "LARDER_EBACKEND" in p.stderr and args.dtype == "bf16":
        raise Skip("bf16 is not tested: " + p.stderr.strip())
    if "LARDER_EUNSUPPORTED" in p.stderr:
        raise Unsupported(p.stderr.strip())
    if p.returncode:
        raise RuntimeError("larder-prefill %s: %s" % (words[0], p.stderr.strip()))
    return [json.loads(line) for line in p.stdout.splitlines()]


def doc_ids(doc):
    with open(os.path.join(DOCS, "doc_%s.json" % doc)) as f:
        return json.load(f)["ids"]


def write_ids(folder, name, ids):
    path = os.path.join(folder, name)
    with open(path, "w") as f:
        f.write(" ".join(map(str, ids)) + "\n")
    return path


def finish(body):
    """Run body(); the exit status of a script that speaks TAP."""
    try:
        body()
    except Skip as why:
        print(why, file=sys.stderr)
        return 77
    return 1 if failures else 0
