#!/bin/bash
# Wrong input on purpose: one line that names the cause, a stable code, nothing stored, nothing lost.
. "$(dirname "$0")/lib.sh"

: >"$dir/empty"
printf 'caf\351 au lait' >"$dir/latin1"
for _ in $(seq 1 12); do cat "$docs/doc_b2000.txt"; done >"$dir/long"
head -c 100000 "$model" >"$dir/cut.gguf"
{ cat "$dir/cut.gguf"; head -c 1000 /dev/zero; } >"$dir/damaged.gguf"

bad_start() { # CODE ARGS...
    code=$1
    shift
    fails=$("$build/larderd" --private "$dir/x" "$@" 2>&1 >/dev/null)
    [ $? -eq 1 ] && echo "$fails" | tail -n 1 | grep -q "$code" || { echo "$fails"; return 1; }
}
claim "a wrong model path is an error at start" bad_start LARDER_ECONFIG --model "m=/nonexistent.gguf"
claim "a damaged GGUF is an error at start" bad_start LARDER_E --model "m=$dir/cut.gguf"
claim "a text file as a model is an error at start" bad_start LARDER_E --model "m=$dir/long"
claim "an unknown key is an error at start" bad_start LARDER_ECONFIG --model "m=$model" --set nonsense=1
claim "no model at all is an error at start" bad_start LARDER_ECONFIG
claim "without a daemon the client says so" fails_with LARDER_ENODAEMON larder ls

claim "the daemon starts" start_daemon
put() { larder put "$@" --name x --wait; }
claim "an empty document is refused" fails_with LARDER_EEMPTY put "$dir/empty"
claim "invalid UTF-8 is refused with its offset" fails_with LARDER_ETEXT put "$dir/latin1"
claim "a document longer than the model's positions is refused, not cut" fails_with LARDER_ETOOLONG put "$dir/long"
claim "an unknown model is refused" fails_with LARDER_EUNKNOWNMODEL put "$docs/doc_a700.txt" --model nobody
claim "an unknown policy is refused" fails_with LARDER_EPOLICY put "$docs/doc_a700.txt" --policy nonsense
claim "an unknown policy key is refused" fails_with LARDER_EPOLICY put "$docs/doc_a700.txt" --policy asl,color=red
claim "a budget below the window is refused" fails_with LARDER_EBUDGET put "$docs/doc_a700.txt" --policy asl,rows=16
claim "a missing file is refused" fails_with LARDER_EIO put "$dir/missing"
claim "an unknown name is not found" fails_with LARDER_ENOTFOUND larder show nobody
nothing() { same entries "$(larder status --json | field store.entries)" 0; }
claim "none of it stored anything" nothing

hostile() { python3 tests/e2e/hostile.py "$LARDER_SOCKET"; }
claim "hostile clients leave the daemon serving" hostile
claim "and it still answers" larder status
leaks() { [ -d /proc/"${pid:-none}"/fd ] && [ "$(ls /proc/"$pid"/fd | wc -l)" -lt 40 ] || { ls -l /proc/"$pid"/fd; return 1; }; }
claim "no descriptor leaked" leaks
exit $rc
