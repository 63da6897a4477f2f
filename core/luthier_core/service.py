"""The main program of a service: arguments, configuration, exit codes; what every worker opens."""

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from luthier_core import tracing
from luthier_core.blobs import Blobs, open_blobs
from luthier_core.config import Config, ModelConfig, load_config
from luthier_core.errors import ConfigError, Unavailable
from luthier_core.generation import Generation
from luthier_core.lifecycle import WorkerLease, run_service, service_lifetime
from luthier_core.oplog import Oplog, connect
from luthier_core.ops_server import Ops, serve_ops
from luthier_core.redis_server import check_server
from luthier_core.store_probe import check_store
from luthier_core.telemetry import setup_logging

T = TypeVar("T")
Environ = Mapping[str, str]

CONFIRM_S = 1.0
STORE_START_S = 60.0
"""So long a worker that starts waits for an object store that does not answer."""
EXIT_REFUSED = 2
"""The configuration or the machine does not allow a start; one line on standard error says why."""


def service_main(
    argv: Sequence[str] | None,
    environ: Environ,
    *,
    role: str,
    serve: Callable[[Config, Ops], Coroutine[Any, Any, int]],
) -> int:
    """Run a service that needs its configuration only; the exit code."""
    arguments = service_parser(role).parse_args(argv)

    async def run() -> int:
        setup_logging(arguments.name, environ.get("LUTHIER_LOG_LEVEL", "info"))
        config, ops = load_config(arguments.config, environ), Ops(role)
        tracing.start(role, arguments.name, config.tracing)
        async with serve_ops(arguments.ops, ops):
            return await serve(config, ops)

    return _run(run)


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker has before it loads its model."""

    config: Config
    model: ModelConfig
    stop: asyncio.Event
    oplog: Oplog
    blobs: Blobs
    lease: WorkerLease
    renew_s: float
    ops: Ops

    async def load(self, function: Callable[[], T]) -> T:
        """The result of a slow function, on a thread, while the lease is renewed."""
        return await self.prepare(asyncio.to_thread(function))

    async def prepare(self, preparing: Awaitable[T]) -> T:
        """The result of what comes before the work, while the lease is renewed."""
        renewing = asyncio.create_task(self.lease.keep(self.renew_s))
        try:
            return await preparing
        finally:
            renewing.cancel()


def worker_main(
    argv: Sequence[str] | None,
    environ: Environ,
    *,
    role: Literal["trainer", "sampler"],
    work: Callable[[WorkerParts], Coroutine[Any, Any, None]],
) -> int:
    """Run a worker of one base model; the exit code is 1 if another took its name."""
    arguments = worker_parser(role).parse_args(argv)

    async def run() -> int:
        setup_logging(arguments.name, environ.get("LUTHIER_LOG_LEVEL", "info"))
        config = load_config(arguments.config, environ)
        model = config.model(arguments.model)
        tracing.start(role, arguments.name, config.tracing)
        ops = Ops(role, base_model=model.name)
        async with (
            serve_ops(arguments.ops, ops),
            _open_worker(config, role, arguments.name, model, ops) as parts,
        ):
            await work(parts)
            return 1 if parts.lease.lost.is_set() else 0

    return _run(run)


@contextlib.asynccontextmanager
async def _open_worker(
    config: Config, role: Literal["trainer", "sampler"], name: str, model: ModelConfig, ops: Ops
) -> AsyncIterator[WorkerParts]:
    settings = config.trainer if role == "trainer" else config.sampler
    async with contextlib.AsyncExitStack() as stack:
        stop = await stack.enter_async_context(service_lifetime())
        ops.draining = stop.is_set
        client = connect(config.redis_url)
        stack.push_async_callback(client.aclose)
        await check_server(client, allow_volatile=config.allow_volatile_redis)
        oplog = Oplog(client)
        blobs = await stack.enter_async_context(open_blobs(config))
        await _check_store(blobs, config, stop)
        await _confirmed(Generation(client, blobs), stop)
        await oplog.load_library()
        lease = WorkerLease(oplog, name, role=role, base_model=model.name, lease_s=settings.lease_s)
        await lease.take()
        ops.readiness = partial(_worker_readiness, lease)
        yield WorkerParts(config, model, stop, oplog, blobs, lease, settings.lease_renew_s, ops)


async def _worker_readiness(lease: WorkerLease) -> str:
    return "" if lease.state == "ready" else lease.state


async def _confirmed(generation: Generation, stop: asyncio.Event) -> None:
    """Returns once this Redis is the one that the store knows, or at a stop."""
    while not stop.is_set():
        with contextlib.suppress(Unavailable):
            if await generation.is_confirmed():
                return
        await _pause(stop)


async def _check_store(blobs: Blobs, config: Config, stop: asyncio.Event) -> None:
    """check_store once the store answers, unless there is a stop. ConfigError if it never does."""
    give_up_at = time.monotonic() + STORE_START_S
    while not stop.is_set():
        try:
            return await check_store(blobs, config)
        except Unavailable:
            if time.monotonic() > give_up_at:
                raise ConfigError(
                    f"store_url {config.store_url}: no answer for {STORE_START_S:g} s"
                ) from None
        await _pause(stop)


async def _pause(stop: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CONFIRM_S):
            await stop.wait()


def service_parser(role: str) -> argparse.ArgumentParser:
    """The command line of a gateway or a registry."""
    return _parser(role, name=role)


def worker_parser(role: str) -> argparse.ArgumentParser:
    """The command line of a trainer or a sampler."""
    parser = _parser(role)
    parser.add_argument("--model", required=True, help="name of the base model to work for")
    return parser


def _parser(role: str, name: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"luthier-{role}")
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument(
        "--name", default=name, required=name is None, help="unique among all parts"
    )
    add_ops_argument(parser)
    return parser


def add_ops_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ops",
        default="",
        metavar="HOST:PORT",
        help="serve /livez, /readyz and /metrics here, for whoever runs it; nowhere by default",
    )


def _run(serve: Callable[[], Coroutine[Any, Any, int]]) -> int:
    try:
        return run_service(serve())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_REFUSED
