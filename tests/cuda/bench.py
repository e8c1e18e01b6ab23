#!/usr/bin/env python3
"""make bench-cuda: prefill on a GPU, at 4K, 32K and 128K tokens of a model of 8B shape.

The model has random weights and is written on the spot (random_model.py), below --dir. Prints
CSV: stage,parameter,value,unit. The rate of cuBLAS alone is measured in the same run; a prefill's
TFLOP/s counts the products of the layers and the causal half of attention. Each figure of a
prefill is the last of --runs in one process, of which the first loads the weights. Weights that
are streamed are measured with `full` and `asl` alone. Exit status 77: no GPU.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "golden"))
import worker

SHAPE = {"layers": 32, "hidden": 4096, "ff": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128,
         "vocab": 128256}
WINDOW = "snapkv,rows=25%"
CUT = "asl,rows=25%,select=2048"
FEW, MANY = "snapkv,rows=2%", "snapkv,rows=90%"  # alike but for what leaves
REPLAY = "kvzip,rows=25%,shape=uniform"
FIT = "matching,rows=25%,shape=uniform,precision=int4"  # the default policy, without its profile


def say(stage, parameter, value, unit):
    print("%s,%s,%s,%s" % (stage, parameter, value, unit), flush=True)


def run(cmd, fds=()):
    p = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=fds)
    if p.returncode == 77 or "no usable CUDA device" in p.stderr:
        print("nothing is measured: " + p.stderr.strip(), file=sys.stderr)
        sys.exit(77)
    return p


def engine(args, words, fds=()):
    """-> the objects printed, or None after saying why not"""
    p = run([os.path.join(args.build, "larder-prefill-cuda")] + words +
            ["--model", args.model, "--backend", "cuda", "--dtype", "bf16", "--json"], fds)
    if p.returncode:
        say("failed", words[0], p.stderr.strip().replace(",", ";"), "")
        return None
    return [json.loads(line) for line in p.stdout.splitlines()]


def flops(s, n):
    """Of a prefill that keeps every row; the last layer goes on with one row."""
    q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    project = 2 * n * s["hidden"] * (q + 2 * kv)
    rest = 2 * n * s["hidden"] * (q + 3 * s["ff"]) + 2 * q * n * n
    return s["layers"] * project + (s["layers"] - 1) * rest


def ids_file(folder, n, vocab):
    path = os.path.join(folder, "%d.ids" % n)
    r = random.Random(n)
    with open(path, "w") as f:
        f.write(" ".join(str(r.randrange(256, vocab)) for _ in range(n)))
    return path


def prefill(args, ids, n, stream):
    """Milliseconds by policy."""
    how = "streamed" if stream else "resident"
    # neighbours that could share a pass would: the cut stands between them
    policies = ["full", CUT] if stream else [
        x for p in ("full", WINDOW, FEW, MANY, REPLAY, FIT) for x in (p, CUT)]
    words = ["trace", "--tokens", ids] + (["--stream"] if stream else [])
    for p in policies * args.runs:
        words += ["--policy", p]
    answers = engine(args, words)
    if not answers:
        return {}
    if stream is False and "resident" not in answers[0]["device"]["name"]:
        say("weights", n, "do not fit: streamed", "")
    took = dict(zip(policies * args.runs, (a["prefill_ms"] for a in answers)))
    for p, ms in took.items():
        name = "%s %d %s" % (p.split(",select")[0].replace(",", " "), n, how)
        say("prefill", name, "%.1f" % ms, "ms")
        say("prefill", name, "%.0f" % (n / ms * 1e3), "tokens/s")
    say("prefill", "full %d %s" % (n, how), "%.1f" % (flops(SHAPE, n) / took["full"] * 1e-9),
        "TFLOP/s")
    if not stream:
        say("scoring", "window scores and rows %d" % n, "%.1f" % (took[WINDOW] - took["full"]),
            "ms")
        say("fitting", "and packing %d" % n, "%.1f" % (took[FIT] - took[REPLAY]), "ms")
        overlap(args, n, took[MANY] - took[FEW])
    say("cut", "asl against full %d %s" % (n, how), "%.2f" % (took["full"] / took[CUT]), "times")
    device = answers[-1]["device"]
    for key in ("planned_bytes", "peak_bytes"):
        say("device memory", "%s %d %s" % (key, n, how), "%.0f" % (device[key] / 2**20), "MiB")
    return took


def overlap(args, n, longer):
    """How much of the time that 88 % of the rows take to the host a prefill does not see."""
    row = 2 * 2 * SHAPE["kv_heads"] * SHAPE["head_dim"] * SHAPE["layers"]
    alone = (0.90 - 0.02) * n * row / args.to_host * 1e3
    say("copy-out", "88 %% of the rows of %d alone" % n, "%.1f" % alone, "ms")
    say("copy-out", "overlapped %d" % n, "%.0f" % (100 * max(0, 1 - longer / alone)), "%")


def first_token(args, folder, n, vocab):
    """From a stored image, and after a prefill; the weights are loaded in both cases."""
    ids = ids_file(folder, n, vocab)
    question = ids_file(folder, 16, vocab)
    ask = ["--tokens", question, "--max-new", "1", "--ignore-eos"]
    w = worker.Worker(os.path.join(args.build, "larder-prefill-cuda"), args.model,
                      ["--backend", "cuda", "--dtype", "bf16"])
    with open(ids) as f:
        kind, done, layers, logits = w.prefill(1, WINDOW, [int(x) for x in f.read().split()])
    if kind != worker.W_DONE:
        say("failed", "image of %d" % n, str(done).replace(",", ";"), "")
        return
    fd = worker.memfile(worker.image(w.hello["models"][0], list(range(n)), done, layers, logits))
    w.close()
    stored = engine(args, ["ask", "--image-fd", str(fd)] + ask, [fd])
    fresh = engine(args, ["ask", "--doc-tokens", ids, "--policy", "full"] + ask)
    os.close(fd)
    for name, answer in (("stored, 25 % of the rows", stored), ("prefill, all rows", fresh)):
        if answer:
            say("first token", "%d %s" % (n, name.replace(",", ":")), "%.1f" % answer[0]["ttft_ms"],
                "ms")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--build", default="build")
    p.add_argument("--device-bench", required=True)
    p.add_argument("--tokens", default="4096,32768,131072")
    p.add_argument("--runs", type=int, default=2)
    p.add_argument("--dir", default=None, help="where the model is written: 5 GB")
    p.add_argument("--shape", action="append", default=[], help="NAME=N, for a smaller model")
    args = p.parse_args()
    SHAPE.update((k, int(v)) for k, v in (x.split("=") for x in args.shape))
    with tempfile.TemporaryDirectory(prefix="larder-bench-cuda.", dir=args.dir) as folder:
        device = run([args.device_bench])
        if device.returncode:
            sys.exit(device.stderr)
        sys.stdout.write("stage,parameter,value,unit\n" + device.stdout)
        args.to_host = next(float(line.split(",")[2]) * 1e9 for line in device.stdout.splitlines()
                            if line.startswith("copy to host,pinned"))
        args.model = os.path.join(folder, "random.gguf")
        words = [w for k, v in SHAPE.items() for w in ("--" + k.replace("_", "-"), str(v))]
        subprocess.run([sys.executable, os.path.join(HERE, "random_model.py"), args.model] + words,
                       check=True)
        for n in map(int, args.tokens.split(",")):
            ids = ids_file(folder, n, SHAPE["vocab"])
            for stream in (False, True):
                prefill(args, ids, n, stream)
            if n <= 32768:
                first_token(args, folder, n, SHAPE["vocab"])


if __name__ == "__main__":
    main()
