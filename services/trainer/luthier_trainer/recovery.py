"""What a run's user is to know of a recovery: an event of its history, or a checkpoint of the rest.

A run that was taken over from a dead owner is rebuilt exactly or not at all; either is written down
once (`runs/R/recovered/{epoch}`). A run that cannot go on leaves its last state as a checkpoint.
"""

import asyncio
import contextlib
import logging

from luthier_core import keys, metrics
from luthier_core.blobs import Blobs, outlasting_outage
from luthier_core.errors import LuthierError
from luthier_core.oplog import REDIS_ERRORS, RunHeader
from luthier_core.protocol import Left, LogTrimmed, Tenure, drive, recheck
from luthier_core.records import RecoveryRecord
from luthier_trainer.engine_client import EngineDied
from luthier_trainer.execution import Executor, RunContext
from luthier_trainer.frames import EngineFailed, OutOfMemory
from luthier_trainer.owned_run import OwnedRun
from luthier_trainer.snapshots import Snapshots

log = logging.getLogger(__name__)

SAVE_S = 30.0
"""For the last checkpoint of a run that cannot go on."""


def cause_of(header: RunHeader, me: str, tenure: Tenure) -> str:
    """Why a run that had this header was taken over; empty if nothing had gone wrong."""
    if tenure.committed > header.committed:
        return "redis lost what it had acknowledged"
    if not header.owner:
        return ""
    return "engine died" if header.owner == me else "trainer died"


class Recoveries:
    """What one worker tells of the recoveries of its runs."""

    def __init__(
        self, worker: str, executor: Executor, blobs: Blobs, snapshots: Snapshots | None
    ) -> None:
        self._worker = worker
        self._executor = executor
        self._blobs = blobs
        self._snapshots = snapshots
        self._noting: set[asyncio.Task[None]] = set()
        """Events that are being written."""

    def note_if_ended(self, run: OwnedRun, reason: str = "") -> None:
        """Write a run's recovery into its history once it has ended; `reason`: why it failed."""
        rebuild = run.rebuild
        if rebuild is None or not (reason or rebuild.has_ended):
            return
        run.rebuild = None
        event = rebuild.event(self._worker, reason)
        if event.outcome == "approximate":
            metrics.APPROXIMATE_RECOVERIES.inc()
        log.info(
            "%s is back after: %s; rebuilt from seq %d to %d in %.3f s: %s",
            *(run.tenure.run_id, event.cause, event.from_seq, event.to_seq, event.seconds),
            event.outcome,
        )
        # The store may be away, and nobody waits for this.
        noting = asyncio.create_task(self._write(run.context, event))
        self._noting.add(noting)
        noting.add_done_callback(self._noting.discard)

    async def save_state(self, run: OwnedRun, seq: int) -> str:
        """The path of a checkpoint of the state that the engine has of a run: that after op `seq`.

        May be repeated, under a later epoch too. Empty if there is none, or it cannot be saved now:
        the run must end all the same.
        """
        if run.owner.under_way or run.owner.broken:
            return ""
        try:
            async with asyncio.timeout(SAVE_S):
                return str(await self._executor.save_recovery(run.context, seq) or "")
        except (EngineDied, EngineFailed, LuthierError, OutOfMemory, TimeoutError, *REDIS_ERRORS):
            log.exception("no checkpoint of %s after seq %d", run.tenure.run_id, seq)
            return ""

    async def give_up(self, run: OwnedRun, difference: str) -> bool:
        """A replay went another way than the run did: no state of it can be trusted but a stored.

        That one is offered as a checkpoint, and everything that is not committed fails. False if
        the run must be left instead: it is another's, who may have deleted what the replay needed.
        """
        try:
            await drive(recheck(run.tenure.run_id, run.tenure), run.effects.perform)
        except (Left, LuthierError):
            return False
        saved = ""
        ref, snapshots = run.tenure.sound, self._snapshots
        if ref is not None and snapshots is not None:
            with contextlib.suppress(EngineDied, EngineFailed, LuthierError, OutOfMemory):
                if await snapshots.restore(run.context, ref) is not None:
                    path = await self.save_state(run, ref.seq)
                    saved = f"; its state after seq {ref.seq} is {path}" if path else ""
        run.owner.break_run(
            f"the run's state could not be rebuilt after a restart: {difference}{saved}"
        )
        self.note_if_ended(run, difference)
        return True

    async def give_up_replay(self, run: OwnedRun, gap: LogTrimmed) -> bool:
        """The log has not what a replay needs: give the run up, and fail what comes after the gap.

        False if the run must be left instead: it is another's, or an op is lost that is not
        committed. Call it while no cycle is under way.
        """
        log.error("%s: %s", run.tenure.run_id, gap)
        if gap.goes_on_at > run.tenure.committed + 1 or not await self.give_up(run, str(gap)):
            return False
        run.owner.skip_to(gap.goes_on_at)
        return True

    def end(self) -> None:
        """Write nothing more."""
        for noting in self._noting:
            noting.cancel()

    async def _write(self, run: RunContext, event: RecoveryRecord) -> None:
        key = keys.run_recovery(run.tenant, run.run_id, event.epoch)
        await outlasting_outage(lambda: self._blobs.put_if_absent(key, event.to_bytes()))
