"""The sampler's worker over a real log, store and engine, one engine step at a time."""

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_qwen3 import save_tiny_qwen3

from luthier_core import keys
from luthier_core.checkpoints import Manifest, ManifestFile
from luthier_core.config import SamplerConfig
from luthier_core.disk_blobs import DiskBlobs
from luthier_core.lifecycle import WorkerLease
from luthier_core.oplog import Oplog
from luthier_core.ops import Body, Outcome
from luthier_model.base import BaseModel, load_base_model
from luthier_model.lora import LoraSpec, init_adapter
from luthier_model.peft_io import adapter_files
from luthier_sampler.engine import Engine, EngineStats, Finished
from luthier_sampler.engine_thread import EngineThread
from luthier_sampler.worker import Worker

MODEL, TENANT, SESSION = "tiny", "ann", f"{'a' * 32}:sample:0"
RUN = f"{'b' * 32}:train:0"
NUM_BLOCKS = 32
CANCELLED = Outcome.failure("cancelled", "user")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    save_tiny_qwen3(
        folder,
        seed=4,
        vocab_size=40,
        max_position_embeddings=512,
        initializer_range=0.02,
        eos_token_id=None,
    )
    return load_base_model(MODEL, folder)


class SteppedEngine(Engine):
    """Takes each step when the test lets it, and notes how things stand before it."""

    def __init__(self, model: BaseModel) -> None:
        config = SamplerConfig(num_kv_blocks=NUM_BLOCKS)
        super().__init__(model, None, config)  # type: ignore[arg-type]  # no stop strings
        self.may_step = threading.Semaphore(0)
        self.seen: list[EngineStats] = []

    def step(self) -> list[Finished]:
        self.seen.append(self.stats)
        self.may_step.acquire()
        return super().step()


@pytest.fixture
def blobs(tmp_path: Path) -> DiskBlobs:
    return DiskBlobs(tmp_path, "http://gateway", b"secret")


@pytest.fixture
async def engine(oplog: Oplog, model: BaseModel, blobs: DiskBlobs) -> AsyncIterator[SteppedEngine]:
    """The engine of a worker that is ready."""
    engine = SteppedEngine(model)
    lease = WorkerLease(oplog, "sampler-0", role="sampler", base_model=MODEL, lease_s=15.0)
    await lease.take()
    worker = Worker(
        base_model=MODEL,
        config=SamplerConfig(),
        lease=lease,
        oplog=oplog,
        blobs=blobs,
        engine=EngineThread(engine),
    )
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(stop))
    while [state["state"] for state in (await oplog.live_workers()).values()] != ["ready"]:
        await asyncio.sleep(0)
    yield engine
    engine.may_step.release(10_000)
    stop.set()
    await running


async def send(oplog: Oplog, seq: int, *, inflight_run: str = "", **params: Any) -> None:
    wanted = {
        "sampling_session_id": SESSION,
        "seq_id": seq,
        "prompt": {"chunks": [{"tokens": [seq] * 40}]},
        "sampling_params": {"stop": [], **params},
    }
    status = await oplog.enqueue(
        tenant=TENANT,
        base_model=MODEL,
        sampling_session_id=SESSION,
        seq=str(seq),
        digest=f"{seq}",
        job={
            "session": SESSION,
            "tenant": TENANT,
            "weights": "",
            "inflight_run": inflight_run,
            **Body.of(json.dumps(wanted).encode()).fields(),
        },
        max_jobs=100,
        header={"base_model": MODEL, "weights": ""},
    )
    assert status == "OK"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


async def test_a_cancelled_sample_frees_its_blocks_before_the_step_after_the_hint(
    oplog: Oplog, engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = asyncio.Event()
    cancel = Worker._cancel
    monkeypatch.setattr(Worker, "_cancel", lambda *args: (cancel(*args), told.set()))
    await send(oplog, 0, max_tokens=100)
    await send(oplog, 1, max_tokens=100)
    await until(lambda: bool(engine.seen))
    # Whenever the second one comes: until both run, and a step with them is under way.
    while engine.seen[-1].num_running < 2:
        await next_step(engine)
    assert await oplog.cancel(SESSION, "0", MODEL, CANCELLED) == "OK"
    await told.wait()
    await next_step(engine)
    before, after = engine.seen[-2:]
    assert (before.num_running, after.num_running) == (2, 1)
    assert after.num_free_blocks > before.num_free_blocks + 1


async def next_step(engine: SteppedEngine) -> None:
    """Lets the step under way end; returns when the one after it has begun."""
    num_seen = len(engine.seen)
    engine.may_step.release()
    await until(lambda: len(engine.seen) > num_seen)


async def save_in_flight(oplog: Oplog, blobs: DiskBlobs, model: BaseModel, seq: int) -> str:
    """What a trainer does with in-flight weights; the key of their manifest."""
    adapter = init_adapter(LoraSpec(rank=2, seed=seq), model.lora_shapes, "cpu")
    files = {}
    for name, data in adapter_files(adapter, MODEL).items():
        await blobs.put(f"{seq}/{name}", data)
        sha256 = hashlib.sha256(data).hexdigest()
        files[name] = ManifestFile(key=f"{seq}/{name}", num_bytes=len(data), sha256=sha256)
    manifest = Manifest(run_id=RUN, seq=seq, epoch=1, kind="ephemeral", files=files)
    key = keys.checkpoint_manifest(TENANT, RUN, seq)
    await blobs.put(key, manifest.to_bytes())
    assert await oplog.publish(RUN, 1, seq, key) == "OK"
    await oplog.redis.spublish(keys.sampling_published(MODEL), RUN)
    return key


async def test_in_flight_samples_move_to_what_is_saved_while_they_run(
    oplog: Oplog, engine: SteppedEngine, blobs: DiskBlobs, model: BaseModel
) -> None:
    def running_with() -> list[str]:
        return [request.adapter_key for request in engine._requests.values()]

    await oplog.redis.hset(keys.run_header(RUN), "epoch", 1)
    first = await save_in_flight(oplog, blobs, model, 3)
    await send(oplog, 0, inflight_run=RUN, max_tokens=100)
    await until(lambda: bool(engine.seen))
    assert running_with() == [first]
    second = await save_in_flight(oplog, blobs, model, 5)
    # Not one step runs with the old weights once the new ones are loaded.
    while running_with() == [first]:
        await next_step(engine)
    assert running_with() == [second]
    assert await oplog.publish(RUN, 1, 4, "an older one") == "STALE"
    await oplog.redis.spublish(keys.sampling_published(MODEL), RUN)
    await send(oplog, 1, inflight_run=RUN, max_tokens=100)
    while engine.seen[-1].num_running < 2:
        await next_step(engine)
    assert running_with() == [second, second]
