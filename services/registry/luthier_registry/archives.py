"""Archives that a job makes instead of the registry: what is wanted, and the job that makes it.

What is wanted lies in Redis until it is made, so a job that is lost, killed or doubled changes
nothing: the next one makes the same bytes. Who waits is woken by the end of it, good or bad.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.checkpoints import TinkerPath, read_manifest
from luthier_core.errors import CheckpointDamaged, TooManyRequests, Unavailable
from luthier_core.records import CheckpointRecord
from luthier_registry.archive import ArchiveFile, write_archive
from luthier_registry.builds import WAIT_S

PEFT_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
"""What a download holds; the state of the optimizer beside them is of use to nobody else."""
WANTED = "archives:wanted"
"""Hash `tenant path digest` -> since when."""
MAX_WANTED = 1000
TOLD_S = 60
"""How long the end of a build is told to those who come back for it."""


class Archives:
    """What is wanted by all tenants. Holds no state."""

    def __init__(self, blobs: Blobs, client: redis.Redis, *, clock: Callable[[], datetime]) -> None:
        self._blobs = blobs
        self._redis = client
        self._clock = clock

    async def wait(self, record: CheckpointRecord) -> None:
        """Returns once the job has made the archive of this checkpoint.

        Unavailable if that takes longer than a call waits; CheckpointDamaged if it cannot be made.
        """
        if await cast(Any, self._redis.hlen(WANTED)) >= MAX_WANTED:
            raise TooManyRequests("too many archives are being made")
        told = _told(record.manifest_digest)
        await self._redis.delete(told)
        wanted = f"{record.tenant} {record.tinker_path} {record.manifest_digest}"
        await cast(Any, self._redis.hset(WANTED, wanted, self._clock().isoformat()))
        found: Any = await self._redis.xread({told: "0"}, block=int(1000 * WAIT_S), count=1)
        if not found:
            raise Unavailable("it is still being made")
        # RESP2 answers with a list of pairs, RESP3 with a map of lists of lists.
        entries = found[0][1] if isinstance(found, list) else next(iter(found.values()))[0]
        if error := entries[0][1][b"error"].decode():
            raise CheckpointDamaged(error)

    async def run(self) -> dict[str, int]:
        """The job: make what is wanted."""
        num_made = 0
        wanted: dict[bytes, bytes] = await cast(Any, self._redis.hgetall(WANTED))
        for name in wanted:
            tenant, path, digest = name.decode().split(" ")
            error = ""
            try:
                num_made += await self._make(tenant, TinkerPath.parse(path), digest)
            except CheckpointDamaged as damaged:
                error = damaged.detail
            # Last: a job that dies before leaves it to the next one.
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.xadd(_told(digest), {"error": error})
                pipe.expire(_told(digest), TOLD_S)
                pipe.hdel(WANTED, name.decode())
                await pipe.execute()
        return {"made": num_made}

    async def _make(self, tenant: str, path: TinkerPath, digest: str) -> bool:
        """Whether it was made: not if it is there, or its checkpoint has gone."""
        name = keys.name_record(tenant, path.run_id, path.kind, path.name)
        try:
            record = CheckpointRecord.from_bytes(await self._blobs.get(name))
        except BlobMissing:
            return False
        if record.manifest_digest != digest or await is_made(self._blobs, record):
            return False
        await make(self._blobs, record)
        return True


async def is_made(blobs: Blobs, record: CheckpointRecord) -> bool:
    return await blobs.size(keys.archive(record.tenant, record.manifest_digest)) is not None


async def make(blobs: Blobs, record: CheckpointRecord) -> None:
    """Store the tar of its PEFT files, streamed; CheckpointDamaged if one has changed."""
    manifest = await read_manifest(blobs, record.manifest_key)
    files = [
        ArchiveFile(name, file.key, file.num_bytes, file.sha256)
        for name, file in sorted(manifest.files.items())
        if name in PEFT_FILES
    ]
    await write_archive(blobs, keys.archive(record.tenant, record.manifest_digest), files)


def _told(digest: str) -> str:
    return f"archives:made:{digest}"
