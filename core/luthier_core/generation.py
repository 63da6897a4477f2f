"""Whether this Redis is the one that the object store knows (reliability 2.5, point 1).

Both hold a generation id. A Redis that was wiped, or replaced, has none or another: nothing may be
admitted before its headers were made again from the object store. The registry does that, and then
gives both a new id.
"""

import secrets
from typing import Any

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs


class Generation:
    """The generation ids of one deployment."""

    def __init__(self, client: redis.Redis, blobs: Blobs) -> None:
        self._redis = client
        self._blobs = blobs
        self._stored = b""
        self._is_ours = False
        """The store had no id before this process made one, which Redis has not been given yet."""

    async def is_confirmed(self) -> bool:
        """Whether Redis and the object store have the same id; a new deployment is given one."""
        found: Any = await self._redis.get(keys.GENERATION)
        if found is not None and found == self._stored:
            return True
        self._stored = await self._read_stored(found)
        if found is None and self._is_ours:
            # Nothing was stored before this id: there is nothing that Redis could have lost.
            found = await self._redis.set(keys.GENERATION, self._stored, nx=True, get=True)
            found = self._stored if found is None else found
            self._is_ours = False
        return bool(found == self._stored)

    async def renew(self) -> None:
        """Redis has been brought in line with the store: from now on they are a pair."""
        self._stored, self._is_ours = _new_id(), False
        await self._blobs.put(keys.GENERATION_OBJECT, self._stored)
        await self._redis.set(keys.GENERATION, self._stored)

    async def _read_stored(self, of_redis: bytes | None) -> bytes:
        try:
            return await self._blobs.get(keys.GENERATION_OBJECT)
        except BlobMissing:
            wanted = of_redis or _new_id()
            self._is_ours = await self._blobs.put_if_absent(keys.GENERATION_OBJECT, wanted)
            return await self._blobs.get(keys.GENERATION_OBJECT)


def _new_id() -> bytes:
    return secrets.token_hex(16).encode()
