"""The owner of one run, sans-I/O: which op comes next, and what becomes of it.

A worker drives it: feed it the log in order, take the next step, carry it out, tell it how it
ended, commit. No clock, no network, no tensors, so that a simulation can drive the very same code.

The state of a run is a fold over its log. Ops up to `committed` are replayed: executed again
without publishing, following the recorded outcome. Later ops are executed and committed.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from luthier_core.oplog import Recorded
from luthier_core.ops import Gradient, Kind, Op, Outcome, Refusal, digest_of

_TAKES_GRADIENT = frozenset({Kind.OPTIM_STEP})
_REPLAYED = frozenset(
    {Kind.CREATE_MODEL, Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.LOAD_WEIGHTS}
)
"""Kinds that change a run's state. A committed save or forward leaves an immutable artefact."""

DIGEST_CHARS = 16

_MARK = "~"
"""Between a digest and the Measure of an op whose bits depended on the ops that it ran with."""


class Action(Enum):
    """What the worker does for a step."""

    EXECUTE = auto()
    CLEAR_GRADIENT = auto()
    NOTHING = auto()


@dataclass(frozen=True, slots=True)
class Step:
    """The next thing to do for a run."""

    op: Op
    action: Action
    publish: bool
    """False while replaying: the outcome is out already and never written again."""
    outcome: Outcome | None = None
    """Decided without execution: a refused request, or an incomplete gradient."""


@dataclass(frozen=True, slots=True)
class FoldState:
    """What an owner knows of a run's state beside the engine's tensors."""

    missing: tuple[int, ...] = ()
    """forward_backward seqs that failed since the last optimizer step."""
    digest: str = ""
    """Over all ops so far and the state after each: equal digests are equal histories."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What an op came to, by which a replay is compared where bits need not agree."""

    value: float = 0.0
    floor: float = 0.0
    """Values below it are compared as if they were that large: a sum can be near 0 by chance."""
    limit: float = 0.0
    """A relative difference above it is no rounding."""

    def deviation(self, recorded: float) -> float:
        """The relative difference from what was recorded; infinite if only one is a number."""
        if self.value == recorded or (math.isnan(self.value) and math.isnan(recorded)):
            return 0.0
        difference = abs(self.value - recorded) / max(abs(self.value), abs(recorded), self.floor)
        return difference if math.isfinite(difference) else math.inf


class Diverged(Exception):
    """A replayed op did not end as recorded: the run's state cannot be rebuilt."""


