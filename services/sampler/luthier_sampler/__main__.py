"""Load the base model, or start vLLM with it, take the lease, sample until told to stop."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
import torch
from transformers import AutoTokenizer

from luthier_core import keys
from luthier_core.blobs import outlasting_outage
from luthier_core.config import ModelConfig, SamplerConfig
from luthier_core.service import WorkerParts, worker_main
from luthier_model.base import load_base_model
from luthier_model.packed_linear import pack_linears
from luthier_sampler.engine import Engine
from luthier_sampler.engine_thread import EngineThread, SamplerEngine
from luthier_sampler.observing import EngineObserver
from luthier_sampler.vllm_engine import start_vllm_engine
from luthier_sampler.worker import Worker

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
"""What a gateway needs to make tokens of text, and text of tokens."""


def main(argv: Sequence[str] | None = None) -> int:
    return worker_main(argv, os.environ, role="sampler", work=_work)


async def _work(parts: WorkerParts) -> None:
    worker = Worker(
        base_model=parts.model.name,
        config=parts.config.sampler,
        lease=parts.lease,
        oplog=parts.oplog,
        blobs=parts.blobs,
        engine=await _engine(parts),
    )
    await _store_text_files(parts)
    await worker.run(parts.stop)


async def _store_text_files(parts: WorkerParts) -> None:
    folder = Path(parts.model.path)
    texts = {name: (folder / name).read_text() for name in TEXT_FILES if (folder / name).exists()}
    key = keys.model_text_object(parts.model.name)
    await outlasting_outage(lambda: parts.blobs.put(key, orjson.dumps(texts)))


async def _engine(parts: WorkerParts) -> SamplerEngine:
    wanted, settings = parts.model, parts.config.sampler
    if settings.engine == "vllm":
        return await parts.prepare(start_vllm_engine(wanted, settings, os.environ))
    engine = await parts.load(lambda: _load(wanted, settings))
    parts.ops.before_scrape.append(EngineObserver(engine, settings).refresh)
    return EngineThread(engine)


def _load(wanted: ModelConfig, settings: SamplerConfig) -> Engine:
    torch.set_num_threads(settings.num_threads)
    model = load_base_model(wanted.name, wanted.path, device=wanted.device, dtype=wanted.dtype)
    pack_linears(model)
    tokenizer = AutoTokenizer.from_pretrained(wanted.path, local_files_only=True)
    return Engine(model, tokenizer, settings)


if __name__ == "__main__":
    sys.exit(main())
