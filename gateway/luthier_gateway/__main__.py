"""Load the configuration, serve until told to stop, drain, exit."""

import argparse
import os
import sys
from pathlib import Path

from aiohttp import web

from luthier_core.config import Config, load_config
from luthier_core.errors import ConfigError
from luthier_core.lifecycle import run_service, service_lifetime
from luthier_core.telemetry import setup_logging
from luthier_gateway.app import build_app

DRAIN_S = 5.0
"""Requests under way get this long at a stop; long polls are answered at once."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="luthier-gateway", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--name", default="gateway")
    arguments = parser.parse_args(argv)
    setup_logging(arguments.name)
    try:
        return run_service(_serve(load_config(arguments.config, os.environ)))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


async def _serve(config: Config) -> int:
    runner = web.AppRunner(build_app(config), access_log=None, shutdown_timeout=DRAIN_S)
    async with service_lifetime() as stop:
        await runner.setup()
        try:
            site = web.TCPSite(runner, config.gateway.host, config.gateway.port, backlog=1024)
            await site.start()
            await stop.wait()
        finally:
            await runner.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
