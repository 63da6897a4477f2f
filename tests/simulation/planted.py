"""Planted bugs: each replaces one part of the cluster, and the oracle has to catch it.

`PLANTED` are the twelve of reliability 5. `FOUND` are errors that this simulation found in the
protocol: planted again, so that they stay found. Product code knows of neither.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.library.model import Model, Run
from tests.simulation.history import Parts
from tests.simulation.redis_server import Redis, Saved
from tests.simulation.store import ObjectStore, etag_of
from tests.simulation.worker import Rules

from luthier_core import protocol
from luthier_core.config import LimitsConfig
from luthier_core.oplog import Admission, Attempt
from luthier_core.ops import Op, Outcome
from luthier_core.owner import Action, FoldState
from luthier_core.protocol import (
    MAX_DEATHS,
    PROBATION,
    Begin,
    CasHead,
    Effect,
    Execute,
    Executed,
    Request,
    Steps,
    Tenure,
    Trim,
)


def changed(steps: Steps[Any], change: Callable[[Effect, Any], Any]) -> Steps[Any]:
    """The same steps, told `change(effect, answer)` instead of the answer."""
    answer = None
    while True:
        try:
            effect = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = change(effect, (yield effect))


# --- Redis ----------------------------------------------------------------------------------------


class NoEpochCheck(Model):
    def _held(self, run_id: str, epoch: int) -> Run | None:
        return self.runs.get(run_id)


class NoDedupe(Model):
    """An op that is known is taken for the next one."""

    def _admit(self, run: Run, op: Op, limits: LimitsConfig) -> str:
        if op.seq <= run.admitted or op.seq in run.parked:
            op = replace(op, seq=max([run.admitted, *run.parked]) + 1)
        return super()._admit(run, op, limits)


class ArrivalOrder(Model):
    """The seq of an op is when it came."""

    def _admit(self, run: Run, op: Op, limits: LimitsConfig) -> str:
        if any(op.digest.startswith(digest) for digest, *_ in run.admissions.values()):
            return "DUP"
        return super()._admit(run, replace(op, seq=run.admitted + 1), limits)


class Overwrite(Model):
    """An outcome is written as often as it is committed."""

    def commit(self, run_id: str, epoch: int, seq: int, outcome: Outcome, **how: Any) -> Attempt:
        run = self._held(run_id, epoch)
        if run is not None and seq <= run.committed:
            self.outcomes[run_id, seq] = outcome
            return Attempt("OK")
        return super().commit(run_id, epoch, seq, outcome, **how)


class QuotaAlways(Model):
    """Over quota is BUSY, though nothing can be executed that would make room."""

    def _admit(self, run: Run, op: Op, limits: LimitsConfig) -> str:
        known = op.seq <= run.admitted or op.seq in run.parked
        fills_gap = op.seq == run.admitted + 1 and run.parked
        if not known and not fills_gap and op.seq - run.committed > limits.max_pending_ops:
            return "BUSY"
        return super()._admit(run, op, limits)


class CommitAboveAdmitted(Model):
    """Whatever the owner has executed is committed, also if no log holds it."""

    def commit(self, run_id: str, epoch: int, seq: int, outcome: Outcome, **how: Any) -> Attempt:
        run = self._held(run_id, epoch)
        if run is not None and seq == run.committed + 1 and seq > run.admitted:
            self._store(run_id, run, seq, outcome)
            return Attempt("OK")
        return super().commit(run_id, epoch, seq, outcome, **how)


class ToldTheLatest(Model):
    """The latest error that was delivered stands for all before it."""

    def told(self, run_id: str, seq: int) -> None:
        if run := self.runs.get(run_id):
            run.told = max(run.told, seq)


class TrimForgetsUntold(Model):
    """What is trimmed counts as delivered."""

    def trim(self, run_id: str, epoch: int, seq: int) -> str:
        status = super().trim(run_id, epoch, seq)
        if status == "OK":
            self.runs[run_id].untold = {s for s in self.runs[run_id].untold if s > seq}
        return status


class AttemptPerCall(Model):
    """A begin that is repeated because its reply was lost counts again."""

    def begin(self, run_id: str, epoch: int, seq: int) -> Attempt:
        run = self._held(run_id, epoch)
        if run is not None and seq in run.attempts:
            run.attempts[seq] = run.attempts[seq][0], -1
        return super().begin(run_id, epoch, seq)


@dataclass(slots=True)
class AckBeforeFsync(Redis):
    """Once a second is soon enough for the disk."""

    synced: Saved | None = None

    def __post_init__(self) -> None:
        self.world.after(0, self.begin_syncing)

    def lose_power(self, down_s: float) -> None:
        if self.synced is not None:
            self.go_back_to(self.synced, down_s)

    def begin_syncing(self) -> None:
        self.synced = self.saved()
        self.world.after(1.0, self.begin_syncing)


# --- the store ------------------------------------------------------------------------------------


class UnconditionalHead(ObjectStore):
    def swap(self, key: str, value: Any, etag: str) -> str | None:
        self.objects[key] = value
        return etag_of(value)


# --- the protocol ---------------------------------------------------------------------------------


def trim_before_cas(tenure: Tenure, seq: int, copy: Any, state: FoldState) -> Steps[None]:
    steps, answer = protocol.store_snapshot(tenure, seq, copy, state), None
    with contextlib.suppress(StopIteration):
        while True:
            effect = steps.send(answer)
            if isinstance(effect, CasHead) and tenure.sound is not None:
                tenure.check((yield Trim(tenure.run_id, tenure.epoch, tenure.sound.seq)))
            answer = yield effect


def publish_on_replay(run_id: str, name: str) -> Steps[Tenure | None]:
    tenure = yield from protocol.take_over(run_id, name)
    if tenure is not None:
        tenure.owner._replay_to = -1
    return tenure


def no_tombstone(request: Request) -> Steps[Admission]:
    if request.problem is not None:
        return Admission("REFUSED", "")
    return (yield from protocol.submit(request))


def quarantine_by_attempts(tenure: Tenure) -> Steps[Any]:
    def every_attempt_was_a_death(effect: Effect, answer: Any) -> Any:
        if isinstance(effect, Begin) and answer.attempts > MAX_DEATHS:
            return replace(answer, deaths=answer.attempts)
        return answer

    return changed(protocol.execute_next(tenure), every_attempt_was_a_death)


def keep_gradient_in_quarantine(tenure: Tenure) -> Steps[Any]:
    steps = protocol.execute_next(tenure)
    answer = None
    while True:
        try:
            effect = steps.send(answer)
        except StopIteration as end:
            return end.value
        if isinstance(effect, Execute) and _is_quarantine(effect):
            answer = Executed()
        else:
            answer = yield effect


def _is_quarantine(effect: Execute) -> bool:
    step = effect.step
    given_up = step.outcome is not None and step.outcome.category == "server"
    return step.publish and given_up and step.action is Action.CLEAR_GRADIENT


def begin_the_first_only(tenure: Tenure) -> Steps[Any]:
    ended = yield from protocol.execute_next(tenure)
    if tenure.num_begun:
        tenure.num_begun = PROBATION
    return ended


def no_recheck(run_id: str, tenure: Tenure | None) -> Steps[None]:
    yield from ()


@dataclass(frozen=True)
class Bug:
    parts: Parts
    seed: int
    """A history in which it shows: the first that `run.py --mutant NAME` names."""


PLANTED = {
    "no-epoch-check": Bug(Parts(model=NoEpochCheck), 8),
    "no-dedupe": Bug(Parts(model=NoDedupe), 0),
    "arrival-order": Bug(Parts(model=ArrivalOrder), 0),
    "trim-before-cas": Bug(Parts(rules=Rules(store_snapshot=trim_before_cas)), 2544),
    "unconditional-head": Bug(Parts(store=UnconditionalHead), 4),
    "overwrite-on-replay": Bug(Parts(model=Overwrite, rules=Rules(take_over=publish_on_replay)), 0),
    "no-blame": Bug(Parts(rules=Rules(blames=False)), 3),
    "quota-always": Bug(Parts(model=QuotaAlways), 0),
    "commit-above-admitted": Bug(Parts(model=CommitAboveAdmitted), 127),
    "ack-before-fsync": Bug(Parts(redis=AckBeforeFsync), 30),
    "no-tombstone": Bug(Parts(submit=no_tombstone), 0),
    "quarantine-by-attempts": Bug(Parts(rules=Rules(execute_next=quarantine_by_attempts)), 357),
}
FOUND = {
    "keep-gradient-in-quarantine": Bug(
        Parts(rules=Rules(execute_next=keep_gradient_in_quarantine)), 6
    ),
    "begin-the-first-only": Bug(Parts(rules=Rules(execute_next=begin_the_first_only)), 67),
    "told-the-latest": Bug(Parts(model=ToldTheLatest), 20),
    "attempt-per-call": Bug(Parts(model=AttemptPerCall), 17226),
    "trim-forgets-untold": Bug(Parts(model=TrimForgetsUntold), 3183),
    "no-recheck": Bug(Parts(rules=Rules(recheck=no_recheck)), 367),
}
BUGS = PLANTED | FOUND
