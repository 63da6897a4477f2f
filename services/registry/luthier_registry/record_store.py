"""Records of one kind or another: JSON objects in the store, their lists in Redis."""

import re
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

import redis.asyncio as redis

from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.errors import NotFound
from luthier_core.listing import Listing
from luthier_core.records import Record

R = TypeVar("R", bound=Record)

SESSION_ID = re.compile(r"[0-9a-f]{32}")
RUN_ID = re.compile(r"[0-9a-f]{32}:train:\d{1,10}")
SAMPLER_ID = re.compile(r"[0-9a-f]{32}:sample:\d{1,10}")
KEY_HMAC = re.compile(r"[0-9a-f]{64}")
KEY_ID = re.compile(r"[0-9a-f]{12}")
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class RecordStore:
    """Reads, creates and changes records. Holds no state."""

    def __init__(self, blobs: Blobs, client: redis.Redis, *, clock: Callable[[], datetime]) -> None:
        self._blobs = blobs
        self._redis = client
        self._clock = clock

    def _listing(self, tenant: str) -> Listing:
        return Listing(self._redis, tenant)

    async def _read(self, kind: type[R], key: str, what: str) -> R:
        try:
            return kind.from_bytes(await self._blobs.get(key))
        except BlobMissing:
            raise NotFound(what) from None

    async def _update(self, kind: type[R], key: str, what: str, change: Callable[[R], R]) -> R:
        """The record after `change`, which is not written if it changes nothing."""
        while True:
            try:
                data, etag = await self._blobs.get_with_etag(key)
            except BlobMissing:
                raise NotFound(what) from None
            record = kind.from_bytes(data)
            changed = change(record)
            if changed == record:
                return record
            if await self._blobs.put_if_match(key, changed.to_bytes(), etag) is not None:
                return changed  # else somebody else changed it: look again

    async def _create(self, key: str, record: R) -> R:
        """The record, or the one that was there first."""
        if await self._blobs.put_if_absent(key, record.to_bytes()):
            return record
        return type(record).from_bytes(await self._blobs.get(key))


def check_id(rule: re.Pattern[str], value: str, field: str) -> None:
    """NotFound unless the value could be an id: nothing else becomes part of an object key."""
    if not rule.fullmatch(value):
        raise NotFound(f"{field}={value[:100]!r}")


def cursor(offset: int, limit: int, total_count: int) -> dict[str, int]:
    """The Cursor object of wire protocol 8.1."""
    return {"offset": offset, "limit": limit, "total_count": total_count}
