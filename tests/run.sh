#!/bin/sh
# tests/run.sh BUILD GROUP... - run groups of tests and count what they claim.
#
# Every test speaks TAP: "ok ..." / "not ok ..." (cmocka does, when asked), a
# skipped case carries "# SKIP". A test program that exits with 77 is skipped as
# a whole, loudly, and fails where its group is written GROUP!; one that exits otherwise
# non-zero without a "not ok" line, or runs past its limit, counts as one failure. The last
# line is the count.
set -u
build=$1
shift
cd "$(dirname "$0")/.." || exit 1
log=$(mktemp -d "${TMPDIR:-/tmp}/larder-run.XXXXXX") || exit 1
trap 'rm -rf "$log"' EXIT
trap 'exit 130' INT TERM
passed=0 failed=0 skipped=0

# sh -c "$perform" - FOLDER LIMIT_SECONDS COMMAND...: what it prints, and how it ends
perform='at=$1 limit=$2
shift 2
mkdir -p "$at"
CMOCKA_MESSAGE_OUTPUT=TAP timeout -k 10 "$limit" "$@" >"$at/out" 2>"$at/err" </dev/null
echo $? >"$at/rc"'

# run NAME LIMIT_SECONDS COMMAND...
run() {
    one=$1 most=$2
    shift 2
    sh -c "$perform" - "$log/one" "$most" "$@"
    judge "$one" "$log/one" "$most"
}

# judge NAME FOLDER LIMIT_SECONDS
judge() {
    name=$1 at=$2 limit=$3
    rc=$(cat "$at/rc" 2>/dev/null || echo 125) # it did not even start
    ok=$(grep -cE '^ok ' "$at/out")
    bad=$(grep -cE '^not ok ' "$at/out")
    skip=$(grep -cE '^(not )?ok .*# ?[Ss][Kk][Ii][Pp]' "$at/out")
    skip_ok=$(grep -cE '^ok .*# ?[Ss][Kk][Ii][Pp]' "$at/out")
    ok=$((ok - skip_ok))
    bad=$((bad - (skip - skip_ok)))
    if [ "$rc" -eq 77 ] && [ "$must" = no ]; then
        skipped=$((skipped + 1))
        echo "SKIP $name: $(tail -n 1 "$at/err")"
        return
    fi
    if [ "$rc" -ne 0 ] && [ "$bad" -eq 0 ]; then
        bad=1
        if [ "$rc" -eq 124 ]; then echo "not ok $name: ran past $limit s"; else echo "not ok $name: exit status $rc"; fi
    fi
    if [ "$rc" -eq 0 ] && [ $((ok + bad + skip)) -eq 0 ]; then
        bad=1
        echo "not ok $name: made no claim"
    fi
    passed=$((passed + ok)) failed=$((failed + bad)) skipped=$((skipped + skip))
    if [ "$bad" -gt 0 ]; then
        echo "FAIL $name: $ok passed, $bad failed"
        grep -E '^not ok ' "$at/out" | sed 's/^/    /'
        tail -n 25 "$at/err" | sed 's/^/    /'
    else
        echo "ok   $name: $ok passed$([ "$skip" -gt 0 ] && echo ", $skip skipped")"
    fi
    grep -iE '^(not )?ok .*# ?skip' "$at/out" | sed 's/^/    /'
}

tiny() {
    for b in cpu ref; do
        run "golden, tiny model, $b" 300 python3 tests/golden/tiny.py --build "$build" --backend "$b"
    done
    # the CUDA backend and its kernels, on host memory
    run "golden, tiny model, cuda" 300 python3 tests/golden/tiny.py --build "$build/shim" --backend cuda
}

