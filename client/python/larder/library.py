"""liblarder.so through ctypes: where it is found, its structs and its functions (larder.h).

The one idea: everything that knows about memory layout is here, and a test compares it with what
the C compiler makes of the headers. The library is loaded at the first use, not at import.
"""
from __future__ import annotations

import ctypes as c
import functools
import os
import subprocess
from typing import Optional

from .errors import LibraryNotFound, from_code
from .version import VERSION

SONAME = "liblarder.so.0"
VARIABLE = "LARDER_LIBRARY"

KEY_BYTES = 32
NAME_BYTES = 648
MODEL_BYTES = 136
POLICY_BYTES = 264
MESSAGE_BYTES = 512


class Err(c.Structure):
    _fields_ = [("code", c.c_int), ("msg", c.c_char * MESSAGE_BYTES)]


class CJob(c.Structure):
    _fields_ = [("id", c.c_uint64), ("state", c.c_int), ("has_key", c.c_int),
                ("key", c.c_uint8 * KEY_BYTES), ("name", c.c_char * NAME_BYTES),
                ("model", c.c_char * MODEL_BYTES), ("policy", c.c_char * POLICY_BYTES),
                ("pass", c.c_char * 32), ("layer", c.c_uint32), ("n_layers", c.c_uint32),
                ("n_ctx", c.c_uint32), ("stored_already", c.c_int), ("prefill_ms", c.c_uint64),
                ("elapsed_ms", c.c_uint64), ("code", c.c_int),
                ("message", c.c_char * MESSAGE_BYTES)]


class PutOptions(c.Structure):
    _fields_ = [("model", c.c_char_p), ("name", c.c_char_p), ("ns", c.c_char_p),
                ("policy", c.c_char_p), ("tmpl", c.c_char_p), ("pin", c.c_int)]


class LookupOptions(c.Structure):
    _fields_ = [("model", c.c_char_p), ("policy", c.c_char_p), ("ns", c.c_char_p)]


class CEntry(c.Structure):
    _fields_ = [("key", c.c_uint8 * KEY_BYTES), ("name", c.c_char * NAME_BYTES),
                ("model", c.c_char * MODEL_BYTES), ("policy", c.c_char * POLICY_BYTES),
                ("precision", c.c_char * 8), ("n_ctx", c.c_uint32), ("next_pos", c.c_uint32),
                ("sel_layer", c.c_int32), ("full_bytes", c.c_uint64),
                ("image_bytes", c.c_uint64), ("stored_bytes", c.c_uint64),
                ("rows_total", c.c_uint64), ("created", c.c_uint64), ("prefill_ms", c.c_uint64),
                ("hits", c.c_uint64), ("pinned", c.c_int), ("damaged", c.c_int)]


class Image(c.Structure):
    _fields_ = [("base", c.c_void_p), ("n_bytes", c.c_uint64), ("n_layers", c.c_uint32),
                ("n_heads", c.c_uint32), ("n_kv_heads", c.c_uint32), ("head_dim", c.c_uint32),
                ("dtype", c.c_uint32), ("flags", c.c_uint32), ("n_ctx", c.c_uint32),
                ("next_pos", c.c_uint32), ("n_vocab", c.c_uint32), ("n_tokens", c.c_uint32),
                ("text_len", c.c_uint64), ("key", c.c_uint8 * KEY_BYTES),
                ("model_fingerprint", c.c_uint8 * KEY_BYTES),
                ("tokenizer_fingerprint", c.c_uint8 * KEY_BYTES), ("tokens_off", c.c_uint64),
                ("text_off", c.c_uint64), ("logits_off", c.c_uint64), ("heads_off", c.c_uint64)]


class Rows(c.Structure):
    _fields_ = [("n_rows", c.c_uint32), ("k", c.c_void_p), ("v", c.c_void_p),
                ("position", c.c_void_p), ("bias", c.c_void_p)]


class Lease(c.Structure):
    _fields_ = [("id", c.c_uint64), ("fd", c.c_int), ("image", Image), ("entry", CEntry)]


class FetchOptions(c.Structure):
    _fields_ = [("packed", c.c_int)]


Connection = c.c_void_p
_ERR = c.POINTER(Err)
_JOB = c.POINTER(CJob)
_ENTRY = c.POINTER(CEntry)

