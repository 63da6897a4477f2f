"""The life of a saved checkpoint: who may read it, publish, expiry, archive, delete.

The name record in the object store is the truth; a row in Redis follows each change of it. Another
tenant reads a checkpoint while it is published. What is foreign and what is absent raise one
NotFound, and so does what has expired, swept or not.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.checkpoints import TinkerPath, expiry, read_manifest
from luthier_core.errors import NotFound
from luthier_core.listing import NO_EXTERNAL, Listing, Page
from luthier_core.records import CheckpointRecord, PublishedRunRecord
from luthier_registry.archives import PEFT_FILES, Archives, is_made, make
from luthier_registry.builds import Builds
from luthier_registry.lists import Lists


class Checkpoints:
    """The checkpoints of all tenants."""

    def __init__(
        self,
        blobs: Blobs,
        client: redis.Redis,
        builds: Builds,
        lists: Lists,
        *,
        clock: Callable[[], datetime],
        archives_by_job: bool = False,
    ) -> None:
        """With `archives_by_job` another process makes the archives."""
        self._archives = Archives(blobs, client, clock=clock)
        self._archives_by_job = archives_by_job
        self._blobs = blobs
        self._redis = client
        self._builds = builds
        self._lists = lists
        self._clock = clock

    async def read(
        self, tenant: str, path: TinkerPath, *, access_tenant: str | None = None
    ) -> CheckpointRecord:
        """What a path stands for now, if the tenant or `access_tenant` may read it."""
        for reader in (tenant, access_tenant):
            record = reader and await self._find(reader, path)
            if record:
                return record
        publisher = await self.publisher(path.run_id)
        record = publisher and await self._find(publisher, path)
        if record and record.public:
            return record
        raise NotFound(str(path))

    async def publisher(self, run_id: str) -> str | None:
        """The tenant of a run of which something was published at some time."""
        try:
            found = await self._blobs.get(keys.published_run(run_id))
        except BlobMissing:
            return None
        return PublishedRunRecord.from_bytes(found).tenant

    async def rows(self, owner: str, run_id: str, *, public_only: bool) -> list[dict[str, Any]]:
        """Checkpoint objects of a run, latest first."""
        rows = await self._listing(owner).checkpoint_rows(run_id, now=self._clock())
        return [row for row in rows if row["public"] or not public_only]

    async def page(self, tenant: str, *, offset: int, limit: int, external: bool) -> Page:
        """Checkpoint objects of all runs, latest first, with external weights or without."""
        what = "checkpoints" if external else NO_EXTERNAL
        return await self._listing(tenant).checkpoint_page(
            what, offset=offset, limit=limit, now=self._clock()
        )

    async def publish(self, tenant: str, path: TinkerPath) -> None:
        """Let every tenant read it; nothing happens if they can already."""
        await self._own(tenant, path)
        # First: readers find the tenant here, and ask its name record whether it is public.
        owner = PublishedRunRecord(tenant=tenant)
        await self._blobs.put_if_absent(keys.published_run(path.run_id), owner.to_bytes())
        await self._change(tenant, path, public=True)

    async def unpublish(self, tenant: str, path: TinkerPath) -> None:
        """Let only its own tenant read it; links to its archive that were given out end."""
        await self._change(tenant, path, public=False)

    async def set_ttl(self, tenant: str, path: TinkerPath, ttl_seconds: int | None) -> None:
        """Let it expire so many seconds from now, or never."""
        await self._change(tenant, path, expires_at=expiry(self._clock(), ttl_seconds))

    async def delete(self, tenant: str, path: TinkerPath) -> None:
        """Take the name away; a sweep removes the files once nothing needs them."""
        try:
            record = await self._own(tenant, path)
        except NotFound:
            # An earlier try may have died before the row.
            await self._lists.list_again(tenant, path)
            raise
        async with self._lists.changing(tenant, path, record.manifest_digest):
            await self._blobs.delete(_key(tenant, path))
            await self._blobs.delete(keys.archive(tenant, record.manifest_digest))

    async def files(self, tenant: str, path: TinkerPath) -> dict[str, str]:
        """File name -> object key of what a download of the checkpoint holds."""
        record = await self.read(tenant, path)
        manifest = await read_manifest(self._blobs, record.manifest_key)
        return {name: file.key for name, file in manifest.files.items() if name in PEFT_FILES}

    async def archive(self, tenant: str, path: TinkerPath) -> str:
        """Object key of the tar of its PEFT files; Unavailable while it is being made."""
        record = await self.read(tenant, path)
        key = keys.archive(record.tenant, record.manifest_digest)
        if not await is_made(self._blobs, record):
            if self._archives_by_job:
                await self._archives.wait(record)
                if not await is_made(self._blobs, record):  # it was deleted meanwhile
                    raise NotFound(str(path))
            else:
                await self._builds.finish(key, lambda: make(self._blobs, record))
        return key

    async def _change(self, tenant: str, path: TinkerPath, **changes: Any) -> None:
        """Change the tenant's own record and its row; what becomes private loses its archive."""
        record = await self._own(tenant, path)
        async with self._lists.changing(tenant, path, record.manifest_digest):
            changed = await self._swap(tenant, path, changes)
            if changes.get("public") is False:
                await self._blobs.delete(keys.archive(tenant, changed.manifest_digest))

    async def _swap(
        self, tenant: str, path: TinkerPath, changes: Mapping[str, Any]
    ) -> CheckpointRecord:
        key = _key(tenant, path)
        while True:
            await self._own(tenant, path)
            try:
                data, etag = await self._blobs.get_with_etag(key)
            except BlobMissing:
                continue  # deleted in this moment
            changed = CheckpointRecord.from_bytes(data).model_copy(update=changes)
            if await self._blobs.put_if_match(key, changed.to_bytes(), etag) is not None:
                return changed  # else somebody else changed it: look again

    async def _own(self, tenant: str, path: TinkerPath) -> CheckpointRecord:
        record = await self._find(tenant, path)
        if record is None:
            raise NotFound(str(path))
        return record

    async def _find(self, tenant: str, path: TinkerPath) -> CheckpointRecord | None:
        """The tenant's checkpoint, or None; it has none once it has expired."""
        stored = await self._stored(_key(tenant, path))
        if stored is None:
            return None
        record = CheckpointRecord.from_bytes(stored)
        expired = record.expires_at is not None and record.expires_at <= self._clock()
        return None if expired else record

    async def _stored(self, key: str) -> bytes | None:
        try:
            return await self._blobs.get(key)
        except BlobMissing:
            return None

    def _listing(self, tenant: str) -> Listing:
        return Listing(self._redis, tenant)


def _key(tenant: str, path: TinkerPath) -> str:
    return keys.name_record(tenant, path.run_id, path.kind, path.name)
