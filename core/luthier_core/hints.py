"""Hints over sharded pub/sub: something is new here. They may be lost; who needs them re-checks.

One connection of a process carries all its channels.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio as redis

from luthier_core.oplog import REDIS_ERRORS

CONFIRM_TIMEOUT_S = 2.0
RECONNECT_PAUSE_S = 0.2


@dataclass(slots=True)
class _Asked:
    """A subscription that the server was asked for."""

    confirmed: asyncio.Event = field(default_factory=asyncio.Event)
    at: float = field(default_factory=time.monotonic)

    @property
    def is_lost(self) -> bool:
        """After a lost connection redis-py repeats those that it knows of: not one just sent."""
        return not self.confirmed.is_set() and time.monotonic() - self.at > CONFIRM_TIMEOUT_S


class Hints:
    """Channels of one process. Run `listen` as a task for as long as the object is used."""

    def __init__(self, client: redis.Redis, on_hint: Callable[[str, str], None]) -> None:
        """`on_hint(channel, text)` is called for each message, on the event loop."""
        self._pubsub = client.pubsub()
        self._on_hint = on_hint
        self._asked: dict[str, _Asked] = {}
        self._connected = asyncio.Event()

    @property
    def channels(self) -> set[str]:
        return set(self._asked)

    async def subscribe(self, channel: str) -> None:
        """Returns once the server has confirmed, or after CONFIRM_TIMEOUT_S while Redis is away."""
        asked = self._asked.get(channel)
        if asked is None or asked.is_lost:
            asked = self._asked[channel] = _Asked()
            try:
                await self._pubsub.ssubscribe(channel)
            except BaseException:
                self._asked.pop(channel, None)
                raise
            self._connected.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                await asked.confirmed.wait()

    async def unsubscribe(self, channel: str) -> None:
        if self._asked.pop(channel, None) is not None:
            with contextlib.suppress(*REDIS_ERRORS):
                await self._pubsub.sunsubscribe(channel)

    async def listen(self) -> None:
        """Deliver hints for ever; after a lost connection the client subscribes again by itself."""
        await self._connected.wait()
        while True:
            try:
                message = await self._pubsub.get_message(timeout=None)
            except REDIS_ERRORS:
                await asyncio.sleep(RECONNECT_PAUSE_S)
                continue
            if message is not None:
                self._deliver(message)

    async def aclose(self) -> None:
        with contextlib.suppress(*REDIS_ERRORS):
            await self._pubsub.aclose()  # type: ignore[no-untyped-call]

    def _deliver(self, message: dict[str, Any]) -> None:
        channel = message["channel"].decode()
        if message["type"] == "ssubscribe" and channel in self._asked:
            self._asked[channel].confirmed.set()
        elif message["type"] == "smessage":
            self._on_hint(channel, message["data"].decode())
