"""An overlay as processes on this machine: the manifests' commands, probes, drains and services.

Every pod has a loopback address of its own, so that ports are those of the manifests; a Service is
a small TCP proxy that knows which pods are ready, a headless one the address of its first pod.
What is not as in a cluster: paths are below a folder, names of services are addresses, MinIO is
moto, limits of memory and network do not hold.
"""

import asyncio
import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from tests.deploy.manifests import (
    ROOT,
    WORKLOADS,
    Container,
    Manifest,
    name_of,
    of_kind,
)

from luthier.up.access import register_keys
from luthier.up.options import ApiKey
from luthier_core.auth import new_api_key
from luthier_core.config import Config, load_config
from luthier_core.testing import valkey_binary

START_S, STOP_S = 300.0, 30.0
STORE = "minio"
"""The workload that moto stands in for."""


class Network:
    """Addresses for pods and services, 127.7.0.0/16, and what names stand for."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._offset = os.getpid() % 200
        self.services: dict[str, str] = {}

    def address(self) -> str:
        return f"127.{7 + self._offset // 250}.{self._offset}.{next(self._numbers)}"


class Service:
    """A Service: connections go to any pod that is ready."""

    def __init__(self, manifest: Manifest, address: str) -> None:
        (port,) = manifest["spec"]["ports"]
        self.name, self.port = name_of(manifest), int(port["port"])
        self.selector: dict[str, str] = manifest["spec"]["selector"]
        self.target: str = port["targetPort"]
        self.address = address
        self.is_headless = manifest["spec"].get("clusterIP") == "None"
        self.endpoints: dict[str, tuple[str, int]] = {}
        """Pod -> where it listens; ready ones only."""
        self._server: asyncio.Server | None = None

    def selects(self, workload: Manifest) -> bool:
        labels = workload["spec"]["template"]["metadata"]["labels"]
        return bool(self.selector.items() <= labels.items())

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connect, self.address, self.port)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if not self.endpoints:
                return
            host, port = random.choice(list(self.endpoints.values()))
            to_reader, to_writer = await asyncio.open_connection(host, port)
            await asyncio.gather(_pump(reader, to_writer), _pump(to_reader, writer))
        except OSError:
            pass
        finally:
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


class Pod:
    """One pod of a workload, from start to stop."""

    def __init__(self, cluster: "Cluster", workload: Manifest, name: str, address: str) -> None:
        self.cluster, self.workload, self.name, self.address = cluster, workload, name, address
        self.is_ready = False
        self.was_killed = False
        """It did not end within its grace period."""
        self.failed_liveness = 0
        self.process: asyncio.subprocess.Process | None = None
        self._probing: asyncio.Task[None] | None = None

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.workload["spec"]["template"]["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.workload["spec"]["template"]["metadata"]["labels"]
        return labels

    @property
    def main(self) -> Container:
        return Container(self.cluster.overlay, self.workload, self.spec["containers"][0], False)

    async def start(self) -> None:
        """Returns when the pod is ready; the output of the part is in its log."""
        for spec in self.spec.get("initContainers", []):
            init = Container(self.cluster.overlay, self.workload, spec, is_init=True)
            process = await self._run(init, f"{self.name}.{spec['name']}.log")
            code = await asyncio.wait_for(process.wait(), START_S)
            assert code == 0, self.cluster.log(f"{self.name}.{spec['name']}.log")
        self.process = await self._run(self.main, f"{self.name}.log")
        await self._started()
        await self._until_ready()
        self._probing = asyncio.create_task(self._probe_for_ever())

    async def stop(self) -> None:
        """As the kubelet does: out of the services, preStop, SIGTERM, grace, SIGKILL."""
        assert self.process is not None
        if self._probing is not None:
            self._probing.cancel()
        self._become(ready=False)
        hook = self.main.spec.get("lifecycle", {}).get("preStop")
        if hook:
            done = await asyncio.create_subprocess_exec(*hook["exec"]["command"])
            assert await done.wait() == 0
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(self.spec["terminationGracePeriodSeconds"]):
                await self.process.wait()
        except TimeoutError:
            self.was_killed = True
            self.process.kill()
            await self.process.wait()

    def port(self, name: str | int) -> int:
        if isinstance(name, int):
            return name
        (port,) = (p["containerPort"] for p in self.main.spec["ports"] if p["name"] == name)
        return int(port)

    async def probe(self, kind: str) -> bool:
        """One probe: startup, readiness or liveness. True where there is none."""
        probe = self.main.spec.get(f"{kind}Probe")
        if probe is None:
            return True
        limit = aiohttp.ClientTimeout(total=probe.get("timeoutSeconds", 1))
        if "httpGet" in probe:
            url = f"http://{self.address}:{self.port(probe['httpGet']['port'])}"
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with (
                    aiohttp.ClientSession(timeout=limit) as http,
                    http.get(url + probe["httpGet"]["path"]) as answer,
                ):
                    return answer.status < 400
            return False
        if "tcpSocket" in probe:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(
                    self.address, self.port(probe["tcpSocket"]["port"])
                )
                writer.close()
                return True
            return False
        environ = self.cluster.environ(self.main, self)
        done = await asyncio.create_subprocess_exec(*probe["exec"]["command"], env=environ)
        return await done.wait() == 0

    async def _run(self, container: Container, log: str) -> asyncio.subprocess.Process:
        argv = container.argv(self.cluster.secrets, self.name)
        argv = [self.cluster.here(word, container, self) for word in argv]
        with (self.cluster.folder / log).open("ab") as file:
            return await asyncio.create_subprocess_exec(
                *argv,
                env=self.cluster.environ(container, self),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    async def _started(self) -> None:
        probe = self.main.spec.get("startupProbe", {})
        assert self.process is not None
        for _ in range(probe.get("failureThreshold", 3)):
            assert self.process.returncode is None, self.cluster.log(f"{self.name}.log")
            if await self.probe("startup"):
                return
            await asyncio.sleep(probe["periodSeconds"])
        raise TimeoutError(f"{self.name} did not start: {self.cluster.log(f'{self.name}.log')}")

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not await self.probe("readiness"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: {self.cluster.log(f'{self.name}.log')}")
            await asyncio.sleep(1)
        self._become(ready=True)

    async def _probe_for_ever(self) -> None:
        period = self.main.spec["readinessProbe"]["periodSeconds"]
        while True:
            await asyncio.sleep(period)
            self._become(ready=await self.probe("readiness"))
            self.failed_liveness += not await self.probe("liveness")

    def _become(self, *, ready: bool) -> None:
        self.is_ready = ready
        for service in self.cluster.services:
            if service.selects(self.workload):
                if ready:
                    service.endpoints[self.name] = self.address, self.port(service.target)
                else:
                    service.endpoints.pop(self.name, None)


class Cluster:
    """All pods of an overlay."""

    def __init__(self, overlay: str, folder: Path) -> None:
        self.overlay, self.folder = overlay, folder
        self.network = Network()
        self.pods: list[Pod] = []
        self.services: list[Service] = []
        made = folder / "secrets"
        subprocess.run([ROOT / "deploy" / "secrets.sh", made], check=True)
        self.secrets = {path.name: path.read_text().strip() for path in made.iterdir()}
        self._addresses: dict[str, str] = {}
        """Name of a service -> its address."""
        self._serial = itertools.count()
        tools = folder / "bin"
        tools.mkdir()
        (tools / "valkey-server").symlink_to(valkey_binary())
        cli = tools / "valkey-cli"
        cli.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.deploy.ping "$@"\n')
        cli.chmod(0o755)

    # --- what a node does -------------------------------------------------------------------------

    def log(self, name: str, num_chars: int = 4000) -> str:
        return (self.folder / name).read_text()[-num_chars:]

    def environ(self, container: Container, pod: Pod) -> dict[str, str]:
        """Its own variables, and what an image brings."""
        image = {
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HOME": str(self.folder),
            "POD_ADDRESS": pod.address,
        }
        return {**image, **container.variables(self.secrets, pod.name)}

    def here(self, word: str, container: Container, pod: Pod) -> str:
        """A word of a command with the paths and addresses of this machine."""
        word = word.replace("0.0.0.0:", f"{pod.address}:")
        mounts = sorted(container.spec.get("volumeMounts", []), key=lambda m: -len(m["mountPath"]))
        for mount in mounts:
            path = str(mount["mountPath"])
            if path in word and path != "/tmp":
                return word.replace(path, str(self._volume(mount, pod)))
        return word

    def _volume(self, mount: Manifest, pod: Pod) -> Path:
        """What is mounted, as files."""
        volumes = {v["name"]: v for v in pod.spec.get("volumes", [])}
        volume = volumes.get(mount["name"], {})
        if "secret" in volume:
            return self.folder / "secrets"
        if "configMap" in volume:
            return self._config_map(volume["configMap"]["name"], mount, pod)
        # Model weights are the same for all: built once.
        name = "models" if mount["name"] == "models" else f"{pod.name}.{mount['name']}"
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name

    def _config_map(self, name: str, mount: Manifest, pod: Pod) -> Path:
        (found,) = (i for i in of_kind(self.overlay, "ConfigMap") if name_of(i) == name)
        folder = self.folder / f"{pod.name}.{name}"
        folder.mkdir(exist_ok=True)
        for file, text in found["data"].items():
            (folder / file).write_text(self._localised(text, pod))
        return folder / mount["subPath"] if "subPath" in mount else folder

    def _localised(self, text: str, pod: Pod) -> str:
        for service, address in self._addresses.items():
            text = text.replace(f"//{service}:", f"//{address}:")
        text = text.replace("0.0.0.0", pod.address).replace("bind * -::*", f"bind {pod.address}")
        text = text.replace("/etc/luthier/secrets", str(self.folder / "secrets"))
        data = self.folder / f"{pod.name}.data"
        data.mkdir(exist_ok=True)
        text = text.replace("dir /data", f"dir {data}").replace("maxmemory 6gb", "maxmemory 512mb")
        return text.replace('"/models', f'"{self.folder / "models"}')

    # --- what a cluster does ----------------------------------------------------------------------

    async def start(self, replicas: dict[str, int] | None = None) -> None:
        """Every service, then every workload, those that keep state first."""
        for manifest in of_kind(self.overlay, "Service"):
            service = Service(manifest, self.network.address())
            self.services.append(service)
            self._addresses[service.name] = service.address
        (self.folder / "models").mkdir(exist_ok=True)
        for service in self.services:
            if not service.is_headless and service.name != STORE:
                await service.start()
        order = [STORE, "redis", "registry"]
        workloads = sorted(
            of_kind(self.overlay, *WORKLOADS),
            key=lambda w: order.index(name_of(w)) if name_of(w) in order else len(order),
        )
        for workload in workloads:
            if name_of(workload) == STORE:
                await self._start_store()
                continue
            for index in range((replicas or {}).get(name_of(workload), 1)):
                await self.start_pod(workload, index)

    async def start_pod(self, workload: Manifest, index: int, address: str = "") -> Pod:
        """A new pod; one of a StatefulSet has its number in its name, others a new name."""
        is_set = workload["kind"] == "StatefulSet"
        suffix = str(index) if is_set else f"{next(self._serial):04x}"
        name = f"{name_of(workload)}-{suffix}"
        pod = Pod(self, workload, name, address or self._new_address(workload, index))
        self.pods.append(pod)
        await pod.start()
        return pod

    def _new_address(self, workload: Manifest, index: int) -> str:
        for service in self.services:
            if service.is_headless and index == 0 and service.selects(workload):
                return service.address
        return self.network.address()

    def config(self) -> Config:
        """The deployment's configuration, with the addresses of this machine."""
        (pod,) = self.pods_of("registry")
        (path,) = self.folder.glob(f"{pod.name}.luthier-*/luthier.toml")
        return load_config(path, self.environ(pod.main, pod))

    @property
    def url(self) -> str:
        """Of the gateways' Service."""
        (service,) = (s for s in self.services if s.name == "gateway")
        return f"http://{service.address}:{service.port}"

    async def new_key(self, tenant: str) -> str:
        """An API key of a new tenant."""
        key, config = new_api_key(), self.config()
        await register_keys(config, config.secret(), [ApiKey(key, tenant)])
        return key

    def pods_of(self, workload: str) -> list[Pod]:
        return [pod for pod in self.pods if name_of(pod.workload) == workload]

    async def roll(self, workload: str) -> None:
        """A rollout: a Deployment starts the new before it ends the old, a set the other way."""
        for pod in self.pods_of(workload):
            strategy = pod.workload["spec"].get("strategy", {}).get("type")
            if strategy == "RollingUpdate":
                await self.start_pod(pod.workload, 0)
                await self._end(pod)
            else:
                await self._end(pod)
                index = int(pod.name.rpartition("-")[2], 16)
                await self.start_pod(pod.workload, index, pod.address)

    async def _end(self, pod: Pod) -> None:
        await pod.stop()
        self.pods.remove(pod)
        assert not pod.was_killed, f"{pod.name} did not drain: {self.log(f'{pod.name}.log')}"

    async def stop(self) -> None:
        for pod in self.pods:
            if pod._probing is not None:
                pod._probing.cancel()
            if pod.process is not None and pod.process.returncode is None:
                pod.process.terminate()
        for pod in self.pods:
            if pod.process is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_S):
                        await pod.process.wait()
                if pod.process.returncode is None:
                    pod.process.kill()
                    await pod.process.wait()
        for service in self.services:
            await service.stop()
        if hasattr(self, "_store"):
            self._store.terminate()
            await self._store.wait()

    async def _start_store(self) -> None:
        (service,) = (s for s in self.services if s.name == STORE)
        place = ("-H", service.address, "-p", str(service.port))
        with (self.folder / "store.log").open("ab") as log:
            self._store = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "moto.server", *place),
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(service.address, service.port)
                writer.close()
                break
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def running_cluster(
    overlay: str, folder: Path, replicas: dict[str, int] | None = None
) -> AsyncIterator[Cluster]:
    """An overlay, every pod ready."""
    cluster = Cluster(overlay, folder)
    try:
        await cluster.start(replicas)
        yield cluster
    finally:
        await cluster.stop()