class Owner:
    """One run under one epoch. `next_step`, carry it out, `ended`; in that order, one at a time."""

    def __init__(
        self,
        run_id: str,
        epoch: int,
        committed: int,
        recorded: Recorded = Recorded(),  # noqa: B008  (frozen)
        *,
        state_seq: int = -1,
        state: FoldState = FoldState(),
    ) -> None:
        """`recorded`: how the ops up to `committed` have ended.

        The engine holds the state after op `state_seq` (-1: none), of which `state` is the rest.
        """
        self.run_id = run_id
        self.epoch = epoch
        self._replay_to = committed
        self._recorded = recorded
        self._queue: deque[Op] = deque()
        self._cursor = state_seq + 1
        self._step: Step | None = None
        self._missing = list(state.missing)
        self._digest = state.digest
        self._broken: str | None = None
        self.deviation: float | None = None
        """The largest of a replayed op; None while the state is what it was, bit by bit."""

    @property
    def cursor(self) -> int:
        """The seq that `feed` wants next."""
        return self._cursor

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def queued(self) -> tuple[Op, ...]:
        """Ops that wait, next first: what the planner looks at."""
        return tuple(self._queue)

    @property
    def replaying(self) -> bool:
        """Whether the next op has been committed before."""
        return bool(self._queue) and self._queue[0].seq <= self._replay_to

    @property
    def executed_to(self) -> int:
        """The last seq whose step has ended; -1 at first."""
        return self._cursor - len(self._queue) - 1

    @property
    def under_way(self) -> bool:
        """Whether a step has begun that has not ended."""
        return self._step is not None

    @property
    def state(self) -> FoldState:
        """After the last step that has ended: part of a snapshot."""
        return FoldState(tuple(self._missing), self._digest)

    def feed(self, ops: Iterable[Op]) -> None:
        """Take ops as read from the log; those already taken are skipped, a gap is our own bug."""
        for op in ops:
            if op.seq < self._cursor:
                continue
            assert op.seq == self._cursor, f"{self.run_id}: log jumps to {op.seq}"
            self._queue.append(op)
            self._cursor += 1

    def next_step(self) -> Step | None:
        """The step for the op at the head, or None if nothing waits."""
        assert self._step is None, "the step before has not ended"
        if not self._queue:
            return None
        op = self._queue[0]
        self._step = self._replay_step(op) if op.seq <= self._replay_to else self._new_step(op)
        return self._step

    def ended(self, outcome: Outcome, checksum: str = "", measure: Measure | None = None) -> str:
        """The step has been carried out with this outcome; the worker commits it if published.

        What it returns is to be recorded with it. Of an op that has changed the engine's state:
        `checksum` of that; `measure` instead if the bits depend on what else was executed; a replay
        gives both. Diverged if it ended differently from its record.
        """
        step = self._step
        assert step is not None, "no step is under way"
        self._step = None
        op = self._queue.popleft()
        if not step.publish and outcome.failed != (op.seq in self._recorded.failed):
            raise Diverged(f"seq {op.seq} ({op.kind}) did not end as recorded")
        self._note(op, outcome)
        recorded = "" if step.publish else self._recorded.digests.get(op.seq, "")
        digest, _, value = recorded.partition(_MARK)
        if value:
            checksum = ""
        self._digest = digest_of(f"{self._digest} {op.digest} {checksum}".encode())[:DIGEST_CHARS]
        if self._broken is not None:
            return self._digest  # there is no state that could differ
        if digest not in ("", self._digest):
            raise Diverged(f"seq {op.seq} ({op.kind}) left another state than it did before")
        if value and measure is not None:
            self._compare(op, measure, float(value))
        return f"{self._digest}{_MARK}{measure.value!r}" if measure else self._digest

    def _compare(self, op: Op, measure: Measure, recorded: float) -> None:
        deviation = measure.deviation(recorded)
        self.deviation = max(self.deviation or 0.0, deviation)
        if deviation > measure.limit:
            raise Diverged(
                f"seq {op.seq} ({op.kind}) came to {measure.value:g}, before to {recorded:g}"
            )

    def quarantine(self, deaths: int) -> Step:
        """The step under way, failed instead of executed: it has killed its engine too often."""
        assert self._step is not None
        message = f"the operation was given up: the worker died {deaths} times while it ran"
        outcome = Outcome.failure(message, "server")
        op = self._step.op
        self._step = Step(op, _action_of_failure(op), publish=True, outcome=outcome)
        return self._step

    @property
    def broken(self) -> bool:
        """Whether the engine has no state of this run."""
        return self._broken is not None

    def break_run(self, reason: str) -> None:
        """From now on nothing is executed, and every op that is not committed fails with `reason`.

        Its category is server.
        """
        self._broken = reason

    def skip_to(self, seq: int) -> None:
        """Of a broken run: go on at op `seq`; all before it are committed, and not replayed."""
        assert self._broken is not None
        assert self._step is None
        self._queue.clear()
        self._cursor = seq

    def _replay_step(self, op: Op) -> Step:
        if op.seq not in self._recorded.failed:
            executed = op.kind in _REPLAYED and self._broken is None
            action = Action.EXECUTE if executed else Action.NOTHING
            decided = None if action is Action.EXECUTE else _RECORDED_SUCCESS
            return Step(op, action, publish=False, outcome=decided)
        return Step(op, _action_of_failure(op), publish=False, outcome=_RECORDED_FAILURE)

    def _new_step(self, op: Op) -> Step:
        if self._broken is not None:
            refused = Outcome.failure(self._broken, "server")
            return Step(op, Action.NOTHING, publish=True, outcome=refused)
        if op.kind is Kind.REJECTED:
            outcome = Outcome.failure(Refusal.of_op(op).message, "user")
            return Step(op, Action.NOTHING, publish=True, outcome=outcome)
        if op.kind in _TAKES_GRADIENT and (unknown := self._failures_not_told(op)):
            return Step(
                op,
                Action.CLEAR_GRADIENT,
                publish=True,
                outcome=Outcome.failure(_incomplete_gradient(unknown), "user"),
            )
        return Step(op, Action.EXECUTE, publish=True)

    def _failures_not_told(self, op: Op) -> list[int]:
        """Failed forward_backwards the client did not know of when it sent this optimizer step."""
        return [seq for seq in self._missing if seq > op.told]

    def _note(self, op: Op, outcome: Outcome) -> None:
        match gradient_after(op, outcome):
            case Gradient.LOST:
                self._missing.append(op.seq)
            case Gradient.CLEARED:
                self._missing.clear()


def changes_state(step: Step) -> bool:
    """Whether this step, if it succeeds, leaves the engine in another state."""
    return step.action is Action.EXECUTE and step.op.kind in _REPLAYED


def gradient_after(op: Op, outcome: Outcome) -> Gradient:
    """What became of the run's summed gradient when this op ended so."""
    kind = Refusal.of_op(op).kind if op.kind is Kind.REJECTED else op.kind
    if kind is Kind.FORWARD_BACKWARD and outcome.failed:
        return Gradient.LOST
    if op.kind in _TAKES_GRADIENT or (op.kind is Kind.LOAD_WEIGHTS and not outcome.failed):
        return Gradient.CLEARED
    return Gradient.KEPT


def _action_of_failure(op: Op) -> Action:
    """However an optimizer step fails, it clears the gradient; any other failure has no effect."""
    return Action.CLEAR_GRADIENT if op.kind in _TAKES_GRADIENT else Action.NOTHING


_RECORDED_SUCCESS = Outcome(state="completed")
_RECORDED_FAILURE = Outcome(state="failed")


def _incomplete_gradient(seqs: list[int]) -> str:
    listed = ", ".join(str(seq) for seq in seqs)
    return (
        f"gradient of seq {listed} missing: that forward_backward failed, and this optimizer step "
        "was sent before its error was delivered. The summed gradient was cleared, the weights are "
        "unchanged; send forward_backward and optim_step again"
    )
