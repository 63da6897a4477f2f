"""A sampler process whose engine is a toy: it draws a hash of the weights and the request."""

import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
from tests.cluster.trainer import VOCAB_SIZE

from luthier_core.proto import wire_pb2
from luthier_core.service import WorkerParts, worker_main
from luthier_sampler import worker
from luthier_sampler.engine import Finished
from luthier_sampler.engine_thread import EngineThread
from luthier_sampler.sequence import SampleRequest

MAX_DELIVERIES = 20
"""We kill the only sampler more often in a row than a request may survive elsewhere."""


class ToySampler:
    """Every request takes two steps, so that one can be killed between them."""

    def __init__(self) -> None:
        self._adapters: dict[str, bytes] = {}
        self._waiting: dict[str, tuple[SampleRequest, int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def has_adapter(self, adapter: str) -> bool:
        return adapter in self._adapters

    def add_adapter(self, adapter: str, files: Mapping[str, bytes]) -> None:
        self._adapters[adapter] = files["state.json"]

    def add(self, request: SampleRequest) -> None:
        self._waiting[request.request_id] = request, 0

    def cancel(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)

    def step(self) -> list[Finished]:
        finished = []
        for request_id, (request, num_steps) in list(self._waiting.items()):
            self._waiting[request_id] = request, num_steps + 1
            if num_steps:
                del self._waiting[request_id]
                finished.append(Finished(request_id, self._response(request)))
        return finished

    def partials(self) -> dict[str, str]:
        return {}

    def _response(self, request: SampleRequest) -> bytes:
        weights = self._adapters.get(request.adapter, b"")
        sequences = []
        for index in range(request.num_samples):
            drawn = f"{weights!r} {list(request.prompt)} {request.seed} {index}".encode()
            tokens = [byte % VOCAB_SIZE for byte in blake2b(drawn, digest_size=8).digest()]
            sequences.append(_sequence(tokens))
        encoded: bytes = wire_pb2.SampleResponse(sequences=sequences).SerializeToString()
        return encoded


def _sequence(tokens: Sequence[int]) -> wire_pb2.SampledSequence:
    return wire_pb2.SampledSequence(
        stop_reason=wire_pb2.STOP_REASON_LENGTH,
        tokens=np.asarray(tokens, dtype="<i4").tobytes(),
        logprobs=np.asarray([-token for token in tokens], dtype="<f4").tobytes(),
    )


def main(argv: Sequence[str]) -> int:
    worker.MAX_DELIVERIES = MAX_DELIVERIES
    return worker_main(argv, os.environ, role="sampler", work=_work)


async def _work(parts: WorkerParts) -> None:
    await worker.Worker(
        base_model=parts.model.name,
        config=parts.config.sampler,
        lease=parts.lease,
        oplog=parts.oplog,
        blobs=parts.blobs,
        engine=EngineThread(ToySampler()),  # type: ignore[arg-type]
    ).run(parts.stop)
