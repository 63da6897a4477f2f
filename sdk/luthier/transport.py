"""The one HTTP client of a connection to a server: pool, retries, back-off, error mapping.

A request is sent again, byte for byte and under the same idempotency key, for as long as its
`patience_s`: after a connection error, a timeout, a 408, a 429 or a 5xx. Every request of the
protocol may arrive twice: seq ids and idempotency keys make the second one harmless. So a server
that restarts, or a gateway that is killed, is a pause and not an exception.
"""

import asyncio
import platform
import random
import urllib.parse
import urllib.request
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from luthier.errors import (
    APIConnectionError,
    APIResponseValidationError,
    APITimeoutError,
    status_error,
)
from luthier.progress import StatusLine
from luthier.settings import Settings
from luthier.tracing import put_trace

if TYPE_CHECKING:
    import aiohttp

M = TypeVar("M", bound=BaseModel)

PATIENCE_S = 1800.0
"""How long a request is tried while a server is away that was there before."""
FIRST_PATIENCE_S = 60.0
"""How long the first request is tried: nothing is lost yet, and the URL may be wrong."""
ANSWER_TIMEOUT_S = 60.0
"""Longer than a server may take for anything but a poll, which has POLL_TIMEOUT_S."""
POLL_TIMEOUT_S = 45.0
CONNECT_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 1024
"""Above what the limits on polls, samples and fetches can add up to in ordinary use."""
MAX_BACKOFF_S = 10.0
"""So a server that was away for long is found again soon."""
MAX_RETRY_AFTER_S = 60.0
RETRIED_STATUSES = frozenset({408, 429})
SDK_VERSION = version("luthier")

Body: TypeAlias = bytes | Callable[[], AsyncIterator[bytes]]

JSON = "application/json"
PROTOBUF = "application/x-protobuf"


