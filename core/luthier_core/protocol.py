"""The protocol core, sans-I/O: how an op is admitted, and how a run is owned.

Each function is a generator that yields an effect at every boundary where a process can die or a
reply be lost, and is sent the effect's answer. The gateway and the trainer drive it with asyncio,
the simulation with virtual time and faults: it is the same code.

An effect may have been applied although its reply was lost; the driver repeats it until it has an
answer. So every effect here is one that may be repeated.
"""

import json
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Self, TypeVar

from luthier_core.oplog import Admission, Attempt, RunHeader
from luthier_core.ops import INLINE_LIMIT, Body, Gradient, Kind, Op, Outcome, Refusal
from luthier_core.owner import Action, FoldState, Measure, Owner, Step, gradient_after

A = TypeVar("A")

COMMIT_DEPTH = 4
"""Ops of a run that may be executed ahead of their commit (reliability 1.3)."""
PROBATION = COMMIT_DEPTH + 1
"""New ops of a tenure that are executed one by one, each begun and committed before the next.

One of them may be what killed the owner before, and it can be blamed only if it was begun: executed
ahead, it would kill every owner before what precedes it is committed.
"""
MAX_DEATHS = 3
"""An op during which the engine died this often is failed (reliability 1.6)."""
MAX_ATTEMPTS = 10
"""So is one that was begun under this many epochs, for whatever reason."""

GAP_TIMEOUT_S = 1800.0
"""A seq that has not come for so long will not: the official SDK tries for about 17 minutes."""
LOST_GAP_S = 60.0
"""The same if the client has been told that what it sent is lost."""

STATE_LOST = "the run's stored state is damaged: create another from its last checkpoint"

_OUTSIDE_EFFECT = frozenset(
    {Kind.SAVE_WEIGHTS, Kind.SAVE_WEIGHTS_FOR_SAMPLER, Kind.SAVE_WEIGHTS_EXTERNAL}
)
"""Kinds whose commit writes something outside of Redis first: they are begun under the epoch."""


class Left(Exception):
    """This worker does not own the run any more: drop its state, publish nothing more."""


class LogTrimmed(Left):
    """Ops that the owner needs are not in the log. Mostly the run is another's, who trimmed it."""

    def __init__(self, cursor: int, goes_on_at: int) -> None:
        super().__init__(f"seq {cursor} to {goes_on_at - 1} are missing from the log")
        self.goes_on_at = goes_on_at


@dataclass(frozen=True, slots=True)
class Effect:
    """Something that the driver does; its class says what the generator is sent."""


Steps = Generator[Effect, Any, A]


async def drive(steps: Steps[A], perform: Callable[[Effect], Awaitable[Any]]) -> A:
    """Run a generator of this module to its end; what `perform` raises is raised inside of it."""
    advance: Callable[[], Effect] = partial(next, steps)
    while True:
        try:
            effect = advance()
        except StopIteration as stop:
            result: A = stop.value
            return result
        try:
            answer = await perform(effect)
        except Exception as error:
            advance = partial(steps.throw, error)
        else:
            advance = partial(steps.send, answer)


# --- admission: the gateway -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutPayload(Effect):
    """Store an op's bytes under a key that holds their digest -> None."""

    key: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Admit(Effect):
    """-> Admission."""

    op: Op


