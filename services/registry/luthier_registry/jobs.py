"""Housekeeping: named jobs that bring what is there in line with what should be.

Each looks at the whole state and may be run at any time, twice at once, or not at all for a while:
a job that was lost or doubled changes nothing, the next run finds what is left to do. So nothing
has to be queued reliably, and a schedule is all there is.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import redis.asyncio as redis

from luthier_core.errors import LuthierError
from luthier_core.oplog import REDIS_ERRORS

log = logging.getLogger(__name__)

STATES = "jobs"
"""Hash name -> JSON of the last run."""
LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """What to do, and how often; None: only when asked for."""

    every_s: float | None
    run: Callable[[], Awaitable[Mapping[str, int]]]


class Jobs:
    """The jobs of one deployment."""

    def __init__(
        self, client: redis.Redis, jobs: Mapping[str, Job], *, clock: Callable[[], datetime]
    ) -> None:
        self._redis = client
        self._jobs = jobs
        self._clock = clock

    @property
    def names(self) -> list[str]:
        return list(self._jobs)

    async def run(self, name: str) -> dict[str, Any]:
        """Run one job and note how it ended; what it raises becomes part of the note."""
        began = time.monotonic()
        state: dict[str, Any] = {"job": name, "at": self._clock().isoformat()}
        try:
            state["did"] = dict(await self._jobs[name].run())
        except (LuthierError, *REDIS_ERRORS) as error:
            state["error"] = repr(error)[:500]
            log.warning("job %s: %r", name, error)
        state["seconds"] = round(time.monotonic() - began, 3)
        await cast(Any, self._redis.hset(STATES, name, json.dumps(state)))
        return state

    async def states(self) -> list[dict[str, Any]]:
        """The last run of every job."""
        found = await cast(Any, self._redis.hgetall(STATES))
        return [
            {
                "job": name,
                "every_s": job.every_s,
                **json.loads(found.get(name.encode(), b"{}")),
            }
            for name, job in self._jobs.items()
        ]

    async def keep_running(self) -> None:
        """Run each job in its time, for ever. Of several processes that do, one has the turn."""
        while True:
            for name, job in self._jobs.items():
                try:
                    if job.every_s is not None and await self._take_turn(name, job.every_s):
                        await self.run(name)
                except REDIS_ERRORS:
                    log.warning("redis is away: housekeeping waits")
                except Exception:
                    log.exception("job %s", name)
            await asyncio.sleep(LOOK_S)

    async def _take_turn(self, name: str, every_s: float) -> bool:
        turn = await self._redis.set(f"jobs:{name}", 1, nx=True, px=max(int(1000 * every_s), 1))
        return bool(turn)
