"""Save or restore a deployment: python -m luthier_registry.backup save|restore"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from luthier_core.config import load_config
from luthier_core.errors import ConfigError
from luthier_core.oplog import REDIS_ERRORS
from luthier_core.service import EXIT_REFUSED
from luthier_registry.backup import restore, save


def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0 and a line that says what was done, or 2 and one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m luthier_registry.backup", description=__doc__)
    parser.add_argument("what", choices=["save", "restore"])
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--folder", type=Path, required=True, help="of the backup")
    arguments = parser.parse_args(argv)
    folder = arguments.folder
    try:
        config = load_config(arguments.config, os.environ)
        done = save(config, folder) if arguments.what == "save" else restore(config, folder)
    except (ConfigError, OSError, *REDIS_ERRORS) as error:
        print(error, file=sys.stderr)
        return EXIT_REFUSED
    print(f"{arguments.what}: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