for group in "$@"; do
    case $group in *!) must=yes ;; *) must=no ;; esac
    case ${group%!} in
    lint)
        for t in tests/lint/*.sh; do run "$t" 120 "$t" "$build"; done
        ;;
    unit) # side by side: they share nothing
        units=$(for t in tests/unit/test_*.c; do basename "$t" .c; done)
        echo "$units" | xargs -P "$(nproc)" -I{} sh -c "$perform" - "$log/{}" 240 "$build/tests/{}"
        for t in $units; do judge "unit/$t" "$log/$t" 240; done
        ;;
    models)
        run "models, small" 120 python3 tests/models/check_models.py --build "$build"
        run "models, small, cuda" 120 python3 tests/models/check_models.py --build "$build/shim" --backend cuda
        ;;
    models-made)
        run "models, made by transformers" 1200 python3 tests/models/check_models.py --build "$build" --make
        run "models, made by transformers, cuda" 1200 python3 tests/models/check_models.py --build "$build/shim" --backend cuda --make
        ;;
    python)
        run "python package" 60 /usr/bin/python3 tests/decoders/test_package.py "$build"
        ;;
    decoders)
        for t in tests/decoders/[0-9]*.sh; do run "$t" 900 "$t" "$build"; done
        ;;
    eval)
        run "eval" 60 python3 tests/eval/test_eval.py "$build"
        ;;
    e2e)
        for t in tests/e2e/[0-9]*.sh; do
            [ -e "$t" ] && run "$t" 300 "$t" "$build"
        done
        ;;
    cuda-build)
        run "larder-prefill-cuda compiles and links (sm_90)" 1800 tests/cuda/build.sh "$build"
        ;;
    cuda) # make check-cuda
        at=${CUDA_DIR:?make check-cuda sets it}
        run "kernels on the GPU" 900 "$at/test_kernels"
        run "choices on the GPU" 900 "$at/test_select"
        run "matching on the GPU" 900 "$at/test_match"
        run "packing on the GPU" 900 "$at/test_pack"
        run "backend on the GPU" 900 "$at/test_device"
        for tool in memcheck racecheck; do
            for t in kernels select match pack; do
                run "$t under compute-sanitizer $tool" 3600 tests/cuda/sanitize.sh $tool "$at/test_$t"
            done
        done
        run "models, small, cuda" 300 python3 tests/models/check_models.py --build "$build" --backend cuda
        run "models, made by transformers, cuda" 1200 python3 tests/models/check_models.py --build "$build" --backend cuda --make
        run "golden, cuda f32" 3600 python3 tests/golden/conform.py --build "$build" --backend cuda
        run "golden, cuda bf16" 3600 python3 tests/golden/conform.py --build "$build" --backend cuda --dtype bf16
        run "golden, kvpress, cuda" 3600 python3 tests/golden/kvpress.py --build "$build" --backend cuda
        run "golden, tiny model, cuda" 300 python3 tests/golden/tiny.py --build "$build" --backend cuda
        ;;
    golden)
        run "golden, cpu f32" 900 python3 tests/golden/conform.py --build "$build" --backend cpu --subset
        run "golden, ref f32" 900 python3 tests/golden/conform.py --build "$build" --backend ref --subset
        run "golden, cpu bf16" 900 python3 tests/golden/conform.py --build "$build" --backend cpu --dtype bf16 --subset
        run "golden, kvpress" 900 python3 tests/golden/kvpress.py --build "$build" --backend cpu --subset
        tiny
        ;;
    golden-all)
        run "golden, cpu f32" 3600 python3 tests/golden/conform.py --build "$build" --backend cpu
        run "golden, ref f32" 3600 python3 tests/golden/conform.py --build "$build" --backend ref
        run "golden, cpu bf16" 3600 python3 tests/golden/conform.py --build "$build" --backend cpu --dtype bf16
        run "golden, kvpress" 3600 python3 tests/golden/kvpress.py --build "$build" --backend cpu
        run "golden, kvpress, ref" 3600 python3 tests/golden/kvpress.py --build "$build" --backend ref --subset
        tiny
        ;;
    tokenizers)
        run "tokenizers" 10000 tests/tokenizers/run.sh "$build"
        ;;
    *)
        echo "tests/run.sh: no group '$group'" >&2
        exit 2
        ;;
    esac
done
if [ "$skipped" -gt 0 ]; then
    echo "$passed passed, $failed failed, $skipped skipped"
else
    echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ]
