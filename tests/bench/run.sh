#!/bin/bash
# tests/bench/run.sh BUILD [RUNS [TOKENS [ENTRIES [PARTS]]]] - prefill and first tokens beside
# peers; fetches, codecs, many clients, many entries, memory.
#
# Starts a private daemon, stores an entry of 2,048 rows per head, runs the bench_* programs on
# it, then those for many clients and for many entries on stores of their own, then the *.py, which
# start what they need. Prints tables; the same figures go to tests/bench/results/MACHINE.csv, which
# a run that does not finish leaves alone. RUNS (5) and TOKENS (512,2048,5000) are those of the
# prefill beside peers, ENTRIES (100,10000,1000000) the sizes of the growing store: the last takes
# 2 GB of memory and minutes. PARTS (all) are some of "fetch clients entries prefill policies
# questions": rows of the others stay as they were in the results. Nothing started here outlives it.
. "$(dirname "$0")/../e2e/lib.sh"
runs=${2:-5}
lengths=${3:-512,2048,5000}
entries=${4:-100,10000,1000000}
all_parts="fetch clients entries prefill policies questions"
parts=${5:-$all_parts}
growing=
running=
csv=$dir/rows.csv
rows=2048

end_all() {
    # In the background, because a shell that waits for a program in front hears no signal
    if [ -n "$running" ]; then
        kill "$running" 2>/dev/null
        wait "$running"
    fi
    finish
    [ -z "$growing" ] || rm -rf "$growing"
}
trap end_all EXIT

# Processor and its best instruction set for this work: amd-epyc-avx2
machine() {
    isa=generic
    for flag in avx2 avx512f avx512_bf16 amx_bf16; do
        grep -qw "$flag" /proc/cpuinfo && isa=$flag
    done
    sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1 | tr '[:upper:]' '[:lower:]' |
        sed -e 's/ @.*//; s/([a-z]*)//g; s/\b\(cpu\|processor\)\b//g; s/[^a-z0-9]\+/-/g; s/-$//' \
            -e "s/\$/-$isa/"
}

# A few hundred tokens more than the rows that are kept of it
document() { cat "$docs/doc_b2000.txt" && head -c 2000 /usr/share/common-licenses/GFDL-1.2; }

die() {
    echo "bench: $*" >&2
    exit 1
}

# bench STAGE NAME ARGUMENT...: the CSV of bench_NAME as rows of ours. Its columns runs, min_us and
# median_us are known by name; the parameter is mib or, without it, the second. Those after
# median_us are figures of their own, in the unit that their name ends with.
bench() {
    stage=$1 name=$2
    shift 2
    "$build/bench/bench_$name" "$@" >"$dir/bench" || die "bench_$name failed"
    awk -F, -v OFS=, -v stage="$stage" '
        NR == 1 { for (i = 1; i <= NF; i++) { head[i] = $i; at[$i] = i }; next }
        {
            p = "mib" in at ? at["mib"] : 2
            of = "mib" in at ? "MiB" : head[p]
            print stage, $1, of, $p, "us", $at["min_us"], $at["median_us"],
                ("runs" in at ? $at["runs"] : ""), ""
            for (i = at["median_us"] + 1; i <= NF; i++) {
                other = head[i]
                unit = sub(/_per_s$/, "", other) ? "/s" : sub(/_kib$/, "", other) ? "KiB" : "us"
                if (other == "ratio") unit = "x"
                sub(/_us$/, "", other)
                print stage, $1 " " other, of, $p, unit, "", $i, "", ""
            }
        }' "$dir/bench" >>"$csv"
}

# measure SCRIPT OPTION...: a program that appends its own rows
measure() {
    script=$1
    shift
    python3 "tests/bench/$script" --build "$build" --model "$model" --csv "$csv" "$@" &
    running=$!
    wait "$running" || die "$script failed"
    running=
}

# Peak of the daemon's worker in MiB; it stays for a while after its job.
worker_peak() {
    for status in $(grep -l "^PPid:[[:space:]]*$pid\$" /proc/[0-9]*/status 2>/dev/null); do
        awk '/^VmHWM:/ { printf "%.1f\n", $2 / 1024 }' "$status"
    done | sort -n | tail -n 1
}

