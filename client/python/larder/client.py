"""Client: a connection to larderd, with liblarder underneath.

Deadlines are seconds: a call's own, or the Client's (None: there is none). As in the C library, a
connection on which a deadline passed (DeadlinePassed), or that failed with ProtocolViolation or
NoDaemon, is broken: every further call says so, and a new Client is needed. wait() is the
exception, see there. Threads may share a Client: its calls take turns.
"""
from __future__ import annotations

import ctypes as c
import json
import os
import threading
import time
from typing import Any, Callable, Iterator, Optional, Union

import numpy as np
import numpy.typing as npt

from .cache import Cache
from .errors import Canceled, DeadlinePassed, InvalidArgument, from_code
from .library import (CEntry, CJob, Connection, FetchOptions, Lease, LookupOptions, PutOptions,
                      call, library)
from .objects import Entry, Job, entry_from, entry_from_json, field, job_from

DEFAULT_TIMEOUT = 30.0
POLL_FIRST_S, POLL_LONGEST_S = 0.01, 0.25
LS_PAGE = 200

Document = Union[str, "os.PathLike[str]", npt.ArrayLike]
Progress = Union[bool, Callable[[Job], None], None]


def _milliseconds(timeout: Optional[float]) -> int:
    if timeout is None:
        return -1
    return min(max(int(timeout * 1000 + 0.5), 0), 2 ** 31 - 1)


def _c_string(text: Optional[str], what: str) -> Optional[bytes]:
    if text is None:
        return None
    raw = text.encode()
    if b"\0" in raw:
        raise InvalidArgument("%s contains a zero byte" % what)
    return raw


