"""How a stack finds out what its parts can do. Every question has a limit of PROBE_S seconds."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from urllib.parse import urlsplit

import aiohttp
import redis.asyncio as redis

from luthier_core import keys
from luthier_core.errors import ConfigError
from luthier_core.oplog import REDIS_ERRORS, Oplog
from luthier_core.redis_server import check_server

PROBE_S = 2.0


class Probes:
    """Asks Redis, the registry and the gateway. An answer that does not come is no error."""

    def __init__(
        self, client: redis.Redis, http: aiohttp.ClientSession, *, url: str, registry_socket: str
    ) -> None:
        self._redis = client
        self._oplog = Oplog(client)
        self._http = http
        self._url = url
        self._registry_socket = registry_socket

    async def redis_error(self) -> str:
        """Empty if Redis answers (it does not while it loads its log), else why it does not."""
        try:
            async with asyncio.timeout(PROBE_S):
                await self._redis.ping()
        except TimeoutError:
            return f"no answer within {PROBE_S:g} s"
        except REDIS_ERRORS as error:
            return str(error)
        return ""

    async def check_redis(self, *, allow_volatile: bool) -> None:
        """ConfigError with one sentence if this Redis cannot be used."""
        if error := await self.redis_error():
            raise ConfigError(f"--redis: {error}")
        try:
            await check_server(self._redis, allow_volatile=allow_volatile)
        except ConfigError as error:
            raise ConfigError(f"--redis: {error}") from None

    async def registry_answers(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_S):
                _, writer = await asyncio.open_unix_connection(self._registry_socket)
        except (TimeoutError, OSError):
            return False
        writer.close()
        return True

    async def workers(self) -> Mapping[str, Mapping[str, object]]:
        """name -> lease of every live worker: pid, state, ..."""
        with contextlib.suppress(TimeoutError, *REDIS_ERRORS):
            async with asyncio.timeout(PROBE_S):
                return await self._oplog.live_workers()
        return {}

    async def missing(self) -> list[str] | None:
        """What healthz says is missing; empty if everything is ready, None without an answer."""
        timeout = aiohttp.ClientTimeout(total=PROBE_S)
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, ValueError):
            async with self._http.get(f"{self._url}/api/v1/healthz", timeout=timeout) as response:
                if response.status == 200:
                    return []
                answer = await response.json()
                return [str(name) for name in answer.get("missing", ["healthz"])]
        return None

    async def forget_leases(self, workers: Sequence[str]) -> None:
        """Delete the leases of workers known to be dead, so that takeover does not wait."""
        if not workers:
            return
        with contextlib.suppress(TimeoutError, *REDIS_ERRORS):
            async with asyncio.timeout(PROBE_S):
                await self._redis.delete(*(keys.worker_lease(name) for name in workers))


@contextlib.asynccontextmanager
async def open_probes(redis_url: str, *, url: str, registry_url: str) -> AsyncIterator[Probes]:
    """Probes with connections of their own; nothing is asked yet."""
    client = redis.Redis.from_url(redis_url, socket_timeout=PROBE_S, socket_connect_timeout=PROBE_S)
    async with client, aiohttp.ClientSession() as http:
        yield Probes(client, http, url=url, registry_socket=urlsplit(registry_url).path)
