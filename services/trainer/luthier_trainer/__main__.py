"""Load the configuration and the base model, take the lease, work until told to stop."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

from luthier_core import keys
from luthier_core.blobs import open_blobs
from luthier_core.config import Config, load_config
from luthier_core.errors import ConfigError
from luthier_core.lifecycle import WorkerLease, run_service, service_lifetime
from luthier_core.oplog import Oplog, connect
from luthier_core.redis_server import check_server
from luthier_core.telemetry import setup_logging
from luthier_model.base import BaseModel, load_base_model
from luthier_trainer.engine import Engine
from luthier_trainer.execution import Executor
from luthier_trainer.worker import Worker

CYCLES_PER_START = 1_000_000
"""Clock cycles set aside for one start, so that their numbers grow over restarts."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="luthier-trainer", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--name", required=True, help="unique among all workers, e.g. trainer-0")
    parser.add_argument("--model", required=True, help="name of the base model to train on")
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
    trainer = config.trainer
    async with contextlib.AsyncExitStack() as stack:
        stop = await stack.enter_async_context(service_lifetime())
        client = connect(config.redis_url)
        stack.push_async_callback(client.aclose)
        await check_server(client, allow_volatile=config.allow_volatile_redis)
        oplog = Oplog(client)
        await oplog.load_library()
        lease = WorkerLease(
            oplog, name, role="trainer", base_model=model_name, lease_s=trainer.lease_s
        )
        await lease.take()
        starting = asyncio.create_task(lease.keep(trainer.lease_renew_s))
        model = await asyncio.to_thread(_load, config, model_name)
        starting.cancel()
        blobs = await stack.enter_async_context(open_blobs(config))
        await client.set(keys.model_facts(model_name), json.dumps(facts_of(model)))
        engine = Engine(
            model,
            logprob_chunk_tokens=trainer.logprob_chunk_tokens,
            num_threads=trainer.num_threads,
        )
        executor = Executor(engine, blobs, oplog)
        stack.callback(executor.close)
        first_cycle = await client.incrby(keys.clock_cycles(model_name), CYCLES_PER_START)
        worker = Worker(
            base_model=model_name,
            config=trainer,
            lease=lease,
            oplog=oplog,
            blobs=blobs,
            executor=executor,
            first_cycle=first_cycle,
        )
        await worker.run(stop)
        return 1 if lease.lost.is_set() else 0


def _load(config: Config, model_name: str) -> BaseModel:
    model = config.model(model_name)
    return load_base_model(model.name, model.path, dtype=model.dtype)


def facts_of(model: BaseModel) -> dict[str, object]:
    """What the gateway checks requests against, and tells clients."""
    return {**model.facts.to_json(), "tokenizer_id": model.facts.path}


if __name__ == "__main__":
    sys.exit(main())
