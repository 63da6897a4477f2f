"""One long-lived stack that many programs are played on: its parts, and how to hurt them."""

import asyncio
import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from minio import Minio
from tests.chaos.ways import StoreProxy, balanced
from tests.cluster.faults import Fault, Injector
from tests.cluster.history import History, watching
from tests.cluster.processes import TENANT, Cluster, Part, Plan, running_cluster

from luthier_core import keys
from luthier_core.blobs import Blobs, open_blobs
from luthier_core.oplog import Oplog, connect
from luthier_core.protocol import Head
from luthier_core.testing import ValkeyServer, valkey_server

log = logging.getLogger(__name__)

S3_ENVIRON = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
FIRE_S = 90.0
BUCKET = "luthier"
HEAD_LOOK_S = 0.03
MIB = 1024 * 1024
DISK_BYTES = 256 * MIB


@dataclass(slots=True)
class Stack:
    """What the scenarios of a session have to do with."""

    cluster: Cluster
    history: History
    valkey: ValkeyServer
    oplog: Oplog
    blobs: Blobs
    url: str
    rng: random.Random
    store: StoreProxy | None
    disks: dict[str, Path]
    """Small ones: of the "objects", and of "redis"."""
    faults: list[str] = field(default_factory=list)
    """What has been done to it so far."""
    num_rollbacks: int = 0
    playing: dict[str, int] = field(default_factory=dict)
    """Runs under way -> the highest epoch that their HEAD has had."""
    violations: list[str] = field(default_factory=list)
    injectors: dict[str, Injector] = field(default_factory=dict)
    damages: bool = False
    """Whoever dies at a snapshot's compare-and-swap leaves the newest snapshots damaged."""

    def __post_init__(self) -> None:
        cluster = self.cluster
        for parts in ([cluster.registry], cluster.gateways, cluster.trainers, cluster.samplers):
            if parts:
                rng = random.Random(self.rng.random())
                injector = Injector(cluster, parts, self.history, rng)
                injector.fire_s = FIRE_S
                self.injectors[parts[0].role] = injector
        cluster.on_death = self._damage

    def note(self, fault: str) -> None:
        self.faults.append(fault)
        log.info("%d: %s", len(self.faults), fault)

    @property
    def counted(self) -> Counter[str]:
        return Counter(self.faults)

    async def order(self, role: str, fault: Fault) -> None:
        """Have a failpoint do something; returns once what it has hurt works again."""
        before = Counter(self.injectors[role].done)
        await self.injectors[role].carry_out_one(fault)
        for what, number in (self.injectors[role].done - before).items():
            if what == fault.action:
                self.note(f"{what} {fault.point}")
            else:
                for _ in range(number):
                    self.note(what)

    async def kill(self, part: Part) -> None:
        """SIGKILL; returns once another process has taken its place."""
        pid = part.pid
        part.send(signal.SIGKILL)
        self.note(f"kill9 {part.role}")
        async with asyncio.timeout(FIRE_S):
            while part.pid == pid:
                await asyncio.sleep(0.01)

    async def kill_engine(self, part: Part) -> None:
        """SIGKILL to the engine child of a trainer, which itself lives on.

        Nothing while it starts: then it would end too, and be started again by who started it.
        """
        lease = (await self.oplog.live_workers()).get(part.name)
        if lease is None or lease["state"] != "ready":
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(part.pid).children():
                child.kill()
                self.note("kill9 engine")

    async def freeze(self, part: Part, seconds: float) -> None:
        """SIGSTOP, and later SIGCONT: longer than its lease, if it is a worker."""
        part.send(signal.SIGSTOP)
        self.note(f"stop {part.role}")
        await asyncio.sleep(seconds)
        part.send(signal.SIGCONT)

    async def restart_redis(self, down_s: float) -> None:
        self.valkey.kill()
        self.note("redis killed")
        await asyncio.sleep(down_s)
        await asyncio.to_thread(self.valkey.start)

    async def roll_redis_back(self, back_s: float) -> None:
        """Redis loses what it has acknowledged in the last back_s."""
        with tempfile.TemporaryDirectory(prefix="lu-back-") as folder:
            self.valkey.copy_data(Path(folder))
            await asyncio.sleep(back_s)
            self.valkey.kill()
            self.num_rollbacks += 1
            self.note("redis rolled back")
            self.valkey.replace_data(Path(folder))
            await asyncio.to_thread(self.valkey.start)

    async def take_store_away(self, seconds: float) -> None:
        assert self.store is not None
        self.note("store away")
        self.store.is_down = True
        await asyncio.sleep(seconds)
        self.store.is_down = False

    async def slow_store_down(self, delay_s: float, seconds: float) -> None:
        assert self.store is not None
        self.note("store slow")
        self.store.delay_s = delay_s
        await asyncio.sleep(seconds)
        self.store.delay_s = 0.0

    def lose_answers(self, count: int) -> None:
        """The next writes are carried out by the store, and nobody is told."""
        assert self.store is not None
        self.note("store's answers lost")
        self.store.num_to_lose = count

    async def fill_disk_of_objects(self, seconds: float) -> None:
        self.note("disk full")
        with _filled(self.disks["objects"]):
            await asyncio.sleep(seconds)

    async def fill_disk_of_redis(self, seconds: float) -> None:
        """It ends at its next write, which it cannot sync, and is started when there is room."""
        self.note("redis' disk full")
        with _filled(self.disks["redis"]):
            async with asyncio.timeout(FIRE_S):
                while not self.valkey.has_ended:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(seconds)
        self.valkey.kill()  # its socket is still there
        await asyncio.to_thread(self.valkey.start)

    async def _damage(self, part: Part) -> None:
        if not self.damages or part.role != "trainer":
            return
        for run_id in list(self.playing):
            header = await self.oplog.header(run_id)
            if header is None or header.owner.partition("/")[0] != part.name:
                continue
            data = await self.blobs.get(keys.run_head(TENANT, run_id))
            if (snap := Head.from_bytes(data).snap) is not None:
                prefix = keys.snapshot_prefix(TENANT, run_id, snap.seq, snap.epoch)
                await self.blobs.put(f"{prefix}state.safetensors", b"not what was stored")
                self.note("newest snapshot damaged")

    async def watch_heads(self) -> None:
        """For ever: the epoch in a run's HEAD never goes back."""
        while True:
            for run_id, seen in list(self.playing.items()):
                with contextlib.suppress(Exception):  # not there yet, or the store is away
                    data = await self.blobs.get(keys.run_head(TENANT, run_id))
                    epoch = Head.from_bytes(data).epoch
                    if epoch < seen:
                        self.violations.append(f"{run_id}: HEAD went from epoch {seen} to {epoch}")
                    self.playing[run_id] = epoch
            await asyncio.sleep(HEAD_LOOK_S)


