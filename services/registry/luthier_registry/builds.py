"""Work that may outlast the request that asks for it: the next request finds it further on."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from luthier_core.errors import TooManyRequests, Unavailable

log = logging.getLogger(__name__)

WAIT_S = 8.0
"""A call waits this long: the gateway gives up after 15 s."""
MAX_AT_ONCE = 8


class Builds:
    """Work under way in this process, by what it makes. The end of the `async with` cancels it."""

    def __init__(self, *, wait_s: float = WAIT_S) -> None:
        self._wait_s = wait_s
        self._tasks: dict[str, asyncio.Future[None]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self, key: str, work: Callable[[], Awaitable[None]]) -> None:
        """Returns once `work` is done, whoever began it; what it raises is raised here.

        Unavailable if that takes longer than a call waits; TooManyRequests if no more can begin.
        """
        task = self._tasks.get(key)
        if task is None:
            if len(self._tasks) >= MAX_AT_ONCE:
                raise TooManyRequests("too many archives and copies are being made")
            task = self._tasks[key] = asyncio.ensure_future(work())
            task.add_done_callback(lambda done: self._forget(key, done))
        done, _ = await asyncio.wait({task}, timeout=self._wait_s)
        if not done:
            raise Unavailable("it is still being made")
        task.result()

    def _forget(self, key: str, task: asyncio.Future[None]) -> None:
        del self._tasks[key]
        if not task.cancelled() and (error := task.exception()):
            log.warning("making %s failed: %r", key, error)
