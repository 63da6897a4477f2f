"""Measures what is stored: now, for quotas, and over time, for bills."""

import json
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

import redis.asyncio as redis
from redis.exceptions import WatchError

from luthier_core import keys
from luthier_core.blobs import Blobs
from luthier_core.usage import Use, day_of, hour_of, month_of
from luthier_registry.counting import HOURS_KEPT
from luthier_registry.identity import tenants
from luthier_registry.usage import checkpoint_sizes


class Storage:
    """The job. Holds no state."""

    def __init__(self, blobs: Blobs, client: redis.Redis, *, clock: Callable[[], datetime]) -> None:
        self._blobs = blobs
        self._redis = client
        self._clock = clock

    async def run(self) -> dict[str, int]:
        total = 0
        for tenant in await tenants(self._blobs):
            total += await self._measure(tenant)
        return {"bytes": total}

    async def _measure(self, tenant: str) -> int:
        """Note what is stored, and count it for the time since it was noted last."""
        table, now = keys.stored(tenant), self._clock()
        sizes: dict[str, int] = defaultdict(int)
        async for run_id, size in checkpoint_sizes(self._redis, tenant):
            sizes[run_id] += size
        by_key: dict[str, int] = defaultdict(int)
        for run_id, size in sizes.items():
            by_key[await self._key_of(tenant, run_id)] += size
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(table)
            before = await cast(Any, pipe.hget(table, "at"))
            hours = max(now.timestamp() - float(before), 0.0) / 3600 if before else 0.0
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.delete(table)
            total = sum(sizes.values())
            sums: dict[Any, Any] = {**by_key, "at": now.timestamp(), "total": total}
            pipe.hset(table, mapping=sums)
            for run_id, size in sizes.items():
                _count(pipe, keys.usage(tenant, hour_of(now)), run_id, size * hours)
            for key_id, size in by_key.items():
                for period in (day_of(now), month_of(now)):
                    _count(pipe, keys.used(tenant, period), key_id, size * hours)
            try:
                await pipe.execute()
            except WatchError:
                return total  # somebody else has just measured the same
        return total

    async def _key_of(self, tenant: str, run_id: str) -> str:
        rows, session = keys.index_rows(tenant, "sessions"), run_id.partition(":")[0]
        row = await cast(Any, self._redis.hget(rows, session))
        return str(json.loads(row).get("key_id", "")) if row else ""


def _count(pipe: Any, table: str, subject: str, byte_hours: float) -> None:
    if amount := round(byte_hours):
        pipe.hincrby(table, Use(subject, "storage", "", 0).field, amount)
        pipe.expire(table, HOURS_KEPT)
