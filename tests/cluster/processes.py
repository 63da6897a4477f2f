"""A registry, two gateways and three toy trainers as processes; what dies is started again.

They are forked from a server process that has imported everything once, because a start of its own
would cost each five seconds of torch. What they run is the services' own main functions.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import redis.asyncio as redis

from luthier_core import failpoints, keys
from luthier_core.auth import key_hmac
from luthier_core.blobs import open_blobs
from luthier_core.config import Config, GatewayConfig, ModelConfig, TrainerConfig, dump_config
from luthier_core.oplog import Oplog
from luthier_core.records import ApiKeyRecord

TENANT, API_KEY = "ann", "tml-key-of-ann"
BASE_MODEL = "toy/base"
NUM_GATEWAYS, NUM_TRAINERS = 2, 3
POLL_HOLD_S = 1.0
LEASE_S, LEASE_RENEW_S = 1.0, 0.25
START_S, STOP_S = 60.0, 20.0

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["pytest", "luthier_gateway.__main__", "luthier_registry.__main__", "tests.cluster.trainer"]
)


def serve(role: str, argv: Sequence[str], folder: str, stdin: Connection, library: str) -> None:
    """What a forked process does: become the service, with the failpoints of its kind on.

    `library`: the function library to load in place of the right one; empty for that.
    """
    os.dup2(stdin.fileno(), 0)  # its end stops a service, however the test ends
    sys.stdin = os.fdopen(0)
    name = argv[argv.index("--name") + 1]
    with (Path(folder) / f"{name}.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if library:
        _plant(library)
    if role != "registry":
        failpoints.turn_on(Path(folder) / role)
    sys.exit(_main_of(role)(argv))


def _main_of(role: str) -> Callable[[Sequence[str]], int]:
    if role == "trainer":
        from tests.cluster.trainer import main
    elif role == "gateway":
        from luthier_gateway.__main__ import main
    else:
        from luthier_registry.__main__ import main
    return main


def _plant(library: str) -> None:
    async def load_library(oplog: Oplog) -> None:
        await oplog.redis.function_load(library, replace=True)

    Oplog.load_library = load_library  # type: ignore[method-assign]


class Ended(Exception):
    """A process has ended by itself; with its last words."""


class Part:
    """One process, kept running until `stop`."""

    def __init__(self, name: str, role: str, folder: Path, config: Path, library: str) -> None:
        self.name, self.role = name, role
        self._arguments = (role, ["--config", str(config), "--name", name], str(folder))
        self._library = library
        self._process: Any = None
        self.pid = 0
        self._stdin: Connection | None = None
        self.num_killed = 0

    def start(self) -> None:
        reader, self._stdin = _FORKS.Pipe(duplex=False)
        arguments = (*self._arguments, reader, self._library)
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

    def __init__(self, folder: Path, redis_url: str, client: redis.Redis, library: str) -> None:
        self.folder = folder
        self.redis = client
        self.config = Config(
            redis_url=redis_url,
            store_url=f"file://{folder}/objects",
            registry_url=f"unix://{folder}/registry.sock",
            secret_file=str(folder / "secret"),
            models=(ModelConfig(name=BASE_MODEL, path="toy"),),
            trainer=TrainerConfig(lease_s=LEASE_S, lease_renew_s=LEASE_RENEW_S),
        )
        (folder / "secret").write_text(os.urandom(32).hex())
        for role in ("gateway", "trainer"):
            (folder / role).mkdir()
        self.urls: list[str] = []
        self.registry = self._part("registry", "registry", library)
        self.gateways = [self._gateway(f"gateway-{i}", library) for i in range(NUM_GATEWAYS)]
        self.trainers = [
            self._part(f"trainer-{i}", "trainer", library) for i in range(NUM_TRAINERS)
        ]

    @property
    def parts(self) -> list[Part]:
        return [self.registry, *self.gateways, *self.trainers]

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
            if part.role == "trainer":
                # Whoever reaps a worker deletes its lease: take-over need not wait for its end.
                await self.redis.delete(keys.worker_lease(part.name))
            part.start()

    async def describe(self, run_id: str) -> str:
        """Where a run is, and what the trainers last said of it."""
        oplog = Oplog(self.redis)
        live = run_id in await oplog.live_runs(BASE_MODEL)
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
            while len(await oplog.live_workers()) < NUM_TRAINERS:
                await asyncio.sleep(0.05)

    def _gateway(self, name: str, library: str) -> Part:
        gateway = GatewayConfig(port=_free_port(), poll_hold_s=POLL_HOLD_S, recheck_s=0.5)
        self.urls.append(f"http://127.0.0.1:{gateway.port}")
        return self._part(name, "gateway", library, gateway)

    def _part(
        self, name: str, role: str, library: str, gateway: GatewayConfig | None = None
    ) -> Part:
        path = self.folder / f"{name}.toml"
        path.write_text(dump_config(replace(self.config, gateway=gateway or GatewayConfig())))
        return Part(name, role, self.folder, path, library)


@contextlib.asynccontextmanager
async def running_cluster(
    folder: Path, redis_url: str, client: redis.Redis, *, library: str = ""
) -> AsyncIterator[Cluster]:
    """All parts, ready; none of them runs after the block. `folder` must have a short path."""
    cluster = Cluster(folder, redis_url, client, library)
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
