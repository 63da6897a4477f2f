"""Load the base model, take the lease, train until told to stop."""

import json
import os
import sys
from collections.abc import Sequence

from luthier_core import keys
from luthier_core.blobs import outlasting_outage
from luthier_core.service import WorkerParts, worker_main
from luthier_model.base import BaseModel, load_base_model
from luthier_trainer.engine import Engine
from luthier_trainer.execution import Executor
from luthier_trainer.stored_snapshots import StoredSnapshots
from luthier_trainer.worker import Worker

CYCLES_PER_START = 10**9
"""Clock cycles set aside for one start, so that their numbers grow over restarts."""


def main(argv: Sequence[str] | None = None) -> int:
    return worker_main(argv, os.environ, role="trainer", work=_work)


async def _work(parts: WorkerParts) -> None:
    wanted, settings, client = parts.model, parts.config.trainer, parts.oplog.redis
    model = await parts.load(lambda: load_base_model(wanted.name, wanted.path, dtype=wanted.dtype))
    facts = json.dumps(facts_of(model))
    await client.set(keys.model_facts(wanted.name), facts)
    await outlasting_outage(
        lambda: parts.blobs.put(keys.model_facts_object(wanted.name), facts.encode())
    )
    engine = Engine(
        model,
        logprob_chunk_tokens=settings.logprob_chunk_tokens,
        num_threads=settings.num_threads,
    )
    fused = settings.execution == "fused"
    executor = Executor(engine, parts.blobs, parts.oplog, fused=fused)
    try:
        worker = Worker(
            base_model=wanted.name,
            config=settings,
            lease=parts.lease,
            oplog=parts.oplog,
            blobs=parts.blobs,
            executor=executor,
            snapshots=StoredSnapshots(executor, parts.blobs, settings),
            first_cycle=await client.incrby(keys.clock_cycles(wanted.name), CYCLES_PER_START),
        )
        await worker.run(parts.stop)
    finally:
        executor.close()


def facts_of(model: BaseModel) -> dict[str, object]:
    """What the gateway checks requests against, and tells clients."""
    return {**model.facts.to_json(), "tokenizer_id": model.facts.path}


if __name__ == "__main__":
    sys.exit(main())
