"""The trainer's own worker with an engine that computes nothing: a process per --toy.

    python toy_worker.py --config FILE --toy NAME MODEL MS BEGIN [--toy ...]

MS is how long the engine holds its thread for each op; BEGIN which ops are begun before they are
executed: those of a tenure's start (shipped), every one, or none. For bench_log.py.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

from instant_stub import forward_backward_result

from log.traffic import FACTS
from luthier_core import keys, protocol
from luthier_core.service import WorkerParts, worker_main
from luthier_trainer.engine_client import ThreadEngine
from luthier_trainer.execution import Executor
from luthier_trainer.worker import Worker

PROBATION = {"shipped": protocol.PROBATION, "every": 10**9, "none": 0}


class ToyEngine:
    """Answers as the engine does; its thread is busy for op_s, as it would be with a GPU's."""

    def __init__(self, op_s: float) -> None:
        self._op_s = op_s
        self._result = forward_backward_result()

    def create(self, run_id: str, spec: Any) -> None:
        pass

    def forward_backward(self, run_id: str, request: bytes, **options: Any) -> bytes:
        self._work()
        return self._result

    def optim_step(self, run_id: str, params: Any) -> dict[str, float]:
        self._work()
        return {"step": 1.0, "learning_rate": params.learning_rate}

    def clear_gradient(self, run_id: str) -> None:
        pass

    def checksum(self, run_id: str) -> str:
        return "0"

    def drop(self, run_id: str) -> None:
        pass

    def _work(self) -> None:
        if self._op_s:
            time.sleep(self._op_s)


async def work(parts: WorkerParts, op_s: float) -> None:
    name = parts.model.name
    await parts.oplog.redis.set(keys.model_facts(name), json.dumps(FACTS))
    engine = ThreadEngine(ToyEngine(op_s))
    try:
        worker = Worker(
            base_model=name,
            config=parts.config.trainer,
            lease=parts.lease,
            oplog=parts.oplog,
            blobs=parts.blobs,
            executor=Executor(engine, parts.blobs, parts.oplog),
            first_cycle=0,
        )
        await worker.run(parts.stop)
    finally:
        await engine.close()


def serve(name: str, model: str, op_ms: float, begin: str, config: str) -> int:
    protocol.PROBATION = PROBATION[begin]
    argv = ["--config", config, "--name", name, "--model", model]
    return worker_main(
        argv, os.environ, role="trainer", work=lambda parts: work(parts, op_ms / 1000)
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--name", help="of this process, for the logs")
    parser.add_argument("--toy", action="append", nargs=4, metavar=("NAME", "MODEL", "MS", "BEGIN"))
    arguments = parser.parse_args()
    children = []
    for name, model, op_ms, begin in arguments.toy:
        # Forked after the imports: torch takes seconds to import, and nothing runs yet.
        child = os.fork()
        if child == 0:
            return serve(name, model, float(op_ms), begin, arguments.config)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main())
