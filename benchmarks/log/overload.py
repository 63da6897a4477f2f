"""One tenant offers three times what the service can do: who is refused, who waits, what is lost.

And another part: 50 times what its key may send, for ten minutes (reliability S13).

Queue-bound: the toy engine takes a fixed time for an op, as a GPU does, so that capacity is the
engine's. The others each send small steps one after the other. The aim: every refusal is a 429,
every accepted op ends, and the others' p99 is at most twice that without the overload, in the
median of the repetitions. An op that runs is not interrupted, so twice is what fairness can give.
"""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from log.figures import Part, Sample, p99
from log.rig import HERE, Rig, Toy, running_rig
from log.traffic import Run, open_client
from luthier_core.config import LimitsConfig
from luthier_core.records import Limits

MODEL = "toy"
FACTOR = 3.0
QUOTA_PER_S, QUOTA_FACTOR = 10.0, 50.0
"""Requests of a key, and how much of that its tenant sends."""
HOG_RUNS = 4
IN_FLIGHT = 16
"""Ops of one run that the measurement of capacity keeps under way."""
OTHERS = ("bea", "cid", "dee")
PAUSE_S = 0.1
"""Mean pause of the others between two ops."""
SDK_AHEAD = 100
"""Steps that the SDK user of the overloading tenant sends ahead: more than a queue takes."""
LIMITS = LimitsConfig(max_pending_ops=128)
DRAIN_TIMEOUT_S = 300.0


def measure_overload(disk: Path, op_ms: float, window_s: float, repeats: int) -> Part:
    tenants = ("hog", "sdk", *OTHERS)
    toys = {MODEL: Toy(op_ms=op_ms)}
    with running_rig(disk, toys=toys, tenants=tenants, limits=LIMITS) as rig:
        capacity = asyncio.run(_capacity(rig, window_s))
        with _helper("sdk_user.py", _sdk_arguments(rig, "sdk", 1)) as sdk:
            _read_line(sdk)
            rounds = [asyncio.run(_round(rig, capacity, window_s)) for _ in range(repeats)]
            sdk_figures = _end(sdk)
    return _report(op_ms, capacity, rounds, sdk_figures)


def measure_quota(disk: Path, op_ms: float, minutes: float) -> Part:
    quotas = {"hog": Limits(requests_per_s=QUOTA_PER_S)}
    toys = {MODEL: Toy(op_ms=op_ms)}
    with running_rig(disk, toys=toys, tenants=("hog", *OTHERS), quotas=quotas) as rig:
        return asyncio.run(_beyond_quota(rig, 60 * minutes))


async def _beyond_quota(rig: Rig, window_s: float) -> Part:
    offered = QUOTA_FACTOR * QUOTA_PER_S
    async with _others(rig) as others:
        alone = await _watch(others, window_s / 5)
        with _helper("hog.py", _hog_arguments(rig, offered)) as hog:
            await asyncio.to_thread(_read_line, hog)  # it has been refused
            busy = _cpu(rig)
            beside = await _watch(others, window_s)
            cores = _cores_since(busy, rig, window_s)
            told = await asyncio.to_thread(_end, hog)
        refused = sum(sum(run.client.refusals.values()) for run in others)
    p99s = [p99(watched["latencies"]) for watched in (alone, beside)]
    rates = [len(w["latencies"]) / (w["to"] - w["from"]) for w in (alone, beside)]
    slower, slowed = p99s[1] / p99s[0], rates[1] / rates[0]
    part = Part(f"quota: {QUOTA_FACTOR:g}x what its key may send, for {window_s / 60:g} minutes")
    part.row("sent by the tenant", f"{told['offered_per_s']:.0f} posts/s", f"{offered:g} posts/s")
    part.row("its refusals by status", str(told["refusals"]), "429 only")
    part.row("its accepted ops that ended", f"{told['ended']:,} of {told['accepted']:,}", "all")
    part.row("refusals of other tenants", str(refused), "0")
    waited = f"{p99s[0]:.1f} ms, {p99s[1]:.1f} ms: {slower:.2f}x"
    part.row("others, POST to result: p99 alone, beside it", waited, "at most 1.5x")
    done = f"{rates[0]:.1f}, {rates[1]:.1f} ops/s: {slowed:.2f}x"
    part.row("others' throughput alone, beside it", done, "at least 0.9x")
    part.notes.append(f"cores busy meanwhile: {_listed(cores)}; {os.cpu_count()} in all")
    part.figures |= {"p99 ratio": slower, "throughput ratio": slowed, "refused": refused}
    return part


