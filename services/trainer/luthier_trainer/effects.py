"""What the protocol core asks of a trainer, done for real: Redis, the object store, the engine."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.errors import BadRequest, LuthierError
from luthier_core.failpoints import failpoint
from luthier_core.oplog import REDIS_ERRORS, Oplog, RedisRestarted
from luthier_core.ops import Kind, Op, Outcome
from luthier_core.owner import Action, FoldState, Step, changes_state
from luthier_core.protocol import (
    Acquire,
    Begin,
    Blame,
    CasHead,
    Commit,
    CopyState,
    Effect,
    Execute,
    Executed,
    FailRange,
    FastForward,
    Finish,
    Head,
    Left,
    PutSnapshot,
    ReadHead,
    ReadRecorded,
    Restore,
    SnapshotRef,
    Tenure,
    Trim,
    drive,
    recheck,
)
from luthier_trainer.engine_client import EngineDied
from luthier_trainer.execution import Executor, RunContext
from luthier_trainer.execution import Finish as Rest
from luthier_trainer.frames import OutOfMemory
from luthier_trainer.observing import EffectWatch
from luthier_trainer.snapshots import Snapshots

log = logging.getLogger(__name__)
T = TypeVar("T")

REDIS_RETRY_S = 1.0

MAX_HALVINGS = 3
"""So often the micro-batch of an op is halved before it is failed for want of memory."""

_POINTS: dict[type[Effect], str] = {
    Acquire: "tr.acquire",
    Restore: "tr.restore",
    Begin: "tr.begin",
    Commit: "tr.commit",
    CopyState: "sn.copy",
    PutSnapshot: "sn.upload",
    Trim: "sn.trim",
}
"""Effect -> the failpoint before it; Execute and CasHead have two each."""


OUT_OF_MEMORY = (
    "the trainer has not enough memory for this request: send fewer or shorter datums in one"
)
_SPLIT = frozenset({Kind.FORWARD, Kind.FORWARD_BACKWARD})
"""Kinds that are executed in micro-batches, and leave the state alone if one of them fails."""


class NotRebuilt(Left):
    """The state could not be rebuilt this time; it is not known whether it can be."""


class RunEffects:
    """The effects of one run under one tenure."""

    def __init__(
        self,
        context: RunContext,
        oplog: Oplog,
        blobs: Blobs,
        executor: Executor,
        snapshots: Snapshots | None,
        *,
        server: str,
    ) -> None:
        """`server`: Redis as it was before HEAD is read (Oplog.server_id)."""
        self.server = server
        """On which HEAD has been found to be ours since it started."""
        self.cycle = 0
        """Number of the clock cycle under way."""
        self.tenure: Tenure | None = None
        """None while the run is being taken over."""
        self.state_is_unknown = False
        """An op ended in a way that leaves the engine's state in doubt: rebuild it by replay."""
        self.alone = False
        """Its next op may be what killed the engine: it is executed with no other."""
        self.spares_engine = False
        """Restores nothing: that has killed the engine too often."""
        self.cancelled_to = -1
        """Ops up to this seq that are not begun are to fail; see Oplog.cancel_queued."""
        self.execute_s = 0.0
        """How long the last step was with the engine."""
        self._context = context
        self._oplog = oplog
        self._blobs = blobs
        self._executor = executor
        self._snapshots = snapshots
        self._watch = EffectWatch()
        self._worker = ""
        """Our own name."""
        self._begun: dict[int, tuple[Op, int]] = {}
        """seq -> an op that is not committed, and when it was begun, in ms since the epoch."""

    async def perform(self, effect: Effect) -> Any:
        """The effect's answer. Once a run is owned, an effect waits while Redis is away."""
        return await self._watch.watch(effect, self._perform(effect))

    async def _perform(self, effect: Effect) -> Any:
        oplog = self._oplog
        if (point := _POINTS.get(type(effect))) is not None:
            await failpoint(point, getattr(effect, "kind", ""))
        match effect:
            case Execute(step):
                if step.publish:
                    self._begun[step.op.seq] = step.op, _now_ms()
                return await self._execute(step)
            case Begin(run_id, epoch, seq):
                return await self._patiently(
                    lambda: oplog.begin(run_id, epoch, seq, server=self.server)
                )
            case Blame(run_id, epoch, seq):
                return await self._patiently(
                    lambda: oplog.blame(run_id, epoch, seq, server=self.server)
                )
            case Finish(_, rest):
                return await self._finish(rest)
            case Commit(run_id, epoch, seq, outcome, gradient, digest):
                timed = self._timed(seq, outcome)
                return await self._patiently(
                    lambda: oplog.commit(
                        *(run_id, epoch, seq, timed),
                        gradient=gradient,
                        digest=digest,
                        server=self.server,
                    )
                )
            case FailRange(run_id, epoch, seqs, outcome):
                return await self._patiently(
                    lambda: oplog.fail_range(run_id, epoch, seqs, outcome, server=self.server)
                )
            case ReadHead(run_id):
                return await self._read_head(run_id)
            case CasHead(run_id, head, etag):
                if self.tenure is not None:
                    await failpoint("sn.cas")
                return await self._cas_head(run_id, head, etag)
            case Acquire(run_id, epoch, owner):
                self._worker = owner.partition("/")[0]
                return await oplog.acquire(run_id, epoch, owner, server=self.server)
            case ReadRecorded(run_id):
                recorded = await oplog.recorded(run_id)
                self._context.halvings = dict(recorded.halvings)
                return recorded
            case FastForward(run_id, epoch, seq):
                return await oplog.ffwd(run_id, epoch, seq, server=self.server)
            case Restore(run_id, None):
                await self._executor.engine.drop(run_id)
                return FoldState()
            case Trim(run_id, epoch, seq):
                return await self._patiently(
                    lambda: oplog.trim(run_id, epoch, seq, server=self.server)
                )
        if self._snapshots is not None:
            match effect:
                case CopyState(run_id):
                    return await self._snapshots.copy(run_id)
                case PutSnapshot(_, ref, copy, state):
                    return await self._snapshots.put(self._context, ref, copy, state)
                case Restore(_, SnapshotRef()) if self.spares_engine:
                    return None
                case Restore(_, SnapshotRef() as ref):
                    return await self._snapshots.restore(self._context, ref)
        raise NotImplementedError(f"{type(effect).__name__}: this trainer makes no snapshots")

    async def _execute(self, step: Step) -> Executed:
        began, run_id = time.monotonic(), self._context.run_id
        try:
            await failpoint("tr.exec" if step.publish else "tr.replay", step.op.kind)
            if step.action is Action.CLEAR_GRADIENT:
                await self._executor.engine.clear_gradient(self._context.run_id)
                return Executed()
            if step.publish and step.op.seq <= self.cancelled_to and step.op.seq > 0:
                raise BadRequest("cancelled by the owner of the run while it was queued")
            rest = await self._within_memory(step)
            if step.publish:
                await failpoint("tr.mid", step.op.kind)
            return await self._executed(step, rest)
        except LuthierError as error:
            return Executed(Outcome.failure(error.message, error.category))
        except (EngineDied, Left):
            raise
        except OutOfMemory as error:
            log.error("seq %d (%s) of %s: %s", step.op.seq, step.op.kind, run_id, error)
            self.state_is_unknown = step.op.kind not in _SPLIT
            return Executed(Outcome.failure(OUT_OF_MEMORY, "server"))
        except Exception:
            log.exception("seq %d (%s) of %s", step.op.seq, step.op.kind, run_id)
            self.state_is_unknown = True
            return Executed(Outcome.failure("an internal error of the trainer", "server"))
        finally:
            self.execute_s = time.monotonic() - began

    async def _within_memory(self, step: Step) -> Rest:
        """Execute an op, where need be in smaller micro-batches.

        How small is written down first, because a replay must add up in the same order. OutOfMemory
        when halving does not help; NotRebuilt in a replay, whose op cannot be done otherwise.
        """
        seq, halvings = step.op.seq, self._context.halvings
        # A replay takes the path that depends on nobody else, and is the same each time.
        self._context.alone = self.alone or not step.publish
        has_tried_again = False
        while True:
            try:
                return await self._executor.execute(self._context, step.op, self.cycle)
            except OutOfMemory as error:
                if not step.publish:
                    raise NotRebuilt(f"{self._context.run_id}: seq {seq}: {error}") from None
                halved = halvings.get(seq, 0) + 1
                if step.op.kind not in _SPLIT or halved > MAX_HALVINGS:
                    raise
                log.warning("seq %d of %s: %s", seq, self._context.run_id, error)
            # The engine has emptied its cache, and others may have given memory back.
            self._context.alone = True
            if has_tried_again:
                await self._note_halvings(seq, halved)
                halvings[seq] = halved
            has_tried_again = True

    async def _note_halvings(self, seq: int, halvings: int) -> None:
        assert self.tenure is not None
        run_id, epoch = self._context.run_id, self.tenure.epoch
        status = await self._patiently(
            lambda: self._oplog.halve(run_id, epoch, seq, halvings, server=self.server)
        )
        self.tenure.check(status)

    async def _executed(self, step: Step, rest: Rest) -> Executed:
        """With what a replay of it is to be compared by, or is compared by now."""
        checksum, measure = "", None
        if changes_state(step):
            # In shared passes a state's bits depend on the neighbours, and a replay has others.
            # What it replays may have been executed in the other mode.
            if not step.publish or not self._executor.fused:
                checksum = await self._executor.engine.checksum(self._context.run_id)
            if not step.publish or self._executor.fused:
                measure = self._context.measure
        return Executed(rest=rest, checksum=checksum, measure=measure)

    def _timed(self, seq: int, outcome: Outcome) -> Outcome:
        """The outcome with what the run's history tells of where and when; nothing if refused."""
        begun = self._begun.pop(seq, None)
        if begun is None:
            return outcome
        op, begun_ms = begun
        kept = {
            "kind": op.kind,
            **json.loads(outcome.metrics or "{}"),
            "worker": self._worker,
            "admitted_ms": op.admitted_ms or begun_ms,
            "begun_ms": begun_ms,
            "ended_ms": _now_ms(),
        }
        return replace(outcome, metrics=json.dumps(kept))

    async def _finish(self, rest: Callable[[], Awaitable[Outcome]]) -> Outcome:
        try:
            return await rest()
        except LuthierError as error:
            return Outcome.failure(error.message, error.category)

    async def release(self) -> bool:
        """Give the run back, unless it has work; Left if it is another's."""
        assert self.tenure is not None
        run_id, epoch = self._context.run_id, self.tenure.epoch
        return await self._patiently(lambda: self._oplog.release(run_id, epoch, server=self.server))

    async def _read_head(self, run_id: str) -> tuple[Head | None, str]:
        try:
            data, etag = await self._blobs.get_with_etag(self._head_key(run_id))
        except BlobMissing:
            return None, ""
        return Head.from_bytes(data), etag

    async def _cas_head(self, run_id: str, head: Head, etag: str) -> str | None:
        key, data = self._head_key(run_id), head.to_bytes()
        if etag:
            return await self._blobs.put_if_match(key, data, etag)
        if not await self._blobs.put_if_absent(key, data):
            return None
        info = await self._blobs.head(key)
        return info.etag if info else None

    def _head_key(self, run_id: str) -> str:
        return keys.run_head(self._context.tenant, run_id)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """The call's answer, however long Redis is away: only a commit counts, so it must come.

        Left if the run is another's by then: Redis may have come back in an earlier state.
        """
        run_id = self._context.run_id
        while True:
            try:
                return await call()
            except RedisRestarted:
                log.warning("redis was restarted: looking whether %s is ours", run_id)
            except REDIS_ERRORS:
                log.warning("redis is away; trying again")
                await asyncio.sleep(REDIS_RETRY_S)
            with contextlib.suppress(*REDIS_ERRORS):
                server = await self._oplog.server_id(run_id)
                await drive(recheck(run_id, self.tenure), self.perform)
                self.server = server


def _now_ms() -> int:
    return int(1000 * time.time())
