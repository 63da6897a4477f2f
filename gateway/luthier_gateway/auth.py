"""API key to caller, and each tenant's share of this process.

Keys are looked up by their HMAC; the key itself is kept nowhere.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from luthier_core.auth import is_damaged, key_hmac, key_id
from luthier_core.caller import Caller
from luthier_core.errors import NotFound, TooManyRequests, Unauthorized
from luthier_core.records import ApiKeyRecord, Identity
from luthier_core.registry_client import RegistryClient

CACHED_KEYS = 10_000
MAX_KEY_CHARS = 512


class Authenticator:
    """Believes a looked-up key for `cache_s`, so a revoked key works no longer than that."""

    def __init__(
        self,
        registry: RegistryClient,
        secret: bytes,
        *,
        cache_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._secret = secret
        self._cache_s = cache_s
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, Caller]] = OrderedDict()

    async def caller(self, key: str | None) -> Caller:
        """Who presents this key; Unauthorized if it is nobody's."""
        if not key:
            raise Unauthorized("send it in the header X-API-Key")
        if len(key) > MAX_KEY_CHARS or is_damaged(key):
            raise Unauthorized("it is no key of this server: cut short, or mistyped")
        name = key_hmac(self._secret, key)
        until, caller = self._known.get(name, (0.0, None))
        if caller is None or until < self._clock():
            identity = await self._identity(name)
            caller = _caller(name, identity)
            self._known[name] = (self._clock() + self._believed_for_s(identity.key), caller)
            self._known.move_to_end(name)
            if len(self._known) > CACHED_KEYS:
                self._known.popitem(last=False)
        return caller

    async def look_up(self, key: str) -> tuple[str, Identity]:
        """(HMAC of the key, what it is now); Unauthorized if it is nobody's."""
        name = key_hmac(self._secret, key)
        return name, await self._identity(name)

    async def revoke(self, key: str) -> None:
        """End the key, here at once."""
        name, _ = await self.look_up(key)
        await self._registry.revoke_key(name)
        self._known.pop(name, None)

    def forget(self, wanted_id: str) -> None:
        """A key of this id has changed: look at it again."""
        for name in [name for name in self._known if key_id(name) == wanted_id]:
            del self._known[name]

    async def _identity(self, name: str) -> Identity:
        try:
            return await self._registry.get_key(name)
        except NotFound:
            self._known.pop(name, None)
            raise Unauthorized("no such key") from None

    def _believed_for_s(self, key: ApiKeyRecord) -> float:
        if key.expires_at is None:
            return self._cache_s
        left_s = (key.expires_at - datetime.now(UTC)).total_seconds()
        return max(min(self._cache_s, left_s), 0.0)


def _caller(name: str, identity: Identity) -> Caller:
    key = identity.key
    return Caller(
        tenant=key.tenant,
        key_id=key_id(name),
        scopes=frozenset(key.scopes),
        project_id=key.project_id,
        key_limits=key.limits,
        tenant_limits=identity.tenant_limits,
    )


@dataclass(slots=True)
class _Share:
    """Of one tenant that has requests here."""

    turns: asyncio.Semaphore
    num_requests: int = 0


class Turns:
    """Requests of a tenant beyond `at_once` wait, and beyond that and `max_waiting` are refused.

    So however much one tenant sends, another waits for `at_once` of its requests at most. A long
    poll takes no turn: it works for a moment only.
    """

    def __init__(self, *, at_once: int, max_waiting: int) -> None:
        self._at_once = at_once
        self._max_requests = at_once + max_waiting
        self._shares: dict[str, _Share] = {}

    @contextlib.asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[None]:
        """A turn of this tenant; TooManyRequests if too many wait for one."""
        share = self._shares.setdefault(tenant, _Share(asyncio.Semaphore(self._at_once)))
        if share.num_requests >= self._max_requests:
            raise TooManyRequests("too many of your requests wait at this gateway")
        share.num_requests += 1
        try:
            async with share.turns:
                yield
        finally:
            share.num_requests -= 1
            if not share.num_requests:
                del self._shares[tenant]