def _hog_arguments(rig: Rig, rate: float) -> list[str]:
    named = {"urls": ",".join(rig.urls), "tenant": "hog", "model": MODEL}
    named |= {"rate": str(rate), "runs": str(HOG_RUNS)}
    return _options(named)


async def _capacity(rig: Rig, window_s: float) -> float:
    """Ops per second with every run's queue filled."""
    num_ended = 0

    async def keep_busy(run: Run, until: float) -> None:
        nonlocal num_ended
        while time.perf_counter() < until:
            await run.op(post=num_ended, poll=num_ended + 1)
            num_ended += 1

    async with open_client(rig, "hog") as client:
        session = await client.session()
        runs = [await client.run(MODEL, session, index) for index in range(HOG_RUNS)]
        start = time.perf_counter()
        busy = [keep_busy(run, start + window_s) for run in runs for _ in range(IN_FLIGHT)]
        await asyncio.gather(*busy)
        return num_ended / (time.perf_counter() - start)


async def _round(rig: Rig, capacity: float, window_s: float) -> dict[str, Any]:
    """The others alone, then with the overload."""
    async with _others(rig) as others:
        alone = await _watch(others, window_s)
        with (
            _helper("hog.py", _hog_arguments(rig, FACTOR * capacity)) as hog,
            _helper("sdk_user.py", _sdk_arguments(rig, "hog", SDK_AHEAD)) as hog_sdk,
        ):
            await asyncio.to_thread(_read_line, hog)  # its queues are full
            await asyncio.to_thread(_read_line, hog_sdk)
            busy = _cpu(rig)
            start = time.monotonic()
            overloaded = await _watch(others, window_s)
            cores = _cores_since(busy, rig, time.monotonic() - start)
            hog_figures = await asyncio.to_thread(_end, hog)
            hog_sdk_figures = await asyncio.to_thread(_end, hog_sdk)
        refusals = sum(sum(run.client.refusals.values()) for run in others)
    return {
        "alone": alone,
        "overloaded": overloaded,
        "hog": hog_figures,
        "hog_sdk": hog_sdk_figures,
        "others_refused": refusals,
        "cores": cores,
    }


def _cpu(rig: Rig) -> dict[str, float]:
    """CPU seconds of each part so far."""
    times = {name: process.cpu_times() for name, process in rig.processes.items()}
    return {name: used.user + used.system for name, used in times.items()}


def _cores_since(before: dict[str, float], rig: Rig, seconds: float) -> dict[str, float]:
    return {name: (value - before[name]) / seconds for name, value in _cpu(rig).items()}


def _listed(cores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in cores.items())


@contextlib.asynccontextmanager
async def _others(rig: Rig) -> AsyncIterator[list[Run]]:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(open_client(rig, name)) for name in OTHERS]
        runs = [await client.run(MODEL) for client in clients]
        for run in runs:
            for _ in range(10):  # beyond the probation of a new owner
                await run.op()
        yield runs


async def _watch(runs: Sequence[Run], window_s: float) -> dict[str, Any]:
    """Latencies of the others over a while, and when that was."""
    posts: Sample = []
    latencies: Sample = []
    start, clock = time.monotonic(), random.Random(7)

    async def send(index: int, run: Run) -> None:
        while time.monotonic() < start + window_s:
            await asyncio.sleep(clock.expovariate(1 / PAUSE_S))
            accepted, delivered = await run.op(post=index, poll=index + 1)
            posts.append(accepted)
            latencies.append(delivered)

    await asyncio.gather(*(send(index, run) for index, run in enumerate(runs)))
    return {"latencies": latencies, "posts": posts, "from": start, "to": time.monotonic()}


