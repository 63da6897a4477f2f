"""What has expired loses its archive; its files go with the next sweeps.

The name record stays, some hundred bytes: it cannot be read any more, and deleting it could hit a
checkpoint that is saved under the same name in that moment.
"""

from collections.abc import Callable
from datetime import datetime

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.listing import Listing
from luthier_core.records import CheckpointRecord
from luthier_registry.identity import tenants


class Expiry:
    """The job. Holds no state."""

    def __init__(self, blobs: Blobs, client: redis.Redis, *, clock: Callable[[], datetime]) -> None:
        self._blobs = blobs
        self._redis = client
        self._clock = clock

    async def run(self) -> dict[str, int]:
        num_expired = 0
        for tenant in await tenants(self._blobs):
            listing = Listing(self._redis, tenant)
            for row_id in await listing.expired(self._clock()):
                await self._expire(tenant, row_id)
                await listing.swept(row_id)  # last: a try that dies before is repeated
                num_expired += 1
        return {"expired": num_expired}

    async def _expire(self, tenant: str, row_id: str) -> None:
        run_id, kind, name = row_id.split("/")
        try:
            data = await self._blobs.get(keys.name_record(tenant, run_id, kind, name))
        except BlobMissing:
            return
        record = CheckpointRecord.from_bytes(data)
        if record.expires_at is not None and record.expires_at <= self._clock():
            await self._blobs.delete(keys.archive(tenant, record.manifest_digest))
