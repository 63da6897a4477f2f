"""The judge: it sees every atomic step and every delivery, and folds the accepted program itself.

Checked as it happens: an outcome is written once, by epochs that never fall, for an op that was
admitted; a delivered answer never changes. Checked at the end: every accepted op has ended; states,
results and artefacts are those of the sequential fold; a gradient that lacks something the client
had not been told of was never applied.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.library.model import Model
from tests.simulation.store import ObjectStore, manifest_key
from tests.simulation.toy import State, ToyOp

from luthier_core.oplog import Admission
from luthier_core.ops import Kind, Op, Outcome
from luthier_core.protocol import MAX_ATTEMPTS, MAX_DEATHS

DEATHS_BOUND = MAX_DEATHS + 3
"""Deaths of one op under its owner's eyes: one before it is begun, two reported too late."""


@dataclass(frozen=True, slots=True)
class Committed:
    epoch: int
    outcome: Outcome


@dataclass(slots=True)
class RunRecord:
    """What was seen of one run."""

    program: dict[int, ToyOp]
    may_give_up: bool = False
    """The client vanished: a gap may stay."""
    accepted: set[int] = field(default_factory=set)
    told: dict[int, int] = field(default_factory=dict)
    """seq -> the `told` that its admission stamped"""
    admitted_at: dict[int, float] = field(default_factory=dict)
    committed: dict[int, Committed] = field(default_factory=dict)
    begun: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """seq -> the epochs that began it"""
    deaths: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    delivered: dict[int, tuple[Outcome, bytes]] = field(default_factory=dict)
    delivered_at: dict[int, float] = field(default_factory=dict)
    given_up: set[int] = field(default_factory=set)
    last_epoch: int = 0
    num_executed: int = 0


