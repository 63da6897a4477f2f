"""API key to tenant. Keys are looked up by their HMAC; the key itself is kept nowhere."""

import time
from collections import OrderedDict
from collections.abc import Callable

from luthier_core.auth import key_hmac
from luthier_core.errors import NotFound, Unauthorized
from luthier_core.records import ApiKeyRecord
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
        self._known: OrderedDict[str, tuple[float, str]] = OrderedDict()

    async def tenant(self, key: str | None) -> str:
        """The tenant whose key this is; Unauthorized if it is nobody's."""
        if not key:
            raise Unauthorized("send it in the header X-API-Key")
        if len(key) > MAX_KEY_CHARS:
            raise Unauthorized("no key is that long")
        until, tenant = self._known.get(key_hmac(self._secret, key), (0.0, ""))
        if until < self._clock():
            name, record = await self.look_up(key)
            tenant = record.tenant
            self._known[name] = (self._clock() + self._cache_s, tenant)
            self._known.move_to_end(name)
            if len(self._known) > CACHED_KEYS:
                self._known.popitem(last=False)
        return tenant

    async def look_up(self, key: str) -> tuple[str, ApiKeyRecord]:
        """(HMAC of the key, its record as it is now); Unauthorized if it is nobody's."""
        name = key_hmac(self._secret, key)
        try:
            return name, await self._registry.get_key(name)
        except NotFound:
            self._known.pop(name, None)
            raise Unauthorized("no such key") from None

    async def revoke(self, key: str) -> None:
        """End the key, here at once."""
        name, _ = await self.look_up(key)
        await self._registry.revoke_key(name)
        self._known.pop(name, None)
