"""Reads what samplers publish of samples that run; a hint, see luthier_core.partials."""

import contextlib
from collections.abc import AsyncIterator, Callable

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.hints import Hints
from luthier_core.partials import Partial, decode_partials

OnPartials = Callable[[list[Partial]], None]


class PartialReader:
    """Run `listen` as a task for as long as the object is used."""

    def __init__(self, client: redis.Redis) -> None:
        self._hints = Hints(client, self._on_hint)
        self._readers: dict[str, OnPartials] = {}

    @contextlib.asynccontextmanager
    async def reading(self, request_id: str, on_partials: OnPartials) -> AsyncIterator[None]:
        """Calls `on_partials` with what the sample tells from now on."""
        channel = keys.sampling_partials(request_id)
        self._readers[channel] = on_partials
        try:
            await self._hints.subscribe(channel)
            yield
        finally:
            del self._readers[channel]
            await self._hints.unsubscribe(channel)

    async def listen(self) -> None:
        """Runs for ever."""
        try:
            await self._hints.listen()
        finally:
            with contextlib.suppress(Exception):
                await self._hints.aclose()

    def _on_hint(self, channel: str, message: str) -> None:
        if on_partials := self._readers.get(channel):
            on_partials(decode_partials(message))
