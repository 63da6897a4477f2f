"""A trainer process whose engine is a toy: the real worker, effects and executor around it."""

import json
import os
from collections.abc import Sequence

from tests.cluster.toy import ToyEngine

from luthier_core import keys
from luthier_core.owner import Step
from luthier_core.service import WorkerParts, worker_main
from luthier_trainer import worker
from luthier_trainer.engine_client import ThreadEngine
from luthier_trainer.execution import Executor
from luthier_trainer.snapshots import Spent
from luthier_trainer.stored_snapshots import StoredSnapshots

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


class OftenStored(StoredSnapshots):
    """A snapshot of every fifth op."""

    def due(self, spent: Spent, step: Step) -> bool:
        return step.op.seq % SNAPSHOT_EVERY == SNAPSHOT_EVERY - 1


def main(argv: Sequence[str]) -> int:
    worker.SWEEP_S = SWEEP_S
    return worker_main(argv, os.environ, role="trainer", work=_work)


async def _work(parts: WorkerParts) -> None:
    client = parts.oplog.redis
    await client.set(keys.model_facts(BASE_MODEL), json.dumps(FACTS))
    engine = ThreadEngine(ToyEngine())
    try:
        await worker.Worker(
            base_model=BASE_MODEL,
            config=parts.config.trainer,
            lease=parts.lease,
            oplog=parts.oplog,
            blobs=parts.blobs,
            executor=Executor(engine, parts.blobs, parts.oplog),
            first_cycle=await client.incrby(keys.clock_cycles(BASE_MODEL), 1_000_000),
            snapshots=OftenStored(engine, parts.blobs, parts.config.trainer),
        ).run(parts.stop)
    finally:
        await engine.close()