# What the worker may take, in MiB: weights, hidden states, K and V of one layer (f32), 200 MiB
worker_limit() { # TOKENS
    "$build/larder-prefill" info --model "$model" --json | python3 -c '
import json, os, sys
p, n = json.load(sys.stdin), int(sys.argv[2])
row = p["n_hidden"] + 2 * p["n_kv_heads"] * p["head_dim"]
print("%.1f" % ((os.path.getsize(sys.argv[1]) + 4 * n * row) / 2**20 + 200))' "$model" "$1"
}

store_and_fetch() {
    echo "storing an entry of $rows rows and fetching it" >&2
    document >"$dir/document.txt"
    start_daemon || exit 1
    larder put "$dir/document.txt" --name bench --policy "snapkv,rows=$rows" --wait --json \
        >"$dir/put" || die "put failed"
    peak=$(worker_peak)
    n_ctx=$(larder show bench --json | field n_ctx)
    {
        echo "memory,worker,tokens,$n_ctx,MiB,$peak,$peak,1,VmHWM"
        echo "memory,worker's limit,tokens,$n_ctx,MiB,,$(worker_limit "$n_ctx"),,"
    } >>"$csv"
    bench fetch client_fetch bench
    stop_daemon
    start_daemon --set image_cache_bytes=0 || exit 1
    bench fetch client_fetch --fresh bench
    stop_daemon
    measure cold_fetch.py --runs "$runs" --home "$dir/d" --name bench
    bench codec store_codec "$dir/d/store" bench
    bench image ipc_image
    bench "step of a question" compute_resume "$model" 2048 20
}

# An image of about 64 KiB needs a smaller vocabulary than the model's: a synthetic entry.
many_clients() {
    echo "fetching with many clients" >&2
    mkdir -m 700 "$dir/many"
    bench put store_put "$dir/many" bench
    start_daemon --set "store=$dir/many" --set max_clients=512 || exit 1
    # as larderd.service does; without the right to, it is one process among many
    renice -n -5 -p "$pid" >/dev/null 2>&1 || echo "bench: larderd runs without Nice=-5" >&2
    bench "many clients" client_many bench 40000 1 8 64 256
    stop_daemon
}

# In memory where there is a directory for it: puts are durable, and a disk would be what is timed.
many_entries() {
    echo "growing a store to $entries entries" >&2
    [ -w /dev/shm ] && growing=/dev/shm || growing=$dir
    growing=$(mktemp -d "$growing/larder-growing.XXXXXX") || exit 1
    for n in ${entries//,/ }; do
        bench growth store_growth "$growing" "$n"
        start_daemon --set "store=$growing" --set image_cache_bytes=0 || exit 1
        bench growth client_growth "$n"
        stop_daemon
    done
}

# What was measured takes the place of the same rows of an earlier run; a whole run, of all rows.
keep_others() {
    if [ -f "$1" ] && [ "$parts" != "$all_parts" ]; then
        awk -F, 'NR == FNR { new[$1, $2, $4] = 1; print; next } !(($1, $2, $4) in new)' \
            "$csv" "$1" >"$dir/merged.csv" && mv "$dir/merged.csv" "$1"
    else
        cp "$csv" "$1"
    fi
}

started=$SECONDS
tag=$(machine)
echo "stage,subject,parameter,value,unit,min,median,runs,note" >"$csv"
# Whoever reads the figures wants to know whether the machine was at rest.
echo "machine,load before,processors,$(nproc),,,$(cut -d' ' -f1 /proc/loadavg),,$tag" >>"$csv"
for part in $parts; do
    case $part in
    fetch) store_and_fetch ;;
    clients) many_clients ;;
    entries) many_entries ;;
    prefill)
        # shellcheck disable=SC2086
        bench limit compute_gemm "$model" ${lengths//,/ }
        measure prefill_peers.py --runs "$runs" --tokens "$lengths"
        ;;
    policies) measure policy_cost.py ;;
    questions) measure resume_peers.py --runs "$runs" ;;
    *) die "no part '$part'" ;;
    esac
done
mkdir -p tests/bench/results
keep_others "tests/bench/results/$tag.csv"
echo
python3 tests/bench/report.py "tests/bench/results/$tag.csv" || exit 1
echo
echo "$((SECONDS - started)) s; tests/bench/results/$tag.csv"
