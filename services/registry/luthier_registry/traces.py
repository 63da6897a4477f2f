"""The timeline of a session for ui.perfetto.dev: when each op and each sample waited and ran.

It is made of what is kept anyway: the history of each run (usage.py) and of each sampling session
(counting.py). Format: Chrome's JSON trace events, which Perfetto reads. A run or a sampling session
is a process of it; each request a pair of nested slices, from its admission and from its begin to
its end, in which the next ones overlap it.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import Blobs
from luthier_core.usage import SampleUse, hour_of
from luthier_registry.builds import Builds
from luthier_registry.counting import SHARD, FinishedSample, SampleHistory, finished_samples
from luthier_registry.sessions import Sessions
from luthier_registry.usage import Usage

MAX_REQUESTS = 20_000
"""Of one trace, about 12 MB; each run and sampling session has an equal part, for its latest."""
MAX_SUBJECTS = 100
"""Runs, and as many sampling sessions: the newest."""
MAX_HISTORIES = 100
"""Objects that are read for one sampling session."""
MAX_UNCOUNTED = 5000
"""Samples of all tenants that were finished since they were counted last."""

Event = dict[str, Any]


class Traces:
    """The traces of all tenants' sessions. Holds no state."""

    def __init__(
        self,
        blobs: Blobs,
        client: redis.Redis,
        sessions: Sessions,
        usage: Usage,
        builds: Builds,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._blobs = blobs
        self._redis = client
        self._sessions = sessions
        self._usage = usage
        self._builds = builds
        self._clock = clock

    async def make(self, tenant: str, session_id: str) -> str:
        """Object key of the trace as of now; Unavailable while it is being made."""
        session = await self._sessions.describe(tenant, session_id)
        key = keys.session_trace(tenant, session_id, hour_of(self._clock()))

        async def work() -> None:
            runs = session["training_run_ids"][-MAX_SUBJECTS:]
            samplers = session["sampler_ids"][-MAX_SUBJECTS:]
            share = MAX_REQUESTS // max(len(runs) + len(samplers), 1)
            uncounted = await self._uncounted(tenant)
            subjects = [
                (run, list(_ops(await self._usage.latest_metrics(tenant, run, share))))
                for run in runs
            ]
            subjects += [
                (name, list(_samples(await self._history(tenant, name, uncounted), share)))
                for name in samplers
            ]
            await self._blobs.put(key, await asyncio.to_thread(_trace, session_id, subjects))

        await self._builds.finish(key, work)
        return key

    async def _uncounted(self, tenant: str) -> dict[str, list[FinishedSample]]:
        """Sampling session -> samples that are not in its history yet."""
        entries: Any = await self._redis.xrevrange(keys.sampling_usage(SHARD), count=MAX_UNCOUNTED)
        return {
            session: samples
            for (owner, session), samples in finished_samples(reversed(entries)).items()
            if owner == tenant
        }

    async def _history(
        self, tenant: str, sampling_session_id: str, uncounted: dict[str, list[FinishedSample]]
    ) -> list[FinishedSample]:
        """Oldest first; one that is there twice was counted twice."""
        prefix = keys.sample_histories(tenant, sampling_session_id)
        objects = [info.key async for info in self._blobs.list(prefix)]
        samples: list[FinishedSample] = []
        for key in objects[-MAX_HISTORIES:]:
            samples += SampleHistory.from_bytes(await self._blobs.get(key)).samples
        return samples + uncounted.get(sampling_session_id, [])


def _ops(entries: list[dict[str, Any]]) -> Iterator[Event]:
    """Slices of the ops that were executed; one that was refused or has expired has none."""
    for entry in entries:
        if "begun_ms" in entry:
            told = {name: entry.get(name) for name in ("seq", "state", "worker")}
            tokens = (entry.get("metrics") or {}).get("num_tokens:sum")
            yield from _slices(
                *(entry["kind"], entry["admitted_ms"], entry["begun_ms"], entry["ended_ms"]),
                told | ({} if tokens is None else {"num_tokens": int(tokens)}),
            )


def _samples(samples: list[FinishedSample], num: int) -> Iterator[Event]:
    """Slices of the last so many samples."""
    by_seq = {(use := SampleUse.parse(s.use)).seq: (use, s.ended_ms) for s in samples}
    by_seq.pop("", None)
    for use, ended_ms in list(by_seq.values())[-num:]:
        told = {
            "seq": use.seq,
            "worker": use.worker,
            "num_prompt_tokens": use.num_prompt_tokens,
            "num_cached_tokens": use.num_cached_tokens,
            "num_sampled_tokens": use.num_sampled_tokens,
        }
        yield from _slices("sample", use.queued_ms, use.begun_ms, ended_ms, told)


def _slices(
    name: str, queued_ms: int, begun_ms: int, ended_ms: int, told: dict[str, Any]
) -> Iterator[Event]:
    """The whole request, and inside of it the part in which it was executed; times in µs."""
    # Clocks of two machines: a slice that ended before it began could not be read.
    begun_ms = max(begun_ms, queued_ms)
    ended_ms = max(ended_ms, begun_ms)
    same = {"cat": "request", "id": str(told["seq"])}
    yield {**same, "ph": "b", "name": name, "ts": 1000 * queued_ms, "args": told}
    yield {**same, "ph": "b", "name": "executed", "ts": 1000 * begun_ms}
    yield {**same, "ph": "e", "name": "executed", "ts": 1000 * ended_ms}
    yield {**same, "ph": "e", "name": name, "ts": 1000 * ended_ms}


def _trace(session_id: str, subjects: list[tuple[str, list[Event]]]) -> bytes:
    """The file; ids are told apart by the process that they are in."""
    events: list[Event] = []
    for number, (subject, slices) in enumerate(subjects, 1):
        named = {"name": "process_name", "ph": "M", "pid": number, "args": {"name": subject}}
        events.append(named)
        for event in slices:
            events.append({**event, "id": f"{number}.{event['id']}", "pid": number, "tid": 0})
    return json.dumps({"traceEvents": events, "otherData": {"session_id": session_id}}).encode()
