"""What a part tells whoever runs it: /livez, /readyz and /metrics, on a port that no user reaches.

Off unless the part is started with `--ops HOST:PORT`. Nothing here has a key: keep the port inside
of the cluster (deploy/k8s).
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from luthier_core.errors import ConfigError, LuthierError
from luthier_core.oplog import REDIS_ERRORS

log = logging.getLogger(__name__)

STARTING = "starting"
DRAINING = "draining"


@dataclass(slots=True)
class Ops:
    """What one process says of itself; the service fills it in as it starts."""

    role: str
    base_model: str = ""
    readiness: Callable[[], Awaitable[str]] | None = None
    """Why this process cannot serve, empty if it can; None while it starts."""
    draining: Callable[[], bool] = lambda: False
    before_scrape: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    """Awaited before the metrics are read: what has to be asked for."""

    async def unready(self) -> str:
        """Why this process cannot serve; empty if it can."""
        if self.draining():
            return DRAINING
        if self.readiness is None:
            return STARTING
        try:
            return await self.readiness()
        except (LuthierError, *REDIS_ERRORS) as error:
            return repr(error)[:200]


class Exposed(Collector):
    """The metrics of one part: its own, and those of any process; with its base model's name."""

    def __init__(self, source: Collector, role: str, base_model: str) -> None:
        self._source = source
        self._role = role
        self._labels: Mapping[str, str] = {"base_model": base_model} if base_model else {}

    def collect(self) -> Iterator[Metric]:
        for metric in self._source.collect():
            if metric.name.startswith("luthier_"):
                if not metric.name.startswith(f"luthier_{self._role}_"):
                    continue
                metric.samples = [
                    sample._replace(labels={**self._labels, **sample.labels})
                    for sample in metric.samples
                    if not sample.name.endswith("_created")
                ]
            yield metric


@contextlib.asynccontextmanager
async def serve_ops(address: str, ops: Ops) -> AsyncIterator[None]:
    """Serve `ops` at HOST:PORT inside the block; nowhere if that is empty."""
    if not address:
        yield
        return
    host, port = parse_address(address)
    runner = web.AppRunner(build_app(ops), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(f"--ops {address}: {error}") from error
        yield
    finally:
        await runner.cleanup()


def serve_ops_in_thread(address: str, ops: Ops) -> None:
    """Serve `ops` until this process ends, beside a main program that has no event loop.

    It is ready at once: such a program takes work, and nobody asks it for any.
    """
    parse_address(address)

    async def ready() -> str:
        return ""

    async def serve() -> None:
        async with serve_ops(address, ops):
            await asyncio.Event().wait()

    ops.readiness = ready
    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True, name="ops").start()


def build_app(ops: Ops) -> web.Application:
    """The three paths."""
    exposed = Exposed(REGISTRY, ops.role, ops.base_model)

    async def livez(request: web.Request) -> web.Response:
        """The event loop turns."""
        return web.json_response({"status": "ok"})

    async def readyz(request: web.Request) -> web.Response:
        if detail := await ops.unready():
            return web.json_response({"status": "unready", "detail": detail}, status=503)
        return web.json_response({"status": "ok"})

    async def metrics(request: web.Request) -> web.Response:
        for prepare in ops.before_scrape:
            try:
                await prepare()
            except REDIS_ERRORS as error:  # the rest is worth having, and Redis has its own alert
                log.warning("metrics without the queues: %r", error)
        return web.Response(
            body=generate_latest(exposed), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    app = web.Application()
    app.add_routes(
        [web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", metrics)]
    )
    return app


def parse_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; ConfigError if it is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--ops: {address!r} is not HOST:PORT, such as 0.0.0.0:9090")
    return host.strip("[]"), int(port)
