"""The audit log: one immutable object per event, each sealed and chained to the one before.

Entry n is created if absent, so two writers cannot both be n, and no number is left out. Its `prev`
is the sha256 of entry n-1 and its `seal` an HMAC under the server secret: an edit, a removal or an
insertion shows (reliability S18). A cut at the end shows by the head that Redis remembers.
"""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import redis.asyncio as redis
from pydantic import AwareDatetime

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.records import Record

FIRST_PREV = "0" * 64
EVENT_TYPES = ("all", "checkpoints", "projects", "teams", "organizations")
"""Of the API (wire protocol 8.2); an event's name begins with its type."""
MAX_ENTRIES = 10_000
"""Of one answer."""


class AuditEntry(Record):
    """`t/{tenant}/audit/{number}.json`"""

    number: int
    at: AwareDatetime
    event: str
    """type.verb, such as checkpoints.publish"""
    actor: str
    """Id of the API key; empty for the service itself."""
    outcome: str
    """ok, or the class of the error."""
    details: dict[str, Any]
    prev: str
    seal: str = ""

    def sealed(self, secret: bytes) -> "AuditEntry":
        return self.model_copy(update={"seal": self.seal_under(secret)})

    def seal_under(self, secret: bytes) -> str:
        text = self.model_copy(update={"seal": ""}).to_bytes()
        return hmac.new(secret, b"audit:" + text, hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class Checked:
    """What verify has found."""

    num_entries: int
    broken_at: int | None
    """Number of the first entry that is not as it was written; None: all are."""


class Audit:
    """The audit logs of all tenants."""

    def __init__(
        self, blobs: Blobs, client: redis.Redis, secret: bytes, *, clock: Callable[[], datetime]
    ) -> None:
        self._blobs = blobs
        self._redis = client
        self._secret = secret
        self._clock = clock
        self._last: dict[str, tuple[int, str]] = {}
        """Tenant -> (number, sha256) of the last entry that this process knows of."""

    async def append(
        self, tenant: str, event: str, *, actor: str, outcome: str, details: dict[str, Any]
    ) -> AuditEntry:
        """Store one event behind all that there are."""
        number, prev = self._last.get(tenant) or await self._find_last(tenant)
        while True:
            number += 1
            entry = AuditEntry(
                number=number,
                at=self._clock(),
                event=event,
                actor=actor,
                outcome=outcome,
                details=details,
                prev=prev,
            ).sealed(self._secret)
            data = entry.to_bytes()
            is_ours = await self._blobs.put_if_absent(keys.audit_entry(tenant, number), data)
            if not is_ours:  # another registry was faster: chain to its entry
                data = await self._blobs.get(keys.audit_entry(tenant, number))
            prev = hashlib.sha256(data).hexdigest()
            self._last[tenant] = number, prev
            if is_ours:
                await self._redis.set(keys.audit_head(tenant), f"{number} {prev}")
                return entry

    async def of_day(self, tenant: str, day: date, event_type: str) -> list[AuditEntry]:
        """The events of one day in UTC, in order, MAX_ENTRIES at most."""
        last, _ = await self._find_last(tenant)
        number = await self._first_on(tenant, day, last)
        found: list[AuditEntry] = []
        while number <= last and len(found) < MAX_ENTRIES:
            entry = await self._entry(tenant, number)
            if entry.at.date() > day:
                break
            if event_type in ("all", entry.event.partition(".")[0]):
                found.append(entry)
            number += 1
        return found

    async def verify(self, tenant: str) -> Checked:
        """Read the whole chain: is every entry as it was written, and is the last one there?"""
        number, prev = 0, FIRST_PREV
        while True:
            try:
                data = await self._blobs.get(keys.audit_entry(tenant, number))
            except BlobMissing:
                break
            if not self._is_intact(data, number, prev):
                return Checked(number, number)
            number, prev = number + 1, hashlib.sha256(data).hexdigest()
        head = await self._redis.get(keys.audit_head(tenant))
        # A later entry than the head that we know is none the worse for it.
        is_cut = head is not None and int(head.split()[0]) >= number
        return Checked(number, number if is_cut else None)

    def _is_intact(self, data: bytes, number: int, prev: str) -> bool:
        try:
            entry = AuditEntry.from_bytes(data)
        except ValueError:
            return False
        seal = entry.seal_under(self._secret)
        # Also the bytes: a change that reads the same is a change.
        return (
            (entry.number, entry.prev, entry.to_bytes()) == (number, prev, data)
        ) and hmac.compare_digest(seal, entry.seal)

    async def _find_last(self, tenant: str) -> tuple[int, str]:
        """(number, sha256) of the last entry; numbers are dense, so a search finds the end."""
        step = 1
        while await self._is_there(tenant, step - 1):
            step *= 2
        low, high = step // 2 - 1, step - 1  # low is there (or -1), high is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if await self._is_there(tenant, middle) else (low, middle)
        if low < 0:
            return -1, FIRST_PREV
        data = await self._blobs.get(keys.audit_entry(tenant, low))
        return low, hashlib.sha256(data).hexdigest()

    async def _first_on(self, tenant: str, day: date, last: int) -> int:
        """Number of the first entry of this day or later: entries are in order of time."""
        low, high = 0, last + 1
        while low < high:
            middle = (low + high) // 2
            if (await self._entry(tenant, middle)).at.date() < day:
                low = middle + 1
            else:
                high = middle
        return low

    async def _entry(self, tenant: str, number: int) -> AuditEntry:
        return AuditEntry.from_bytes(await self._blobs.get(keys.audit_entry(tenant, number)))

    async def _is_there(self, tenant: str, number: int) -> bool:
        return await self._blobs.size(keys.audit_entry(tenant, number)) is not None
