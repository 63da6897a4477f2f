"""A steady load for minutes: does anything grow or slow down?

Half of what the service can do would measure queues, so the rate is given. What a snapshot will do,
trim the log, is done from here every TRIM_EVERY ops; delivered outcomes are kept for TTL_S instead
of an hour, so that a short run sees them expire. What is left after the first minute must be flat.
"""

import asyncio
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from log.costs import top_costs
from log.figures import Part, Sample, p50, p99, slope
from log.rig import Rig, Toy, running_rig
from log.traffic import Client, Run, open_client
from luthier_core.oplog import Oplog, connect

MODEL = "toy"
NUM_RUNS = 16
TRIM_EVERY = 64
TTL_S = 30.0


@dataclass(slots=True)
class Window:
    """What happened in one minute, or whatever one row of the table is."""

    latencies: Sample = field(default_factory=list)
    took_s: float = 0.0
    rss_mib: dict[str, float] = field(default_factory=dict)
    used_mib: float = 0.0
    """The server's used_memory."""

    @property
    def ops_per_s(self) -> float:
        return len(self.latencies) / self.took_s


def measure_soak(disk: Path, rate: float, num_windows: int, window_s: float, top: int = 0) -> Part:
    """`rate` in ops per second; with `top` that many costs of the first gateway, by cProfile."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        environ = {"LUTHIER_BENCH_TTL_S": str(TTL_S)}
        if top:
            environ["LUTHIER_BENCH_PROFILE"] = str(profile)
        with running_rig(disk, toys={MODEL: Toy()}, environ=environ) as rig:
            windows = asyncio.run(_windows(rig, rate, num_windows, window_s))
        part = _report(rate, windows, window_s)
        if top:
            part.notes += top_costs(profile, top)
    return part


async def _windows(rig: Rig, rate: float, num_windows: int, window_s: float) -> list[Window]:
    windows: list[Window] = []
    async with open_client(rig) as client, connect(rig.config.redis_url) as direct:
        trim = Trim(Oplog(direct))
        runs = await _create(client)
        for _ in range(num_windows):
            window = Window()
            start = time.perf_counter()
            async with asyncio.TaskGroup() as ops:
                for index in range(int(rate * window_s)):
                    await asyncio.sleep(max(start + index / rate - time.perf_counter(), 0))
                    ops.create_task(_op(runs[index % len(runs)], index, window, trim))
            window.took_s = time.perf_counter() - start
            window.rss_mib = {
                name: process.memory_info().rss / 2**20 for name, process in rig.processes.items()
            }
            memory = await cast(Any, direct.info("memory"))
            window.used_mib = int(memory["used_memory"]) / 2**20
            windows.append(window)
    return windows


async def _create(client: Client) -> list[Run]:
    session = await client.session()
    return [await client.run(MODEL, session, index) for index in range(NUM_RUNS)]


async def _op(run: Run, index: int, window: Window, trim: "Trim") -> None:
    seq = run.next_seq
    _, delivered = await run.op(post=index, poll=index + 1)
    window.latencies.append(delivered)
    if seq % TRIM_EVERY == 0:
        await trim(run.run_id, seq - TRIM_EVERY)


@dataclass(slots=True)
class Trim:
    """What the owner of a run does after a snapshot."""

    oplog: Oplog

    async def __call__(self, run_id: str, seq: int) -> None:
        header = await self.oplog.header(run_id)
        assert header is not None
        await self.oplog.trim(run_id, header.epoch, seq)


def _report(rate: float, windows: list[Window], window_s: float) -> Part:
    names = sorted(windows[0].rss_mib)
    part = Part(f"{len(windows)} times {window_s:g} s at {rate:g} ops/s through two gateways")
    part.head = ("", "ops/s", "p50 ms", "p99 ms", *(f"{name} MiB" for name in names), "used MiB")
    for number, window in enumerate(windows, 1):
        part.row(str(number), *(f"{value:.2f}" for value in _columns(window, names).values()))
    # The first window has warm-up in it, and nothing has expired yet.
    settled = [_columns(window, names) for window in (windows[1:] or windows)]
    slopes = {name: slope([columns[name] for columns in settled]) for name in settled[0]}
    part.row("slope per row", *(f"{value:+.3f}" for value in slopes.values()))
    part.notes.append(f"resident memory; slopes from row 2 on; outcomes are kept {TTL_S:g} s")
    last = _columns(windows[-1], names)
    part.figures |= {f"{name} last": value for name, value in last.items()}
    part.figures |= {f"{name} slope": value for name, value in slopes.items()}
    return part


def _columns(window: Window, names: list[str]) -> Mapping[str, float]:
    return {
        "ops_per_s": window.ops_per_s,
        "ms_p50": p50(window.latencies),
        "ms_p99": p99(window.latencies),
        **{f"{name} MiB": window.rss_mib[name] for name in names},
        "used MiB": window.used_mib,
    }
