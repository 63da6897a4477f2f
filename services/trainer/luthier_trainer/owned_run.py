"""One run that a worker owns: its commits in order and its snapshots, beside its execution."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from luthier_core.owner import Owner, Step
from luthier_core.protocol import COMMIT_DEPTH, Executed, Left, Tenure, commit_next, drive
from luthier_trainer.effects import RunEffects
from luthier_trainer.engine_client import EngineDied
from luthier_trainer.execution import RunContext
from luthier_trainer.planner import Waiting, estimated_tokens
from luthier_trainer.rebuild import Rebuild
from luthier_trainer.snapshots import Snapshots, Snapshotter

log = logging.getLogger(__name__)


class OwnedRun:
    """A run from `start` to `end`, under one tenure."""

    def __init__(
        self,
        tenure: Tenure,
        tenant: str,
        context: RunContext,
        effects: RunEffects,
        snapshots: Snapshots | None,
        leave: Callable[["OwnedRun"], Awaitable[None]],
    ) -> None:
        """`leave` lets the run go: called when a commit or a snapshot finds that it is not ours."""
        self.tenure = tenure
        self.tenant = tenant
        self.effects = effects
        # One more is with the committer and one is about to be put: together below COMMIT_DEPTH.
        self.commits: asyncio.Queue[tuple[Step, Executed]] = asyncio.Queue(COMMIT_DEPTH - 2)
        self.last_cycle = -1
        self.may_have_more = False
        """The last read of the log was full, or left out for want of room."""
        self.paused = False
        """Nothing is executed for it: it is being let go."""
        self.context = context
        self.rebuild: Rebuild | None = None
        """Its recovery, until what was committed before has been executed again."""
        self._leave = leave
        self._committer: asyncio.Task[None] | None = None
        self.snapshotter: Snapshotter | None = None
        if snapshots is not None:
            self.snapshotter = Snapshotter(
                *(tenure, snapshots, context, effects.perform), leave=lambda: leave(self)
            )

    @property
    def owner(self) -> Owner:
        return self.tenure.owner

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """The ops that could be executed now, next first."""
        if self.paused:
            return ()
        ops = tuple(
            Waiting(op.kind, estimated_tokens(op.kind, op.body.num_bytes))
            for op in self.owner.queued
        )
        return ops[:1] if self.effects.alone else ops

    @property
    def idle(self) -> bool:
        return not self.owner.num_queued and self.commits.empty()

    def start(self) -> None:
        """Commit what is put into `commits`, in the background."""
        self._committer = asyncio.create_task(self._commit_in_order())

    def end(self) -> None:
        """Commit and store nothing more."""
        if self._committer is not None and self._committer is not asyncio.current_task():
            self._committer.cancel()
        if self.snapshotter is not None:
            self.snapshotter.cancel()
        # Nobody commits these any more; whoever waits for room or for the last of them goes on.
        while not self.commits.empty():
            self.commits.get_nowait()
            self.commits.task_done()

    async def settle(self) -> None:
        """Commit what has been executed and store the state, so that nothing is replayed."""
        await self.commits.join()
        if self.snapshotter is not None:
            await self.snapshotter.store_now()

    async def _commit_in_order(self) -> None:
        while True:
            step, executed = await self.commits.get()
            try:
                await drive(commit_next(self.tenure, step, executed), self.effects.perform)
            except Exception as error:
                log.warning(
                    "leaving a run at the commit of seq %d: %s",
                    step.op.seq,
                    error,
                    exc_info=not isinstance(error, Left | EngineDied),
                )
                await self._leave(self)
                return
            finally:
                # Also when it is cancelled: who waits for the last commit must not wait for ever.
                self.commits.task_done()
            if self.snapshotter is not None:
                self.snapshotter.store_if_committed()
