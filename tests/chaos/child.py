"""A toy trainer whose engine is a process of its own, which some requests kill."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cluster.toy import ToyEngine
from tests.cluster.trainer import FACTS, SWEEP_S, OftenStored

from luthier_core import keys
from luthier_core.proto import wire_pb2
from luthier_core.service import WorkerParts, worker_main
from luthier_trainer import worker
from luthier_trainer.engine_child import outlive_nobody, serve
from luthier_trainer.engine_host import EngineHost
from luthier_trainer.execution import Executor
from luthier_trainer.frames import Message
from luthier_trainer.supervisor import ChildEngine

POISON = 99
"""A request with this token id is the death of the engine."""
ROOT = Path(__file__).parents[2]


class PoisonedEngine(ToyEngine):
    def forward_backward(self, run_id: str, request: bytes, **options: Any) -> bytes:
        message = wire_pb2.ForwardBackwardRequest.FromString(request)
        if any(POISON in _tokens(datum) for datum in message.data):
            os.abort()
        return super().forward_backward(run_id, request, **options)


def _tokens(datum: wire_pb2.Datum) -> Sequence[int]:
    data = b"".join(chunk.encoded_text.tokens for chunk in datum.model_input)
    return memoryview(data).cast("i").tolist()


def main(argv: Sequence[str]) -> int:
    worker.SWEEP_S = SWEEP_S
    return worker_main(argv, os.environ, role="trainer", work=_work)


async def _work(parts: WorkerParts) -> None:
    client, settings = parts.oplog.redis, parts.config.trainer
    await client.set(keys.model_facts(parts.model.name), json.dumps(FACTS))
    engine = ChildEngine(
        [sys.executable, "-m", "tests.chaos.child"],
        Message({}),
        environ={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        op_timeout_s=settings.op_timeout_s,
    )
    try:
        await parts.prepare(engine.start())
        await worker.Worker(
            base_model=parts.model.name,
            config=settings,
            lease=parts.lease,
            oplog=parts.oplog,
            blobs=parts.blobs,
            executor=Executor(engine, parts.blobs, parts.oplog),
            first_cycle=await client.incrby(keys.clock_cycles(parts.model.name), 1_000_000),
            snapshots=OftenStored(engine, parts.blobs, settings),
        ).run(parts.stop)
    finally:
        await engine.close()


def load(hello: dict[str, Any]) -> tuple[EngineHost, dict[str, Any]]:
    return EngineHost(PoisonedEngine()), {}


if __name__ == "__main__":
    outlive_nobody()
    serve(int(sys.argv[1]), load)
