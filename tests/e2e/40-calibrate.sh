#!/bin/bash
# A model is measured when a policy first needs it, once; what it gave is kept, shown and named by
# every entry that was made with it.
. "$(dirname "$0")/lib.sh"
head -c 1500 "$docs/doc_a700.txt" >"$dir/a"
head -c 800 "$docs/doc_b2000.txt" >"$dir/b"
cat >"$dir/conf" <<CONF
store = $dir/d/store
socket = $dir/d/larder.sock
worker_socket = $dir/d/worker.sock
allow_any_fs = yes
model smollm2 {
    path = $model
    calibrate = no
}
CONF
policy=offline,rows=25%

profile_id() { larder show-model smollm2 --json | field profile.id; }
calibrations() { grep -c 'calibrated, profile' "$dir/log"; }
put() { # RESULT NAME FILE [OPTION...]
    local want=$1 name=$2 file=$3
    shift 3
    larder put "$file" --name "$name" --policy "$policy" --wait --json "$@" >"$dir/put" &&
        same result "$(field result <"$dir/put")" "$want"
}

claim "the daemon starts" start_daemon
says_none() { larder show-model smollm2 | grep -q "none; 'larder calibrate smollm2'"; }
claim "show-model says that there is no profile" says_none
claim "there is nothing to export" fails_with LARDER_ENOTFOUND larder show-model smollm2 --export "$dir/x"
canceled() {
    larder put "$dir/a" --name c --policy "$policy" --json >"$dir/put" && job=$(field job <"$dir/put") || return 1
    for _ in $(seq 1 200); do
        larder jobs --json | grep -q '"pass":"calibrate"' && break
        sleep 0.05
    done
    larder cancel "$job" >/dev/null || return 1
    for _ in $(seq 1 200); do
        larder jobs --json | grep -q '"state":"canceled"' && says_none && return 0
        sleep 0.05
    done
    larder jobs
    return 1
}
claim "a calibration under way is shown, and can be canceled" canceled
asl_before() {
    policy=asl,rows=50% put stored w1 "$dir/a" && says_none &&
        larder show w1 | grep -q "^policy.*pool=auto.*lmin=auto.*tau=auto$" &&
        larder show w1 | grep -q "^auto	pool, lmin, tau: documented defaults; larder calibrate"
}
claim "a window policy does not wait for a calibration, and show says whose numbers it took" asl_before
claim "the first offline document calibrates by itself" put stored a "$dir/a"
one() { same calibrations "$(calibrations)" 1; }
claim "once" one

named() { larder show "${1:-a}" --json | field policy | grep -q ",profile=$(profile_id)$"; }
claim "the entry's policy names the profile" named
ragged() {
    larder show a --json | python3 -c 'import json, sys
e = json.load(sys.stdin)
rows = [n for layer in e["rows"] for n in layer]
assert 0.22 < sum(rows) / len(rows) / e["n_ctx"] < 0.28 and max(rows) > 2 * min(rows), rows'
}
claim "its rows are shared out over the heads" ragged
certified() {
    larder show a --json | python3 -c 'import json, sys
e = json.load(sys.stdin)
c = e["certificate"]
assert c["probes"] >= 4 and c["tokens"] == 8 * c["probes"] and 0.5 < c["agreement"] <= 1, c
assert 0 < c["kl"] <= c["worst_kl"] and 0 < c["worst_at"] < e["n_ctx"], c
assert e["precision"] == "int4" and e["has_bias"], e["precision"]' &&
        larder show a | grep -q "same next token as the full cache"
}
claim "its certificate says what it loses" certified
claim "it answers from packed rows" larder ask a "What is this text about?" --max-new 4
claim "the second time nothing is computed" put already_stored a2 "$dir/a"

