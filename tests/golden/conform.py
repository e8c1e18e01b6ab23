#!/usr/bin/env python3
"""Compare larder-prefill with recorded runs of the reference implementation.

The recorded runs (data/public, format and tolerances in data/README.md) hold, per
document and policy, the variance trace, the selection layer, the selected tokens, the
kept rows of every layer and KV head, the top logits, and the greedy continuation after
a question. One process per document computes all policies: `ask --trace` prefills,
prunes, resumes with the question and prints everything that is compared here.

Speaks TAP. Exit status 77: the model, or bf16 on this processor, is not there.
"""
import glob
import gzip
import json
import os
import sys
import tempfile

sys.dont_write_bytecode = True
import common
import worker
from common import DOCS, check_logits, claim, differ, engine, options, unrun, write_ids

VARIANCE_REL = {"avgpool": 1e-3, "maxpool": 2e-2}  # max pooling has exact ties
LOGITS_ABS = 1e-3
QUESTION_ABS = 2e-3
LOOSE_ABS = 0.05  # on the top 5, when a set differs inside its ambiguous positions
GREEDY_GAP = 5e-3
BF16_OVERLAP = 0.98
MIB = 1 << 20

# Every kind of policy and of parameter once.
SUBSET = ["full", "snapkv_k256", "asl_k256_m14_t0.8", "asl_k256_m14_t0.8_ck128",
          "asl_k256_m14_t0.8_nobudget", "asl_k256_m14_t0.8_maxpool", "asl_k128_m7_t0.5",
          "asl_k256_m10_t1.5", "asl_k512_m10_t0.3", "fastkv_k256", "gemfilter_k256",
          "asl2pass_k256_m14_t0.8"]
SUBSET_LONG = ["full", "snapkv_k512", "asl_k1024_m14_t0.8", "asl_k512_m14_t0.8_ck256",
               "asl_k512_m14_t0.8_maxpool", "fastkv_k512", "gemfilter_k1024",
               "asl2pass_k512_m10_t0.3"]


def policy_of(run):
    p = run["params"]
    method = run["method"]
    if method == "full":
        return "full"
    if method == "gemfilter":
        return "gemfilter,rows=%d,pool=%d,layer=%d" % (p["select_k"], p["S"], p["filter_layer"])
    window = "w=%d,pool=%d,poolkind=%s" % (p["w"], p["S"], p["pool"][:3])
    if method == "snapkv":
        return "snapkv,rows=%d,%s" % (p["cache_k"], window)
    if method == "fastkv":
        return "fastkv,rows=%d,select=%d,%s,layer=%d" % (p["cache_k"], p["select_k"], window,
                                                         p["tsp_layer"])
    variance = "lmin=%d,lobs=%d,tau=%g" % (p["L_min"], p["L_obs"], p["tau"])
    if method == "asl_2pass":
        return "asl2pass,rows=%d,%s,%s" % (p["select_k"], window, variance)
    rows = "all" if p["cache_k"] is None else "%d" % p["cache_k"]
    return "asl,rows=%s,select=%d,%s,%s" % (rows, p["select_k"], window, variance)


def load_runs(doc, names):
    runs = []
    for path in sorted(glob.glob(os.path.join(DOCS, "asl_%s_*.json.gz" % doc))):
        name = os.path.basename(path)[len("asl_%s_" % doc):-len(".json.gz")]
        if names is not None and name not in names:
            continue
        with gzip.open(path) as f:
            runs.append((name, json.load(f)))
    return runs


# ---- what is compared

def check_trace(run, trace):
    golden = run.get("rel_trace")
    if golden is None:
        return None
    if len(golden) != len(trace):
        return "%d layers tested, recorded %d" % (len(trace), len(golden))
    tol = VARIANCE_REL[run["params"]["pool"]]
    for g, o in zip(golden, trace):
        if o["layer"] != g[0]:
            return "layer %d, recorded %d" % (o["layer"], g[0])
        for what, ours, theirs in (("variance", o["value"], g[3]), ("ratio", o["ratio"], g[4])):
            if abs(ours - theirs) > tol * abs(theirs):
                return "layer %d: %s %.6f, recorded %.6f" % (g[0], what, ours, theirs)
    return None


