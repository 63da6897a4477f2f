"""Op and Outcome: what travels on a stream, and how both are written as Redis fields.

An op of a training run is ordered by its seq; a sampling job has no order. Bytes up to INLINE_LIMIT
travel in the entry; larger ones lie in the object store and the entry carries key, size and sha256.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Any, Literal, Self, cast

from luthier_core.errors import Category, LuthierError

INLINE_LIMIT = 16 * 1024
"""Bytes of a payload or outcome that travel inside Redis (reliability 2.4)."""


class Kind(StrEnum):
    """What an op does. `rejected` is a refused request: it uses up its seq and fails."""

    CREATE_MODEL = "create_model"
    FORWARD_BACKWARD = "forward_backward"
    FORWARD = "forward"
    OPTIM_STEP = "optim_step"
    SAVE_WEIGHTS = "save_weights"
    SAVE_WEIGHTS_FOR_SAMPLER = "save_weights_for_sampler"
    SAVE_WEIGHTS_EXTERNAL = "save_weights_external"
    LOAD_WEIGHTS = "load_weights"
    REJECTED = "rejected"
    SAMPLE = "sample"


class Gradient(StrEnum):
    """What an op's end means for the gradient that is being summed."""

    KEPT = "kept"
    LOST = "lost"
    """Its part is missing: no optimizer step may apply the rest before the client knows."""
    CLEARED = "cleared"


