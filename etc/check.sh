#!/bin/sh
# etc/check.sh - install what is missing, build, and run every test.
set -eu
cd "$(dirname "$0")/.."
sh etc/setup.sh
make -s -j"$(nproc)" all
exec make -s check
