"""What the operation log costs, with the ceiling beside each figure.

    python benchmarks/bench_log.py [--quick] [--parts latency,polls] [--minutes 10] [--disk DIR]

Real parts: Valkey with appendfsync always on a disk folder, a registry, two gateways, the trainer's
worker with a toy engine. Prints a table for people and one JSON line for machines per part.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from log.figures import Part
from log.latency import measure_latency


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 s in all: does it run?")
    parser.add_argument(
        "--disk", type=Path, help="folder on the disk to measure (default: temporary)"
    )
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}\n")
    quick = arguments.quick
    parts: dict[str, Callable[[Path], Part]] = {
        "latency": lambda disk: measure_latency(disk, 30 if quick else 1000),
    }
    with tempfile.TemporaryDirectory(prefix="lu-bench-", dir=arguments.disk) as disk:
        for measure in parts.values():
            part = measure(Path(disk))
            print(part.markdown(), part.json(), sep="\n", end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