def check_selected(run, selected):
    """-> (why, sets differ)"""
    golden = run.get("SEL")
    if golden is None:
        return (None if selected is None else "selected although the record has no cut"), False
    if selected is None:
        return "nothing selected", False
    if selected != sorted(set(selected)):
        return "not ascending", False
    odd, bad = differ(selected, unrun(golden), run["SEL_margin"][1])
    return ("%d positions differ, e.g. %d" % (len(bad), min(bad)) if bad else None), bool(odd)


def golden_rows(run, selected, layer, head):
    """-> (positions, ambiguous ones)"""
    keep = run.get("keep")
    if keep is None:  # full, and the two-pass methods: one list for all
        return (list(range(run["n"])) if selected is None else selected), []
    k = keep[layer]
    if k == "all":
        return list(range(run["n"])), []
    if k == "sel":
        return selected, []
    margin = run["keep_margin"][layer]
    return unrun(k[head]), margin[head][1] if margin else []


def check_rows(run, trace):
    """-> (why, sets differ)"""
    any_odd = False
    for layer, heads in enumerate(trace["rows"]):
        for head, rows in enumerate(heads):
            golden, ambiguous = golden_rows(run, trace["selected"], layer, head)
            odd, bad = differ(rows, golden, ambiguous)
            any_odd |= bool(odd)
            if bad or rows != sorted(set(rows)):
                return "layer %d head %d: %d positions differ" % (layer, head, len(bad)), any_odd
    return None, any_odd


def check_greedy(ours, resume, gap, n_new):
    for step, (o, g, room) in enumerate(zip(ours, resume["greedy"], resume["greedy_gap"])):
        if room < gap:
            return None
        if o != g:
            return "step %d: token %d, recorded %d" % (step, o, g)
    return None if len(ours) == n_new else "%d tokens, asked for %d" % (len(ours), n_new)


def compare(args, doc, name, run, answer):
    trace = answer["trace"]
    resume = run["resume"][0]
    full = "%s %s: " % (doc, name)
    claim(full + "variance trace", check_trace(run, trace["rank_variance"]))
    sel, want = trace["sel_layer"], run.get("L_sel")
    claim(full + "selection layer", None if sel == want else "%s, recorded %s" % (sel, want))
    why, odd = check_selected(run, trace["selected"])
    claim(full + "selected tokens", why)
    why, odd_rows = check_rows(run, trace)
    claim(full + "kept rows", why)
    # A deeper layer computed from other tokens has other logits; other kept rows only
    # change what the question sees.
    tol, n = (LOOSE_ABS, 5) if odd else (LOGITS_ABS, 20)
    claim(full + "logits", check_logits(trace["top_logits"], run["logits_doc_end"], tol, n))
    odd |= odd_rows
    tol, n = (LOOSE_ABS, 5) if odd else (QUESTION_ABS, 20)
    why = None
    for what, ours, golden in (("n_ctx", answer["n_ctx"], run["n"]),
                               ("next_pos", answer["next_pos"], resume["question_pos0"]),
                               ("question", answer["question_ids"], resume["question_ids"])):
        if ours != golden:
            why = "%s %s, recorded %s" % (what, ours, golden)
    claim(full + "logits after the question",
          why or check_logits(answer["top_logits"], resume["logits_question"], tol, n))
    claim(full + "greedy continuation",
          check_greedy(answer["generated_ids"], resume, 2 * LOOSE_ABS if odd else GREEDY_GAP,
                       n_new(args)))


def overlap(pairs):
    common = sum(len(set(a) & set(b)) for a, b in pairs)
    total = sum(len(b) for a, b in pairs)
    return common / total if total else 1.0


