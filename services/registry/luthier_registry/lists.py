"""Rows of checkpoints follow their records, also after a crash between the two.

A change is marked in Redis before its first step, and the mark goes after its last one. A mark that
stays is of a change that died, or whose caller went away: the job brings its row, and its archive,
in line with the record. The record itself is the truth, however far the change has come.
"""

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, cast

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.checkpoints import TinkerPath
from luthier_core.listing import Listing
from luthier_core.records import CheckpointRecord

LEFT_AFTER = timedelta(seconds=60)
"""A change takes less; and to settle one that is under way does no harm."""


class Lists:
    """Rows and records of all tenants. Holds no state."""

    def __init__(self, blobs: Blobs, client: redis.Redis, *, clock: Callable[[], datetime]) -> None:
        self._blobs = blobs
        self._redis = client
        self._clock = clock

    @asynccontextmanager
    async def changing(self, tenant: str, path: TinkerPath, digest: str) -> AsyncIterator[None]:
        """A change of the record, with its row after it.

        `digest`: of the manifest; its archive does not outlive a record that is gone or private.
        """
        mark = f"{tenant} {path} {digest} {secrets.token_hex(8)}"
        at = self._clock().isoformat()
        await cast(Any, self._redis.hset(keys.CHANGING, mark, at))
        yield
        await self.list_again(tenant, path)
        await cast(Any, self._redis.hdel(keys.CHANGING, mark))

    async def list_again(self, tenant: str, path: TinkerPath) -> None:
        """Bring the row in line with the record, whoever else changes both at the same time."""
        listing = Listing(self._redis, tenant)
        key = keys.name_record(tenant, path.run_id, path.kind, path.name)
        listed: bytes | None = b""
        while listed != (stored := await self._stored(key)):
            if stored is None:
                await listing.remove_checkpoint(path.run_id, path.kind, path.name)
            else:
                await listing.add_checkpoint(CheckpointRecord.from_bytes(stored))
            listed = stored

    async def settle(self) -> dict[str, int]:
        """The job: finish what changes that died have left."""
        marks: dict[bytes, bytes] = await cast(Any, self._redis.hgetall(keys.CHANGING))
        num_settled = 0
        for mark, at in marks.items():
            if datetime.fromisoformat(at.decode()) > self._clock() - LEFT_AFTER:
                continue
            tenant, path, digest, _ = mark.decode().split(" ")
            await self._settle(tenant, TinkerPath.parse(path), digest)
            await cast(Any, self._redis.hdel(keys.CHANGING, mark.decode()))
            num_settled += 1
        return {"settled": num_settled}

    async def _settle(self, tenant: str, path: TinkerPath, digest: str) -> None:
        await self.list_again(tenant, path)
        stored = await self._stored(keys.name_record(tenant, path.run_id, path.kind, path.name))
        if stored is None or not CheckpointRecord.from_bytes(stored).public:
            await self._blobs.delete(keys.archive(tenant, digest))  # made again when asked for

    async def _stored(self, key: str) -> bytes | None:
        try:
            return await self._blobs.get(key)
        except BlobMissing:
            return None
