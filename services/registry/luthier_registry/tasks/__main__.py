"""A Celery worker and its beat in one process: python -m luthier_registry.tasks --config FILE"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from luthier_core.config import load_config
from luthier_core.errors import ConfigError
from luthier_core.ops_server import Ops, serve_ops_in_thread
from luthier_core.service import EXIT_REFUSED, add_ops_argument
from luthier_registry.tasks import make_app


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="luthier-housekeeping")
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--name", default="housekeeping", help="unique among all parts")
    add_ops_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        config = load_config(arguments.config, os.environ)
        if arguments.ops:
            serve_ops_in_thread(arguments.ops, Ops("housekeeping"))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_REFUSED
    # solo: jobs take turns in this process, and there is no pool that would idle in memory.
    options = ["worker", "--beat", "--pool=solo", "--loglevel=WARNING", "--without-gossip"]
    # Beat's default scheduler keeps a file, which its process still writes while the worker ends.
    options += ["--scheduler=celery.beat:Scheduler", f"--hostname={arguments.name}@%h"]
    make_app(config).worker_main(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
