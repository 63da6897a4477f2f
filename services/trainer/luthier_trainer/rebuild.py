"""A run's state on its way back to what was committed, and how long that took."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from luthier_core.protocol import Tenure
from luthier_core.records import RecoveryRecord


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
        owner = self._tenure.owner
        came_back: Literal["exact", "approximate"] = "exact"
        if owner.deviation is not None:
            came_back = "approximate"
        return RecoveryRecord(
            epoch=self._tenure.epoch,
            at=datetime.now(UTC),
            cause=self.cause,
            worker=worker,
            from_seq=self.from_seq,
            to_seq=self.to_seq,
            outcome="lost" if reason or owner.broken else came_back,
            deviation=owner.deviation or 0.0,
            reason=reason,
            seconds=round(self._clock() - self._began, 3),
        )
