"""The samples of one HTTP request: submitted, followed, and cancelled if nobody waits any more."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from luthier_core.errors import BadRequest, LuthierError, Unavailable
from luthier_core.futures import FutureId
from luthier_core.oplog import REDIS_ERRORS
from luthier_core.ops import Outcome, digest_of
from luthier_core.partials import Partial
from luthier_core.transcode import sample_json
from luthier_core.types import Sample
from luthier_gateway.backends import Backends
from luthier_gateway.futures import CANCELLED, bytes_of
from luthier_gateway.openai.partial_reader import PartialReader
from luthier_gateway.openai.samplers import Sampler
from luthier_gateway.sampling import enqueue, payload
from luthier_gateway.submit import off_loop_if_large

MAX_WAIT_S = 600.0
"""For the end of a sample: as long as the official client waits."""
RETRY_S = 1.0
"""While Redis is away."""
MAX_UNREAD = 1024
"""Messages of a stream that its client has not read; more are dropped, as they are hints."""
ALL = 2**62
"""Every position of a list of completions."""


@dataclass(frozen=True, slots=True)
class News:
    """Of the sample for prompt `index`: tokens it has generated, its end, or why it failed."""

    index: int
    what: list[Partial] | dict[str, Any] | BaseException


class Generation:
    """Samples under way, one per prompt. Made by `generating`."""

    def __init__(self, backends: Backends, partials: PartialReader, sampler: Sampler) -> None:
        self._backends = backends
        self._partials = partials
        self._sampler = sampler
        self._news: asyncio.Queue[News] = asyncio.Queue(MAX_UNREAD)
        self._reading = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._ids: list[FutureId] = []
        self._ended: set[int] = set()

    @property
    def request_id(self) -> str:
        """Of the first sample."""
        return f"{self._ids[0].parent}:{self._ids[0].seq}"

    async def submit(self, wanted: Sample, *, streams: bool) -> None:
        """Queue the sample of the next prompt; TooManyRequests if the queue is full."""
        record, seq = self._sampler.record, next(self._sampler.seqs)
        future = FutureId("sample", record.sampling_session_id, str(seq))
        index = len(self._ids)
        if streams:
            request_id = f"{future.parent}:{future.seq}"
            await self._reading.enter_async_context(
                self._partials.reading(request_id, lambda partials: self._tell(index, partials))
            )
        body = wanted.to_json()
        digest = digest_of(body)
        job = {
            "session": record.sampling_session_id,
            "tenant": record.tenant,
            "weights": record.weights,
            "streams": "1" if streams else "0",
            **(await payload(self._backends, record, seq, body, digest)).fields(),
        }
        self._ids.append(future)
        await enqueue(self._backends, record, future.seq, digest, job)

    async def results(self) -> list[dict[str, Any]]:
        """What all samples came to, as sample_json has it."""
        return await asyncio.gather(*(self._result(index) for index in range(len(self._ids))))

    def follow(self) -> None:
        """From now on `news` tells what the samples do."""
        self._tasks += [asyncio.create_task(self._follow(i)) for i in range(len(self._ids))]

    async def news(self) -> News:
        return await self._news.get()

    async def end(self) -> None:
        """Cancel what nobody waits for any more, and let go of the rest."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(*REDIS_ERRORS):
            await self._reading.aclose()
            for index, future in enumerate(self._ids):
                if index not in self._ended:
                    await self._backends.oplog.cancel(
                        future.parent, future.seq, self._sampler.record.base_model, CANCELLED
                    )
            if self._ids:
                seqs = [future.seq for future in self._ids]
                await self._backends.oplog.acknowledge(self._ids[0].parent, 0, to=ALL, seqs=seqs)

    def _tell(self, index: int, partials: list[Partial]) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._news.put_nowait(News(index, partials))

    async def _follow(self, index: int) -> None:
        try:
            await self._news.put(News(index, await self._result(index)))
        except Exception as error:
            await self._news.put(News(index, error))

    async def _result(self, index: int) -> dict[str, Any]:
        """Waits for it; BadRequest, Unavailable or another LuthierError if there is none."""
        outcome = await self._outcome(self._ids[index])
        self._ended.add(index)
        body = await bytes_of(self._backends.blobs, outcome.body)
        if outcome.failed:
            kind = BadRequest if outcome.category == "user" else LuthierError
            raise kind(body.decode())
        return await off_loop_if_large(len(body), sample_json, body)

    async def _outcome(self, future: FutureId) -> Outcome:
        """Waits, through an outage of Redis too; Unavailable after MAX_WAIT_S, or at a stop."""
        outcome = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_WAIT_S):
                while True:
                    try:
                        outcome = await self._backends.futures.wait(future, timeout_s=MAX_WAIT_S)
                        break
                    except REDIS_ERRORS:
                        await asyncio.sleep(RETRY_S)
        if outcome is None:
            raise Unavailable(f"the sampler has not answered within {MAX_WAIT_S:g} s")
        return outcome


@contextlib.asynccontextmanager
async def generating(
    backends: Backends, partials: PartialReader, sampler: Sampler
) -> AsyncIterator[Generation]:
    """A Generation to submit samples to; what of it still runs after the block is cancelled."""
    generation = Generation(backends, partials, sampler)
    try:
        yield generation
    finally:
        await generation.end()
