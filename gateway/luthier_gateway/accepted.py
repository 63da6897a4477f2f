"""Samples accepted here lately, so that one which Redis has lost is not waited for.

A run's client is told by its seqs. A sample stands alone: the SDK waits for it to appear among the
completions, however long. So when Redis has been another process since, what it does not know any
more is put there as a failure.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from luthier_core import keys
from luthier_core.oplog import REDIS_ERRORS, Oplog
from luthier_core.ops import Outcome
from luthier_core.records import SamplerRecord

REMEMBERED_S = 600.0
"""Longer than any restart takes in which Redis loses something."""
MAX_REMEMBERED = 20_000
LOST = Outcome.failure("the request was lost when Redis lost what it had accepted", "server")


@dataclass(frozen=True, slots=True)
class _Accepted:
    sampler: SamplerRecord
    seq: str
    digest: str
    at: float


class AcceptedSamples:
    """By request id, oldest first."""

    def __init__(self, oplog: Oplog, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._oplog = oplog
        self._clock = clock
        self._recent: OrderedDict[str, _Accepted] = OrderedDict()
        self._server = ""
        """The process that Redis was at the last check."""

    def note(self, sampler: SamplerRecord, seq: str, digest: str) -> None:
        """This sample was acknowledged, or is about to be."""
        accepted = _Accepted(sampler, seq, digest, self._clock())
        self._recent[f"{sampler.sampling_session_id}:{seq}"] = accepted
        while self._recent:
            oldest = next(iter(self._recent.values()))
            young = self._clock() - oldest.at < REMEMBERED_S
            if young and len(self._recent) <= MAX_REMEMBERED:
                break
            self._recent.popitem(last=False)

    async def keep_looking(self, every_s: float) -> None:
        """Check again and again, for ever."""
        while True:
            await asyncio.sleep(every_s)
            with contextlib.suppress(*REDIS_ERRORS):
                await self.check()

    async def check(self) -> None:
        """Fail what Redis has lost since the last check; redis errors pass through."""
        server = await self._oplog.server_id(keys.GENERATION)
        if self._server not in ("", server):
            for accepted in list(self._recent.values()):
                session = accepted.sampler.sampling_session_id
                if not await self._oplog.redis.exists(keys.sampling_outcome(session, accepted.seq)):
                    await self._fail(accepted)
        self._server = server

    async def _fail(self, accepted: _Accepted) -> None:
        sampler = accepted.sampler
        await self._oplog.enqueue(
            tenant=sampler.tenant,
            base_model=sampler.base_model,
            sampling_session_id=sampler.sampling_session_id,
            seq=accepted.seq,
            digest=accepted.digest,
            job=LOST.fields(),
            max_jobs=MAX_REMEMBERED,
            header={"base_model": sampler.base_model, "weights": sampler.weights},
        )
