"""Counts what was used, and keeps every op's metrics: from Redis into the object store, once each.

Both sources are read in batches. A batch becomes one immutable object that is created if absent, so
whoever repeats it counts the same; then one transaction moves the tenant's cursor and adds to its
sums, unless the cursor shows that it is counted. A job that is lost or doubled changes nothing.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, cast

import redis.asyncio as redis
from pydantic import AwareDatetime
from redis.exceptions import WatchError

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.oplog import Oplog, RunHeader
from luthier_core.ops import Outcome
from luthier_core.records import Record
from luthier_core.usage import SampleUse, Use, day_of, hour_of, month_of

MAX_OPS = 512
"""Of one segment."""
MAX_SAMPLES = 5000
HOURS_KEPT = timedelta(days=62)
"""In Redis; in the bucket for ever."""
SHARD = "{s0}"


class MetricsSegment(Record):
    """`runs/{run}/metrics/{first}.json`"""

    run_id: str
    base_model: str
    first: int
    last: int
    at: AwareDatetime
    """When it was counted."""
    entries: tuple[dict[str, Any], ...]
    """seq and state; what RunEffects has noted of it, with its metrics; of a failure the error."""

    @property
    def num_tokens(self) -> int:
        """Trained or forwarded."""
        found = (entry.get("metrics", {}).get("num_tokens:sum") for entry in self.entries)
        return int(sum(tokens or 0 for tokens in found))

    @property
    def last_admitted_ms(self) -> int:
        """Since the epoch; 0 if nothing was executed."""
        return max((int(entry.get("admitted_ms", 0)) for entry in self.entries), default=0)


class SamplesSegment(Record):
    """`usage/samples/{shard}/{first entry}.json`"""

    last_entry: str
    at: AwareDatetime
    used: dict[str, dict[str, int]]
    """Tenant -> field of a usage hash -> amount."""


class FinishedSample(Record):
    """One sample that a sampling session has finished."""

    use: str
    """A SampleUse."""
    ended_ms: int


class SampleHistory(Record):
    """`samples/{sampling session}/history/{first entry}.json`"""

    samples: tuple[FinishedSample, ...]


class Counting:
    """The job. Holds no state."""

    def __init__(
        self,
        blobs: Blobs,
        oplog: Oplog,
        base_models: Sequence[str],
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._blobs = blobs
        self._oplog = oplog
        self._redis = oplog.redis
        self._base_models = base_models
        self._clock = clock

    async def run(self) -> dict[str, int]:
        """Count everything that is new."""
        num_ops, num_samples = 0, 0
        async for header, run_id, live in self._runs():
            num_ops += await self._count_run(header, run_id, live=live)
        while batch := await self._count_samples():
            num_samples += batch
        return {"ops": num_ops, "samples": num_samples}

    # --- training ---------------------------------------------------------------------------------

    async def _runs(self) -> AsyncIterator[tuple[RunHeader, str, bool]]:
        """Live runs, and those that were live when last looked at."""
        live = {run for model in self._base_models for run in await self._oplog.live_runs(model)}
        if live:
            await cast(Any, self._redis.sadd(keys.COUNTED_RUNS, *live))
        known = [run.decode() for run in await cast(Any, self._redis.smembers(keys.COUNTED_RUNS))]
        for start in range(0, len(known), 500):
            part = known[start : start + 500]
            headers = await self._oplog.headers(part)
            for run_id in part:
                if run_id not in headers:
                    await cast(Any, self._redis.srem(keys.COUNTED_RUNS, run_id))
                else:
                    yield headers[run_id], run_id, run_id in live

    async def _count_run(self, header: RunHeader, run_id: str, *, live: bool) -> int:
        tenant, num_ops = header.tenant, 0
        cursor = await self._cursor(tenant, run_id)
        while segment := await self._segment(header, run_id, cursor + 1, live=live):
            uses = [Use(run_id, "train", segment.base_model, segment.num_tokens)]
            await self._add(
                tenant,
                uses,
                segment.at,
                cursor=(keys.metrics_cursor(tenant), run_id),
                before=str(cursor),
                after=str(segment.last),
                segment=segment,
            )
            cursor, num_ops = segment.last, num_ops + len(segment.entries)
        if not live:
            await cast(Any, self._redis.srem(keys.COUNTED_RUNS, run_id))
        return num_ops

    async def _cursor(self, tenant: str, run_id: str) -> int:
        found = await cast(Any, self._redis.hget(keys.metrics_cursor(tenant), run_id))
        return -1 if found is None else int(found)

    async def _segment(
        self, header: RunHeader, run_id: str, first: int, *, live: bool
    ) -> MetricsSegment | None:
        """The segment that begins at this seq, as it was made first; None if there is none.

        After a loss of Redis a header may know less than was counted before it. One look into the
        store, when the run comes to rest, finds that.
        """
        key = keys.metrics_segment(header.tenant, run_id, first)
        if first > header.committed:
            if live:
                return None
            with contextlib.suppress(BlobMissing):
                return MetricsSegment.from_bytes(await self._blobs.get(key))
            return None
        last = min(header.committed, first + MAX_OPS - 1)
        wanted = MetricsSegment(
            run_id=run_id,
            base_model=header.base_model,
            first=first,
            last=last,
            at=self._clock(),
            entries=tuple(await fresh_entries(self._redis, run_id, first, last)),
        )
        if await self._blobs.put_if_absent(key, wanted.to_bytes()):
            return wanted
        return MetricsSegment.from_bytes(await self._blobs.get(key))

    # --- samples ----------------------------------------------------------------------------------

    async def _count_samples(self) -> int:
        """One batch of the usage stream; how many samples it had."""
        stream = keys.sampling_usage(SHARD)
        entries: Any = await self._redis.xrange(stream, count=MAX_SAMPLES)
        if not entries:
            return 0
        first = entries[0][0].decode()
        key = keys.samples_segment(SHARD, first)
        segment = SamplesSegment(
            last_entry=entries[-1][0].decode(),
            at=self._clock(),
            used=_sum_samples(fields for _, fields in entries),
        )
        if not await self._blobs.put_if_absent(key, segment.to_bytes()):
            segment = SamplesSegment.from_bytes(await self._blobs.get(key))
        await self._add_samples(segment)
        # What is repeated may hold more than the segment: the next one then tells of it again.
        for (tenant, session), samples in finished_samples(entries).items():
            history = SampleHistory(samples=tuple(samples))
            await self._blobs.put(keys.sample_history(tenant, session, first), history.to_bytes())
        milliseconds, _, sequence = segment.last_entry.partition("-")
        await self._redis.xtrim(
            stream, minid=f"{milliseconds}-{int(sequence) + 1}", approximate=False
        )
        return len(entries)

    async def count_samples_again(self) -> None:
        """Add every segment that the sums do not have, as after a loss of Redis."""
        async for info in self._blobs.list(f"usage/samples/{SHARD.strip('{}')}/"):
            await self._add_samples(SamplesSegment.from_bytes(await self._blobs.get(info.key)))

    async def _add_samples(self, segment: SamplesSegment) -> None:
        for tenant, used in segment.used.items():
            await self._add(
                tenant,
                [Use.of_field(field, amount) for field, amount in used.items()],
                segment.at,
                cursor=(keys.samples_cursor(tenant), SHARD),
                before=None,
                after=segment.last_entry,
            )

    # --- sums -------------------------------------------------------------------------------------

    async def _add(
        self,
        tenant: str,
        uses: Sequence[Use],
        at: datetime,
        *,
        cursor: tuple[str, str],
        before: str | None,
        after: str,
        segment: MetricsSegment | None = None,
    ) -> None:
        """Move the cursor and add to the sums in one step, unless it is there or beyond already.

        `before`: what the cursor must be; None: anything below `after`.
        """
        table, field = cursor
        key_of = await self._keys_of_sessions(tenant, uses)
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(table)
            found = await cast(Any, pipe.hget(table, field))
            there = None if found is None else found.decode()
            if before is not None and (there or "-1") != before:
                return
            if before is None and there is not None and _id(there) >= _id(after):
                return
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.hset(table, field, after)
            if segment is not None:
                history = keys.index_order(tenant, f"metrics:{segment.run_id}")
                pipe.zadd(history, {str(segment.first): segment.first})
                active = {segment.run_id: segment.last_admitted_ms / 1000}
                pipe.zadd(keys.index_order(tenant, "runs"), active, xx=True, gt=True)
            self._add_sums(pipe, tenant, uses, at, key_of)
            try:
                await pipe.execute()
            except WatchError:
                return  # somebody else counts at the same time: it is they who have done it

    def _add_sums(
        self,
        pipe: Any,
        tenant: str,
        uses: Iterable[Use],
        at: datetime,
        key_of: dict[str, str],
    ) -> None:
        hour = keys.usage(tenant, hour_of(at))
        periods = [keys.used(tenant, period) for period in (day_of(at), month_of(at))]
        for use in uses:
            if not use.amount:
                continue
            pipe.hincrby(hour, use.field, use.amount)
            by_key = Use(key_of.get(_session(use), ""), use.kind, use.base_model, use.amount)
            for period in periods:
                pipe.hincrby(period, by_key.field, use.amount)
        for table in (hour, *periods):
            pipe.expire(table, HOURS_KEPT)

    async def _keys_of_sessions(self, tenant: str, uses: Sequence[Use]) -> dict[str, str]:
        """Session -> id of the key that created it."""
        sessions = sorted({_session(use) for use in uses})
        if not sessions:
            return {}
        rows = await cast(Any, self._redis.hmget(keys.index_rows(tenant, "sessions"), sessions))
        return {
            session: json.loads(row).get("key_id", "")
            for session, row in zip(sessions, rows, strict=True)
            if row is not None
        }


async def fresh_entries(
    client: redis.Redis, run_id: str, first: int, last: int
) -> list[dict[str, Any]]:
    """Metrics of these ops from their outcomes; `expired` where there is none any more."""
    pipe = client.pipeline(transaction=False)
    for seq in range(first, last + 1):
        pipe.hgetall(keys.run_outcome(run_id, seq))
    return [
        _entry(seq, Outcome.from_fields(fields) if fields else None)
        for seq, fields in enumerate(await pipe.execute(), first)
    ]


def _entry(seq: int, outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None:
        return {"seq": seq, "state": "expired"}
    entry: dict[str, Any] = {"seq": seq, "state": outcome.state}
    if outcome.metrics:
        entry |= json.loads(outcome.metrics)
    if outcome.failed and outcome.body.inline is not None:
        entry["error"] = outcome.body.inline.decode(errors="replace")[:1000]
    return entry


def finished_samples(
    entries: Iterable[tuple[bytes, dict[bytes, bytes]]],
) -> dict[tuple[str, str], list[FinishedSample]]:
    """(tenant, sampling session) -> its samples, of entries of the usage stream."""
    found: dict[tuple[str, str], list[FinishedSample]] = defaultdict(list)
    for entry_id, fields in entries:
        use = fields[b"usage"].decode()
        sample = FinishedSample(use=use, ended_ms=int(entry_id.partition(b"-")[0]))
        found[fields[b"tenant"].decode(), SampleUse.parse(use).sampling_session_id].append(sample)
    return found


def _sum_samples(entries: Iterable[dict[bytes, bytes]]) -> dict[str, dict[str, int]]:
    used: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for fields in entries:
        tenant, model = fields[b"tenant"].decode(), fields[b"model"].decode()
        use = SampleUse.parse(fields[b"usage"].decode())
        amounts = {
            "prefill": use.num_prompt_tokens - use.num_cached_tokens,
            "cached": use.num_cached_tokens,
            "sample": use.num_sampled_tokens,
        }
        for kind, amount in amounts.items():
            if amount:
                used[tenant][Use(use.sampling_session_id, kind, model, 0).field] += amount
    return {tenant: dict(fields) for tenant, fields in used.items()}


def _session(use: Use) -> str:
    return use.subject.partition(":")[0]


def _id(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence)
