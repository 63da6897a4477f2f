"""A registry, two gateways, trainers and samplers as processes; what dies is started again.

They are forked from a server process that has imported everything once, because a start of its own
would cost each five seconds of torch. What they run is the services' own main functions.
"""

import asyncio
import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import redis.asyncio as redis
from tests.cluster.planted import plant

from luthier_core import failpoints, keys
from luthier_core.auth import key_hmac
from luthier_core.blobs import open_blobs
from luthier_core.config import (
    Config,
    GatewayConfig,
    ModelConfig,
    SamplerConfig,
    TrainerConfig,
    dump_config,
)
from luthier_core.oplog import Oplog
from luthier_core.records import ApiKeyRecord

TENANT, API_KEY = "ann", "tml-key-of-ann"
BASE_MODEL = "toy/base"
NUM_GATEWAYS = 2
WORKERS = ("trainer", "sampler")
POLL_HOLD_S = 1.0
LEASE_S, LEASE_RENEW_S = 1.0, 0.25
CLAIM_IDLE_S = 2.0
START_S, STOP_S = 60.0, 20.0

TOY_MODEL = ModelConfig(name=BASE_MODEL, path="toy")
SHORT_LEASES = TrainerConfig(lease_s=LEASE_S, lease_renew_s=LEASE_RENEW_S)

_FORKS = multiprocessing.get_context("forkserver")
PROGRAMS = ["luthier_gateway.__main__", "luthier_registry.__main__", "tests.cluster.trainer"]
"""What the fork server imports."""
_FORKS.set_forkserver_preload(["pytest", *PROGRAMS])


def preload(*programs: str) -> None:
    """Have the fork server import these too; before the first process is started."""
    _FORKS.set_forkserver_preload(["pytest", *PROGRAMS, *programs])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a cluster is made of."""

    trainer: str = "tests.cluster.trainer"
    """Module whose `main` is run."""
    num_trainers: int = 3
    sampler: str = ""
    """Likewise; empty: no sampler."""
    model: ModelConfig = TOY_MODEL
    settings: TrainerConfig = SHORT_LEASES
    store_url: str = ""
    """Empty: a folder."""
    environ: Mapping[str, str] = field(default_factory=dict)
    bug: str = ""
    """One of planted.BUGS, planted in every process."""


def serve(
    role: str, program: str, argv: Sequence[str], folder: str, stdin: Connection, plan: Plan
) -> None:
    """What a forked process does: become the service, with the failpoints of its kind on."""
    os.dup2(stdin.fileno(), 0)  # its end stops a service, however the test ends
    sys.stdin = os.fdopen(0)
    name = argv[argv.index("--name") + 1]
    with (Path(folder) / f"{name}.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(plan.environ)
    if plan.bug:
        plant(plan.bug)
    failpoints.turn_on(Path(folder) / role)
    sys.exit(importlib.import_module(program).main(argv))


class Ended(Exception):
    """A process has ended by itself; with its last words."""


class Part:
    """One process, kept running until `stop`."""

    def __init__(
        self, name: str, role: str, program: str, folder: Path, config: Path, plan: Plan
    ) -> None:
        self.name, self.role = name, role
        argv = ["--config", str(config), "--name", name]
        if role in WORKERS:
            argv += ["--model", plan.model.name]
        self._arguments = (role, program, argv, str(folder))
        self._plan = plan
        self._process: Any = None
        self.pid = 0
        self._stdin: Connection | None = None
        self.num_killed = 0

    def start(self) -> None:
        reader, self._stdin = _FORKS.Pipe(duplex=False)
        arguments = (*self._arguments, reader, self._plan)
        self._process = _FORKS.Process(target=serve, args=arguments, name=self.name)
        self._process.start()
        self.pid = self._process.pid
        reader.close()

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def wait(self) -> int:
        """Returns once the process has ended; its exit code."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        self._process.join()
        return int(self._process.exitcode)

    def reap(self) -> None:
        """Forget the process that has ended."""
        assert self._stdin is not None
        self._stdin.close()
        self._process.close()

    async def stop(self) -> None:
        """The end of its standard input; SIGKILL if it takes long."""
        assert self._stdin is not None
        self.send(signal.SIGCONT)
        self._stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await self.wait()
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.wait()
        self.reap()


