"""The rules of the model-based test: everything gateways, owners and time may do, in any order.

After each step the server and the model must have answered alike and hold the same, and the model
must hold what reliability promises (`Promises`): so the library does too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.library.model import JobQueue, Model, Run, entry_number
from tests.library.promises import Promises
from tests.library.server import Contents, Hash, Server, expected_contents

from luthier_core import keys
from luthier_core.config import LimitsConfig
from luthier_core.oplog import RedisRestarted
from luthier_core.ops import (
    SEQS_PER_CLONE,
    Body,
    Gradient,
    Kind,
    Op,
    Outcome,
    SamplingJob,
    clone_of,
    digest_of,
)

TENANT, STRANGER = "ann", "eve"
OWNERS = ("trainer-0/a", "trainer-1/b")
HEADER = {"base_model": "m", "facts": "{}"}
OWNER_CALLS: dict[str, Callable[[Run], tuple[Any, ...]]] = {
    "acquire": lambda run: (run.epoch + 1, OWNERS[0]),
    "release": lambda run: (run.epoch,),
    "begin": lambda run: (run.epoch, run.committed + 1),
    "commit": lambda run: (run.epoch, run.committed + 1, OUTCOMES["done"]),
    "blame": lambda run: (run.epoch, run.committed + 1),
    "halve": lambda run: (run.epoch, run.committed + 1, 1),
    "trim": lambda run: (run.epoch, run.committed),
    "ffwd": lambda run: (run.epoch, run.committed + 1),
    "publish": lambda run: (run.epoch, run.committed, "w"),
    "fail_range": lambda run: (
        *(run.epoch, range(run.committed + 1, max(run.parked, default=run.committed + 1) + 1)),
        OUTCOMES["failed"],
    ),
}
"""Calls of an owner -> arguments with which it would be obeyed, as a rule."""
# Named, so that a failing program reads well.
LIMITS = {
    "wide": LimitsConfig(max_seq_ahead=9),
    "few ops": LimitsConfig(max_seq_ahead=9, max_pending_ops=3, max_parked_bytes=12),
    "few bytes": LimitsConfig(max_seq_ahead=4, max_pending_bytes=16, max_parked_bytes=12),
}
OUTCOMES = {
    "done": Outcome.completed(Body.of(b"1")),
    "stored": Outcome.completed(Body.stored("res/2", b"2"), "protobuf"),
    "failed": Outcome.failure("no", "user"),
}
CANCELLED = Outcome(state="cancelled", body=Body.of(b"cancelled"), encoding="text")
BASE_MODEL, SAMPLER = "m", "s1:sample:0"
SAMPLERS = ("sampler-0", "sampler-1")
BIG_SEQ = 10**18 + 1
"""Sampling seqs that differ only in digits which a Lua number would lose."""
SAMPLE_SEQS = [str(BIG_SEQ), str(BIG_SEQ + 1), str(BIG_SEQ + 2), str(BIG_SEQ + SEQS_PER_CLONE)]
CLONES = (clone_of(BIG_SEQ), clone_of(BIG_SEQ) + 1)

bodies = st.sampled_from((b"", b"a", b"b" * 8, b"c" * 12))
kinds = st.sampled_from((Kind.FORWARD, Kind.FORWARD, Kind.REJECTED))
gaps = st.sampled_from((1, 1, 1, 2, 2, 3, 6, 9))
late_gaps = st.sampled_from((0, 0, 1, 3))
"""0: nothing arrives late."""
num_first_ops = st.sampled_from((0, 1, 1, 2, 3, 4))
tenants = st.sampled_from((TENANT, TENANT, TENANT, STRANGER))
outcomes = st.sampled_from(sorted(OUTCOMES))
gradients = st.sampled_from((Gradient.KEPT, Gradient.LOST, Gradient.LOST, Gradient.CLEARED))
epoch_errors = st.sampled_from((0, 0, 0, 0, 0, -1, 1))
seq_errors = st.sampled_from((0, 0, 0, 0, 0, -1, 1, 2))
picks = st.integers(0, 5)
"""0 is the latest."""


def body_of(data: bytes) -> Body:
    """Long ones lie in the object store, as with real limits."""
    return Body.stored(f"ops/{data[:1].decode()}", data) if len(data) > 8 else Body.of(data)


@dataclass(frozen=True)
class Saved:
    """A moment to roll back to."""

    on_server: list[tuple[bytes, int, bytes]]
    model: Model
    promises: Promises


class LibraryMachine(RuleBasedStateMachine):
    """One server, one model; most rules act on the current run, the last one created."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        server.clear()
        server.run(server.oplog.open_jobs(BASE_MODEL))
        server.now_s = 1.0
        self.model = Model(clock=lambda: server.now_s)
        self.promises = Promises()
        self.limits = LIMITS["wide"]
        self.num_runs = 1
        self.sent: dict[tuple[str, int], Op] = {}
        self.held: list[tuple[SamplingJob, SamplingJob]] = []
        self.saved: list[Saved] = []

    # --- how both sides are driven ----------------------------------------------------------------

    @property
    def run_id(self) -> str:
        return f"r{self.num_runs}"

    @property
    def run(self) -> Run:
        """The current run as the model has it; one without an op if it is not created."""
        return self.model.runs.get(self.run_id) or Run(TENANT, HEADER)

    def both(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.server.now_s += 1  # no two calls at one time
        expected = getattr(self.model, name)(*args, **kwargs)
        answer = self.server.run(getattr(self.server.oplog, name)(*args, **kwargs))
        assert answer == expected, f"{name} answers {answer}, not {expected}"
        return expected

    def send(self, op: Op, tenant: str = TENANT) -> str:
        header = HEADER if op.seq == 0 else None
        admission = self.both("admit", op, tenant=tenant, limits=self.limits, header=header)
        if admission.status == "OK":
            self.sent[op.run_id, op.seq] = op
        return str(admission.status)

    def op(self, seq: int, data: bytes, kind: Kind = Kind.FORWARD_BACKWARD) -> Op:
        return Op(
            run_id=self.run_id, seq=seq, kind=kind, digest=digest_of(data), body=body_of(data)
        )

    @invariant()
    def check(self) -> None:
        contents, expected = self.server.contents(), expected_contents(self.model)
        assert contents == expected, difference(contents, expected)
        self.promises.check(self.model)

    # --- gateways ---------------------------------------------------------------------------------

    @initialize(
        limits=st.sampled_from(sorted(LIMITS)), num_ops=num_first_ops, num_done=st.integers(0, 5)
    )
    def start(self, limits: str, num_ops: int, num_done: int) -> None:
        self.limits = LIMITS[limits]
        self.create(num_ops, num_done)

    @precondition(lambda self: self.run.status != "active")
    @rule(num_ops=num_first_ops, num_done=st.integers(0, 5))
    def start_another_run(self, num_ops: int, num_done: int) -> None:
        self.num_runs += 1
        self.create(num_ops, num_done)

    def create(self, num_ops: int, num_done: int) -> None:
        self.post(num_ops, b"a", Kind.FORWARD)
        self.acquire(1, OWNERS[0])
        self.work(num_done, "done")

    @rule(num_ops=st.integers(1, 3), data=bodies, kind=kinds)
    def post(self, num_ops: int, data: bytes, kind: Kind) -> None:
        for _ in range(num_ops):
            self.send(self.op(self.run.admitted + 1, data, kind))

    @rule(some_gaps=st.lists(gaps, min_size=1, max_size=3), data=bodies, kind=kinds)
    def post_above_a_gap(self, some_gaps: list[int], data: bytes, kind: Kind) -> None:
        for gap in some_gaps:
            self.send(self.op(self.run.admitted + 1 + gap, data, kind))

    def post_late(self, gap: int) -> None:
        if gap:
            self.post_above_a_gap([gap], b"late", Kind.FORWARD)

    @rule(num_chunks=st.integers(2, 4), data=bodies)
    def post_chunks(self, num_chunks: int, data: bytes) -> None:
        """The official SDK posts the first chunk when every later one has been accepted."""
        first = self.run.admitted + 1
        later = [self.send(self.op(first + nth, data)) for nth in range(1, num_chunks)]
        if set(later) <= {"OK", "DUP"}:
            self.send(self.op(first, data))

    @rule(pick=picks, data=st.none() | bodies, tenant=tenants)
    def post_again(self, pick: int, data: bytes | None, tenant: str) -> None:
        """The same request, or another under a used seq, or somebody else's."""
        ops = list(self.sent.values())
        if ops:
            op = ops[-1 - pick % len(ops)]
            again = op if data is None else replace(op, digest=digest_of(data), body=body_of(data))
            self.send(again, tenant)

    @rule(data=bodies, tenant=tenants, run_id=st.sampled_from(("", "refused")))
    def refuse_creation(self, data: bytes, tenant: str, run_id: str) -> None:
        """Of the current run, if run_id is empty; then the client sends on."""
        run_id = run_id or self.run_id
        call = {"tenant": tenant, "digest": digest_of(data), "header": HEADER}
        if self.both("reject_run", run_id, **call, outcome=OUTCOMES["failed"]) == "OK":
            self.promises.note_used_up(run_id, range(1))
        for seq in range(2):
            self.send(replace(self.op(seq, data), run_id=run_id))

    @rule(seq_error=st.integers(-2, 4))
    def deliver_an_error(self, seq_error: int) -> None:
        self.both("told", self.run_id, self.run.committed + seq_error)

    @rule(ahead=st.integers(-1, 4))
    def ask_in_vain(self, ahead: int) -> None:
        """A client polls for what a rollback has lost, or for what is here after all."""
        self.both("lost", self.run_id, self.run.admitted + ahead)

    @rule(pick=picks)
    def deliver_a_failure(self, pick: int) -> None:
        """In any order: polls of one run are concurrent."""
        failed = sorted(self.run.failed | self.run.untold)
        if failed:
            self.both("told", self.run_id, failed[-1 - pick % len(failed)])

    # --- owners -----------------------------------------------------------------------------------

    @rule(ahead=st.integers(-1, 2), owner=st.sampled_from(OWNERS))
    def acquire(self, ahead: int, owner: str) -> None:
        self.both("acquire", self.run_id, self.run.epoch + ahead, owner)

    @rule(epoch_error=epoch_errors)
    def release(self, epoch_error: int) -> None:
        self.both("release", self.run_id, self.run.epoch + epoch_error)

    @rule(epoch_error=epoch_errors, seq_error=seq_errors)
    def begin(self, epoch_error: int, seq_error: int) -> None:
        seq = self.run.committed + 1 + seq_error
        self.both("begin", self.run_id, self.run.epoch + epoch_error, seq)

    @rule(
        epoch_error=epoch_errors,
        seq_error=seq_errors,
        outcome=outcomes,
        gradient=gradients,
        begin_next=st.booleans(),
    )
    def commit(
        self,
        epoch_error: int,
        seq_error: int,
        outcome: str,
        gradient: Gradient,
        begin_next: bool,
    ) -> None:
        epoch, seq = self.run.epoch + epoch_error, self.run.committed + 1 + seq_error
        call = {"gradient": gradient, "digest": f"after {seq}", "begin_next": begin_next}
        attempt = self.both("commit", self.run_id, epoch, seq, OUTCOMES[outcome], **call)
        if attempt.status == "OK":
            self.promises.note_commit(self.run_id, epoch)

    @rule(num_ops=st.sampled_from((1, 2, 9)), outcome=outcomes)
    def work(self, num_ops: int, outcome: str) -> None:
        """What an owner does when nothing goes wrong; what fails here are forward_backwards."""
        gradient = Gradient.LOST if outcome == "failed" else Gradient.KEPT
        self.begin(0, 0)
        for _ in range(min(num_ops, self.run.admitted - self.run.committed)):
            self.commit(0, 0, outcome, gradient, begin_next=True)

    @rule(
        epoch_error=epoch_errors,
        seq_error=seq_errors,
        begun=st.booleans(),
        num_calls=st.integers(1, 2),
    )
    def blame(self, epoch_error: int, seq_error: int, begun: bool, num_calls: int) -> None:
        """The engine dies, which is told twice where a reply is lost."""
        epoch, seq = self.run.epoch + epoch_error, self.run.committed + 1 + seq_error
        if begun:
            self.begin(0, 0)
        for _ in range(num_calls):
            self.both("blame", self.run_id, epoch, seq)

    @rule(epoch_error=epoch_errors, seq_error=st.integers(-1, 2), halvings=st.sampled_from((1, 2)))
    def halve(self, epoch_error: int, seq_error: int, halvings: int) -> None:
        """The engine has no memory for an op, which may be executed ahead."""
        epoch, seq = self.run.epoch + epoch_error, self.run.committed + 1 + seq_error
        self.both("halve", self.run_id, epoch, seq, halvings)

    @rule(epoch_error=epoch_errors, back=st.integers(-1, 4))
    def trim(self, epoch_error: int, back: int) -> None:
        seq = max(-1, self.run.committed - back)
        self.both("trim", self.run_id, self.run.epoch + epoch_error, seq)

    @rule(epoch_error=epoch_errors, ahead=st.sampled_from((-1, 0, 1, 2, 3, 5)), gap=late_gaps)
    def ffwd(self, epoch_error: int, ahead: int, gap: int) -> None:
        """To a snapshot; an op may be parked since Redis was rolled back."""
        self.post_late(gap)
        seq, admitted = self.run.committed + ahead, self.run.admitted
        if self.both("ffwd", self.run_id, self.run.epoch + epoch_error, seq) == "OK":
            self.promises.note_used_up(self.run_id, range(admitted + 1, seq + 1))

    @rule(epoch_error=epoch_errors, seq_error=st.integers(-1, 2))
    def publish(self, epoch_error: int, seq_error: int) -> None:
        epoch, seq = self.run.epoch + epoch_error, self.run.committed + seq_error
        self.both("publish", self.run_id, epoch, seq, f"w/{epoch}-{seq}")

    @rule(
        epoch_error=epoch_errors,
        seq_error=seq_errors,
        num_more=st.sampled_from((0, 0, 0, -4, -1, 1)),
        gap=late_gaps,
    )
    def fail_what_waits(self, epoch_error: int, seq_error: int, num_more: int, gap: int) -> None:
        """The gap timer, which has looked before the last op arrived."""
        epoch, first = self.run.epoch + epoch_error, self.run.committed + 1 + seq_error
        stop = max([first, *self.run.parked]) + 1 + num_more
        seqs = range(first, max(first, stop))
        self.post_late(gap)
        admitted = self.run.admitted
        if self.both("fail_range", self.run_id, epoch, seqs, OUTCOMES["failed"]) == "OK":
            self.promises.note_commit(self.run_id, epoch)
            self.promises.note_used_up(self.run_id, range(admitted + 1, seqs.stop))

    @rule(name=st.sampled_from(sorted(OWNER_CALLS)))
    def call_the_server_before_its_restart(self, name: str) -> None:
        """Whatever an owner asks for, nothing is done."""
        run, run_id = self.run, self.run_id
        args = OWNER_CALLS[name](run)
        try:
            self.server.run(getattr(self.server.oplog, name)(run_id, *args, server="before"))
        except RedisRestarted:
            return
        raise AssertionError(f"{name} was obeyed")

    @rule(cursor=st.integers(0, 6))
    def read(self, cursor: int) -> None:
        self.both("header", self.run_id)
        self.both("recorded", self.run_id)
        self.both("read_log", {self.run_id: cursor})
        self.both("is_parked", self.run_id, cursor)
        self.both("admitted_at", self.run_id, cursor)
        self.both("training_outcome", self.run_id, cursor)

    # --- time and trouble -------------------------------------------------------------------------

    @rule(pick=picks, sampled=st.booleans())
    def expire(self, pick: int, sampled: bool) -> None:
        """An outcome of a run, or the record of a sample, reaches its TTL."""
        records: dict[Any, Any] = self.model.samples if sampled else self.model.outcomes
        if records:
            name = list(records)[-1 - pick % len(records)]
            del records[name]
            key = keys.sampling_outcome if sampled else keys.run_outcome
            self.server.delete(key(*name))
            self.promises.note_expiry(name)

    @rule()
    def save(self) -> None:
        saved = Saved(self.server.save(), self.model.copy(), self.promises.copy())
        self.saved.append(saved)

    @precondition(lambda self: self.saved)
    @rule(pick=picks)
    def roll_back(self, pick: int) -> None:
        saved = self.saved[-1 - pick % len(self.saved)]
        self.server.restore(saved.on_server)
        self.model, self.promises = saved.model.copy(), saved.promises.copy()
        # Within one millisecond the server may give a new job the id of one it has forgotten.
        queue = self.model.queues.get(BASE_MODEL, JobQueue())
        self.held = [pair for pair in self.held if entry_number(pair[1]) in queue.jobs]

    # --- sampling ---------------------------------------------------------------------------------

    @rule(
        nth=st.integers(0, 3),
        data=bodies,
        tenant=tenants,
        refused=st.sampled_from((False, False, False, True)),
        max_jobs=st.sampled_from((9, 9, 1)),
    )
    def enqueue(self, nth: int, data: bytes, tenant: str, refused: bool, max_jobs: int) -> None:
        job: dict[str, str | bytes] = {"session": SAMPLER, "tenant": tenant, "weights": ""}
        self.both(
            "enqueue",
            tenant=tenant,
            base_model=BASE_MODEL,
            sampling_session_id=SAMPLER,
            seq=SAMPLE_SEQS[nth],
            digest=digest_of(data),
            job=OUTCOMES["failed"].fields() if refused else {**job, **body_of(data).fields()},
            max_jobs=max_jobs,
            header={"base_model": BASE_MODEL, "weights": ""},
        )

    @rule(max_jobs=st.integers(1, 3), consumer=st.sampled_from(SAMPLERS))
    def claim(self, max_jobs: int, consumer: str) -> None:
        """What was claimed by an earlier incarnation, then new jobs."""
        call = self.server.oplog.claim_own(BASE_MODEL, consumer)
        self.same_jobs(self.server.run(call), self.model.claim_own(BASE_MODEL, consumer))
        expected = self.model.claim(BASE_MODEL, consumer, max_jobs=max_jobs)
        call = self.server.oplog.claim(BASE_MODEL, consumer, max_jobs=max_jobs, block_ms=None)
        self.held += self.same_jobs(self.server.run(call), expected)

    @precondition(lambda self: self.held)
    @rule(pick=picks, outcome=outcomes)
    def settle(self, pick: int, outcome: str) -> None:
        job, model_job = self.held[-1 - pick % len(self.held)]
        expected = self.model.settle(model_job, BASE_MODEL, OUTCOMES[outcome])
        answer = self.server.run(self.server.oplog.settle(job, BASE_MODEL, OUTCOMES[outcome]))
        assert answer == expected, f"settle answers {answer}, not {expected}"

    @rule(nth=st.integers(0, 3))
    def cancel(self, nth: int) -> None:
        self.both("cancel", SAMPLER, SAMPLE_SEQS[nth], BASE_MODEL, CANCELLED)

    @rule(clone=st.sampled_from(CLONES), after=st.integers(0, 3), max_entries=st.integers(1, 2))
    def list_completions(self, clone: int, after: int, max_entries: int) -> None:
        self.both("completions", SAMPLER, clone, after=after, max_entries=max_entries)

    @rule(clone=st.sampled_from(CLONES), back=st.integers(0, 2))
    def acknowledge(self, clone: int, back: int) -> None:
        """The client goes on from a place it has read up to."""
        to = max(0, self.model.num_completed.get((SAMPLER, clone), 0) - back)
        seqs = [seq for seq in SAMPLE_SEQS if clone_of(seq) == clone]
        self.both("acknowledge", SAMPLER, clone, to=to, seqs=seqs)

    @staticmethod
    def same_jobs(
        jobs: list[SamplingJob], expected: list[SamplingJob]
    ) -> list[tuple[SamplingJob, SamplingJob]]:
        """The pairs, which may differ in their entry ids only: those are the server's clock."""
        assert len(jobs) == len(expected)
        for job, model_job in zip(jobs, expected, strict=True):
            assert job == replace(model_job, entry_id=job.entry_id)
        return list(zip(jobs, expected, strict=True))


def difference(contents: Contents, expected: Contents) -> str:
    """What server and model hold where they differ, a line for each key or field of a hash."""
    lines = ["the server holds, the model holds:"]
    for key in sorted(contents.keys() | expected.keys()):
        one, other = contents.get(key), expected.get(key)
        if isinstance(one, Hash) and isinstance(other, Hash) and one.expires == other.expires:
            names = sorted(one.fields.keys() | other.fields.keys())
            pairs = [(f"{key} {n}", one.fields.get(n), other.fields.get(n)) for n in names]
        else:
            pairs = [(key, one, other)]
        lines += [f"  {name}: {a!r}, {b!r}" for name, a, b in pairs if a != b]
    return "\n".join(lines)
