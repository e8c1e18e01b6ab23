#!/bin/sh
# tests/bench/setup-peers.sh [decoders] - install PyTorch with transformers, and llama.cpp.
#
# Into a virtual environment outside the tree, below $XDG_CACHE_HOME/larder or ~/.cache/larder:
# `peers` is what `make bench` compares prefill with and stays as it is, so that figures of two
# days compare; `decoders` has the releases that the Python package is tested with (make
# check-decoders, check-models and bench-decoders). llama-cpp-python is built here from source.
# Idempotent. Needs Debian 12, root (or sudo) when a package is missing, a PyPI index, 8 GB of
# disk and about 20 minutes on 2 cores for each. PyPI's wheel of PyTorch for Linux is built for
# CUDA: it cannot be imported without NVIDIA's libraries, so they come along although nothing uses
# them.
set -eu

packages="python3-venv gcc g++ cmake ninja-build"
llama="llama-cpp-python==0.3.36"

say() { echo "setup-peers: $*" >&2; }
die() {
    say "$*"
    exit 1
}

name=${1:-peers}
case $name in
peers) torch="torch==2.9.1 transformers==4.57.6 gguf==0.17.1 accelerate==1.15.0 numpy==2.4.6" ;;
decoders) torch="torch==2.15.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6" ;;
*) die "usage: tests/bench/setup-peers.sh [decoders]" ;;
esac

cd "$(dirname "$0")/../.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/larder
env=$cache/$name
model=$cache/SmolLM2-135M-Instruct.Q4_1.gguf

install_packages() {
    missing=""
    for p in $packages; do
        dpkg-query -W -f='${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed ||
            missing="$missing $p"
    done
    [ -n "$missing" ] || return 0
    sudo=""
    [ "$(id -u)" -eq 0 ] || sudo=sudo
    say "installing:$missing"
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        $missing >&2
}

# have PART REQUIREMENTS: the stamp is written last, so a broken installation is repeated
have() { [ "$(cat "$env/$1.stamp" 2>/dev/null)" = "$2" ]; }
pip_install() {
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2
}

works() { # PEER
    echo '["prefill", 512]' | "$env/bin/python" tests/bench/peers.py --serve "$1" --model "$model" \
        --longest 512 >"$env/works.log" 2>&1 && return 0
    tail -n 3 "$env/works.log" >&2
    return 1
}

install_torch() { pip_install $torch && works torch-f32; }

# The library alone, without what would take as long again to build (images, program options). A
# build that does not suit the processor ends by a signal in its first batch.
install_llama() {
    less="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$PWD/tests/bench/llama.cmake"
    say "building $llama"
    CMAKE_ARGS=$less pip_install "$llama" && works llama.cpp && return 0
    say "the build for this processor fails; building for AVX2"
    CMAKE_ARGS="$less -DGGML_NATIVE=OFF" pip_install --no-cache-dir --force-reinstall --no-deps \
        "$llama" && works llama.cpp
}

[ -r /etc/debian_version ] || die "this script knows Debian 12 only"
[ -r "$model" ] || die "no model at $model; run: sh etc/setup.sh"
install_packages
[ -x "$env/bin/python" ] || /usr/bin/python3 -m venv "$env"
if ! have torch "$torch"; then
    say "installing $torch"
    install_torch || die "$torch could not be installed from PyPI, or does not run here"
    echo "$torch" >"$env/torch.stamp"
fi
if ! have llama "$llama"; then
    if install_llama; then
        echo "$llama" >"$env/llama.stamp"
    elif [ "$name" = decoders ]; then
        die "$llama could not be built, or does not run here"
    else
        say "$llama does not run here" # the benchmark reports it, and measures the other
    fi
fi
say "$name: $env"
