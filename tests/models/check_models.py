#!/usr/bin/env python3
"""Models of every architecture against what transformers computed for them.

    check_models.py --build BUILD                 the small ones that are part of the tree
    check_models.py --build BUILD --make          those that make_models.py makes now
    check_models.py --build BUILD --backend cuda  by BUILD/larder-prefill-cuda

Logits in f32 - of `ref` and `cpu`, unless a backend is named - are within 1e-4 of the largest,
after 1, 7 and 300 tokens, and the 16 tokens after that are the same, from a prefill of 290 of them
and a question of ten. `info` of `cpu` says what config.json does of attention, windows and RoPE.
Speaks TAP.
Exit status 77: --make, and there is no Python with torch, transformers and gguf.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "larder")
PEERS = os.path.join(CACHE, "decoders", "bin", "python")
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


def expected(config, is_gguf):
    """What `info` has to say of a model with this config.json. Defaults are those of transformers
    that the models here rely on."""
    arch, layers = config["model_type"], config["num_hidden_layers"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "none"))
    original = config.get("original_max_position_embeddings") if kind == "longrope" else None
    factor = {"llama3": scaling.get("factor"), "none": 1}.get(
        kind, original and config["max_position_embeddings"] / original)
    window = config.get("sliding_window")
    if arch.startswith("qwen") and not config.get("use_sliding_window"):
        window = None
    first = config["max_window_layers"] if arch.startswith("qwen") and window else 0
    return {
        "arch": "llama" if is_gguf and arch == "mistral" else arch,
        "qkv_bias": arch == "qwen2", "qk_norm": arch == "qwen3",
        "tied_embeddings": config["tie_word_embeddings"],
        "sliding": window and [window if l >= first else 0 for l in range(layers)],
        "rope.theta": config.get("rope_theta", 10000.0),
        "rope.dims": int(dim * config.get("partial_rotary_factor", 1)),
        "rope.scaling": "factors" if is_gguf and kind == "llama3" else kind,
        "rope.factor": factor, "rope.n_original": original,
        "tokenizer.kind": "bytes",
        "tokenizer.pre_tokenizer": ["digits", "gpt2"] if is_gguf else ["gpt2"],
        "tokenizer.nfc": False, "tokenizer.bos": None, "tokenizer.eos": 1,
        "own_template": "plain",
    }


def info_of(run):
    said = run.answer("info")
    said.update(("%s.%s" % (k, k2), v) for k in ("rope", "tokenizer") for k2, v in said[k].items())
    return said


def check_real(build, tmp):
    """A file as others write it."""
    model = os.path.join(CACHE, "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not os.path.exists(model):
        print("ok - the real model: info # SKIP it is not there; run etc/setup.sh")
        return
    said = info_of(Run(build, model, "cpu", tmp))
    want = {"qkv_bias": False, "qk_norm": False, "tied_embeddings": True, "sliding": None,
            "rope.theta": 100000.0, "rope.dims": 64, "rope.scaling": "none",
            "tokenizer.kind": "bytes", "tokenizer.pre_tokenizer": ["digits", "gpt2"],
            "tokenizer.eos": 2, "own_template": "smollm2"}
    wrong = {k: said[k] for k, v in want.items() if said[k] != v}
    claim("the real model: info", "it says %s" % wrong if wrong else None)


def check_info(run, name, config, is_gguf):
    said = info_of(run)
    want = expected(config, is_gguf)
    wrong = {k: said[k] for k, v in want.items()
             if said[k] != v and not (k == "rope.factor" and abs(said[k] - v) < 1e-6 * v)}
    claim("%s: info" % name, "it says %s" % wrong if wrong else None)
    shown = subprocess.run([run.program, "info", "--model", run.words[1]], stdout=subprocess.PIPE,
                           text=True).stdout
    window = "windows     %s" % ("%d in layer" % max(want["sliding"]) if want["sliding"] else
                                 "none\n")
    rope = "rope        theta %g, %d of %d elements, scaling %s" % (
        want["rope.theta"], want["rope.dims"], said["head_dim"], want["rope.scaling"])
    claim("%s: info in words" % name, None if window in shown and rope in shown else shown)


def check(build, backends, model, want, tmp):
    name = os.path.basename(model)
    is_gguf = name.endswith(".gguf")
    if "cpu" in backends:
        with open(os.path.join(model[:-len(".gguf")] if is_gguf else model, "config.json")) as f:
            check_info(Run(build, model, "cpu", tmp), name, json.load(f), is_gguf)
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
        if "cpu" in backends:
            check_real(build, tmp)
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
        print("no torch and transformers at %s; 'tests/bench/setup-peers.sh decoders' installs "
              "them" % PEERS,
              file=sys.stderr)
        return 77
    with tempfile.TemporaryDirectory(prefix="larder-made.") as made:
        subprocess.run([PEERS, os.path.join(HERE, "make_models.py"), made], check=True,
                       stdout=sys.stderr)
        check_all(args.build, backends, made)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
