"""Indexes for listing, in Redis: sorted sets for the order, a hash with the whole row beside each.

Whoever writes a record adds its row afterwards; both can be done again. A page reads no object, and
`luthier admin rebuild-index` can make every index anew from the bucket. Redis errors pass through.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import orjson
import redis.asyncio as redis
from redis.exceptions import WatchError

from luthier_core import keys
from luthier_core.records import CheckpointRecord, RunRecord, SamplerRecord, SessionRecord

EXPIRING = "expiring"
EXPIRED = "expired"
"""Off the lists, and not yet swept."""
NO_EXTERNAL = "checkpoints/no-external"
"""All checkpoints but external weights: a list that names one fails in SDKs before 0.28."""


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list, latest first."""

    rows: Sequence[dict[str, Any]]
    total_count: int


class Listing:
    """One tenant's indexes. All its keys share a slot, so each change is one transaction."""

    def __init__(self, client: redis.Redis, tenant: str) -> None:
        self._redis = client
        self._tenant = tenant

    async def add_session(self, record: SessionRecord) -> None:
        await self._add(
            "sessions", record.session_id, record.row(), record.created_at, ["sessions"]
        )

    async def add_run(self, record: RunRecord) -> None:
        lists = ["runs", f"runs:{record.session_id}"]
        await self._add("runs", record.run_id, record.row(), record.created_at, lists)

    async def add_sampler(self, record: SamplerRecord) -> None:
        lists = [f"samplers:{record.session_id}"]
        await self._add("samplers", record.sampling_session_id, {}, record.created_at, lists)

    async def add_checkpoint(self, record: CheckpointRecord) -> None:
        await self._add(
            "checkpoints",
            record.row_id,
            record.row(),
            record.created_at,
            _checkpoint_lists(record.row_id),
            expires_at=record.expires_at,
        )

    async def remove_checkpoint(self, run_id: str, kind: str, name: str) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            self._remove(pipe, f"{run_id}/{kind}/{name}")
            await pipe.execute()

    async def checkpoint_rows(self, run_id: str, *, now: datetime) -> list[dict[str, Any]]:
        """Every Checkpoint object of a run, latest first, without what has expired."""
        await self._drop_expired(now)
        return await self._rows("checkpoints", (await self.ids(f"checkpoints:{run_id}"))[::-1])

    async def unlisted(self, table: str, rows: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Ids of those rows that are not there as they are here."""
        if not rows:
            return set()
        stored = await cast(Any, self._redis.hmget(keys.index_rows(self._tenant, table), [*rows]))
        pairs = zip(rows.items(), stored, strict=True)
        return {row_id for (row_id, row), listed in pairs if listed != orjson.dumps(row)}

    async def unlisted_samplers(self, records: Sequence[SamplerRecord]) -> list[SamplerRecord]:
        """Those that the lists of their sessions lack: they have no rows."""
        pipe = self._redis.pipeline(transaction=False)
        for record in records:
            order = keys.index_order(self._tenant, f"samplers:{record.session_id}")
            pipe.zscore(order, record.sampling_session_id)
        found = zip(records, await pipe.execute(), strict=True)
        return [record for record, score in found if score is None]

    async def ids(self, what: str) -> list[str]:
        """All ids of a list, oldest first."""
        found: Any = await self._redis.zrange(keys.index_order(self._tenant, what), 0, -1)
        return [item.decode() for item in found]

    async def id_page(self, what: str, *, offset: int, limit: int) -> tuple[list[str], int]:
        """(ids of one page, latest first; how many there are in all)."""
        order = keys.index_order(self._tenant, what)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zrevrange(order, offset, offset + limit - 1)
            pipe.zcard(order)
            found, total = await pipe.execute()
        return [item.decode() for item in found], total

    async def checkpoint_page(self, what: str, *, offset: int, limit: int, now: datetime) -> Page:
        """One page of `checkpoints` or NO_EXTERNAL, without what has expired."""
        await self._drop_expired(now)
        ids, total = await self.id_page(what, offset=offset, limit=limit)
        return Page(await self._rows("checkpoints", ids), total)

    async def run_page(
        self, *, offset: int, limit: int, now: datetime, project_id: str | None = None
    ) -> Page:
        """One page of TrainingRun objects with their last checkpoints, of one project or of all.

        A project is looked up in the rows of the sessions: a session moves with all its runs.
        """
        if project_id is None:
            ids, total = await self.id_page("runs", offset=offset, limit=limit)
        else:
            ids = await self._runs_of_project(project_id)
            total, ids = len(ids), ids[offset : offset + limit]
        rows = await self._rows("runs", ids)
        return Page(await self.with_activity(rows, now), total)

    async def sessions_from(
        self, time_s: float, session_id: str, *, num_rows: int
    ) -> list[dict[str, Any]]:
        """The next session rows, latest first, after the one of this time and id."""
        order = keys.index_order(self._tenant, "sessions")
        found: Any = await self._redis.zrevrangebyscore(
            order, time_s, "-inf", start=0, num=num_rows + 1, withscores=True
        )
        ids = [(item.decode(), score) for item, score in found]
        later = [item for item, score in ids if score < time_s or item < session_id]
        return await self._rows("sessions", later[:num_rows])

    async def num_checkpoints(self, session_ids: Sequence[str]) -> list[int]:
        """How many checkpoints the runs of each session have."""
        runs_of = [await self.ids(f"runs:{session_id}") for session_id in session_ids]
        pipe = self._redis.pipeline(transaction=False)
        for run_id in (run_id for run_ids in runs_of for run_id in run_ids):
            pipe.zcard(keys.index_order(self._tenant, f"checkpoints:{run_id}"))
        counts = iter(await pipe.execute())
        return [sum(next(counts) for _ in run_ids) for run_ids in runs_of]

    async def _runs_of_project(self, project_id: str) -> list[str]:
        """Ids of all its runs, latest first."""
        sessions: Any = await cast(
            Any, self._redis.hgetall(keys.index_rows(self._tenant, "sessions"))
        )
        pipe = self._redis.pipeline(transaction=False)
        for session_id, row in sessions.items():
            if orjson.loads(row)["project_id"] == project_id:
                order = keys.index_order(self._tenant, f"runs:{session_id.decode()}")
                pipe.zrange(order, 0, -1, withscores=True)
        found = [run for runs in await pipe.execute() for run in runs]
        # As Redis sorts: by time, then by id.
        found.sort(key=lambda run: (run[1], run[0]), reverse=True)
        return [run_id.decode() for run_id, _ in found]

    async def with_activity(
        self, rows: Sequence[Mapping[str, Any]], now: datetime
    ) -> list[dict[str, Any]]:
        """TrainingRun rows with last_checkpoint, last_sampler_checkpoint and last_request_time."""
        await self._drop_expired(now)
        pipe = self._redis.pipeline(transaction=False)
        for row in rows:
            for kind in ("weights", "sampler_weights"):
                order = f"checkpoints:{row['training_run_id']}:{kind}"
                pipe.zrevrange(keys.index_order(self._tenant, order), 0, 0)
        replies = await pipe.execute()
        last_ids = [item.decode() for reply in replies for item in reply]
        checkpoints = await self._rows_by_id("checkpoints", last_ids)
        last_requests = await self._last_requests(rows)
        return [
            {
                **row,
                "last_checkpoint": _first(checkpoints, weights),
                "last_sampler_checkpoint": _first(checkpoints, sampler_weights),
                "last_request_time": _later(row["last_request_time"], last_request),
            }
            for row, weights, sampler_weights, last_request in zip(
                rows, replies[0::2], replies[1::2], last_requests, strict=True
            )
        ]

    async def _last_requests(self, rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """When the last counted op of each run was admitted: what "runs" is ordered by."""
        ids = [row["training_run_id"] for row in rows]
        order = keys.index_order(self._tenant, "runs")
        found: Any = await cast(Any, self._redis.zmscore(order, ids)) if ids else []
        return list(found)

    async def expired(self, now: datetime) -> list[str]:
        """run/kind/name of what has expired and is not yet swept."""
        await self._drop_expired(now)
        return await self.ids(EXPIRED)

    async def swept(self, row_id: str) -> None:
        await cast(Any, self._redis.zrem(keys.index_order(self._tenant, EXPIRED), row_id))

    async def _add(
        self,
        table: str,
        row_id: str,
        row: Mapping[str, Any],
        time: datetime,
        lists: Sequence[str],
        expires_at: datetime | None = None,
    ) -> None:
        expiring = keys.index_order(self._tenant, EXPIRING)
        async with self._redis.pipeline(transaction=True) as pipe:
            if row:
                pipe.hset(keys.index_rows(self._tenant, table), row_id, orjson.dumps(row))
            for name in lists:
                order = keys.index_order(self._tenant, name)
                # A run that is listed again keeps the time of its last request.
                pipe.zadd(order, {row_id: time.timestamp()}, gt=table == "runs")
            if expires_at:
                pipe.zadd(expiring, {row_id: expires_at.timestamp()})
            elif table == "checkpoints":
                pipe.zrem(expiring, row_id)
            await pipe.execute()

    def _remove(self, pipe: Any, row_id: str) -> None:
        pipe.hdel(keys.index_rows(self._tenant, "checkpoints"), row_id)
        for name in (*_checkpoint_lists(row_id), EXPIRING):
            pipe.zrem(keys.index_order(self._tenant, name), row_id)

    async def _drop_expired(self, now: datetime) -> None:
        """Take expired checkpoints off the lists; their records and files are swept later."""
        expiring = keys.index_order(self._tenant, EXPIRING)
        async with self._redis.pipeline(transaction=True) as pipe:
            # Watched: a name that is saved again in this moment must keep its new row.
            await pipe.watch(expiring)
            expired: Any = await pipe.zrangebyscore(expiring, 0, now.timestamp())
            if not expired:
                return
            pipe.multi()  # type: ignore[no-untyped-call]
            for row_id in expired:
                self._remove(pipe, row_id.decode())
                pipe.zadd(keys.index_order(self._tenant, EXPIRED), {row_id: now.timestamp()})
            try:
                await pipe.execute()
            except WatchError:
                return  # another listing did it, or the next one will

    async def _rows(self, table: str, ids: Sequence[str]) -> list[dict[str, Any]]:
        rows = await self._rows_by_id(table, ids)
        return [rows[row_id] for row_id in ids if row_id in rows]

    async def _rows_by_id(self, table: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        if not ids:
            return {}
        values = await cast(Any, self._redis.hmget(keys.index_rows(self._tenant, table), list(ids)))
        return {
            row_id: orjson.loads(value)
            for row_id, value in zip(ids, values, strict=True)
            if value is not None
        }


def _checkpoint_lists(row_id: str) -> list[str]:
    run_id, kind, _ = row_id.split("/")
    lists = ["checkpoints", f"checkpoints:{run_id}", f"checkpoints:{run_id}:{kind}"]
    return lists if kind == "external_weights" else [*lists, NO_EXTERNAL]


def _first(rows: Mapping[str, dict[str, Any]], ids: Sequence[bytes]) -> dict[str, Any] | None:
    return rows.get(ids[0].decode()) if ids else None


def _later(time: str, seconds: float | None) -> str:
    created = datetime.fromisoformat(time)
    if seconds is None or seconds <= created.timestamp():
        return time
    return datetime.fromtimestamp(seconds, created.tzinfo).isoformat()
