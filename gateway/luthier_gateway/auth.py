"""API key to tenant. Keys are looked up by their HMAC; the key itself is kept nowhere."""

import time
from collections import OrderedDict
from collections.abc import Callable

from luthier_core.auth import key_hmac
from luthier_core.errors import NotFound, Unauthorized
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
        name = key_hmac(self._secret, key)
        until, tenant = self._known.get(name, (0.0, ""))
        if until < self._clock():
            try:
                tenant = (await self._registry.get_key(name)).tenant
            except NotFound:
                self._known.pop(name, None)
                raise Unauthorized("no such key") from None
            self._known[name] = (self._clock() + self._cache_s, tenant)
            self._known.move_to_end(name)
            if len(self._known) > CACHED_KEYS:
                self._known.popitem(last=False)
        return tenant
