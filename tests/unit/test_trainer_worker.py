"""The trainer's worker over a real log, store and engine: takeover, replay, faults, and its limits.

`Reference` is the same engine called directly, once per op that counts: what a run's state must be.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny_qwen3 import save_tiny_qwen3
from tests.unit.trainer_client import FB, LEARNING_RATE, MODEL, TENANT, Client

from luthier_core import blobs as blobs_module
from luthier_core import keys
from luthier_core.checkpoints import read_files
from luthier_core.config import TrainerConfig
from luthier_core.disk_blobs import DiskBlobs
from luthier_core.errors import BadRequest, Unavailable
from luthier_core.futures import Futures
from luthier_core.lifecycle import WorkerLease
from luthier_core.listing import Listing
from luthier_core.moves import Moves
from luthier_core.oplog import READ_AHEAD, Oplog
from luthier_core.ops import Body, Kind
from luthier_core.owner import FoldState, Step
from luthier_core.proto import wire_pb2
from luthier_core.protocol import STATE_LOST, Head, SnapshotRef
from luthier_core.records import CheckpointRecord, RecoveryRecord
from luthier_model.base import load_base_model
from luthier_model.lora import LoraSpec
from luthier_trainer import worker
from luthier_trainer.adapters import RunState
from luthier_trainer.engine import Engine
from luthier_trainer.engine_client import ThreadEngine
from luthier_trainer.execution import MAX_DEVIATION, Executor, RunContext
from luthier_trainer.optim import AdamParams
from luthier_trainer.snapshots import Snapshots, Spent
from luthier_trainer.stored_snapshots import StoredSnapshots
from luthier_trainer.worker import Worker

VOCAB_SIZE = 31
A, B = f"{'a' * 32}:train:0", f"{'b' * 32}:train:0"


@pytest.fixture(scope="module")
def new_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    """Makes an engine on a model of its own: two workers share nothing but the log."""
    folder = save_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=5, vocab_size=VOCAB_SIZE)

    def make(device_runs: int = 64) -> Engine:
        return Engine(
            load_base_model(MODEL, folder),
            logprob_chunk_tokens=8,
            num_threads=1,
            device_runs=device_runs,
        )

    return make


def gradient(number: int, weight: float = 1.0) -> bytes:
    """A forward_backward; each number is another datum."""
    tokens = np.random.default_rng(number).integers(0, VOCAB_SIZE, 6)
    text = wire_pb2.EncodedTextChunk(tokens=tokens[:-1].astype("<i4").tobytes())
    inputs = {
        "target_tokens": wire_pb2.Tensor(
            dense=tokens[1:].astype("<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64
        ),
        "weights": wire_pb2.Tensor(
            dense=np.full(5, weight, "<f4").tobytes(), dtype=wire_pb2.DTYPE_FLOAT32
        ),
    }
    data = [wire_pb2.Datum(model_input=[wire_pb2.Chunk(encoded_text=text)], loss_fn_inputs=inputs)]
    message = wire_pb2.ForwardBackwardRequest(seq_id=1, loss_fn="cross_entropy", data=data)
    return message.SerializeToString()


NOT_FINITE = gradient(0, weight=3e38)


def reference(engine: Engine, run_id: str, *ops: bytes | None, seed: int = 1) -> str:
    """The digest after these ops: bytes are a forward_backward, None is an optimizer step."""
    engine.create(run_id, LoraSpec(rank=2, seed=seed))
    for op in ops:
        if op is None:
            engine.optim_step(run_id, AdamParams(learning_rate=LEARNING_RATE))
        else:
            engine.forward_backward(run_id, op, backward=True, clock_cycle=0)
    return engine.run_digest(run_id)


@dataclass
class Trainer:
    """One worker at work."""

    engine: Engine
    lease: WorkerLease
    stopping: asyncio.Event
    task: asyncio.Task[None]
    worker: Worker

    def remember_another_server(self, run_id: str) -> None:
        """As if Redis had been restarted since the run's HEAD was read."""
        self.worker._runs[run_id].effects.server = "0" * 40

    def has_stored(self, seq: int) -> bool:
        """Whether the snapshot after op seq of run A is the newest, and none is under way."""
        run = self.worker._runs.get(A)
        if run is None or run.snapshotter is None or run.snapshotter.busy:
            return False
        newest = run.tenure.head.snap
        return newest is not None and newest.seq == seq

    def epoch_of(self, run_id: str) -> int:
        """Under which the worker owns the run; 0 if it does not."""
        run = self.worker._runs.get(run_id)
        return run.tenure.epoch if run else 0

    async def stop(self) -> None:
        """Returns once it has drained."""
        self.stopping.set()
        await self.task

    async def die(self) -> None:
        """As if killed: nothing is drained. Whoever reaps it deletes its lease."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await self.lease.release()


@dataclass
class Calls:
    """Of one engine: what it was asked to execute."""

    names: list[str] = field(default_factory=list)

    def watch(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("create", "forward_backward", "optim_step", "load", "take_state"):
            monkeypatch.setattr(engine, name, self._noting(name, getattr(engine, name)))

    def _noting(self, name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return whole(*args, **kwargs)

        return call


@dataclass
class Rig:
    """A log and a store, the client's side of them, and workers to start."""

    client: Client
    blobs: DiskBlobs
    start: Callable[..., Awaitable[Trainer]]
    reference: Callable[..., str]


@pytest.fixture
async def rig(
    oplog: Oplog,
    tmp_path: Path,
    new_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Rig]:
    monkeypatch.setattr(worker, "SWEEP_S", 0.02)
    monkeypatch.setattr(blobs_module, "OUTAGE_RETRY_S", 0.0)
    blobs = DiskBlobs(tmp_path, "http://gateway", b"secret")
    futures = Futures(oplog.redis, recheck_s=0.1)
    trainers: list[Trainer] = []
    engines: list[ThreadEngine] = []

    async def start(
        name: str,
        *,
        first_cycle: int = 0,
        watch: Calls | None = None,
        snapshots: Snapshots | None = None,
        **config: Any,
    ) -> Trainer:
        settings = TrainerConfig(**config)
        lease = WorkerLease(oplog, name, role="trainer", base_model=MODEL, lease_s=settings.lease_s)
        await lease.take()
        engine = new_engine(settings.device_runs)
        client = ThreadEngine(engine, make_spec=LoraSpec)
        engines.append(client)
        if watch is not None:
            watch.watch(engine, monkeypatch)
        stopping = asyncio.Event()
        running = Worker(
            base_model=MODEL,
            config=settings,
            lease=lease,
            oplog=oplog,
            blobs=blobs,
            executor=Executor(client, blobs, oplog, fused=settings.execution == "fused"),
            first_cycle=first_cycle,
            snapshots=snapshots or StoredSnapshots(client, blobs, settings),
        )
        task = asyncio.create_task(running.run(stopping))
        trainers.append(Trainer(engine, lease, stopping, task, running))
        return trainers[-1]

    listening = asyncio.create_task(futures.listen())
    try:
        plain = new_engine()
        yield Rig(
            client=Client(oplog, futures, blobs),
            blobs=blobs,
            start=start,
            reference=lambda *args, **kwargs: reference(plain, *args, **kwargs),
        )
    finally:
        for trainer in trainers:
            if not trainer.task.done():
                await trainer.die()
        for client in engines:
            await client.close()
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening


