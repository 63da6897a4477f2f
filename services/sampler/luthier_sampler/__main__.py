"""Load the configuration and the base model, take the lease, sample until told to stop."""

import argparse
import asyncio
import contextlib
import os
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from luthier_core.blobs import open_blobs
from luthier_core.config import Config, load_config
from luthier_core.errors import ConfigError
from luthier_core.lifecycle import WorkerLease, run_service, service_lifetime
from luthier_core.oplog import Oplog, connect
from luthier_core.redis_server import check_server
from luthier_core.telemetry import setup_logging
from luthier_model.base import load_base_model
from luthier_sampler.engine import Engine
from luthier_sampler.worker import Worker


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="luthier-sampler", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--name", required=True, help="unique among all workers, e.g. sampler-0")
    parser.add_argument("--model", required=True, help="name of the base model to sample from")
    arguments = parser.parse_args(argv)
    setup_logging(arguments.name)
    try:
        config = load_config(arguments.config, os.environ)
        config.model(arguments.model)
        return run_service(_work(config, arguments.name, arguments.model))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


async def _work(config: Config, name: str, model_name: str) -> int:
    sampler = config.sampler
    async with contextlib.AsyncExitStack() as stack:
        stop = await stack.enter_async_context(service_lifetime())
        client = connect(config.redis_url)
        stack.push_async_callback(client.aclose)
        await check_server(client, allow_volatile=config.allow_volatile_redis)
        oplog = Oplog(client)
        await oplog.load_library()
        lease = WorkerLease(
            oplog, name, role="sampler", base_model=model_name, lease_s=sampler.lease_s
        )
        await lease.take()
        starting = asyncio.create_task(lease.keep(sampler.lease_renew_s))
        engine = await asyncio.to_thread(_load, config, model_name)
        starting.cancel()
        blobs = await stack.enter_async_context(open_blobs(config))
        worker = Worker(
            base_model=model_name,
            config=sampler,
            lease=lease,
            oplog=oplog,
            blobs=blobs,
            engine=engine,
        )
        await worker.run(stop)
        return 1 if lease.lost.is_set() else 0


def _load(config: Config, model_name: str) -> Engine:
    torch.set_num_threads(config.sampler.num_threads)
    wanted = config.model(model_name)
    model = load_base_model(wanted.name, wanted.path, dtype=wanted.dtype)
    tokenizer = AutoTokenizer.from_pretrained(wanted.path, local_files_only=True)
    return Engine(model, tokenizer, config.sampler)


if __name__ == "__main__":
    sys.exit(main())
