"""Load the configuration, serve until told to stop, drain, exit."""

import os
import sys
from collections.abc import Sequence
from functools import partial

from aiohttp import web

from luthier_core.config import Config
from luthier_core.lifecycle import service_lifetime
from luthier_core.ops_server import Ops
from luthier_core.service import service_main
from luthier_core.store_probe import probe_store
from luthier_gateway import health, observing
from luthier_gateway.app import build_app

DRAIN_S = 5.0
"""Requests under way get this long at a stop; long polls are answered at once."""


def main(argv: Sequence[str] | None = None) -> int:
    return service_main(argv, os.environ, role="gateway", serve=_serve)


async def _serve(config: Config, ops: Ops) -> int:
    await probe_store(config)
    app = build_app(config)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=DRAIN_S)
    async with service_lifetime() as stop:
        ops.draining = stop.is_set
        await runner.setup()
        try:
            site = web.TCPSite(runner, config.gateway.host, config.gateway.port, backlog=1024)
            await site.start()
            ops.readiness = partial(health.unready, app)
            ops.before_scrape.append(partial(observing.refresh, app))
            await stop.wait()
        finally:
            await runner.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
