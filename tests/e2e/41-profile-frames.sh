#!/bin/bash
# Profiles from workers and clients that mean no good: refused by name, and nothing of them is kept.
. "$(dirname "$0")/lib.sh"
echo 0 >"$dir/cases"
export PROFILE_CASES="$dir/cases"
echo "a text" >"$dir/text"
ours="--set worker_program=$PWD/tests/e2e/profile.py"

start() {
    "$build/larderd" --private "$dir/d" --model "m=$model" $ours 2>>"$dir/log" &
    pid=$!
    for _ in $(seq 1 300); do
        larder status >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    return 1
}
claim "the daemon starts with a worker of our own" start

# Every hostile case ends its worker. A job is tried twice, so the cases come in pairs.
hostile_cases() {
    python3 - <<'PY' >"$dir/n"
import importlib.util
spec = importlib.util.spec_from_file_location("p", "tests/e2e/profile.py")
p = importlib.util.module_from_spec(spec)
spec.loader.exec_module(p)
print(len(list(p.cases())) - 1)
PY
    while [ "$(cat "$dir/cases")" -lt "$(cat "$dir/n")" ]; do
        before=$(cat "$dir/cases")
        larder put "$dir/text" --name "t$before" --policy offline --wait >/dev/null 2>&1
        [ "$(cat "$dir/cases")" -gt "$before" ] || return 1
        same profile "$(larder show-model m --json | field profile)" None || return 1
    done
    same "workers that were ended" "$(grep -c 'worker .* ended: ' "$dir/log")" "$(cat "$dir/n")"
}
claim "a hostile W_PROFILE ends its worker and is not kept" hostile_cases
why() { for w in "seals" "must be 0 to" "not the job's" "bad JSON" "nested" "is of model" "0 to 1" "its numbers are" "surprise"; do
    grep -q "$w" "$dir/log" || { echo "no line says '$w'"; return 1; }
done; }
claim "the log says what was wrong with each" why

good() {
    larder put "$dir/text" --name good --policy offline --wait >/dev/null 2>"$dir/e"
    grep -q "enough of case" "$dir/e" && [ "$(larder show-model m --json | field profile.n_layers)" = 2 ]
}
claim "a good one is kept, whatever becomes of its job" good
id=$(larder show-model m --json | field profile.id)

told() {
    stop_daemon TERM
    : >"$dir/log"
    start && same id "$(larder show-model m --json | field profile.id)" "$id" &&
        for _ in $(seq 1 50); do grep -q "was sent frame 210" "$dir/log" && return 0; sleep 0.1; done
    cat "$dir/log"
    return 1
}
claim "after a restart it is there, and the worker is told" told

refused() { # WHAT EDIT
    larder show-model m --export "$dir/p" || return 1
    python3 - "$dir/p" "$2" <<'PY'
import json, sys
p = json.load(open(sys.argv[1]))
exec(sys.argv[2])
json.dump(p, open(sys.argv[1], "w"))
PY
    same status "$(python3 tests/e2e/profile.py send "$LARDER_SOCKET" m "$dir/p" | field status)" "$1" &&
        same id "$(larder show-model m --json | field profile.id)" "$id"
}
claim "a client's profile of another model is refused" refused LARDER_EINVAL 'p["model_fingerprint"] = "00" * 32'
claim "one with other numbers than its id is refused" refused LARDER_EINVAL 'p["shares"][0]["share"][0] = 0.5'
claim "one of a later version is refused" refused LARDER_EVERSION 'p["version"] = 3'
claim "the daemon still answers" larder status
exit $rc
