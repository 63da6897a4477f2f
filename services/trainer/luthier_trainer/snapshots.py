"""When a run's state is copied and stored: beside its ops, and never ahead of their commits."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from luthier_core.owner import FoldState, Step
from luthier_core.protocol import (
    CopyState,
    Effect,
    Left,
    SnapshotRef,
    Tenure,
    drive,
    store_snapshot,
)
from luthier_trainer.execution import RunContext
from luthier_trainer.frames import EngineFailed, OutOfMemory

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Spent:
    """What a replay from the last copy of a run's state would cost."""

    num_ops: int = 0
    execute_s: float = 0.0
    payload_bytes: int = 0
    since_s: float = 0.0
    """Time since the first of these ops."""


class Snapshots(Protocol):
    """Copies of runs' states: when one is due, and what is in it."""

    def due(self, spent: Spent, step: Step) -> bool:
        """Whether the state is to be copied, now that this step has been executed."""
        ...

    async def copy(self, run_id: str) -> Any:
        """The state as it is now; later ops do not change the copy."""
        ...

    async def put(self, run: RunContext, ref: SnapshotRef, copy: Any, state: FoldState) -> None:
        """Store a copy, once, last of all what says that it is whole."""
        ...

    async def restore(self, run: RunContext, ref: SnapshotRef) -> FoldState | None:
        """Bring the engine to that state: `state` as it was put, or None if it is damaged."""
        ...

    async def delete(self, run: RunContext, ref: SnapshotRef) -> None:
        """Delete a snapshot that HEAD does not name any more."""
        ...


@dataclass(slots=True)
class Snapshotter:
    """One run's snapshots under one tenure, one at a time."""

    tenure: Tenure
    snapshots: Snapshots
    context: RunContext
    perform: Callable[[Effect], Awaitable[Any]]
    leave: Callable[[], Awaitable[None]]
    """Lets the run go; called if another worker has taken it, or the store fails."""
    clock: Callable[[], float] = time.monotonic
    _spent: Spent = field(default_factory=Spent)
    _first_at: float = 0.0
    _copied: tuple[int, Any, FoldState] | None = None
    """A copy that waits for the commit of its seq: seq, tensors, the rest."""
    _storing: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a copy waits for its commit or is being stored."""
        return self._copied is not None or self._storing is not None

    @property
    def age_s(self) -> float:
        """Of the oldest op that no copy has; 0 without one."""
        return self.clock() - self._first_at if self._spent.num_ops else 0.0

    async def executed(self, step: Step, execute_s: float) -> None:
        """Call it when a step has been executed, before the next one is: copies if it is time."""
        self._note(step, execute_s)
        wanted = step.publish and not (self.busy or self.tenure.owner.broken)
        if wanted and self.snapshots.due(self._spent, step):
            await self._copy(step.op.seq)

    def store_if_committed(self) -> None:
        """Call it when an op has been committed or copied; the copy is stored in the background."""
        if self._copied is not None and self.tenure.committed >= self._copied[0]:
            self._storing = asyncio.create_task(self._store(*self._copied))
            self._copied = None

    async def store_now(self) -> None:
        """Returns once what has been executed, all of it committed, needs no replay.

        Nothing of this run may be executed meanwhile. After a step that was cut short nothing is
        stored: the engine may have done it.
        """
        await self._stored()
        owner = self.tenure.owner
        whole = not (owner.under_way or owner.replaying or owner.broken)
        if self._spent.num_ops and whole:
            await self._copy(owner.executed_to)
            self.store_if_committed()
            await self._stored()

    async def _stored(self) -> None:
        """Returns once no copy is being stored, also if that was cancelled: the run was let go."""
        if self._storing is not None:
            await asyncio.wait({self._storing})

    def cancel(self) -> None:
        """Store nothing more. A half-stored snapshot is one that nobody finds."""
        self._copied = None
        if self._storing is not None and self._storing is not asyncio.current_task():
            self._storing.cancel()

    def _note(self, step: Step, execute_s: float) -> None:
        if not self._spent.num_ops:
            self._first_at = self.clock()
        self._spent.num_ops += 1
        self._spent.execute_s += execute_s
        self._spent.payload_bytes += step.op.body.num_bytes
        self._spent.since_s = self.clock() - self._first_at

    async def _copy(self, seq: int) -> None:
        state = self.tenure.owner.state
        try:
            copy = await self.perform(CopyState(self.tenure.run_id))
        except (OutOfMemory, EngineFailed) as error:
            log.error("no snapshot of %s at seq %d: %s", self.tenure.run_id, seq, error)
            return  # until the next time that one is due
        self._copied = (seq, copy, state)
        self._spent = Spent()

    async def _store(self, seq: int, copy: Any, state: FoldState) -> None:
        before = self.tenure.head
        try:
            await drive(store_snapshot(self.tenure, seq, copy, state), self.perform)
            await self._delete_unnamed({before.snap, before.prev_snap})
        except Exception as error:
            traced = not isinstance(error, Left)
            log.warning("leaving a run at a snapshot: %s", error, exc_info=traced)
            await self.leave()
        self._storing = None

    async def _delete_unnamed(self, refs: set[SnapshotRef | None]) -> None:
        """HEAD was ours when it stopped naming them, so nobody can restore from them any more."""
        named = {None, self.tenure.head.snap, self.tenure.head.prev_snap}
        for ref in refs:
            if ref is not None and ref not in named:
                await self.snapshots.delete(self.context, ref)
