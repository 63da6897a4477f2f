"""The owner of one run, sans-I/O: which op comes next, and what becomes of it.

A worker drives it: feed it the log in order, take the next step, carry it out, tell it how it
ended, commit. No clock, no network, no tensors, so that a simulation can drive the very same code.

The state of a run is a fold over its log. Ops up to `committed` are replayed: executed again
without publishing, following the recorded outcome. Later ops are executed and committed.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from luthier_core.ops import Gradient, Kind, Op, Outcome, Refusal

_TAKES_GRADIENT = frozenset({Kind.OPTIM_STEP})
_REPLAYED = frozenset(
    {Kind.CREATE_MODEL, Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.LOAD_WEIGHTS}
)
"""Kinds that change a run's state. A committed save or forward leaves an immutable artefact."""


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


class Diverged(Exception):
    """A replayed op did not end as recorded: the run's state cannot be rebuilt."""


class Owner:
    """One run under one epoch. `next_step`, carry it out, `ended`; in that order, one at a time."""

    def __init__(
        self,
        run_id: str,
        epoch: int,
        committed: int,
        failed: Iterable[int] = (),
        *,
        state_seq: int = -1,
        missing: Iterable[int] = (),
    ) -> None:
        """`failed`: seqs whose recorded outcome is a failure.

        The engine holds the state after op `state_seq` (-1: none), with gradients of the failed
        forward_backwards `missing` since the last optimizer step.
        """
        self.run_id = run_id
        self.epoch = epoch
        self._replay_to = committed
        self._recorded_failures = frozenset(failed)
        self._queue: deque[Op] = deque()
        self._cursor = state_seq + 1
        self._step: Step | None = None
        self._missing = list(missing)
        """forward_backward seqs that failed since the last optimizer step."""
        self._broken: str | None = None

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
    def missing(self) -> tuple[int, ...]:
        """Failed forward_backwards since the last optimizer step: part of a snapshot."""
        return tuple(self._missing)

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

    def ended(self, outcome: Outcome) -> None:
        """The step has been carried out with this outcome; the worker commits it if published.

        Diverged if a replayed op ended differently from its record.
        """
        step = self._step
        assert step is not None, "no step is under way"
        self._step = None
        op = self._queue.popleft()
        if not step.publish and outcome.failed != (op.seq in self._recorded_failures):
            raise Diverged(f"seq {op.seq} ({op.kind}) did not end as recorded")
        self._note(op, outcome)

    def quarantine(self, deaths: int) -> Step:
        """The step under way, failed instead of executed: it has killed its engine too often."""
        assert self._step is not None
        message = f"the operation was given up: the worker died {deaths} times while it ran"
        outcome = Outcome.failure(message, "server")
        op = self._step.op
        self._step = Step(op, _action_of_failure(op), publish=True, outcome=outcome)
        return self._step

    def break_run(self, reason: str) -> None:
        """From now on nothing is executed, and every op that is not committed fails with `reason`.

        Its category is server.
        """
        self._broken = reason

    def _replay_step(self, op: Op) -> Step:
        if op.seq not in self._recorded_failures:
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