@contextlib.asynccontextmanager
async def running_stack(
    plan: Plan, rng: random.Random, *, s3: bool = False, small_disks: bool = False
) -> AsyncIterator[Stack]:
    """A stack that is ready; nothing of it runs after the block."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lu-ch-")))
        disks = {name: folder / name for name in ("objects", "redis") if small_disks}
        for disk in disks.values():
            stack.enter_context(_small_disk(disk))
        valkey = stack.enter_context(valkey_server(fsync="always", disk=disks.get("redis")))
        store = None
        if s3:
            store = StoreProxy(f"http://{await stack.enter_async_context(_s3_server())}")
            await stack.enter_async_context(store.running())
            url = f"s3+http://{store.url}/{BUCKET}"
            plan = replace(plan, store_url=url, environ=S3_ENVIRON)
        client = await stack.enter_async_context(connect(valkey.url))
        history = await stack.enter_async_context(watching(valkey.url))
        cluster = await stack.enter_async_context(running_cluster(folder, valkey.url, client, plan))
        blobs = await stack.enter_async_context(open_blobs(cluster.config))
        front = await stack.enter_async_context(balanced(cluster.urls))
        running = Stack(
            *(cluster, history, valkey, Oplog(client), blobs, front, rng), store=store, disks=disks
        )
        watching_heads = asyncio.create_task(running.watch_heads())
        stack.callback(watching_heads.cancel)
        yield running


@contextlib.asynccontextmanager
async def _s3_server() -> AsyncIterator[str]:
    """host:port of an S3 server, moto's, with an empty bucket; a process of its own."""
    process = subprocess.Popen(  # noqa: ASYNC220  (it starts at once, and is waited for below)
        [sys.executable, "-u", "-m", "tests.chaos.s3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        },
    )
    try:
        assert process.stdout is not None
        endpoint = (await asyncio.to_thread(process.stdout.readline)).decode().strip()
        minio = Minio(endpoint, "key", "secret", secure=False, region="us-east-1")
        await asyncio.to_thread(minio.make_bucket, BUCKET)
        yield endpoint
    finally:
        process.kill()
        process.communicate()


def may_mount() -> bool:
    """Whether a small disk can be had here: it takes root."""
    return os.geteuid() == 0 and sys.platform == "linux"


@contextlib.contextmanager
def _filled(disk: Path) -> Iterator[None]:
    """No byte is free there."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    subprocess.run(argv, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
