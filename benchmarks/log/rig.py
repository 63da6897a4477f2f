"""The service on one machine with toy trainers: Valkey, registry, gateways; no sampler."""

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import redis

from luthier_core import keys
from luthier_core.auth import key_hmac
from luthier_core.blobs import open_blobs
from luthier_core.config import Config, GatewayConfig, LimitsConfig, ModelConfig, dump_config
from luthier_core.records import NO_LIMITS, ApiKeyRecord, Limits
from luthier_core.testing import running_valkey

HERE = Path(__file__).parent
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Toy:
    """How one toy trainer works."""

    op_ms: float = 0.0
    begin: str = "shipped"
    """shipped | every | none: which ops are begun before they are executed."""


@dataclass(slots=True)
class Rig:
    """What is running."""

    config: Config
    urls: list[str]
    processes: dict[str, psutil.Process] = field(default_factory=dict)
    """valkey, registry, gateway-0, ..., trainer-0, ..."""

    @property
    def gateways(self) -> list[psutil.Process]:
        return [process for name, process in self.processes.items() if "gateway" in name]


def api_key(tenant: str) -> str:
    return f"tml-key-of-{tenant}"


def allow_many_files() -> None:
    """As many open files as this user may have: 2,000 long polls are 2,000 sockets at each end."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def running_rig(
    disk: Path,
    *,
    toys: Mapping[str, Toy],
    tenants: Sequence[str] = ("ann",),
    num_gateways: int = 2,
    limits: LimitsConfig | None = None,
    quotas: Mapping[str, Limits] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Rig]:
    """All parts, ready. Base model name -> its toy trainer; the append-only file lies on `disk`.

    `quotas`: tenant -> the limits of its key. `environ` is for the gateways (gateway_process.py).
    """
    allow_many_files()
    with (
        tempfile.TemporaryDirectory(prefix="lu-b-") as sockets,
        tempfile.TemporaryDirectory(prefix="lu-bench-", dir=disk) as data,
        running_valkey(fsync="always", disk=disk) as redis_url,
    ):
        folder = Path(data)
        config = _configure(folder, Path(sockets), redis_url, list(toys), limits or LimitsConfig())
        asyncio.run(_store_keys(config, tenants, quotas or {}))
        started: dict[str, subprocess.Popen[bytes]] = {}
        rig = Rig(config, [])
        try:
            started["registry"] = _start(folder, "registry", ["-m", "luthier_registry"])
            for index in range(num_gateways):
                own = replace(config, gateway=replace(config.gateway, port=_free_port()))
                name = f"gateway-{index}"
                (folder / f"{name}.toml").write_text(dump_config(own))
                started[name] = _start(folder, name, [str(HERE / "gateway_process.py")], environ)
                rig.urls.append(f"http://127.0.0.1:{own.gateway.port}")
            argv = [str(HERE / "toy_worker.py")]
            for index, (model, toy) in enumerate(toys.items()):
                argv += ["--toy", f"trainer-{index}", model, str(toy.op_ms), toy.begin]
            if toys:
                started["trainers"] = _start(folder, "trainers", argv)
            with redis.Redis.from_url(redis_url) as client:
                _wait_until_ready(client, rig, len(toys), folder)
                rig.processes["valkey"] = psutil.Process(int(client.info("server")["process_id"]))
                for name, lease in _leases(client).items():
                    rig.processes[name] = psutil.Process(lease["pid"])
            for name in ("registry", *(name for name in started if name.startswith("gateway"))):
                rig.processes[name] = psutil.Process(started[name].pid)
            yield rig
        finally:
            _stop(started)


def _configure(
    folder: Path, sockets: Path, redis_url: str, models: Sequence[str], limits: LimitsConfig
) -> Config:
    (folder / "secret").write_text(os.urandom(32).hex())
    config = Config(
        redis_url=redis_url,
        store_url=f"file://{folder}/objects",
        registry_url=f"unix://{sockets}/registry.sock",
        secret_file=str(folder / "secret"),
        models=tuple(ModelConfig(name=name, path=str(folder)) for name in models),
        gateway=GatewayConfig(),
        limits=limits,
    )
    (folder / "config.toml").write_text(dump_config(config))
    return config


async def _store_keys(config: Config, tenants: Sequence[str], quotas: Mapping[str, Limits]) -> None:
    async with open_blobs(config) as blobs:
        for tenant in tenants:
            limits = quotas.get(tenant, NO_LIMITS)
            record = ApiKeyRecord(tenant=tenant, created_at=datetime.now(UTC), limits=limits)
            name = keys.api_key_record(key_hmac(config.secret(), api_key(tenant)))
            await blobs.put(name, record.to_bytes())


def _start(
    folder: Path, name: str, argv: Sequence[str], environ: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """One service; the end of its standard input stops it, however this process ends."""
    own = folder / f"{name}.toml"
    config = own if own.exists() else folder / "config.toml"
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *argv, "--config", str(config), "--name", name],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environ or {})},
        )


def _stop(started: Mapping[str, subprocess.Popen[bytes]]) -> None:
    for process in started.values():
        assert process.stdin is not None
        process.stdin.close()
    for process in started.values():
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(client: redis.Redis, rig: Rig, num_trainers: int, folder: Path) -> None:
    """Returns once gateways, registry and trainers are; TimeoutError with their last words."""
    deadline = time.monotonic() + START_TIMEOUT_S
    socket_file = Path(rig.config.registry_url.removeprefix("unix://"))
    while time.monotonic() < deadline:
        if (
            socket_file.exists()
            and all(_answers(f"{url}/readyz") for url in rig.urls)
            and len(_leases(client)) == num_trainers
        ):
            return
        time.sleep(0.05)
    logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.log")}
    raise TimeoutError(f"the stack did not get ready: {logs}")


def _leases(client: redis.Redis) -> dict[str, Any]:
    """Worker -> its lease, of those that are ready."""
    names = sorted(name.decode() for name in client.smembers(keys.WORKERS))
    values = client.mget([keys.worker_lease(name) for name in names]) if names else []
    leases = {name: json.loads(value) for name, value in zip(names, values, strict=True) if value}
    return {name: lease for name, lease in leases.items() if lease["state"] == "ready"}


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
