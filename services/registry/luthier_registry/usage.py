"""What a tenant has used, by the hour: for its bills, its tables and its metric history."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import Blobs
from luthier_core.errors import InvalidField
from luthier_core.usage import BYTE_HOURS_PER_GB_MONTH, Prices, Use, hour_of, read_uses
from luthier_registry.counting import MetricsSegment, fresh_entries

MAX_DAYS = 14
"""Of one question (wire protocol 8.5)."""
GROUPS = ("run", "session", "key", "project")
HOUR = timedelta(hours=1)
_EVENT_TYPES = {"train": "training", "sample": "sampling_sample", "storage": "storage"}


class Usage:
    """Answers about usage. Reads what counting.py has counted."""

    def __init__(
        self, blobs: Blobs, client: redis.Redis, prices: Prices, *, clock: Callable[[], datetime]
    ) -> None:
        self._blobs = blobs
        self._redis = client
        self._prices = prices
        self._clock = clock

    async def events(self, tenant: str, start: datetime, end: datetime) -> dict[str, Any]:
        """billing/usage/events of wire protocol 8.5."""
        data, sessions = [], {}
        for hour, uses in await self._hours(tenant, start, end):
            rows = await self._session_rows(tenant, uses)
            for use in uses:
                row = rows.get(_session(use), {})
                data.append(self._event(hour, use, row))
                if _session(use) and row:
                    sessions[_session(use)] = {"user_metadata": row.get("user_metadata")}
        return {
            "data": data,
            "sessions": sessions,
            "cost_data_through": self._clock().isoformat(),
        }

    async def table(
        self, tenant: str, start: datetime, end: datetime, group: str
    ) -> list[dict[str, Any]]:
        """Sums of the time by run, session, key or project, with what they cost."""
        if group not in GROUPS:
            raise InvalidField(f"by={group[:50]!r}: one of {', '.join(GROUPS)}")
        sums: dict[str, dict[tuple[str, str], int]] = defaultdict(lambda: defaultdict(int))
        for _, uses in await self._hours(tenant, start, end):
            rows = await self._session_rows(tenant, uses)
            for use in uses:
                sums[_group_of(use, group, rows)][use.kind, use.base_model] += use.amount
        return [self._row(group, name, amounts) for name, amounts in sorted(sums.items())]

    async def stored(self, tenant: str, project_id: str | None) -> dict[str, Any]:
        """billing/usage/checkpoints/current of wire protocol 8.5: one row per project."""
        counts: dict[str | None, list[int]] = defaultdict(lambda: [0, 0])
        sizes = [
            Use(run, "", "", size) async for run, size in checkpoint_sizes(self._redis, tenant)
        ]
        rows = await self._session_rows(tenant, sizes)
        for checkpoint in sizes:
            project = rows.get(_session(checkpoint), {}).get("project_id")
            counts[project][0] += 1
            counts[project][1] += checkpoint.amount
        price = self._prices.usd_per_gb_month
        return {
            "effective_rate_usd_per_gigabyte_month": price,
            "data": [
                {
                    "project_id": project,
                    "checkpoint_count": count,
                    "size_bytes": size,
                    "size_gigabytes": size / 1e9,
                    "estimated_monthly_cost_usd": None if price is None else price * size / 1e9,
                }
                for project, (count, size) in sorted(counts.items(), key=lambda row: row[0] or "")
                if project_id in (None, project)
            ],
        }

    async def metrics(self, tenant: str, run_id: str, *, after: int, limit: int) -> dict[str, Any]:
        """Every op after this seq with its metrics, in order; they outlive the futures."""
        entries: list[dict[str, Any]] = []
        order = keys.index_order(tenant, f"metrics:{run_id}")
        # The segment in which seq `after` lies begins at or before it.
        firsts: Any = await self._redis.zrevrangebyscore(order, after, "-inf", start=0, num=1)
        firsts += await self._redis.zrangebyscore(order, f"({after}", "+inf", start=0, num=limit)
        for first in firsts:
            key = keys.metrics_segment(tenant, run_id, int(first))
            segment = MetricsSegment.from_bytes(await self._blobs.get(key))
            at = segment.at.isoformat()
            entries += [{**entry, "at": at} for entry in segment.entries if entry["seq"] > after]
            if len(entries) >= limit:
                break
        if len(entries) < limit:
            entries += await self._uncounted(tenant, run_id, after, limit - len(entries))
        page = entries[:limit]
        return {"run_id": run_id, "entries": page, "last_seq": page[-1]["seq"] if page else after}

    async def latest_metrics(self, tenant: str, run_id: str, num: int) -> list[dict[str, Any]]:
        """The last so many ops of `metrics`."""
        committed = await cast(Any, self._redis.hget(keys.run_header(run_id), "committed"))
        after = max(int(committed or -1) - num, -1)
        return list((await self.metrics(tenant, run_id, after=after, limit=num))["entries"])

    async def _uncounted(
        self, tenant: str, run_id: str, after: int, limit: int
    ) -> list[dict[str, Any]]:
        """What is committed and not in a segment yet."""
        cursor = await cast(Any, self._redis.hget(keys.metrics_cursor(tenant), run_id))
        committed = await cast(Any, self._redis.hget(keys.run_header(run_id), "committed"))
        first = max(int(cursor or -1), after) + 1
        last = min(int(committed or -1), first + limit - 1)
        return await fresh_entries(self._redis, run_id, first, last) if last >= first else []

    # --- plumbing ---------------------------------------------------------------------------------

    async def _hours(
        self, tenant: str, start: datetime, end: datetime
    ) -> list[tuple[datetime, list[Use]]]:
        """Each hour of the time in which something was used, with what it was."""
        hours = list(_hours_between(start, end))
        pipe = self._redis.pipeline(transaction=False)
        for hour in hours:
            pipe.hgetall(keys.usage(tenant, hour_of(hour)))
        found = zip(hours, await pipe.execute(), strict=True)
        return [(hour, read_uses(counted)) for hour, counted in found if counted]

    async def _session_rows(self, tenant: str, uses: list[Use]) -> dict[str, dict[str, Any]]:
        sessions = sorted({_session(use) for use in uses if _session(use)})
        if not sessions:
            return {}
        rows = await cast(Any, self._redis.hmget(keys.index_rows(tenant, "sessions"), sessions))
        found = zip(sessions, rows, strict=True)
        return {session: json.loads(row) for session, row in found if row is not None}

    def _event(self, hour: datetime, use: Use, row: dict[str, Any]) -> dict[str, Any]:
        return {
            "bucket_start": hour.isoformat(),
            "bucket_end": (hour + HOUR).isoformat(),
            "base_model": use.base_model or None,
            "session_id": _session(use) or None,
            "project_id": row.get("project_id"),
            "user_id": row.get("key_id") or None,
            "estimated_cost_usd": self._prices.cost(use),
            "effective_rate_usd_per_million_tokens": self._prices.per_million(
                use.kind, use.base_model
            ),
            "event_info": _event_info(use),
        }

    def _row(self, group: str, name: str, amounts: dict[tuple[str, str], int]) -> dict[str, Any]:
        uses = [Use(name, kind, model, amount) for (kind, model), amount in amounts.items()]
        costs = [self._prices.cost(use) for use in uses]

        def tokens(kind: str) -> int:
            return sum(use.amount for use in uses if use.kind == kind)

        return {
            group: name,
            "trained_tokens": tokens("train"),
            "prefill_tokens": tokens("prefill"),
            "cached_tokens": tokens("cached"),
            "sampled_tokens": tokens("sample"),
            "storage_gigabyte_months": tokens("storage") / BYTE_HOURS_PER_GB_MONTH,
            # Null as soon as a part has no price: half a sum would look like a whole one.
            "cost_usd": None if None in costs else sum(cost or 0.0 for cost in costs),
        }


async def checkpoint_sizes(client: redis.Redis, tenant: str) -> Any:
    """(run id, bytes) of every listed checkpoint, in no order."""
    async for row_id, row in client.hscan_iter(keys.index_rows(tenant, "checkpoints"), count=500):
        yield row_id.decode().partition("/")[0], json.loads(row)["size_bytes"] or 0


def read_hours(start: str, end: str) -> tuple[datetime, datetime]:
    """The hours of a question; InvalidField unless they are in order and not too many."""
    try:
        first, last = (_utc(datetime.fromisoformat(text)) for text in (start, end))
    except ValueError:
        raise InvalidField("starting_on, ending_before: ISO 8601 hours are required") from None
    if not timedelta(0) < last - first <= timedelta(days=MAX_DAYS):
        raise InvalidField(f"ending_before: after starting_on, at most {MAX_DAYS} days")
    return first, last


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _hours_between(start: datetime, end: datetime) -> Iterator[datetime]:
    hour = start.replace(minute=0, second=0, microsecond=0)
    while hour < end:
        yield hour
        hour += HOUR


def _group_of(use: Use, group: str, rows: dict[str, dict[str, Any]]) -> str:
    if group == "run":
        return use.subject
    if group == "session":
        return _session(use)
    row = rows.get(_session(use), {})
    return str(row.get("key_id" if group == "key" else "project_id") or "")


def _event_info(use: Use) -> dict[str, Any]:
    if use.kind in ("prefill", "cached"):
        return {
            "type": "sampling_prefill",
            "cached": use.kind == "cached",
            "token_count": use.amount,
        }
    if use.kind == "storage":
        # Without `free`, whose default is false: SDKs up to 0.30 know no such field and forbid it.
        return {"type": "storage", "gigabyte_hours": use.amount / 1e9}
    return {"type": _EVENT_TYPES[use.kind], "token_count": use.amount}


def _session(use: Use) -> str:
    return use.subject.partition(":")[0]