def digest_of(body: bytes) -> str:
    """The sha256 of a request's canonical bytes, in hex: what dedupe compares."""
    return sha256(body).hexdigest()


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes of a payload or outcome: here, or in the object store under `key`."""

    inline: bytes | None = None
    key: str = ""
    num_bytes: int = 0
    sha256: str = ""

    @classmethod
    def of(cls, data: bytes) -> Self:
        """An inline body."""
        return cls(inline=data, num_bytes=len(data))

    @classmethod
    def stored(cls, key: str, data: bytes) -> Self:
        """A body that the caller has put into the object store under `key`."""
        return cls(key=key, num_bytes=len(data), sha256=digest_of(data))

    def checked(self, data: bytes) -> bytes:
        """`data` as read from `key`; LuthierError unless it is what was put there."""
        if digest_of(data) != self.sha256:
            raise LuthierError(f"stored bytes have changed: {self.key} has another sha256")
        return data

    def fields(self) -> dict[str, str | bytes]:
        if self.inline is not None:
            return {"body": self.inline, "size": str(self.num_bytes)}
        return {"key": self.key, "size": str(self.num_bytes), "sha": self.sha256}

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> Self:
        size = int(fields.get(b"size", b"0"))
        if b"body" in fields:
            return cls(inline=fields[b"body"], num_bytes=size)
        return cls(
            key=fields.get(b"key", b"").decode(),
            num_bytes=size,
            sha256=fields.get(b"sha", b"").decode(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One ordered request of a run, as its log holds it."""

    run_id: str
    seq: int
    kind: Kind
    digest: str
    body: Body
    told: int = -1
    """The loss of any gradient up to this seq was known to the client when this op was admitted."""
    trace: str = ""
    """What tracing.carried gave for the request."""
    admitted_ms: int = field(default=0, compare=False)
    """When it was admitted or parked, in ms since the epoch; 0 before."""

    def fields(self) -> dict[str, str | bytes]:
        """Fields of the stream entry, but for what stands in it only once it is admitted."""
        traced = {"trace": self.trace} if self.trace else {}
        return {"kind": self.kind.value, "digest": self.digest, **self.body.fields(), **traced}

    @classmethod
    def from_entry(cls, run_id: str, entry_id: bytes, fields: Mapping[bytes, bytes]) -> Self:
        seq = int(entry_id.split(b"-")[0])
        return cls(
            run_id=run_id,
            seq=seq,
            kind=Kind(fields[b"kind"].decode()),
            digest=fields[b"digest"].decode(),
            body=Body.from_fields(fields),
            told=int(fields.get(b"told", b"-1")),
            trace=fields.get(b"trace", b"").decode(),
            admitted_ms=int(fields.get(b"at", b"0")),
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """Body of a `rejected` op: what was asked, and why it is refused."""

    kind: Kind
    message: str

    def body(self) -> Body:
        return Body.of(json.dumps({"kind": self.kind, "message": self.message}).encode())

    @classmethod
    def of_op(cls, op: Op) -> Self:
        """The refusal that a rejected op carries; it is always inline."""
        assert op.body.inline is not None
        fields = json.loads(op.body.inline)
        return cls(Kind(fields["kind"]), fields["message"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an op ended. `failed` carries a message for the user and whose fault it was."""

    state: str
    """completed | failed | cancelled"""
    body: Body = Body(inline=b"")
    encoding: Literal["json", "protobuf", "text"] = "json"
    """What the bytes of the body are; the message of a failure is text."""
    category: Category = "unknown"
    metrics: str = ""
    """JSON of what is kept of a training op when its outcome no longer is."""
    usage: str = ""
    """Of a sample: a SampleUse."""

    @property
    def failed(self) -> bool:
        return self.state != "completed"

    @classmethod
    def completed(
        cls,
        body: Body,
        encoding: Literal["json", "protobuf"] = "json",
        *,
        metrics: str = "",
        usage: str = "",
    ) -> Self:
        return cls(state="completed", body=body, encoding=encoding, metrics=metrics, usage=usage)

    @classmethod
    def failure(cls, message: str, category: Category) -> Self:
        body = Body.of(message.encode())
        return cls(state="failed", body=body, encoding="text", category=category)

    def fields(self) -> dict[str, str | bytes]:
        more = {"metrics": self.metrics, "usage": self.usage}
        return {
            "state": self.state,
            "encoding": self.encoding,
            "category": self.category,
            **{name: value for name, value in more.items() if value},
            **self.body.fields(),
        }

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> Self:
        category = fields.get(b"category", b"unknown").decode()
        return cls(
            state=fields[b"state"].decode(),
            encoding=cast(Any, fields.get(b"encoding", b"json").decode()),
            category=cast(Category, category),
            metrics=fields.get(b"metrics", b"").decode(),
            usage=fields.get(b"usage", b"").decode(),
            body=Body.from_fields(fields),
        )


SEQS_PER_CLONE = 10**9


def clone_of(seq: int | str) -> int:
    """The clone of a sampling session that counts this seq (wire protocol 6.2)."""
    return int(seq) // SEQS_PER_CLONE


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingJob:
    """One sampling request on the stream of its base model."""

    entry_id: bytes
    sampling_session_id: str
    seq: str
    """A string: sampling seqs reach 10^18, and Lua loses digits above 2^53."""
    clone: int
    """Which handle of the sampling session sent it: its completions are listed apart."""
    tenant: str
    weights: str
    """Object key of the checkpoint manifest whose adapter samples; empty for the base model."""
    body: Body
    """JSON of the asample request."""
    inflight_run: str = ""
    """Run whose newest in-flight weights sample, also in mid-generation, instead of `weights`."""
    streams: bool = False
    """Somebody reads its tokens while it runs."""
    trace: str = ""
    """What tracing.carried gave for the request."""

    @property
    def request_id(self) -> str:
        return f"{self.sampling_session_id}:{self.seq}"

    @classmethod
    def from_entry(cls, entry_id: bytes, fields: Mapping[bytes, bytes]) -> Self:
        return cls(
            entry_id=entry_id,
            sampling_session_id=fields[b"session"].decode(),
            seq=fields[b"seq"].decode(),
            clone=int(fields[b"clone"]),
            tenant=fields[b"tenant"].decode(),
            weights=fields[b"weights"].decode(),
            body=Body.from_fields(fields),
            inflight_run=fields.get(b"inflight_run", b"").decode(),
            streams=fields.get(b"streams") == b"1",
            trace=fields.get(b"trace", b"").decode(),
        )
