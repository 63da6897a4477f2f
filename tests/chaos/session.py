"""Programs on one stack, first undisturbed, then again and again while a scenario hurts it."""

import asyncio
import contextlib
import itertools
import logging
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import aiohttp
from tests.chaos.judge import Played, compare, gather, judge_history
from tests.chaos.scenarios import Scenario
from tests.chaos.script import Script, Transcript, play
from tests.chaos.stack import FIRE_S, Stack, running_stack
from tests.cluster.oracle import Verdict
from tests.cluster.processes import API_KEY, Ended, Plan
from tests.cluster.run import leaves

from luthier_core.errors import LuthierError
from luthier_core.oplog import REDIS_ERRORS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is to be shown on one stack."""

    name: str
    plan: Plan
    scripts: tuple[Script, ...]
    scenario: Scenario
    lanes: int = 4
    """Programs at a time."""
    min_runs: int = 0
    """The scenario is repeated until so many runs were faulted."""
    s3: bool = False
    small_disks: bool = False


@dataclass(slots=True)
class Shown:
    """What a session, or several, have shown."""

    verdict: Verdict = field(default_factory=Verdict)
    num_runs: int = 0
    num_faulted: int = 0
    """Runs during which something was done to the stack."""
    num_ended_early: int = 0
    """Runs whose program was told that something is lost, after a rollback of Redis."""
    faults: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, other: "Shown") -> None:
        self.verdict.counters.add(other.verdict.counters)
        self.verdict.violations += other.verdict.violations
        self.num_runs += other.num_runs
        self.num_faulted += other.num_faulted
        self.num_ended_early += other.num_ended_early
        self.faults += other.faults
        self.hits += other.hits
        self.seconds += other.seconds


def show(session: Session, *, seed: int) -> Shown:
    """Carry a session out; blocks. What it violated is in the verdict, and whatever went wrong."""
    shown, began = Shown(), time.monotonic()
    try:
        asyncio.run(_show(session, shown, random.Random(seed)))
    except* (Ended, TimeoutError) as errors:
        shown.verdict.violations += [str(error) or repr(error) for error in leaves(errors)]
    shown.seconds = time.monotonic() - began
    return shown


async def _show(session: Session, shown: Shown, rng: random.Random) -> None:
    async with running_stack(
        session.plan, rng, s3=session.s3, small_disks=session.small_disks
    ) as stack:
        references = {}
        for script in session.scripts:
            references[script] = await _reference(stack, script, shown.verdict)
        try:
            if not shown.verdict.violations:
                await _Lanes(session, stack, shown, references).run()
        finally:
            _count(stack, shown)


def _count(stack: Stack, shown: Shown) -> None:
    shown.faults = stack.counted
    shown.verdict.violations += stack.violations
    for hits in stack.cluster.folder.glob("*/hits"):
        shown.hits.update(hits.read_text().split())
    for point, number in shown.hits.items():
        if point.startswith(("tr.exec", "tr.replay")):
            shown.verdict.counters.executed += number


async def _play_aside(script: Script, url: str, told: Transcript) -> None:
    """Play on a thread of its own, which nobody waits for once the session has failed."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        play(script, url, API_KEY, told)
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, daemon=True).start()
    await ended.wait()


async def _reference(stack: Stack, script: Script, verdict: Verdict) -> Played:
    told = Transcript()
    await _play_aside(script, stack.url, told)
    verdict.expect(not told.ended_early, f"undisturbed: {told.ended_early}")
    for label, result in told.results:
        expected = label in ("refused", "poison")
        failed = isinstance(result, tuple) and result[0] == "failed"
        verdict.expect(failed == expected, f"undisturbed {label}: {result}")
        if label == "poison":
            verdict.expect("died 3 times" in str(result), f"poison: {result}")
    return await gather(stack, told)


async def _gather_patiently(stack: Stack, told: Transcript) -> Played:
    """As soon as the stack, which is being hurt, answers all of it."""
    async with asyncio.timeout(FIRE_S):
        while True:
            try:
                return await gather(stack, told)
            except (aiohttp.ClientError, LuthierError, *REDIS_ERRORS):
                await asyncio.sleep(0.1)


class _Lanes:
    """Programs beside one another, for as long as the scenario lasts."""

    def __init__(
        self, session: Session, stack: Stack, shown: Shown, references: dict[Script, Played]
    ) -> None:
        self._session = session
        self._stack = stack
        self._shown = shown
        self._references = references
        self._scripts = itertools.cycle(session.scripts)
        self._enough = asyncio.Event()
        self._played: list[Played] = []

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._session.lanes):
                group.create_task(self._lane())
            try:
                await self._session.scenario(self._stack)
                while self._shown.num_faulted < self._session.min_runs and not self._failed:
                    await self._session.scenario(self._stack)
            finally:
                self._enough.set()
        await self._ask_again()

    @property
    def _failed(self) -> bool:
        return bool(self._shown.verdict.violations)

    async def _lane(self) -> None:
        while not (self._enough.is_set() or self._failed):
            await self._play(next(self._scripts))

    async def _play(self, script: Script) -> None:
        stack, shown, told = self._stack, self._shown, Transcript()
        began = time.monotonic()
        num_faults, num_rollbacks = len(stack.faults), stack.num_rollbacks
        num_restarts = stack.history.num_restarts
        playing = asyncio.create_task(_play_aside(script, stack.url, told))
        while not playing.done():
            await asyncio.wait({playing}, timeout=0.1)
            for run_id in told.run_ids:
                stack.playing.setdefault(run_id, 0)
        await playing
        lossy = stack.num_rollbacks > num_rollbacks
        shown.num_runs += 1
        shown.num_faulted += len(stack.faults) > num_faults
        shown.num_ended_early += lossy and bool(told.ended_early)
        played = await _gather_patiently(stack, told)
        log.info("played %s in %.1f s", told.run_ids[:1], time.monotonic() - began)
        verdict = shown.verdict
        verdict.violations += compare(played, self._references[script], lossy=lossy)
        self._played.append(played)
        for run_id in told.run_ids:
            stack.playing.pop(run_id, None)
            header = await stack.oplog.header(run_id)
            # After it was read: what it says may be what a rollback has left.
            restarts = stack.num_rollbacks, stack.history.num_restarts
            if restarts == (num_rollbacks, num_restarts) and not told.ended_early:
                await judge_history(stack, verdict, run_id, header)
        if told.ended_early and not lossy:
            for run_id in told.run_ids:
                verdict.violations.append(await stack.cluster.describe(run_id))

    async def _ask_again(self) -> None:
        """What was delivered once is delivered the same at the end."""
        for played in self._played:
            again = await _gather_patiently(self._stack, played.told)
            for request_id, answer in played.answers.items():
                now = again.answers.get(request_id, "410")
                is_lost = now.startswith("410") and self._stack.num_rollbacks
                if now != answer and not is_lost:
                    self._shown.verdict.counters.delivered_then_changed += 1
                    self._shown.verdict.expect(False, f"{request_id}: its answer has changed")