@dataclass(frozen=True, slots=True)
class Response:
    """One answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_json(self) -> bool:
        return self.headers.get("Content-Type", "").startswith(JSON)

    def json(self) -> dict[str, Any]:
        """The JSON object in it; APIResponseValidationError if there is none."""
        try:
            value = orjson.loads(self.body or b"{}")
        except orjson.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise APIResponseValidationError(f"no JSON object: {self.body[:200]!r}")
        return value

    def parsed(self, model: type[M]) -> M:
        """The JSON as a model; APIResponseValidationError naming what does not fit."""
        value = self.json()
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise APIResponseValidationError(str(error), body=value) from None

    def text_field(self, name: str) -> str:
        """A field that must be a string."""
        value = self.json().get(name)
        if not isinstance(value, str):
            raise APIResponseValidationError(f"{name}: missing in {self.body[:200]!r}")
        return value


class Transport:
    """Requests to one server with one key, over one pool. Used on the background loop only."""

    def __init__(self, settings: Settings, status: StatusLine) -> None:
        self.settings = settings
        self.status = status
        self._http: aiohttp.ClientSession | None = None
        self._was_reached = False

    async def call(
        self,
        method: str,
        path: str,
        value: Any = None,
        *,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str | int] | None = None,
        handed_back: Collection[int] = (),
        patience_s: float | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> Response:
        """The answer with a status below 400, or one of `handed_back`.

        value: sent as JSON; body: sent as it is, or what it yields, anew for each try.
        APIStatusError for a status that is final; APIConnectionError or the last status once
        patience_s have passed.
        """
        data: Body | None = orjson.dumps(value) if value is not None else body
        sent = self._headers(method, headers)
        loop = asyncio.get_running_loop()
        patience_s = patience_s or (PATIENCE_S if self._was_reached else FIRST_PATIENCE_S)
        deadline, attempt, is_away = loop.time() + patience_s, 0, False
        while True:
            wait_s = _backoff_s(attempt)
            attempt += 1
            try:
                response = await self._once(method, path, data, sent, query, timeout_s)
            except APIConnectionError as error:
                if loop.time() + wait_s > deadline:
                    raise
                reason = str(error)
            else:
                self._was_reached = True
                if response.status < 400 or response.status in handed_back:
                    if is_away:
                        self.status.clear(self)
                    return response
                retried = response.status in RETRIED_STATUSES or response.status >= 500
                if not retried or loop.time() + wait_s > deadline:
                    raise _error_of(response)
                wait_s = _retry_after_s(response) or wait_s
                reason = _message_of(response)
            if attempt > 1:  # a single lost connection is not worth a word
                is_away = True
                self.status.show(self, f"{self.settings.base_url}: {reason}; trying again")
            await asyncio.sleep(wait_s)

    async def close(self) -> None:
        """Closes the pool."""
        if self._http is not None:
            http, self._http = self._http, None
            await http.close()

    async def _once(
        self,
        method: str,
        path: str,
        data: Body | None,
        headers: Mapping[str, str],
        query: Mapping[str, str | int] | None,
        timeout_s: float,
    ) -> Response:
        import aiohttp

        url = f"{self.settings.base_url}/api/v1/{path}"
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._pool().request(
                method,
                url,
                data=data() if callable(data) else data,
                headers=headers,
                params=query,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                return Response(response.status, response.headers, await response.read())
        except TimeoutError:
            raise APITimeoutError(f"no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise APIConnectionError(f"{type(error).__name__}: {error}") from None

    def _pool(self) -> "aiohttp.ClientSession":
        """Opened at the first request: aiohttp takes a while to import."""
        if self._http is None:
            import aiohttp

            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=MAX_CONNECTIONS, keepalive_timeout=60, ttl_dns_cache=600
                ),
                headers={
                    "X-API-Key": self.settings.api_key,
                    "User-Agent": f"Luthier/{SDK_VERSION} Python/{platform.python_version()}",
                    **self.settings.headers,
                },
                proxy=_proxy_of(self.settings.base_url),
            )
            # A client that is dropped without close() leaves no open sockets behind.
            loop = asyncio.get_running_loop()
            weakref.finalize(self, _close_on, loop, self._http).atexit = False
        return self._http

    def _headers(self, method: str, headers: Mapping[str, str] | None) -> dict[str, str]:
        sent = {"Accept": JSON, "Content-Type": JSON, **(headers or {})}
        if method == "GET":
            del sent["Content-Type"]
        else:
            sent.setdefault("X-Idempotency-Key", f"luthier-{uuid.uuid4()}")
        put_trace(sent)
        return sent


def _close_on(loop: asyncio.AbstractEventLoop, http: "aiohttp.ClientSession") -> None:
    if not http.closed and not loop.is_closed():
        asyncio.run_coroutine_threadsafe(http.close(), loop)


def _proxy_of(url: str) -> str | None:
    """What the environment says. Not left to aiohttp: it reads that on a pool of threads, which is
    gone when a session is ended at the end of the process."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _backoff_s(attempt: int) -> float:
    """0.25, 0.5, 1, ... seconds, at most MAX_BACKOFF_S, less up to a half at random."""
    return min(0.25 * 2.0 ** min(attempt, 10), MAX_BACKOFF_S) * random.uniform(0.5, 1.0)


def _retry_after_s(response: Response) -> float | None:
    """What the server asks for, if it is a number of seconds."""
    try:
        return min(max(float(response.headers["Retry-After"]), 0.05), MAX_RETRY_AFTER_S)
    except (KeyError, ValueError):
        return None


def _error_of(response: Response) -> Exception:
    try:
        body: object = orjson.loads(response.body)
    except orjson.JSONDecodeError:
        body = response.body.decode(errors="replace")
    return status_error(response.status, _message_of(response), body)


def _message_of(response: Response) -> str:
    """The server's sentence, with the status in front of it."""
    text = response.body[:2000].decode(errors="replace").strip()
    try:
        value = orjson.loads(response.body)
        text = str(value.get("detail") or value.get("message") or value.get("error") or text)
    except (orjson.JSONDecodeError, AttributeError):
        pass
    return f"{response.status}: {text or 'no reason given'}"
