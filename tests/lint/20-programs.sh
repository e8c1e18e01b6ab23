#!/bin/sh
# What the built programs link and export.
build=${1:-build}
cd "$(dirname "$0")/../.." || exit 1
rc=0

# claim NAME COMMAND... - the command's success is the claim
claim() {
    name=$1
    shift
    if "$@"; then echo "ok - $name"; else
        echo "not ok - $name"
        rc=1
    fi
}

links_none() { # PROGRAM REGEX
    ! ldd "$build/$1" | grep -E "$2" >&2
}

exports_only_larder() {
    ! nm -D --defined-only "$build/liblarder.so" | awk '{ print $3 }' | grep -vE '^larder_|^LARDER_|^$' >&2
}

header_compiles() { # LANGUAGE COMPILER FLAGS
    echo '#include "larder.h"' | "$2" $3 -Wall -Wextra -Werror -pedantic -fsyntax-only -Iclient -Ibase -Iipc -x "$1" -
}

claim "larderd links no model code" links_none larderd 'dnnl|cuda|cublas|gomp|utf8proc'
claim "larder-prefill links no CUDA" links_none larder-prefill 'cuda|cublas'
claim "larder links no store and no model code" links_none larder 'dnnl|lmdb|zstd|event|gomp'
claim "larder-prefill links no store" links_none larder-prefill 'lmdb|event'
claim "liblarder links libc and jansson only" links_none liblarder.so 'dnnl|lmdb|zstd|event|crypto|gomp'
claim "liblarder.so exports larder_* only" exports_only_larder
claim "larder.h compiles as C99" header_compiles c cc -std=c99
claim "larder.h compiles as C++" header_compiles c++ c++ -std=c++11
exit $rc
