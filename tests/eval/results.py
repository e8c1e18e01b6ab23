"""Results of an evaluation: a file of JSON lines that only grows, and what it says.

A result belongs to a task, a canonical policy, a model and what computed it. "Kept right" is
the share of the questions that the full cache answers right and the pruned one still does.
Questions about one document are not independent, so intervals resample documents.
"""
import json
import os
import random

FULL = "full"
RESAMPLES = 10000
SEED = 1
KEY = ("id", "policy", "model", "backend", "dtype", "isa")


def key_of(r):
    return tuple(r[k] for k in KEY)


class Store:
    """Results by key; the last one of a key counts."""

    def __init__(self, path):
        self.path = path
        self.by_key = {}
        self.midline = False  # an interrupted run left the last line unfinished
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                for line in f:
                    self.midline = not line.endswith("\n")
                    r = self._parse(line)
                    if r:
                        self.by_key[key_of(r)] = r

    @staticmethod
    def _parse(line):
        """None for a line that is not a whole result."""
        try:
            r = json.loads(line)
            key_of(r)
            return r
        except (ValueError, KeyError, TypeError):
            return None

    def add(self, r):
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(("\n" if self.midline else "") + json.dumps(r, ensure_ascii=False) + "\n")
        self.midline = False
        self.by_key[key_of(r)] = r

    def has(self, task_id, policy, what):
        return key_of(dict(what, id=task_id, policy=policy)) in self.by_key

    def select(self, task_ids, policies, what):
        """{policy: {task id: result}} of one model on one kind of machine"""
        return {p: {t: r for t in task_ids
                    for r in [self.by_key.get(key_of(dict(what, id=t, policy=p)))] if r}
                for p in policies}


# ---- what an answer is worth

def golds_of(task):
    gold = task["gold"]
    return gold if isinstance(gold, list) else [gold]


def found(task, text):
    """Share of the known answers that occur in the text, whatever the case. A task with "any"
    is content with one of them."""
    low = text.lower()
    hits = [g.lower() in low for g in golds_of(task)]
    return float(any(hits)) if task.get("any") else sum(hits) / len(hits)


def is_right(task, scored):
    """Strict where there is one answer: every token of it is the model's choice. Several
    answers come in any order, so they are looked for in the text."""
    if isinstance(task["gold"], list):
        return found(task, scored["text"]) == 1
    return scored["all_top1"]


# ---- sums

def share(pairs):
    part, whole = (sum(x) for x in zip(*pairs)) if pairs else (0, 0)
    return part / whole if whole else None


