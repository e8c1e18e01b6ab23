#!/usr/bin/env python3
"""peers.py - what the benchmarks beside larder have in common: token ids, peers, turns, rows.

A peer (PyTorch with transformers, llama.cpp) loads the model file once, in a process of its own
(this file with --serve), so that one that crashes is a line of the result and not the end of the
run. Rounds visit all subjects in turn: what else the machine does then hits all of them. Only the
standard library is needed here; the peers run in the environment that setup-peers.sh makes.
"""
import argparse
import contextlib
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
PEERS_PYTHON = os.environ.get("LARDER_PEERS_PYTHON") or os.path.join(CACHE, "peers", "bin",
                                                                      "python")
ANSWER_LIMIT_S = 600
START_S = 30
REST_S = 0.3  # thread pools spin for a while after their work


def token_ids(n):
    """n ids of real text: the two public documents of the recorded runs, again and again."""
    ids = []
    for doc in ("b2000", "a700"):
        path = os.path.join(ROOT, "tests/golden/data/public/doc_%s.json" % doc)
        with open(path, encoding="utf-8") as f:
            ids += json.load(f)["ids"]
    return (ids * (n // len(ids) + 1))[:n]


# ---- inside a peer's process: an object with `about` and a method for each command

def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return (time.perf_counter() - start) * 1e3, result


class Torch:
    def __init__(self, model, dtype):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            os.path.dirname(model), gguf_file=os.path.basename(model), dtype=getattr(torch, dtype))
        self.model.eval()
        self.about = "torch %s, transformers %s" % (torch.__version__, transformers.__version__)

    def evaluate(self, ids):
        with self.torch.inference_mode():
            out = self.model(input_ids=self.torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())

    def prefill(self, n):
        """Milliseconds of n tokens, and the likeliest next one."""
        ms, token = timed(self.evaluate, token_ids(n))
        return {"ms": ms, "token": token}


    def stored(self, socket, entry, n, n_question):
        """Fetch an entry of n tokens, hand it over, and ask with the next ones."""
        import larder
        import larder.hf

        question, client = token_ids(n + n_question)[n:], larder.Client(socket)

        def first():
            with client.get(entry, packed=True) as cache:
                past = larder.hf.load(cache, self.model)
            where = self.torch.arange(past.next_pos, past.next_pos + n_question)[None]
            with self.torch.inference_mode():
                out = self.model(input_ids=self.torch.tensor([question]), position_ids=where,
                                 logits_to_keep=1, **{past.argument: past})
                return int(out.logits[0, -1].argmax())
        with client:
            ms, token = timed(first)
        return {"ms": ms, "token": token}


class Llama:
    def __init__(self, model, longest):
        import ctypes

        import llama_cpp
        import numpy

        n = len(os.sched_getaffinity(0))
        self.lib, self.array, self.size = llama_cpp, numpy.ctypeslib.as_array, ctypes.c_size_t
        self.model = llama_cpp.Llama(model_path=model, n_ctx=longest, n_batch=512, n_ubatch=512,
                                     n_threads=n, n_threads_batch=n, verbose=False)
        self.about = "llama-cpp-python %s" % llama_cpp.__version__

    def evaluate(self, ids):
        self.model.eval(ids)
        logits = self.lib.llama_get_logits_ith(self.model.ctx, -1)
        return int(self.array(logits, (self.model.n_vocab(),)).argmax())

    def prefill(self, n):
        self.model.reset()
        ms, token = timed(self.evaluate, token_ids(n))
        return {"ms": ms, "token": token}

    def stored(self, socket, entry, n, n_question):
        """Fetch an entry of n tokens, hand it over, and ask with the next ones."""
        import larder
        import larder.llama

        question, client = token_ids(n + n_question)[n:], larder.Client(socket)

        def first():
            with client.get(entry, packed=True) as cache:
                larder.llama.load(cache, self.model)
            return self.evaluate(question)
        with client:
            ms, token = timed(first)
        return {"ms": ms, "token": token}

    def save(self, n, path):
        """The state of n tokens into a file."""
        self.prefill(n)
        ids = token_ids(n)
        size = self.lib.llama_state_seq_save_file(
            self.model.ctx, path.encode(), 0, (self.lib.llama_token * n)(*ids), n)
        return {"mib": size / 1048576}

    def load(self, n, path):
        ids, count = (self.lib.llama_token * n)(), self.size(0)
        if not self.lib.llama_state_seq_load_file(self.model.ctx, path.encode(), 0, ids, n, count):
            sys.exit("the state in %s cannot be restored" % path)
        self.model.input_ids[:n] = ids
        self.model.n_tokens = n

    def generate(self, token, n_new):
        for _ in range(n_new):
            token = self.evaluate([token])

    def resume(self, n, path, n_question, n_new):
        """Restore the state of n tokens, ask with the next ones, generate n_new."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.model.ctx), True)
        self.model.reset()
        question = token_ids(n + n_question)[n:]
        fetch_ms, _ = timed(self.load, n, path)
        ms, token = timed(self.evaluate, question)
        decode_ms, _ = timed(self.generate, token, n_new)
        return {"ms": fetch_ms + ms, "fetch_ms": fetch_ms, "decode_ms": decode_ms, "token": token}


PEERS = {"torch-f32": lambda model, longest: Torch(model, "float32"),
         "torch-bf16": lambda model, longest: Torch(model, "bfloat16"),
         "llama.cpp": Llama}


def serve(peer, model, longest):
    """Answer each command of standard input, a list in JSON, with an object."""
    peer = PEERS[peer](model, longest)
    print(json.dumps(peer.about), flush=True)
    for line in sys.stdin:
        command, *args = json.loads(line)
        print(json.dumps(getattr(peer, command)(*args)), flush=True)


# ---- the subjects, as a run sees them

class Missed(Exception):
    """A subject that gives no figure, and why."""


class Process:
    """A program that answers lines with lines of JSON."""

    def __init__(self, name, command, log_dir):
        self.name = name
        self.log_path = os.path.join(log_dir, name + ".log")
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=dict(os.environ, HF_HUB_OFFLINE="1"))

    def answer(self):
        # One that hangs is ended, which ends the wait for its line.
        signal.signal(signal.SIGALRM, lambda *_: self.process.kill())
        signal.alarm(ANSWER_LIMIT_S)
        text = self.process.stdout.readline().strip()
        signal.alarm(0)
        if text:
            return json.loads(text)
        with open(self.log_path, encoding="utf-8", errors="replace") as log:
            last = (log.read().strip().splitlines() or [""])[-1]
        raise Missed("ended with status %d %s" % (self.process.wait(), last[:200]))

    def ask(self, line):
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # answer() says why
        return self.answer()

    def close(self):
        self.process.kill()
        self.process.wait()


class Peer(Process):
    def __init__(self, name, model, longest, log_dir):
        super().__init__(name, [PEERS_PYTHON, os.path.abspath(__file__), "--serve", name,
                                "--model", model, "--longest", str(longest)], log_dir)
        self.about = self.answer()

    def call(self, *command):
        return self.ask(json.dumps(command))

    def run(self, n):
        return self.call("prefill", n)


class Larder:
    """One process a run: its time to read and unpack the weights is told apart."""

    def __init__(self, build, model, directory, name="larder", policy="full", options=()):
        self.command = [os.path.join(build, "larder-prefill"), "trace", "--model", model,
                        "--policy", policy, *options, "--json", "--tokens"]
        self.directory = directory
        self.name, self.about = name, ""

    def run(self, n):
        path = write_ids(self.directory, n)
        done = subprocess.run(self.command + [path], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise Missed(done.stderr.strip() or "ended with status %d" % done.returncode)
        j = json.loads(done.stdout)
        self.about = "%s %s %s" % (j["backend"], j["dtype"], j["isa"])
        return {"ms": j["prefill_ms"] - j["load_ms"], "token": j["top_logits"][0][0],
                "load": j["load_ms"], "peak": j["peak_bytes"] / 1048576,
                "sel_layer": j["sel_layer"], "selected": j["selected"]}

    def close(self):
        pass


class Daemon:
    """A private larderd with its store in `directory`."""

    def __init__(self, build, directory, model, *settings):
        os.makedirs(directory, exist_ok=True)
        self.build, self.socket = build, os.path.join(directory, "larder.sock")
        with open(os.path.join(directory, "log"), "wb") as log:
            self.process = subprocess.Popen(
                [os.path.join(build, "larderd"), "--private", directory, "--model",
                 "model=" + model] + [x for s in settings for x in ("--set", s)], stderr=log)
        end = time.monotonic() + START_S
        while self.call("status").returncode:
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                raise Missed("larderd did not start; %s/log says why" % directory)
            time.sleep(0.1)

    def call(self, *args):
        return subprocess.run([os.path.join(self.build, "larder")] + list(args) +
                              ["--socket", self.socket], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)

    def put(self, path, name, policy):
        done = self.call("put", "--tokens", path, "--name", name, "--policy", policy, "--wait",
                         "--json")
        if done.returncode:
            raise Missed("put: " + done.stderr.strip())

    def close(self):
        self.process.terminate()
        self.process.wait()


def write_ids(directory, n):
    """A file with the first n token ids; returns its path."""
    path = os.path.join(directory, "%d.ids" % n)
    with open(path, "w", encoding="utf-8") as f:
        f.write(" ".join(map(str, token_ids(n))))
    return path


def open_peers(names, model, longest, directory, missed):
    """Those of the peers that start; why others do not goes to `missed`."""
    peers = []
    if not os.path.exists(PEERS_PYTHON):
        print("peers: no %s (tests/bench/setup-peers.sh)" % PEERS_PYTHON)
        return peers
    for name in names:
        try:
            peers.append(Peer(name, model, longest, directory))
        except Missed as why:
            missed[name] = str(why)
    return peers


# ---- the run

def measure(subjects, n, n_runs, missed, warm=1):
    """n_runs rounds after those that warm up; results by subject. Ends what fails."""
    results = {s.name: [] for s in subjects}
    for turn in range(-warm, n_runs):
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


def write_row(out, stage, subject, n, unit, values, about, digits=1):
    out.writerow([stage, subject, "tokens", n, unit, "%.*f" % (digits, min(values)),
                  "%.*f" % (digits, statistics.median(values)), len(values), about])


def write_missed(out, missed):
    for name, why in missed.items():
        print("not measured: %s: %s" % (name, why))
        out.writerow(["not measured", name, "", "", "", "", "", "", why])


def arguments(doc, runs):
    """What every benchmark of peers is told."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--build", default="build")
    parser.add_argument("--model", required=True)
    parser.add_argument("--csv", help="file to append rows to")
    parser.add_argument("--runs", type=int, default=runs)
    return parser


@contextlib.contextmanager
def session(args):
    """A run: where rows go, a directory, why subjects are missed, and what is closed at its end.
    What is missed is told in the end, printed and as rows."""
    # An exit rather than death, so that the processes below are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    missed, opened = {}, []
    with tempfile.TemporaryDirectory(prefix="larder-bench-") as directory, \
            open(args.csv or os.devnull, "a", newline="", encoding="utf-8") as f:
        out = csv.writer(f, lineterminator="\n")
        try:
            yield out, directory, missed, opened
        finally:
            for x in opened:
                x.close()
        write_missed(out, missed)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", choices=PEERS, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--longest", type=int, required=True)
    args = parser.parse_args()
    serve(args.serve, args.model, args.longest)


if __name__ == "__main__":
    main()
