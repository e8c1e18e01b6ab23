#!/bin/sh
# tests/tokenizers/setup.sh - the reference tokenizers, from PyPI, in a virtual environment of
# their own outside the tree: $XDG_CACHE_HOME/larder/tokenizers or ~/.cache/larder/tokenizers.
#
# Idempotent. Prints the environment's directory. Exit status 77: PyPI could not be reached.
set -eu

wanted="tokenizers==0.22.2 sentencepiece==0.2.1 gguf==0.17.1 jinja2==3.1.6 numpy==2.4.6"
env=${XDG_CACHE_HOME:-$HOME/.cache}/larder/tokenizers

if [ "$(cat "$env/stamp" 2>/dev/null)" != "$wanted" ]; then
    [ -x "$env/bin/python" ] || python3 -m venv "$env" >&2 ||
        { echo "no virtual environment could be made; install python3-venv" >&2; exit 77; }
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check $wanted >&2 ||
        { echo "the reference tokenizers could not be installed from PyPI" >&2; exit 77; }
    echo "$wanted" >"$env/stamp"
fi
echo "$env"
