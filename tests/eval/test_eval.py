#!/usr/bin/env python3
"""The evaluation's own arithmetic, files, generators and page, without a model. Speaks TAP."""
import contextlib
import csv
import io
import json
import os
import random
import re
import stat
import subprocess
import sys
import tempfile
import xml.dom.minidom

sys.dont_write_bytecode = True
import engine
import generate
import public
import results
import tasks

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "decoders"))
from claims import Skip, claim, run_claims

BUILD = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else os.path.join(HERE, "../../build")

# A larder-prefill that reads and prints what the real one does and computes nothing: a word is a
# token, and the policy "bad" gets every second answer wrong.
FAKE = r'''#!%s
import json, os, sys
a = sys.argv[1:]
opt = lambda k: [a[i + 1] for i, x in enumerate(a) if x == k]
with open(os.path.join(os.path.dirname(__file__), "calls"), "a") as f:
    f.write(" ".join([a[0]] + opt("--policy")) + "\n")
name = lambda p: p.split(",")[0]
spell = lambda p: name(p) + ",w=32" if p != "full" else p
if a[0] == "info":
    print(json.dumps({"backend": "cpu", "dtype": "f32", "isa": "fake", "fingerprint": "ab" * 32,
                      "policies": [spell(p) for p in opt("--policy")]}))
elif a[0] == "tokenize":
    for l in open(opt("--strings")[0]):
        o = json.loads(l)
        print(json.dumps({"ids": [len(w) for w in " ".join(o.values()).split()]}))
elif a[0] == "ask":
    n = len(open(opt("--doc-tokens")[0]).read().split())
    for p in opt("--policy"):
        if name(p) == "broken":
            print("larder-prefill: it broke (LARDER_EIO)", file=sys.stderr)
            sys.exit(1)
        for i, l in enumerate(open(opt("--questions")[0])):
            q = json.loads(l)
            ok = name(p) != "bad" or i %% 2 == 0
            o = {"id": q["id"], "policy": spell(p), "n_ctx": n, "rows": n if p == "full" else n // 2,
                 "row_bytes": 256 * (n if p == "full" else n // 2), "full_bytes": 256 * n,
                 "generated_ids": [1], "gold": [{"id": 1, "rank": 1 if ok else 2, "logprob": -0.5}],
                 "text": " 42." if ok else " 7.", "prefill_ms": 1, "all_top1": ok, "nll": 0.5}
            if p != "full":
                o.update(kl=0.25, top1_agree=1)
            print(json.dumps(o))
''' % sys.executable


def count_words(texts):
    return [len(t.split()) for t in texts]


def task(id_, doc, **more):
    return dict({"id": id_, "task": "t", "prefix_ids": doc, "tail_ids": [5], "gold": "42",
                 "full_answer": " 42."}, **more)


def result(id_, policy, right, doc="d", **more):
    r = {"id": id_, "policy": policy, "model": "m", "backend": "cpu", "dtype": "f32", "isa": "x",
         "doc": doc, "task": "t", "right": right, "found": 1.0, "kl": 0.1, "top1_agree": 1.0,
         "rows": 50, "row_bytes": 50, "full_bytes": 100}
    if policy == "full":
        r.update(kl=None, top1_agree=None, rows=100, row_bytes=100)
    return dict(r, **more)


def by_id(*rs):
    return {r["id"]: r for r in rs}


# ---- results

@claim
def kept_right_counts_only_what_the_full_cache_answers():
    full = by_id(result("a", "full", True), result("b", "full", True), result("c", "full", False))
    row = results.summarise(full, by_id(result("a", "p", True), result("b", "p", False),
                                        result("c", "p", True)))
    assert (row["n"], row["full_right"], row["kept_right"]) == (3, 2, 0.5)


@claim
def a_question_without_a_reference_does_not_count():
    row = results.summarise(by_id(result("a", "full", True)),
                            by_id(result("a", "p", True), result("z", "p", False)))
    assert (row["n"], row["kept_right"]) == (1, 1)


