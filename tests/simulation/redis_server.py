"""Redis as the simulation sees it: the model of the function library, leases, and power loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.library.model import Model
from tests.simulation.oracle import Oracle
from tests.simulation.world import Call, Server, World

from luthier_core.config import LimitsConfig
from luthier_core.oplog import Admission, RunHeader
from luthier_core.ops import Gradient, Op

LEASE_S = 15.0
TENANT = "ann"
HEADER = {"base_model": "m", "facts": "{}"}
LIMITS = LimitsConfig(
    max_pending_ops=7, max_pending_bytes=80_000, max_parked_bytes=40_000, max_seq_ahead=64
)
"""Small, so that most histories meet them."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What a worker's sweep reads in one pipelined call."""

    headers: Mapping[str, RunHeader]
    last_parked: Mapping[str, int]
    live: tuple[str, ...]


@dataclass(slots=True)
class Saved:
    """All that is on Redis's disk at one moment."""

    model: Model
    leases: dict[str, float]
    live_runs: set[str]


@dataclass(slots=True)
class Redis:
    """One server. Every method is one atomic step; the oracle hears of those that change a run."""

    world: World
    model: Model
    oracle: Oracle
    server: Server
    leases: dict[str, float] = field(default_factory=dict)
    live_runs: set[str] = field(default_factory=set)
    before: Callable[[str, str], None] = lambda name, run_id: None
    """Called ahead of each admit and acquire with the run: where trouble strikes best."""
    hint: Callable[[str], None] = lambda run_id: None
    """Called with the run of each admit and commit; hints may be lost."""

    def call(self, name: str, *args: Any, generation: int | None = None, **kwargs: Any) -> Call:
        """The request that calls a method of this class, or else of the model."""
        return Call(self.server, _Do(self, name, args, kwargs), generation)

    # --- what the oracle hears of -----------------------------------------------------------------

    def admit(self, op: Op) -> Admission:
        self.before("admit", op.run_id)
        header = HEADER if op.seq == 0 else None
        admission = self.model.admit(op, tenant=TENANT, limits=LIMITS, header=header)
        self.oracle.admit_answered(op, admission, self.model)
        self.world.seen[f"admit {admission.status}"] += 1
        self.hint(op.run_id)
        return admission

    def acquire(self, run_id: str, epoch: int, owner: str) -> tuple[int, int] | None:
        self.before("acquire", run_id)
        return self.model.acquire(run_id, epoch, owner)

    def begin(self, run_id: str, epoch: int, seq: int) -> Any:
        attempt = self.model.begin(run_id, epoch, seq)
        if attempt.status == "OK":
            self.oracle.begun(run_id, seq, epoch)
        return attempt

    def commit(
        self, run_id: str, epoch: int, seq: int, outcome: Any, gradient: Gradient, digest: str
    ) -> Any:
        attempt = self.model.commit(run_id, epoch, seq, outcome, gradient=gradient, digest=digest)
        if attempt.status == "OK":
            self.oracle.committed(run_id, range(seq, seq + 1), epoch, outcome, self.model)
            self.hint(run_id)
        return attempt

    def fail_range(self, run_id: str, epoch: int, seqs: range, outcome: Any) -> str:
        status = self.model.fail_range(run_id, epoch, seqs, outcome)
        if status == "OK":
            self.world.seen["gap given up"] += 1
            self.oracle.committed(run_id, seqs, epoch, outcome, self.model, given_up=True)
            self.hint(run_id)
        return status

    def ffwd(self, run_id: str, epoch: int, seq: int) -> str:
        status = self.model.ffwd(run_id, epoch, seq)
        self.world.seen["fast-forwarded"] += status == "OK"
        return status

    # --- leases and live runs ---------------------------------------------------------------------

    def renew(self, name: str) -> None:
        self.leases[name] = self.world.now + LEASE_S

    def drop_lease(self, name: str) -> None:
        self.leases.pop(name, None)

    def is_live(self, name: str) -> bool:
        return self.leases.get(name, 0) > self.world.now

    def announce(self, run_id: str) -> None:
        self.live_runs.add(run_id)
        self.hint(run_id)

    def retire(self, run_id: str) -> None:
        self.live_runs.discard(run_id)

    def look(self, run_ids: Sequence[str]) -> Sight:
        """Headers of live runs and of these, and which workers have a lease."""
        headers = self.model.headers(sorted(self.live_runs | set(run_ids)))
        parked = {run_id: max(self.model.runs[run_id].parked, default=-1) for run_id in headers}
        live = tuple(name for name, end in self.leases.items() if end > self.world.now)
        return Sight(headers, parked, live)

    # --- trouble ----------------------------------------------------------------------------------

    def saved(self) -> Saved:
        return Saved(self.model.copy(), self.leases.copy(), self.live_runs.copy())

    def stop(self, down_s: float) -> None:
        """kill -9 under fsync always: nothing is lost but connections and answers."""
        self.server.up = False
        self.server.generation += 1
        self.world.after(down_s, self._start)

    def go_back_to(self, saved: Saved, down_s: float) -> None:
        """A truncated AOF, an old volume, a failover: what came later is gone."""
        self.model = saved.model.copy()
        self.leases, self.live_runs = saved.leases.copy(), saved.live_runs.copy()
        self.stop(down_s)

    def lose_power(self, down_s: float) -> None:
        """As kill -9, and what no fsync has reached is gone: under fsync always nothing."""
        self.stop(down_s)

    def _start(self) -> None:
        self.server.up = True


class _Do:
    """A call that can be traced."""

    __slots__ = ("args", "kwargs", "name", "redis")

    def __init__(self, redis: Redis, name: str, args: tuple[Any, ...], kwargs: Any) -> None:
        self.redis, self.name, self.args, self.kwargs = redis, name, args, kwargs

    def __call__(self) -> Any:
        redis = self.redis
        target = redis if hasattr(type(redis), self.name) else redis.model
        return getattr(target, self.name)(*self.args, **self.kwargs)

    @property
    def label(self) -> str:
        return f"redis.{self.name}{self.args}"
