#!/bin/sh
# etc/check.sh [--all] - install what is missing, build, and run every test.
#
# --all: those on transformers and llama.cpp too, which PyPI provides (6 GB outside the tree).
set -eu
target=check
case "$*" in
"") ;;
--all) target=check-all ;;
*)
    echo "usage: etc/check.sh [--all]" >&2
    exit 2
    ;;
esac
cd "$(dirname "$0")/.."
sh etc/setup.sh
[ "$target" = check ] || sh tests/bench/setup-peers.sh decoders
make -s -j"$(nproc)" tests
exec make -s "$target"
