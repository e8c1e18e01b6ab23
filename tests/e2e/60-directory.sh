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

# ---- a document that is longer than what layers see: the reason, and what works
put() { larder put "$1" --model dir --name p --policy "$2" --wait; }
says() { # DOCUMENT POLICY TEXT...: refused with these words
    fails_with LARDER_EUNSUPPORTED put "$1" "$2" || return
    for t in "${@:3}"; do grep -q -- "$t" "$dir/e" || { cat "$dir/e"; return 1; }; done
}
uncalibrated() { same profile "$(larder show-model dir --json | field profile)" None; }
back="layers of the model see only 40"
claim "a replay is refused" says "$dir/doc" kvzip,rows=50% "what repeats it" "$back" "use snapkv, keydiff or full, or split"
claim "so is the default policy, before anything is calibrated for it" says "$dir/doc" offline "what repeats it" "$back" "use snapkv"
claim "and one that cuts tokens" says "$dir/doc" pyramidinfer "cuts tokens" "$back" "like snapkv or keydiff"
claim "and one whose rows get fresh positions" says "$dir/doc" gemfilter,rows=50%,layer=1 "fresh positions" "like snapkv"
claim "nothing was calibrated" uncalibrated
for p in snapkv,rows=50%,w=8 keydiff,rows=50% full; do
    claim "what the refusal names works: ${p%%,*}" put "$dir/doc" $p
done
# the texts of the program have thousands of this model's tokens
sed -i 's/"max_position_embeddings": [0-9]*/"max_position_embeddings": 8192/; s/"sliding_window": 40/"sliding_window": 200/' "$dir/m/config.json"
for _ in $(seq 8); do cat "$dir/doc"; done >"$dir/long"
back="layers of the model see only 200"
stop_daemon
claim "the daemon starts with a window in which a replay has room" start
claim "a calibration that its layers cannot see is refused" \
    says "$dir/doc" offline "calibrating" "that repeat them" "$back" "takes shorter texts" "snapkv, keydiff and full need no profile"
calibrate() { larder calibrate dir "$@"; }
refuses_texts() { fails_with LARDER_EUNSUPPORTED calibrate && grep -q "takes shorter texts" "$dir/e"; }
claim "by hand, too" refuses_texts
claim "shorter texts are taken" calibrate --no-builtin "$dir/doc"
claim "and the default policy works on what fits" put "$dir/doc" offline,rows=50%
claim "on nothing else" says "$dir/long" offline,rows=50% "what repeats it" "$back" "use snapkv, keydiff or full, or split"

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
