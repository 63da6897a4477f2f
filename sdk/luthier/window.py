"""How many requests of one kind may be on their way at once, learnt from the server's 429s."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Window:
    """A semaphore whose size adapts: a 429 halves it, a full window of successes adds one.

    Whoever waits gets its turn in order. Used on one event loop.
    """

    def __init__(self, initial: int, least: int, most: int) -> None:
        self._size = float(initial)
        self._least = least
        self._most = most
        self._in_use = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._paused_until = 0.0

    @property
    def size(self) -> int:
        return int(self._size)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One place in the window."""
        await self._enter()
        try:
            yield
        finally:
            self._in_use -= 1
            self._wake()

    def succeeded(self) -> None:
        """The server took a request."""
        self._size = min(self._size + 1 / self._size, self._most)

    def refused(self, pause_s: float) -> None:
        """The server has no room: fewer at once, and none for pause_s. One burst counts once."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._paused_until:
            self._size = max(self._size / 2, self._least)
        self._paused_until = max(self._paused_until, loop.time() + pause_s)
        loop.call_at(self._paused_until, self._wake)

    async def _enter(self) -> None:
        if not self._waiting and self._has_room():
            self._in_use += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # woken and cancelled at once: pass it on
                self._in_use -= 1
                self._wake()
            raise

    def _has_room(self) -> bool:
        now = asyncio.get_running_loop().time()
        return self._in_use < int(self._size) and now >= self._paused_until

    def _wake(self) -> None:
        while self._waiting and self._has_room():
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_use += 1
                turn.set_result(None)
