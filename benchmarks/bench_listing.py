"""Time and memory to list 100,000 checkpoints and 10,000 runs, page by page, through a registry.

    python benchmarks/bench_listing.py [--runs 10000] [--checkpoints 100000] [--pages 300]

Index-bound: a page is one Redis round trip for its ids and one for its rows, so it should cost the
same at every offset and at every size of the list. The rows are written through Listing, as a save
writes them; the object store is not asked for a list. Held to: p99 of a page below 50 ms, and a
registry that does not grow while every page is read.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from luthier_core.config import Config, HousekeepingConfig, ModelConfig, dump_config
from luthier_core.listing import Listing
from luthier_core.oplog import connect
from luthier_core.records import CheckpointRecord, LoraConfig, RunRecord, SessionRecord
from luthier_core.registry_client import RegistryClient
from luthier_core.testing import running_valkey

TENANT, MODEL = "ann", "tiny"
PAGE = 100
START = datetime(2026, 1, 2, tzinfo=UTC)
WRITERS = 32
MAX_P99_MS = 50.0
MAX_GROWTH_BYTES = 32 * 2**20
LORA = LoraConfig(rank=32, seed=0)
Call = Callable[[int], Awaitable[Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--checkpoints", type=int, default=100_000)
    parser.add_argument("--pages", type=int, default=300, help="of each list, at random offsets")
    options = parser.parse_args()
    with running_valkey() as redis_url, tempfile.TemporaryDirectory(prefix="lu-bl-") as folder:
        return asyncio.run(_measure(_configure(Path(folder), redis_url), Path(folder), options))


def _configure(folder: Path, redis_url: str) -> Config:
    (folder / "secret").write_text("ab" * 32)
    config = Config(
        redis_url=redis_url,
        store_url=f"file://{folder}/store",
        registry_url=f"unix://{folder}/s",
        secret_file=str(folder / "secret"),
        housekeeping=HousekeepingConfig(runner="celery"),
        models=(ModelConfig(name=MODEL, path="/none"),),
    )
    (folder / "config.toml").write_text(dump_config(config))
    return config


async def _measure(config: Config, folder: Path, options: argparse.Namespace) -> int:
    await _fill(config, options.runs, options.checkpoints)
    argv = [sys.executable, "-m", "luthier_registry", "--config", str(folder / "config.toml")]
    registry = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.PIPE)
    try:
        async with RegistryClient(config) as client:
            await client.list_runs(TENANT, limit=1, offset=0)  # waits until it listens
            return await _report(client, registry.pid, options)
    finally:
        registry.terminate()
        await registry.wait()


async def _fill(config: Config, num_runs: int, num_checkpoints: int) -> None:
    """Ten runs a session; the checkpoints go round."""
    run_ids = [f"{number // 10:032x}:train:{number % 10}" for number in range(num_runs)]
    room = asyncio.Semaphore(WRITERS)
    async with connect(config.redis_url) as redis:
        listing = Listing(redis, TENANT)

        async def add(call: Awaitable[None]) -> None:
            async with room:
                await call

        sessions = (listing.add_session(_session(n)) for n in range(-(-num_runs // 10)))
        runs = (listing.add_run(_run(run_id, n)) for n, run_id in enumerate(run_ids))
        saved = (
            listing.add_checkpoint(_checkpoint(run_ids[n % num_runs], n))
            for n in range(num_checkpoints)
        )
        for calls in (sessions, runs, saved):
            await asyncio.gather(*map(add, calls))


def _session(number: int) -> SessionRecord:
    return SessionRecord(
        session_id=f"{number:032x}", tenant=TENANT, created_at=START, project_id=f"p{number % 10}"
    )


def _run(run_id: str, number: int) -> RunRecord:
    return RunRecord(
        run_id=run_id,
        tenant=TENANT,
        session_id=run_id.partition(":")[0],
        base_model=MODEL,
        lora=LORA,
        optimizer_config={"type": "adamw"},
        user_metadata={"experiment": str(number)},
        created_at=START + timedelta(seconds=number),
    )


def _checkpoint(run_id: str, number: int) -> CheckpointRecord:
    return CheckpointRecord(
        tenant=TENANT,
        run_id=run_id,
        kind="sampler_weights" if number % 2 else "weights",
        name=f"step-{number:06}",
        seq=number,
        manifest_key=f"t/{TENANT}/runs/{run_id}/man/{number}",
        manifest_digest="0" * 64,
        size_bytes=185_000_000,
        created_at=START + timedelta(seconds=number),
        expires_at=START + timedelta(days=3650) if number % 3 == 0 else None,
        user_metadata={"step": str(number)},
        base_model=MODEL,
        lora=LORA,
    )


async def _report(client: RegistryClient, pid: int, options: argparse.Namespace) -> int:
    rng, process = random.Random(7), psutil.Process(pid)
    lists: dict[str, tuple[int, Call]] = {
        "checkpoints": (
            options.checkpoints,
            lambda offset: client.list_checkpoints(TENANT, limit=PAGE, offset=offset),
        ),
        "runs": (
            options.runs,
            lambda offset: client.list_runs(TENANT, limit=PAGE, offset=offset),
        ),
        "runs of a project": (
            options.runs // 10,
            lambda offset: client.list_runs(TENANT, limit=PAGE, offset=offset, project_id="p3"),
        ),
    }
    failed = False
    for name, (size, call) in lists.items():
        for offset in range(0, min(size, 20 * PAGE), PAGE):
            await call(offset)
        before = process.memory_info().rss
        times = [await _timed(call, rng.randrange(size)) for _ in range(options.pages)]
        for offset in range(0, size, PAGE):
            times.append(await _timed(call, offset))
        growth = process.memory_info().rss - before
        times.sort()
        p50, p99 = (1000 * times[int(part * len(times))] for part in (0.5, 0.99))
        failed |= p99 >= MAX_P99_MS or growth >= MAX_GROWTH_BYTES
        print(f"{name:20} {size:7} rows  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms  ", end="")
        print(f"{len(times)} pages of {PAGE}  memory +{growth / 2**20:.1f} MiB")
        row = {"bench": "listing", "list": name, "rows": size, "p50_ms": p50, "p99_ms": p99}
        print(json.dumps({**row, "growth_bytes": growth}))
    return 1 if failed else 0


async def _timed(call: Call, offset: int) -> float:
    began = time.perf_counter()
    await call(offset)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
