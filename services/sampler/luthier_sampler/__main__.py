"""Load the base model, take the lease, sample until told to stop."""

import os
import sys
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from luthier_core.config import ModelConfig, SamplerConfig
from luthier_core.service import WorkerParts, worker_main
from luthier_model.base import load_base_model
from luthier_model.packed_linear import pack_linears
from luthier_sampler.engine import Engine
from luthier_sampler.observing import EngineObserver
from luthier_sampler.worker import Worker


def main(argv: Sequence[str] | None = None) -> int:
    return worker_main(argv, os.environ, role="sampler", work=_work)


async def _work(parts: WorkerParts) -> None:
    settings = parts.config.sampler
    engine = await parts.load(lambda: _load(parts.model, settings))
    parts.ops.before_scrape.append(EngineObserver(engine, settings).refresh)
    worker = Worker(
        base_model=parts.model.name,
        config=settings,
        lease=parts.lease,
        oplog=parts.oplog,
        blobs=parts.blobs,
        engine=engine,
    )
    await worker.run(parts.stop)


def _load(wanted: ModelConfig, settings: SamplerConfig) -> Engine:
    torch.set_num_threads(settings.num_threads)
    model = load_base_model(wanted.name, wanted.path, device=wanted.device, dtype=wanted.dtype)
    pack_linears(model)
    tokenizer = AutoTokenizer.from_pretrained(wanted.path, local_files_only=True)
    return Engine(model, tokenizer, settings)


if __name__ == "__main__":
    sys.exit(main())
