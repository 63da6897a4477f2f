"""One history: a small cluster, a client or two, the weather of the seed, and the verdict."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.library.model import Model
from tests.simulation.client import Client, program
from tests.simulation.faults import Faults, Weather
from tests.simulation.gateway import Gateway
from tests.simulation.oracle import Oracle, RunRecord
from tests.simulation.redis_server import Redis
from tests.simulation.store import ObjectStore
from tests.simulation.toy import State
from tests.simulation.worker import GAP_S, Held, Rules, Worker
from tests.simulation.world import Call, Coroutine, Process, Server, World

from luthier_core import protocol
from luthier_core.owner import Diverged

STUCK_S = 400.0
"""Virtual time after the last fault in which every accepted op has to end."""


@dataclass(frozen=True)
class Parts:
    """What a cluster is made of; a planted bug replaces one of them."""

    model: type[Model] = Model
    redis: type[Redis] = Redis
    store: type[ObjectStore] = ObjectStore
    rules: Rules = field(default_factory=Rules)
    submit: Callable[..., Any] = protocol.submit


@dataclass(slots=True)
class Verdict:
    seed: int
    violations: list[str]
    faults: Counter[str]
    rolled_back: bool
    seen: Counter[str]
    num_ops: int = 0
    num_executed: int = 0
    num_committed: int = 0
    virtual_s: float = 0.0
    trace: list[str] | None = None


def simulate(seed: int, parts: Parts | None = None, *, traced: bool = False) -> Verdict:
    """Play the history of this seed: the same each time, bit for bit."""
    history = _History(seed, parts or Parts(), traced=traced)
    history.play()
    return history.verdict()


class _History:
    def __init__(self, seed: int, parts: Parts, *, traced: bool) -> None:
        self.seed = seed
        self.world = world = World(seed, traced=traced)
        self.weather = Weather.draw(world.rng)
        self.oracle = Oracle()
        self.oracle.now = lambda: world.now
        model = parts.model()
        model.clock = lambda: world.now + 1
        server = Server("redis", 0.002, 2.0)
        self.redis = parts.redis(world, model, self.oracle, server, hint=self._hint)
        self.store = parts.store()
        self.store_server = Server("store", 0.02, 4.0)
        self.gateways = [self._gateway(i, parts) for i in range(2)]
        self.workers = [self._worker(i, parts.rules) for i in range(3)]
        self.clients = [self._client(i) for i in range(world.rng.choice((1, 1, 2)))]

    def play(self) -> None:
        world = self.world
        processes = [gateway.process for gateway in self.gateways]
        clients = [client.process for client in self.clients]
        faults = Faults(
            world,
            self.weather,
            self.redis,
            self.store,
            self.store_server,
            processes,
            self.workers,
            clients,
        )
        faults.start()
        for worker in self.workers:
            worker.start()
        for client in self.clients:
            client.start()
        patience = STUCK_S
        if self.weather.client_vanishes or self.weather.rollbacks:
            patience += GAP_S
        try:
            world.run(self.weather.until_s + patience, self._finished)
            self._judge()
        except (AssertionError, Diverged) as bug:
            self.oracle.expect(False, f"{type(bug).__name__}: {bug}")

    def verdict(self) -> Verdict:
        records = self.oracle.runs.values()
        return Verdict(
            self.seed,
            self.oracle.violations,
            self.world.counts,
            self.oracle.rolled_back,
            self.world.seen,
            num_ops=sum(len(record.accepted) for record in records),
            num_executed=sum(record.num_executed for record in records),
            num_committed=sum(len(record.committed) for record in records),
            virtual_s=self.world.now,
            trace=self.world.trace,
        )

    def _hint(self, run_id: str) -> None:
        if self.world.chance(0.8):
            for gateway in self.gateways:
                if signal := gateway.news.get(run_id):
                    self.world.notify(signal)
            for worker in self.workers:
                worker.hint(run_id)

    # --- the cluster ------------------------------------------------------------------------------

    def _gateway(self, index: int, parts: Parts) -> Gateway:
        process = Process(f"gateway-{index}")
        return Gateway(self.world, process, self.redis, self.store, self.store_server, parts.submit)

    def _worker(self, index: int, rules: Rules) -> Worker:
        process, supervisor = Process(f"worker-{index}"), Process(f"supervisor-{index}")
        worker = Worker(
            self.world,
            process,
            supervisor,
            self.redis,
            self.store,
            self.store_server,
            self.oracle,
            rules,
            snapshot_every=self.world.rng.choice((2, 4, 8)),
            execute_s=self.world.rng.choice((0.02, 0.2, 1.0)),
        )
        process.start = worker.start
        return worker

    def _client(self, index: int) -> Client:
        rng, run_id = self.world.rng, f"s:train:{index}"
        groups = program(rng, run_id)
        ops = {op.seq: op for group in groups for op in group}
        self.oracle.runs[run_id] = RunRecord(ops, may_give_up=self.weather.client_vanishes)
        return Client(
            self.world,
            Process(f"client-{index}"),
            self.gateways,
            self.oracle,
            run_id,
            groups,
            depth=rng.choice((1, 2, 4, 8)),
            in_turn=rng.random() < 0.5,
            duplicates=self.weather.duplicates,
        )

    # --- the end ----------------------------------------------------------------------------------

    def _finished(self) -> bool:
        """Every client has all its answers, or is gone and what it sent has ended."""
        if self.world.now < self.weather.until_s:
            return all(client.ended and not client.definite_error for client in self.clients)
        return all(self._is_over(client) for client in self.clients)

    def _is_over(self, client: Client) -> bool:
        run = self.redis.model.runs.get(client.run_id)
        if client.ended and not client.definite_error:
            return True
        gone = client.ended or not client.process.alive
        return gone and (run is None or (run.admitted == run.committed and not run.parked))

    def _judge(self) -> None:
        for client in self.clients:
            alive = client.process.alive
            self.oracle.expect(client.ended or not alive, f"{client.run_id}: the client waits")
            state = self._rebuilt(client.run_id)
            self.oracle.check_end(
                client.run_id, self.redis.model, self.store, state, client.definite_error
            )

    def _rebuilt(self, run_id: str) -> State | None:
        """The state that a take-over in peace rebuilds; None if Redis does not know the run."""
        if run_id not in self.redis.model.runs:
            return None
        worker = self._worker(9, Rules())
        worker.name = "auditor/1"
        held = Held(run_id, self.redis.server.generation)
        _at_once(_replay(worker, held))
        return held.state


def _replay(worker: Worker, held: Held) -> Coroutine[None]:
    tenure = yield from worker.drive(held, protocol.take_over(held.run_id, worker.name))
    assert tenure is not None, f"{held.run_id} cannot be taken over"
    held.tenure = tenure
    while True:
        log = yield from worker.call("read_log", {held.run_id: tenure.owner.cursor})
        tenure.owner.feed(log.get(held.run_id, []))
        if not tenure.owner.replaying:
            return
        while tenure.owner.replaying:
            yield from worker.drive(held, protocol.execute_next(tenure))


def _at_once(steps: Coroutine[None]) -> None:
    """Answer every request at once, without faults."""
    answer = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration:
            return
        answer = request.do() if isinstance(request, Call) else None