@claim
def rows_and_bytes_count_each_document_once():
    full = by_id(*(result(i, "full", True, d) for i, d in (("a", "d"), ("b", "d"), ("c", "e"))))
    row = results.summarise(full, by_id(result("a", "p", True, "d"), result("b", "p", True, "d"),
                                        result("c", "p", True, "e", rows=100, row_bytes=10)))
    assert row["rows"] == 0.75 and row["bytes"] == 0.3


@claim
def nothing_right_gives_no_share():
    row = results.summarise(by_id(result("a", "full", False)), by_id(result("a", "p", False)))
    assert row["kept_right"] is None and row["low"] is None and row["kl"] is None
    results.as_text([("p", row)])
    assert results.summarise({}, {})["n"] == 0


@claim
def the_bootstrap_is_seeded_and_covers():
    pairs = [(1, 2)] * 10 + [(2, 2)] * 10
    first, again = (results.bootstrap(pairs, 2000, 7) for _ in range(2))
    assert first == again and first[0] < 0.75 < first[1]
    assert results.bootstrap([(2, 2)] * 5, 100) == (1, 1)
    assert results.bootstrap([(0, 0)], 100) == (None, None)


@claim
def the_bootstrap_matches_the_binomial():
    """40 documents of one question, half of them kept: a normal interval is 50 +- 15.5 %."""
    low, high = results.bootstrap([(1, 1)] * 20 + [(0, 1)] * 20)
    assert abs(low - 0.345) <= 0.03 and abs(high - 0.655) <= 0.03, (low, high)


@claim
def rank_correlation_is_that_of_the_definition():
    assert results.ranks([10, 30, 20, 20]) == [1, 4, 2.5, 2.5]
    assert results.spearman([1, 2, 3], [10, 20, 90]) == 1
    assert results.spearman([1, 2, 3], [9, 4, 1]) == -1
    # one swap of neighbours among five: 1 - 6 * 2 / (5 * 24)
    assert abs(results.spearman([1, 2, 3, 4, 5], [1, 2, 3, 5, 4]) - 0.9) < 1e-12
    assert results.spearman([1, 1], [1, 2]) is None


@claim
def a_certificate_stands_for_the_questions_on_its_cache():
    got = by_id(result("a", "p", True, cert_kl=0.1, kl=0.2),
                result("b", "p", False, cert_kl=0.1, kl=0.4),
                result("c", "p", False, doc="e", cert_kl=0.3, kl=1.0),
                result("d", "p", True, doc="f"))
    full = by_id(*(result(k, results.FULL, True, doc=r["doc"]) for k, r in got.items()))
    caches = sorted(results.certified({results.FULL: full, "p": got}))
    assert len(caches) == 2 and caches[0][:2] == (0.1, 0.5) and caches[1] == (0.3, 1.0, 1.0)
    assert abs(caches[0][2] - 0.3) < 1e-12


@claim
def single_answers_are_strict_and_lists_are_looked_for():
    strict = {"gold": "42"}
    assert not results.is_right(strict, {"all_top1": False, "text": " 42."})
    assert results.is_right(strict, {"all_top1": True, "text": ""})
    several = {"gold": ["Alpha", "beta"]}
    assert results.found(several, "ALPHA only") == 0.5
    assert not results.is_right(several, {"all_top1": None, "text": "alpha"})
    assert results.is_right(several, {"all_top1": None, "text": "beta, alpha"})
    assert results.is_right(dict(several, any=True), {"all_top1": None, "text": "beta"})


@claim
def a_torn_line_is_passed_over_and_the_next_is_whole():
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "sub", "r.jsonl")
        results.Store(path).add(result("a", "full", True))
        with open(path, "a") as f:
            f.write('{"id": "b", "pol')
        store = results.Store(path)
        assert len(store.by_key) == 1
        store.add(result("c", "full", True))
        store.add(result("c", "full", False))
        again = results.Store(path).by_key
        assert sorted(k[0] for k in again) == ["a", "c"]
        assert not again[results.key_of(result("c", "full", False))]["right"]


