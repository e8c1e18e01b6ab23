#!/bin/sh
# House rules that can be counted: file lengths, stray paths, unique names, headers alone.
cd "$(dirname "$0")/../.." || exit 1
rc=0

report() { # NAME FINDINGS
    if [ -z "$2" ]; then echo "ok - $1"; else
        echo "not ok - $1"
        echo "$2" >&2
        rc=1
    fi
}

src=$(ls base/*.[ch] store/*.[ch] model/*.[ch] compute/*.[ch] prefill/*.[ch] cuda/*.c* cuda/*.h ipc/*.[ch] client/*.[ch] daemon/*.[ch])
python=$(ls client/python/*/*.py tests/*/*.py)
report "no source file is longer than 800 lines" \
    "$(wc -l $src $python tests/*/*.[ch] | awk '$1 > 800 && $2 != "total"')"
report "file names are unique over all source folders" \
    "$(for f in $src; do basename "$f"; done | sort | uniq -d)"
report "no line is longer than 100 columns" \
    "$(awk 'length($0) > 100 { print FILENAME ":" FNR }' $src client/python/*/*.py tests/decoders/*.py)"
report "every script is executable" "$(find etc tests -name '*.sh' ! -perm -u+x)"
report "no library prints or exits" \
    "$(grep -nE '\b(printf|puts|exit|abort)\(' $(ls base/*.c store/*.c ipc/*.c model/*.c compute/*.c prefill/*.c cuda/*.c* client/*.c |
        grep -vE '(prefill/main|client/cli)') | grep -vE 'f?s?n?printf\((e|buf|out|w|f|p)')"
alone=""
for h in $(ls base/*.h store/*.h ipc/*.h model/*.h compute/*.h prefill/*.h cuda/*.h client/*.h daemon/*.h); do
    dir=${h%%/*}
    case $dir in
    base) may="" ;; store | model | ipc) may="base" ;; compute) may="model base" ;;
    prefill) may="compute model base" ;; cuda) may="prefill compute model base" ;;
    client) may="base ipc" ;; daemon) may="base store ipc" ;;
    esac
    case $h in prefill/main*) may="compute model base ipc" ;; esac
    inc="-I$dir"
    for d in $may; do inc="$inc -I$d"; done
    cc -std=c11 -D_GNU_SOURCE -DLARDER_VERSION='""' $inc -fsyntax-only -x c "$h" 2>/dev/null || alone="$alone $h"
done
report "every header compiles alone" "$alone"
exit $rc