def _token_ids(tokens: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InvalidArgument("a document is a str, a path, or a one-dimensional sequence of "
                              "token ids")
    if ids.size and (ids.min() < 0 or ids.max() >= 2 ** 32):
        raise InvalidArgument("a token id is negative or beyond 32 bits")
    return np.ascontiguousarray(ids, dtype=np.uint32)


def _text_or_ids(document: Document) -> Union[bytes, npt.NDArray[np.uint32]]:
    if isinstance(document, os.PathLike):
        with open(document, "rb") as f:
            return f.read()
    return document.encode() if isinstance(document, str) else _token_ids(document)


class _Bar:
    """Progress on the terminal, a bar for each stage; needs tqdm."""

    def __init__(self) -> None:
        try:
            import tqdm
        except ImportError:
            raise InvalidArgument("progress=True needs tqdm: pip install tqdm, or give a function "
                                  "that takes a Job") from None
        self.tqdm, self.bar, self.stage = tqdm.tqdm, None, ""

    def __call__(self, job: Job) -> None:
        if job.stage != self.stage:
            self.close()
            self.stage = job.stage
        if self.bar is None and job.n_layers:
            self.bar = self.tqdm(total=job.n_layers, desc=job.stage, unit="layer")
        if self.bar is not None:
            self.bar.update(job.layer - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


class Client:
    """A connection to larderd at `path` (None: $LARDER_SOCKET, else the service's socket)."""

    def __init__(self, path: Optional[Union[str, "os.PathLike[str]"]] = None,
                 timeout: Optional[float] = DEFAULT_TIMEOUT):
        self.timeout = timeout
        self._turn = threading.Lock()
        self._connection: Optional[Connection] = None
        connection = Connection()
        raw = None if path is None else os.fsencode(path)
        call("larder_connect", c.byref(connection), raw, _milliseconds(timeout))
        self._connection = connection

    # ---- the connection

    def close(self) -> None:
        """End the connection and its leases. Arrays and caches that were fetched stay valid."""
        with self._turn:
            connection, self._connection = self._connection, None
            if connection is not None:
                library().larder_close(connection)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        connection = getattr(self, "_connection", None)
        if connection is not None:
            library().larder_close(connection)

    @property
    def path(self) -> str:
        """Of the daemon's socket."""
        with self._turn:
            return os.fsdecode(library().larder_path(self._open()))

    def _open(self) -> Connection:
        if self._connection is None:
            raise InvalidArgument("this Client is closed")
        return self._connection

    def _call(self, name: str, *args: object) -> None:
        with self._turn:
            call(name, self._open(), *args)

    def _deadline(self, timeout: Optional[float]) -> int:
        return _milliseconds(self.timeout if timeout is None else timeout)

    def _release(self, lease: Lease) -> None:
        """Of a cache that is closed; tells the daemon only while the connection is there."""
        with self._turn:
            if self._connection is None:
                library().larder_release(None, c.byref(lease), 0, None)
            else:
                call("larder_release", self._connection, c.byref(lease), self._deadline(None))

    # ---- documents and jobs

    def put(self, document: Document, name: Optional[str] = None, *,
            namespace: Optional[str] = None, policy: Optional[str] = None,
            model: Optional[str] = None, template: Optional[str] = None, pin: bool = False,
            wait: bool = False, progress: Progress = None,
            timeout: Optional[float] = None) -> Job:
        """Store a document: text (str), a file of UTF-8 text (a path object), or token ids.

        The job is durable when this returns; with `wait` (or `progress`) it returns when the
        entry is there. `timeout` is for handing the document over, not for the wait.
        """
        options = PutOptions(_c_string(model, "the model"), _c_string(name, "the name"),
                             _c_string(namespace, "the namespace"),
                             _c_string(policy, "the policy"), _c_string(template, "the template"),
                             pin)
        data, job = _text_or_ids(document), CJob()
        rest = (c.byref(options), self._deadline(timeout), c.byref(job))
        if isinstance(data, bytes):
            self._call("larder_put_text", data, len(data), *rest)
        else:
            self._call("larder_put_tokens", data.ctypes.data, data.size, *rest)
        result = job_from(job)
        return self.wait(result, progress=progress) if wait or progress else result

    def job(self, job: Union[Job, int], timeout: Optional[float] = None) -> Job:
        """How a job stands."""
        result = CJob()
        self._call("larder_job_get", job.id if isinstance(job, Job) else job,
                   self._deadline(timeout), c.byref(result))
        return job_from(result)

    def wait(self, job: Union[Job, int], *, progress: Progress = None,
             timeout: Optional[float] = None) -> Job:
        """The job once it is done; the error of one that failed, Canceled of one that was.

        `progress` is a function that takes a Job, or True for a bar (tqdm). The daemon is asked
        again and again, so that an interrupt is heard and DeadlinePassed (after `timeout`; None:
        never) leaves the connection usable and the job as it is.
        """
        end = None if timeout is None else time.monotonic() + timeout
        tell = _Bar() if progress is True else progress
        pause = POLL_FIRST_S
        try:
            while True:
                now = self.job(job)
                if tell:
                    tell(now)
                if now.finished:
                    return self._outcome(now)
                left = pause if end is None else end - time.monotonic()
                if left <= 0:
                    raise DeadlinePassed("job %d is still %s" % (now.id, now.state))
                time.sleep(min(pause, left))
                pause = min(2 * pause, POLL_LONGEST_S)
        finally:
            if isinstance(tell, _Bar):
                tell.close()

    @staticmethod
    def _outcome(job: Job) -> Job:
        if job.state == "failed":
            raise from_code(job.code, job.message)
        if job.state == "canceled":
            raise Canceled("job %d was canceled" % job.id)
        return job

    def cancel(self, job: Union[Job, int], timeout: Optional[float] = None) -> Job:
        result = CJob()
        self._call("larder_cancel", job.id if isinstance(job, Job) else job,
                   self._deadline(timeout), c.byref(result))
        return job_from(result)

    # ---- entries

    def lookup(self, ref: str, timeout: Optional[float] = None) -> Entry:
        """An entry by "namespace/name", "name" (namespace "default") or key (64 hex digits)."""
        entry = CEntry()
        self._call("larder_lookup", _c_string(ref, "the reference"), self._deadline(timeout),
                   c.byref(entry))
        return entry_from(entry)

    def lookup_prefix(self, prompt: Union[str, npt.ArrayLike], *, model: Optional[str] = None,
                      policy: Optional[str] = None, namespace: Optional[str] = None,
                      timeout: Optional[float] = None) -> tuple[Entry, int]:
        """The entry whose document is the longest prefix of a prompt, and what it covers: bytes
        of a text (UTF-8), or tokens."""
        options = LookupOptions(_c_string(model, "the model"), _c_string(policy, "the policy"),
                                _c_string(namespace, "the namespace"))
        data, entry, matched = _text_or_ids(prompt), CEntry(), c.c_uint64()
        rest = (c.byref(options), self._deadline(timeout), c.byref(entry), c.byref(matched))
        if isinstance(data, bytes):
            self._call("larder_lookup_text", data, len(data), *rest)
        else:
            self._call("larder_lookup_tokens", data.ctypes.data, data.size, *rest)
        return entry_from(entry), matched.value

    def ls(self, namespace: Optional[str] = None, prefix: Optional[str] = None,
           timeout: Optional[float] = None) -> Iterator[Entry]:
        """All entries, those of a namespace, or those whose names start with `prefix`."""
        body: dict[str, Any] = {"limit": LS_PAGE}
        if namespace is not None:
            body["namespace"] = namespace
        if prefix is not None:
            body["prefix"] = prefix
        while True:
            page = self.call("LS", body, timeout)
            entries = [entry_from_json(j) for j in field(page, "entries", list)]
            yield from entries
            if not field(page, "more", bool) or not entries:
                return
            body["after"] = entries[-1].key

    def show(self, ref: str, *, text: bool = False, tokens: bool = False,
             timeout: Optional[float] = None) -> dict[str, Any]:
        """All that is known of an entry (the full entry of PROTOCOL.md)."""
        kind = "key" if len(ref) == 64 and set(ref) <= set("0123456789abcdef") else "name"
        answer = self.call("SHOW", {kind: ref, "text": text, "tokens": tokens}, timeout)
        return field(answer, "entry", dict)

    def rm(self, ref: str, timeout: Optional[float] = None) -> int:
        """Delete an entry; returns the bytes given back."""
        freed = c.c_uint64()
        self._call("larder_rm", _c_string(ref, "the reference"), self._deadline(timeout),
                   c.byref(freed))
        return freed.value

    def pin(self, ref: str, on: bool = True, timeout: Optional[float] = None) -> None:
        """Protect an entry from eviction, or no longer."""
        self._call("larder_pin", _c_string(ref, "the reference"), on, self._deadline(timeout))

    # ---- images

    def get(self, ref: str, *, packed: bool = False, timeout: Optional[float] = None) -> Cache:
        """Map the cache of an entry, checked. With `packed`, rows that are stored as int8 or int4
        codes come as they are (Cache.keys_f32() reads either). Use it as a context manager."""
        lease, options = Lease(), FetchOptions(packed)
        self._call("larder_fetch_with", _c_string(ref, "the reference"), c.byref(options),
                   self._deadline(timeout), c.byref(lease))
        try:  # tokens, positions and biases too: Python makes indices of them
            call("larder_image_check", lease.image.base, lease.image.n_bytes, c.byref(lease.image))
        except BaseException:
            self._release(lease)
            raise
        return Cache(self, lease)

    fetch = get  # its name in the C library

    # ---- everything else

    def status(self, timeout: Optional[float] = None) -> dict[str, Any]:
        """The daemon's state (PROTOCOL.md section 4)."""
        return self.call("STATUS", None, timeout)

    def call(self, kind: str, body: Optional[dict[str, Any]] = None,
             timeout: Optional[float] = None) -> dict[str, Any]:
        """Any request of PROTOCOL.md without a descriptor, such as call("JOBS")."""
        answer = c.c_void_p()
        raw = json.dumps(body or {}).encode()
        self._call("larder_call", _c_string(kind, "the request"), raw, -1, None, None,
                   self._deadline(timeout), c.byref(answer), None)
        try:
            return json.loads(c.string_at(answer))
        finally:
            library().larder_free(answer)
