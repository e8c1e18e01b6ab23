#!/bin/sh
# etc/demo.sh [--built DIR] - the tour: install what is missing, build, and show larder at work.
#
# Starts a private daemon in a temporary directory, stores three real documents, asks
# one question of each twice (after a full prefill, and resumed from the stored cache)
# and prints a table. Leaves nothing running and nothing behind but the build.
set -eu
cd "$(dirname "$0")/.."
build=build
if [ "${1:-}" = --built ]; then
    build=$2
else
    sh etc/setup.sh
    make -s -j"$(nproc)" all
fi
exec python3 etc/demo.py --build "$build"
