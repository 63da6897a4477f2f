"""Load the configuration, serve until told to stop, drain, exit."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from luthier_core.config import Config
from luthier_core.errors import ConfigError
from luthier_core.lifecycle import service_lifetime
from luthier_core.ops_server import Ops
from luthier_core.service import service_main
from luthier_core.store_probe import probe_store
from luthier_registry.app import build_app, unready
from luthier_registry.web_io import OBSERVER

DRAIN_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    return service_main(argv, os.environ, role="registry", serve=_serve)


async def _serve(config: Config, ops: Ops) -> int:
    await probe_store(config)
    app = build_app(config)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=DRAIN_S)
    async with service_lifetime() as stop:
        ops.draining = stop.is_set
        await runner.setup()
        try:
            try:
                await _site(runner, config).start()
            except OSError as error:
                raise ConfigError(f"registry_url: {config.registry_url}: {error}") from error
            ops.readiness = partial(unready, app)
            ops.before_scrape.append(app[OBSERVER].refresh)
            await stop.wait()
        finally:
            await runner.cleanup()
    return 0


def _site(runner: web.AppRunner, config: Config) -> web.BaseSite:
    """Where registry_listen says, or registry_url: unix:///path/to/socket or http://host:port."""
    url = f"http://{config.registry_listen}" if config.registry_listen else config.registry_url
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path:
        # A socket that a killed process left would make this start fail.
        Path(parts.path).unlink(missing_ok=True)
        return web.UnixSite(runner, parts.path)
    if parts.scheme == "http" and parts.hostname and parts.port:
        return web.TCPSite(runner, parts.hostname, parts.port)
    raise ConfigError(f"registry_url: {url!r} is not unix:///path or http://host:port")


if __name__ == "__main__":
    sys.exit(main())
