"""How a service starts and stops: signals, a parent that went away, and its worker lease."""

import asyncio
import contextlib
import faulthandler
import json
import os
import signal
import stat
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import redis.asyncio as redis
import uvloop

from luthier_core import keys
from luthier_core.oplog import Oplog

ORPHAN_S = 12.0
"""How long a part may drain once its parent has gone: two seconds more than the longest drain.

Whoever waits for a Redis that went away with the parent needs longer, and for nothing: what is not
committed by then is done again by the next owner, as after any kill.
"""


def run_service(main: Coroutine[Any, Any, int]) -> int:
    """Run one service's main coroutine on uvloop; its return value is the exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@contextlib.asynccontextmanager
async def service_lifetime() -> AsyncIterator[asyncio.Event]:
    """An event that is set when this process is to drain and exit.

    That is: SIGTERM, SIGINT, or the end of standard input where that is a pipe. `luthier up` holds
    the other end, so no part outlives it by more than ORPHAN_S, however it dies and whatever the
    part is busy with.
    """
    stop = asyncio.Event()
    faulthandler.register(signal.SIGUSR1)  # `kill -USR1 PID` writes every thread's stack to the log
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if _stdin_is_pipe():
        # A thread, not the event loop: a loop that is stuck could not end the process.
        watch = threading.Thread(target=_end_with_stdin, args=(loop, stop), daemon=True)
        watch.start()
    yield stop


def _stdin_is_pipe() -> bool:
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode)


def _end_with_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """At the end of standard input: asks for a drain, and ends the process after ORPHAN_S."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    # Its timer is a thread of C that needs no interpreter: not even one that ends can hold it up.
    faulthandler.dump_traceback_later(ORPHAN_S, exit=True)
    with contextlib.suppress(RuntimeError):  # the loop has ended: the process is about to
        loop.call_soon_threadsafe(stop.set)


class WorkerLease:
    """The proof that one incarnation of a worker is alive: `w:{name}` in Redis, with an expiry.

    The lease decides when others may take over; only a run's epoch decides who may write. So a
    clock can make a takeover late or early, never wrong.
    """

    def __init__(
        self, oplog: Oplog, name: str, *, role: str, base_model: str, lease_s: float
    ) -> None:
        self.name = name
        self.incarnation = uuid.uuid4().hex[:12]
        self.lost = asyncio.Event()
        self._oplog = oplog
        self._lease_ms = int(lease_s * 1000)
        self._fields = {"role": role, "base_model": base_model, "state": "starting"}

    @property
    def state(self) -> str:
        """starting | ready | draining"""
        return self._fields["state"]

    @property
    def owner(self) -> str:
        """How a run's header names this incarnation."""
        return f"{self.name}/{self.incarnation}"

    async def take(self, *, wait_s: float = 60.0) -> None:
        """Take the lease, waiting until the one of an earlier incarnation has run out.

        TimeoutError after wait_s: another live process has this name.
        """
        async with asyncio.timeout(wait_s):
            while not await self._write():  # noqa: ASYNC110  (another process holds it)
                await asyncio.sleep(0.5)

    async def set_state(self, state: str) -> None:
        """starting | ready | draining, as `luthier up` and healthz show it."""
        self._fields["state"] = state
        await self._write()

    async def keep(self, renew_s: float, may_renew: Callable[[], bool] = lambda: True) -> None:
        """Renew for ever; sets `lost` and returns once somebody else holds the name.

        While `may_renew` says no the lease runs out: a worker that is alive and stuck.
        """
        while True:
            await asyncio.sleep(renew_s)
            if not may_renew():
                continue
            try:
                if not await self._write():
                    self.lost.set()
                    return
            except (redis.RedisError, OSError):
                # Redis is away: the lease may run out, which costs a takeover and nothing else.
                continue

    async def release(self) -> None:
        """Let others take over at once."""
        with contextlib.suppress(redis.RedisError, OSError):
            await self._oplog.release_lease(keys.worker_lease(self.name), self.incarnation)

    async def _write(self) -> bool:
        # Each time: a Redis that was wiped knows no names, and the worker is alive all the same.
        await self._oplog.register_worker(self.name)
        value = json.dumps({**self._fields, "incarnation": self.incarnation, "pid": os.getpid()})
        return await self._oplog.hold_lease(
            keys.worker_lease(self.name), self.incarnation, value, self._lease_ms
        )