def _report(
    op_ms: float, capacity: float, rounds: list[dict[str, Any]], sdk: dict[str, Any]
) -> Part:
    part = Part(f"overload: {FACTOR:g}x capacity from one tenant, median of {len(rounds)}")
    hogs = [found["hog"] for found in rounds]
    by_status: dict[str, int] = {}
    for hog in hogs:
        for status, number in hog["refusals"].items():
            by_status[status] = by_status.get(status, 0) + number
    accepted, ended = sum(h["accepted"] for h in hogs), sum(h["ended"] for h in hogs)
    offered = _median([h["offered_per_s"] for h in hogs])
    part.row("capacity", f"{capacity:.0f} ops/s", f"engine: {1000 / op_ms:.0f} ops/s")
    part.row("offered by the tenant", f"{offered:.0f} posts/s", f"{FACTOR * capacity:.0f} posts/s")
    part.row("its refusals by status", str(by_status), "429 only")
    part.row("its accepted ops that ended", f"{ended:,} of {accepted:,}", "all")
    refused = sum(found["others_refused"] for found in rounds)
    part.row("refusals of other tenants", str(refused), "0")
    for name, ratio, alone, over in _ratios(rounds, sdk):
        part.row(
            f"{name}: p99 alone, overloaded",
            f"{alone:.1f} ms, {over:.1f} ms: {ratio:.2f}x",
            "" if "answered" in name else f"at most 2x: {'holds' if ratio <= 2 else 'missed'}",
        )
        part.figures[f"{name} p99 ratio"] = ratio
    part.row("exceptions in the SDK of another tenant", str(sdk["errors"] or 0), "0")
    seen = [found["hog_sdk"] for found in rounds]
    errors = [error for one in seen for error in one["errors"]]
    steps = sum(len(one["steps"]) * one["ahead"] for one in seen)
    rode_out = f"{errors or 0}; {steps} steps, {sum(one['refusals'] for one in seen)} times 429"
    part.row("exceptions in the SDK of the tenant itself", rode_out, "0")
    names = rounds[0]["cores"]
    cores = {name: _median([found["cores"][name] for found in rounds]) for name in names}
    part.notes.append(f"cores busy during the overload: {_listed(cores)}; {os.cpu_count()} in all")
    for found in rounds:
        part.notes += found["hog"]["errors"]
    part.figures |= {
        "capacity_ops_per_s": capacity,
        "offered_per_s": offered,
        "accepted": accepted,
        "ended": ended,
        "refused_429": by_status.get("429", 0),
        "refused_otherwise": sum(by_status.values()) - by_status.get("429", 0),
    }
    return part


def _ratios(
    rounds: list[dict[str, Any]], sdk: dict[str, Any]
) -> Iterator[tuple[str, float, float, float]]:
    """(who, median ratio, median p99 alone, median p99 overloaded)."""

    def steps_in(window: dict[str, Any]) -> Sample:
        return [took for at, took in sdk["steps"] if window["from"] <= at <= window["to"]]

    kinds: dict[str, Callable[[dict[str, Any]], Sample]] = {
        "others, POST to result": lambda window: window["latencies"],
        "others, POST answered": lambda window: window["posts"],
        "SDK, a step of two ops": steps_in,
    }
    for name, sample_of in kinds.items():
        samples = [(sample_of(found["alone"]), sample_of(found["overloaded"])) for found in rounds]
        pairs = [(p99(alone), p99(over)) for alone, over in samples if alone and over]
        if pairs:
            ratio = _median([over / alone for alone, over in pairs])
            yield name, ratio, _median([a for a, _ in pairs]), _median([o for _, o in pairs])


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _sdk_arguments(rig: Rig, tenant: str, ahead: int) -> list[str]:
    return _options({"url": rig.urls[0], "tenant": tenant, "model": MODEL, "ahead": str(ahead)})


def _options(named: dict[str, str]) -> list[str]:
    return [item for name, value in named.items() for item in (f"--{name}", value)]


# --- helper processes -----------------------------------------------------------------------------


@contextlib.contextmanager
def _helper(script: str, arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [sys.executable, str(HERE / script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args} has ended")
    return line


def _end(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Ends its standard input; what it has found."""
    out, _ = process.communicate(timeout=DRAIN_TIMEOUT_S)
    if not out.strip():
        raise RuntimeError(f"{process.args} ended with {process.returncode} and said nothing")
    figures: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return figures
