#!/bin/bash
# The Python package with a real daemon: installed by pip, README.md's example, packed rows.
. "$(dirname "$0")/../e2e/lib.sh"
site=$dir/site

claim "the daemon starts" start_daemon

# From a copy: setuptools leaves files beside its source.
installs() {
    cp -r client/python "$dir/source" &&
        /usr/bin/python3 -m pip install --quiet --no-index --no-deps --no-build-isolation \
            --target "$site" "$dir/source" &&
        ls "$site"/larder/py.typed "$site"/larder-"$(cat VERSION)".dist-info/METADATA
}
claim "pip install ./client/python makes and installs a wheel" installs

export LARDER_LIBRARY="$PWD/$build/liblarder.so" PYTHONDONTWRITEBYTECODE=1
[ "${build#/}" = "$build" ] || LARDER_LIBRARY=$build/liblarder.so
put() { larder put "$docs/doc_a700.txt" --name "$1" --policy "$2" --wait; }
claim "a document is stored" put manual asl,rows=50%
claim "and once more in four bits" put small snapkv,rows=25%,precision=int4
PYTHONPATH=$site /usr/bin/python3 tests/decoders/real_package.py || rc=1
exit $rc
