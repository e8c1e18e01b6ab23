#!/bin/sh
# tests/tokenizers/run.sh BUILD - check.py in its environment, with the peers and the model that
# are there; and whether the recorded renderings of chat templates are what Jinja makes.
set -eu
build=$1
cd "$(dirname "$0")/../.."
env=$(tests/tokenizers/setup.sh) || exit $?
cache=${XDG_CACHE_HOME:-$HOME/.cache}/larder
peers=
[ -x "$cache/peers/bin/python" ] && "$cache/peers/bin/python" -c 'import llama_cpp' 2>/dev/null && peers=$cache/peers
rc=0
"$env/bin/python" tests/templates/render.py --check || rc=1
"$env/bin/python" tests/tokenizers/check.py --encode "$build/tests/encode" --count "${COUNT:-100000}" \
    --peers "$peers" --model "$cache/SmolLM2-135M-Instruct.Q4_1.gguf" || rc=1
exit "$rc"
