"""Samples accepted here lately, so that one which Redis has lost is not waited for.

A run's client is told by its seqs. A sample stands alone: the SDK waits for it to appear among the
completions, however long. So when Redis has been another process since, what it does not know any
more is put there as a failure.
"""

import asyncio
import contextlib
import time
from collections import deque
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
    """One object for all samples of a sampling session."""
    seq: int
    digest: bytes
    at: float


class AcceptedSamples:
    """Of each sample a few hundred bytes at most, oldest first; one sent again is there twice."""

    def __init__(self, oplog: Oplog, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._oplog = oplog
        self._clock = clock
        self._recent: deque[_Accepted] = deque(maxlen=MAX_REMEMBERED)
        self._server = ""
        """The process that Redis was at the last check."""

    def note(self, sampler: SamplerRecord, seq: int, digest: str) -> None:
        """This sample was acknowledged, or is about to be."""
        now = self._clock()
        self._recent.append(_Accepted(sampler, seq, bytes.fromhex(digest), now))
        while now - self._recent[0].at >= REMEMBERED_S:
            self._recent.popleft()

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
            for accepted in list(self._recent):
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
            seq=str(accepted.seq),
            digest=accepted.digest.hex(),
            job=LOST.fields(),
            max_jobs=MAX_REMEMBERED,
            header={"base_model": sampler.base_model, "weights": sampler.weights},
        )
