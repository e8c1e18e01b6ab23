#!/usr/bin/env python3
"""Make tasks for larder eval and public.py: documents of a given length in tokens, with questions and answers.

Everything comes from a seed and from texts on this machine; document and question are tokenised
separately, as a cache that was stored before the question demands.

  generate.py --task ruler --length 2000 --count 5 --output ruler.jsonl
  generate.py --task niah --length 1000 2000 4000 --depths 5 --output grid.jsonl
  generate.py --task qa_1 --import squad.json --length 4000 --output qa.jsonl

Exit status 77: the model is not there.
"""
import argparse
import glob
import json
import os
import sys

sys.dont_write_bytecode = True
import tasks
from engine import MODEL, Engine, EngineError, read_jsonl, write_jsonl

HERE = os.path.dirname(os.path.abspath(__file__))
GROUPS = {"ruler": tasks.RULER, "infinitebench": tasks.INFINITEBENCH}
QA = {"qa_1": ("SQuAD", True), "qa_2": ("HotpotQA", False)}  # as RULER names them
IMPORTED = tuple(QA) + ("infinitebench_file",)


def default_prose():
    """Texts that every Debian has, and those of the tree."""
    found = [p for p in sorted(glob.glob("/usr/share/common-licenses/*")) if not os.path.islink(p)]
    return found + sorted(glob.glob(os.path.join(HERE, "..", "golden", "data", "public", "*.txt")))


def read_text(path):
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read()


def named(names):
    """{name: factory} of tasks and groups of tasks"""
    out = {}
    for name in names:
        for group in list(GROUPS.values()) + [{"niah": None}]:
            if name in group:
                out[name] = group[name]
        out.update(GROUPS.get(name, {}))
        if name not in out and name not in GROUPS and name not in IMPORTED:
            raise SystemExit("no task is named %s; there are %s" % (name, ", ".join(all_names())))
    return out


def all_names():
    return list(GROUPS) + [n for g in GROUPS.values() for n in g] + ["niah"] + list(IMPORTED)


def depths(n):
    return [0.5] if n == 1 else [i / (n - 1) for i in range(n)]


def read_qa(path, name):
    kind, is_squad = QA[name]
    with open(path, encoding="utf-8") as f:
        data = json.load(f)
    if tasks.is_squad(data) != is_squad:
        raise EngineError("task %s needs a %s file, and %s is none" % (name, kind, path))
    return tasks.read_paragraphs(data)


def plan(args, length):
    """[(task, number, maker)] of one length"""
    prose = tasks.Prose([read_text(p) for p in args.prose or default_prose()])
    factories = named(args.task)
    for name in set(QA) & set(args.task):
        factories[name] = tasks.reading(read_qa(args.import_, name))
    out = []
    for name, factory in factories.items():
        many = [tasks.niah_at(d) for d in depths(args.depths)] if name == "niah" else [factory]
        for i in range(args.count):
            for j, f in enumerate(many):
                number = i * len(many) + j
                out.append((name, number, f("%s/%d/%d/%d" % (name, length, args.seed, number),
                                            prose, length)))
    return out


def imported_documents(args, length, engine):
    """Documents of a file that are not longer than `length`; nothing is truncated."""
    docs = list(tasks.infinitebench(read_jsonl(args.import_)))
    ids = engine.tokenize([{"document": d["document"]} for d in docs])
    fitting = [(d, i) for d, i in zip(docs, ids) if len(i) <= length]
    if len(fitting) < len(docs):
        print("%d of %d documents are longer than %d tokens and left out"
              % (len(docs) - len(fitting), len(docs), length), file=sys.stderr)
    name = os.path.splitext(os.path.basename(args.import_))[0]
    return [(name, n, d, i) for n, (d, i) in enumerate(fitting)]


def generated_documents(args, length, engine):
    """[(task, number, document, its ids)]"""
    planned = plan(args, length)
    makers = [m for _, _, m in planned]
    units = tasks.fit(makers, length, lambda texts: [
        len(ids) for ids in engine.tokenize([{"document": t} for t in texts])])
    docs = []
    for (name, number, make), n in zip(planned, units):
        if n:
            docs.append((name, number, make(n)))
        else:
            print("%s does not fit into %d tokens" % (name, length), file=sys.stderr)
    ids = engine.tokenize([{"document": d["document"]} for _, _, d in docs])
    return [d + (i,) for d, i in zip(docs, ids)]


def as_tasks(docs, length, seed, engine):
    """The lines of the file: one per question."""
    out = []
    for name, number, doc, ids in docs:
        for q, asked in enumerate(doc["questions"]):
            out.append(dict(asked, id="%s-%d-%d-%d-%d" % (name, length, seed, number, q), task=name,
                            length=length, document=doc["document"], n_doc_tokens=len(ids),
                            prefix_ids=ids))
            if "depth" in doc:
                out[-1]["depth"] = doc["depth"]
    tails = engine.tokenize([{"question": t["question"], "answer": t["answer_prefix"]}
                             for t in out])
    for t, ids in zip(out, tails):
        t["tail_ids"] = ids
        t["n_tail_tokens"] = len(ids)
    return out


def parse_args(argv):
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                epilog="tasks: " + ", ".join(all_names()))
    a.add_argument("--task", nargs="+", required=True, metavar="NAME")
    a.add_argument("--length", nargs="+", type=int, required=True, metavar="N",
                   help="tokens of the stored prefix")
    a.add_argument("--count", type=int, default=1, help="documents per task and length "
                   "(and depth)")
    a.add_argument("--depths", type=int, default=5, help="depths of task niah, from 0 to 1")
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--import", dest="import_", metavar="FILE", help="qa_1: a SQuAD file; "
                   "qa_2: a HotpotQA file; infinitebench_file: JSON lines of InfiniteBench")
    a.add_argument("--prose", action="append", metavar="FILE", help="text for haystacks "
                   "(default: the licences that Debian installs)")
    a.add_argument("--output", default="/dev/stdout")
    a.add_argument("--build", default="build", help="build directory")
    a.add_argument("--model", default=MODEL)
    args = a.parse_args(argv)
    if not args.import_ and set(args.task) & set(IMPORTED):
        a.error("task %s needs --import" % " and ".join(IMPORTED))
    return args


def main(argv=None):
    args = parse_args(argv)
    if not os.path.exists(args.model):
        print("skipped: the model is not at %s" % args.model, file=sys.stderr)
        return 77
    engine = Engine(args.build, args.model)
    out = []
    try:
        for length in args.length:
            docs = []
            if set(args.task) - {"infinitebench_file"}:
                docs += generated_documents(args, length, engine)
            if "infinitebench_file" in args.task:
                docs += imported_documents(args, length, engine)
            out += as_tasks(docs, length, args.seed, engine)
    except (EngineError, OSError) as why:
        print(why, file=sys.stderr)
        return 1
    write_jsonl(args.output, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
