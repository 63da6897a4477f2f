"""SamplerEngine: what a worker asks of an engine; EngineThread: the torch engine behind it."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from luthier_core.failpoints import failpoint
from luthier_core.oplog import Published
from luthier_sampler.engine import Engine, Finished
from luthier_sampler.sequence import SampleRequest

T = TypeVar("T")

ReadFiles = Callable[[str], Awaitable[dict[str, bytes]]]
"""The files of the adapter of that key, from the store."""


class SamplerEngine(Protocol):
    """Requests in, finished requests out, on one event loop.

    An adapter's key names immutable weights. What an engine does not have of them it asks
    `read_files` for.
    """

    async def add(self, spec: SampleRequest, read_files: ReadFiles) -> None:
        """Queue a request; step() answers every one that this takes. LuthierError if it is refused.

        A request_id that is already here is not run twice.
        """

    async def step(self) -> tuple[list[Finished], dict[str, str]]:
        """Waits for something new: requests that ended, and request_id -> message of new tokens."""

    def cancel(self, request_id: str) -> None:
        """Drop a request and free what it holds; nothing is reported of it. Fine if not here."""

    async def move(self, run_id: str, newest: Published, read_files: ReadFiles) -> None:
        """Requests that follow the run's in-flight weights go on with these, never back."""

    async def forget_runs(self, in_use: Collection[str]) -> None:
        """No request follows another run any more."""

    async def close(self) -> None:
        """Ends it, with everything that it holds."""


@dataclass(frozen=True, slots=True)
class _News:
    """What the steps since the last news gave, and the news after it where there is work left."""

    finished: list[Finished]
    partials: dict[str, str]
    following: "Future[_News] | None"


class EngineThread:
    """The torch engine on a thread of its own: nothing of it blocks the loop, nor it the steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._work = asyncio.Event()
        self._next: Future[_News] | None = None
        """What step() tells next; None while there is nothing to do."""
        self._inflight: dict[str, Published] = {}
        """Run -> the in-flight weights that its requests here run with; the thread's."""
        self._adapter_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Of the versions that are being loaded; others go by themselves."""

    async def add(self, spec: SampleRequest, read_files: ReadFiles) -> None:
        await self._with_adapter(spec.adapter, read_files, self._engine.add, spec)
        self._work.set()

    async def step(self) -> tuple[list[Finished], dict[str, str]]:
        while self._next is None and not self._engine.has_work:
            self._work.clear()
            await self._work.wait()
        await failpoint("sm.gen")
        news = await asyncio.wrap_future(self._next or self._begin_steps())
        self._next = news.following
        return news.finished, news.partials

    def cancel(self, request_id: str) -> None:
        self._thread.submit(self._engine.cancel, request_id)

    async def move(self, run_id: str, newest: Published, read_files: ReadFiles) -> None:
        await self._with_adapter(newest.manifest_key, read_files, self._move, run_id, newest)

    async def forget_runs(self, in_use: Collection[str]) -> None:
        await self._call(self._forget_runs, in_use)

    async def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin_steps(self) -> Future[_News]:
        news: Future[_News] = Future()
        self._thread.submit(self._step, news)
        return news

    async def _call(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    async def _with_adapter(
        self, key: str, read_files: ReadFiles, call: Callable[..., None], *args: Any
    ) -> None:
        """call(*args) on the engine's thread, where the adapter is loaded when it begins."""

        def attempt(files: dict[str, bytes] | None) -> bool:
            # In one go with the call, so that the adapter cannot be evicted in between.
            if files is not None:
                self._engine.add_adapter(key, files)
            elif key and not self._engine.has_adapter(key):
                return False
            call(*args)
            return True

        if await self._call(attempt, None):
            return
        # One load for all who wait for the same adapter.
        async with self._adapter_locks.setdefault(key, asyncio.Lock()):
            if not await self._call(attempt, None):
                await self._call(attempt, await read_files(key))

    # --- on the thread ----------------------------------------------------------------------------

    def _step(self, news: Future[_News]) -> None:
        """One step, and on to the next without the loop, which may be busy and is not woken for
        nothing; but behind the calls that wait for the thread."""
        try:
            finished, partials = self._engine.step(), self._engine.partials()
        except BaseException as error:
            news.set_exception(error)
            return
        has_work = self._engine.has_work
        if has_work and not finished and not partials:
            self._thread.submit(self._step, news)
        else:
            news.set_result(_News(finished, partials, self._begin_steps() if has_work else None))

    def _move(self, run_id: str, newest: Published) -> None:
        current = self._inflight.get(run_id)
        if current is None or current <= newest:
            self._engine.move(run_id, newest.manifest_key)
            self._inflight[run_id] = newest

    def _forget_runs(self, in_use: Collection[str]) -> None:
        for run_id in self._inflight.keys() - in_use:
            del self._inflight[run_id]
