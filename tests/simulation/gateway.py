"""The gateways: they admit ops by `protocol.submit` and answer polls."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.redis_server import Redis
from tests.simulation.store import ObjectStore
from tests.simulation.toy import ToyOp
from tests.simulation.world import (
    LOST,
    Call,
    Coroutine,
    Process,
    Server,
    Signal,
    Sleep,
    Wait,
    World,
)

from luthier_core import protocol
from luthier_core.ops import Body, Outcome
from luthier_core.protocol import Admit, Announce, PutPayload, Request, Steps

NUM_TRIES = 6
HOLD_S = 5.0
STATUS = {"OK": 200, "DUP": 200, "BUSY": 429, "FAR": 429, "NORUN": 404, "REFUSED": 422}
"""Of an admission; every other refusal is final."""


class BackendAway(Exception):
    """Redis or the store did not answer for a while: 503, the client tries again."""


def drive(steps: Steps[Any], perform: Callable[[Any], Coroutine[Any]]) -> Coroutine[Any]:
    """Carry out the effects of a protocol generator; what it returns."""
    answer = None
    while True:
        try:
            effect = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = yield from perform(effect)


@dataclass(frozen=True, slots=True)
class Polled:
    """The answer to a poll: 200 with the outcome's bytes, 408 try again, 410, 404 or 503."""

    status: int
    outcome: Outcome | None = None
    body: bytes = b""


@dataclass(slots=True)
class Gateway:
    world: World
    process: Process
    redis: Redis
    store: ObjectStore
    store_server: Server
    submit: Callable[[Request], Steps[Any]] = protocol.submit
    news: dict[str, Signal] = field(default_factory=dict)

    def post(self, op: ToyOp) -> Coroutine[int]:
        """The HTTP status: nothing but 200 means that the op was accepted."""
        request = Request(
            run_id=op.run_id,
            seq=op.seq,
            kind=op.kind,
            digest=op.digest,
            body=op.body,
            payload_key=f"runs/{op.run_id}/ops/{op.seq}-{op.digest[:12]}",
            problem=op.problem,
        )
        try:
            admission = yield from drive(self.submit(request), self._perform)
        except BackendAway:
            return 503
        return STATUS.get(admission.status, 400)

    def poll(self, run_id: str, seq: int) -> Coroutine[Polled]:
        """Hold the poll until the outcome is there, for HOLD_S at most."""
        deadline = self.world.now + HOLD_S
        try:
            while True:
                outcome = yield from self._redis("training_outcome", run_id, seq)
                if outcome is None and (gone := (yield from self._gone(run_id, seq))):
                    return gone
                if outcome is not None:
                    body = yield from self._bytes_of(outcome.body)
                    return Polled(200, outcome, body)
                if self.world.now >= deadline:
                    return Polled(408)
                yield Wait(self.news.setdefault(run_id, Signal()), 2.0)
        except BackendAway:
            return Polled(503)

    def told(self, run_id: str, seq: int) -> Coroutine[None]:
        """After an error was delivered; it may be lost, as the gateway may die first."""
        try:
            yield from self._redis("told", run_id, seq)
        except BackendAway:
            return

    def _gone(self, run_id: str, seq: int) -> Coroutine[Polled | None]:
        header = yield from self._redis("header", run_id)
        if header is None:
            return Polled(404)
        if seq > header.admitted and not (yield from self._redis("is_parked", run_id, seq)):
            # Between the two reads it may have left the parking for the log.
            header = yield from self._redis("header", run_id)
            if header is None or seq > header.admitted:
                return Polled(410)
        if seq <= header.committed:
            outcome = yield from self._redis("training_outcome", run_id, seq)
            return None if outcome else Polled(410)
        if not (yield from self._redis("is_live", header.owner)):
            yield from self._redis("announce", run_id)
        return None

    def _perform(self, effect: Any) -> Coroutine[Any]:
        match effect:
            case PutPayload(key, data):
                return (yield from self._store("put", key, data))
            case Admit(op):
                return (yield from self._redis("admit", op))
            case Announce(run_id):
                return (yield from self._redis("announce", run_id))
        raise TypeError(effect)

    def _bytes_of(self, body: Body) -> Coroutine[bytes]:
        if body.inline is not None:
            return body.inline
        data = yield from self._store("get", body.key)
        return data or b""

    def _redis(self, name: str, *args: Any) -> Coroutine[Any]:
        return self._tried(lambda: self.redis.call(name, *args))

    def _store(self, name: str, *args: Any) -> Coroutine[Any]:
        do = getattr(self.store, name)
        return self._tried(lambda: Call(self.store_server, lambda: do(*args)))

    def _tried(self, call: Callable[[], Call]) -> Coroutine[Any]:
        for _ in range(NUM_TRIES):
            answer = yield call()
            if answer is not LOST:
                return answer
            yield Sleep(0.2 + self.world.rng.random())
        raise BackendAway
