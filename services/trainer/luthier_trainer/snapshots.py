"""When a run's state is copied and stored: beside its ops, and never ahead of their commits."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from luthier_core.owner import Step
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

log = logging.getLogger(__name__)


class Snapshots(Protocol):
    """Copies of runs' states: when one is due, and what is in it."""

    def due(self, run_id: str, step: Step) -> bool:
        """Whether the state is to be copied, now that this step has been executed."""
        ...

    async def copy(self, run_id: str) -> Any:
        """The state as it is now; later ops do not change the copy."""
        ...

    async def put(
        self, run: RunContext, ref: SnapshotRef, copy: Any, missing: tuple[int, ...]
    ) -> None:
        """Store a copy, last of all what says that it is whole; may be repeated."""
        ...

    async def restore(self, run: RunContext, ref: SnapshotRef) -> tuple[int, ...] | None:
        """Bring the engine to that state: `missing` as it was put, or None if it is damaged."""
        ...


class Snapshotter:
    """One run's snapshots under one tenure, one at a time."""

    def __init__(
        self,
        tenure: Tenure,
        snapshots: Snapshots,
        perform: Callable[[Effect], Awaitable[Any]],
        leave: Callable[[], Awaitable[None]],
    ) -> None:
        """`leave` lets the run go; called if another worker has taken it, or the store fails."""
        self._tenure = tenure
        self._snapshots = snapshots
        self._perform = perform
        self._leave = leave
        self._copied: tuple[int, Any, tuple[int, ...]] | None = None
        """A copy that waits for the commit of its seq: seq, state, missing gradients."""
        self._storing: asyncio.Task[None] | None = None

    async def copy_if_due(self, step: Step) -> None:
        """Call it when a step has been executed, before the next one is."""
        run_id, owner = self._tenure.run_id, self._tenure.owner
        busy = self._copied is not None or self._storing is not None
        if not busy and step.publish and self._snapshots.due(run_id, step):
            self._copied = (step.op.seq, await self._perform(CopyState(run_id)), owner.missing)

    def store_if_committed(self) -> None:
        """Call it when an op has been committed or copied; the copy is stored in the background."""
        if self._copied is not None and self._tenure.committed >= self._copied[0]:
            self._storing = asyncio.create_task(self._store(*self._copied))
            self._copied = None

    def cancel(self) -> None:
        """Store nothing more. A half-stored snapshot is one that nobody finds."""
        self._copied = None
        if self._storing is not None and self._storing is not asyncio.current_task():
            self._storing.cancel()

    async def _store(self, seq: int, state: Any, missing: tuple[int, ...]) -> None:
        try:
            await drive(store_snapshot(self._tenure, seq, state, missing), self._perform)
        except Exception as error:
            traced = not isinstance(error, Left)
            log.warning("leaving a run at a snapshot: %s", error, exc_info=traced)
            await self._leave()
        self._storing = None
