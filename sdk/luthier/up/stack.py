"""All parts of one stack: started in order, watched until told to stop, drained in order."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence

from luthier.up.parts import READY, Backoff, Part
from luthier.up.plan import WORKER_ROLES, PartSpec
from luthier.up.probes import Probes
from luthier.up.process import last_line
from luthier.up.status import PartStatus, StatusFile
from luthier.up.view import View
from luthier_core.errors import ConfigError

GRACE_S = 20.0
"""How long a part may drain before it is killed."""
STARTING_POLL_S = 0.1
READY_POLL_S = 1.0
REDIS_START_S = 120.0
"""How long Valkey may load its log at a start."""


class Stack:
    """The parts, their supervision, and what is known of them."""

    def __init__(
        self,
        specs: Sequence[PartSpec],
        probes: Probes,
        view: View,
        status_file: StatusFile,
        *,
        grace_s: float = GRACE_S,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self._probes = probes
        self.view = view
        self.status_file = status_file
        self._grace_s = grace_s
        self.parts = [
            Part(spec, changed=self._on_change, exited=self._on_exit, backoff=backoff())
            for spec in specs
        ]
        self._running: list[Part] = []

    def statuses(self) -> list[PartStatus]:
        """This process, then every part."""
        return [
            PartStatus("up", "running", os.getpid(), None, 0),
            *(
                PartStatus(part.name, part.state, part.pid, part.spec.port, part.num_restarts)
                for part in self.parts
            ),
        ]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Every part is started inside the block, drained at its end, and gone after it.

        Cancelling the block drains; cancelling the drain kills at once. ConfigError (in a group) if
        Redis does not come up.
        """
        try:
            async with asyncio.TaskGroup() as group:
                try:
                    await self._start(group)
                    yield
                finally:
                    await self._drain()
        finally:
            for part in self._running:
                part.kill()
            await asyncio.gather(*(part.gone() for part in self._running))

    async def watch_until_ready(self) -> None:
        """Returns once healthz says that everything is ready."""
        missing = None
        while missing != []:
            missing = await self.look()
            await asyncio.sleep(STARTING_POLL_S)

    async def watch(self) -> None:
        """Keeps what is known of the parts fresh, for ever."""
        while True:
            await asyncio.sleep(READY_POLL_S)
            await self.look()

    async def _start(self, group: asyncio.TaskGroup) -> None:
        """Valkey first, so that a stale lease is gone before a worker looks; then all at once."""
        valkey = [part for part in self.parts if part.spec.role == "valkey"]
        for part in valkey:
            self._run(part, group)
        await self._wait_for_redis(valkey)
        await self._probes.forget_leases(
            [part.name for part in self.parts if part.spec.role in WORKER_ROLES]
        )
        for part in self.parts:
            if part not in valkey:
                self._run(part, group)

    def _run(self, part: Part, group: asyncio.TaskGroup) -> None:
        self._running.append(part)
        group.create_task(part.run(), name=part.name)

    async def _wait_for_redis(self, valkey: Sequence[Part]) -> None:
        error = "not started"
        try:
            async with asyncio.timeout(REDIS_START_S):
                while error := await self._probes.redis_error():
                    if not valkey:
                        raise ConfigError(f"--redis: {error}")
                    if valkey[0].num_restarts:
                        raise ConfigError(f"valkey: {last_line(valkey[0].spec.log_file)}")
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise ConfigError(f"valkey: {error}") from None

    async def _drain(self) -> None:
        """Whoever uses Redis goes first, together; Valkey goes last."""
        users = [part for part in self._running if part.spec.role != "valkey"]
        async with asyncio.TaskGroup() as group:
            for part in users:
                group.create_task(part.stop(self._grace_s))
        for part in self._running:
            await part.stop(self._grace_s)

    async def look(self) -> list[str] | None:
        """Ask every part how it is, show it; what healthz misses."""
        redis_error, registry, workers, missing = await asyncio.gather(
            self._probes.redis_error(),
            self._probes.registry_answers(),
            self._probes.workers(),
            self._probes.missing(),
        )
        ready_roles = {
            "valkey": not redis_error,
            "registry": registry,
            "gateway": missing is not None,
        }
        for part in self.parts:
            lease = workers.get(part.name, {})
            if ready_roles.get(part.spec.role):
                part.mark(READY, READY)
            elif lease and lease.get("pid") == part.pid:
                part.mark(str(lease["state"]), str(lease["state"]))
        self.view.show(self.statuses())
        return missing

    def _on_change(self, part: Part, sentence: str) -> None:
        self.view.event(f"{part.name}: {sentence}")
        statuses = self.statuses()
        self.view.show(statuses)
        with contextlib.suppress(OSError):  # a full disk may cost a report, not the stack
            self.status_file.write(statuses)

    async def _on_exit(self, part: Part) -> None:
        if complaint := last_line(part.spec.log_file):
            self.view.event(f"{part.name}: last said: {complaint}")
        if part.spec.role in WORKER_ROLES:
            await self._probes.forget_leases([part.name])
