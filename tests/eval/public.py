#!/usr/bin/env python3
"""Does a pruned cache still answer when the question comes later?

Reads a file of tasks (JSON lines: a stored prefix in prefix_ids, a question in tail_ids, its
answer in gold), prunes every document once per policy before any question is known, asks all
of its questions, and prints per policy the share of the questions answered right with the full
cache that are still answered right. Results are appended to a file as they come; a second run
computes only what is not there.

With --paper the question is part of what is prefilled and pruned, as in the papers whose policies
look at a document's end: each question with its document is one of its own, and only the
question's last token is asked on the pruned rows, since an answer must begin somewhere.

Exit status 77: the tasks or the model are not there.
"""
import argparse
import csv
import hashlib
import os
import sys
import time

sys.dont_write_bytecode = True
import results
from engine import MODEL, Engine, EngineError, read_jsonl

SPARE_TOKENS = 4  # generated beyond the known answer
PAPER = "+paper"  # behind the name of a question that is part of its document


class Bar:
    """Progress on a terminal, nothing elsewhere."""

    def __init__(self, total, stream=sys.stderr):
        self.stream = stream if stream.isatty() else None
        self.total = max(total, 1)
        self.start = time.monotonic()

    def show(self, done, text):
        if not self.stream:
            return
        share = min(done / self.total, 1)
        spent = time.monotonic() - self.start
        left = "%d:%02d left" % divmod(int(spent / share - spent), 60) if share > 0 else ""
        bar = "#" * int(24 * share)
        self.stream.write("\r\033[K[%-24s] %3d %%  %s  %s" % (bar, 100 * share, text, left))
        self.stream.flush()

    def clear(self):
        if self.stream:
            self.stream.write("\r\033[K")
            self.stream.flush()


def by_document(tasks):
    """[(name of the document, its tasks)], in the file's order"""
    docs = {}
    for t in tasks:
        ids = " ".join(map(str, t["prefix_ids"]))
        docs.setdefault(hashlib.sha256(ids.encode()).hexdigest()[:16], []).append(t)
    return list(docs.items())


def with_question(tasks):
    """The tasks of --paper. They keep the document's hash: questions about one document are not
    independent, whatever stands behind it."""
    out = []
    for doc, ts in by_document(tasks):
        for t in ts:
            ids = t["prefix_ids"] + t["tail_ids"]
            out.append(dict(t, id=t["id"] + PAPER, source=doc, prefix_ids=ids[:-1],
                            tail_ids=ids[-1:]))
    return out


def fill_gold(engine, tasks):
    """gold_ids of every task: a space, as after the answer's beginning, and the answer. Several
    answers have no one sequence of tokens."""
    missing = [t for t in tasks if "gold_ids" not in t]
    single = [t for t in missing if not isinstance(t["gold"], list)]
    for t in missing:
        t["gold_ids"] = []
    if single:
        got = engine.tokenize([{"text": " " + t["gold"]} for t in single])
        for t, ids in zip(single, got):
            t["gold_ids"] = ids


def max_new(tasks, asked):
    if asked is not None:
        return asked
    return max(t.get("max_new", len(t["gold_ids"]) + SPARE_TOKENS) for t in tasks)


def same_answer(task, scored):
    """Is it the recorded answer of the full cache? Either may have been cut off."""
    text, want = scored["text"], task["full_answer"]
    return bool(text) and (want.startswith(text) or text.startswith(want))


def result(task, doc, scored, what):
    r = {k: scored.get(k) for k in
         ("policy", "n_ctx", "rows", "row_bytes", "full_bytes", "all_top1", "nll", "kl",
          "top1_agree", "text", "prefill_ms")}
    r.update(what, id=task["id"], task=task["task"], doc=task.get("source", doc), found=results.found(task, r["text"]),
             right=bool(results.is_right(task, scored)),
             cert_kl=(scored.get("certificate") or {}).get("kl"),
             ranks=[g["rank"] for g in scored["gold"]])
    r.update({k: task[k] for k in ("length", "depth") if k in task})
    if scored["policy"] == results.FULL and "full_answer" in task:
        r["as_recorded"] = same_answer(task, scored)
    return r


def run_document(engine, store, doc, tasks, policies, what, args):
    """Ask what has not been asked; the full cache again with every new policy, as reference."""
    ids = [t["id"] for t in tasks]
    todo = [p for p in policies if args.fresh or not all(store.has(i, p, what) for i in ids)]
    if not todo:
        return
    run = [results.FULL] + [p for p in todo if p != results.FULL]
    limit = max_new(tasks, args.max_new)
    by_id = {t["id"]: t for t in tasks}
    questions = [{"id": t["id"], "question_ids": t["tail_ids"], "gold_ids": t["gold_ids"]}
                 for t in tasks]
    for scored in engine.score(tasks[0]["prefix_ids"], questions, run, limit):
        if args.fresh or not store.has(scored["id"], scored["policy"], what):
            store.add(result(by_id[scored["id"]], doc, scored, what))


