"""The trainer's control flow: own runs, read their logs, plan, execute, commit.

Four loops share the worker's runs. `_follow` adopts runs and reads logs when hinted, and looks for
itself once a second. `Cycles.run` plans and executes, one engine call at a time. `_mind_engine`
leaves every run when the engine has died, and starts another. `_handing_over` lets go of runs
that an operator wants elsewhere. Each run commits for itself
(OwnedRun), so that the engine goes on while results are stored and committed.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine

from luthier_core import keys, metrics
from luthier_core.blobs import Blobs
from luthier_core.config import TrainerConfig
from luthier_core.failpoints import failpoint
from luthier_core.hints import Hints
from luthier_core.lifecycle import WorkerLease
from luthier_core.moves import Moves
from luthier_core.oplog import READ_AHEAD, REDIS_ERRORS, Oplog, RunHeader
from luthier_core.protocol import (
    Left,
    LogTrimmed,
    drive,
    feed,
    gap_is_overdue,
    give_up_gap,
    take_over,
)
from luthier_trainer.cycles import Cycles
from luthier_trainer.effects import RunEffects
from luthier_trainer.engine_client import EngineDied
from luthier_trainer.engine_watch import GIVEN_UP, EngineWatch
from luthier_trainer.execution import Executor, RunContext
from luthier_trainer.frames import OutOfMemory
from luthier_trainer.handover import HandingOver
from luthier_trainer.owned_run import OwnedRun
from luthier_trainer.rebuild import Rebuild
from luthier_trainer.recovery import Recoveries, cause_of
from luthier_trainer.snapshots import Snapshots

log = logging.getLogger(__name__)

SWEEP_S = 1.0
DRAIN_S = 10.0
TAKE_OVER_PAUSE_S = 10.0


class Worker:
    """Runs of one base model. `run(stop)` returns once drained, or when the lease is lost."""

    def __init__(
        self,
        *,
        base_model: str,
        config: TrainerConfig,
        lease: WorkerLease,
        oplog: Oplog,
        blobs: Blobs,
        executor: Executor,
        first_cycle: int,
        snapshots: Snapshots | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base_model = base_model
        self._config = config
        self._lease = lease
        self._oplog = oplog
        self._blobs = blobs
        self._executor = executor
        self._engine = executor.engine
        self._snapshots = snapshots
        self._clock = clock
        self._runs: dict[str, OwnedRun] = {}
        self._hinted: set[str] = set()
        self._news = asyncio.Event()
        self._unowned_since: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        """Runs that could not be taken over -> when to try again."""
        self._watch = EngineWatch(executor.engine)
        self._recoveries = Recoveries(lease.name, executor, blobs, snapshots)
        self._cycles = Cycles(
            self._runs,
            self._watch,
            self._recoveries,
            fused=executor.fused,
            first_cycle=first_cycle,
            forget=self._forget,
            put_off=self._put_off,
            read_on=self._on_room,
        )
        self._hints = Hints(oplog.redis, self._on_hint)
        self._handing_over = HandingOver(
            lease.name,
            Moves(oplog.redis, base_model),
            cycling=self._cycles.lock,
            forget=self._forget,
        )
        self._draining = False

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`, then finish what is under way, for DRAIN_S at most."""
        renewing = self._lease.keep(self._config.lease_renew_s, self._engine.in_time)
        async with _background(self._hints.listen(), renewing):
            await self._hints.subscribe(keys.model_wake(self._base_model))
            async with _background(
                self._follow(), self._cycles.run(), self._mind_engine(), self._handing_over.run()
            ):
                await self._lease.set_state("ready")
                lost = asyncio.create_task(self._lease.lost.wait())
                stopped = asyncio.create_task(stop.wait())
                await asyncio.wait({lost, stopped}, return_when=asyncio.FIRST_COMPLETED)
                lost.cancel()
                stopped.cancel()
                self._draining = True
            await self._drain()

    async def observe(self) -> None:
        """Set the gauges of the runs held now."""
        snapshotters = (run.snapshotter for run in self._runs.values())
        ages = [snapshotter.age_s for snapshotter in snapshotters if snapshotter is not None]
        metrics.OWNED_RUNS.set(len(self._runs))
        metrics.SNAPSHOT_AGE_SECONDS.set(max(ages, default=0.0))

    # --- owning and reading -----------------------------------------------------------------------

    def _on_hint(self, channel: str, text: str) -> None:
        # A new run's id comes on the model's channel; a run's own channel carries seqs.
        run_id = text if channel == keys.model_wake(self._base_model) else keys.run_of_new(channel)
        self._hinted.add(run_id)
        self._news.set()

    def _on_room(self, run_id: str) -> None:
        self._hinted.add(run_id)
        self._news.set()

    async def _follow(self) -> None:
        next_sweep = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(next_sweep - self._clock(), 0)):
                    await self._news.wait()
            self._news.clear()
            hinted, self._hinted = self._hinted, set()
            try:
                if self._clock() >= next_sweep or hinted - self._runs.keys():
                    next_sweep = self._clock() + SWEEP_S
                    await self._sweep()
                    hinted |= self._runs.keys()
                await self._read(hinted)
            except REDIS_ERRORS:
                log.warning("redis is away; trying again", exc_info=True)
                await asyncio.sleep(SWEEP_S)

    async def _sweep(self) -> None:
        """Look at every live run and at every own one: hints may be lost, and time passes."""
        known = {run_id: (run, run.tenure.committed) for run_id, run in self._runs.items()}
        live = await self._oplog.live_runs(self._base_model)
        if await self._handing_over.look():
            trainers = self._trainers(await self._oplog.live_workers())
            await self._handing_over.heed(self._runs.values(), trainers, _rank)
        headers = await self._oplog.headers(sorted({*live, *known}))
        for run_id, (run, committed) in known.items():
            if self._runs.get(run_id) is run:
                await self._compare(run, headers.pop(run_id, None), committed)
        await self._adopt({r: header for r, header in headers.items() if r not in self._runs})

    async def _compare(self, run: OwnedRun, header: RunHeader | None, committed: int) -> None:
        """Leave an own run whose header is behind us or another's; give an overdue gap up.

        `committed`: what this worker had committed before the header was read.
        """
        tenure = run.tenure
        if header is not None:
            run.effects.cancelled_to = header.cancelled_to
        if header is None or header.epoch != tenure.epoch or header.committed < committed:
            log.warning("leaving %s: its header is not what we left there", tenure.run_id)
            await self._forget(run)
        elif (
            run.idle
            and header.admitted == tenure.committed
            and (tenure.owner.executed_to == tenure.committed or tenure.owner.broken)
            and await self._is_overdue(tenure.run_id, header)
        ):
            # What was missing has come after all; or the engine died, and the next owner does this.
            with contextlib.suppress(Left, EngineDied):
                # First: a crash between the two makes it again before anybody is told.
                recovery = await self._recoveries.save_state(run, tenure.committed)
                last = await self._oplog.last_parked(tenure.run_id)
                steps = give_up_gap(tenure, last, recovery=recovery)
                await drive(steps, run.effects.perform)
            await self._forget(run)

    async def _is_overdue(self, run_id: str, header: RunHeader) -> bool:
        """Whether ops wait above a gap that is not going to be filled."""
        if not header.has_gap:
            return False
        ended = await self._oplog.session_has_ended(run_id)
        timeout_s = self._config.gap_timeout_s
        return gap_is_overdue(header, time.time(), session_has_ended=ended, timeout_s=timeout_s)

    async def _read(self, run_ids: set[str]) -> None:
        """Feed the owners what is new in their logs, as far as they have room."""
        cursors = {}
        for run_id in run_ids & self._runs.keys():
            run = self._runs[run_id]
            if run.owner.num_queued < READ_AHEAD:
                cursors[run_id] = run.owner.cursor
            else:
                # The hint is used up: whoever makes room must ask for this run again.
                run.may_have_more = True
        if not cursors:
            return
        await failpoint("tr.read")
        for run_id, ops in (await self._oplog.read_log(cursors)).items():
            if (fed := self._runs.get(run_id)) is None:
                continue
            try:
                feed(fed.tenure, ops)
            except LogTrimmed as gap:
                async with self._cycles.lock:
                    if not await self._recoveries.give_up_replay(fed, gap):
                        await self._forget(fed)
                self._hinted.add(run_id)
                continue
            fed.may_have_more = len(ops) == READ_AHEAD
        self._cycles.ready.set()

    async def _adopt(self, headers: dict[str, RunHeader]) -> None:
        """Take the runs that have work and no live owner; let go of those that have neither."""
        if not headers or not self._watch.is_up:
            return
        workers = await self._oplog.live_workers()
        trainers = self._trainers(workers)
        settled = self._handing_over.wishes.settled
        for run_id, header in headers.items():
            # A run under my own name that I do not have is one whose state I threw away.
            is_free = header.owner == self._lease.owner or run_id in settled
            if not is_free and _is_live(header.owner, workers):
                continue
            if run_id in self._cycles.executing:
                continue  # a step from before would meet the state that is rebuilt
            if not self._is_my_turn(run_id, trainers):
                continue
            if self._clock() < self._not_before.get(run_id, 0.0):
                continue
            if header.pending or await self._is_overdue(run_id, header):
                if len(self._runs) < self._config.max_runs or await self._make_room():
                    await self._acquire(run_id, header)
            elif header.has_gap:
                continue  # it stays listed: somebody has to give the gap up
            elif not header.owner or await self._oplog.release(run_id, header.epoch):
                await self._oplog.retire_run(self._base_model, run_id)
        for noted in (self._unowned_since, self._not_before):
            for run_id in noted.keys() - headers.keys():
                del noted[run_id]

    def _trainers(self, workers: dict[str, dict[str, str]]) -> list[str]:
        """The names of those alive that serve this base model."""
        return [
            name
            for name, lease in workers.items()
            if lease["role"] == "trainer" and lease["base_model"] == self._base_model
        ]

    def _is_my_turn(self, run_id: str, trainers: list[str]) -> bool:
        """At once for the trainer that ranks first for this run, for others after a lease time.

        One that an operator wants it to have is the only one.
        """
        wishes = self._handing_over.wishes
        if target := wishes.target_of(run_id, trainers):
            return target == self._lease.name
        trainers = wishes.candidates(trainers)
        if self._lease.name not in trainers:
            return False
        if max(trainers, key=lambda name: _rank(run_id, name), default="") == self._lease.name:
            return True
        since = self._unowned_since.setdefault(run_id, self._clock())
        return self._clock() - since > self._config.lease_s

    async def _acquire(self, run_id: str, header: RunHeader) -> None:
        context = RunContext(run_id=run_id, tenant=header.tenant)
        server = await self._oplog.server_id(run_id)
        effects = RunEffects(
            context, self._oplog, self._blobs, self._executor, self._snapshots, server=server
        )
        effects.spares_engine = self._watch.gives_up(run_id)
        num_deaths, began = self._watch.num_deaths, self._clock()
        try:
            tenure = await drive(take_over(run_id, self._lease.owner), effects.perform)
        except REDIS_ERRORS:
            raise
        except EngineDied as death:
            if death.under_way:
                self._watch.not_rebuilt(run_id)
            return
        except Exception as error:
            if isinstance(error, OutOfMemory):
                self._watch.not_rebuilt(run_id)
            log.exception("cannot take %s over; trying again in %g s", run_id, TAKE_OVER_PAUSE_S)
            self._put_off(run_id)
            return
        if tenure is None:
            return  # another worker was first
        if self._watch.num_deaths != num_deaths:
            return  # what was restored has gone with its engine
        if effects.spares_engine:
            tenure.owner.break_run(GIVEN_UP)
        await self._handing_over.granted(run_id)
        context.epoch = tenure.epoch
        effects.tenure = tenure
        run = OwnedRun(tenure, header.tenant, context, effects, self._snapshots, self._forget)
        effects.alone = self._watch.suspects(run_id)
        cause = cause_of(header, self._lease.owner, tenure)
        if cause and run_id not in self._handing_over.wishes.settled:
            run.rebuild = Rebuild(tenure, cause, began=began, clock=self._clock)
        self._runs[run_id] = run
        run.start()
        await self._hints.subscribe(keys.run_new(run_id))
        epoch, committed = tenure.epoch, tenure.committed
        log.info("own %s under epoch %d, replaying to seq %d", run_id, epoch, committed)
        self._recoveries.note_if_ended(run)

    def _put_off(self, run_id: str) -> None:
        """Do not take this run over for a while."""
        self._not_before[run_id] = self._clock() + TAKE_OVER_PAUSE_S

    async def _make_room(self) -> bool:
        """Release the run that has been idle longest; False if every run is busy."""
        for run in sorted(self._runs.values(), key=lambda run: run.last_cycle):
            if not run.idle:
                continue
            run.paused = True
            try:
                await run.settle()
                if run.idle and await run.effects.release():
                    await self._oplog.retire_run(self._base_model, run.tenure.run_id)
                    await self._forget(run)
                    return True
            except Left:
                await self._forget(run)
                return True
            except EngineDied:
                return False
            finally:
                run.paused = False
                self._cycles.ready.set()
        return False

    async def _forget(self, run: OwnedRun) -> None:
        """Drop a run's state here; its log is untouched, whoever owns it next replays it."""
        run_id = run.tenure.run_id
        if self._runs.get(run_id) is not run:
            return
        del self._runs[run_id]
        await self._hints.unsubscribe(keys.run_new(run_id))
        with contextlib.suppress(EngineDied):
            await self._engine.drop(run_id)
        run.end()

    # --- the engine's death -----------------------------------------------------------------------

    async def _mind_engine(self) -> None:
        """Whenever the engine has died: leave every run; those with work are taken over anew."""
        while True:
            await self._watch.died()
            async with self._cycles.lock:  # who was under way has been blamed
                await self._leave_all()
                await self._watch.start_anew()
            self._news.set()

    async def _leave_all(self) -> None:
        """Let what has been executed be committed, which needs no engine; then drop every run."""
        runs = list(self._runs.values())
        for run in runs:
            run.paused = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await asyncio.gather(*(run.commits.join() for run in runs))
        for run in runs:
            await self._forget(run)
            self._hinted.add(run.tenure.run_id)

    async def _drain(self) -> None:
        """Let what has been executed be committed, then let others have the runs."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                settling = (run.settle() for run in self._runs.values())
                for result in await asyncio.gather(*settling, return_exceptions=True):
                    if isinstance(result, EngineDied):
                        log.error("drained without a snapshot: %s", result)
        for run in self._runs.values():
            run.end()
        self._recoveries.end()
        await self._lease.release()


@contextlib.asynccontextmanager
async def _background(*coroutines: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Tasks that live as long as the block; the first that fails ends the block with its error."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


def _is_live(owner: str, workers: dict[str, dict[str, str]]) -> bool:
    name, _, incarnation = owner.partition("/")
    return name in workers and workers[name]["incarnation"] == incarnation


def _rank(run_id: str, worker: str) -> bytes:
    """Rendezvous hashing: every worker ranks the same trainer first for a run."""
    return hashlib.sha256(f"{run_id} {worker}".encode()).digest()
