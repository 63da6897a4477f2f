"""A worker: it takes runs over by `protocol.take_over` and works on each with three coroutines.

An executor, up to `tenure.depth` ops ahead of a committer, and a snapshotter share one Tenure. What
the protocol yields is carried out here; own decisions are when to look, to copy and to let go.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.simulation.gateway import drive
from tests.simulation.oracle import Oracle
from tests.simulation.redis_server import LEASE_S, Redis, Sight
from tests.simulation.store import ObjectStore, head_key, manifest_key, snapshot_key
from tests.simulation.toy import State, body_fields
from tests.simulation.world import (
    LOST,
    Call,
    Coroutine,
    Process,
    Reconnected,
    Server,
    Signal,
    Sleep,
    Task,
    Wait,
    World,
)

from luthier_core import protocol
from luthier_core.oplog import RunHeader
from luthier_core.ops import INLINE_LIMIT, Body, Kind, Op, Outcome
from luthier_core.owner import Action, FoldState, Step, changes_state
from luthier_core.protocol import Executed, Left, SnapshotRef, Steps, Tenure

SWEEP_S = 1.0
GAP_S = 600.0
"""Longer than any client of a history tries."""
SAVES = (Kind.SAVE_WEIGHTS, Kind.SAVE_WEIGHTS_FOR_SAMPLER)


@dataclass(frozen=True)
class Rules:
    """The protocol's generators and the supervisor's one rule: what a planted bug may replace."""

    take_over: Callable[..., Steps[Tenure | None]] = protocol.take_over
    execute_next: Callable[..., Steps[tuple[Step, Executed] | None]] = protocol.execute_next
    commit_next: Callable[..., Steps[None]] = protocol.commit_next
    store_snapshot: Callable[..., Steps[None]] = protocol.store_snapshot
    recheck: Callable[..., Steps[None]] = protocol.recheck
    blames: bool = True


@dataclass(slots=True, eq=False)
class Held:
    """One run in one worker's hands, from its take-over on."""

    run_id: str
    generation: int
    """Of Redis, when the connection was made on which this run is worked."""
    tenure: Tenure | None = None
    state: State = field(default_factory=State)
    executed: deque[tuple[Step, Executed]] = field(default_factory=deque)
    copied: tuple[int, State, FoldState] | None = None
    """A copy of the state that waits for its seq's commit: seq, state, and what goes with it."""
    num_ops_since_copy: int = 0
    idle_since: float = 0.0
    sight: RunHeader | None = None
    last_parked: int = -1
    news: Signal = field(default_factory=Signal)
    room: Signal = field(default_factory=Signal)
    work: Signal = field(default_factory=Signal)
    tasks: list[Task] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Worker:
    world: World
    process: Process
    supervisor: Process
    redis: Redis
    store: ObjectStore
    store_server: Server
    oracle: Oracle
    rules: Rules
    snapshot_every: int
    """Ops between two copies of a run's state."""
    execute_s: float
    held: dict[str, Held] = field(default_factory=dict)
    name: str = ""
    num_starts: int = 0

    def start(self) -> None:
        """A new incarnation."""
        self.num_starts += 1
        self.name = f"{self.process.name}/{self.num_starts}"
        self.held = {}
        self.world.spawn(self.process, self._keep_lease())
        self.world.spawn(self.process, self._sweep())

    def hint(self, run_id: str) -> None:
        if (held := self.held.get(run_id)) is not None:
            self.world.notify(held.news)

    # --- lease, sweep -----------------------------------------------------------------------------

    def _keep_lease(self) -> Coroutine[None]:
        while True:
            yield from self.call("renew", self.name)
            yield Sleep(LEASE_S / 3)

    def _sweep(self) -> Coroutine[None]:
        while True:
            # Compare with what was so when the question was put, not when the answer came.
            asked = {run_id: held.tenure for run_id, held in self.held.items()}
            committed = {run_id: t.committed for run_id, t in asked.items() if t is not None}
            sight: Sight = yield from self.call("look", list(self.held))
            for run_id, header in sight.headers.items():
                if run_id in self.held:
                    self._compare(run_id, header, sight, asked.get(run_id), committed)
                else:
                    yield from self._consider(run_id, header, sight)
            yield Sleep(SWEEP_S * (0.5 + self.world.rng.random()))

    def _compare(
        self,
        run_id: str,
        header: RunHeader,
        sight: Sight,
        tenure: Tenure | None,
        committed: dict[str, int],
    ) -> None:
        held = self.held[run_id]
        if tenure is None or held.tenure is not tenure:
            return
        if header.epoch != tenure.epoch or header.committed < committed[run_id]:
            self._let_go(held, "the header says so")
            return
        held.sight, held.last_parked = header, sight.last_parked[run_id]
        self.world.notify(held.news)

    def _consider(self, run_id: str, header: RunHeader, sight: Sight) -> Coroutine[None]:
        if header.owner and header.owner != self.name and header.owner in sight.live:
            return
        if header.pending or self._gap_is_old(header):
            yield Sleep(self.world.rng.random())
            if run_id not in self.held:
                self._adopt(run_id)
        elif header.status == "active" and header.gap_since:
            return  # it stays listed: somebody has to give the gap up
        elif not header.owner or (yield from self.call("release", run_id, header.epoch)):
            yield from self.call("retire", run_id)

    def _gap_is_old(self, header: RunHeader) -> bool:
        # The clock that stamps gaps begins at 1: at 0 there is none.
        return protocol.gap_is_overdue(
            header, self.world.now + 1, session_has_ended=False, timeout_s=GAP_S
        )

    # --- holding a run ----------------------------------------------------------------------------

    def _adopt(self, run_id: str) -> None:
        held = self.held[run_id] = Held(run_id, self.redis.server.generation)
        held.tasks.append(self.world.spawn(self.process, self._guarded(held, self._begin(held))))

    def _begin(self, held: Held) -> Coroutine[None]:
        tenure = yield from self.drive(held, self.rules.take_over(held.run_id, self.name))
        if tenure is None:
            raise Left("another worker was first")
        held.tenure = tenure
        self.world.seen["taken over"] += 1
        held.idle_since = self.world.now
        for loop in (self._execute, self._commit, self._snapshot):
            held.tasks.append(
                self.world.spawn(self.process, self._guarded(held, loop(held, tenure)))
            )

    def _guarded(self, held: Held, steps: Coroutine[None]) -> Coroutine[None]:
        try:
            yield from steps
        except Left as reason:
            self._let_go(held, str(reason))

    def _let_go(self, held: Held, reason: str) -> None:
        if self.held.get(held.run_id) is not held:
            return
        self.world.note(f"{self.name} LEAVES {held.run_id}: {reason}")
        self.world.seen["left"] += 1
        del self.held[held.run_id]
        for task in held.tasks:
            self.world.cancel(task)

    def _execute(self, held: Held, tenure: Tenure) -> Coroutine[None]:
        owner = tenure.owner
        while True:
            if len(held.executed) >= tenure.depth:
                yield Wait(held.room, 5.0)
                continue
            if not owner.num_queued:
                log = yield from self._redis(held, "read_log", {held.run_id: owner.cursor})
                protocol.feed(tenure, log.get(held.run_id, []))
            if not owner.num_queued:
                yield from self._idle(held, tenure)
                continue
            held.idle_since = self.world.now
            ended = yield from self.drive(held, self.rules.execute_next(tenure))
            assert ended is not None
            step, executed = ended
            self.world.seen["executed" if step.publish else "replayed"] += 1
            if step.publish:
                held.executed.append((step, executed))
                self.world.notify(held.work)
            yield from self._copy(held, tenure, step)

    def _copy(self, held: Held, tenure: Tenure, step: Step) -> Coroutine[None]:
        held.num_ops_since_copy += 1
        due = held.num_ops_since_copy >= self.snapshot_every and held.copied is None
        # Mostly at an optimizer step's end; a drain would copy in the midst of a gradient.
        boundary = step.op.kind is Kind.OPTIM_STEP or self.world.chance(0.1)
        if due and boundary and step.publish:
            copy = yield from self._perform(held, protocol.CopyState(held.run_id))
            held.copied = (step.op.seq, copy, tenure.owner.state)
            held.num_ops_since_copy = 0
            self.world.notify(held.work)

    def _idle(self, held: Held, tenure: Tenure) -> Coroutine[None]:
        header = held.sight
        done = not held.executed and held.copied is None
        if done and header is not None and header.committed == tenure.committed:
            if self._gap_is_old(header):
                steps = protocol.give_up_gap(tenure, held.last_parked)
                yield from self.drive(held, steps)
                raise Left("the gap was given up")
            if self.world.now - held.idle_since > 20 and not header.gap_since:
                if (yield from self._redis(held, "release", held.run_id, tenure.epoch)):
                    yield from self.call("retire", held.run_id)
                    raise Left("released")
                held.idle_since = self.world.now
        yield Wait(held.news, SWEEP_S)

    def _commit(self, held: Held, tenure: Tenure) -> Coroutine[None]:
        while True:
            if not held.executed:
                yield Wait(held.work, 5.0)
                continue
            step, executed = held.executed[0]
            yield from self.drive(held, self.rules.commit_next(tenure, step, executed))
            held.executed.popleft()
            self.world.notify(held.room)

    def _snapshot(self, held: Held, tenure: Tenure) -> Coroutine[None]:
        while True:
            if held.copied is None or held.copied[0] > tenure.committed:
                yield Wait(held.work, 1.0)
                continue
            seq, copy, state = held.copied
            yield from self.drive(held, self.rules.store_snapshot(tenure, seq, copy, state))
            held.copied = None
            self.world.seen["snapshot"] += 1

    # --- what the protocol yields -----------------------------------------------------------------

    def drive(self, held: Held, steps: Steps[Any]) -> Coroutine[Any]:
        return drive(steps, partial(self._perform, held))

    def _perform(self, held: Held, effect: Any) -> Coroutine[Any]:
        match effect:
            case protocol.ReadHead(run_id):
                return (yield from self._store("read_head", head_key(run_id)))
            case protocol.CasHead(run_id, head, etag):
                return (yield from self._store("swap", head_key(run_id), head, etag))
            case protocol.Acquire(run_id, epoch, owner):
                return (yield from self._redis(held, "acquire", run_id, epoch, owner))
            case protocol.Restore(run_id, ref):
                return (yield from self._restore(held, ref))
            case protocol.FastForward(run_id, epoch, seq):
                return (yield from self._redis(held, "ffwd", run_id, epoch, seq))
            case protocol.ReadRecorded(run_id):
                return (yield from self._redis(held, "recorded", run_id))
            case protocol.Begin(run_id, epoch, seq):
                return (yield from self._redis(held, "begin", run_id, epoch, seq))
            case protocol.Execute(step):
                return (yield from self._run(held, step))
            case protocol.Finish(step, rest):
                return (yield from self._finish(held, step, rest))
            case protocol.Commit(run_id, epoch, seq, outcome, gradient, digest):
                args = (run_id, epoch, seq, outcome, gradient, digest)
                return (yield from self._redis(held, "commit", *args))
            case protocol.CopyState():
                return held.state
            case protocol.PutSnapshot(run_id, ref, copy, state):
                key = snapshot_key(run_id, ref.seq, ref.epoch)
                return (yield from self._store("put", key, (copy, state)))
            case protocol.Trim(run_id, epoch, seq):
                return (yield from self._redis(held, "trim", run_id, epoch, seq))
            case protocol.FailRange(run_id, epoch, seqs, outcome):
                return (yield from self._redis(held, "fail_range", run_id, epoch, seqs, outcome))
        raise TypeError(effect)

    def _restore(self, held: Held, ref: SnapshotRef | None) -> Coroutine[Any]:
        if ref is None:
            held.state = State()
            return FoldState()
        stored = yield from self._store("get", snapshot_key(held.run_id, ref.seq, ref.epoch))
        if stored is None:
            return None
        held.state, state = stored
        return state

    def _run(self, held: Held, step: Step) -> Coroutine[Executed]:
        op = step.op
        if step.action is Action.CLEAR_GRADIENT:
            held.state = held.state.without_gradient()
            return Executed()
        body = op.body.inline
        if body is None:
            body = yield from self._store("get", op.body.key)
            if body is None:
                raise AssertionError(f"the payload of {held.run_id}:{op.seq} is not stored")
        yield Sleep(self.execute_s * self.world.rng.random())
        fields = body_fields(body)
        self.oracle.executed(held.run_id, op.seq)
        if fields.ends == "kills":
            yield from self._die(held, op)
        if fields.ends == "fails":
            if op.kind is Kind.OPTIM_STEP:
                held.state = held.state.without_gradient()
            return Executed(Outcome.failure("the engine refuses it", "user"))
        held.state = held.state.applied(op.kind, op.digest)
        result = held.state.result(op.digest, large=fields.large_result)
        checksum = held.state.digest if changes_state(step) else ""
        return Executed(rest=(held.state, result), checksum=checksum)

    def _finish(self, held: Held, step: Step, rest: Any) -> Coroutine[Outcome]:
        assert held.tenure is not None
        (state, result), seq, epoch = rest, step.op.seq, held.tenure.epoch
        if step.op.kind in SAVES:
            path = f"runs/{held.run_id}/ckpt/{seq}-{epoch}"
            yield from self._store("put", path, state)
            made = (path, state.digest)
            manifest = manifest_key(held.run_id, seq)
            if not (yield from self._store("create", manifest, made)):
                made = yield from self._store("get", manifest)
            return Outcome.completed(Body.of(" ".join(made).encode()))
        if len(result) <= INLINE_LIMIT:
            return Outcome.completed(Body.of(result))
        key = f"runs/{held.run_id}/res/{seq}-{epoch}"
        yield from self._store("put", key, result)
        return Outcome.completed(Body.stored(key, result))

    # --- the engine's death -----------------------------------------------------------------------

    def _die(self, held: Held, op: Op) -> Coroutine[None]:
        """The engine takes its process with it; the supervisor knows what it was doing."""
        assert held.tenure is not None
        run = self.redis.model.runs.get(held.run_id)
        if run is not None and run.epoch == held.tenure.epoch and self.supervisor.alive:
            self.oracle.died(held.run_id, op.seq)
        self.world.counts["engine death"] += 1
        if self.rules.blames and self.supervisor.alive:
            blame = self._supervise(self.name, held.run_id, held.tenure.epoch, op.seq)
            self.world.spawn(self.supervisor, blame)
        self.world.crash(self.process, down_s=1 + 2 * self.world.rng.random())
        yield Sleep(0)

    def killed(self, down_s: float) -> None:
        """The process alone dies, of nothing an op did: its supervisor drops the lease."""
        if self.process.alive and self.supervisor.alive:
            self.world.spawn(self.supervisor, self.call("drop_lease", self.name))
        self.world.crash(self.process, down_s=down_s)

    def _supervise(self, name: str, run_id: str, epoch: int, seq: int) -> Coroutine[None]:
        yield from self.call("blame", run_id, epoch, seq)
        yield from self.call("drop_lease", name)

    # --- requests, repeated until they are answered -----------------------------------------------

    def call(self, name: str, *args: Any) -> Coroutine[Any]:
        """A request that does not rest on owning a run."""
        while True:
            answer = yield self.redis.call(name, *args)
            if answer is not LOST:
                return answer
            yield Sleep(self.world.rng.random())

    def _redis(self, held: Held, name: str, *args: Any) -> Coroutine[Any]:
        while True:
            answer = yield self.redis.call(name, *args, generation=held.generation)
            if isinstance(answer, Reconnected):
                yield from self._reconnect(held, answer.generation)
            elif answer is not LOST:
                return answer
            else:
                yield Sleep(self.world.rng.random())

    def _reconnect(self, held: Held, generation: int) -> Coroutine[None]:
        """Redis was away and may have gone back: only HEAD says who owns the run (1.5)."""
        yield from self.drive(held, self.rules.recheck(held.run_id, held.tenure))
        held.generation = generation

    def _store(self, name: str, *args: Any) -> Coroutine[Any]:
        do = getattr(self.store, name)
        while True:
            answer = yield Call(self.store_server, lambda: do(*args))
            if answer is not LOST:
                return answer
            yield Sleep(self.world.rng.random())
