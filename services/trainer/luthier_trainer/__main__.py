"""Start the engine's process, take the lease, train until told to stop."""

import json
import os
import sys
from collections.abc import Sequence

from luthier_core import keys
from luthier_core.blobs import outlasting_outage
from luthier_core.service import WorkerParts, worker_main
from luthier_trainer.execution import Executor
from luthier_trainer.frames import Message
from luthier_trainer.stored_snapshots import StoredSnapshots
from luthier_trainer.supervisor import ChildEngine
from luthier_trainer.worker import Worker

CYCLES_PER_START = 10**9
"""Clock cycles set aside for one start, so that their numbers grow over restarts."""
_SECRETS = ("AWS_", "REDIS_", "LUTHIER_LINK_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""How the names of variables begin that the engine's process does not get."""


def main(argv: Sequence[str] | None = None) -> int:
    return worker_main(argv, os.environ, role="trainer", work=_work)


async def _work(parts: WorkerParts) -> None:
    wanted, settings, client = parts.model, parts.config.trainer, parts.oplog.redis
    engine = ChildEngine(
        [sys.executable, "-m", "luthier_trainer.engine_child", f"{parts.lease.name}/engine"],
        Message(
            {
                "name": wanted.name,
                "path": wanted.path,
                "tokenizer_id": wanted.tokenizer or wanted.path,
                "device": wanted.device,
                "dtype": wanted.dtype,
                "logprob_chunk_tokens": settings.logprob_chunk_tokens,
                "num_threads": settings.num_threads,
                "device_runs": settings.device_runs,
                "applies_nonfinite": settings.nonfinite == "apply",
            }
        ),
        # No secrets: it works for every tenant, and needs neither store nor Redis.
        environ={
            **{name: os.environ[name] for name in os.environ if not name.startswith(_SECRETS)},
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS is not deterministic
        },
        op_timeout_s=settings.op_timeout_s,
    )
    try:
        await parts.prepare(engine.start())
        facts = json.dumps(engine.ready["facts"])
        await client.set(keys.model_facts(wanted.name), facts)
        await outlasting_outage(
            lambda: parts.blobs.put(keys.model_facts_object(wanted.name), facts.encode())
        )
        worker = Worker(
            base_model=wanted.name,
            config=settings,
            lease=parts.lease,
            oplog=parts.oplog,
            blobs=parts.blobs,
            executor=Executor(
                engine, parts.blobs, parts.oplog, fused=settings.execution == "fused"
            ),
            snapshots=StoredSnapshots(engine, parts.blobs, settings),
            first_cycle=await client.incrby(keys.clock_cycles(wanted.name), CYCLES_PER_START),
        )
        parts.ops.before_scrape.append(worker.observe)
        await worker.run(parts.stop)
    finally:
        await engine.close()


if __name__ == "__main__":
    sys.exit(main())
