"""What a run's user is to know of a recovery: an event of its history, or a checkpoint of the rest.

A run that was taken over from a dead owner is rebuilt exactly or not at all; either is written down
once (`runs/R/recovered/{epoch}`). A run that cannot go on leaves its last state as a checkpoint.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import Blobs, outlasting_outage
from luthier_core.checkpoints import TinkerPath, save_checkpoint
from luthier_core.oplog import RunHeader
from luthier_core.protocol import Tenure
from luthier_core.records import RecoveryRecord
from luthier_trainer.engine_client import EngineClient
from luthier_trainer.execution import RunContext

log = logging.getLogger(__name__)


def cause_of(header: RunHeader, me: str, tenure: Tenure) -> str:
    """Why a run that had this header was taken over; empty if nothing had gone wrong."""
    if tenure.committed > header.committed:
        return "redis lost what it had acknowledged"
    if not header.owner:
        return ""
    return "engine died" if header.owner == me else "trainer died"


class Rebuild:
    """A run's state on its way back: from its snapshot, over its log, to what was committed."""

    def __init__(
        self,
        tenure: Tenure,
        cause: str,
        *,
        began: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cause = cause
        self.from_seq = tenure.owner.executed_to
        self.to_seq = tenure.committed
        self._tenure = tenure
        self._began = began
        self._clock = clock

    @property
    def has_ended(self) -> bool:
        """Whether the next op is one that was never committed."""
        return self._tenure.owner.executed_to >= self.to_seq or self._tenure.owner.broken

    def event(self, worker: str, reason: str = "") -> RecoveryRecord:
        """What has become of it; `reason`: why the state could not be rebuilt."""
        return RecoveryRecord(
            epoch=self._tenure.epoch,
            at=datetime.now(UTC),
            cause=self.cause,
            worker=worker,
            from_seq=self.from_seq,
            to_seq=self.to_seq,
            outcome="lost" if reason or self._tenure.owner.broken else "exact",
            reason=reason,
            seconds=round(self._clock() - self._began, 3),
        )


async def note(blobs: Blobs, run: RunContext, event: RecoveryRecord) -> None:
    """Add an event to the run's public history; once per epoch."""
    log.info(
        "%s is back after: %s; rebuilt from seq %d to %d in %.3f s",
        *(run.run_id, event.cause, event.from_seq, event.to_seq, event.seconds),
    )
    key = keys.run_recovery(run.tenant, run.run_id, event.epoch)
    await outlasting_outage(lambda: blobs.put_if_absent(key, event.to_bytes()))


async def save_last_state(
    engine: EngineClient, blobs: Blobs, client: redis.Redis, run: RunContext, seq: int
) -> str:
    """The tinker path of a checkpoint of the state that the engine has: the one after op `seq`.

    May be repeated, under a later epoch too.
    """
    assert run.record is not None
    record, name = run.record, f"recovery-{seq}"
    files = await engine.save(run.run_id, optimizer=True)
    await outlasting_outage(
        lambda: save_checkpoint(
            *(blobs, client),
            run=record,
            kind="weights",
            name=name,
            seq=seq,
            epoch=run.epoch,
            files=files,
            manifest_key=keys.recovery_manifest(run.tenant, run.run_id, seq),
            now=datetime.now(UTC),
        )
    )
    return str(TinkerPath(run.run_id, "weights", name))
