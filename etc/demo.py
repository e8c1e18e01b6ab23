#!/usr/bin/env python3
"""The demonstration behind etc/demo.sh: three documents, two ways to answer, one table."""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODEL = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")),
                     "larder", "SmolLM2-135M-Instruct.Q4_1.gguf")

# (name, path, whose text, licence, question); the licence of every text allows this use.
DOCUMENTS = [
    ("tutorial", os.path.join(ROOT, "tests/golden/data/public/doc_a700.txt"),
     "Python tutorial, \"Whetting Your Appetite\"", "PSF-2.0",
     "What is the name of the programming language that this text introduces?"),
    ("sqlite", os.path.join(ROOT, "tests/golden/data/public/doc_b2000.txt"),
     "SQLite, \"Appropriate Uses\"", "public domain",
     "Which database does this text recommend as a replacement for fopen()?"),
    ("gfdl", "/usr/share/common-licenses/GFDL-1.2",
     "GNU Free Documentation License 1.2, Debian's base-files", "verbatim copies allowed",
     "What is the title of this licence?"),
]
# L_min and tau suit this model (tests/golden/data/README.md): with the paper's values
# its criterion hardly ever fires here.
POLICY = "asl,rows=50%,lmin=14,tau=0.8"
ANSWER_TOKENS = "32"


def fail(message):
    print("demo: " + message, file=sys.stderr)
    sys.exit(1)


class Daemon:
    """A private larderd that ends with the block, whatever happens inside."""

    def __init__(self, build, directory):
        self.command = [os.path.join(build, "larderd"), "--private", directory,
                        "--model", "smollm2=" + MODEL]
        self.log_path = os.path.join(directory, "larderd.log")
        self.socket = os.path.join(directory, "larder.sock")

    def __enter__(self):
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        for _ in range(300):
            if os.path.exists(self.socket):
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.__exit__(None, None, None)
        with open(self.log_path) as log:
            fail("larderd did not start:\n" + log.read())

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def larder(build, sock, *args):
    """Run the CLI with --json; its answer as an object."""
    command = [os.path.join(build, "larder"), "-S", sock, *args, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        fail(done.stderr.strip() or " ".join(command) + " failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


def size(n):
    return "%.1f MiB" % (n / 1048576)


def ms(t):
    return "%.0f ms" % t if t >= 10 else "%.1f ms" % t


def one(build, sock, name, path, question):
    """Store one document, ask both ways; a dict of what the table shows."""
    larder(build, sock, "put", path, "--name", name, "--policy", POLICY, "--wait")
    entry = larder(build, sock, "show", name)
    limit = ("--max-new", ANSWER_TOKENS)
    full = larder(build, sock, "ask", "--model", "smollm2", "--file", path, question, *limit)
    resumed = larder(build, sock, "ask", name, question, *limit)
    counts = [n for layer in entry["rows"] for n in layer]
    return {
        "name": name, "question": question, "tokens": entry["n_ctx"],
        "rows": "%d" % min(counts) if min(counts) == max(counts)
                else "%d-%d" % (min(counts), max(counts)),
        "cut": "-" if entry["sel_layer"] is None else "after %d" % entry["sel_layer"],
        "bytes": "%s > %s > %s" % (size(entry["full_bytes"]), size(entry["image_bytes"]),
                                   size(entry["stored_bytes"])),
        "prefill": ms(entry["prefill_ms"]), "fetch": ms(resumed["fetch_ms"]),
        "ttft_full": ms(full["ttft_ms"]),
        "ttft_resumed": ms(resumed["ttft_ms"] + resumed["fetch_ms"]),
        "ratio": "%.0fx" % (full["ttft_ms"] / (resumed["ttft_ms"] + resumed["fetch_ms"])),
        "answer_full": full["text"].strip(), "answer_resumed": resumed["text"].strip(),
    }


COLUMNS = [("document", "name"), ("tokens", "tokens"), ("rows kept", "rows"),
           ("tokens cut", "cut"), ("bytes: full > pruned > stored", "bytes"),
           ("prefill", "prefill"), ("fetch", "fetch"), ("1st token, prefill", "ttft_full"),
           ("1st token, stored", "ttft_resumed"), ("gain", "ratio")]


def table(rows):
    cells = [[title for title, _ in COLUMNS]]
    cells += [[str(r[key]) for _, key in COLUMNS] for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    for number, line in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", default="build")
    build = os.path.abspath(parser.parse_args().build)
    if not os.path.exists(MODEL):
        fail("no model at %s; run: sh etc/setup.sh" % MODEL)
    print("model   SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0)")
    print("policy  " + POLICY)
    for name, path, title, licence, _ in DOCUMENTS:
        print("%-8s%s (%s)" % (name, title, licence))
    print()
    rows = []
    with tempfile.TemporaryDirectory(prefix="larder-demo-") as directory:
        with Daemon(build, directory) as daemon:
            for name, path, _, _, question in DOCUMENTS:
                rows.append(one(build, daemon.socket, name, path, question))
    table(rows)
    print("\nrows kept: per layer and KV head.  tokens cut: the layer at which ASL stopped carrying the\n"
          "other tokens upward.  1st token: from the question to the first token of its answer.\n")
    for r in rows:
        print("%s: %s" % (r["name"], r["question"]))
        for label, key in (("after a full prefill", "answer_full"),
                           ("from the stored cache", "answer_resumed")):
            text = textwrap.shorten(r[key].replace("\n", " "), 160)
            print("    %-22s %s" % (label, text))


if __name__ == "__main__":
    main()
