"""A trainer's worker whose engine child dies, hangs or has no memory: real processes, a real log.

`expected` is the same engine called directly, once per op that counts.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.unit.mortal_engine import MortalEngine, request
from tests.unit.test_engine_child import mortal_child
from tests.unit.trainer_client import LEARNING_RATE, MODEL, TENANT, Client

from luthier_core import keys
from luthier_core.config import TrainerConfig
from luthier_core.disk_blobs import DiskBlobs
from luthier_core.futures import Futures
from luthier_core.lifecycle import WorkerLease
from luthier_core.oplog import Oplog
from luthier_core.ops import Body, Kind
from luthier_core.protocol import MAX_DEATHS, PROBATION
from luthier_core.records import LoraConfig
from luthier_core.types import AdamParams
from luthier_trainer import engine_watch, worker
from luthier_trainer.effects import OUT_OF_MEMORY
from luthier_trainer.execution import Executor
from luthier_trainer.stored_snapshots import StoredSnapshots
from luthier_trainer.supervisor import ChildEngine
from luthier_trainer.worker import Worker

A, B = f"{'a' * 32}:train:0", f"{'b' * 32}:train:0"


@dataclass
class Rig:
    """One worker with an engine child, and a client of its runs."""

    client: Client
    oplog: Oplog
    folder: Path
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    engine: ChildEngine | None = None

    async def start(
        self,
        *,
        op_timeout_s: float = 60.0,
        snapshot_max_ops: int = 512,
        execution: str = "deterministic",
        **hello: Any,
    ) -> ChildEngine:
        """The engine of a worker that is at work from now on."""
        config = TrainerConfig(
            op_timeout_s=op_timeout_s, snapshot_max_ops=snapshot_max_ops, execution=execution
        )
        lease = WorkerLease(self.oplog, "t0", role="trainer", base_model=MODEL, lease_s=60)
        await lease.take()
        self.engine = engine = mortal_child(self.folder, op_timeout_s=op_timeout_s, **hello)
        await engine.start()
        blobs = self.client.blobs
        running = Worker(
            base_model=MODEL,
            config=config,
            lease=lease,
            oplog=self.oplog,
            blobs=blobs,
            executor=Executor(engine, blobs, self.oplog, fused=execution == "fused"),
            first_cycle=0,
            snapshots=StoredSnapshots(engine, blobs, config),
        )
        self.tasks.append(asyncio.create_task(running.run(self.stop)))
        return engine

    async def forward(self, run_id: str, data: bytes) -> int:
        return await self.client.send(run_id, Kind.FORWARD, Body.of(data))

    @property
    def num_starts(self) -> int:
        return len((self.folder / "starts").read_text().split())

    async def state(self, run_id: str) -> str:
        """What the engine's state of a run is; one that was left without work is taken over."""
        assert self.engine is not None
        await self.client.completed(run_id, await self.forward(run_id, request(0)))
        return await self.engine.checksum(run_id)


