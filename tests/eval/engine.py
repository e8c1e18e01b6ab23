"""larder-prefill as the evaluation uses it: token ids in, one scored answer per line out."""
import json
import os
import subprocess
import tempfile

MODEL = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
                     "larder", "SmolLM2-135M-Instruct.Q4_1.gguf")


class EngineError(RuntimeError):
    pass


class Engine:
    def __init__(self, build, model, backend="cpu", dtype="auto", threads=0, profile=None):
        self.program = os.path.join(build, "larder-prefill")
        self.model = model
        self.compute = ["--backend", backend, "--dtype", dtype]
        if threads:
            self.compute += ["--threads", str(threads)]
        self.profile = ["--profile", profile] if profile else []

    def _lines(self, words):
        """Standard output, line by line as it comes; a failure is raised at the end."""
        with tempfile.TemporaryFile("w+") as err:
            p = subprocess.Popen([self.program] + words, stdout=subprocess.PIPE, stderr=err,
                                 stdin=subprocess.DEVNULL, text=True, encoding="utf-8")
            try:
                yield from p.stdout
            except BaseException:
                p.terminate()
                raise
            finally:
                p.stdout.close()
                status = p.wait()
            if status:
                err.seek(0)
                why = err.read().strip().split("\n")[-1]
                raise EngineError(why or "%s %s: exit status %d" % (self.program, words[0], status))

    def _json(self, words):
        return [json.loads(line) for line in self._lines(words)]

    def tokenize(self, strings):
        """[{"document" | "question" | "text": ...}] -> a list of ids for each"""
        with tempfile.TemporaryDirectory(prefix="larder-eval.") as tmp:
            path = write_jsonl(os.path.join(tmp, "strings"), strings)
            got = self._json(["tokenize", "--model", self.model, "--strings", path, "--json"])
        return [o["ids"] for o in got]

    def identify(self, policies):
        """-> ({policy as written: canonical spelling}, what computes): results are looked up by
        both before anything is computed."""
        words = ["info", "--model", self.model, "--json"] + self.compute + self.profile
        for p in policies:
            words += ["--policy", p]
        info = self._json(words)[0]
        what = {k: info[k] for k in ("backend", "dtype", "isa")}
        what["model"] = info["fingerprint"]
        return dict(zip(policies, info["policies"])), what

    def score(self, ids, questions, policies, max_new):
        """One object per policy and question, as they come; policies[0] is the reference."""
        with tempfile.TemporaryDirectory(prefix="larder-eval.") as tmp:
            words = ["ask", "--model", self.model, "--max-new", str(max_new),
                     "--doc-tokens", write_ids(os.path.join(tmp, "ids"), ids),
                     "--questions", write_jsonl(os.path.join(tmp, "questions"), questions)]
            for p in policies:
                words += ["--policy", p]
            for line in self._lines(words + self.compute + self.profile):
                yield json.loads(line)


def write_ids(path, ids):
    with open(path, "w") as f:
        f.write(" ".join(map(str, ids)) + "\n")
    return path


def write_jsonl(path, objects):
    with open(path, "w", encoding="utf-8") as f:
        for o in objects:
            f.write(json.dumps(o, ensure_ascii=False) + "\n")
    return path


def read_jsonl(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]