class Oracle:
    """Collects `violations` of one history, each a sentence."""

    def __init__(self) -> None:
        self.runs: dict[str, RunRecord] = {}
        self.violations: list[str] = []
        self.rolled_back = False
        """Redis has lost what it had acknowledged: errors are allowed, wrong answers are not."""
        self.now: Callable[[], float] = lambda: 0.0

    def expect(self, holds: bool, violation: str) -> None:
        if not holds and violation not in self.violations:
            self.violations.append(violation)

    def roll_back(self) -> None:
        """Redis forgets: from here on errors are allowed, and deaths are counted anew."""
        self.rolled_back = True
        for record in self.runs.values():
            record.deaths.clear()

    # --- as it happens ----------------------------------------------------------------------------

    def admit_answered(self, op: Op, admission: Admission, model: Model) -> None:
        record = self.runs[op.run_id]
        name = f"{op.run_id}:{op.seq}"
        self.expect(admission.status != "MISMATCH", f"{name}: the same op was called another")
        if admission.status == "OK":
            run = model.runs[op.run_id]
            stored = run.log.get(op.seq) or run.parked.get(op.seq)
            if stored is not None:
                record.told[op.seq] = stored.told
            record.admitted_at[op.seq] = self.now()

    def begun(self, run_id: str, seq: int, epoch: int) -> None:
        self.runs[run_id].begun[seq].add(epoch)

    def executed(self, run_id: str, seq: int) -> None:
        self.runs[run_id].num_executed += 1

    def died(self, run_id: str, seq: int) -> None:
        """An owner's engine, and its supervisor was there to report it."""
        record = self.runs[run_id]
        record.deaths[seq] += 1
        few = record.deaths[seq] <= DEATHS_BOUND
        self.expect(few, f"{run_id}:{seq} has killed more than {DEATHS_BOUND} engines")

    def committed(
        self,
        run_id: str,
        seqs: range,
        epoch: int,
        outcome: Outcome,
        model: Model,
        *,
        given_up: bool = False,
    ) -> None:
        """`given_up`: without execution, because an earlier seq never arrived."""
        record, run = self.runs[run_id], model.runs[run_id]
        for seq in seqs:
            name = f"{run_id}:{seq}"
            (record.given_up.add if given_up else record.given_up.discard)(seq)
            if not self.rolled_back:
                self.expect(seq not in record.committed, f"{name} was committed twice")
                self.expect(
                    seq in record.admitted_at or seq in record.given_up,
                    f"{name} was committed, never admitted",
                )
            known = seq in run.admissions or seq in record.given_up
            self.expect(known, f"{name} was committed; no log holds it")
            record.committed[seq] = Committed(epoch, outcome)
        self.expect(epoch >= record.last_epoch, f"{run_id}:{seqs.start}: an older epoch committed")
        record.last_epoch = max(record.last_epoch, epoch)

    def accepted(self, op: ToyOp) -> None:
        self.runs[op.run_id].accepted.add(op.seq)

    def delivered(self, op: ToyOp, outcome: Outcome, body: bytes) -> None:
        record = self.runs[op.run_id]
        before = record.delivered.setdefault(op.seq, (outcome, body))
        record.delivered_at.setdefault(op.seq, self.now())
        same = (before[0].state, before[1]) == (outcome.state, body)
        if self.rolled_back:
            # What a rollback lost for good ends in a definite error, and so does the run.
            same = same or op.seq in record.given_up
        else:
            same = same and before[0] == outcome
        self.expect(same, f"{op.run_id}:{op.seq}: the delivered answer changed")

    # --- at the end -------------------------------------------------------------------------------

    def check_end(
        self, run_id: str, model: Model, store: ObjectStore, state: State | None, error: str
    ) -> None:
        """`state`: what a last take-over rebuilds; `error`: the client's definite error or ""."""
        record, run = self.runs[run_id], model.runs.get(run_id)
        self.expect(self.rolled_back or not error, f"{run_id}: {error}")
        if run is None:
            self.expect(self.rolled_back or not record.accepted, f"{run_id} is gone")
            return
        for seq in record.accepted:
            ended = seq <= run.committed or seq in record.given_up
            self.expect(ended or self.rolled_back, f"{run_id}:{seq} was accepted and never ended")
        folded = self._fold(run_id, record, run.committed, store)
        self.expect(state is None or state == folded, f"{run_id}: the final state is not the fold")

    def _fold(self, run_id: str, record: RunRecord, committed: int, store: ObjectStore) -> State:
        """The state that the ops, one after another, make; compares each with what was seen."""
        state, missing = State(), list[int]()
        for seq in range(committed + 1):
            op = record.program.get(seq)
            seen = record.committed.get(seq)
            if op is None or seen is None:
                self.expect(False, f"{run_id}:{seq} was committed; the client never sent it")
                continue
            why = self._why_failed(record, op, missing)
            failed = seen.outcome.failed
            self.expect(failed == bool(why), f"{run_id}:{seq} ended {seen.outcome}, not {why!r}")
            # A gap that a rollback left was given up: the run is failed, so nothing is silent.
            if seq in record.delivered and seq not in record.given_up:
                same = record.delivered[seq][0].state == seen.outcome.state
                self.expect(same, f"{run_id}:{seq}: delivered is not what is recorded")
            # A refused optimizer step did not happen; one that failed has dropped the gradient.
            steps = op.kind is Kind.OPTIM_STEP and why not in ("rejected", "given up")
            if steps and not failed:
                self._check_gradient(run_id, record, seq, missing)
            if steps:
                missing = []
            if failed:
                if op.kind is Kind.FORWARD_BACKWARD:
                    missing.append(seq)
                elif steps:
                    state = state.without_gradient()
            else:
                state = state.applied(op.kind, op.digest)
                self._check_result(record, op, seen.outcome, state, store)
        return state

    def _why_failed(self, record: RunRecord, op: ToyOp, missing: list[int]) -> str:
        """Why this op has to fail; empty if it has to complete."""
        seq = op.seq
        if self._given_up(record, seq):
            return "given up" if record.may_give_up or self.rolled_back else ""
        seen = record.committed[seq].outcome
        if op.problem is not None or _is_overflow(seen):
            return "rejected"
        if op.kind is Kind.OPTIM_STEP and any(s > record.told.get(seq, -1) for s in missing):
            return "incomplete gradient"
        if op.ends != "completes":
            return op.ends
        if seen.failed and len(record.begun[seq]) > MAX_ATTEMPTS:
            return "begun too often"
        return ""

    @staticmethod
    def _given_up(record: RunRecord, seq: int) -> bool:
        return seq in record.given_up

    def _check_gradient(self, run_id: str, record: RunRecord, seq: int, missing: list[int]) -> None:
        for lost in missing:
            known = record.delivered_at.get(lost, float("inf"))
            self.expect(
                known < record.admitted_at.get(seq, 0.0),
                f"{run_id}:{seq} applied a gradient without {lost}, and the client did not know",
            )

    def _check_result(
        self,
        record: RunRecord,
        op: ToyOp,
        outcome: Outcome,
        state: State,
        store: ObjectStore,
    ) -> None:
        name = f"{op.run_id}:{op.seq}"
        if op.kind in (Kind.SAVE_WEIGHTS, Kind.SAVE_WEIGHTS_FOR_SAMPLER):
            made = store.get(manifest_key(op.run_id, op.seq))
            expected = " ".join(made or ()).encode()
            saved = made is not None and store.get(made[0]) == state and made[1] == state.digest
            self.expect(saved, f"{name}: the artefact is not the state after its op")
        else:
            expected = state.result(op.digest, large=op.large_result)
        body = outcome.body.inline
        if body is None:
            body = store.get(outcome.body.key)
        self.expect(body == expected, f"{name}: the result is not the fold's")
        if op.seq in record.delivered:
            self.expect(
                record.delivered[op.seq][1] == expected, f"{name}: a wrong result was delivered"
            )


def _is_overflow(outcome: Outcome) -> bool:
    """Refused because too many bytes were parked: a rejected op, though the request was fine."""
    return outcome.failed and b"too many bytes" in (outcome.body.inline or b"")