def run_all(engine, store, tasks, policies, what, args):
    """-> how many documents failed"""
    docs = by_document(tasks)
    bar = Bar(sum(len(ts[0]["prefix_ids"]) for _, ts in docs))
    done = failed = 0
    for i, (doc, ts) in enumerate(docs):
        bar.show(done, "document %d of %d, %d tokens" % (i + 1, len(docs), len(ts[0]["prefix_ids"])))
        try:
            run_document(engine, store, doc, ts, policies, what, args)
        except EngineError as why:
            bar.clear()
            print("%s: %s" % (ts[0]["id"], why), file=sys.stderr)
            failed += 1
        done += len(ts[0]["prefix_ids"])
    bar.clear()
    return failed


def report_certificates(by_policy):
    """Do certificates tell good caches from bad ones?"""
    entries = results.certified(by_policy)
    if not entries:
        return
    kl, lost, answer_kl = zip(*entries)
    print("\nrank correlation of the certificate's KL over %d caches: with the share of answers "
          "lost %s, with the KL of the answers %s"
          % (len(entries), *("-" if r is None else "%.2f" % r
                             for r in (results.spearman(kl, lost),
                                       results.spearman(kl, answer_kl)))))


def report(store, tasks, policies, what, args):
    rows = results.table(store, tasks, policies, what, seed=args.seed)
    title = "%s: %d questions on %d documents; %s, %s; %s" % (
        os.path.basename(args.tasks), len(tasks), len({t.get("source", d) for d, ts in
                                                       by_document(tasks) for t in ts}),
        os.path.basename(args.model), what["dtype"], what["isa"])
    print(title + "\n")
    print(results.as_text(rows))
    by_policy = store.select([t["id"] for t in tasks], [results.FULL] + policies, what)
    report_certificates(by_policy)
    full = by_policy[results.FULL]
    recorded = [r["as_recorded"] for r in full.values() if "as_recorded" in r]
    if recorded:
        print("\nrecorded answers of the full cache that were given again: %d of %d"
              % (sum(recorded), len(recorded)))
    if args.markdown:
        with open(args.markdown, "w") as f:
            f.write("%s\n\n%s\n" % (title, results.as_markdown(rows)))
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            csv.writer(f).writerows(results.csv_rows(rows))


def parse_args(argv):
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    here = os.path.dirname(os.path.abspath(__file__))
    shared = os.path.normpath(os.path.join(here, "..", "..", "..", "shared", "tasks"))
    a.add_argument("--build", default="build", help="build directory")
    a.add_argument("--model", default=MODEL)
    a.add_argument("--tasks", default=os.path.join(shared, "public_tasks.jsonl"))
    a.add_argument("--policy", action="append", default=[], help="may be given several times; "
                   "the full cache is always measured")
    a.add_argument("--results", help="file that results are appended to "
                   "(default: BUILD/eval/ and the name of the tasks)")
    a.add_argument("--limit", type=int, help="only the first N documents")
    a.add_argument("--every", type=int, default=1, help="only every N-th question")
    a.add_argument("--paper", action="store_true", help="the question is part of the document")
    a.add_argument("--max-new", type=int, help="tokens to generate at most "
                   "(default: the known answer's and %d more)" % SPARE_TOKENS)
    a.add_argument("--fresh", action="store_true", help="compute again what is there")
    a.add_argument("--backend", default="cpu")
    a.add_argument("--dtype", default="auto")
    a.add_argument("--threads", type=int, default=0)
    a.add_argument("--profile", help="the model's calibration (larder-prefill calibrate)")
    a.add_argument("--seed", type=int, default=results.SEED, help="of the bootstrap")
    a.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    a.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
    args = a.parse_args(argv)
    if not args.results:
        args.results = os.path.join(args.build, "eval", os.path.basename(args.tasks))
    return args


def main(argv=None):
    args = parse_args(argv)
    for what, path in (("tasks", args.tasks), ("model's weights", args.model)):
        if not os.path.exists(path):
            print("skipped: the %s are not at %s" % (what, path), file=sys.stderr)
            return 77
    tasks = read_jsonl(args.tasks)[::args.every]
    if args.limit is not None:
        tasks = [t for _, ts in by_document(tasks)[:args.limit] for t in ts]
    if args.paper:
        tasks = with_question(tasks)
    engine = Engine(args.build, args.model, args.backend, args.dtype, args.threads, args.profile)
    store = results.Store(args.results)
    for path in filter(None, (args.csv, args.markdown)):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        fill_gold(engine, tasks)
        spelled, what = engine.identify([results.FULL] + args.policy)
        policies = list(dict.fromkeys(spelled.values()))
        failed = run_all(engine, store, tasks, policies, what, args)
    except EngineError as why:
        print(why, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on", file=sys.stderr)
        return 130
    report(store, tasks, policies[1:], what, args)
    if failed:
        print("%d documents failed" % failed, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
