"""The requests of one training run: numbered in the order of the calls, sent, and their results."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, TypeVar

import orjson

from luthier.errors import RequestFailedError
from luthier.polling import retrieve
from luthier.session import Session
from luthier.transport import Response

T = TypeVar("T")

MAX_SENDING = 8
"""Requests of one run on their way at once. The server puts them in the order of their numbers, so
that a slow network costs its latency once and not for every request."""
MAX_POLLS = 8
"""Results of one run waited for at once. They come in order, so more would only wait longer."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One request as it is sent."""

    endpoint: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class Encode(Protocol):
    """Makes a request, once its run and its number are known."""

    async def __call__(self, model_id: str, seq: int) -> Outgoing: ...


class RunRequests:
    """The line that the requests of one run stand in. Used on the background loop, but next_call.

    Sending is never given up half way: a number that is taken is sent, because the server lets
    every later request of the run wait for it. So it happens in tasks of the session.
    """

    def __init__(self, session: Session, opened: Callable[[], Awaitable[str]]) -> None:
        """opened: returns the run's model_id once there is one, or raises what prevents it."""
        self._session = session
        self._opened = opened
        self._calls = count(1)
        self._last_call = 0
        self._refused_until = 0
        """Calls up to this one were made before a failure that their caller could not know."""
        self._refusal: Exception | None = None
        self._next_seq = 1
        self._turn = asyncio.Lock()
        """Requests are numbered one call at a time, in the order of the calls."""
        self._room = asyncio.Semaphore(MAX_SENDING)
        self._polls = asyncio.Semaphore(MAX_POLLS)

    def next_call(self) -> int:
        """The number of a call, taken by the thread that makes it."""
        self._last_call = next(self._calls)
        return self._last_call

    async def json_result(self, call: int, endpoint: str, fields: Mapping[str, Any]) -> Response:
        """Sends one JSON request when it is its turn, and waits for its result."""

        async def encode(model_id: str, seq: int) -> Outgoing:
            request = json_request(endpoint, **fields, model_id=model_id, seq_id=seq)
            return Outgoing(endpoint, orjson.dumps(request))

        async def start() -> "list[asyncio.Task[str]]":
            return await self.send([encode])

        sent = await self.in_turn(call, start)
        (request_id,) = await all_of(asyncio.shield(task) for task in sent)
        return await self.result(request_id, request_type(endpoint))

    async def in_turn(self, call: int, start: Callable[[], Awaitable[T]]) -> T:
        """What `start` returns, when all earlier calls have their numbers.

        RequestFailedError if an earlier call failed so that this one must not be sent. A caller
        that gives up meanwhile leaves `start` running.
        """

        async def turn() -> T:
            async with self._turn:
                model_id = await self._opened()
                if call <= self._refused_until:
                    raise RequestFailedError(
                        f"not sent, because a call before it failed: {self._refusal!r}",
                        f"{model_id}: call {call}",
                        "user",
                    ) from self._refusal
                return await start()

        return await asyncio.shield(self._session.spawn(turn()))

    async def send(self, requests: Sequence[Encode]) -> "list[asyncio.Task[str]]":
        """Numbers the requests one after the other and starts to send them; holds the turn.

        The tasks return the request ids.
        """
        model_id = await self._opened()
        tasks = []
        for encode in requests:
            await self._room.acquire()
            seq, self._next_seq = self._next_seq, self._next_seq + 1
            task = self._session.spawn(self._post(encode, model_id, seq))
            task.add_done_callback(self._posted)
            tasks.append(task)
        return tasks

    async def _post(self, encode: Encode, model_id: str, seq: int) -> str:
        outgoing = await encode(model_id, seq)
        response = await self._session.transport.call(
            "POST", outgoing.endpoint, body=outgoing.body, headers=outgoing.headers
        )
        return response.text_field("request_id")

    def _posted(self, task: "asyncio.Task[str]") -> None:
        self._room.release()
        if not task.cancelled():
            task.exception()  # a caller that has given up does not ask for it

    async def result(self, request_id: str, kind: str, *, protobuf: bool = False) -> Response:
        """The result of a request that has been accepted; kind: its request_type."""
        async with self._polls:
            return await retrieve(self._session.transport, request_id, kind, protobuf=protobuf)

    @contextlib.asynccontextmanager
    async def refusing_on_error(self) -> AsyncIterator[None]:
        """An error within it refuses the calls made so far: their callers could not know of it."""
        try:
            yield
        except Exception as error:
            self._refused_until, self._refusal = self._last_call, error
            raise


def json_request(endpoint: str, **fields: Any) -> dict[str, Any]:
    """A request to an endpoint; what is None is left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    return {"type": endpoint, **given}


def request_type(endpoint: str) -> str:
    """`save_weights` -> `SaveWeights`, as a poll names the kind of its request."""
    return endpoint.title().replace("_", "")


async def all_of(results: Iterable[Awaitable[T]]) -> list[T]:
    """All of them, or the first error in their order once none is waited for any more."""
    answers = await asyncio.gather(*results, return_exceptions=True)
    good: list[T] = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        good.append(answer)
    return good
