#!/bin/bash
# SIGKILL of the daemon and of its worker in the middle of a put; damage on disk; a full store.
. "$(dirname "$0")/lib.sh"

claim "the daemon starts" start_daemon
job=$(larder put "$docs/doc_b2000.txt" --name b2000 --policy snapkv,rows=512 --json | field job)
sleep 0.7
kill -KILL "$pid"
wait "$pid" 2>/dev/null
pid=
claim "a killed daemon comes back" start_daemon
completes() {
    for _ in $(seq 1 600); do
        larder show b2000 --json >"$dir/show" 2>/dev/null && return 0
        sleep 0.1
    done
    larder jobs
    return 1
}
claim "the job it was killed in (number $job) completes" completes
claim "every byte of it is good" larder verify b2000

kill_worker() {
    larder put "$docs/doc_b2000.txt" --name again --policy snapkv,rows=600 --wait >/dev/null 2>"$dir/e" &
    put=$!
    sleep 0.7
    pkill -KILL -P "$pid" larder-prefill
    wait "$put" && larder show again >/dev/null
}
claim "a killed worker costs a retry, not the job" kill_worker

refuses_second() { fails_with LARDER_EBUSY "$build/larderd" --private "$dir/d" --model "smollm2=$model"; }
claim "a second daemon on the same directory is refused" refuses_second

damage() {
    stop_daemon TERM
    /usr/bin/python3 - "$dir/d/store" "$(field key <"$dir/show")" <<'PY'
import lmdb, struct, sys
env = lmdb.open(sys.argv[1], max_dbs=16, map_size=1 << 32)
entries, extents = env.open_db(b"entries"), env.open_db(b"extents")
with env.begin(write=True) as txn:
    entry_id = struct.unpack_from("<Q", txn.get(bytes.fromhex(sys.argv[2]), db=entries), 8)[0]
    key = struct.pack(">QI", entry_id, 3)
    raw = bytearray(txn.get(key, db=extents))
    raw[len(raw) // 2] ^= 1
    txn.put(key, bytes(raw), db=extents)
PY
}
claim "one bit of a stored extent is flipped" damage
claim "the daemon starts on the damaged store" start_daemon
not_served() { fails_with LARDER_EDAMAGED larder ask b2000 "What?" --max-new 1; }
claim "the damaged entry is reported and not served" not_served
marked() { same damaged "$(larder show b2000 --json | field damaged)" True; }
claim "it is marked as damaged" marked
claim "another entry is served all the same" larder ask again "What is this about?" --max-new 4
restored() { larder put "$docs/doc_b2000.txt" --name b2000 --policy snapkv,rows=512 --wait && larder verify b2000; }
claim "putting the document again restores it" restored

stop_daemon TERM
claim "the daemon starts with a small budget" start_daemon --set store_budget=16M
full() { fails_with LARDER_EFULL larder put "$docs/doc_b2000.txt" --name big --policy full --wait; }
claim "an entry larger than the store is refused by name" full
claim "and nothing else was lost" larder verify
exit $rc
