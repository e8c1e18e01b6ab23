#!/usr/bin/env python3
"""Compare the rows that policies keep with recorded runs of kvpress and PyramidInfer.

The recorded runs (data/kvpress, format and rules in its README.md) hold, per document and
method, the rows that each layer and KV head keeps when half, three quarters and seven
eighths are removed, and the near-ties of each choice. A set conforms when it differs from
the recorded one in near-ties only.

Speaks TAP. Methods that the build refuses as unsupported are skipped one by one. Exit
status 77: the model is not there.
"""
import glob
import gzip
import json
import os
import sys
import tempfile

sys.dont_write_bytecode = True
import common
from common import check_logits, claim, differ, engine, unrun, write_ids

DATA = os.path.join(common.HERE, "data", "kvpress")
KEPT = {"0.5": "50%", "0.75": "25%", "0.875": "12.5%"}  # removed -> rows

# method -> (policy with {} for rows, the ratio in which the subset repeats it)
METHODS = {
    "keydiff": ("keydiff,rows={},sink=0", "0.875"),
    "knorm": ("knorm,rows={},sink=0", "0.5"),
    "streamingllm": ("streaming,rows={}", None),
    "tova": ("tova,rows={}", "0.75"),
    "observed": ("observed,rows={}", "0.875"),
    "ea": ("expected,rows={}", "0.75"),
    "snapkv_w64": ("snapkv,rows={},w=64,pool=5", None),
    "snapkv_w32": ("snapkv,rows={},w=32,pool=5", None),
    "pyramidkv_w64": ("pyramidkv,rows={}", "0.5"),
    "pyramidkv_w32": ("pyramidkv,rows={},w=32", None),
    "adakv_snapkv_w64": ("adakv,rows={}", "0.75"),
    "adakv_snapkv_w32": ("adakv,rows={},w=32", None),
    "adakv_ea": ("adakv,rows={},obs=expected,eps=0.01", "0.875"),
    "adakv_ea_eps0": ("adakv,rows={},obs=expected,eps=0", None),
    "criticalkv_snapkv": ("criticalkv,rows={}", "0.5"),
    "criticaladakv_snapkv": ("criticalkv,rows={},shape=layer", "0.75"),
    "criticaladakv_ea": ("criticalkv,rows={},shape=layer,obs=expected", "0.875"),
    "kvzip": ("kvzip,rows={}", "0.75"),
    "kvzip_layerwise": ("kvzip,rows={},shape=layer", None),
    "kvzip_c256": ("kvzip,rows={},chunk=256", None),
    "kvzip_c256_layerwise": ("kvzip,rows={},shape=layer,chunk=256", "0.5"),
    "kvzip_plus": ("kvzip+,rows={}", "0.75"),
    "kvzip_plus_layerwise": ("kvzip+,rows={},shape=layer", None),
    "kvzip_chat": ("kvzip,rows={}", "0.75"),
    "kvzip_chat_layerwise": ("kvzip,rows={},shape=layer", None),
}
CHAT = "smollm2"  # the template of the runs whose documents stand in a chat


def load(doc, method):
    with gzip.open(os.path.join(DATA, "kvp_%s_%s.json.gz" % (doc, method))) as f:
        return json.load(f)


def recorded(doc):
    """Methods with a recorded run, in the order of METHODS."""
    head = os.path.join(DATA, "kvp_%s_" % doc)
    there = [p[len(head):-len(".json.gz")] for p in glob.glob(head + "*.json.gz")]
    odd = set(there) - set(METHODS) - {"pyramidinfer"}
    claim(doc + ": every recorded method is repeated", ", ".join(sorted(odd)) if odd else None)
    return [m for m in METHODS if m in there]


def check_kept(golden, rows):
    """Rows [layer][KV head] against one recorded ratio."""
    total = 0
    for layer, heads in enumerate(golden["keep"]):
        for head, runs in enumerate(heads):
            ours = rows[layer][head]
            ambiguous = golden["margin"][layer][head][1] if golden.get("margin") else []
            _, bad = differ(ours, unrun(runs), ambiguous)
            total += len(ours)
            if bad or ours != sorted(set(ours)):
                return "layer %d head %d: %d positions differ, e.g. %d" % (
                    layer, head, len(bad), min(bad) if bad else -1)
    return None if total == golden["total"] else "%d rows, recorded %d" % (total, golden["total"])


def run_methods(args, tmp, doc, methods, chat=False):
    """One process for all methods; a method that is not computed would end it."""
    runs = [(m, load(doc, m)) for m in methods]
    plan = [(m, run["ratios"][r], r, METHODS[m][0].format(KEPT[r])) for m, run in runs
            for r in KEPT if not args.subset or r == METHODS[m][1]]
    if not plan:
        return
    ids = runs[0][1]["params"].get("prefix_ids", []) + common.doc_ids(doc)
    words = ["trace", "--tokens", write_ids(tmp, doc + ".ids", ids)]
    for entry in plan:
        words += ["--policy", entry[3]]
    try:
        answers = engine(args, words + ["--template", CHAT if chat else "plain"])
    except common.Unsupported:
        for m, _, r, _ in plan:
            common.skip("%s %s, %s removed" % (doc, m, r), "this build does not compute it")
        return
    for (m, golden, r, _), answer in zip(plan, answers):
        claim("%s %s, %s removed: kept rows" % (doc, m, r), check_kept(golden, answer["rows"]))
    claim("%s: one answer per policy" % doc,
          None if len(answers) == len(plan) else "%d of %d" % (len(answers), len(plan)))


def check_decay(run, rows):
    """Rows that enter each layer. Where one set differs in near-ties, layers above it were
    computed from other tokens and are not comparable: (why, all compared)"""
    ambiguous = []
    for golden, heads in zip(run["layers"], rows):
        want = unrun(golden["pos"])
        odd, bad = differ(heads[0], want, ambiguous)
        if bad or any(h != heads[0] for h in heads):
            return "layer %d: %d positions differ" % (golden["layer"], len(bad)), False
        if odd:
            return None, False
        ambiguous = golden["margin"][1] if golden.get("margin") else []
    return None, True


def run_pyramidinfer(args, tmp, doc):
    run = load(doc, "pyramidinfer")
    path = write_ids(tmp, doc + ".ids", common.doc_ids(doc))
    answer = engine(args, ["trace", "--tokens", path, "--policy", "pyramidinfer"])[0]
    why, whole = check_decay(run, answer["rows"])
    claim(doc + " pyramidinfer: rows of every layer", why)
    if whole:
        claim(doc + " pyramidinfer: logits",
              check_logits(answer["top_logits"], run["logits_doc_end"], 1e-3, 20))


def main():
    args = common.parser(__doc__).parse_args()
    common.need_model(args)
    with tempfile.TemporaryDirectory(prefix="larder-kvpress.") as tmp:
        for doc in ["a700"] if args.subset else ["a700", "b2000"]:
            methods = recorded(doc)
            zips = [m for m in methods if m.startswith("kvzip")]
            run_methods(args, tmp, doc, [m for m in methods if m not in zips])
            run_methods(args, tmp, doc, [m for m in zips if "chat" not in m])
            run_methods(args, tmp, doc, [m for m in zips if "chat" in m], chat=True)
            run_pyramidinfer(args, tmp, doc)


if __name__ == "__main__":
    sys.exit(common.finish(main))
