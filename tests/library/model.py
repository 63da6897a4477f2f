"""The function library in plain Python: what oplog.lua must answer and hold, without a server.

`Model` has the methods of `luthier_core.oplog.Oplog` that touch runs and sampling jobs, with the
same arguments and answers but without `await`; it is also the in-memory Redis of the simulation.
What the library keeps as counters (pending bytes) is computed here from what they count.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Self

from luthier_core.config import LimitsConfig
from luthier_core.oplog import READ_AHEAD, Admission, Attempt, Completion, Recorded, RunHeader
from luthier_core.ops import Gradient, Op, Outcome, SamplingJob, clone_of

NUM_DIGEST_CHARS = 32
NO_RUN = Admission("NORUN", "")


@dataclass(slots=True)
class Run:
    """All that Redis holds of one run but its outcomes, which expire on their own."""

    tenant: str
    fields: Mapping[str, str]
    """What its creation stored: base model and facts."""
    status: str = "active"
    epoch: int = 0
    owner: str = ""
    admitted: int = -1
    committed: int = -1
    told: int = -1
    gap_since: int = 0
    """ms; 0: no gap"""
    lost: int = -1
    """A seq that a client has asked for in vain."""
    trimmed: int = -1
    published: tuple[int, int, str] = (-1, -1, "")
    """epoch, seq, key"""
    expires: bool = False
    log: dict[int, Op] = field(default_factory=dict)
    parked: dict[int, Op] = field(default_factory=dict)
    admissions: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    """seq -> digest, payload bytes and time in ms, from its admission until it is trimmed."""
    failed: set[int] = field(default_factory=set)
    digests: dict[int, str] = field(default_factory=dict)
    """seq -> that of the state after it"""
    halvings: dict[int, int] = field(default_factory=dict)
    """seq -> how often its micro-batch is halved"""
    untold: set[int] = field(default_factory=set)
    """Seqs whose gradient is missing, and the client does not know."""
    attempts: dict[int, tuple[int, int]] = field(default_factory=dict)
    """seq -> how many, and the epoch of the last."""
    deaths: dict[int, int] = field(default_factory=dict)
    blamed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """seq -> the attempt whose death was counted last."""

    @property
    def pending_bytes(self) -> int:
        return sum(size for seq, (_, size, _) in self.admissions.items() if seq > self.committed)

    @property
    def parked_bytes(self) -> int:
        return sum(self.admissions[seq][1] for seq in self.parked)

    def copy(self) -> Self:
        names = (
            "log",
            "parked",
            "admissions",
            "failed",
            "digests",
            "halvings",
            "untold",
            "attempts",
            "deaths",
            "blamed",
        )
        return replace(self, **{name: getattr(self, name).copy() for name in names})

    def knows(self, seq: int, digest: str) -> str:
        known = self.admissions.get(seq)
        same = known is None or known[0] == digest[:NUM_DIGEST_CHARS]
        return "DUP" if same else "MISMATCH"

    def drain(self) -> None:
        while op := self.parked.pop(self.admitted + 1, None):
            self.admitted = op.seq
            self.log[op.seq] = op

    def note_gap(self, now_ms: int, *, filled: bool) -> None:
        if not self.parked:
            self.gap_since, self.lost = 0, -1
        elif filled or not self.gap_since:
            self.gap_since = now_ms

    def move_cursor(self, seq: int) -> None:
        self.committed = seq
        for per_seq in (self.attempts, self.deaths, self.blamed):
            for old in [s for s in per_seq if s <= seq]:
                del per_seq[old]

    def note_attempt(self, seq: int, epoch: int) -> Attempt:
        number, last = self.attempts.get(seq, (0, -1))
        if last != epoch:
            self.attempts[seq] = number + 1, epoch
        return Attempt("OK", self.attempts[seq][0], self.deaths.get(seq, 0))


@dataclass(slots=True)
class JobQueue:
    """The stream and group of one base model: entry id -> fields, and who claimed what."""

    jobs: dict[int, Mapping[bytes, bytes]] = field(default_factory=dict)
    claims: dict[int, str] = field(default_factory=dict)
    last_claimed: int = 0

    def copy(self) -> Self:
        return replace(self, jobs=self.jobs.copy(), claims=self.claims.copy())


@dataclass(slots=True)
class Model:
    runs: dict[str, Run] = field(default_factory=dict)
    outcomes: dict[tuple[str, int], Outcome] = field(default_factory=dict)
    samplers: dict[str, Mapping[str, str]] = field(default_factory=dict)
    """sampling session -> header"""
    samples: dict[tuple[str, str], Mapping[str, str | bytes]] = field(default_factory=dict)
    """(sampling session, seq) -> `request` digest, state, `entry`, `at` and outcome fields"""
    num_completed: dict[tuple[str, int], int] = field(default_factory=dict)
    """(sampling session, clone) -> samples of it that have ended"""
    completed: dict[tuple[str, int], dict[int, Completion]] = field(default_factory=dict)
    """Their list: position -> completion, from its end until the client has read so far."""
    queues: dict[str, JobQueue] = field(default_factory=dict)
    entry_ids: Iterator[int] = field(default_factory=lambda: count(1))
    """Like the server's clock, which gives stream ids, this does not roll back."""
    clock: Callable[[], float] = lambda: 0.0
    """Seconds."""

    def copy(self) -> Self:
        """A state to roll back to: assign it, or go on with it. Both share the entry ids."""
        return replace(
            self,
            runs={run_id: run.copy() for run_id, run in self.runs.items()},
            outcomes=self.outcomes.copy(),
            samplers=self.samplers.copy(),
            samples=self.samples.copy(),
            num_completed=self.num_completed.copy(),
            completed={name: entries.copy() for name, entries in self.completed.items()},
            queues={name: queue.copy() for name, queue in self.queues.items()},
        )

    # --- admission --------------------------------------------------------------------------------

    def admit(
        self,
        op: Op,
        *,
        tenant: str,
        limits: LimitsConfig,
        header: Mapping[str, str] | None = None,
    ) -> Admission:
        run = self.runs.get(op.run_id)
        if run is None:
            if op.seq != 0 or not header:
                return NO_RUN
            run = self.runs[op.run_id] = Run(tenant, dict(header))
        if run.tenant != tenant:
            return NO_RUN
        return Admission(self._admit(run, op, limits), run.owner)

    def _admit(self, run: Run, op: Op, limits: LimitsConfig) -> str:
        seq, size = op.seq, op.body.num_bytes
        if seq <= run.admitted or seq in run.parked:
            return run.knows(seq, op.digest)
        if run.status != "active":
            return "DEAD"
        if seq > run.admitted + limits.max_seq_ahead:
            return "FAR"
        over_bytes = run.pending_bytes + size > limits.max_pending_bytes
        over_ops = seq - run.committed > limits.max_pending_ops
        executable = run.admitted > run.committed
        is_next = seq == run.admitted + 1
        if (over_bytes or over_ops) and executable and not (is_next and run.parked):
            return "BUSY"
        over_parked = run.parked_bytes + size > limits.max_parked_bytes
        if not is_next and over_parked and op.kind != "rejected":
            return "FULL"
        run.admissions[seq] = (op.digest[:NUM_DIGEST_CHARS], size, self._now_ms())
        run.parked[seq] = replace(op, told=run.told, admitted_ms=self._now_ms())
        run.drain()
        run.note_gap(self._now_ms(), filled=is_next)
        return "OK"

    def reject_run(
        self, run_id: str, *, tenant: str, digest: str, header: Mapping[str, str], outcome: Outcome
    ) -> str:
        if run := self.runs.get(run_id):
            return run.knows(0, digest) if run.tenant == tenant else "NORUN"
        run = Run(tenant, dict(header), status="failed", admitted=0, committed=0, expires=True)
        run.admissions[0] = (digest[:NUM_DIGEST_CHARS], 0, 0)
        run.failed.add(0)
        self.runs[run_id] = run
        self.outcomes[run_id, 0] = outcome
        return "OK"

    # --- ownership and execution ------------------------------------------------------------------

    def acquire(self, run_id: str, epoch: int, owner: str) -> tuple[int, int] | None:
        run = self.runs.get(run_id)
        if run is None or (epoch <= run.epoch and (epoch, owner) != (run.epoch, run.owner)):
            return None
        run.epoch, run.owner = epoch, owner
        return run.admitted, run.committed

    def release(self, run_id: str, epoch: int) -> bool:
        run = self._held(run_id, epoch)
        if run is None or run.admitted > run.committed:
            return False
        run.owner = ""
        return True

    def begin(self, run_id: str, epoch: int, seq: int) -> Attempt:
        run = self._held(run_id, epoch)
        refused = _refuse_step(run, seq)
        return Attempt(refused) if run is None or refused else run.note_attempt(seq, epoch)

    def commit(
        self,
        run_id: str,
        epoch: int,
        seq: int,
        outcome: Outcome,
        *,
        gradient: Gradient = Gradient.KEPT,
        digest: str = "",
        begin_next: bool = False,
    ) -> Attempt:
        run = self._held(run_id, epoch)
        refused = _refuse_step(run, seq)
        if run is None or refused:
            return Attempt(refused)
        self._store(run_id, run, seq, outcome)
        self._note_gradient(run, seq, gradient)
        if digest:
            run.digests[seq] = digest
        if begin_next and seq < run.admitted:
            return run.note_attempt(seq + 1, epoch)
        return Attempt("OK")

    def blame(self, run_id: str, epoch: int, seq: int) -> int:
        run = self._held(run_id, epoch)
        if run is None:
            return -1
        if seq != run.committed + 1 or seq not in run.attempts:
            return -2
        if run.blamed.get(seq) != run.attempts[seq]:  # one death an attempt, however often told
            run.blamed[seq] = run.attempts[seq]
            run.deaths[seq] = run.deaths.get(seq, 0) + 1
        return run.deaths[seq]

    def halve(self, run_id: str, epoch: int, seq: int, halvings: int) -> str:
        run = self._held(run_id, epoch)
        if run is None:
            return "FENCED"
        if not run.committed < seq <= run.admitted:
            return "ORDER"
        run.halvings[seq] = halvings
        return "OK"

    def lost(self, run_id: str, seq: int) -> None:
        run = self.runs.get(run_id)
        if run is not None and seq > run.admitted and seq not in run.parked:
            run.lost = seq

    def told(self, run_id: str, seq: int) -> None:
        run = self.runs.get(run_id)
        if run is not None and seq in run.untold:
            run.untold.remove(seq)
            run.told = max(run.told, min(run.untold, default=run.committed + 1) - 1)

    # --- snapshots and the end of a run -----------------------------------------------------------

    def trim(self, run_id: str, epoch: int, seq: int) -> str:
        run = self._held(run_id, epoch)
        if run is None:
            return "FENCED"
        if seq > run.committed:
            return "ORDER"
        for per_seq in (run.log, run.admissions, run.digests, run.halvings):
            for old in [s for s in per_seq if s <= seq]:
                del per_seq[old]
        run.failed = {s for s in run.failed if s > seq}
        run.trimmed = max(run.trimmed, seq)
        return "OK"

    def ffwd(self, run_id: str, epoch: int, seq: int) -> str:
        run = self._held(run_id, epoch)
        if run is None:
            return "FENCED"
        if seq <= run.committed:
            return "ALREADY"
        run.move_cursor(seq)
        if seq > run.admitted:
            run.parked = {s: op for s, op in run.parked.items() if s > seq}
            run.admitted = seq
            run.drain()
            run.note_gap(run.gap_since, filled=False)
        return "OK"

    def publish(self, run_id: str, epoch: int, seq: int, key: str) -> str:
        run = self._held(run_id, epoch)
        if run is None:
            return "FENCED"
        if (epoch, seq) <= run.published[:2]:
            return "STALE"
        run.published = (epoch, seq, key)
        return "OK"

    def fail_range(self, run_id: str, epoch: int, seqs: range, outcome: Outcome) -> str:
        run = self._held(run_id, epoch)
        if run is None:
            return "FENCED"
        if seqs.stop - 1 <= run.committed:
            return "ALREADY"
        if seqs.start != run.committed + 1 or run.admitted > run.committed:
            return "ORDER"
        if any(seq >= seqs.stop for seq in run.parked):
            return "ORDER"
        for seq in seqs:
            run.parked.pop(seq, None)
            self._store(run_id, run, seq, outcome)
        run.admitted = run.committed
        run.note_gap(run.gap_since, filled=False)
        run.status = "failed"
        return "OK"

    # --- reading ----------------------------------------------------------------------------------

    def header(self, run_id: str) -> RunHeader | None:
        run = self.runs.get(run_id)
        if run is None:
            return None
        return RunHeader(
            tenant=run.tenant,
            base_model=run.fields["base_model"],
            facts=json.loads(run.fields["facts"]),
            status=run.status,
            epoch=run.epoch,
            owner=run.owner,
            admitted=run.admitted,
            committed=run.committed,
            told=run.told,
            gap_since=run.gap_since,
            lost=run.lost,
        )

    def headers(self, run_ids: Sequence[str]) -> dict[str, RunHeader]:
        found = {run_id: self.header(run_id) for run_id in run_ids}
        return {run_id: header for run_id, header in found.items() if header}

    def admitted_at(self, run_id: str, seq: int) -> int | None:
        known = self.runs[run_id].admissions.get(seq) if run_id in self.runs else None
        return known[2] if known else None

    def is_parked(self, run_id: str, seq: int) -> bool:
        return run_id in self.runs and seq in self.runs[run_id].parked

    def recorded(self, run_id: str) -> Recorded:
        run = self.runs.get(run_id)
        if run is None:
            return Recorded()
        return Recorded(frozenset(run.failed), dict(run.digests), dict(run.halvings))

    def read_log(self, cursors: Mapping[str, int]) -> dict[str, list[Op]]:
        found = {}
        for run_id, cursor in cursors.items():
            log = self.runs[run_id].log if run_id in self.runs else {}
            found[run_id] = [log[seq] for seq in sorted(log) if seq >= cursor][:READ_AHEAD]
        return {run_id: ops for run_id, ops in found.items() if ops}

    def training_outcome(self, run_id: str, seq: int) -> Outcome | None:
        return self.outcomes.get((run_id, seq))

    # --- sampling jobs ----------------------------------------------------------------------------

    def enqueue(
        self,
        *,
        tenant: str,
        base_model: str,
        sampling_session_id: str,
        seq: str,
        digest: str,
        job: Mapping[str, str | bytes],
        max_jobs: int,
        header: Mapping[str, str],
    ) -> str:
        known = self.samplers.setdefault(sampling_session_id, {**header, "tenant": tenant})
        if known["tenant"] != tenant:
            return "NOSESSION"
        request = digest[:NUM_DIGEST_CHARS]
        if sample := self.samples.get((sampling_session_id, seq)):
            return "DUP" if sample["request"] == request else "MISMATCH"
        if next(iter(job)) == "state":
            self.samples[sampling_session_id, seq] = {"request": request, **job}
            self._list(sampling_session_id, seq, "failed", str(job["size"]))
            return "OK"
        queue = self.queues.setdefault(base_model, JobQueue())
        if len(queue.jobs) >= max_jobs:
            return "BUSY"
        entry_id = next(self.entry_ids)
        queue.jobs[entry_id] = _encoded({"seq": seq, "clone": str(clone_of(seq)), **job})
        self.samples[sampling_session_id, seq] = {
            "request": request,
            "state": "queued",
            "entry": str(entry_id),
            "at": str(self._now_ms()),
        }
        return "OK"

    def claim(
        self, base_model: str, consumer: str, *, max_jobs: int, block_ms: int | None = None
    ) -> list[SamplingJob]:
        queue = self.queues.setdefault(base_model, JobQueue())
        new = [entry_id for entry_id in queue.jobs if entry_id > queue.last_claimed][:max_jobs]
        queue.claims.update(dict.fromkeys(new, consumer))
        queue.last_claimed = max(new, default=queue.last_claimed)
        return [_job(entry_id, queue.jobs[entry_id]) for entry_id in new]

    def claim_own(self, base_model: str, consumer: str) -> list[SamplingJob]:
        queue = self.queues.setdefault(base_model, JobQueue())
        claimed = sorted(queue.claims.items())
        return [_job(i, queue.jobs[i]) for i, holder in claimed if holder == consumer]

    def settle(self, job: SamplingJob, base_model: str, outcome: Outcome) -> str:
        self._take_off(base_model, entry_number(job))
        stored = self._store_sample(job.sampling_session_id, job.seq, outcome)
        return "OK" if stored else "ALREADY"

    def cancel(self, sampling_session_id: str, seq: str, base_model: str, outcome: Outcome) -> str:
        sample = self.samples.get((sampling_session_id, seq), {})
        if not self._store_sample(sampling_session_id, seq, outcome):
            return "ALREADY"
        self._take_off(base_model, int(sample["entry"]))
        return "OK"

    def completions(
        self, sampling_session_id: str, clone: int, *, after: int, max_entries: int = 1000
    ) -> list[Completion]:
        entries = self.completed.get((sampling_session_id, clone), {})
        return [entry for at, entry in sorted(entries.items()) if at > after][:max_entries]

    def acknowledge(
        self, sampling_session_id: str, clone: int, *, to: int, seqs: Sequence[str]
    ) -> None:
        entries = self.completed.get((sampling_session_id, clone), {})
        for position in [position for position in entries if position <= to]:
            del entries[position]

    def _take_off(self, base_model: str, entry_id: int) -> None:
        queue = self.queues.setdefault(base_model, JobQueue())
        queue.jobs.pop(entry_id, None)
        queue.claims.pop(entry_id, None)

    def _store_sample(self, session: str, seq: str, outcome: Outcome) -> bool:
        sample = self.samples.get((session, seq))
        if sample is None or sample["state"] != "queued":
            return False
        self.samples[session, seq] = {**sample, **outcome.fields()}
        state = "finished" if outcome.state == "completed" else "failed"
        self._list(session, seq, state, str(outcome.body.num_bytes))
        return True

    def _list(self, session: str, seq: str, state: str, size: str) -> None:
        name = (session, clone_of(seq))
        position = self.num_completed[name] = self.num_completed.get(name, 0) + 1
        entry = Completion(position, f"{session}:{seq}", state, int(size))
        self.completed.setdefault(name, {})[position] = entry

    # --- shared -----------------------------------------------------------------------------------

    def _now_ms(self) -> int:
        return int(1000 * self.clock())

    def _held(self, run_id: str, epoch: int) -> Run | None:
        """The run, if this is the epoch it is held under."""
        run = self.runs.get(run_id)
        return run if run and run.epoch == epoch else None

    def _store(self, run_id: str, run: Run, seq: int, outcome: Outcome) -> None:
        self.outcomes[run_id, seq] = outcome
        if outcome.failed:
            run.failed.add(seq)
        run.move_cursor(seq)

    def _note_gradient(self, run: Run, seq: int, gradient: Gradient) -> None:
        if gradient is Gradient.CLEARED:
            run.untold.clear()
        elif gradient is Gradient.LOST:
            run.untold.add(seq)


def entry_number(job: SamplingJob) -> int:
    return int(job.entry_id.split(b"-")[0])


def _refuse_step(run: Run | None, seq: int) -> str:
    """Why seq is not the next op to execute; empty if it is."""
    if run is None:
        return "FENCED"
    if seq <= run.committed:
        return "ALREADY"
    return "" if seq == run.committed + 1 and seq <= run.admitted else "ORDER"


def _encoded(fields: Mapping[str, str | bytes]) -> dict[bytes, bytes]:
    return {
        name.encode(): value if isinstance(value, bytes) else value.encode()
        for name, value in fields.items()
    }


def _job(entry_id: int, fields: Mapping[bytes, bytes]) -> SamplingJob:
    return SamplingJob.from_entry(b"%d-0" % entry_id, fields)
