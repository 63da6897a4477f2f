"""One background event loop per process, and how one implementation gets its two forms.

An operation is written once, as a coroutine. Its plain name returns an APIFuture, on which a thread
calls `.result()` and a coroutine awaits; the `_async` name is derived from it by one line:

    @operation                                   # plain: returns an APIFuture
    async def get_session(self, ...) -> Session: ...

    get_session_async = value_of(get_session)    # async, returns the value

A client that is being made is awaited like a future, so `value_of` serves what creates one too.
`handle_of` makes the async form that returns the future, where it is kept (training); `waited`
makes a plain form that waits, where the documented API has no future (get_info).
"""

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from luthier.future import APIFuture
from luthier.tracing import traced

P = ParamSpec("P")
T = TypeVar("T")

_starting = threading.Lock()
_running: asyncio.AbstractEventLoop | None = None


def start(coroutine: Coroutine[Any, Any, T]) -> APIFuture[T]:
    """Runs it on the background loop. Operations of one thread begin in the order of the calls."""
    loop = background_loop()
    return APIFuture(asyncio.run_coroutine_threadsafe(coroutine, loop), loop)


def operation(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, APIFuture[T]]:
    """The plain form of an operation."""

    @functools.wraps(method)
    def plain(*args: P.args, **kwargs: P.kwargs) -> APIFuture[T]:
        return start(traced(method(*args, **kwargs)))

    return plain


def value_of(plain: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The async form that returns what the plain one brings; its cancellation is passed on."""

    @functools.wraps(plain)
    async def value(*args: P.args, **kwargs: P.kwargs) -> T:
        return await plain(*args, **kwargs)

    return value


def handle_of(plain: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The async form that returns the future, to be awaited when its result is needed."""

    @functools.wraps(plain)
    async def handle(*args: P.args, **kwargs: P.kwargs) -> T:
        return plain(*args, **kwargs)

    return handle


def waited(plain: Callable[P, APIFuture[T]]) -> Callable[P, T]:
    """The plain form that waits for the result."""

    @functools.wraps(plain)
    def wait(*args: P.args, **kwargs: P.kwargs) -> T:
        return plain(*args, **kwargs).result()

    return wait


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop of this process, running on a thread that does not keep the process alive."""
    global _running
    with _starting:
        if _running is None:
            _running = asyncio.new_event_loop()
            threading.Thread(target=_running.run_forever, name="luthier", daemon=True).start()
        return _running


def _forget() -> None:
    """A forked child has the loop's memory and not its thread: it starts its own."""
    global _running, _starting
    _running, _starting = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