@claim
def a_result_belongs_to_what_computed_it():
    with tempfile.TemporaryDirectory() as tmp:
        store = results.Store(os.path.join(tmp, "r"))
        store.add(result("a", "full", True))
        what = {"model": "m", "backend": "cpu", "dtype": "f32", "isa": "x"}
        assert store.has("a", "full", what)
        for k in what:
            assert not store.has("a", "full", dict(what, **{k: "other"}))


# ---- public.py with a program that only pretends

@contextlib.contextmanager
def workplace(task_list):
    with tempfile.TemporaryDirectory() as tmp:
        program = os.path.join(tmp, "larder-prefill")
        with open(program, "w") as f:
            f.write(FAKE)
        os.chmod(program, stat.S_IRWXU)
        engine.write_jsonl(os.path.join(tmp, "tasks.jsonl"), task_list)
        yield tmp


def run_public(tmp, *words):
    """-> exit status, standard output, calls of the program since the last time"""
    out, err = io.StringIO(), io.StringIO()
    calls = os.path.join(tmp, "calls")
    if os.path.exists(calls):
        os.unlink(calls)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        rc = public.main(["--build", tmp, "--model", os.path.join(tmp, "larder-prefill"),
                          "--tasks", os.path.join(tmp, "tasks.jsonl")] + list(words))
    called = engine_calls(calls)
    return rc, out.getvalue() + err.getvalue(), called


def engine_calls(path):
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [line.strip() for line in f if line.startswith("ask")]


TWO_DOCS = [task("a", [1, 2, 3, 4]), task("b", [1, 2, 3, 4]), task("c", [9, 9, 9, 9])]


@claim
def one_call_per_document_and_none_for_what_is_there():
    with workplace(TWO_DOCS) as tmp:
        rc, out, calls = run_public(tmp, "--policy", "bad")
        assert rc == 0 and calls == ["ask full bad,w=32"] * 2, (rc, out, calls)
        assert re.search(r"^bad,w=32 +3 +3 +67 ", out, re.M), out
        assert "given again: 3 of 3" in out
        rc, again, calls = run_public(tmp, "--policy", "bad")
        assert rc == 0 and calls == [] and again == out
        rc, _, calls = run_public(tmp, "--policy", "bad", "--policy", "good")
        assert rc == 0 and calls == ["ask full good,w=32"] * 2
        rc, _, calls = run_public(tmp, "--fresh", "--limit", "1")
        assert rc == 0 and calls == ["ask full"]


@claim
def in_paper_mode_a_question_is_part_of_its_document():
    two = [task("a", [1, 2], tail_ids=[5, 6, 7]), task("b", [1, 2], tail_ids=[8, 9])]
    got = public.with_question(two)
    assert [(t["id"], t["prefix_ids"], t["tail_ids"]) for t in got] == [
        ("a+paper", [1, 2, 5, 6], [7]), ("b+paper", [1, 2, 8], [9])]
    assert got[0]["source"] == got[1]["source"]
    with workplace(two) as tmp:
        rc, out, calls = run_public(tmp, "--policy", "good", "--paper")
        assert rc == 0 and calls == ["ask full good,w=32"] * 2, (rc, out, calls)
        assert "2 questions on 1 documents" in out, out
        path = os.path.join(tmp, "eval", "tasks.jsonl")
        assert len({r["doc"] for r in engine.read_jsonl(path)}) == 1
        rc, out, calls = run_public(tmp, "--policy", "good")  # is another result
        assert rc == 0 and calls == ["ask full good,w=32"], (rc, out, calls)


@claim
def every_second_question_is_every_second_line():
    with workplace(TWO_DOCS) as tmp:
        rc, out, _ = run_public(tmp, "--every", "2")
        assert rc == 0 and "2 questions on 2 documents" in out, out


