"""Keep-last-K: of a run that wants it, only the newest checkpoints of each kind do not expire.

What is too old is made to expire now, by compare-and-swap: so one that is published or saved anew
in that moment stays, and everything after that is as for a checkpoint whose time has come. Kept,
and not counted, are what is published, recovery checkpoints and external weights.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.checkpoints import TinkerPath
from luthier_core.records import CheckpointRecord, RetentionRecord
from luthier_registry.identity import tenants
from luthier_registry.lists import Lists
from luthier_registry.record_store import RecordStore

_KINDS = ("weights", "sampler_weights")
_RECOVERY = "recovery-"


class Retention(RecordStore):
    """The setting of each run, and the job. Holds no state."""

    def __init__(
        self,
        blobs: Blobs,
        client: redis.Redis,
        lists: Lists,
        *,
        default: int,
        clock: Callable[[], datetime],
    ) -> None:
        super().__init__(blobs, client, clock=clock)
        self._lists = lists
        self._default = default

    async def set(self, tenant: str, run_id: str, keep_last: int | None) -> None:
        """Keep so many of each kind; 0: all of them, None: what the configuration says."""
        key = keys.retention(tenant, run_id)
        if keep_last is None:
            await self._blobs.delete(key)
        else:
            record = RetentionRecord(run_id=run_id, keep_last=keep_last)
            await self._blobs.put(key, record.to_bytes())

    async def get(self, tenant: str, run_id: str) -> int:
        """How many of each kind are kept; 0: all."""
        try:
            data = await self._blobs.get(keys.retention(tenant, run_id))
        except BlobMissing:
            return self._default
        return RetentionRecord.from_bytes(data).keep_last

    async def run(self) -> dict[str, int]:
        num_expired = 0
        for tenant in await tenants(self._blobs):
            async for run_id in self._runs(tenant):
                if keep_last := await self.get(tenant, run_id):
                    rows = await self._listing(tenant).checkpoint_rows(run_id, now=self._clock())
                    for path in surplus(rows, keep_last):
                        num_expired += await self._expire(tenant, TinkerPath.parse(path))
        return {"expired": num_expired}

    async def _runs(self, tenant: str) -> AsyncIterator[str]:
        """Ids of the runs that may keep less than all."""
        if self._default:
            for run_id in await self._listing(tenant).ids("runs"):
                yield run_id
            return
        async for info in self._blobs.list(keys.retention(tenant, "")[: -len(".json")]):
            yield info.key.rpartition("/")[2].removesuffix(".json")

    async def _expire(self, tenant: str, path: TinkerPath) -> bool:
        """Whether it has expired: not if somebody else has changed it in this moment."""
        key = keys.name_record(tenant, path.run_id, path.kind, path.name)
        try:
            data, etag = await self._blobs.get_with_etag(key)
        except BlobMissing:
            return False
        record = CheckpointRecord.from_bytes(data)
        if record.public:
            return False
        expired = record.model_copy(update={"expires_at": self._clock()})
        async with self._lists.changing(tenant, path, record.manifest_digest):
            return await self._blobs.put_if_match(key, expired.to_bytes(), etag) is not None


def surplus(rows: Iterable[Mapping[str, Any]], keep_last: int) -> list[str]:
    """Paths of the Checkpoint objects, latest first, that are beyond the newest of their kind."""
    num_kept: Counter[str] = Counter()
    found = []
    for row in rows:
        kind, _, name = row["checkpoint_id"].partition("/")
        if kind not in _KINDS or row["public"] or name.startswith(_RECOVERY):
            continue
        num_kept[kind] += 1
        if num_kept[kind] > keep_last:
            found.append(row["tinker_path"])
    return found