def compare_bf16(_, doc, name, run, answer):
    trace = answer["trace"]
    full = "%s %s: " % (doc, name)
    sel, want = trace["sel_layer"], run.get("L_sel")
    claim(full + "selection layer", None if sel == want else "%s, recorded %s" % (sel, want))
    selected = unrun(run["SEL"]) if run.get("SEL") else None
    pairs = [(rows, golden_rows(run, selected, layer, head)[0])
             for layer, heads in enumerate(trace["rows"]) for head, rows in enumerate(heads)]
    share = overlap(pairs)
    claim(full + "kept rows overlap",
          None if share >= BF16_OVERLAP else "%.2f %% in common" % (100 * share))


# ---- running

def n_new(args):
    """Tokens to generate; 32 are recorded. In bf16 they are not compared."""
    return 1 if args.dtype == "bf16" else 16 if args.subset else 32


def write_questions(folder, resume, n):
    """The recorded continuation as a known answer, up to where its first choice is not clear."""
    clear = next((i for i, gap in enumerate(resume["greedy_gap"]) if gap < GREEDY_GAP), n)
    path = os.path.join(folder, "q.jsonl")
    with open(path, "w") as f:
        json.dump({"id": "q", "question_ids": resume["question_ids"],
                   "gold_ids": resume["greedy"][:min(n, clear)]}, f)
    return path


def check_forced(resume, scored, n):
    """A forced answer that is the model's own: rank 1 throughout, and generated again."""
    ranks = [g["rank"] for g in scored["gold"]]
    if not ranks or set(ranks) != {1} or not scored["all_top1"]:
        return "ranks %s" % ranks
    return check_greedy(scored["generated_ids"], resume, GREEDY_GAP, n)


def check_questions(args, tmp):
    """ask --questions scores what ask answers, and a cache that kept everything does not differ."""
    doc_path = write_ids(tmp, "a700.ids", common.doc_ids("a700"))
    resume = load_runs("a700", ["full"])[0][1]["resume"][0]
    n = n_new(args)
    full, all_rows = engine(args, ["ask", "--doc-tokens", doc_path, "--questions",
                                   write_questions(tmp, resume, n), "--max-new", str(n),
                                   "--ignore-eos", "--policy", "full", "--policy",
                                   "snapkv,rows=all"])
    claim("questions: a forced answer is the recorded continuation", check_forced(resume, full, n))
    odd = [k for k in ("gold", "generated_ids", "rows", "nll") if full[k] != all_rows[k]]
    claim("questions: a cache that kept everything scores the same",
          "differs in " + ", ".join(odd) if odd else None)
    kl = all_rows["kl"], all_rows["top1_agree"]
    claim("questions: and does not diverge", None if kl == (0, 1) and "kl" not in full else str(kl))


def run_doc(args, tmp, doc, names):
    ids = common.doc_ids(doc)
    doc_path = write_ids(tmp, doc + ".ids", ids)
    runs = load_runs(doc, names)
    question = runs[0][1]["resume"][0]["question_ids"]
    assert all(r["resume"][0]["question_ids"] == question for _, r in runs)
    words = ["ask", "--doc-tokens", doc_path, "--tokens", write_ids(tmp, "q.ids", question),
             "--max-new", str(n_new(args)), "--ignore-eos", "--trace"]
    for _, r in runs:
        words += ["--policy", policy_of(r)]
    answers = engine(args, words)
    claim(doc + ": one answer per policy",
          None if len(answers) == len(runs) else "%d of %d" % (len(answers), len(runs)))
    for (name, r), answer in zip(runs, answers):
        (compare if args.dtype == "f32" else compare_bf16)(args, doc, name, r, answer)
    return doc_path, len(ids), answers[0]["trace"]


