#!/bin/bash
# What stored caches keep is measured through the daemon: results, a second run, bad input, an
# interruption, and nothing left behind.
. "$(dirname "$0")/lib.sh"
head -c 1500 "$docs/doc_a700.txt" >"$dir/a"
noise=$(for _ in 1 2 3 4 5 6; do echo "Rain falls on the roof. A clock ticks in the hall. The road is empty."; done)
task() { # ID KEY GOLD - one line; the document is text, as whoever has no tokenizer writes it
    python3 - "$1" "$noise The pass key is $2. Remember it. $noise" "$3" <<'PY'
import json, sys
id_, document, gold = sys.argv[1:]
print(json.dumps({"id": id_, "task": "passkey", "document": " ".join(document.split()), "length": 250,
                  "depth": 0.5, "question": "What is the pass key?", "answer_prefix": "The pass key is", "gold": gold}))
PY
}
{ task a 48213 48213; task a2 48213 48213; task b 90317 90317; } >"$dir/tasks.jsonl"
results=$dir/results.jsonl
measure() { larder eval "$dir/tasks.jsonl" --policy snapkv,rows=50% --policy offline,rows=25% --results "$results" "$@"; }
stored() { larder status --json | field store.entries; }
rows_of() { python3 -c 'import json, sys
for l in open(sys.argv[1]): r = json.loads(l); print(r["policy"].split(",")[0], r["id"])' "$results" | sort | tr '\n' ' '; }
all="full a full a2 full b offline a offline a2 offline b snapkv a snapkv a2 snapkv b "

claim "without a daemon eval says so" fails_with LARDER_ENODAEMON measure
claim "the daemon starts" start_daemon
claim "the model is calibrated" larder calibrate smollm2 "$dir/a" --no-builtin

bad() { # TEXT CODE
    printf '%s\n' "$1" >"$dir/bad.jsonl"
    fails_with "$2" larder eval "$dir/bad.jsonl" --policy full --results "$results" && grep -q 'line 1' "$dir/e" &&
        [ ! -e "$results" ]
}
claim "a line that is not JSON is told with its number" bad '{"id": "a"' LARDER_EINVAL
claim "so is one without an answer" bad '{"id": "a", "document": "d", "question": "q"}' LARDER_EINVAL
claim "so are token ids that are none" bad '{"id": "a", "prefix_ids": [1, -1], "tail_ids": [1], "gold": "x"}' LARDER_EINVAL
wrong_id() {
    echo '{"id": "a", "prefix_ids": [1, 99999999], "tail_ids": [1], "gold": "x"}' >"$dir/bad.jsonl"
    ! larder eval "$dir/bad.jsonl" --results "$results" >"$dir/o" 2>"$dir/e" && grep -q 'line 1: ' "$dir/e"
}
claim "a document that the model has no tokens for fails by line" wrong_id
policy() { ! larder eval "$dir/tasks.jsonl" --policy nonsense --results "$results" 2>"$dir/e" && grep -q LARDER_EPOLICY "$dir/e"; }
claim "an unknown policy is refused before anything is measured" policy
onto_itself() { larder eval "$dir/tasks.jsonl" --results "$dir/tasks.jsonl" 2>/dev/null; [ $? -eq 2 ] && [ "$(wc -l <"$dir/tasks.jsonl")" -eq 3 ]; }
claim "results are not appended to the tasks" onto_itself
unwritable() { fails_with LARDER_EIO measure --csv "$dir/nowhere/t.csv"; }
claim "an output that cannot be written is told before anything is measured" unwritable
nothing() { same entries "$(stored)" 0; }
claim "none of it left anything stored" nothing

# An interruption while a document is prefilled, then the rest.
interrupted() {
    "$build/larder" eval "$dir/tasks.jsonl" --policy snapkv,rows=50% --results "$results" >"$dir/o" 2>"$dir/e" &
    job=$!
    for _ in $(seq 1 400); do
        larder jobs --json | grep -q '"state":"running"' && break
        sleep 0.05
    done
    kill -INT $job
    wait $job
    [ $? -ne 0 ] && grep -q 'interrupted.*LARDER_ECANCELED' "$dir/e" && nothing &&
        same jobs "$(larder status --json | field jobs.running)$(larder status --json | field jobs.queued)" 00
}
claim "an interrupted run leaves no entry and no job" interrupted

# The same while questions are asked: the second answer is long, the first is in the file by then.
asking() {
    "$build/larder" eval "$dir/tasks.jsonl" --policy full --results "$dir/r1" --limit 1 --max-new 1500 >"$dir/o" 2>"$dir/e" &
    job=$!
    for _ in $(seq 1 1200); do
        [ -s "$dir/r1" ] && break
        sleep 0.05
    done
    engine=$(pgrep -P $job)
    kill -INT $job
    wait $job
    [ $? -eq 1 ] && grep -q 'interrupted.*LARDER_ECANCELED' "$dir/e" && [ -n "$engine" ] && ! kill -0 "$engine" 2>/dev/null &&
        nothing && same lines "$(wc -l <"$dir/r1")" 1 && larder eval --results "$dir/r1" --json | grep -q '"n":1'
}
claim "an interrupted engine is ended, and the file is whole" asking
claim "the rest is measured" measure --json --csv "$dir/t.csv" --markdown "$dir/t.md" --html "$dir/t.html"
cp "$dir/out" "$dir/json"
whole() { same results "$(rows_of)" "$all"; }
claim "every question has a result under every policy" whole
gone() { nothing; }
claim "and nothing is left stored" gone

sane() {
    python3 - "$dir/json" "$results" <<'PY'
import json, sys
report = json.load(open(sys.argv[1]))
full, snapkv, offline = report["policies"]
assert (full["n"], full["documents"], full["full_right"]) == (3, 2, 3), full
assert full["kept_right"] == 1 and full["kl"] is None and full["rows"] == full["bytes"] == 1
assert snapkv["kept_right"] < offline["kept_right"] == 1, (snapkv, offline)
assert 0 < offline["kl"] < 0.2 < snapkv["kl"], (snapkv["kl"], offline["kl"])
assert offline["bytes"] < 0.12 and 0.4 < snapkv["bytes"] < 0.52
assert 0 < offline["disk"] < snapkv["disk"] < full["disk"] < 1
assert offline["cert_kl"] > 0 and snapkv["cert_kl"] is None
assert report["certificates"]["entries"] == 2 and report["certificates"]["kl"] is None, "two are too few to rank"
for l in open(sys.argv[2]):
    r = json.loads(l)
    assert r["fetch_ms"] > 0 and r["prefill_ms"] > 0 and r["stored_bytes"] > 0 and len(r["ranks"]) >= 5, r
    assert (r["certificate"] is None) == (r["policy"].split(",")[0] != "offline")
PY
}
claim "offline keeps the answers that snapkv loses, and sizes are in order" sane
written() { [ "$(wc -l <"$dir/t.csv")" -eq 4 ] && grep -q '^| `offline' "$dir/t.md" && grep -q '<svg' "$dir/t.html"; }
claim "CSV, Markdown and a page are written" written

jobs_done() { larder status --json | field jobs.done; }
before=$(jobs_done)
again() { measure --json >"$dir/again" && cmp "$dir/again" "$dir/json" && same jobs "$(jobs_done)" "$before" && whole; }
claim "a second run computes nothing and says the same" again
missing() {
    grep -v '"snapkv.*"id":"b"\|"id":"b".*"snapkv' "$results" >"$dir/less" && mv "$dir/less" "$results" &&
        measure --json >"$dir/again" && whole && same jobs "$(jobs_done)" $((before + 2))
}
claim "what is missing is measured, with the full cache as its reference" missing
alone() { stop_daemon TERM; larder eval --results "$results" --json >"$dir/again" && same n "$(field policies.2.n <"$dir/again")" 3; }
claim "results are reported without a daemon" alone
claim "the daemon starts again" start_daemon

kept() {
    head -n 2 "$dir/tasks.jsonl" >"$dir/one.jsonl"
    larder eval "$dir/one.jsonl" --policy streaming,rows=25% --results "$dir/r2" --keep && same entries "$(stored)" 2 &&
        larder eval "$dir/one.jsonl" --policy streaming,rows=25% --results "$dir/r3" && same entries "$(stored)" 2
}
claim "--keep leaves entries, and what was there before is not removed" kept
exit $rc