def bootstrap(pairs, resamples=RESAMPLES, seed=SEED):
    """95 % interval of sum(part) / sum(whole) over resampled [(part, whole)]."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(resamples if share(pairs) is not None else 0):
        s = share(rng.choices(pairs, k=len(pairs)))
        if s is not None:
            drawn.append(s)
    if not drawn:
        return None, None
    drawn.sort()
    return drawn[int(0.025 * len(drawn))], drawn[min(len(drawn) - 1, int(0.975 * len(drawn)))]


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    out, i = [0.0] * len(values), 0
    while i < len(order):
        j = i
        while j < len(order) and values[order[j]] == values[order[i]]:
            j += 1
        for k in order[i:j]:
            out[k] = (i + j + 1) / 2
        i = j
    return out


def spearman(xs, ys):
    """Rank correlation; None where one side is constant."""
    a, b = ranks(xs), ranks(ys)
    ma, mb = sum(a) / len(a) if a else 0, sum(b) / len(b) if b else 0
    var = sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b)
    return sum((x - ma) * (y - mb) for x, y in zip(a, b)) / var ** 0.5 if var else None


def certified(by_policy):
    """[(KL that an entry's certificate states, share of its answers lost, KL of its answers)]
    of every pruned cache that has a certificate."""
    entries = {}
    for policy, got in by_policy.items():
        for t, r in got.items():
            full = by_policy[FULL].get(t)
            if policy != FULL and full and full["right"] and r.get("cert_kl") is not None:
                entries.setdefault((policy, r["doc"]), []).append(r)
    return [(rs[0]["cert_kl"], sum(not r["right"] for r in rs) / len(rs),
             mean([r["kl"] for r in rs])) for rs in entries.values()]


def summarise(full, pruned, resamples=RESAMPLES, seed=SEED):
    """One row of the table, over the tasks that both have results for."""
    both = [(full[t], pruned[t]) for t in pruned if t in full]
    docs, size = {}, {}
    for f, p in both:
        kept, right = docs.get(f["doc"], (0, 0))
        docs[f["doc"]] = (kept + (f["right"] and p["right"]), right + f["right"])
        size[f["doc"]] = (f, p)
    pairs = list(docs.values())
    low, high = bootstrap(pairs, resamples, seed)
    return {
        "n": len(both),
        "documents": len(docs),
        "full_right": sum(f["right"] for f, _ in both),
        "kept_right": share(pairs),
        "low": low,
        "high": high,
        "kl": mean([p.get("kl") for f, p in both if f["right"]]),
        "top1_agree": mean([p.get("top1_agree") for f, p in both if f["right"]]),
        "found": mean([p["found"] for _, p in both]),
        "rows": share([(p["rows"], f["rows"]) for f, p in size.values()]),
        "bytes": share([(p["row_bytes"], p["full_bytes"]) for _, p in size.values()]),
        "cert_kl": mean([p.get("cert_kl") for _, p in size.values()]),
    }


def table(store, tasks, policies, what, resamples=RESAMPLES, seed=SEED):
    """[(policy, row)], full first"""
    by_policy = store.select([t["id"] for t in tasks], [FULL] + list(policies), what)
    return [(p, summarise(by_policy[FULL], got, resamples, seed))
            for p, got in by_policy.items() if got]


# ---- tables as text

COLUMNS = [
    ("policy", lambda p, r: p),
    ("questions", lambda p, r: "%d" % r["n"]),
    ("full right", lambda p, r: "%d" % r["full_right"]),
    ("kept right %", lambda p, r: percent(r["kept_right"], 0)),
    ("95 %", lambda p, r: interval(r["low"], r["high"])),
    ("KL", lambda p, r: "" if r["kl"] is None else "%.3f" % r["kl"]),
    ("certified KL", lambda p, r: "" if r["cert_kl"] is None else "%.3f" % r["cert_kl"]),
    ("found %", lambda p, r: percent(r["found"], 0)),
    ("rows %", lambda p, r: percent(r["rows"], 1)),
    ("bytes %", lambda p, r: percent(r["bytes"], 1)),
]


def percent(x, digits):
    return "" if x is None else "%.*f" % (digits, 100 * x)


def interval(low, high):
    return "" if low is None else "%.0f-%.0f" % (100 * low, 100 * high)


def cells(rows):
    return [[name for name, _ in COLUMNS]] + [[f(p, r) for _, f in COLUMNS] for p, r in rows]


def as_text(rows):
    lines = cells(rows)
    width = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                               for i, (c, w) in enumerate(zip(line, width))).rstrip()
                     for line in lines)


def as_markdown(rows):
    lines = cells(rows)
    out = ["| " + " | ".join(lines[0]) + " |",
           "|" + "|".join(["---"] + ["---:"] * (len(COLUMNS) - 1)) + "|"]
    out += ["| `%s` | " % line[0] + " | ".join(line[1:]) + " |" for line in lines[1:]]
    return "\n".join(out)


CSV_FIELDS = ["policy", "n", "documents", "full_right", "kept_right", "low", "high", "kl",
              "top1_agree", "cert_kl", "found", "rows", "bytes"]


def csv_rows(rows):
    """Rows for csv.writer: shares from 0 to 1, empty where there is nothing to say."""
    yield CSV_FIELDS
    for p, r in rows:
        r = dict(r, policy=p)
        yield ["" if r[k] is None else "%.6g" % r[k] if isinstance(r[k], float) else r[k]
               for k in CSV_FIELDS]