@claim
def a_failed_document_is_named_and_what_came_before_is_kept():
    with workplace(TWO_DOCS) as tmp:
        rc, out, _ = run_public(tmp, "--policy", "good", "--policy", "broken")
        assert rc == 1 and "it broke (LARDER_EIO)" in out and "2 documents failed" in out
        assert "good,w=32" in out
        rc, _, calls = run_public(tmp, "--policy", "good")
        assert rc == 0 and calls == []


@claim
def tables_are_written_as_csv_and_markdown():
    with workplace(TWO_DOCS) as tmp:
        md, csv = os.path.join(tmp, "x", "t.md"), os.path.join(tmp, "x", "t.csv")
        assert run_public(tmp, "--policy", "bad", "--markdown", md, "--csv", csv)[0] == 0
        with open(md) as f:
            assert "| `bad,w=32` | 3 | 3 | 67 |" in f.read()
        with open(csv) as f:
            lines = f.read().splitlines()
        assert lines[0].startswith("policy,n,documents") and len(lines) == 3


@claim
def missing_tasks_are_skipped_in_words():
    with workplace([]) as tmp:
        os.unlink(os.path.join(tmp, "tasks.jsonl"))
        rc, out, _ = run_public(tmp)
        assert rc == 77 and out.count("\n") == 1 and "tasks.jsonl" in out


@claim
def recorded_answers_are_compared_as_far_as_generated():
    t = {"full_answer": " 42 and more"}
    assert public.same_answer(t, {"text": " 42"})
    assert public.same_answer(t, {"text": " 42 and more."})
    assert not public.same_answer(t, {"text": " 43"})
    assert not public.same_answer(t, {"text": ""})


# ---- generators

def prose():
    return tasks.Prose([generate.read_text(os.path.join(HERE, "..", "golden", "data", "public",
                                                        "doc_b2000.txt"))])


def factories():
    every = dict(tasks.RULER, **tasks.INFINITEBENCH)
    every.update(("niah at %g" % d, tasks.niah_at(d)) for d in (0, 0.5, 1))
    every["qa"] = tasks.reading([("Paragraph %d is about %d." % (i, i),
                                  [("What is it about?", [str(i)])] * (i % 2)) for i in range(400)])
    return every


@claim
def generators_fill_a_length_and_never_pass_it():
    p = prose()
    for name, factory in factories().items():
        for length in (400, 1500):
            make = factory("seed", p, length)
            n, = tasks.fit([make], length, count_words)
            got, = count_words([make(n)["document"]])
            assert n > 0 and 0.9 * length <= got <= length, (name, length, n, got)


@claim
def generators_repeat_themselves_by_seed():
    p = prose()
    for name, factory in factories().items():
        one, two, other = (factory(s, p, 500)(40) for s in ("s", "s", "t"))
        assert one == two, name
        assert one["document"] != other["document"], name


@claim
def every_answer_is_in_its_document():
    p = prose()
    for name, factory in factories().items():
        doc = factory("s", p, 2000)(150)
        for q in doc["questions"]:
            golds = q["gold"] if isinstance(q["gold"], list) else [q["gold"]]
            assert all(g in doc["document"] for g in golds), (name, q)
            assert q["question"] not in doc["document"]
            assert not q["answer_prefix"].endswith(" ")


@claim
def needles_stand_at_their_depth():
    p = prose()
    for depth in (0, 0.25, 0.5, 1):
        doc = tasks.niah_at(depth)("s", p, 0)(200)
        text = doc["document"]
        at = text.index("The special magic") / len(text)
        assert abs(at - depth) < 0.07, (depth, at)


@claim
def common_words_are_the_most_common():
    for n in (20, 200, 900):
        doc = tasks.common_words("s", None, 4000)(n)
        words = re.findall(r"\d+\. (\w+)", doc["document"])
        top = sorted(set(words), key=lambda w: -words.count(w))[:tasks.COMMON_WORDS]
        assert sorted(top) == sorted(doc["questions"][0]["gold"])


