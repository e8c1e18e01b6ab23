#!/bin/sh
# Outside libraries appear only in the directories that DESIGN.md gives them to.
# (Includes between our own directories are enforced by the compiler's -I.)
cd "$(dirname "$0")/../.." || exit 1
rc=0

# only HEADER-REGEX ALLOWED-PATH-REGEX NAME
only() {
    bad=$(grep -lE "^ *# *include *<$1" base/*.[ch] store/*.[ch] model/*.[ch] compute/*.[ch] prefill/*.[ch] cuda/*.c* cuda/*.h ipc/*.[ch] client/*.[ch] daemon/*.[ch] 2>/dev/null |
        grep -vE "$2")
    if [ -n "$bad" ]; then
        echo "not ok - $3 is included only where DESIGN.md allows it"
        echo "$bad" >&2
        rc=1
    else
        echo "ok - $3 is included only where DESIGN.md allows it"
    fi
}

only 'lmdb\.h' '^store/' lmdb
only 'zstd' '^store/' zstd
only 'zlib\.h' '^client/cli_npz' zlib
only 'xxhash' '^store/' xxhash
only '(dnnl|oneapi)' '^compute/cpu' oneDNN
only 'utf8proc' '^model/' utf8proc
only 'event2?[/.]' '^daemon/' libevent
only 'systemd/' '^daemon/' libsystemd
only 'jansson\.h' '^(ipc|client|daemon)/|^prefill/main|^model/(safetensors|hf_config|model_hf|tokenizer_json)' jansson
only '(cu[a-z_]*(Lt|_v2|_runtime|_bf16)?\.h|mma\.h)' '^cuda/.*\.cuh?$' CUDA
only 'openssl/' '^base/sha256\.c$' libcrypto

for s in MDB_NOSYNC MDB_NOMETASYNC MDB_WRITEMAP MDB_NORDAHEAD MDB_MAPASYNC; do
    if grep -n "$s" store/*.[ch] | grep -vE '^[^:]*:[0-9]+: *(/?\*|//)' | grep -v 'never' >&2; then
        echo "not ok - $s is not used"
        rc=1
    else
        echo "ok - $s is not used"
    fi
done
exit $rc