# name: (result, arguments); int results that are statuses are checked by call()
_FUNCTIONS = {
    "larder_version": (c.c_char_p, []),
    "larder_status_name": (c.c_char_p, [c.c_int]),
    "larder_status_text": (c.c_char_p, [c.c_int]),
    "larder_connect": (c.c_int, [c.POINTER(Connection), c.c_char_p, c.c_int, _ERR]),
    "larder_close": (None, [Connection]),
    "larder_path": (c.c_char_p, [Connection]),
    "larder_put_text": (c.c_int, [Connection, c.c_char_p, c.c_size_t, c.POINTER(PutOptions),
                                  c.c_int, _JOB, _ERR]),
    "larder_put_tokens": (c.c_int, [Connection, c.c_void_p, c.c_size_t, c.POINTER(PutOptions),
                                    c.c_int, _JOB, _ERR]),
    "larder_job_get": (c.c_int, [Connection, c.c_uint64, c.c_int, _JOB, _ERR]),
    "larder_cancel": (c.c_int, [Connection, c.c_uint64, c.c_int, _JOB, _ERR]),
    "larder_lookup": (c.c_int, [Connection, c.c_char_p, c.c_int, _ENTRY, _ERR]),
    "larder_lookup_tokens": (c.c_int, [Connection, c.c_void_p, c.c_size_t,
                                       c.POINTER(LookupOptions), c.c_int, _ENTRY,
                                       c.POINTER(c.c_uint64), _ERR]),
    "larder_lookup_text": (c.c_int, [Connection, c.c_char_p, c.c_size_t,
                                     c.POINTER(LookupOptions), c.c_int, _ENTRY,
                                     c.POINTER(c.c_uint64), _ERR]),
    "larder_rm": (c.c_int, [Connection, c.c_char_p, c.c_int, c.POINTER(c.c_uint64), _ERR]),
    "larder_pin": (c.c_int, [Connection, c.c_char_p, c.c_int, c.c_int, _ERR]),
    "larder_fetch_with": (c.c_int, [Connection, c.c_char_p, c.POINTER(FetchOptions), c.c_int,
                                    c.POINTER(Lease), _ERR]),
    "larder_image_check": (c.c_int, [c.c_void_p, c.c_uint64, c.POINTER(Image), _ERR]),
    "larder_release": (c.c_int, [Connection, c.POINTER(Lease), c.c_int, _ERR]),
    "larder_image_rows": (Rows, [c.POINTER(Image), c.c_uint32, c.c_uint32]),
    "larder_call": (c.c_int, [Connection, c.c_char_p, c.c_char_p, c.c_int, c.c_void_p,
                              c.c_void_p, c.c_int, c.POINTER(c.c_void_p), c.POINTER(c.c_int),
                              _ERR]),
    "larder_free": (None, [c.c_void_p]),
}


def _from_pkg_config() -> Optional[str]:
    try:
        done = subprocess.run(["pkg-config", "--variable=libdir", "larder"], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    directory = done.stdout.strip()
    return os.path.join(directory, SONAME) if directory else None


def _open() -> c.CDLL:
    named = os.environ.get(VARIABLE)
    if named:  # asked for: nothing else will do
        try:
            return c.CDLL(named)
        except OSError as why:
            raise LibraryNotFound("$%s is '%s', which does not load: %s"
                                  % (VARIABLE, named, why)) from None
    try:
        return c.CDLL(SONAME)
    except OSError as why:
        first = why
    found = _from_pkg_config()
    if found:
        try:
            return c.CDLL(found)
        except OSError as why:
            first = why
    raise LibraryNotFound("%s: 'make install' larder and run ldconfig, or set %s to the path of "
                          "liblarder.so" % (first, VARIABLE))


@functools.lru_cache(maxsize=None)
def library() -> c.CDLL:
    """The library with its functions declared: $LARDER_LIBRARY, the loader's, or pkg-config's."""
    lib = _open()
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as why:
        raise LibraryNotFound("not a liblarder of this version: %s" % why) from None
    version = lib.larder_version().decode()
    if version.split(".")[:2] != VERSION.split(".")[:2]:
        raise LibraryNotFound("liblarder is version %s, this package is made for %s: install the "
                              "two of one release" % (version, VERSION))
    return lib


def call(name: str, *args: object) -> None:
    """A function that returns a status and fills a struct larder_err, which is added here."""
    err = Err()
    code = getattr(library(), name)(*args, c.byref(err))
    if code:
        raise from_code(code, err.msg.decode("utf-8", "replace"))
