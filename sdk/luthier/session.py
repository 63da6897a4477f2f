"""A connection to a server, and the session on it: made when first needed, ended once."""

import asyncio
import atexit
import contextlib
import logging
import os
import sys
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import TimeoutError as WaitTimeout
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, TypeVar

from luthier import _loop
from luthier.errors import APIError, ClosedError, GoneError, LuthierError, NotFoundError
from luthier.future import APIFuture
from luthier.progress import StatusLine
from luthier.settings import Settings
from luthier.tracing import traced
from luthier.transport import SDK_VERSION, Transport

T = TypeVar("T")
FinishReason = Literal["success", "errored", "interrupted"]
log = logging.getLogger("luthier")

HEARTBEAT_S = 10.0
CLOSE_TIMEOUT_S = 10.0
"""How long the end of a session may take; the server ends by itself what sends no heartbeats."""


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """What the server wants of its clients (wire protocol 2.2)."""

    proto_compress_fwdbwd: bool = False
    fwdbwd_max_chunk_len: int = 1024
    fwdbwd_max_chunk_bytes_count: int = 5_000_000
    sample_max_concurrent_requests: int = 2000
    sample_use_retrieve_futures: bool = False
    sample_join_sampling_session: bool = False


class Session:
    """The server's session of one ServiceClient, or of one process that shares it.

    Everything but `close_now` and `start` runs on the background loop. Owned: a session that this
    process has made, and ends; else one that it only keeps alive.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        session_id: str | None = None,
        user_metadata: dict[str, str] | None = None,
        display_name: str | None = None,
    ) -> None:
        self.settings = settings
        self.status = StatusLine()
        self.transport = Transport(settings, self.status)
        self.model_seqs = count()
        self.sampling_seqs = count()
        self._id = session_id
        self._is_owned = session_id is None
        self._user_metadata = user_metadata
        self._display_name = display_name
        self._config: asyncio.Task[ClientConfig] | None = None
        self._creation: asyncio.Task[str] | None = None
        self._heart: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._last_words: set[asyncio.Task[Any]] = set()
        self._is_closed = False
        self._pid = os.getpid()
        _open_sessions.add(self)

    @property
    def is_closed(self) -> bool:
        """Whether its end has begun."""
        return self._is_closed

    def start(self, coroutine: Coroutine[Any, Any, T]) -> APIFuture[T]:
        """An operation of this session: it ends with the session at the latest."""
        if self._is_closed:
            coroutine.close()
            raise ClosedError("this client is closed")
        return _loop.start(self._tracked(traced(coroutine)))

    async def _tracked(self, coroutine: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await coroutine
        finally:
            self._tasks.discard(task)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """A task of the session that no future of a user stands for."""
        return _kept(self._tasks, coroutine)

    def spawn_last_word(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """A task that the end of the session waits for: a cancelled sample tells the server."""
        _kept(self._last_words, coroutine)

    # --- what the server says -----------------------------------------------------------------

    async def config(self) -> ClientConfig:
        """Asked for once."""
        if self._config is None:
            self._config = self.spawn(self._ask_config())
        return await asyncio.shield(self._config)

    async def id(self) -> str:
        """The session's id; the session is made by the first call."""
        if self._id is not None:
            self._keep_alive(self._id)
            return self._id
        if self._creation is None or (self._creation.done() and self._failed(self._creation)):
            self._creation = self.spawn(self._create())
        return await asyncio.shield(self._creation)

    @staticmethod
    def _failed(task: "asyncio.Task[str]") -> bool:
        return task.cancelled() or task.exception() is not None

    async def _ask_config(self) -> ClientConfig:
        response = await self.transport.call(
            "POST", "client/config", {"sdk_version": SDK_VERSION}, handed_back=(404,)
        )
        if response.status == 404:
            return ClientConfig()
        known = ClientConfig.__dataclass_fields__
        said = {name: value for name, value in response.json().items() if name in known}
        return ClientConfig(**said)

    async def _create(self) -> str:
        answer = await self.transport.call(
            "POST",
            "create_session",
            {
                "tags": list(self.settings.tags),
                "user_metadata": self._user_metadata,
                "sdk_version": SDK_VERSION,
                "project_id": self.settings.project_id,
                "display_name": self._display_name,
            },
        )
        said = answer.json()
        for level in ("info", "warning", "error"):
            if said.get(f"{level}_message"):
                log.log(logging.getLevelNamesMapping()[level.upper()], said[f"{level}_message"])
        self._id = answer.text_field("session_id")
        self._keep_alive(self._id)
        return self._id

    def _keep_alive(self, session_id: str) -> None:
        if self._heart is None:
            heart = _beat(weakref.ref(self), self.transport, session_id, self._is_owned)
            self._heart = self.spawn(heart)

    async def open_sampler(self, weights: Mapping[str, str]) -> str:
        """The id of a new sampling session; weights: its model_path, or its base_model."""
        opened = await self.transport.call(
            "POST",
            "create_sampling_session",
            {
                "type": "create_sampling_session",
                "session_id": await self.id(),
                "sampling_session_seq_id": next(self.sampling_seqs),
                **weights,
            },
        )
        return opened.text_field("sampling_session_id")

    # --- the end --------------------------------------------------------------------------------

    async def close(self, reason: FinishReason, detail: str | None = None) -> None:
        """Ends the session; a repeat does nothing. Requests without a result are given up.

        Samples among them are cancelled at the server first. Errors are logged: there is nothing
        that a program could do about them, and the server ends lost sessions by itself.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._end(reason, detail)
        except (TimeoutError, LuthierError) as error:
            log.warning("the session could not be ended: %s", error or "no answer")
        finally:
            await self.transport.close()

    async def _end(self, reason: FinishReason, detail: str | None) -> None:
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._last_words, return_exceptions=True)
        if self._is_owned and self._id is not None:
            await _finish(self.transport, self._id, reason, detail)

    def close_now(self, reason: FinishReason, detail: str | None) -> None:
        """From a thread, at the end of the process."""
        if self._pid == os.getpid() and not self._is_closed:
            with contextlib.suppress(WaitTimeout, RuntimeError, KeyboardInterrupt):
                _loop.start(self.close(reason, detail)).future().result(CLOSE_TIMEOUT_S)


async def _beat(
    session: "weakref.ref[Session]", transport: Transport, session_id: str, is_owned: bool
) -> None:
    """Keeps a session alive for as long as anybody holds one of its clients, then ends it."""
    while session() is not None:
        await asyncio.sleep(HEARTBEAT_S)
        # A heartbeat that fails is replaced by the next one; the requests say what is wrong.
        with contextlib.suppress(APIError):
            try:
                await transport.call(
                    "POST",
                    "session_heartbeat",
                    {"session_id": session_id},
                    timeout_s=HEARTBEAT_S,
                    patience_s=HEARTBEAT_S,
                )
            except (GoneError, NotFoundError):
                return
    with contextlib.suppress(APIError):
        if is_owned:
            await _finish(transport, session_id, "success", "nobody held its clients any more")
    await transport.close()


async def _finish(
    transport: Transport, session_id: str, reason: FinishReason, detail: str | None
) -> None:
    await transport.call(
        "POST",
        f"sessions/{session_id}/finish",
        {"reason": {"type": reason}, "detail": detail},
        patience_s=CLOSE_TIMEOUT_S,
    )


def reason_of(error: BaseException | None) -> tuple[FinishReason, str | None]:
    """Why a session ends, from what ended the program or the `with` block."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "success", None
    if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
        return "interrupted", None
    return "errored", f"{type(error).__name__}: {error}"[:1000]


def _kept(tasks: set[asyncio.Task[Any]], coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    task = asyncio.get_running_loop().create_task(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


_open_sessions: "weakref.WeakSet[Session]" = weakref.WeakSet()


def _close_all(last_error: Callable[[], BaseException | None]) -> None:
    reason, detail = reason_of(last_error())
    for session in list(_open_sessions):
        session.close_now(reason, detail)


# A program that ends without closing its client still frees its place at the server.
atexit.register(_close_all, lambda: getattr(sys, "last_value", None))
