"""What goes wrong in a history: its rates and its moments, drawn from the seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from tests.simulation.redis_server import Redis, Saved
from tests.simulation.store import ObjectStore
from tests.simulation.worker import Worker
from tests.simulation.world import Network, Process, Server, World


@dataclass(frozen=True, slots=True)
class Weather:
    """The faults of one history. Rates are per process and second until `until_s`."""

    until_s: float
    network: Network
    crashes: float
    freezes: float
    redis_restarts: float
    store_outages: float
    power_losses: float
    rollbacks: tuple[str, ...]
    """Redis goes back to just before an admit or an acquire, once each."""
    rots: bool
    client_vanishes: bool
    duplicates: float

    @classmethod
    def draw(cls, rng: Random) -> "Weather":
        def some(chance: float, most: float) -> float:
            return most * rng.random() if rng.random() < chance else 0.0

        num_rollbacks = rng.choice((1, 2, 4)) if rng.random() < 0.25 else 0
        rollbacks = tuple(rng.choice(("admit", "acquire")) for _ in range(num_rollbacks))
        lossy = some(0.7, 0.12)
        return cls(
            until_s=rng.choice((20.0, 40.0, 80.0)),
            network=Network(lossy, lossy, some(0.5, 0.04), some(0.5, 0.05)),
            crashes=some(0.8, 0.08),
            freezes=some(0.7, 0.06),
            redis_restarts=some(0.4, 0.08),
            store_outages=some(0.4, 0.06),
            power_losses=some(0.3, 0.08),
            rollbacks=rollbacks,
            # Not both: what a rollback lost, only the newest snapshot knows.
            rots=rng.random() < 0.25 and not rollbacks,
            client_vanishes=rng.random() < 0.08,
            duplicates=some(0.6, 0.3),
        )


@dataclass(slots=True)
class Faults:
    """Strikes a history with its weather."""

    world: World
    weather: Weather
    redis: Redis
    store: ObjectStore
    store_server: Server
    gateways: Sequence[Process]
    workers: Sequence[Worker]
    clients: Sequence[Process]
    rollbacks: list[str] = field(default_factory=list)
    """Those that are to come."""

    def start(self) -> None:
        world, weather = self.world, self.weather
        world.network = weather.network
        world.after(weather.until_s, self._clear_up)
        for process in self.gateways:
            self._often(weather.crashes, partial(self._crash, process))
            self._often(weather.freezes / 2, partial(self._freeze, process))
        for worker in self.workers:
            self._often(weather.crashes, partial(self._crash_worker, worker))
            self._often(weather.freezes, partial(self._freeze, worker.process))
        self._often(weather.redis_restarts, self._restart_redis)
        self._often(weather.store_outages, self._break_store)
        self._often(weather.power_losses, self._cut_power)
        self.rollbacks = list(weather.rollbacks)
        self.redis.before = self._before
        if weather.client_vanishes:
            client = world.rng.choice(self.clients)
            world.after(weather.until_s * world.rng.random(), self._vanish, client)

    def _often(self, rate: float, strike: Callable[[], None]) -> None:
        """Strike at random moments, `rate` times a second on average."""
        if rate <= 0:
            return

        def next_time() -> None:
            delay = self.world.rng.expovariate(rate)
            if self.world.now + delay < self.weather.until_s:
                self.world.after(delay, fire)

        def fire() -> None:
            strike()
            next_time()

        next_time()

    def _clear_up(self) -> None:
        self.world.note("FAULTS END")
        self.world.network = Network()

    def _crash(self, process: Process) -> None:
        self.world.counts["crash"] += 1
        self.world.crash(process, down_s=0.5 + 5 * self.world.rng.random())

    def _crash_worker(self, worker: Worker) -> None:
        """The node with its supervisor, or the process alone, whose lease the supervisor drops."""
        self.world.counts["crash"] += 1
        down_s = 0.5 + 10 * self.world.rng.random()
        if self.world.chance(0.5):
            self.world.crash(worker.supervisor, down_s=down_s)
            self.world.crash(worker.process, down_s=down_s)
        else:
            worker.killed(down_s)

    def _freeze(self, process: Process) -> None:
        self.world.counts["freeze"] += 1
        for_s = self.world.rng.choice((0.5, 5.0, 25.0, 60.0)) * self.world.rng.random()
        self.world.freeze(process, for_s=for_s)

    def _restart_redis(self) -> None:
        if self.redis.server.up:
            self.world.counts["redis kill -9"] += 1
            self.world.note("REDIS is killed")
            self.redis.stop(0.2 + 5 * self.world.rng.random())

    def _cut_power(self) -> None:
        if self.redis.server.up:
            self.world.counts["redis power loss"] += 1
            self.world.note("REDIS loses power")
            self.redis.lose_power(0.2 + 5 * self.world.rng.random())

    def _before(self, name: str, run_id: str) -> None:
        """Aim where it hurts: forget an epoch or an admission; damage what is restored next."""
        weather = self.weather
        if self.world.now > weather.until_s:
            return
        if weather.rots and name == "acquire" and self.world.chance(0.4):
            self.world.counts["snapshot rot"] += self.store.rot(run_id)
        chance = 0.3 if name == "acquire" else 0.05
        if name in self.rollbacks and self.world.chance(chance):
            self.rollbacks.remove(name)
            delay_s = self.world.rng.choice((0.1, 1.0, 10.0)) * self.world.rng.random()
            self.world.after(delay_s, self._go_back, self.redis.saved())

    def _go_back(self, saved: Saved) -> None:
        self.world.counts["redis rollback"] += 1
        self.world.note("REDIS goes back in time")
        self.redis.oracle.roll_back()
        self.redis.go_back_to(saved, 0.2 + 5 * self.world.rng.random())

    def _break_store(self) -> None:
        if self.store_server.up:
            self.world.counts["store outage"] += 1
            self.world.note("STORE is away")
            self.store_server.up = False
            self.world.after(0.5 + 10 * self.world.rng.random(), self._mend_store)

    def _mend_store(self) -> None:
        self.store_server.up = True

    def _vanish(self, client: Process) -> None:
        self.world.counts["client vanishes"] += 1
        self.world.crash(client, down_s=float("inf"))
