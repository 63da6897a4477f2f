"""From POST on one gateway to the result's bytes on another, and what `begin` adds.

Disk-bound where an fsync is slow: the way has two fsyncs (admit, commit), or three with `begin`.
The aim is 3 fsync + 5 ms, with the fsync of the same disk measured in the same run. Three workers
with three rules for `begin` take turns op by op, so that whatever else happens hits all alike.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import redis

from log.figures import Part, Sample, ms, p50, p99
from log.rig import Rig, Toy, running_rig
from log.traffic import open_client

ALLOWANCE_MS = 5.0
NUM_FSYNC = 3
WARMUP = 20
"""Ops before the first that counts: beyond the probation of a new owner."""
RULES = {
    "shipped": "begin as shipped (the first ops of a tenure, and saves)",
    "every": "begin before every op",
    "none": "no begin: fenced commit only",
}


def measure_latency(disk: Path, num_ops: int) -> Part:
    toys = {rule: Toy(begin=rule) for rule in RULES}
    with running_rig(disk, toys=toys) as rig:
        return _report(asyncio.run(_take_turns(rig, disk, num_ops)))


async def _take_turns(rig: Rig, disk: Path, num_ops: int) -> dict[str, Sample]:
    """Milliseconds by what was timed; each thing once a round, as the disk has moods of its own."""
    times: dict[str, Sample] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))

    lease = json.dumps({"incarnation": "bench", "padding": "x" * 160})
    with (
        (disk / "fsync").open("wb", buffering=0) as file,
        redis.Redis.from_url(rig.config.redis_url) as direct,
    ):

        def append() -> None:
            file.write(b"x" * 200)
            os.fsync(file.fileno())

        async with open_client(rig) as client:
            runs = {rule: await client.run(rule) for rule in RULES}
            for index in range(WARMUP + num_ops):
                if index == WARMUP:
                    times.clear()
                timed("fsync", append)
                timed("set", lambda: direct.set("bench:value", b"x" * 200))
                hold = ("lu1_hold_lease", 1, "bench:lease", "bench", lease, 60_000)
                timed("fcall", lambda hold=hold: direct.fcall(*hold))
                for rule, run in runs.items():
                    accepted, delivered = await run.op(post=0, poll=1)
                    times.setdefault("accepted", []).append(accepted)
                    times.setdefault(rule, []).append(delivered)
    return times


def _report(times: dict[str, Sample]) -> Part:
    fsync, fcall = p50(times["fsync"]), p50(times["fcall"])
    aim = NUM_FSYNC * fsync + ALLOWANCE_MS
    verdict = "holds" if p50(times["shipped"]) <= aim else "missed"
    part = Part("latency through two gateways (p50 / p99)")
    part.row("one fsync of this disk", ms(times["fsync"]), "")
    part.row("one SET, appendfsync always", ms(times["set"]), f"fsync {fsync:.2f} ms")
    part.row("one FCALL, appendfsync always", ms(times["fcall"]), f"fsync {fsync:.2f} ms")
    part.row("POST answered (admit)", ms(times["accepted"]), f"FCALL {fcall:.2f} ms")
    for rule, name in RULES.items():
        wanted = f"p50 <= 3 fsync + 5 ms = {aim:.2f} ms: {verdict}" if rule == "shipped" else ""
        part.row(f"POST to result; {name}", ms(times[rule]), wanted)
    cost = p50(times["every"]) - p50(times["none"])
    part.row("what `begin` costs an op, p50", f"{cost:.2f} ms", f"FCALL {fcall:.2f} ms")
    for name, sample in times.items():
        part.figures |= {f"{name}_ms_p50": p50(sample), f"{name}_ms_p99": p99(sample)}
    part.figures["aim_ms"] = aim
    return part
