"""Open long polls on one gateway: memory, CPU while nothing happens, and how fast one wakes up.

Memory-bound by sockets and coroutines. A poll wakes up through the commit, a hint, one read of the
outcome and one HTTP answer; the ceiling is the commit alone, which waits for the disk.
"""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from log.cycles import LIMITS
from log.figures import Part, Sample, ms, p50, p99
from log.rig import Rig, running_rig
from log.traffic import FACTS, Client, open_client
from luthier_core.lifecycle import WorkerLease
from luthier_core.oplog import Oplog, connect
from luthier_core.ops import Body, Kind, Op, Outcome, digest_of

POLLS_PER_RUN = 4
SETTLE_S = 2.0
TENANT = "ann"
MODEL = "toy"
SESSION = "ab" * 16


def measure_polls(disk: Path, num_polls: int, num_wakes: int, idle_s: float) -> Part:
    with running_rig(disk, toys={}, num_gateways=1) as rig:
        return asyncio.run(_measure(rig, num_polls, num_wakes, idle_s))


@dataclass(slots=True)
class Log:
    """The log as a worker sees it that owns every run and executes nothing."""

    oplog: Oplog
    owner: str

    async def create(self, run_id: str) -> None:
        """A run with POLLS_PER_RUN pending ops."""
        facts = {"session_id": SESSION, **FACTS}
        header = {"base_model": MODEL, "facts": json.dumps(facts)}
        for seq in range(POLLS_PER_RUN + 1):
            kind = Kind.FORWARD if seq else Kind.CREATE_MODEL
            op = Op(run_id=run_id, seq=seq, kind=kind, digest=digest_of(b""), body=Body.of(b"{}"))
            await self.oplog.admit(op, tenant=TENANT, limits=LIMITS, header=header)
        await self.oplog.acquire(run_id, 1, self.owner)
        await self.commit(run_id, 0)

    async def commit(self, run_id: str, seq: int) -> None:
        await self.oplog.commit(run_id, 1, seq, Outcome.completed(Body.of(b"{}")))


@contextlib.asynccontextmanager
async def _open_log(rig: Rig) -> AsyncIterator[Log]:
    async with connect(rig.config.redis_url) as client:
        oplog = Oplog(client)
        lease = WorkerLease(oplog, "bench", role="trainer", base_model=MODEL, lease_s=15)
        await lease.take()
        keeping = asyncio.create_task(lease.keep(5))
        yield Log(oplog, lease.owner)
        keeping.cancel()


async def _measure(rig: Rig, num_polls: int, num_wakes: int, idle_s: float) -> Part:
    gateway = rig.gateways[0]
    run_ids = [f"{SESSION}:train:{index}" for index in range(num_polls // POLLS_PER_RUN)]
    part = Part(f"{num_polls:,} open long polls on one gateway")
    async with _open_log(rig) as log, open_client(rig, TENANT) as client:
        for run_id in run_ids:
            await log.create(run_id)
        await _warm_up(client, run_ids)
        before, quiet = gateway.memory_info().rss, await _cores(gateway, min(idle_s, 5.0))
        delivered: dict[str, asyncio.Future[float]] = {}
        polls = [
            asyncio.create_task(_poll(client, f"{run_id}:{seq}", delivered))
            for run_id in run_ids
            for seq in range(1, POLLS_PER_RUN + 1)
        ]
        await _until_open(gateway, num_polls)
        await asyncio.sleep(SETTLE_S)
        per_poll = (gateway.memory_info().rss - before) / num_polls
        idle = await _cores(gateway, idle_s)
        # Seqs of a run are committed in order, runs in turn.
        turns = itertools.product(range(1, POLLS_PER_RUN + 1), run_ids)
        one_by_one = await _wake_in_turn(log, list(itertools.islice(turns, num_wakes)), delivered)
        burst = await _wake_at_once(log, list(itertools.islice(turns, num_wakes)), delivered)
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
    hold_s = rig.config.gateway.poll_hold_s
    part.row("memory per poll, its connection included", f"{per_poll / 1024:.1f} KiB", "")
    part.row("gateway without polls", f"{before / 2**20:.0f} MiB, {quiet:.3f} cores", "")
    part.row("CPU while all wait", f"{idle:.3f} cores", "near 0")
    commits, woken = one_by_one
    part.row("commit sent to the client's byte, one by one", ms(woken), f"commit: {ms(commits)}")
    part.row(f"the same, {num_wakes} commits at once", ms(burst[1]), f"commit: {ms(burst[0])}")
    part.notes.append(
        f"a poll is held {hold_s:g} s and then repeated, so {num_polls / hold_s:.0f} a second are "
        f"answered and opened again; every {rig.config.gateway.recheck_s:g} s all are looked at"
    )
    part.figures |= {
        "polls": num_polls,
        "bytes_per_poll": per_poll,
        "idle_cores": idle,
        "wake_ms_p50": p50(woken),
        "wake_ms_p99": p99(woken),
        "commit_ms_p50": p50(commits),
        "burst_ms_p50": p50(burst[1]),
        "burst_ms_p99": p99(burst[1]),
    }
    return part


async def _warm_up(client: Client, run_ids: Sequence[str]) -> None:
    """What the gateway remembers of every run is no part of a poll."""
    for run_id in run_ids:
        await client.result(0, f"{run_id}:0")


async def _poll(client: Client, request_id: str, ended: dict[str, asyncio.Future[float]]) -> None:
    ended[request_id] = asyncio.get_running_loop().create_future()
    await client.result(0, request_id)
    ended[request_id].set_result(time.perf_counter())


async def _until_open(gateway: psutil.Process, num_polls: int) -> None:
    """Once the gateway has that many connections; the client opens one for each poll."""
    while len(gateway.net_connections("tcp")) < num_polls:  # noqa: ASYNC110
        await asyncio.sleep(0.1)


async def _cores(process: psutil.Process, window_s: float) -> float:
    """Cores that a process keeps busy over a while."""
    start, before = time.perf_counter(), process.cpu_times()
    await asyncio.sleep(window_s)
    after = process.cpu_times()
    busy = after.user + after.system - before.user - before.system
    return max(busy, 0.0) / (time.perf_counter() - start)


async def _wake(
    log: Log, run_id: str, seq: int, ended: dict[str, asyncio.Future[float]]
) -> tuple[float, float]:
    """Milliseconds of the commit, and from before it until its poll had the result."""
    start = time.perf_counter()
    await log.commit(run_id, seq)
    committed = time.perf_counter()
    delivered = await ended[f"{run_id}:{seq}"]
    return 1e3 * (committed - start), 1e3 * (delivered - start)


async def _wake_in_turn(
    log: Log, turns: Sequence[tuple[int, str]], ended: dict[str, asyncio.Future[float]]
) -> tuple[Sample, Sample]:
    times = [await _wake(log, run_id, seq, ended) for seq, run_id in turns]
    return [commit for commit, _ in times], [whole for _, whole in times]


async def _wake_at_once(
    log: Log, turns: Sequence[tuple[int, str]], ended: dict[str, asyncio.Future[float]]
) -> tuple[Sample, Sample]:
    times = await asyncio.gather(*(_wake(log, run_id, seq, ended) for seq, run_id in turns))
    return [commit for commit, _ in times], [whole for _, whole in times]
