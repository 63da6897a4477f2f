"""What is done to the processes, and when: one order at a time for each kind of them."""

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from tests.cluster.history import History
from tests.cluster.processes import LEASE_S, Cluster, Part

from luthier_core import failpoints

FIRE_S = 30.0
"""An order that nobody has come to by then is a mistake of the test."""
MAX_FORCED = 20
LOOK_S = 0.01
LOCKS = Path("/proc/locks")
TAKING_OVER = ("tr.acquire", "tr.restore", "tr.replay")
"""Points that are only reached when somebody has died."""
OTHER_STOPS = ("tr.acquire", "tr.begin", "tr.exec", "sn.cas")
FENCED_BY_EPOCH = ("tr.begin", "tr.commit", "sn.trim")
"""Until the next owner's first commit nothing but its epoch refuses what a zombie does here."""
SELDOM = (*TAKING_OVER, "tr.begin", "sn.trim", "tr.put_res")

GATEWAY_POINTS = sorted(point for point in failpoints.POINTS if point.startswith("gw."))
TRAINER_POINTS = sorted(p for p in failpoints.POINTS if p.startswith(("tr.", "sn.")))
POINTS = {*GATEWAY_POINTS, *TRAINER_POINTS}


@dataclass(frozen=True, slots=True)
class Fault:
    """An order to the processes of one role."""

    point: str
    """With `/kind` for one kind of op."""
    action: str
    at_hit: int = 1

    @property
    def place(self) -> str:
        return self.point.partition("/")[0]


def gateway_faults(rng: random.Random) -> list[Fault]:
    """Every point kills once; a gateway freezes between admission and answer, one is slow."""
    return _shuffled(
        rng,
        [(point, "kill9") for point in GATEWAY_POINTS],
        [("gw.reply", "stop"), ("gw.put", "delay")],
    )


def trainer_faults(rng: random.Random) -> list[Fault]:
    """Every point kills once; zombies before writes that a fence must stop; one exception."""
    return _shuffled(
        rng,
        [(point, "kill9") for point in TRAINER_POINTS],
        [(point, "stop") for point in ("tr.commit", "sn.trim", rng.choice(OTHER_STOPS))],
        [("tr.mid", "raise"), ("sn.upload", "delay")],
    )


def _shuffled(rng: random.Random, *orders: list[tuple[str, str]]) -> list[Fault]:
    faults = [
        Fault(point, action, 1 if point in SELDOM else rng.randint(1, 5))
        for group in orders
        for point, action in group
    ]
    rng.shuffle(faults)
    return faults


def _holds_lock(pid: int) -> bool:
    return any(f" {pid} " in line for line in LOCKS.read_text().splitlines())


