"""APIFuture: the result of a request that has been started. Await it, or call .result()."""

import asyncio
import concurrent.futures
from collections.abc import Generator
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class APIFuture(Generic[T]):
    """The result of a request, from whichever side it is needed.

    A thread calls `.result()`; a coroutine awaits the future itself. Both may be done any number of
    times. It raises what the request raised: RequestFailedError if it was executed and failed,
    APIError if it got no good answer.
    """

    def __init__(
        self, future: concurrent.futures.Future[T], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._future = future
        self._loop = loop

    def result(self, timeout: float | None = None) -> T:
        """Waits for the result, at most `timeout` seconds; TimeoutError does not end the request.

        Ctrl-C while waiting cancels it. RuntimeError on the thread of the client itself, which
        would wait for ever.
        """
        if not self._future.done() and _on_loop(self._loop):
            raise RuntimeError("this would wait for itself: use await")
        try:
            return self._future.result(timeout)
        except KeyboardInterrupt:
            self.cancel()
            raise

    async def result_async(self, timeout: float | None = None) -> T:
        """Like .result(), for coroutines; timeout in seconds.

        Cancelling the waiting task cancels the request.
        """
        inner = asyncio.wrap_future(self._future)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(inner)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._future.done()

    def cancel(self) -> bool:
        """Gives the request up; False if it is done.

        A sample is cancelled at the server too. A training request that has been sent is executed
        all the same, because those after it count on it; only its result is not waited for.
        """
        return self._future.cancel()

    def future(self) -> concurrent.futures.Future[T]:
        """The standard future, for concurrent.futures.wait, as_completed or add_done_callback."""
        return self._future

    async def coroutine(self) -> T:
        """This future as a coroutine, for asyncio.create_task."""
        return await self

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()


class Opening(Generic[T]):
    """A client that is being made: it may be used at once, or waited for like a future of itself.

    What is asked of it before it is ready is sent when it is. T is what names it on the server.
    """

    def __init__(self, opening: APIFuture[T]) -> None:
        self._opening = opening

    def result(self, timeout: float | None = None) -> Self:
        """This client once it is ready, or the error that prevents it."""
        self._opening.result(timeout)
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        """Like .result(), for coroutines."""
        await self._opening.result_async(timeout)
        return self

    def done(self) -> bool:
        """Whether it is ready, or has failed to be."""
        return self._opening.done()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.result_async().__await__()

    async def _opened(self) -> T:
        """What names it, once it is ready; raises what prevents it."""
        if self._opening.done():
            return self._opening.result()
        return await asyncio.shield(asyncio.wrap_future(self._opening.future()))


def _on_loop(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
