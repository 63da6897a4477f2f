"""The engine in a child process: started, called, watched, and killed when it hangs.

The child's memory is all that dies with it. This process has neither torch nor the model, so it is
small, and there to say which op the engine died of.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier_trainer.engine_client import EngineClient, EngineDied
from luthier_trainer.engine_host import Tell
from luthier_trainer.frames import (
    PIECE_BYTES,
    PREFIX,
    Assembler,
    BadFrame,
    Message,
    error_of,
    frames_of,
    lengths,
)

log = logging.getLogger(__name__)

DEADLINE_FACTOR = 10
START_S = 1800.0
"""Loading a large model from a slow disk takes minutes; this is when it counts as hung."""
KILL_S = 30.0
"""A killed process that has not ended by then is stuck in the kernel."""
CLOSE_S = 5.0

FIRST_BYTES_PER_S = 1000.0
"""What is believed before the first call has ended: some 50 tokens/s."""
_CONSTANT_BYTES = 1024
"""Added to a call's bytes: what does not depend on them takes time too."""


class Estimates:
    """How long calls take: for each method a running mean of seconds per byte sent."""

    def __init__(self) -> None:
        self._s_per_byte: dict[str, float] = {}

    def seconds(self, method: str, num_bytes: int) -> float:
        rate = self._s_per_byte.get(method, 1 / FIRST_BYTES_PER_S)
        return rate * (num_bytes + _CONSTANT_BYTES)

    def note(self, method: str, num_bytes: int, took_s: float) -> None:
        took = took_s / (num_bytes + _CONSTANT_BYTES)
        self._s_per_byte[method] = 0.8 * self._s_per_byte.get(method, took) + 0.2 * took


@dataclass(slots=True, eq=False)
class _Child:
    """One process, from its start to its end."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    answers: dict[int, tuple[asyncio.Future[Message], Tell | None]] = field(default_factory=dict)
    """Calls under way, by id: for the answer, and for its parts."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    reason: str = ""
    """Why it was killed, or how it ended by itself."""
    num_calls: int = 0

    async def ask(self, message: Message, tell: Tell | None) -> Message:
        """The answer. EngineDied if the process ends first; an error that the answer says."""
        if self.writer.is_closing():
            await self.ended.wait()  # `listen` is finding out how it ends
            raise EngineDied(self.reason, under_way=False)
        self.num_calls += 1
        number, answer = self.num_calls, asyncio.get_running_loop().create_future()
        self.answers[number] = (answer, tell)
        try:
            with contextlib.suppress(ConnectionError):  # `listen` notices too, and why
                for frame in frames_of(number, message):
                    if self.writer.is_closing():
                        break
                    self.writer.write(frame)  # whole, so that a cancellation leaves no half of one
                    await self.writer.drain()
            received: Message = await answer
        finally:
            self.answers.pop(number, None)
        if (error := error_of(received)) is not None:
            raise error
        return received

    async def listen(self) -> None:
        """Hand the answers out, until the process has ended; then every call fails."""
        assembler = Assembler()
        try:
            while True:
                header_bytes, body_bytes = lengths(await self.reader.readexactly(PREFIX.size))
                header = await self.reader.readexactly(header_bytes)
                message = assembler.add(header, await self.reader.readexactly(body_bytes))
                if message is not None:
                    self._hand_out(*message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except BadFrame as error:
            self.kill(f"it sent no frame: {error}")
        finally:
            self.writer.close()
            if not self.reason:  # it ends by itself; who has closed its socket is of no more use
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_S):
                        await self.process.wait()
            self._kill()
            code = await self.process.wait()
            self.reason = self.reason or _how_it_ended(code)
            self.ended.set()
            for answer, _ in self.answers.values():
                if not answer.done():
                    answer.set_exception(EngineDied(self.reason, under_way=True))

    def kill(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def _hand_out(self, number: int, received: Message) -> None:
        if number not in self.answers:
            return  # nobody waits any more
        answer, tell = self.answers[number]
        if "part" not in received.fields:
            if not answer.done():
                answer.set_result(received)
        elif tell is not None:
            tell(received)


class ChildEngine(EngineClient):
    """The engine that a command makes: `argv` and the number of its socket's descriptor."""

    def __init__(
        self,
        argv: Sequence[str],
        hello: Message,
        *,
        environ: Mapping[str, str],
        op_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hello` says what to load; a call is hung after op_timeout_s + 10 x its estimate."""
        self.ready: dict[str, Any] = {}
        """What the child said when it was ready."""
        self._argv = argv
        self._hello = hello
        self._environ = dict(environ)
        self._op_timeout_s = op_timeout_s
        self._clock = clock
        self._estimates = Estimates()
        self._child: _Child | None = None
        self._listening: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._due: dict[asyncio.Task[Any] | None, float] = {}
        """Who waits for an answer -> when the engine counts as hung."""

    @property
    def pid(self) -> int:
        """Of the child that was started last; 0 before."""
        return self._child.process.pid if self._child else 0

    async def start(self) -> None:
        """Returns once a child is ready. EngineDied if it ends before, or what it complains of."""
        ours, its = socket.socketpair()
        with its:
            process = await asyncio.create_subprocess_exec(
                *(*self._argv, str(its.fileno())),
                env=self._environ,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[its.fileno()],
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=2 * PIECE_BYTES)
        self._child = _Child(process, reader, writer)
        self._listening = asyncio.create_task(self._child.listen())
        log.info("engine child started, pid %d", process.pid)
        self.ready = (await self._in_time(self._hello, START_S)).fields

    async def call(
        self, message: Message, *, beside: bool = False, tell: Tell | None = None
    ) -> Message:
        async with contextlib.AsyncExitStack() as stack:
            if not beside:
                await stack.enter_async_context(self._turn)
            method = str(message.fields["method"])
            num_bytes = sum(len(part) for part in message.data)
            estimate_s = self._estimates.seconds(method, num_bytes)
            began = self._clock()
            limit_s = self._op_timeout_s + DEADLINE_FACTOR * estimate_s
            answer = await self._in_time(message, limit_s, tell)
            self._estimates.note(method, num_bytes, self._clock() - began)
            return answer

    @property
    def fingerprint(self) -> dict[str, str]:
        return dict(self.ready.get("fingerprint", {}))

    async def died(self) -> None:
        assert self._child is not None, "not started"
        await self._child.ended.wait()
        log.error("the engine child has gone: %s", self._child.reason)

    def in_time(self) -> bool:
        """False once a child that hangs cannot be killed."""
        return self._clock() < min(self._due.values(), default=float("inf")) + KILL_S

    async def close(self) -> None:
        """End the child: at the end of its input, or killed if it takes long."""
        if self._child is None or self._listening is None:
            return
        self._child.writer.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.shield(self._listening)
        except TimeoutError:
            self._child.kill("it did not end")
            await self._listening

    async def _in_time(self, message: Message, limit_s: float, tell: Tell | None = None) -> Message:
        """The answer; a child that takes longer is killed."""
        child, task = self._child, asyncio.current_task()
        if child is None:
            raise EngineDied("it was not started", under_way=False)
        self._due[task] = self._clock() + limit_s
        try:
            async with asyncio.timeout(limit_s):
                return await child.ask(message, tell)
        except TimeoutError:
            method = message.fields.get("method", "its start")
            child.kill(f"it hung: no answer to {method} within {limit_s:g} s")
            await child.ended.wait()
            raise EngineDied(child.reason, under_way=True) from None
        finally:
            del self._due[task]


def _how_it_ended(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exited with {code}"
