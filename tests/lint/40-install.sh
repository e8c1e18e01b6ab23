#!/bin/sh
# make install puts every file in its place, and the unit is hardened.
build=${1:-build}
cd "$(dirname "$0")/../.." || exit 1
root=$(mktemp -d "${TMPDIR:-/tmp}/larder-install.XXXXXX") || exit 1
trap 'rm -rf "$root"' EXIT
rc=0

claim() { # NAME COMMAND...
    name=$1
    shift
    if "$@" >"$root/out" 2>&1; then echo "ok - $name"; else
        echo "not ok - $name"
        cat "$root/out" >&2
        rc=1
    fi
}

has_all() {
    for f in sbin/larderd bin/larder bin/larder-prefill lib/liblarder.so.0 lib/liblarder.so lib/liblarder.a \
        lib/pkgconfig/larder.pc include/larder.h include/larder_status.h include/larder_image.h \
        lib/systemd/system/larderd.service share/man/man1/larder.1 share/man/man8/larderd.8 \
        share/man/man5/larder.conf.5 share/man/man3/liblarder.3 share/man/man8/larder-prefill.8 \
        share/doc/larder/PROTOCOL.md share/doc/larder/IMAGE.md share/doc/larder/FORMAT.md \
        share/doc/larder/PERFORMANCE.md share/doc/larder/examples/decode.c; do
        [ -e "$root/usr/$f" ] || { echo "missing: $f"; return 1; }
    done
    [ -e "$root/etc/larder/larder.conf" ]
}

no_leftover_marks() { ! grep -rn '@PREFIX@\|@VERSION@' "$root/usr/lib"; }

keeps_config() {
    echo '# mine' >"$root/etc/larder/larder.conf"
    make -s install B="$build" DESTDIR="$root" PREFIX=/usr && grep -q mine "$root/etc/larder/larder.conf"
}

links_against_install() {
    printf '#include <larder.h>\nint main(void) { return larder_status_text(0) ? 0 : 1; }\n' >"$root/t.c"
    cc -I"$root/usr/include" -o "$root/t" "$root/t.c" -L"$root/usr/lib" -llarder &&
        LD_LIBRARY_PATH="$root/usr/lib" "$root/t"
}

# As its first comment tells the reader to build it.
builds_the_example() {
    flags=$(PKG_CONFIG_PATH="$root/usr/lib/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$root" PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1 \
        PKG_CONFIG_ALLOW_SYSTEM_LIBS=1 pkg-config --cflags --libs larder) || return 1
    # shellcheck disable=SC2086
    cc -o "$root/decode" "$root/usr/share/doc/larder/examples/decode.c" $flags -lm &&
        LD_LIBRARY_PATH="$root/usr/lib" "$root/decode" 2>&1 | grep -q usage
}

# --threshold counts in tenths: 20 is 2.0
hardened() { systemd-analyze security --offline=true --threshold=20 "$root/usr/lib/systemd/system/larderd.service"; }
valid_unit() {
    sed 's|^ExecStart=.*|ExecStart=/bin/true|' "$root/usr/lib/systemd/system/larderd.service" >"$root/larderd.service" &&
        systemd-analyze verify --man=no "$root/larderd.service"
}

claim "make install works with DESTDIR and PREFIX" make -s install B="$build" DESTDIR="$root" PREFIX=/usr
claim "every file is in its place" has_all
claim "no placeholder is left in installed files" no_leftover_marks
claim "an existing larder.conf is kept" keeps_config
claim "a program links against the installed library" links_against_install
claim "the worked example builds with pkg-config" builds_the_example
claim "larderd.service is exposed to 2.0 at most" hardened
claim "larderd.service is a valid unit" valid_unit
exit $rc
