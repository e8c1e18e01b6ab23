#!/bin/sh
# tests/cuda/build.sh BUILD - does larder-prefill-cuda still compile, without warnings, and link?
# For one architecture: make CUDA=1 builds for all.
build=$1
cd "$(dirname "$0")/../.." || exit 1
nvcc=${NVCC:-${CUDA_HOME:-/usr/local/cuda}/bin/nvcc}
if ! [ -x "$nvcc" ]; then
    echo "NOT BUILT: no $nvcc, so nothing says whether larder-prefill-cuda compiles; CUDA_HOME names a CUDA Toolkit 13" >&2
    exit 77
fi
if ! make -s CUDA=1 CUDA_ARCHS=90 B="$build" "$build/cuda-90/larder-prefill-cuda" \
    "$build/cuda-90/test_kernels" "$build/cuda-90/test_select" "$build/cuda-90/test_device" \
    "$build/cuda-90/bench_device" >&2; then
    echo "not ok - larder-prefill-cuda and its tests compile and link"
    exit 1
fi
echo "ok - larder-prefill-cuda and its tests compile and link"
if "$build/cuda-90/larder-prefill-cuda" --version | grep -q larder-prefill; then
    echo "ok - it starts without a GPU"
else
    echo "not ok - it starts without a GPU"
    exit 1
fi
