"""The state of a request_id, and waiting for it without polling.

A future is no record of its own: ids are arithmetic, and the state follows from the run's header
and the outcome. A worker's commit publishes a hint on a channel; whoever waits reads the outcome
then. A lost hint costs at most one re-check interval.
"""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar, cast

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.hints import Hints
from luthier_core.oplog import REDIS_ERRORS, Completion, Oplog
from luthier_core.ops import Outcome

T = TypeVar("T")

_REQUEST_ID = re.compile(r"([0-9a-zA-Z_-]{1,64}):(train|sample):(\d{1,10}):(\d{1,19})")
_QUEUED = b"queued"
_ANY = "*"
"""Stands for every seq of a sampling session: whoever waits for its completions."""
_LINGER_RECHECKS = 15
"""A channel without waiters stays subscribed for this many re-checks."""


@dataclass(frozen=True, slots=True)
class FutureId:
    """A request_id taken apart: `{run or sampling session}:{seq}`."""

    kind: Literal["train", "sample"]
    parent: str
    """The run id or the sampling session id."""
    seq: str

    @classmethod
    def parse(cls, request_id: str) -> Self | None:
        """None if no id of ours looks like that."""
        match = _REQUEST_ID.fullmatch(request_id)
        if match is None:
            return None
        session_id, kind, index, seq = match.groups()
        return cls(cast(Any, kind), f"{session_id}:{kind}:{index}", seq)

    @property
    def outcome_key(self) -> str:
        if self.kind == "train":
            return keys.run_outcome(self.parent, self.seq)
        return keys.sampling_outcome(self.parent, self.seq)

    @property
    def channel(self) -> str:
        if self.kind == "train":
            return keys.run_done(self.parent)
        return keys.sampling_done(self.parent)


@dataclass(slots=True)
class _Waiting:
    """Who waits for one outcome."""

    outcome_key: str
    events: set[asyncio.Event] = field(default_factory=set)


class Futures:
    """Waits for outcomes on behalf of many long polls of one process.

    Run `listen()` as a task for as long as the object is used.
    """

    def __init__(self, client: redis.Redis, *, recheck_s: float) -> None:
        self._redis = client
        self._recheck_s = recheck_s
        self._oplog = Oplog(client)
        self._hints = Hints(client, self._on_hint)
        self._idle_rechecks: Counter[str] = Counter()
        self._waiting: dict[tuple[str, str], _Waiting] = {}
        self._ending = False

    async def outcome(self, future: FutureId) -> Outcome | None:
        """The outcome if it is there, else None."""
        fields = await cast(Any, self._redis.hgetall(future.outcome_key))
        if not fields or fields.get(b"state") == _QUEUED:
            return None
        return Outcome.from_fields(fields)

    async def wait(self, future: FutureId, *, timeout_s: float) -> Outcome | None:
        """The outcome, or None after timeout_s: the caller answers try_again."""
        return await self._wait_for(
            (future.channel, future.seq),
            future.outcome_key,
            lambda: self.outcome(future),
            timeout_s,
        )

    async def wait_completions(
        self, sampling_session_id: str, clone: int, *, after: int, timeout_s: float
    ) -> list[Completion]:
        """Samples of this clone that ended after that position; [] after timeout_s."""

        async def look() -> list[Completion] | None:
            found = await self._oplog.completions(sampling_session_id, clone, after=after)
            return found or None

        # First: what is there needs no hint, which a Redis that comes and goes may never confirm.
        if (found := await look()) or timeout_s <= 0:
            return found or []
        key = (keys.sampling_done(sampling_session_id), _ANY)
        return await self._wait_for(key, "", look, timeout_s) or []

    async def _wait_for(
        self,
        key: tuple[str, str],
        outcome_key: str,
        look: Callable[[], Awaitable[T | None]],
        timeout_s: float,
    ) -> T | None:
        """What `look` finds, looking again at each hint for `key`; None after timeout_s."""
        event = asyncio.Event()
        waiting = self._waiting.setdefault(key, _Waiting(outcome_key))
        waiting.events.add(event)
        try:
            async with asyncio.timeout(timeout_s):
                # Subscribe, then look, then wait: what is stored in between is never missed.
                await self._hints.subscribe(key[0])
                while (found := await look()) is None and not self._ending:
                    await event.wait()
                    event.clear()
                return found
        except TimeoutError:
            return None
        finally:
            waiting.events.discard(event)
            if not waiting.events:
                self._waiting.pop(key, None)

    def end_waits(self) -> None:
        """From now on nobody waits: who does gets None at once. For a process that stops."""
        self._ending = True
        for key in self._waiting:
            self._notify(key)

    @property
    def num_waiting(self) -> int:
        return sum(len(waiting.events) for waiting in self._waiting.values())

    async def listen(self) -> None:
        """Turn hints into wake-ups, and re-check all waiters at an interval; runs for ever."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._hints.listen())
                tasks.create_task(self._recheck())
        finally:
            with contextlib.suppress(Exception):
                await self._hints.aclose()

    def _on_hint(self, channel: str, seq: str) -> None:
        self._notify((channel, seq))
        self._notify((channel, _ANY))

    def _notify(self, key: tuple[str, str]) -> None:
        if waiting := self._waiting.get(key):
            for event in waiting.events:
                event.set()

    async def _recheck(self) -> None:
        while True:
            await asyncio.sleep(self._recheck_s)
            with contextlib.suppress(*REDIS_ERRORS):
                await self._notify_the_done()
                await self._drop_idle_channels()

    async def _notify_the_done(self) -> None:
        """Look for every outcome that somebody waits for, in one round trip."""
        for key in [key for key in self._waiting if key[1] == _ANY]:
            self._notify(key)
        waiting = {key: item for key, item in self._waiting.items() if key[1] != _ANY}
        pipe = self._redis.pipeline(transaction=False)
        for item in waiting.values():
            pipe.hexists(item.outcome_key, "size")  # every outcome has it, no queued sample does
        for key, done in zip(waiting, await pipe.execute() if waiting else (), strict=True):
            if done:
                self._notify(key)

    async def _drop_idle_channels(self) -> None:
        waited_for = {channel for channel, _ in self._waiting}
        for channel in self._hints.channels:
            if channel in waited_for:
                self._idle_rechecks.pop(channel, None)
                continue
            self._idle_rechecks[channel] += 1
            if self._idle_rechecks[channel] > _LINGER_RECHECKS:
                del self._idle_rechecks[channel]
                await self._hints.unsubscribe(channel)
