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
# The default, for questions that are not known yet, and the paper's method beside it. The first
# one calibrates the model, and the second cuts where that says.
POLICIES = [("offline", "offline"), ("asl", "asl,rows=25%")]
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


def say(text):
    """What is going on, on a terminal only: the first document waits for a calibration."""
    if sys.stderr.isatty():
        print("\r\033[K" + text, end="", file=sys.stderr, flush=True)


def kept(entry):
    counts = [n for layer in entry["rows"] for n in layer]
    share = "%.0f %%" % (100 * sum(counts) / len(counts) / entry["n_ctx"])
    if min(counts) == max(counts):
        return share
    return "%s (%d-%d)" % (share, min(counts), max(counts))


def one(build, sock, doc, policy, full):
    """Store one document under one policy and ask; a dict of what the table shows."""
    name, path, _, _, question = doc
    label, text = policy
    entry_name = "%s-%s" % (name, label)
    say("storing %s" % entry_name)
    larder(build, sock, "put", path, "--name", entry_name, "--policy", text, "--wait")
    entry = larder(build, sock, "show", entry_name)
    resumed = larder(build, sock, "ask", entry_name, question, "--max-new", ANSWER_TOKENS)
    return {
        "name": name, "policy": label, "tokens": entry["n_ctx"], "rows": kept(entry),
        "cut": "-" if entry["sel_layer"] is None else "after %d" % entry["sel_layer"],
        "bytes": "%s > %s > %s" % (size(entry["full_bytes"]), size(entry["image_bytes"]),
                                   size(entry["stored_bytes"])),
        "prefill": ms(entry["prefill_ms"]), "fetch": ms(resumed["fetch_ms"]),
        "ttft_full": ms(full["ttft_ms"]),
        "ttft_resumed": ms(resumed["ttft_ms"] + resumed["fetch_ms"]),
        "ratio": "%.0fx" % (full["ttft_ms"] / (resumed["ttft_ms"] + resumed["fetch_ms"])),
        "answer": resumed["text"].strip(), "certificate": entry["certificate"],
    }


def run_document(build, sock, doc):
    """-> (lines of the table, answers)"""
    name, path, _, _, question = doc
    say("prefilling %s" % name)
    full = larder(build, sock, "ask", "--model", "smollm2", "--file", path, question,
                  "--max-new", ANSWER_TOKENS)
    rows = [one(build, sock, doc, policy, full) for policy in POLICIES]
    say("")
    return rows, [("after a full prefill", full["text"].strip())] + [
        ("from the %s cache" % r["policy"], r["answer"]) for r in rows]


COLUMNS = [("document", "name"), ("policy", "policy"), ("tokens", "tokens"), ("rows kept", "rows"),
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
    print("model    SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0)")
    for label, text in POLICIES:
        print("policy   %-9s%s" % (label, text))
    for name, path, title, licence, _ in DOCUMENTS:
        print("%-9s%s (%s)" % (name, title, licence))
    print()
    rows, answers = [], []
    with tempfile.TemporaryDirectory(prefix="larder-demo-") as directory:
        with Daemon(build, directory) as daemon:
            for doc in DOCUMENTS:
                lines, said = run_document(build, daemon.socket, doc)
                rows += lines
                answers.append((doc, said, lines[0]["certificate"]))
    table(rows)
    print("\nrows kept: share of all rows (fewest-most of a layer and KV head).  tokens cut: the layer at\n"
          "which ASL stopped carrying the other tokens upward.  prefill: once, in the background.\n"
          "pruned: as a decoder maps it, expanded to bf16.  1st token: from the question to the first\n"
          "token of its answer.\n")
    for doc, said, certificate in answers:
        print("%s: %s" % (doc[0], doc[4]))
        for label, text in said:
            print("    %-24s %s" % (label, textwrap.shorten(text.replace("\n", " "), 150)))
        if certificate:
            print("    %-24s on %d recall probes, %.0f %% same next token as the full cache" % (
                "offline certificate", certificate["probes"], 100 * certificate["agreement"]))


if __name__ == "__main__":
    main()