@claim
def code_words_follow_their_law():
    doc = tasks.frequent_words("s", None, 0)(1000)
    words = doc["document"].split("\n")[1].split()
    assert len(words) == 1000
    counts = sorted((words.count(w) for w in set(words)), reverse=True)
    assert counts[:3] == [608, 152, 68]
    gold = doc["questions"][0]["gold"]
    assert [words.count(w) for w in gold] == counts[:3]


@claim
def keys_stay_distinct_beyond_two_words():
    rng = random.Random(1)
    gen = tasks.keys(rng)
    many = [next(gen) for _ in range(9000)]
    assert len(set(many)) == len(many)


@claim
def what_does_not_fit_or_runs_out_is_seen():
    long = tasks.key_value("s", None, 3)
    few = tasks.reading([("a b c", [("q", ["a"])]), ("d e f", [])])("s", None, 100)
    assert tasks.fit([long, few], 3, count_words)[0] == 0
    n = tasks.fit([few], 100, count_words)[0]
    assert few(n)["document"].count("Document") == 2


@claim
def question_files_of_both_kinds_are_read():
    squad = {"data": [{"paragraphs": [{"context": "c", "qas": [
        {"question": "q", "answers": [{"text": "a"}]}, {"question": "none", "answers": []}]}]}]}
    hotpot = [{"question": "q", "answer": "a", "context": [["T", ["x. ", "y."]]]}]
    assert tasks.read_paragraphs(squad) == [("c", [("q", ["a"])])]
    assert tasks.read_paragraphs(hotpot) == [("T: x. y.", [("q", ["a"])])]
    doc, = tasks.infinitebench([{"context": "c", "input": "i", "answer": 5, "options": ["x", "y"]}])
    assert doc["document"] == "c" and doc["questions"][0]["gold"] == ["5"]
    assert doc["questions"][0]["question"] == "i\nA. x\nB. y"


@claim
def imported_questions_are_of_the_kind_that_the_task_names():
    hotpot = [{"question": "q%d" % i, "answer": "a", "context": [["T%d" % i, ["some words here. "]]]}
              for i in range(50)]
    with workplace([]) as tmp:
        out, source = os.path.join(tmp, "out.jsonl"), os.path.join(tmp, "hotpot.json")
        with open(source, "w") as f:
            json.dump(hotpot, f)
        words = ["--import", source, "--length", "60", "--build", tmp, "--model",
                 os.path.join(tmp, "larder-prefill"), "--output", out]
        assert generate.main(["--task", "qa_1"] + words) == 1
        assert generate.main(["--task", "qa_2"] + words) == 0
        got, = engine.read_jsonl(out)
        assert got["task"] == "qa_2" and got["gold"] == ["a"] and got["any"]


@claim
def generated_files_are_task_files():
    with workplace([]) as tmp:
        path = os.path.join(tmp, "out.jsonl")
        words = ["--build", tmp, "--model", os.path.join(tmp, "larder-prefill"), "--output", path]
        rc = generate.main(["--task", "niah_multikey_1", "niah", "--length", "200", "300", "--count",
                            "2", "--depths", "3"] + words)
        got = engine.read_jsonl(path)
        assert rc == 0 and len(got) == 2 * (2 * 4 + 2 * 3)
        assert len({t["id"] for t in got}) == len(got)
        assert all(len(t["prefix_ids"]) <= t["length"] and t["tail_ids"] for t in got)
        assert sorted({t["depth"] for t in got if t["task"] == "niah"}) == [0, 0.5, 1]
        os.rename(path, os.path.join(tmp, "tasks.jsonl"))
        assert run_public(tmp)[0] == 0


# ---- larder eval, which sums up and draws the same files: two implementations check each other