async def until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds; nothing announces it."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


def break_once(engine: Engine, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's next call of `method` fails after it has changed the run's state."""
    whole = getattr(engine, method)

    def broken(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(engine, method, whole)
        whole(*args, **kwargs)
        raise RuntimeError("a kernel wrote to 0x7f0e")

    monkeypatch.setattr(engine, method, broken)


# --- ordinary work --------------------------------------------------------------------------------


async def test_ops_are_applied_once_and_in_order(rig: Rig):
    trainer = await rig.start("t0")
    await rig.client.create(A)
    for op in (gradient(1), gradient(2), None, gradient(3)):
        await (rig.client.step(A) if op is None else rig.client.forward_backward(A, op))
    await rig.client.completed(A)
    expected = rig.reference(A, gradient(1), gradient(2), None, gradient(3))
    assert trainer.engine.run_digest(A) == expected
    header = await rig.client.header(A)
    assert (header.epoch, header.owner) == (1, trainer.lease.owner)


@pytest.mark.parametrize("works_already", [True, False])
async def test_a_queue_longer_than_one_read_of_the_log_is_worked_off_without_a_pause(
    rig: Rig, works_already: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker, "SWEEP_S", 3600.0)  # what is not hinted is found too late
    if works_already:
        await rig.start("t0")
    await rig.client.create(A)
    for number in range(3 * READ_AHEAD):
        await rig.client.forward_backward(A, gradient(number))
    if not works_already:
        await rig.start("t0")
    for seq in range(3 * READ_AHEAD + 1):
        await rig.client.completed(A, seq)


async def test_runs_do_not_change_each_others_bits(rig: Rig):
    trainer = await rig.start("t0")
    for run_id, seed in ((A, 1), (B, 2)):
        await rig.client.create(run_id, seed=seed)
    for number in range(4):
        for run_id in (A, B):
            await rig.client.forward_backward(run_id, gradient(number))
            await rig.client.step(run_id)
    for run_id, seed in ((A, 1), (B, 2)):
        await rig.client.completed(run_id)
        ops = [op for number in range(4) for op in (gradient(number), None)]
        assert trainer.engine.run_digest(run_id) == rig.reference(run_id, *ops, seed=seed)


async def test_in_fused_execution_runs_share_passes_and_a_replay_is_accepted_as_approximate(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    run_ids = [A, B, *(f"{number:032x}:train:0" for number in range(2))]
    shared: list[int] = []
    whole = Engine.forward_backward_many

    def watched(engine: Engine, ops: Any, **kwargs: Any) -> Any:
        shared.append(len({op.run_id for op in ops}))
        return whole(engine, ops, **kwargs)

    monkeypatch.setattr(Engine, "forward_backward_many", watched)
    for run_id in run_ids:
        await rig.client.create(run_id)
        await rig.client.forward_backward(run_id, gradient(0))
        await rig.client.step(run_id)
    first = await rig.start("t0", execution="fused")
    for run_id in run_ids:
        await rig.client.completed(run_id)
    assert max(shared) > 1

    await first.die()
    second = await rig.start("t1", execution="fused")
    for run_id in run_ids[:2]:
        await rig.client.forward_backward(run_id, gradient(1))
        await rig.client.completed(run_id)
    assert second.epoch_of(A) > 1
    event = await recovery(rig)
    assert event.outcome == "approximate"
    assert event.deviation < MAX_DEVIATION["float32"]


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [("fused", "deterministic", "approximate"), ("deterministic", "fused", "exact")],
)
async def test_a_replay_compares_what_was_recorded_in_either_execution(
    rig: Rig, before: str, after: str, outcome: str
):
    first = await rig.start("t0", execution=before)
    await rig.client.create(A)
    await steps(rig, first, range(2))
    await first.die()
    second = await rig.start("t1", execution=after)
    await steps(rig, second, [2])
    await second.die()
    await rig.start("t2", execution=after)
    await rig.client.completed(A, await rig.client.step(A))
    assert (await until_told(rig, 2))[0].outcome == outcome


async def test_a_replay_in_fused_execution_that_comes_to_another_loss_fails_the_run(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    first = await rig.start("t0", execution="fused")
    await rig.client.create(A)
    await steps(rig, first, range(2))
    await first.die()
    whole = Engine.optim_step

    def enlarged(engine: Engine, run_id: str, params: AdamParams) -> Any:
        return whole(engine, run_id, params.model_copy(update={"learning_rate": 0.5}))

    monkeypatch.setattr(Engine, "optim_step", enlarged)
    await rig.start("t1", execution="fused")
    category, message = await rig.client.failed(A, await rig.client.step(A))
    assert category == "server"
    assert "came to" in message
    assert (await recovery(rig)).outcome == "lost"


async def test_a_payload_in_the_store_is_fetched_and_a_large_result_is_put_there(rig: Rig):
    await rig.start("t0")
    await rig.client.create(A)
    await rig.blobs.put("t/ann/payload", gradient(1))
    seq = await rig.client.send(A, FB, Body.stored("t/ann/payload", gradient(1)))
    result = await rig.client.completed(A, seq)
    await rig.client.forward_backward(A, gradient(1))
    other = await rig.client.completed(A)
    outputs = [wire_pb2.ForwardBackwardOutput.FromString(data) for data in (result, other)]
    assert outputs[0].loss_fn_outputs == outputs[1].loss_fn_outputs


async def test_a_payload_that_has_changed_fails_its_op_and_the_run_goes_on(rig: Rig):
    trainer = await rig.start("t0")
    await rig.client.create(A)
    await rig.blobs.put("t/ann/payload", gradient(2))
    seq = await rig.client.send(A, FB, Body.stored("t/ann/payload", gradient(1)))
    category, message = await rig.client.failed(A, seq)
    assert category == "server"
    assert "sha256" in message
    await rig.client.forward_backward(A, gradient(3))
    await rig.client.completed(A)
    assert trainer.engine.run_digest(A) == rig.reference(A, gradient(3))


async def test_a_payload_that_is_gone_fails_its_op_and_the_run_goes_on(rig: Rig):
    await rig.start("t0")
    await rig.client.create(A)
    seq = await rig.client.send(A, FB, Body.stored("t/ann/nothing", gradient(1)))
    assert (await rig.client.failed(A, seq))[0] == "server"
    await rig.client.forward_backward(A, gradient(3))
    await rig.client.completed(A)


async def test_an_op_waits_while_the_store_is_away(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    get, times_away = rig.blobs.get, 3

    async def away(key: str) -> bytes:
        nonlocal times_away
        if times_away:
            times_away -= 1
            raise Unavailable("the store")
        return await get(key)

    monkeypatch.setattr(rig.blobs, "get", away)
    await rig.start("t0")
    await rig.client.create(A)
    await rig.blobs.put("t/ann/payload", gradient(1))
    await rig.client.send(A, FB, Body.stored("t/ann/payload", gradient(1)))
    await rig.client.completed(A)
    assert times_away == 0


# --- an unexpected error --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forward_backward", "optim_step"])
async def test_an_unexpected_error_fails_its_op_and_the_run_is_rebuilt_bit_equally(
    rig: Rig, method: str, monkeypatch: pytest.MonkeyPatch
):
    trainer = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.forward_backward(A, gradient(1))
    await rig.client.step(A)
    await rig.client.forward_backward(A, gradient(2))
    await rig.client.completed(A)
    break_once(trainer.engine, method, monkeypatch)
    if method == "optim_step":
        seq = await rig.client.step(A)
        expected = [gradient(1), None, gradient(3), None]  # a failed step clears the gradient
    else:
        seq = await rig.client.forward_backward(A, gradient(9))
        expected = [gradient(1), None, gradient(2), gradient(3), None]
    category, message = await rig.client.failed(A, seq)
    assert category == "server"
    assert "0x7f0e" not in message
    await rig.client.oplog.told(A, seq)
    await rig.client.forward_backward(A, gradient(3))
    await rig.client.step(A)
    await rig.client.completed(A)
    assert trainer.engine.run_digest(A) == rig.reference(A, *expected)
    assert (await rig.client.header(A)).epoch == 2


async def test_an_unexpected_error_of_one_run_leaves_the_others_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    trainer = await rig.start("t0")
    for run_id in (A, B):
        await rig.client.create(run_id)
        await rig.client.forward_backward(run_id, gradient(1))
        await rig.client.completed(run_id)
    break_once(trainer.engine, "forward_backward", monkeypatch)
    seq = await rig.client.forward_backward(A, gradient(2))
    await rig.client.failed(A, seq)
    await rig.client.step(B)
    await rig.client.completed(B)
    assert trainer.engine.run_digest(B) == rig.reference(B, gradient(1), None)
    assert (await rig.client.header(B)).epoch == 1


async def test_an_op_behind_an_unexpected_error_is_executed_after_the_rebuild(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    trainer = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.completed(A)
    break_once(trainer.engine, "forward_backward", monkeypatch)
    seqs = [await rig.client.forward_backward(A, gradient(number)) for number in range(5)]
    outcomes = [await rig.client.outcome(A, seq) for seq in seqs]
    assert [outcome.failed for outcome in outcomes] == [True, False, False, False, False]
    expected = rig.reference(A, *(gradient(number) for number in range(1, 5)))
    assert trainer.engine.run_digest(A) == expected


# --- snapshots ------------------------------------------------------------------------------------


async def stored(rig: Rig) -> list[str]:
    """The snapshots of run A in the store, as seq-epoch."""
    prefix = f"{keys.run_prefix(TENANT, A)}snap/"
    found = [info.key async for info in rig.blobs.list(prefix)]
    return sorted(key.split("/")[-2] for key in found if key.endswith("manifest.json"))


async def steps(
    rig: Rig, trainer: Trainer, numbers: Iterable[int], *, stored_at: Iterable[int] = ()
) -> None:
    """Optimizer steps, each over one datum; after the seqs `stored_at` a snapshot is awaited."""
    for number in numbers:
        await rig.client.forward_backward(A, gradient(number))
        seq = await rig.client.step(A)
        await rig.client.completed(A)
        if seq in stored_at:
            await until(lambda seq=seq: trainer.has_stored(seq))


def ops_of(numbers: Iterable[int]) -> list[bytes | None]:
    return [op for number in numbers for op in (gradient(number), None)]


async def test_after_a_drain_nothing_is_replayed(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    first = await rig.start("t0")
    await rig.client.create(A)
    await steps(rig, first, range(3))
    await rig.client.forward_backward(A, gradient(3))  # the gradient goes with it
    await rig.client.completed(A)
    await first.stop()
    assert await stored(rig) == ["7-1"]
    calls = Calls()
    second = await rig.start("t1", watch=calls)
    await rig.client.step(A)
    await rig.client.completed(A)
    assert calls.names == ["take_state", "optim_step"]
    assert second.engine.run_digest(A) == rig.reference(A, *ops_of(range(4)))


async def test_a_kill_costs_the_ops_since_the_last_snapshot(rig: Rig):
    first = await rig.start("t0", snapshot_max_ops=4)
    await rig.client.create(A)
    await steps(rig, first, range(5), stored_at=(4, 8))
    assert await stored(rig) == ["4-1", "8-1"]
    await first.die()
    calls = Calls()
    second = await rig.start("t1", watch=calls)
    await steps(rig, second, [5])
    assert calls.names == ["take_state", *["forward_backward", "optim_step"] * 2]
    assert second.engine.run_digest(A) == rig.reference(A, *ops_of(range(6)))


async def test_two_snapshots_are_kept_and_the_log_from_the_older_on(rig: Rig, oplog: Oplog):
    trainer = await rig.start("t0", snapshot_max_ops=2)
    await rig.client.create(A)
    for number in range(4):
        await steps(rig, trainer, [number], stored_at=[2 * number + 2])
        seqs = [2 * number, 2 * (number + 1)] if number else [2]
        assert await stored(rig) == [f"{seq}-1" for seq in seqs]
    assert (await oplog.read_log({A: 0}))[A][0].seq == 7


async def test_a_damaged_snapshot_costs_a_longer_replay_and_nothing_else(rig: Rig):
    first = await rig.start("t0", snapshot_max_ops=2)
    await rig.client.create(A)
    await steps(rig, first, range(3), stored_at=(2, 4, 6))
    assert await stored(rig) == ["4-1", "6-1"]
    await first.die()
    await damage(rig, "6-1")
    second = await rig.start("t1")
    await steps(rig, second, [3])
    assert second.engine.run_digest(A) == rig.reference(A, *ops_of(range(4)))


async def damage(rig: Rig, snapshot: str) -> None:
    key = f"{keys.run_prefix(TENANT, A)}snap/{snapshot}/state.safetensors"
    data = bytearray(await rig.blobs.get(key))
    data[-1] ^= 1
    await rig.blobs.put(key, bytes(data))


async def test_a_run_whose_snapshots_are_all_damaged_says_so_and_disturbs_no_other(rig: Rig):
    first = await rig.start("t0", snapshot_max_ops=2)
    await rig.client.create(A)
    await steps(rig, first, range(3), stored_at=(2, 4, 6))
    assert await stored(rig) == ["4-1", "6-1"]
    await first.die()
    await damage(rig, "4-1")
    await damage(rig, "6-1")
    await rig.start("t1")
    seq = await rig.client.step(A)
    assert await rig.client.failed(A, seq) == (
        "server",
        STATE_LOST,
    )
    await rig.client.create(B)
    await rig.client.completed(B)


async def test_a_run_that_cannot_be_taken_over_keeps_no_other_waiting(rig: Rig):
    first = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.completed(A)
    await first.stop()
    await rig.blobs.delete(keys.run_record(TENANT, A))
    await rig.client.step(A)
    await rig.start("t1")
    await rig.client.create(B)
    await rig.client.completed(B)


async def test_a_replay_that_computes_other_bits_fails_the_run_and_never_goes_on_silently(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    first = await rig.start("t0")
    await rig.client.create(A)
    await steps(rig, first, range(2))
    await first.die()
    # As on another machine, which rounds otherwise.
    whole = RunState.checksum
    monkeypatch.setattr(RunState, "checksum", lambda state: whole(state) + "0")
    await rig.start("t1")
    seq = await rig.client.step(A)
    category, message = await rig.client.failed(A, seq)
    assert category == "server"
    assert "left another state than it did before" in message
    assert (await recovery(rig)).outcome == "lost"


async def test_a_run_whose_replay_went_wrong_leaves_its_last_snapshot_as_a_checkpoint(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    first = await rig.start("t0", snapshot_max_ops=3)
    await rig.client.create(A)
    await steps(rig, first, range(1), stored_at=[2])
    expected = first.engine.save(A, optimizer=True)
    await steps(rig, first, [1], stored_at=())
    await first.die()
    whole = RunState.checksum
    monkeypatch.setattr(RunState, "checksum", lambda state: whole(state) + "0")
    await rig.start("t1")
    _, message = await rig.client.failed(A, await rig.client.step(A))
    assert message.endswith(f"its state after seq 2 is tinker://{A}/weights/recovery-2")
    data = await rig.blobs.get(keys.name_record(TENANT, A, "weights", "recovery-2"))
    manifest = CheckpointRecord.from_bytes(data).manifest_key
    assert await read_files(rig.blobs, manifest) == expected


async def test_a_run_whose_log_lacks_what_a_replay_needs_fails_and_leaves_its_snapshot(
    rig: Rig, oplog: Oplog
):
    first = await rig.start("t0", snapshot_max_ops=3)
    await rig.client.create(A)
    await steps(rig, first, range(1), stored_at=[2])
    await steps(rig, first, [1], stored_at=())
    await first.die()
    await oplog.redis.xtrim(keys.run_log(A), minid="5-0", approximate=False)
    seq = await rig.client.step(A)
    await rig.start("t1")
    category, message = await rig.client.failed(A, seq)
    assert category == "server"
    assert message.endswith(
        "seq 3 to 4 are missing from the log; "
        f"its state after seq 2 is tinker://{A}/weights/recovery-2"
    )
    assert (await recovery(rig)).outcome == "lost"


async def recoveries(rig: Rig) -> list[RecoveryRecord]:
    """The history of run A."""
    prefix = keys.run_recoveries(TENANT, A)
    found = [info.key async for info in rig.blobs.list(prefix)]
    return [RecoveryRecord.from_bytes(await rig.blobs.get(key)) for key in found]


async def recovery(rig: Rig) -> RecoveryRecord:
    """The only event in the history of run A, once it is there."""
    (event,) = await until_told(rig, 1)
    return event


async def until_told(rig: Rig, num_events: int) -> list[RecoveryRecord]:
    """The history of run A once it has so many events: they are written in the background."""
    async with asyncio.timeout(30):
        while len(found := await recoveries(rig)) < num_events:
            await asyncio.sleep(0)
    return found


async def test_a_recovery_is_written_into_the_history_of_the_run(rig: Rig):
    first = await rig.start("t0", snapshot_max_ops=4)
    await rig.client.create(A)
    await steps(rig, first, range(3), stored_at=[4])
    assert await recoveries(rig) == []
    await first.die()
    second = await rig.start("t1")
    await steps(rig, second, [3])
    event = await recovery(rig)
    assert (event.cause, event.worker, event.outcome) == ("trainer died", "t1", "exact")
    assert (event.epoch, event.from_seq, event.to_seq) == (2, 4, 6)


async def test_a_run_that_was_released_has_no_recovery_in_its_history(rig: Rig):
    await rig.start("t0", max_runs=1)
    for run in (A, B):
        await rig.client.create(run)
        await rig.client.completed(run)
    await rig.client.step(A)
    await rig.client.completed(A)
    assert await recoveries(rig) == []


async def test_a_run_that_made_room_comes_back_without_a_replay(rig: Rig):
    calls = Calls()
    trainer = await rig.start("t0", max_runs=1, watch=calls)
    await rig.client.create(A)
    await steps(rig, trainer, range(2))
    await rig.client.create(B)
    await rig.client.completed(B)
    calls.names.clear()
    await steps(rig, trainer, [2])
    assert calls.names == ["take_state", "forward_backward", "optim_step"]
    assert trainer.engine.run_digest(A) == rig.reference(A, *ops_of(range(3)))


# --- gaps, and a Redis that went back -------------------------------------------------------------


async def skip_one(client: Client) -> int:
    """Lose the next seq of run A on its way, and send the one after it."""
    client.next_seq[A] += 1
    return await client.forward_backward(A, gradient(9))


async def test_what_waits_above_a_gap_fails_when_the_gap_is_overdue(rig: Rig):
    await rig.start("t0", gap_timeout_s=0.0)
    await rig.client.create(A)
    await rig.client.completed(A)
    seq = await skip_one(rig.client)
    category, message = await rig.client.failed(A, seq)
    path = f"tinker://{A}/weights/recovery-0"
    assert (category, message) == (
        "user",
        f"seq {seq - 1} never arrived, so nothing after it was executed; "
        f"the state before it is {path}",
    )
    assert (await rig.client.header(A)).status == "failed"


async def test_a_run_that_ends_at_a_gap_leaves_its_state_as_a_listed_checkpoint(
    rig: Rig, oplog: Oplog
):
    trainer = await rig.start("t0", gap_timeout_s=0.0)
    await rig.client.create(A)
    await rig.client.forward_backward(A, gradient(1))
    await rig.client.completed(A)
    expected = trainer.engine.save(A, optimizer=True)
    await rig.client.failed(A, await skip_one(rig.client))
    (row,) = await Listing(oplog.redis, TENANT).checkpoint_rows(A, now=datetime.now(UTC))
    assert (row["checkpoint_id"], row["checkpoint_type"]) == ("weights/recovery-1", "training")
    name = keys.name_record(TENANT, A, "weights", "recovery-1")
    record = CheckpointRecord.from_bytes(await rig.blobs.get(name))
    assert await read_files(rig.blobs, record.manifest_key) == expected


async def test_a_gap_of_a_run_without_an_owner_is_given_up_too(rig: Rig):
    trainer = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.completed(A)
    await trainer.die()
    seq = await skip_one(rig.client)
    await rig.start("t1", gap_timeout_s=0.0)
    assert (await rig.client.failed(A, seq))[0] == "user"


async def test_a_gap_of_a_run_that_made_room_is_given_up_too(rig: Rig):
    trainer = await rig.start("t0", max_runs=1)
    await rig.client.create(A)
    await rig.client.completed(A)
    seq = await skip_one(rig.client)
    await rig.client.create(B)
    await rig.client.completed(B)
    assert not trainer.engine.has(A)
    await trainer.die()
    await rig.start("t0", gap_timeout_s=0.0)
    assert (await rig.client.failed(A, seq))[0] == "user"


async def test_a_gap_is_given_up_at_once_when_its_session_has_ended(rig: Rig, oplog: Oplog):
    await rig.start("t0")
    await rig.client.create(A)
    await rig.client.completed(A)
    seq = await skip_one(rig.client)
    session = keys.session_header(A.partition(":")[0])
    await oplog.redis.hset(session, "status", "finished")
    assert (await rig.client.failed(A, seq))[0] == "user"


async def test_a_gap_that_is_filled_in_time_costs_nothing(rig: Rig):
    trainer = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.completed(A)
    last = await skip_one(rig.client)
    rig.client.next_seq[A] = last - 1
    await rig.client.forward_backward(A, gradient(8))
    await rig.client.completed(A, last)
    expected = rig.reference(A, gradient(8), gradient(9))
    assert trainer.engine.run_digest(A) == expected


async def test_an_owner_goes_on_after_a_restart_of_redis_if_head_is_still_its_own(rig: Rig):
    trainer = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.completed(A)
    trainer.remember_another_server(A)
    await rig.client.forward_backward(A, gradient(1))
    await rig.client.completed(A)
    assert (await rig.client.header(A)).epoch == 1


async def test_an_owner_publishes_nothing_on_a_restarted_redis_once_head_is_another_s(rig: Rig):
    trainer = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.completed(A)
    # Another worker has taken the run over, and a rollback of Redis has forgotten that.
    head = Head(7, "t1/another").to_bytes()
    await rig.blobs.put(keys.run_head(TENANT, A), head)
    trainer.remember_another_server(A)
    seq = await rig.client.forward_backward(A, gradient(1))
    await rig.client.completed(A, seq)
    header = await rig.client.header(A)
    assert header.epoch == 8  # t0 has left, and taken the run over again in good order


async def test_a_run_whose_header_went_back_is_taken_over_anew(rig: Rig, oplog: Oplog):
    trainer = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.forward_backward(A, gradient(1))
    await rig.client.completed(A)
    await oplog.redis.hset(keys.run_header(A), "committed", 0)
    await until(lambda: trainer.epoch_of(A) == 2)
    await rig.client.step(A)
    await rig.client.completed(A)
    assert trainer.engine.run_digest(A) == rig.reference(A, gradient(1), None)


async def _about_to_replay_a_gradient(rig: Rig) -> Trainer:
    """A worker that takes run A over from a dead one, with the next op of A."""
    first = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.forward_backward(A, gradient(1))
    await rig.client.completed(A)
    await first.die()
    return await rig.start("t1")


async def test_a_run_that_cannot_be_rebuilt_fails_what_comes_and_no_other_run(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    second = await _about_to_replay_a_gradient(rig)
    break_once(second.engine, "forward_backward", monkeypatch)  # in the replay
    seq = await rig.client.forward_backward(A, gradient(2))
    category, message = await rig.client.failed(A, seq)
    assert category == "server"
    assert "could not be rebuilt" in message
    await rig.client.create(B)
    await rig.client.forward_backward(B, gradient(1))
    await rig.client.completed(B)


async def test_a_replay_that_another_owner_has_spoilt_gives_nothing_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    second = await _about_to_replay_a_gradient(rig)

    whole = second.engine.forward_backward

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        # Another one has taken the run over meanwhile, and deleted a payload that it has trimmed.
        monkeypatch.setattr(second.engine, "forward_backward", whole)
        rig.blobs._path(keys.run_head(TENANT, A)).write_bytes(Head(7, "t2/another").to_bytes())
        raise BadRequest("gone")

    monkeypatch.setattr(second.engine, "forward_backward", spoilt)
    await rig.client.forward_backward(A, gradient(2))
    await rig.client.completed(A)
    assert (await rig.client.header(A)).epoch == 8
    assert second.engine.run_digest(A) == rig.reference(A, gradient(1), gradient(2))


class FailingSnapshots:
    """Its only copy, of seq 1, cannot be stored: which is found when `fail` is set."""

    def __init__(self) -> None:
        self.fail = asyncio.Event()

    def due(self, spent: Spent, step: Step) -> bool:
        return step.op.seq == 1

    async def copy(self, run_id: str) -> str:
        return "state"

    async def put(self, run: RunContext, ref: SnapshotRef, copy: str, state: FoldState) -> None:
        await self.fail.wait()
        raise Unavailable("the store")

    async def restore(self, run: RunContext, ref: SnapshotRef) -> None:
        raise AssertionError("there is no snapshot")

    async def delete(self, run: RunContext, ref: SnapshotRef) -> None:
        raise AssertionError("there is no snapshot")


async def test_a_run_that_is_let_go_in_the_midst_of_a_commit_holds_up_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    snapshots, committing = FailingSnapshots(), asyncio.Event()
    commit = Oplog.commit

    async def held_once(
        oplog: Oplog, run_id: str, epoch: int, seq: int, *rest: Any, **named: Any
    ) -> Any:
        if (epoch, seq) == (1, 2):
            committing.set()
            await asyncio.Event().wait()
        return await commit(oplog, run_id, epoch, seq, *rest, **named)

    monkeypatch.setattr(Oplog, "commit", held_once)
    trainer = await rig.start("t0", snapshots=snapshots)
    await rig.client.create(A)
    for number in range(4):
        await rig.client.forward_backward(A, gradient(number))
    await committing.wait()
    snapshots.fail.set()
    await rig.client.completed(A)
    expected = rig.reference(A, *(gradient(number) for number in range(4)))
    assert trainer.engine.run_digest(A) == expected
    assert (await rig.client.header(A)).epoch == 2


# --- takeover and replay --------------------------------------------------------------------------

TRAINED = [gradient(1), None, gradient(2), gradient(3), None, gradient(4)]


async def train(client: Client, run_id: str) -> None:
    await client.create(run_id)
    for op in TRAINED:
        await (client.step(run_id) if op is None else client.forward_backward(run_id, op))


@pytest.mark.parametrize("how", ["stop", "die"])
async def test_a_run_goes_on_after_a_restart_with_the_same_bits(rig: Rig, how: str):
    first = await rig.start("t0")
    await train(rig.client, A)
    await rig.client.completed(A)
    digest = first.engine.run_digest(A)
    assert digest == rig.reference(A, *TRAINED)
    await getattr(first, how)()
    second = await rig.start("t0")
    seq = await rig.client.send(A, Kind.FORWARD, Body.of(gradient(5)))
    await rig.client.completed(A, seq)
    assert second.engine.run_digest(A) == digest
    assert (await rig.client.header(A)).epoch == 2


async def test_what_was_queued_when_a_worker_died_is_executed_by_the_next(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    first = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.completed(A)
    entered, go_on = threading.Event(), threading.Event()
    whole = first.engine.forward_backward

    def slow(*args: Any, **kwargs: Any) -> bytes:
        entered.set()
        go_on.wait(30)
        return whole(*args, **kwargs)

    monkeypatch.setattr(first.engine, "forward_backward", slow)
    for number in range(3):
        await rig.client.forward_backward(A, gradient(number))
    await until(entered.is_set)
    await first.die()
    go_on.set()
    second = await rig.start("t1")
    await rig.client.completed(A)
    expected = rig.reference(A, *(gradient(number) for number in range(3)))
    assert second.engine.run_digest(A) == expected


async def _two_tenants_on_a_slow_engine(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], threading.Semaphore, dict[str, Any]]:
    """(runs in the order of execution, what each op waits for at its start, the worker's runs)"""
    trainer = await rig.start("t0")
    rig.client.tenants[B] = "bob"
    for run_id in (A, B):
        await rig.client.create(run_id)
        await rig.client.completed(run_id)
    executed: list[str] = []
    may_go_on = threading.Semaphore(0)
    whole = trainer.engine.forward_backward

    def slow(run_id: str, *args: Any, **kwargs: Any) -> bytes:
        executed.append(run_id)
        may_go_on.acquire(timeout=30)
        return whole(run_id, *args, **kwargs)

    monkeypatch.setattr(trainer.engine, "forward_backward", slow)
    return executed, may_go_on, trainer.worker._runs


async def test_a_tenant_with_one_op_waits_for_one_op_of_a_deep_queue(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    executed, may_go_on, owned = await _two_tenants_on_a_slow_engine(rig, monkeypatch)
    for number in range(8):
        await rig.client.forward_backward(A, gradient(number))
    await until(lambda: owned[A].owner.num_queued == 8)
    may_go_on.release()
    await until(lambda: len(executed) == 2)  # the first of a share of seven
    await rig.client.forward_backward(B, gradient(0))
    await until(lambda: owned[B].owner.num_queued == 1)
    may_go_on.release(8)
    for run_id in (A, B):
        await rig.client.completed(run_id)
    assert executed == [A, A, B, A, A, A, A, A, A]


async def test_a_tenant_that_has_been_served_waits_for_one_op_of_a_deep_queue_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    executed, may_go_on, owned = await _two_tenants_on_a_slow_engine(rig, monkeypatch)
    await rig.client.forward_backward(A, gradient(0))
    await until(lambda: executed == [A])
    for number in range(1, 8):
        await rig.client.forward_backward(A, gradient(number))
    for number in range(3):  # each is sent when the one before is under way
        await rig.client.forward_backward(B, gradient(number))
        await until(lambda: owned[B].owner.num_queued > min(number, 1))  # noqa: B023
        while executed.count(B) == number:
            seen = len(executed)
            may_go_on.release()
            await until(lambda: len(executed) > seen)  # noqa: B023
    may_go_on.release(20)
    for run_id in (A, B):
        await rig.client.completed(run_id)
    first = executed.index(B)
    assert executed[first : first + 5] == [B, A, B, A, B]


async def test_a_worker_whose_run_was_taken_over_publishes_nothing_and_drops_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    first = await rig.start("t0", first_cycle=1000)
    await rig.client.create(A)
    await rig.client.completed(A)
    entered, go_on = threading.Event(), threading.Event()
    whole = first.engine.forward_backward

    def paused(*args: Any, **kwargs: Any) -> bytes:
        entered.set()
        go_on.wait(30)
        return whole(*args, **kwargs)

    monkeypatch.setattr(first.engine, "forward_backward", paused)
    seq = await rig.client.forward_backward(A, gradient(1))
    await until(entered.is_set)
    # It is alive and paused: its lease runs out, and another takes its run.
    await rig.client.oplog.redis.delete(keys.worker_lease("t0"))
    second = await rig.start("t1", first_cycle=2000)
    result = await rig.client.completed(A, seq)
    go_on.set()
    await until(lambda: not first.engine.has(A))
    assert await rig.client.completed(A, seq) == result
    output = wire_pb2.ForwardBackwardOutput.FromString(result)
    assert output.metrics["clock_cycle:unique"] >= 2000
    header = await rig.client.header(A)
    assert (header.epoch, header.owner) == (2, second.lease.owner)
    await rig.client.step(A)
    await rig.client.completed(A)
    assert second.engine.run_digest(A) == rig.reference(A, gradient(1), None)
    assert not first.engine.has(A)


async def test_two_workers_at_once_apply_each_op_once(rig: Rig):
    workers = [await rig.start(f"t{index}") for index in range(2)]
    runs = [f"{letter * 32}:train:0" for letter in "abcdef"]
    for run_id in runs:
        await train(rig.client, run_id)
    for run_id in runs:
        await rig.client.completed(run_id)
        owners = [trainer for trainer in workers if trainer.engine.has(run_id)]
        assert len(owners) == 1
        assert owners[0].engine.run_digest(run_id) == rig.reference(run_id, *TRAINED)
        assert (await rig.client.header(run_id)).epoch == 1


async def test_a_worker_that_joins_takes_no_run_of_one_that_lives(rig: Rig):
    first = await rig.start("t0")
    runs = [f"{letter * 32}:train:0" for letter in "abcdef"]  # some rank the newcomer first
    for run_id in runs:
        await rig.client.create(run_id)
        await rig.client.completed(run_id)
    second = await rig.start("t1")
    number = 0
    while not any(map(second.engine.has, rig.client.next_seq)):  # until it has a new run
        number += 1
        await rig.client.create(f"{number:032}:train:0")
        await rig.client.completed(f"{number:032}:train:0")
    for run_id in runs:
        await rig.client.forward_backward(run_id, gradient(1))
        await rig.client.completed(run_id)
        header = await rig.client.header(run_id)
        assert (header.epoch, header.owner) == (1, first.lease.owner)


async def test_a_replay_follows_the_failures_that_were_recorded(rig: Rig):
    first = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.forward_backward(A, gradient(1))
    await rig.client.refused(A)
    missing = await rig.client.step(A)  # fails: the client does not know of the refusal
    await rig.client.forward_backward(A, gradient(2))
    await rig.client.step(A)
    await rig.client.forward_backward(A, NOT_FINITE)
    infinite = await rig.client.step(A)  # fails: not finite
    known = await rig.client.refused(A)
    await rig.client.failed(A, known)
    for seq in (await rig.client.oplog.recorded(A)).failed:  # as a client that awaits every result
        await rig.client.oplog.told(A, seq)
    await rig.client.forward_backward(A, gradient(3))
    await rig.client.step(A)  # obeyed: the client knows
    await rig.client.forward_backward(A, gradient(4))
    await rig.client.completed(A)
    assert "gradient of seq 2 missing" in (await rig.client.failed(A, missing))[1]
    assert "not finite" in (await rig.client.failed(A, infinite))[1]
    digest = first.engine.run_digest(A)
    assert digest == rig.reference(A, gradient(2), None, gradient(3), None, gradient(4))
    await first.stop()
    second = await rig.start("t1")
    await rig.client.send(A, Kind.FORWARD, Body.of(gradient(5)))
    await rig.client.completed(A)
    assert second.engine.run_digest(A) == digest


async def test_a_replay_knows_of_a_gradient_that_is_incomplete(rig: Rig):
    first = await rig.start("t0")
    await rig.client.create(A)
    refused = await rig.client.refused(A)
    await rig.client.failed(A, refused)
    await first.stop()
    await rig.start("t1")
    seq = await rig.client.step(A)
    assert f"gradient of seq {refused} missing" in (await rig.client.failed(A, seq))[1]


async def test_a_replay_saves_nothing_again(rig: Rig):
    first = await rig.start("t0")
    await train(rig.client, A)
    saved = json.loads(await rig.client.completed(A, await rig.client.save(A, "x")))
    assert saved["path"] == f"tinker://{A}/weights/x"
    before = [info async for info in rig.blobs.list(keys.run_prefix(TENANT, A))]
    await first.die()
    await rig.start("t1")
    await rig.client.step(A)
    await rig.client.completed(A)
    await recovery(rig)  # the one thing that is new
    after = [info async for info in rig.blobs.list(keys.run_prefix(TENANT, A))]
    assert [info for info in after if "/recovered/" not in info.key] == before


async def test_a_replay_loads_what_the_name_stood_for_at_the_time(rig: Rig):
    first = await rig.start("t0")
    await train(rig.client, A)
    saved = await rig.client.save(A, "x")
    await rig.client.completed(A, saved)
    manifest = keys.checkpoint_manifest(TENANT, A, saved)
    await rig.client.forward_backward(A, gradient(7))
    await rig.client.step(A)
    source = {"path": f"tinker://{A}/weights/x", "manifest": manifest, "optimizer": True}
    await rig.client.send(A, Kind.LOAD_WEIGHTS, Body.of(json.dumps(source).encode()))
    await rig.client.completed(A)
    digest = first.engine.run_digest(A)
    await rig.client.forward_backward(A, gradient(8))
    await rig.client.step(A)
    await rig.client.completed(A, await rig.client.save(A, "x", overwrite=True))
    later = first.engine.run_digest(A)
    await rig.client.create(B, source=source)
    await rig.client.completed(B)
    assert first.engine.run_digest(B) == digest
    await first.stop()
    second = await rig.start("t1")
    for run_id in (A, B):
        await rig.client.send(run_id, Kind.FORWARD, Body.of(gradient(5)))
        await rig.client.completed(run_id)
    assert second.engine.run_digest(A) == later
    assert second.engine.run_digest(B) == digest


# --- room, idleness, the end ----------------------------------------------------------------------


async def test_idle_runs_make_room_and_come_back_with_the_same_bits(rig: Rig):
    trainer = await rig.start("t0", max_runs=1)
    await train(rig.client, A)
    await rig.client.completed(A)
    digest = trainer.engine.run_digest(A)
    await train(rig.client, B)
    await rig.client.completed(B)
    assert not trainer.engine.has(A)
    assert (await rig.client.header(A)).owner == ""
    assert await rig.client.oplog.live_runs(MODEL) == [B]
    await rig.client.send(A, Kind.FORWARD, Body.of(gradient(5)))
    await rig.client.completed(A)
    assert trainer.engine.run_digest(A) == digest
    assert not trainer.engine.has(B)


async def test_idle_runs_make_room_after_a_restart_of_redis(rig: Rig):
    trainer = await rig.start("t0", max_runs=1)
    await rig.client.create(A)
    await rig.client.completed(A)
    trainer.remember_another_server(A)
    await rig.client.create(B)
    await rig.client.completed(B)
    assert (await rig.client.header(A)).owner == ""


async def test_an_idle_run_that_is_another_s_by_now_makes_room(rig: Rig):
    trainer = await rig.start("t0", max_runs=1)
    await rig.client.create(A)
    await rig.client.completed(A)
    await rig.blobs.put(keys.run_head(TENANT, A), Head(7, "t1/another").to_bytes())
    trainer.remember_another_server(A)
    await rig.client.create(B)
    await rig.client.completed(B)
    assert not trainer.engine.has(A)


async def test_the_run_that_was_idle_longest_makes_room(rig: Rig):
    trainer = await rig.start("t0", max_runs=2)
    runs = [f"{letter * 32}:train:0" for letter in "abc"]
    for run_id in runs[:2]:
        await rig.client.create(run_id)
        await rig.client.completed(run_id)
    await rig.client.forward_backward(runs[0], gradient(1))
    await rig.client.completed(runs[0])
    await rig.client.create(runs[2])
    await rig.client.completed(runs[2])
    assert [trainer.engine.has(run_id) for run_id in runs] == [True, False, True]


async def test_more_runs_than_there_is_room_for_are_all_served(rig: Rig):
    await rig.start("t0", max_runs=2)
    runs = [f"{letter * 32}:train:0" for letter in "abcdef"]
    for run_id in runs:
        await rig.client.create(run_id)
    for number in range(2):
        for run_id in runs:
            await rig.client.forward_backward(run_id, gradient(number))
    for run_id in runs:
        await rig.client.completed(run_id)


async def test_64_runs_train_on_8_slots_of_the_device_as_each_would_alone(
    rig: Rig, new_engine: Callable[..., Engine]
):
    trainer = await rig.start("t0", device_runs=8, max_runs=24)
    runs = {f"{number:032x}:train:0": gradient(number) for number in range(64)}
    for run_id in runs:
        await rig.client.create(run_id)
    for _ in range(2):  # by the second time each has made room for others
        for run_id, op in runs.items():
            await rig.client.forward_backward(run_id, op)
            await rig.client.step(run_id)
        for run_id in runs:
            await rig.client.completed(run_id)
    assert len(trainer.engine.runs_on_device) <= 8
    assert sum(trainer.engine.has(run_id) for run_id in runs) <= 24
    alone = new_engine()
    for run_id, op in runs.items():
        forward = await rig.client.send(run_id, Kind.FORWARD, Body.of(op))
        got = wire_pb2.ForwardBackwardOutput.FromString(await rig.client.completed(run_id, forward))
        reference(alone, run_id, op, None, op, None)
        wanted = alone.forward_backward(run_id, op, backward=False, clock_cycle=0)
        outputs = wire_pb2.ForwardBackwardOutput.FromString(wanted).loss_fn_outputs
        assert got.loss_fn_outputs == outputs


async def test_a_stop_commits_what_was_executed_and_lets_go_of_the_name(rig: Rig):
    first = await rig.start("t0")
    await train(rig.client, A)
    await rig.client.completed(A)
    await first.stop()
    header = await rig.client.header(A)
    assert header.committed == header.admitted
    assert await rig.client.oplog.live_workers() == {}


async def test_a_worker_that_lost_its_name_ends_and_leaves_it_to_the_other(rig: Rig):
    trainer = await rig.start("t0", lease_renew_s=0.01)
    other = WorkerLease(rig.client.oplog, "t0", role="trainer", base_model=MODEL, lease_s=30)
    await rig.client.oplog.redis.delete(keys.worker_lease("t0"))
    await other.take()
    async with asyncio.timeout(30):
        await trainer.task
    assert trainer.lease.lost.is_set()
    workers = await rig.client.oplog.live_workers()
    assert workers["t0"]["incarnation"] == other.incarnation


async def test_a_worker_is_ready_once_it_follows_the_log(rig: Rig):
    trainer = await rig.start("t0")
    await rig.client.create(A)
    await rig.client.completed(A)
    lease = (await rig.client.oplog.live_workers())["t0"]
    assert (lease["state"], lease["role"], lease["base_model"]) == ("ready", "trainer", MODEL)
    assert trainer.lease.owner == f"t0/{lease['incarnation']}"


# --- moving ---------------------------------------------------------------------------------------


async def test_a_run_is_moved_with_work_left_and_nothing_is_executed_again(rig: Rig, oplog: Oplog):
    first = await rig.start("t0")
    await rig.client.create(A)
    await steps(rig, first, range(2))
    calls = Calls()
    second = await rig.start("t1", watch=calls)
    seqs = [await rig.client.forward_backward(A, gradient(n)) for n in range(10, 30)]
    await Moves(oplog.redis, MODEL).ask(A, "t1")
    for seq in seqs:
        await rig.client.completed(A, seq)
    await rig.client.step(A)
    await until(lambda: second.epoch_of(A) == 2)
    await rig.client.completed(A)
    assert second.engine.run_digest(A) == rig.reference(
        A, *ops_of(range(2)), *(gradient(n) for n in range(10, 30)), None
    )
    assert calls.names[0] == "take_state"
    assert calls.names.count("optim_step") == 1
    assert first.epoch_of(A) == 0
    assert await recoveries(rig) == []
    assert (await Moves(oplog.redis, MODEL).read()).targets == {}


async def test_a_drained_trainer_gives_its_runs_away_and_takes_none(rig: Rig, oplog: Oplog):
    first = await rig.start("t0")
    for run in (A, B):
        await rig.client.create(run)
        await rig.client.completed(run)
    second = await rig.start("t1")
    await Moves(oplog.redis, MODEL).drain("t0")
    await until(lambda: not (first.epoch_of(A) or first.epoch_of(B)))
    for run in (A, B):
        await rig.client.step(run)
        await rig.client.completed(run)
        assert second.epoch_of(run) == 2
    await Moves(oplog.redis, MODEL).undrain("t0")
    await second.stop()
    await rig.client.step(A)
    await rig.client.completed(A)
    assert first.epoch_of(A) == 3


async def test_a_wish_for_a_trainer_that_is_not_alive_holds_nothing_up(rig: Rig, oplog: Oplog):
    await rig.start("t0")
    await rig.client.create(A)
    await Moves(oplog.redis, MODEL).ask(A, "gone")
    await rig.client.step(A)
    await rig.client.completed(A)