table() {
    larder show-model smollm2 >"$dir/t" && grep -q "^texts.*sqlite ([0-9]* tokens), .*pantry" "$dir/t" &&
        same layers "$(grep -cE '^[0-9]+	[0-9.]+	[0-9.]+ [0-9.]+ [0-9.]+$' "$dir/t")" 30
}
claim "show-model prints a line per layer, and what it was measured on" table
exports() {
    larder show-model smollm2 --export "$dir/profile" &&
        "$build/larder-prefill" info --model "$model" --policy "$policy" --profile "$dir/profile" --json >"$dir/info" &&
        same policy "$(field policies.0 <"$dir/info")" "$(larder show a --json | field policy)"
}
claim "an exported profile means the same to the engine" exports
windows() {
    larder show-model smollm2 --json >"$dir/m" &&
        same kernel "$(field profile.window.pool <"$dir/m")" 21 &&
        python3 - "$dir/m" <<'PY' &&
import json, sys
w = json.load(open(sys.argv[1]))["profile"]["window"]
assert 7 <= w["lmin"] < 20 and 0 < w["tau"] < 1, w
PY
        larder show-model smollm2 | grep -q "^pooling	kernel 21," &&
        larder show-model smollm2 | grep -q "^adaptive cut	lmin $(field profile.window.lmin <"$dir/m"), tau"
}
claim "it measures what window policies leave open" windows
asl_after() {
    same reason "$(larder explain-miss --file "$dir/a" --policy asl,rows=50% --json | field reason)" other_policy &&
        policy=asl,rows=50% put stored w2 "$dir/a" && named w2 &&
        larder show w2 | grep -q "^auto	pool, lmin, tau: as the profile says" &&
        python3 - <(larder show w2 --json) "$dir/m" <<'PY' &&
import json, sys
e, m = (json.load(open(p)) for p in sys.argv[1:])
assert e["rank_variance"][0]["layer"] == m["profile"]["window"]["lmin"], e["rank_variance"]
PY
        policy=asl,rows=50%,pool=7,lmin=10,tau=0.3 put stored w3 "$dir/a" &&
        ! larder show w3 | grep -q "^auto\|profile="
}
claim "which take them from then on, unless they are written out" asl_after
traces() {
    larder trace --file "$dir/a" --policy "$policy" --json >"$dir/trace" && larder show a --json >"$dir/show" &&
        python3 - "$dir/trace" "$dir/show" <<'PY'
import json, sys
t, e = (json.load(open(p)) for p in sys.argv[1:])
assert t["policy"] == e["policy"], (t["policy"], e["policy"])
assert [[len(h) for h in layer] for layer in t["rows"]] == e["rows"]
PY
}
claim "trace uses the daemon's profile and keeps the same rows" traces
claim "a policy that names another profile is refused" \
    fails_with LARDER_EPOLICY larder put "$dir/a" --name x --policy "$policy,profile=0123456789ab" --wait
claim "the model's own may be named, and that is the same entry" \
    put already_stored own "$dir/a" --policy "$policy,profile=$(profile_id)"
explains() { same reason "$(larder explain-miss --file "$dir/a" --policy "$policy" --json | field reason)" stored; }
claim "explain-miss knows the entry by the policy as it was asked for" explains

id=$(profile_id)
restart() {
    stop_daemon TERM
    "$build/larderd" --config "$dir/conf" 2>>"$dir/log" &
    pid=$!
    for _ in $(seq 1 300); do larder status >/dev/null 2>&1 && break; sleep 0.1; done
    same id "$(profile_id)" "$id" && same id "$(larder status --json | field models.0.profile)" "$id"
}
claim "a restart keeps it" restart
claim "and what is stored is recognised" put already_stored a3 "$dir/a"

calibrates() {
    larder calibrate smollm2 "$dir/b" --no-builtin >"$dir/out2" && grep -q "^texts	b (" "$dir/out2" &&
        [ "$(profile_id)" != "$id" ]
}
claim "larder calibrate measures on given texts" calibrates
anew() { put stored a4 "$dir/a" && named a4 && one; }
claim "with another profile the same document is another entry" anew
usage() { larder calibrate smollm2 --no-builtin 2>/dev/null; same status $? 2; }
claim "calibrate without any text is a usage error" usage

fresh() {
    stop_daemon TERM
    rm -rf "$dir/d/store"
    "$build/larderd" --config "$dir/conf" 2>>"$dir/log" &
    pid=$!
    for _ in $(seq 1 300); do larder status >/dev/null 2>&1 && break; sleep 0.1; done
    fails_with "larder calibrate smollm2.*LARDER_EUNSUPPORTED" larder put "$dir/a" --name a --policy "$policy" --wait
}
claim "calibrate = no: the first document is refused and names the command" fresh
exit $rc
