"""Plans clock cycles and executes them: several runs' next ops, one engine call at a time."""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from luthier_core import metrics
from luthier_core.oplog import READ_AHEAD
from luthier_core.owner import Diverged
from luthier_core.protocol import Left, drive, execute_next
from luthier_trainer.effects import NotRebuilt
from luthier_trainer.engine_client import EngineDied
from luthier_trainer.engine_watch import EngineWatch
from luthier_trainer.owned_run import OwnedRun
from luthier_trainer.planner import QUANTUM_TOKENS, Head, Planner, Share
from luthier_trainer.recovery import Recoveries

log = logging.getLogger(__name__)

CYCLE_TOKENS = 16 * 1024
"""How long an op that comes now may wait for those that are under way."""


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far a cycle has come."""

    waited: Set[str]
    """Tenants that had something waiting when it began."""
    to_come: Counter[str]
    """Tenant -> its shares that have not ended."""
    served: Counter[str] = field(default_factory=Counter)
    """Tenant -> tokens."""

    def has_turn_before(self, tenant: str, other: str, num_tokens: int) -> bool:
        """Whether the op of `other` that waits, of so many tokens, goes before more of `tenant`.

        It does if `other` was idle when the cycle began; or if it has had all that it was to have,
        and no more than `tenant`, and a quantum pays for the op.
        """
        if other not in self.waited:
            return True
        if other == tenant or self.to_come[other] or num_tokens > QUANTUM_TOKENS:
            return False
        return 0 < self.served[tenant] >= self.served[other]


class Cycles:
    """The execution of one worker's runs."""

    def __init__(
        self,
        runs: Mapping[str, OwnedRun],
        watch: EngineWatch,
        recoveries: Recoveries,
        *,
        fused: bool,
        first_cycle: int,
        forget: Callable[[OwnedRun], Awaitable[None]],
        put_off: Callable[[str], None],
        read_on: Callable[[str], None],
    ) -> None:
        """`runs`: those that the worker owns now. With `fused`, a cycle's runs go side by side.

        `forget` lets a run go, `put_off` has it taken over later only; `read_on` asks for more of
        its log.
        """
        self.ready = asyncio.Event()
        """Set it when something may be waiting."""
        self.lock = asyncio.Lock()
        """Held while a cycle is under way; hold it while there is no engine."""
        self.executing: set[str] = set()
        """The runs whose steps are under way, whether or not they are still ours."""
        self._runs = runs
        self._watch = watch
        self._recoveries = recoveries
        self._fused = fused
        self._numbers = itertools.count(first_cycle)
        self._planner = Planner(CYCLE_TOKENS)
        self._forget = forget
        self._put_off = put_off
        self._read_on = read_on

    async def run(self) -> None:
        """Cycle after cycle, for ever."""
        while True:
            await self.ready.wait()
            self.ready.clear()
            while shares := self._planner.plan(self._heads()):
                async with self.lock:
                    with metrics.CYCLE_SECONDS.time():
                        await self._run_cycle(shares, next(self._numbers))

    def _heads(self) -> list[Head]:
        return [
            Head(run_id, run.tenant, run.waiting, run.last_cycle)
            for run_id, run in self._runs.items()
        ]

    async def _run_cycle(self, shares: Sequence[Share], cycle: int) -> None:
        """The shares, of different runs, one after the other, or so that they can share passes."""
        progress = _Progress(
            {run.tenant for run in self._runs.values() if run.waiting},
            Counter(share.tenant for share in shares),
        )
        if self._fused:
            async with asyncio.TaskGroup() as group:
                for share in shares:
                    group.create_task(self._run_share(share, cycle, progress))
        else:
            for share in shares:
                await self._run_share(share, cycle, progress)

    async def _run_share(self, share: Share, cycle: int, progress: _Progress) -> None:
        """Carry a share out; no more of it than must be if it is another tenant's turn."""
        num_ops = 0
        while num_ops < len(share.ops):
            may_end = not num_ops or share.may_end_after(num_ops)
            if may_end and self._is_turn_of_another(share.tenant, progress):
                break
            self.executing.add(share.run_id)
            await self._run_step(share.run_id, cycle)
            self.executing.discard(share.run_id)
            progress.served[share.tenant] += share.ops[num_ops].num_tokens
            num_ops += 1
        progress.to_come[share.tenant] -= 1
        self._planner.give_back(share, num_ops)

    def _is_turn_of_another(self, tenant: str, progress: _Progress) -> bool:
        return any(
            (ops := run.waiting) and progress.has_turn_before(tenant, run.tenant, ops[0].num_tokens)
            for run in self._runs.values()
        )

    async def _run_step(self, run_id: str, cycle: int) -> None:
        """Carry out the next step of a run and hand its commit over."""
        run = self._runs.get(run_id)
        if run is None or run.paused or not run.owner.num_queued:
            return
        run.last_cycle = run.effects.cycle = cycle
        if run.tenure.depth == 1:
            await run.commits.join()
        try:
            await self._carry_out(run)
        except Diverged as error:
            log.error("%s diverged: %s", run_id, error)
            if await self._recoveries.give_up(run, str(error)):
                metrics.REPLAY_MISMATCHES.inc()
            else:
                await self._forget(run)
        except EngineDied as death:
            await self._watch.blame(run, death)
        except NotRebuilt as error:
            log.error("leaving a run for a while: %s", error)
            self._watch.not_rebuilt(run_id)
            self._put_off(run_id)
            await self._forget(run)
        except Left as error:
            log.warning("leaving a run: %s", error)
            await self._forget(run)

    async def _carry_out(self, run: OwnedRun) -> None:
        """Execute the next op of a run, hand its commit over, and copy the state if it is time."""
        run_id = run.tenure.run_id
        carried_out = await drive(execute_next(run.tenure), run.effects.perform)
        self._recoveries.note_if_ended(run)
        if carried_out is not None and carried_out[0].publish:
            await run.commits.put(carried_out)
            run.effects.alone = False
            self._watch.acquit(run_id)
        if self._runs.get(run_id) is not run:
            return  # a commit found the run taken over
        if run.snapshotter is not None and carried_out and not run.effects.state_is_unknown:
            await run.snapshotter.executed(carried_out[0], run.effects.execute_s)
            run.snapshotter.store_if_committed()
        if run.effects.state_is_unknown:
            await run.commits.join()
            await self._forget(run)
        elif run.may_have_more and run.owner.num_queued < READ_AHEAD // 2:
            self._read_on(run_id)
