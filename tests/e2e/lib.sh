# lib.sh - sourced by the scripts here: a private daemon with the real model, and claims.
#
# Each script gets the build directory, starts what it needs with start_daemon, and ends
# everything on exit.

build=${1:-build}
cd "$(dirname "$0")/../.." || exit 1
model=${XDG_CACHE_HOME:-$HOME/.cache}/larder/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -r "$model" ]; then
    echo "no model at $model; run: sh etc/setup.sh" >&2
    exit 77
fi
dir=$(mktemp -d "${TMPDIR:-/tmp}/larder-e2e.XXXXXX") || exit 1
export LARDER_SOCKET="$dir/d/larder.sock"
docs=tests/golden/data/public
pid=
rc=0

stop_daemon() { # [SIGNAL]
    [ -n "$pid" ] || return 0
    kill -"${1:-TERM}" "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null
    pid=
}

finish() {
    stop_daemon KILL
    rm -rf "$dir"
}
trap finish EXIT
trap 'exit 130' INT TERM

# launch_daemon OPTION...: returns when the socket answers, or larderd has ended
launch_daemon() {
    "$build/larderd" "$@" 2>>"$dir/log" &
    pid=$!
    for _ in $(seq 1 300); do
        larder status >/dev/null 2>&1 && return 0
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    return 1
}

# start_daemon [OPTION...]: a private one with the real model
start_daemon() {
    launch_daemon --private "$dir/d" --model "smollm2=$model" "$@" && return 0
    echo "larderd did not start:" >&2
    cat "$dir/log" >&2
    return 1
}

larder() { "$build/larder" "$@"; }

# A field of a JSON object on standard input: field entry.n_ctx
field() {
    python3 -c 'import json, sys
v = json.loads(sys.stdin.read().strip().splitlines()[-1])
for k in sys.argv[1].split("."):
    v = v[int(k)] if isinstance(v, list) else v[k]
print(json.dumps(v) if isinstance(v, (dict, list)) else v)' "$1"
}

claim() { # NAME COMMAND... - the command's success is the claim
    name=$1
    shift
    if "$@" >"$dir/out" 2>"$dir/err"; then echo "ok - $name"; else
        echo "not ok - $name"
        { echo "--- $name: $*"; cat "$dir/out" "$dir/err"; tail -n 5 "$dir/log"; } >&2
        rc=1
    fi
}

same() { # WHAT GOT WANT
    [ "$2" = "$3" ] || { echo "$1: got '$2', expected '$3'"; return 1; }
}

fails_with() { # STATUS COMMAND... - exits non-zero and names the status on one line
    want=$1
    shift
    if "$@" >"$dir/o" 2>"$dir/e"; then
        echo "succeeded"
        return 1
    fi
    [ "$(wc -l <"$dir/e")" -eq 1 ] && grep -q "$want" "$dir/e" || { cat "$dir/e"; return 1; }
}
