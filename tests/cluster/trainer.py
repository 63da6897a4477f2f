"""A trainer process whose engine is a toy: the real worker, effects and executor around it."""

import json
import os
from collections.abc import Sequence
from typing import Any, cast

from tests.cluster.toy import ToyEngine

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.failpoints import failpoint
from luthier_core.ops import digest_of
from luthier_core.owner import Step
from luthier_core.protocol import SnapshotRef
from luthier_core.service import WorkerParts, worker_main
from luthier_trainer import worker
from luthier_trainer.execution import Executor, RunContext

BASE_MODEL = "toy/base"
VOCAB_SIZE = 100
FACTS = {
    "vocab_size": VOCAB_SIZE,
    "max_context_tokens": 100_000,
    "architecture": "toy",
    "tokenizer_id": "toy",
}
SNAPSHOT_EVERY = 5
"""Not a divisor of how many ops lie between optimizer steps: some copies have a gradient."""
SWEEP_S = 0.25
"""How often workers look for runs without an owner; a second costs a test its time."""


class ToySnapshots:
    """Of every fifth op; two small objects, then a manifest with their checksums."""

    def __init__(self, executor: Executor, engine: ToyEngine, blobs: Blobs) -> None:
        self._executor = executor
        self._engine = engine
        self._blobs = blobs

    def due(self, run_id: str, step: Step) -> bool:
        return step.op.seq % SNAPSHOT_EVERY == SNAPSHOT_EVERY - 1

    async def copy(self, run_id: str) -> dict[str, bytes]:
        return await self._executor.on_engine(self._engine.save, run_id, optimizer=True)

    async def put(
        self, run: RunContext, ref: SnapshotRef, copy: dict[str, bytes], missing: tuple[int, ...]
    ) -> None:
        folder = _folder(run, ref)
        for name, data in copy.items():
            await self._blobs.put(folder + name, data)
        await failpoint("sn.manifest")
        files = {name: digest_of(data) for name, data in copy.items()}
        manifest = {"files": files, "missing": missing}
        await self._blobs.put(f"{folder}manifest.json", json.dumps(manifest).encode())

    async def restore(self, run: RunContext, ref: SnapshotRef) -> tuple[int, ...] | None:
        folder = _folder(run, ref)
        try:
            manifest = json.loads(await self._blobs.get(f"{folder}manifest.json"))
            files = {name: await self._blobs.get(folder + name) for name in manifest["files"]}
        except BlobMissing:
            return None
        if {name: digest_of(data) for name, data in files.items()} != manifest["files"]:
            return None
        await self._executor.on_engine(self._engine.restore, run.run_id, files)
        return tuple(manifest["missing"])


def _folder(run: RunContext, ref: SnapshotRef) -> str:
    return f"{keys.run_prefix(run.tenant, run.run_id)}snap/{ref.seq}-{ref.epoch}/"


def main(argv: Sequence[str]) -> int:
    worker.SWEEP_S = SWEEP_S
    return worker_main([*argv, "--model", BASE_MODEL], os.environ, role="trainer", work=_work)


async def _work(parts: WorkerParts) -> None:
    client = parts.oplog.redis
    await client.set(keys.model_facts(BASE_MODEL), json.dumps(FACTS))
    engine = ToyEngine()
    executor = Executor(cast(Any, engine), parts.blobs, parts.oplog)
    try:
        await worker.Worker(
            base_model=BASE_MODEL,
            config=parts.config.trainer,
            lease=parts.lease,
            oplog=parts.oplog,
            blobs=parts.blobs,
            executor=executor,
            first_cycle=await client.incrby(keys.clock_cycles(BASE_MODEL), 1_000_000),
            snapshots=ToySnapshots(executor, engine, parts.blobs),
        ).run(parts.stop)
    finally:
        executor.close()