class Cluster:
    """All parts and what they share."""

    def __init__(self, folder: Path, redis_url: str, client: redis.Redis, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.redis = client
        self.config = Config(
            redis_url=redis_url,
            store_url=plan.store_url or f"file://{folder}/objects",
            registry_url=f"unix://{folder}/registry.sock",
            secret_file=str(folder / "secret"),
            models=(plan.model,),
            trainer=plan.settings,
            sampler=SamplerConfig(
                lease_s=plan.settings.lease_s,
                lease_renew_s=plan.settings.lease_renew_s,
                claim_idle_s=CLAIM_IDLE_S,
            ),
            s3_access_key=plan.environ.get("AWS_ACCESS_KEY_ID", ""),
            s3_secret_key=plan.environ.get("AWS_SECRET_ACCESS_KEY", ""),
        )
        (folder / "secret").write_text(os.urandom(32).hex())
        for role in ("registry", "gateway", "trainer", "sampler"):
            (folder / role).mkdir()
        self.urls: list[str] = []
        self.on_death: Callable[[Part], Awaitable[None]] | None = None
        """Called when a part was killed, before anybody can take its place."""
        self.registry = self._part("registry", "registry", "luthier_registry.__main__")
        self.gateways = [self._gateway(f"gateway-{i}") for i in range(NUM_GATEWAYS)]
        self.trainers = [
            self._part(f"trainer-{i}", "trainer", plan.trainer) for i in range(plan.num_trainers)
        ]
        self.samplers = [self._part("sampler-0", "sampler", plan.sampler)] if plan.sampler else []

    @property
    def parts(self) -> list[Part]:
        return [self.registry, *self.gateways, *self.trainers, *self.samplers]

    async def keep(self, part: Part) -> None:
        """Start a part again whenever it is killed, as the supervisor of `luthier up` does.

        Ended if it ends otherwise.
        """
        while True:
            if (code := await part.wait()) != -signal.SIGKILL:
                words = (self.folder / f"{part.name}.log").read_text()[-3000:]
                raise Ended(f"{part.name} ended with exit code {code}:\n{words}")
            part.reap()
            part.num_killed += 1
            if self.on_death is not None:
                await self.on_death(part)
            if part.role in WORKERS:
                # Whoever reaps a worker deletes its lease: take-over need not wait for its end.
                await self.redis.delete(keys.worker_lease(part.name))
            part.start()

    async def describe(self, run_id: str) -> str:
        """Where a run is, and what the trainers last said of it."""
        oplog = Oplog(self.redis)
        live = run_id in await oplog.live_runs(self.plan.model.name)
        lines = [f"{await oplog.header(run_id)}, {'' if live else 'not '}listed as live"]
        for part in self.trainers:
            log = (self.folder / f"{part.name}.log").read_text().splitlines()
            lines += [line[:500] for line in log if run_id in line][-4:]
        return "\n".join(lines)

    async def store_key(self) -> None:
        async with open_blobs(self.config) as blobs:
            record = ApiKeyRecord(tenant=TENANT, created_at=datetime.now(UTC))
            name = keys.api_key_record(key_hmac(self.config.secret(), API_KEY))
            await blobs.put(name, record.to_bytes())

    async def wait_ready(self) -> None:
        """Returns once every gateway answers and every trainer has a lease; TimeoutError."""
        async with asyncio.timeout(START_S), aiohttp.ClientSession() as http:
            for url in self.urls:
                while not await _answers(http, f"{url}/readyz"):
                    await asyncio.sleep(0.05)
            oplog = Oplog(self.redis)
            workers = {part.name for part in self.parts if part.role in WORKERS}
            while not workers <= {
                name
                for name, lease in (await oplog.live_workers()).items()
                if lease["state"] == "ready"
            }:
                await asyncio.sleep(0.05)

    def _gateway(self, name: str) -> Part:
        gateway = GatewayConfig(port=_free_port(), poll_hold_s=POLL_HOLD_S, recheck_s=0.5)
        self.urls.append(f"http://127.0.0.1:{gateway.port}")
        return self._part(name, "gateway", "luthier_gateway.__main__", gateway)

    def _part(
        self, name: str, role: str, program: str, gateway: GatewayConfig | None = None
    ) -> Part:
        path = self.folder / f"{name}.toml"
        path.write_text(dump_config(replace(self.config, gateway=gateway or GatewayConfig())))
        return Part(name, role, program, self.folder, path, self.plan)


@contextlib.asynccontextmanager
async def running_cluster(
    folder: Path, redis_url: str, client: redis.Redis, plan: Plan
) -> AsyncIterator[Cluster]:
    """All parts, ready; none of them runs after the block. `folder` must have a short path."""
    cluster = Cluster(folder, redis_url, client, plan)
    await cluster.store_key()
    for part in cluster.parts:
        part.start()
    async with asyncio.TaskGroup() as keepers:
        tasks = [keepers.create_task(cluster.keep(part)) for part in cluster.parts]
        try:
            await cluster.wait_ready()
            yield cluster
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(part.stop() for part in reversed(cluster.parts)))


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
