#!/bin/bash
# A directory as a model: stored, served and asked through the daemon, and identified by its files.
. "$(dirname "$0")/lib.sh"
cp -r tests/models/small/mistral "$dir/m" # layers see 40 positions back
start() { start_daemon --model "dir=$dir/m"; }
head -c 600 "$docs/doc_a700.txt" | tr -cd 'A-Z0-9=?' >"$dir/doc"
head -c 4000 "$docs/doc_a700.txt" | tr -cd 'A-Z0-9=?' >>"$dir/doc"

claim "the daemon starts" start
claim "a document is stored" larder put "$dir/doc" --model dir --name d --policy full --wait

keeps_what_is_seen() {
    larder show d --json | python3 -c 'import json, sys
e = json.load(sys.stdin)
assert e["n_ctx"] > 60, e["n_ctx"]
assert e["rows"] == [[39, 39]] * 2, e["rows"]'
}
claim "rows that no question can see are not stored" keeps_what_is_seen

# Stored rows are bf16: logits move by 0.12 % of the largest (measured).
answers_alike() {
    larder ask d "A=1?" --max-new 8 --json >"$dir/a" &&
        larder ask --model dir --file "$dir/doc" "A=1?" --max-new 8 --json >"$dir/b" &&
        python3 - "$dir/a" "$dir/b" <<'PY'
import json, sys
a, b = (json.load(open(p)) for p in sys.argv[1:])
mine, top = dict(a["top_logits"]), abs(b["top_logits"][0][1])
worst = max(abs(mine[i] - x) for i, x in b["top_logits"][:5])
assert a["question_ids"] == b["question_ids"] and len(a["question_ids"]) >= 4
assert worst <= 0.01 * top, (worst, top)
PY
}
claim "a question is answered from the stored cache" answers_alike

refuses_replay() { fails_with LARDER_EUNSUPPORTED larder put "$dir/doc" --model dir --name r --policy kvzip,rows=50% --wait; }
claim "a policy that means nothing in a window is refused" refuses_replay

fingerprint() { larder status --json | python3 -c 'import json, sys
print(next(m["fingerprint"] for m in json.load(sys.stdin)["models"] if m["name"] == "dir"))'; }
first=$(fingerprint)
known_again() { same fingerprint "$(fingerprint)" "$first"; }
is_other() { [ "$(fingerprint)" != "$first" ]; }
stop_daemon
claim "the daemon starts again" start
claim "an unchanged directory has the same fingerprint" known_again
stop_daemon
printf ' ' >>"$dir/m/config.json"
claim "the daemon starts a third time" start
claim "one file changed in place makes another fingerprint" is_other
exit $rc