@contextlib.asynccontextmanager
async def _within(seconds: float, what: str) -> AsyncIterator[None]:
    """TimeoutError that says what has not happened."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise TimeoutError(f"not within {seconds:g} s: {what}") from None


Owned = list[tuple[str, int]]
"""Runs of one worker, and how many owners each had had by then."""


class Injector:
    """Gives the orders to one role and cleans up after them."""

    def __init__(
        self, cluster: Cluster, parts: list[Part], history: History, rng: random.Random
    ) -> None:
        self.fire_s = FIRE_S
        """An order that nobody has come to by then raises TimeoutError."""
        self.done: Counter[str] = Counter()
        """action -> how often; kill9 by hand is `killed to have a take-over`"""
        self._ordered = ""
        self._parts = parts
        self._folder: Path = cluster.folder / parts[0].role
        self._order_file = self._folder / "order"
        self._history = history
        self._rng = rng

    async def carry_out(self, faults: list[Fault]) -> None:
        for fault in faults:
            await self.carry_out_one(fault)

    async def carry_out_one(self, fault: Fault) -> None:
        """Returns once it has happened, and what it has hurt works again."""
        self._order(fault)
        if fault.place in TAKING_OVER:
            pid = await self._force_take_overs()
        else:
            pid = await self._taken(self.fire_s)
        self.done[fault.action] += 1
        if fault.action == "kill9":
            await self._gone(pid)
        elif fault.action == "stop":
            frozen = next(part for part in self._parts if part.pid == pid)
            await self._freeze(frozen, fault.place)

    @property
    def num_killed(self) -> int:
        return self.done["kill9"] + self.done["killed to have a take-over"]

    def _order(self, fault: Fault) -> None:
        new = self._folder / "new"
        self._ordered = f"{fault.point} {fault.action} {fault.at_hit}"
        new.write_text(self._ordered)
        new.rename(self._order_file)

    async def _taken(self, within_s: float = FIRE_S) -> int:
        """The process that has taken the order; TimeoutError if none does."""
        async with _within(within_s, f"{self._folder.name}: {self._ordered}"):
            while not (taken := list(self._folder.glob("taken.*"))):
                await asyncio.sleep(LOOK_S)
        taken[0].unlink()
        return int(taken[0].suffix[1:])

    async def _force_take_overs(self) -> int:
        """Kill owners until one who takes over has come to the point."""
        for _ in range(MAX_FORCED):
            part = self._rng.choice(self._owners() or self._parts)
            pid = part.pid
            part.send(signal.SIGKILL)
            self.done["killed to have a take-over"] += 1
            await self._gone(pid)
            try:
                return await self._taken(within_s=self.fire_s / 10)
            except TimeoutError:
                continue
        raise TimeoutError("nobody took a run over")

    def _owners(self) -> list[Part]:
        runs = self._history.runs.values()
        names = {run.owners[-1].partition("/")[0] for run in runs if run.owners}
        return [part for part in self._parts if part.name in names]

    async def _gone(self, pid: int) -> None:
        """Returns once a new process has taken the place of this one."""
        async with _within(FIRE_S, f"{self._folder.name}: the end of process {pid}"):
            while any(part.pid == pid for part in self._parts):
                await asyncio.sleep(LOOK_S)

    async def _freeze(self, part: Part, point: str) -> None:
        """Let it sleep until others have its runs, then wake it up.

        Either while the next owner has acquired a run and committed nothing, or when all its runs
        have gone on without it.
        """
        async with _within(FIRE_S, f"{part.name} stops"):
            while psutil.Process(part.pid).status() != psutil.STATUS_STOPPED:
                await asyncio.sleep(LOOK_S)
        await self._unlock(part)
        mine = [
            (run_id, len(run.owners))
            for run_id, run in self._history.runs.items()
            if run.owners and run.owners[-1].partition("/")[0] == part.name
        ]
        if point in FENCED_BY_EPOCH:
            await self._hold_up_next_owner(part, mine)
        else:
            await asyncio.sleep(LEASE_S)
            async with _within(FIRE_S, f"the take-over of {part.name}'s runs"):
                while not self._are_taken(mine):
                    await asyncio.sleep(LOOK_S)
        part.send(signal.SIGCONT)

    async def _hold_up_next_owner(self, part: Part, mine: Owned) -> None:
        """Returns when one who has acquired a run is slow to go on, or too late for that."""
        self._order(Fault("tr.restore", "delay", 1))
        async with _within(FIRE_S, f"the take-over of {part.name}'s runs"):
            while self._order_file.exists() and not self._are_taken(mine):
                await asyncio.sleep(LOOK_S)
        try:
            self._order_file.unlink()
        except FileNotFoundError:
            await self._taken()
            self.done["woken before the next owner's first commit"] += 1

    def _are_taken(self, mine: Owned) -> bool:
        """Whether each run has been acquired again since then, or has no work to be taken for."""
        runs = self._history.runs
        return all(
            len(runs[run_id].owners) > num_owners or not runs[run_id].pending
            for run_id, num_owners in mine
        )

    async def _unlock(self, part: Part) -> None:
        """Not frozen with a file lock of the disk store, which would hold up who takes over."""
        while _holds_lock(part.pid):
            part.send(signal.SIGCONT)
            await asyncio.sleep(LOOK_S)
            part.send(signal.SIGSTOP)