def check_worker(args, tmp):
    """Rows that went through the worker's frames and an image, in bf16, answer as recorded."""
    ids = common.doc_ids("a700")
    run = load_runs("a700", ["full"])[0][1]
    w = worker.Worker(common.program(args), args.model, options(args))
    kind, body, layers, _ = w.prefill(1, "full", ids, cancel_at=2)
    claim("worker: a cancel ends a job between two layers",
          None if kind == worker.W_FAIL and body["code"] == -19 and 2 <= len(layers) < 30
          else str(body))
    kind, body = w.prepare(2, "snapkv,rows=32", ids)
    claim("worker: a budget below the window fails before the prefill",
          None if kind == worker.W_FAIL and body["code"] == -15 else str(body))
    kind, done, layers, logits = w.prefill(3, "full", ids)
    claim("worker: the next job is computed whole",
          None if kind == worker.W_DONE and len(layers) == 30 else str(done))
    model = w.hello["models"][0]
    claim("worker: ends in order when the daemon is gone", None if w.close() == 0 else "failed")
    fd = worker.memfile(worker.image(model, ids, done, layers, logits))
    resume = run["resume_kv_bf16"][0]
    q_path = write_ids(tmp, "q.ids", resume["question_ids"])
    answer = engine(args, ["ask", "--image-fd", str(fd), "--tokens", q_path, "--max-new",
                           str(n_new(args)), "--ignore-eos"], fds=[fd])[0]
    scored = engine(args, ["ask", "--image-fd", str(fd), "--questions",
                           write_questions(tmp, resume, n_new(args)), "--max-new",
                           str(n_new(args)), "--ignore-eos"], fds=[fd])[0]
    os.close(fd)
    claim("image: questions with known answers", check_forced(resume, scored, n_new(args)))
    claim("image: logits after the question, rows in bf16",
          check_logits(answer["top_logits"], resume["logits_question"], QUESTION_ABS, 20))
    claim("image: greedy continuation, rows in bf16",
          check_greedy(answer["generated_ids"], resume, GREEDY_GAP, n_new(args)))


def check_trace_command(args, doc_path, n, trace):
    """`trace` prints what `ask --trace` prints, within the memory a worker may use."""
    got = engine(args, ["trace", "--tokens", doc_path, "--policy", trace["policy"]])[0]
    keys = ["n_ctx", "next_pos", "policy", "sel_layer", "rank_variance", "selected", "rows",
            "top_logits"]
    odd = [k for k in keys if got[k] != trace[k]]
    claim("trace prints the same as ask --trace", "differs in " + ", ".join(odd) if odd else None)
    hidden = n * 576 * 4
    layer = n * 2 * 3 * 64 * 4
    limit = os.path.getsize(args.model) + hidden + layer + 200 * MIB
    if args.backend == "cuda":  # the driver's own memory is part of what the host sees
        device = got["device"]
        claim("device memory of a prefill is within its plan",
              None if 0 < device["peak_bytes"] <= device["planned_bytes"] else str(device))
        return
    claim("peak memory of a prefill is within weights + hidden states + one layer + 200 MiB",
          None if got["peak_bytes"] <= limit else "%d MiB" % (got["peak_bytes"] // MIB))


def main():
    args = common.parser(__doc__).parse_args()
    common.need_model(args)
    short = SUBSET if args.subset and (args.backend == "ref" or args.dtype == "bf16") else None
    plan = [("a700", short)]
    if not args.subset or args.backend != "ref":
        plan.append(("b2000", SUBSET_LONG if args.subset else None))
    with tempfile.TemporaryDirectory(prefix="larder-conform.") as tmp:
        for doc, names in plan:
            path, n, trace = run_doc(args, tmp, doc, names)
        check_trace_command(args, path, n, trace)
        if args.dtype == "f32":
            check_worker(args, tmp)
        if args.dtype == "f32" and args.backend != "ref":
            check_questions(args, tmp)


if __name__ == "__main__":
    sys.exit(common.finish(main))
