"""Jobs and entries (PROTOCOL.md section 4) as values, from the library's structs and from JSON.

The daemon may be somebody else's: fields of JSON answers are typed here before they are used,
fields that are not known are passed over.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Optional

from .errors import ProtocolViolation
from .library import CEntry, CJob

STATES = ("queued", "running", "done", "failed", "canceled")


def text_of(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Job:
    """A document on its way into the store. Numbers that are not known yet are 0, texts empty."""

    id: int
    state: str  # "queued", "running", "done", "failed", "canceled"
    key: Optional[str]  # 64 hex digits, once known
    name: str  # "namespace/name"; empty: unnamed
    model: str
    policy: str
    stage: str  # "tokenize", "calibrate", "prefill" or "store"
    layer: int  # layers finished in this stage ...
    n_layers: int  # ... of so many
    n_ctx: int  # tokens
    stored_already: bool  # nothing was computed
    prefill_ms: int
    elapsed_ms: int
    code: int  # of a failed job: its status ...
    message: str  # ... and the line that says why

    @property
    def finished(self) -> bool:
        return self.state in ("done", "failed", "canceled")


def job_from(c: CJob) -> Job:
    return Job(c.id, STATES[c.state], bytes(c.key).hex() if c.has_key else None, text_of(c.name),
               text_of(c.model), text_of(c.policy), text_of(getattr(c, "pass")), c.layer,
               c.n_layers, c.n_ctx, bool(c.stored_already), c.prefill_ms, c.elapsed_ms, c.code,
               text_of(c.message))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A stored document. Sizes are bytes, counts tokens or rows, `created` Unix seconds."""

    key: str
    name: str  # "namespace/name"; empty: unnamed
    model: str
    policy: str
    precision: str  # of the stored rows: "bf16", "int8", "int4"
    n_ctx: int  # tokens of the document
    next_pos: int  # where decoding continues
    sel_layer: Optional[int]  # selection layer of the policy; None: no cut
    full_bytes: int  # the whole document's rows in bf16
    image_bytes: int  # of the image in bf16
    stored_bytes: int  # on disk
    rows_total: int  # rows kept, over all layers and KV heads
    created: int
    prefill_ms: int
    hits: int
    pinned: bool
    damaged: bool  # failed verification: it is not served


def entry_from(c: CEntry) -> Entry:
    return Entry(bytes(c.key).hex(), text_of(c.name), text_of(c.model), text_of(c.policy),
                 text_of(c.precision), c.n_ctx, c.next_pos,
                 None if c.sel_layer < 0 else c.sel_layer, c.full_bytes, c.image_bytes,
                 c.stored_bytes, c.rows_total, c.created, c.prefill_ms, c.hits, bool(c.pinned),
                 bool(c.damaged))


def field(answer: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A field of an answer, of this type; ProtocolViolation if it is another or missing."""
    value = answer.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProtocolViolation("larderd's answer has no %s '%s'" % (kind.__name__, name))
    return value


def entry_from_json(j: Any) -> Entry:
    if not isinstance(j, dict):
        raise ProtocolViolation("larderd's answer has something else in place of an entry")
    numbers = {n: field(j, n, int, 0) for n in ("full_bytes", "image_bytes", "stored_bytes",
                                                "rows_total", "created", "prefill_ms", "hits")}
    layer = None if j.get("sel_layer") is None else field(j, "sel_layer", int)
    return Entry(key=field(j, "key", str), name=field(j, "name", str, ""),
                 model=field(j, "model", str, ""), policy=field(j, "policy", str, ""),
                 precision=field(j, "precision", str, ""), n_ctx=field(j, "n_ctx", int),
                 next_pos=field(j, "next_pos", int), sel_layer=layer,
                 pinned=field(j, "pinned", bool, False), damaged=field(j, "damaged", bool, False),
                 **numbers)
