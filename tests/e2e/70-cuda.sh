#!/bin/bash
# A model with backend = cuda: which program is started, what status says of its device, and what
# is said where there is none; questions to an image. The device is host memory (tests/cuda); no GPU
# is needed.
. "$(dirname "$0")/lib.sh"
mkdir "$dir/d" "$dir/m" "$dir/empty"
# The tiny model of the golden tests: a few layers, computed in no time
python3 - "$dir/m/tiny.gguf" <<'PY' || exit 1
import sys
sys.path.insert(0, "tests/golden")
import tiny
tiny.write_model(sys.argv[1], tiny.make_model(1))
PY

config() { # WORKER_PROGRAM
    cat >"$dir/conf" <<CONF
store = $dir/d/store
socket = $dir/d/larder.sock
worker_socket = $dir/d/worker.sock
worker_program = $1
model tiny {
    path = $dir/m/tiny.gguf
    backend = cuda
    template = plain
}
CONF
    mkdir -p "$dir/d/store"
}

# Starting fails with one line that says what is missing
refuses() { # TEXT...
    if timeout 60 "$build/larderd" --config "$dir/conf" >"$dir/o" 2>"$dir/e"; then return 1; fi
    for t in "$@"; do grep -q -- "$t" "$dir/e" || { cat "$dir/e"; return 1; }; done
}

config "$dir/empty/larder-prefill"
claim "without larder-prefill-cuda the daemon says how to get it" \
    refuses "larder-prefill-cuda cannot be started" "make CUDA=1"

# A program of that name without the backend, or on a machine without a GPU
cat >"$dir/empty/larder-prefill-cuda" <<'SH'
#!/bin/sh
echo "larder-prefill: backend cuda: no usable CUDA device (none is visible) (LARDER_EBACKEND)" >&2
exit 1
SH
chmod +x "$dir/empty/larder-prefill-cuda"
claim "without a device it does not start, and nothing else computes" refuses "no usable CUDA device"

config "$PWD/$build/shim/larder-prefill"
starts() { launch_daemon --config "$dir/conf"; }
claim "with one it starts" starts
names_device() {
    larder status | grep -q "fake device, CUDA driver 13.0, .* MiB free" &&
        larder status --json | grep -q '"device": *"fake device'
}
claim "status names device, driver and memory" names_device
printf 'a small text\n' >"$dir/text"
claim "a document is prefilled and stored" larder put "$dir/text" --name t --policy full --wait
stored_by() { same backend "$(larder show t --json | field backend)" "cuda/bf16/sm_90"; }
claim "the entry says what computed it" stored_by

# larder looks for its engine beside itself
mkdir "$dir/bin" && cp "$build/larder" "$build/shim/larder-prefill-cuda" "$dir/bin"
ask() { "$dir/bin/larder" ask "$@" "which text?" --max-new 8 --ignore-eos --json; }
answers() {
    ask t >"$dir/a" && ask --model tiny --file "$dir/text" >"$dir/b" &&
        same ids "$(field generated_ids <"$dir/a")" "$(field generated_ids <"$dir/b")" &&
        [ "$(field generated_ids <"$dir/a")" != "[]" ]
}
claim "a question to the image is answered as one to the document" answers
larder put "$dir/text" --name packed --policy full,precision=int4 --wait >/dev/null
claim "and one to packed rows" ask packed

# The default policy, every step of it: calibrated shares, replay, fit, four bits, certificate
head -c 200 README.md >"$dir/long"
certificate() { # PROGRAM BACKEND
    "$1" trace --model "$dir/m/tiny.gguf" --backend "$2" --dtype f32 --file "$dir/long" --policy offline,rows=25% \
        --profile "$dir/profile" --json
}
agrees() {
    "$build/shim/larder-prefill-cuda" calibrate --model "$dir/m/tiny.gguf" --backend cuda --dtype f32 --no-builtin \
        "$dir/long" >"$dir/profile" &&
        certificate "$build/larder-prefill" cpu >"$dir/a" &&
        certificate "$build/shim/larder-prefill-cuda" cuda >"$dir/b" &&
        python3 - "$dir/a" "$dir/b" <<'PY'
import json
import sys
a, b = (json.loads(open(f).read().splitlines()[-1]) for f in sys.argv[1:])
x, y = a["certificate"]["kl"], b["certificate"]["kl"]
if a["rows"] != b["rows"] or abs(x - y) > 1e-3 * x:
    sys.exit("cpu %g, cuda %g, the same rows: %s" % (x, y, a["rows"] == b["rows"]))
PY
}
claim "the default policy keeps the rows, and earns the certificate, that it does on the CPU" agrees
stores() { larder put "$dir/long" --name long --policy offline,rows=50% --wait; }
"$dir/bin/larder" calibrate tiny --no-builtin "$dir/long" >/dev/null # as ask does
claim "a document is stored by the default policy with a budget of its own" stores
claim "a question to fitted rows in four bits is answered" ask long
stop_daemon
exit $rc
