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

from log.capacity import measure_bytes, measure_throughput
from log.figures import Part
from log.latency import measure_latency
from log.overload import measure_overload, measure_quota
from log.polls import measure_polls
from log.soak import measure_soak


def main() -> int:
    arguments = _arguments()
    quick, op_ms = arguments.quick, arguments.op_ms
    parts: dict[str, Callable[[Path], Part]] = {
        "latency": lambda disk: measure_latency(disk, 30 if quick else 1000),
        "throughput": lambda disk: measure_throughput(disk, 10 if quick else 200),
        "polls": lambda disk: (
            measure_polls(disk, 200, 20, 2) if quick else measure_polls(disk, 2000, 200, 50)
        ),
        "bytes": lambda disk: measure_bytes(disk, 20 if quick else 500),
        "overload": lambda disk: (
            measure_overload(disk, op_ms, 3, 1) if quick else measure_overload(disk, op_ms, 20, 5)
        ),
        "quota": lambda disk: measure_quota(disk, op_ms, 0.1 if quick else arguments.minutes),
        "soak": lambda disk: (
            measure_soak(disk, arguments.rate, 3, 2)
            if quick
            else measure_soak(disk, arguments.rate, arguments.minutes, 60, arguments.profile)
        ),
    }
    wanted = arguments.parts.split(",") if arguments.parts else list(parts)
    if unknown := set(wanted) - set(parts):
        raise SystemExit(f"--parts: no {sorted(unknown)}; there are {list(parts)}")
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}\n")
    with tempfile.TemporaryDirectory(prefix="lu-bench-", dir=arguments.disk) as disk:
        for name in wanted:
            part = parts[name](Path(disk))
            print(part.markdown(), part.json(), sep="\n", end="\n\n", flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="does it run? figures mean nothing")
    parser.add_argument("--parts", default="", help="names with commas (default: all)")
    parser.add_argument("--disk", type=Path, help="folder on the disk to measure (default: /tmp)")
    parser.add_argument("--minutes", type=int, default=10, help="of the soak and the quota")
    parser.add_argument("--rate", type=float, default=100, help="ops per second of the soak")
    parser.add_argument("--op-ms", type=float, default=20, help="of the overload's toy engine")
    parser.add_argument("--profile", type=int, default=0, help="top costs of a gateway to print")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
