#!/bin/sh
# tests/cuda/sanitize.sh TOOL PROGRAM - the kernel tests under compute-sanitizer's TOOL.
tool=$1
program=$2
sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
[ -x "$sanitizer" ] || sanitizer=$(command -v compute-sanitizer)
if [ -z "$sanitizer" ]; then
    echo "NOT CHECKED: no compute-sanitizer on this machine" >&2
    exit 77
fi
"$sanitizer" --tool "$tool" --error-exitcode 9 "$program" >&2
rc=$?
[ $rc -eq 77 ] && exit 77
if [ $rc -eq 0 ]; then
    echo "ok - $tool finds nothing"
else
    echo "not ok - $tool (exit status $rc)"
    exit 1
fi