def random_results(seed):
    """Documents with several questions under three policies; some were not measured."""
    rng = random.Random(seed)
    for d in range(30):
        for q in range(rng.randrange(1, 5)):
            right = rng.random() < 0.8
            for i, policy in enumerate(("full", "p,rows=50%,w=32", "p,rows=25%,w=32", "<q>")):
                if policy != "full" and rng.random() < 0.1:
                    continue
                rows = 100 * (d + 1) >> i
                r = result("%d-%d" % (d, q), policy, right and rng.random() < 1 - 0.2 * i, str(d),
                           rows=rows, row_bytes=rows * 10, full_bytes=1000 * (d + 1), found=rng.random(),
                           length=100 * (d % 3), depth=d % 4 / 3)
                if policy != "full":
                    r.update(kl=rng.random(), top1_agree=rng.random())
                    if policy == "<q>":
                        r["kl"] = r["kl"] if q else None
                    else:
                        r["cert_kl"] = 1 / (1 + (7 * d + 3 * i) % 11)
                yield r


def larder_eval(tmp, all_results, *words):
    path = engine.write_jsonl(os.path.join(tmp, "r.jsonl"), all_results)
    program = os.path.join(BUILD, "larder")
    return subprocess.run([program, "eval", "--results", path] + list(words), capture_output=True,
                          text=True)


def close(text, number):
    return text == "" if number is None else abs(float(text) - number) < 1e-5 * max(1, abs(number))


@claim
def larder_eval_says_what_results_py_says():
    if not os.path.exists(os.path.join(BUILD, "larder")):
        raise Skip("larder is not built")
    got = list(random_results(3))
    policies = list(dict.fromkeys(r["policy"] for r in got))
    by_policy = {p: by_id(*(r for r in got if r["policy"] == p)) for p in policies}
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, "t.csv")
        done = larder_eval(tmp, got, "--csv", out, "--json")
        assert done.returncode == 0, done.stderr
        certificates = json.loads(done.stdout)["certificates"]
        with open(out, newline="") as f:
            lines = {r["policy"]: r for r in csv.DictReader(f)}
    assert list(lines) == policies
    for p in policies:
        want = results.summarise(by_policy["full"], by_policy[p])
        for k in results.CSV_FIELDS[1:]:
            if k in ("low", "high"):  # other random numbers
                assert abs(float(lines[p][k]) - want[k]) < 0.02, (p, k, lines[p][k], want[k])
            else:
                assert close(lines[p][k], want[k]), (p, k, lines[p][k], want[k])
    kl, lost, answer_kl = zip(*results.certified(by_policy))
    assert certificates["entries"] == certificates["entries_lost"] == len(kl)
    assert abs(certificates["lost"] - results.spearman(kl, lost)) < 1e-9
    assert abs(certificates["kl"] - results.spearman(kl, answer_kl)) < 1e-9


@claim
def its_page_refers_to_nothing_and_its_drawings_are_xml():
    if not os.path.exists(os.path.join(BUILD, "larder")):
        raise Skip("larder is not built")
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, "t.html")
        done = larder_eval(tmp, list(random_results(4)), "--html", out)
        assert done.returncode == 0, done.stderr
        with open(out) as f:
            text = f.read()
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 3 + 4
    for d in drawings:
        xml.dom.minidom.parseString(d)
    assert not re.search(r"(src|href)=|@import|url\(|<script|nan|inf\b", text)
    assert "<q>" not in text and "&lt;q&gt;" in text
    legend = re.findall(r"<text[^>]*>(.*?)</text>", drawings[2])
    assert sorted(legend) == ["&lt;q&gt;", "p,w=32"], legend  # a curve joins the budgets of one policy
    points = [len(x.split()) for x in re.findall(r'points="(.*?)"', drawings[0])]
    assert sorted(points) == [1, 2], points


@claim
def results_without_a_reference_are_no_report():
    if not os.path.exists(os.path.join(BUILD, "larder")):
        raise Skip("larder is not built")
    with tempfile.TemporaryDirectory() as tmp:
        done = larder_eval(tmp, [result("a", "p", True)])
        assert done.returncode == 1 and "LARDER_EEMPTY" in done.stderr, done.stderr


if __name__ == "__main__":
    sys.exit(run_claims(lambda: contextlib.redirect_stderr(io.StringIO())))