@pytest.fixture
async def rig(oplog: Oplog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(worker, "SWEEP_S", 0.02)
    monkeypatch.setattr(worker, "TAKE_OVER_PAUSE_S", 0.0)
    futures = Futures(oplog.redis, recheck_s=0.1)
    listening = asyncio.create_task(futures.listen())
    client = Client(oplog, futures, DiskBlobs(tmp_path / "objects", "http://gateway", b"secret"))
    own = Rig(client, oplog, tmp_path)
    try:
        yield own
    finally:
        for task in (listening, *own.tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if own.engine is not None:
            await own.engine.close()


def expected(folder: Path, *ops: bytes | None, halvings: int = 0) -> str:
    """The state after these ops: bytes are a forward_backward, None is an optimizer step."""
    engine = MortalEngine(folder)
    engine.create(A, LoraConfig(rank=2, seed=1))
    for op in ops:
        if op is None:
            engine.optim_step(A, AdamParams(learning_rate=LEARNING_RATE))
        else:
            engine.forward_backward(A, op, backward=True, clock_cycle=0, halvings=halvings)
    return engine.checksum(A)


@pytest.mark.parametrize("execution", ["deterministic", "fused"])
async def test_an_op_that_kills_its_engine_is_failed_at_the_third_time_and_all_others_go_on(
    rig: Rig, execution: str
):
    for run_id in (A, B):
        await rig.client.create(run_id)
        for n in range(PROBATION + 1):  # so that the poison is executed ahead of their commits
            await rig.client.forward_backward(run_id, request(n))
    poison = await rig.forward(A, request(9, "kill"))
    for run_id in (A, B):
        await rig.client.forward_backward(run_id, request(10))
        await rig.client.step(run_id)
    await rig.start(execution=execution)
    for run_id in (A, B):
        for seq in range(rig.client.next_seq[run_id]):
            if (run_id, seq) != (A, poison):
                await rig.client.completed(run_id, seq)
    category, message = await rig.client.failed(A, poison)
    assert category == "server"
    assert message == f"the operation was given up: the worker died {MAX_DEATHS} times while it ran"
    assert rig.num_starts == 1 + MAX_DEATHS
    if execution == "fused":  # with others at first, and alone ever since
        assert (rig.folder / "shared").read_text().count("kill") == 1
    undisturbed = expected(
        rig.folder, *(request(n) for n in range(PROBATION + 1)), request(10), None
    )
    assert [await rig.state(run_id) for run_id in (A, B)] == [undisturbed, undisturbed]


async def test_an_op_that_hangs_is_failed_at_the_third_time_and_its_run_goes_on(rig: Rig):
    await rig.start(op_timeout_s=0.3)
    await rig.client.create(A)
    for n in range(2):
        await rig.client.forward_backward(A, request(n))
        await rig.client.completed(A)
    seq = await rig.forward(A, request(2, "hang"))
    assert (await rig.client.failed(A, seq))[0] == "server"
    await rig.client.forward_backward(A, request(3))
    await rig.client.completed(A)
    assert rig.num_starts == 1 + MAX_DEATHS
    assert await rig.state(A) == expected(rig.folder, request(0), request(1), request(3))


async def test_a_run_whose_replay_kills_the_engine_is_given_up_and_disturbs_no_other(rig: Rig):
    engine = await rig.start()
    for run_id in (A, B):
        await rig.client.create(run_id)
        await rig.client.completed(run_id)
    await rig.client.forward_backward(A, request(1, "replay"))
    await rig.client.completed(A)
    os.kill(engine.pid, signal.SIGKILL)
    seq = await rig.client.step(A)
    await rig.client.forward_backward(B, request(1))
    assert await rig.client.failed(A, seq) == (
        "server",
        engine_watch.GIVEN_UP,
    )
    await rig.client.completed(B)
    assert rig.num_starts == 2 + MAX_DEATHS


@pytest.mark.parametrize(
    ("snapshot_max_ops", "execution", "num_children"),
    [(3, "deterministic", 12), (512, "deterministic", 12), (512, "fused", 6)],
)
async def test_a_child_that_is_killed_at_any_call_costs_nothing_but_time(
    rig: Rig, snapshot_max_ops: int, execution: str, num_children: int
):
    ops = [request(1), None, request(2), request(3), None]
    await rig.client.create(A)
    for op in ops:
        await (rig.client.step(A) if op is None else rig.client.forward_backward(A, op))
    saved = await rig.client.save(A, "x")
    await rig.start(
        do="die", until=num_children, snapshot_max_ops=snapshot_max_ops, execution=execution
    )
    for seq in range(rig.client.next_seq[A]):
        await rig.client.completed(A, seq)
    assert await rig.state(A) == expected(rig.folder, *ops)
    assert json.loads(await rig.client.completed(A, saved))["path"] == f"tinker://{A}/weights/x"
    assert rig.num_starts > MAX_DEATHS + 1


@pytest.mark.parametrize("execution", ["deterministic", "fused"])
async def test_an_op_that_needs_less_memory_is_replayed_as_it_was_executed(
    rig: Rig, execution: str
):
    engine = await rig.start(execution=execution)
    await rig.client.create(A)
    await rig.client.forward_backward(A, request(1, "memory", fits=2))
    await rig.client.completed(A)
    wanted = expected(rig.folder, request(1, "memory", fits=2), halvings=2)
    assert await rig.state(A) == wanted
    os.kill(engine.pid, signal.SIGKILL)
    await rig.forward(A, request(2))
    await rig.client.completed(A)
    assert rig.num_starts == 2
    assert await rig.state(A) == wanted
    assert (await rig.oplog.recorded(A)).halvings == {1: 2}


async def test_an_op_that_no_memory_is_enough_for_fails_and_leaves_the_state_alone(rig: Rig):
    await rig.start()
    await rig.client.create(A)
    await rig.client.forward_backward(A, request(1))
    seq = await rig.forward(A, request(2, "memory", fits=99))
    assert await rig.client.failed(A, seq) == ("server", OUT_OF_MEMORY)
    await rig.client.step(A)
    await rig.client.completed(A)
    assert await rig.state(A) == expected(rig.folder, request(1), None)
    assert (await rig.client.header(A)).epoch == 1
    assert rig.num_starts == 1


async def test_a_child_that_dies_idle_is_blamed_on_nobody(rig: Rig):
    engine = await rig.start()
    await rig.client.create(A)
    await rig.client.completed(A)
    for n in range(MAX_DEATHS + 1):
        os.kill(engine.pid, signal.SIGKILL)
        await rig.client.forward_backward(A, request(n))
        await rig.client.completed(A)
    assert await rig.state(A) == expected(rig.folder, *(request(n) for n in range(MAX_DEATHS + 1)))


async def test_a_drain_stores_every_run_and_ends_the_child(rig: Rig):
    engine = await rig.start()
    await rig.client.create(A)
    await rig.client.forward_backward(A, request(1))
    await rig.client.completed(A)
    rig.stop.set()
    await rig.tasks[0]
    prefix = f"{keys.run_prefix(TENANT, A)}snap/1-1/"
    stored = {info.key.removeprefix(prefix) async for info in rig.client.blobs.list(prefix)}
    assert stored == {"manifest.json", "state.safetensors"}
    pid = engine.pid
    await engine.close()
    assert not psutil.pid_exists(pid)


async def test_a_worker_whose_engine_does_not_start_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_watch, "START_PAUSES_S", (0.0, 0.0))
    engine = await rig.start()
    engine._hello.fields["do"] = "babble"
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(ExceptionGroup) as raised:
        await rig.tasks[0]
    assert "no frame" in str(raised.value.exceptions)
    rig.tasks.clear()
    assert rig.num_starts == 3
