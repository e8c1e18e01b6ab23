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
programs="larder-prefill-cuda bench_device"
for t in kernels select match pack device; do programs="$programs test_$t"; done
if ! make -s -j"$(nproc)" CUDA=1 CUDA_ARCHS=90 B="$build" $(printf "$build/cuda-90/%s " $programs) >&2; then
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
