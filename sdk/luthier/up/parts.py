"""One supervised part: started, watched, started again when it exits, stopped."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from luthier.up.plan import PartSpec
from luthier.up.process import dies_with_parent, signal_group

STARTING, READY, DRAINING, RESTARTING, STOPPED = (
    "starting",
    "ready",
    "draining",
    "restarting",
    "stopped",
)


@dataclass(slots=True)
class Backoff:
    """How long a part that exited waits before it is started again."""

    first_s: float = 0.5
    max_s: float = 30.0
    healthy_s: float = 60.0
    """Who ran this long is forgiven: the next wait is first_s again."""
    _next_s: float = 0.0

    def delay_s(self, ran_s: float) -> float:
        """The wait after a run of `ran_s` seconds: doubles with each short run."""
        delay = self.first_s if ran_s >= self.healthy_s else max(self._next_s, self.first_s)
        self._next_s = min(2 * delay, self.max_s)
        return delay


class Part:
    """Keeps the process of one PartSpec running until `stop` or `kill`.

    `changed` is told of each change, with a sentence; `exited` is awaited right after the process
    has gone, before the wait for its restart. Both are of the stack and must not raise.
    """

    def __init__(
        self,
        spec: PartSpec,
        *,
        changed: Callable[["Part", str], None],
        exited: Callable[["Part"], Awaitable[None]],
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self.state = STARTING
        self.num_restarts = 0
        self._changed = changed
        self._exited = exited
        self._backoff = backoff or Backoff()
        self._clock = clock
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int | None:
        """The process id, None while there is no process."""
        return self._process.pid if self._process else None

    async def run(self) -> None:
        """Supervise until `stop`: the whole life of the part."""
        try:
            while not self._stopping.is_set():
                started = self._clock()
                how = await self._run_once()
                if self._stopping.is_set():
                    break
                delay_s = self._backoff.delay_s(self._clock() - started)
                self._move(RESTARTING, f"{how}; starts again in {delay_s:g} s")
                await self._exited(self)
                await self._pause(delay_s)
                self.num_restarts += 1
        finally:
            self._ended.set()
        self._move(STOPPED, "stopped")

    async def _run_once(self) -> str:
        """Start the process and wait for its end; how it ended, in words."""
        try:
            self._process = process = await self._start()
        except OSError as error:
            return f"did not start: {error}"
        if (
            self._stopping.is_set()
        ):  # asked to stop while it was being started: it holds nothing yet
            signal_group(process.pid, signal.SIGKILL)
        self._move(STARTING, f"started, pid {process.pid}")
        code = await process.wait()
        # Its descendants, if it had any, are of no use without it.
        signal_group(process.pid, signal.SIGKILL)
        self._process = None
        return _how_it_ended(code)

    async def stop(self, grace_s: float) -> None:
        """Ask the process to drain; kill it after `grace_s` seconds. Returns when it has gone."""
        self._stopping.set()
        if self._process:
            self._move(DRAINING, "draining")
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self._ended.wait()
        except TimeoutError:
            self._move(DRAINING, f"did not drain within {grace_s:g} s: killed")
            self.kill()
            await self._ended.wait()

    def kill(self) -> None:
        """End the process and all of its descendants at once."""
        self._stopping.set()
        if self._process:
            signal_group(self._process.pid, signal.SIGKILL)

    async def gone(self) -> None:
        """Returns when the killed process has been reaped."""
        if self._process:
            await self._process.wait()

    def mark(self, state: str, sentence: str) -> None:
        """What a probe found out about a running process; ignored when it says nothing new."""
        if self._process and not self._stopping.is_set() and state != self.state:
            self._move(state, sentence)

    def _move(self, state: str, sentence: str) -> None:
        self.state = state
        self._changed(self, sentence)

    async def _start(self) -> asyncio.subprocess.Process:
        with self.spec.log_file.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *self.spec.argv,
                env=dict(self.spec.environ),
                # Held open for as long as we live: its end tells the part that we are gone.
                stdin=asyncio.subprocess.PIPE
                if self.spec.watches_stdin
                else asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=self.spec.keep_fds,
                # A part that is still importing does not look at its standard input.
                preexec_fn=dies_with_parent(),
            )

    async def _pause(self, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exited with {code}"
