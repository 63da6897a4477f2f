"""The metrics of what Redis holds: queues, logs, workers, memory, housekeeping.

Read when they are asked for, by the registry because there is one of it: each gateway would say the
same again.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from luthier_core import keys, metrics
from luthier_core.oplog import Oplog, RunHeader
from luthier_registry.jobs import Jobs

READ_JOBS = 1000
"""Waiting sampling requests that are looked at for their tenant; the rest has the tenant ""."""


@dataclass(slots=True)
class Queue:
    """What waits of one kind, by tenant."""

    depth: Counter[str] = field(default_factory=Counter)
    oldest_ms: dict[str, int] = field(default_factory=dict)

    def add(self, tenant: str, depth: int, since_ms: int) -> None:
        self.depth[tenant] += depth
        self.oldest_ms[tenant] = min(since_ms, self.oldest_ms.get(tenant, since_ms))


class Observer:
    """Sets the registry's gauges."""

    def __init__(
        self,
        oplog: Oplog,
        jobs: Jobs,
        model_names: Sequence[str],
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._oplog = oplog
        self._jobs = jobs
        self._model_names = model_names
        self._clock = clock

    async def refresh(self) -> None:
        """Look at everything once; a few round trips, however many runs there are."""
        now_ms = 1000 * self._clock().timestamp()
        queues: dict[tuple[str, str], Queue] = {}
        for name in self._model_names:
            headers = await self._oplog.headers(await self._oplog.live_runs(name))
            metrics.LIVE_RUNS.labels(name).set(len(headers))
            metrics.LOG_OPS_MAX.labels(name).set(await self._longest_log(headers))
            queues[name, "train"] = await self._training(headers)
            queues[name, "sample"] = await self._sampling(name)
        # Only now, so that who reads meanwhile does not find a tenant gone.
        metrics.QUEUE_DEPTH.clear()
        metrics.QUEUE_AGE_SECONDS.clear()
        for (name, kind), queue in queues.items():
            for tenant, depth in queue.depth.items():
                age_s = max(now_ms - queue.oldest_ms[tenant], 0) / 1000
                metrics.QUEUE_DEPTH.labels(name, tenant, kind).set(depth)
                metrics.QUEUE_AGE_SECONDS.labels(name, tenant, kind).set(age_s)
        await self._observe_workers()
        await self._observe_redis()
        await self._observe_jobs()

    async def _training(self, headers: Mapping[str, RunHeader]) -> Queue:
        queue, pending = Queue(), {r: h for r, h in headers.items() if h.pending}
        pipe = self._oplog.redis.pipeline(transaction=False)
        for run_id, header in pending.items():
            pipe.hget(keys.run_header(run_id), f"d:{header.committed + 1}")
        for header, admitted in zip(pending.values(), await pipe.execute(), strict=True):
            # The field may have gone since: the op was committed and trimmed meanwhile.
            since_ms = int(admitted.split()[2]) if admitted else int(1000 * time.time())
            queue.add(header.tenant, header.admitted - header.committed, since_ms)
        return queue

    async def _sampling(self, base_model: str) -> Queue:
        queue, stream = Queue(), keys.sampling_jobs(base_model)
        entries: Any = await self._oplog.redis.xrange(stream, count=READ_JOBS)
        total: int = await cast(Any, self._oplog.redis.xlen(stream))
        for entry_id, fields in entries:
            queue.add(fields[b"tenant"].decode(), 1, int(entry_id.split(b"-")[0]))
        if total > len(entries) and entries:
            queue.add("", total - len(entries), int(entries[-1][0].split(b"-")[0]))
        return queue

    async def _longest_log(self, run_ids: Mapping[str, object]) -> int:
        pipe = self._oplog.redis.pipeline(transaction=False)
        for run_id in run_ids:
            pipe.xlen(keys.run_log(run_id))
        return max(await pipe.execute(), default=0)

    async def _observe_workers(self) -> None:
        states = Counter(
            (lease["base_model"], lease["role"], lease["state"])
            for lease in (await self._oplog.live_workers()).values()
        )
        metrics.LIVE_WORKERS.clear()
        for name in self._model_names:
            for role in ("trainer", "sampler"):  # a zero is what an alert can see
                metrics.LIVE_WORKERS.labels(name, role, "ready").set(0)
        for labels, number in states.items():
            metrics.LIVE_WORKERS.labels(*labels).set(number)

    async def _observe_redis(self) -> None:
        memory: Any = await cast(Any, self._oplog.redis.info("memory"))
        metrics.REDIS_MEMORY_BYTES.set(memory["used_memory"])
        limit = memory.get("maxmemory") or memory.get("total_system_memory", 0)
        metrics.REDIS_MEMORY_LIMIT_BYTES.set(limit)

    async def _observe_jobs(self) -> None:
        now = self._clock()
        for state in await self._jobs.states():
            if "at" in state and "error" not in state:
                age_s = (now - datetime.fromisoformat(state["at"])).total_seconds()
                metrics.JOB_AGE_SECONDS.labels(state["job"]).set(max(age_s, 0))
            for what, number in state.get("did", {}).items():
                metrics.JOB_RESULT.labels(state["job"], what).set(number)