@dataclass(frozen=True, slots=True)
class Announce(Effect):
    """Tell the workers that this run has no owner -> None."""

    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A checked request that is to become an op."""

    run_id: str
    seq: int
    kind: Kind
    digest: str
    body: bytes
    payload_key: str
    """Where the body goes if it is larger than INLINE_LIMIT."""
    problem: str | None = None
    """Why the request is refused: it uses up its seq and its future fails with this."""


def submit(request: Request) -> Steps[Admission]:
    """Payload first, then one atomic admit: nothing is acknowledged before it is stored."""
    if request.problem is not None:
        admission: Admission = yield Admit(_rejected(request, request.problem))
    else:
        if len(request.body) > INLINE_LIMIT:
            yield PutPayload(request.payload_key, request.body)
        admission = yield Admit(_op(request))
    if admission.status == "FULL":
        full = "too many bytes wait for an earlier seq that has not arrived"
        admission = yield Admit(_rejected(request, full))
    if admission.status in ("OK", "DUP") and not admission.owner:
        yield Announce(request.run_id)
    return admission


def _op(request: Request) -> Op:
    large = len(request.body) > INLINE_LIMIT
    body = Body.stored(request.payload_key, request.body) if large else Body.of(request.body)
    return Op(
        run_id=request.run_id,
        seq=request.seq,
        kind=request.kind,
        digest=request.digest,
        body=body,
    )


def _rejected(request: Request, message: str) -> Op:
    return Op(
        run_id=request.run_id,
        seq=request.seq,
        kind=Kind.REJECTED,
        digest=request.digest,
        body=Refusal(request.kind, message).body(),
    )


# --- ownership: the worker ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """A stored copy of a run's state: after op seq, made under this epoch."""

    seq: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Head:
    """`runs/R/HEAD.json`: changed only by compare-and-swap; the durable fence."""

    epoch: int
    owner: str
    snap: SnapshotRef | None = None
    prev_snap: SnapshotRef | None = None

    def to_bytes(self) -> bytes:
        return json.dumps({"format": 1, **asdict(self)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        fields = json.loads(data)
        snap, prev_snap = (
            SnapshotRef(**fields[name]) if fields[name] else None for name in ("snap", "prev_snap")
        )
        return cls(fields["epoch"], fields["owner"], snap, prev_snap)


@dataclass(frozen=True, slots=True)
class ReadHead(Effect):
    """-> (Head, etag), or (None, "") if there is none."""

    run_id: str


@dataclass(frozen=True, slots=True)
class CasHead(Effect):
    """Replace HEAD if it has this etag ("": create) -> the new etag, or None if it has not."""

    run_id: str
    head: Head
    etag: str


@dataclass(frozen=True, slots=True)
class Acquire(Effect):
    """-> (admitted, committed), or None if Redis knows a newer epoch."""

    run_id: str
    epoch: int
    owner: str


@dataclass(frozen=True, slots=True)
class Restore(Effect):
    """Bring the engine to a snapshot's state (None: no state yet).

    -> FoldState as it was put with the snapshot, or None if that is damaged.
    """

    run_id: str
    ref: SnapshotRef | None


@dataclass(frozen=True, slots=True)
class FastForward(Effect):
    """Redis was rolled back behind a snapshot -> OK | ALREADY | FENCED."""

    run_id: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class ReadRecorded(Effect):
    """-> Recorded: how the committed ops have ended."""

    run_id: str


@dataclass(frozen=True, slots=True)
class Begin(Effect):
    """-> Attempt."""

    run_id: str
    epoch: int
    seq: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Blame(Effect):
    """The engine died while it executed this op -> how often it has; negative if not ours."""

    run_id: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Execute(Effect):
    """Apply a step to the engine's state -> Executed."""

    step: Step


@dataclass(frozen=True, slots=True)
class Finish(Effect):
    """The rest of an executed op that needs no engine: uploads, the save protocol -> Outcome."""

    step: Step
    rest: Any


@dataclass(frozen=True, slots=True)
class Commit(Effect):
    """-> Attempt."""

    run_id: str
    epoch: int
    seq: int
    outcome: Outcome
    gradient: Gradient
    digest: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class CopyState(Effect):
    """-> an opaque copy of the engine's state of this run, as it is now."""

    run_id: str


@dataclass(frozen=True, slots=True)
class PutSnapshot(Effect):
    """Store a copy, its manifest last -> None."""

    run_id: str
    ref: SnapshotRef
    copy: Any
    state: FoldState


@dataclass(frozen=True, slots=True)
class Trim(Effect):
    """-> OK | FENCED | ORDER."""

    run_id: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class FailRange(Effect):
    """-> OK | ALREADY | FENCED | ORDER."""

    run_id: str
    epoch: int
    seqs: range
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Executed:
    """How Execute ended: an outcome that is known already, or what Finish needs for one."""

    outcome: Outcome | None = None
    rest: Any = None
    checksum: str = ""
    """Of the engine's state, if the op has changed it."""
    measure: Measure | None = None
    """Of an op whose bits depend on what else was executed, and of every op that is replayed."""
    digest: str = ""
    """Of the run's history up to here; execute_next fills it in."""


@dataclass(slots=True)
class Tenure:
    """One worker's ownership of one run, from take_over to Left."""

    run_id: str
    name: str
    """The worker's incarnation, as HEAD and the header name the owner."""
    head: Head
    etag: str
    owner: Owner
    committed: int
    sound: SnapshotRef | None
    """The newest snapshot that this tenure knows to be whole: restored from, or its own."""
    num_begun: int = 0
    """New ops that execute_next has begun; none beyond PROBATION."""

    @property
    def epoch(self) -> int:
        return self.head.epoch

    @property
    def depth(self) -> int:
        """How many executed ops may wait for their commit before execute_next is called again."""
        return COMMIT_DEPTH if self.num_begun >= PROBATION else 1

    def check(self, status: str) -> None:
        """Left unless the run is still ours. ORDER means that Redis went back behind us."""
        if status not in ("OK", "ALREADY"):
            raise Left(f"{self.run_id}: {status} under epoch {self.epoch}")


def take_over(run_id: str, name: str) -> Steps[Tenure | None]:
    """Own a run: HEAD first, then Redis, then the state. None if another worker was first."""
    found, found_etag = yield ReadHead(run_id)
    head = replace(found, epoch=found.epoch + 1, owner=name) if found else Head(1, name)
    etag = yield from _swap_head(run_id, head, found_etag)
    if etag is None:
        return None
    cursors = yield Acquire(run_id, head.epoch, name)
    if cursors is None:
        return None
    _, committed = cursors
    restored = yield from _restore(run_id, head)
    ref, state = restored or (head.snap, FoldState())
    state_seq = ref.seq if ref else -1
    if state_seq > committed:
        status = yield FastForward(run_id, head.epoch, state_seq)
        if status == "FENCED":
            return None
        committed = state_seq
    if restored is None:
        # Nothing can be replayed on top of it; what comes fails, with a reason.
        owner = Owner(run_id, head.epoch, committed, state_seq=committed)
        owner.break_run(STATE_LOST)
        return Tenure(run_id, name, head, etag, owner, committed, sound=None)
    recorded = yield ReadRecorded(run_id)
    owner = Owner(run_id, head.epoch, committed, recorded, state_seq=state_seq, state=state)
    return Tenure(run_id, name, head, etag, owner, committed, sound=ref)


def feed(tenure: Tenure, ops: Iterable[Op]) -> None:
    """Give the owner what its log says next; LogTrimmed if that is lost."""
    cursor = tenure.owner.cursor
    new = [op for op in ops if op.seq >= cursor]
    if new and new[0].seq != cursor:
        raise LogTrimmed(cursor, new[0].seq)
    tenure.owner.feed(new)


def execute_next(tenure: Tenure) -> Steps[tuple[Step, Executed] | None]:
    """Execute the op at the head; what it returns goes to commit_next if it is to be published.

    Call it only while fewer than `tenure.depth` executed ops wait for their commit. None if nothing
    waits. Diverged if a replayed op does not end as it did.
    """
    owner = tenure.owner
    step = owner.next_step()
    if step is None:
        return None
    if step.publish and tenure.num_begun < PROBATION:
        attempt: Attempt = yield Begin(tenure.run_id, tenure.epoch, step.op.seq, step.op.kind)
        tenure.check(attempt.status)
        tenure.num_begun += 1
        if attempt.deaths >= MAX_DEATHS or attempt.attempts > MAX_ATTEMPTS:
            step = owner.quarantine(attempt.deaths)
    executed = Executed(step.outcome)
    if step.action is not Action.NOTHING:
        executed = yield Execute(step)
    if step.outcome is not None:
        executed = Executed(step.outcome)
    digest = owner.ended(executed.outcome or _SUCCESS, executed.checksum, executed.measure)
    return step, replace(executed, digest=digest)


def blame_next(tenure: Tenure) -> Steps[int]:
    """The engine died of the step under way -> of how many attempts so far; Left if not ours.

    Call it once every op before it is committed. One that was executed ahead is begun now: so each
    death counts.
    """
    run_id, seq = tenure.run_id, tenure.owner.executed_to + 1
    kind = tenure.owner.queued[0].kind
    attempt: Attempt = yield Begin(run_id, tenure.epoch, seq, kind)
    tenure.check(attempt.status)
    deaths: int = yield Blame(run_id, tenure.epoch, seq)
    if deaths < 0:
        raise Left(f"{run_id}: seq {seq} is not under way under epoch {tenure.epoch}")
    return deaths


def commit_next(tenure: Tenure, step: Step, executed: Executed) -> Steps[None]:
    """Publish one executed op; in order of seq, each after the one before. Left if not ours."""
    run_id, seq, kind = tenure.run_id, step.op.seq, step.op.kind
    if kind in _OUTSIDE_EFFECT and executed.outcome is None:
        attempt: Attempt = yield Begin(run_id, tenure.epoch, seq, kind)
        tenure.check(attempt.status)
    outcome = executed.outcome
    if outcome is None:
        outcome = yield Finish(step, executed.rest)
    gradient = gradient_after(step.op, outcome)
    committed: Attempt = yield Commit(
        run_id, tenure.epoch, seq, outcome, gradient, executed.digest, kind
    )
    tenure.check(committed.status)
    tenure.committed = seq


def recheck(run_id: str, tenure: Tenure | None) -> Steps[None]:
    """What a driver does after Redis was away, before it sends anything for this run again.

    `tenure`: None while the run is being taken over. Redis may have gone back to an earlier state,
    in which it takes an old epoch for the newest; HEAD never does. Left if the run is not ours.
    """
    if tenure is None:
        raise Left(f"{run_id}: Redis was away during the take-over")
    head, _ = yield ReadHead(run_id)
    if head is None or head.epoch != tenure.epoch:
        raise Left(f"{run_id}: HEAD has been taken")


def store_snapshot(tenure: Tenure, seq: int, copy: Any, state: FoldState) -> Steps[None]:
    """Make a copy of the state after op seq, which is committed, the one to restore from.

    The log is trimmed only once HEAD is confirmed, and only up to the snapshot before: a bad newest
    one costs more replay, not the run. Left if another worker has taken over.
    """
    run_id = tenure.run_id
    assert seq <= tenure.committed, "a snapshot must not be ahead of what is committed"
    ref = SnapshotRef(seq, tenure.epoch)
    yield PutSnapshot(run_id, ref, copy, state)
    # Not HEAD's newest, which may be the damaged one that this tenure did not start from.
    head = replace(tenure.head, snap=ref, prev_snap=tenure.sound)
    etag = yield from _swap_head(run_id, head, tenure.etag)
    if etag is None:
        raise Left(f"{run_id}: HEAD has been taken")
    tenure.head, tenure.etag, tenure.sound = head, etag, ref
    if head.prev_snap is not None:
        status = yield Trim(run_id, tenure.epoch, head.prev_snap.seq)
        tenure.check(status)


def gap_is_overdue(
    header: RunHeader,
    now_s: float,
    *,
    session_has_ended: bool,
    timeout_s: float = GAP_TIMEOUT_S,
) -> bool:
    """Whether what is missing below a parked op will not come any more; all before it has ended."""
    if not header.has_gap or header.pending:
        return False
    if session_has_ended:
        return True
    limit_s = min(LOST_GAP_S, timeout_s) if header.lost >= 0 else timeout_s
    return now_s - header.gap_since / 1000 > limit_s


def give_up_gap(tenure: Tenure, last_parked: int, *, recovery: str = "") -> Steps[None]:
    """Fail what waits above a gap that was not filled in time; everything below is committed.

    `recovery`: tinker:// path of the state below it, for the client to go on from.
    """
    first = tenure.committed + 1
    reason = f"seq {first} never arrived, so nothing after it was executed"
    if recovery:
        reason += f"; the state before it is {recovery}"
    never = Outcome.failure(reason, "user")
    seqs = range(first, last_parked + 1)
    status = yield FailRange(tenure.run_id, tenure.epoch, seqs, never)
    tenure.check(status)
    tenure.committed = last_parked


def _swap_head(run_id: str, head: Head, etag: str) -> Steps[str | None]:
    """The new etag once HEAD is as wanted; None if somebody else has changed it."""
    swapped: str | None = yield CasHead(run_id, head, etag)
    if swapped is None:
        # A try whose reply was lost may have been ours: it says so itself.
        found, found_etag = yield ReadHead(run_id)
        return found_etag if found == head else None
    return swapped


def _restore(run_id: str, head: Head) -> Steps[tuple[SnapshotRef | None, FoldState] | None]:
    """The newest snapshot that is whole, with what was put beside it; None for it: start at op 0.

    None if there are two and both are damaged: the log before them is trimmed.
    """
    for ref in (head.snap, head.prev_snap):
        if ref is not None:
            state: FoldState | None = yield Restore(run_id, ref)
            if state is not None:
                return ref, state
    # The log is trimmed only up to the older of two snapshots: with one, it is all there.
    if head.prev_snap is not None:
        return None
    yield Restore(run_id, None)
    return None, FoldState()


_SUCCESS = Outcome(state="completed")
