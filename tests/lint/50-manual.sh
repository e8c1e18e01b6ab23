#!/bin/sh
# The manual pages say what the programs and headers offer: every option of --help, every
# command, every exported function.
build=${1:-build}
cd "$(dirname "$0")/../.." || exit 1
rc=0

report() { # NAME MISSING
    if [ -z "$2" ]; then echo "ok - $1"; else
        echo "not ok - $1"
        echo "missing: $2" >&2
        rc=1
    fi
}

# A page as plain words: the escapes that stand for a dash are dashes.
plain() { sed -e 's/\\-/-/g' "$1"; }

missing=""
commands=$("$build/larder" --help | awk '/^  [a-z]/ { print $1 }')
[ -n "$commands" ] || missing="the commands themselves"
for cmd in $commands; do
    plain client/larder.1 | grep -qE "^\.(B|BR|TP|RB)? ?$cmd\b" || missing="$missing $cmd"
done
report "larder(1) has every command" "$missing"

missing=""
for cmd in $commands; do
    for opt in $("$build/larder" "$cmd" --help | grep -oE '^  --[a-z-]+'); do
        plain client/larder.1 | grep -qE "^\.(B|BR) .*$opt\b" || missing="$missing $cmd:$opt"
    done
done
report "larder(1) has every option of every command" "$missing"

missing=""
for f in $(nm -D --defined-only "$build/liblarder.so" | awk '$2 == "T" { sub(/@.*/, "", $3); print $3 }'); do
    grep -q "$f(" client/liblarder.3 || missing="$missing $f"
done
report "liblarder(3) has every exported function" "$missing"
exit $rc
