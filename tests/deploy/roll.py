"""Restart every part of the demo, one after the other, while the official SDK trains and samples.

    python -m tests.deploy.roll [--steps-per-s 20] [--samples-per-s 50]

Commands, probes, drains and grace periods are the manifests'. Exit 1 unless no request has failed,
no sample is lost, no part had to be killed, and in every ten seconds so many were sent.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.deploy.pods import Cluster, running_cluster

ORDER = ("gateway", "registry", "housekeeping", "trainer", "sampler", "redis")
REPLICAS = {"gateway": 2, "trainer": 2, "sampler": 2}
WARM_S = 10.0
"""Load before the first restart and after the last."""


async def roll(steps_per_s: float, samples_per_s: float) -> dict[str, Any]:
    """The load's account of itself, and how long each restart took."""
    with tempfile.TemporaryDirectory(prefix="lu-roll-") as folder:
        async with running_cluster("cpu-demo", Path(folder), REPLICAS) as cluster:
            key = await cluster.new_key("ann")
            load = await _start_load(cluster, key, steps_per_s, samples_per_s)
            assert load.stdin is not None
            assert load.stdout is not None
            await asyncio.sleep(WARM_S)
            took_s = {}
            for workload in ORDER:
                began = time.monotonic()
                await cluster.roll(workload)
                took_s[workload] = round(time.monotonic() - began, 1)
                print(f"{workload}: restarted in {took_s[workload]} s", file=sys.stderr, flush=True)
            await asyncio.sleep(WARM_S)
            failed_liveness = {p.name: p.failed_liveness for p in cluster.pods}
            load.stdin.close()
            told = json.loads(await load.stdout.readline())
            await load.wait()
    return {**told, "restart_s": took_s, "failed_liveness": sum(failed_liveness.values())}


async def _start_load(
    cluster: Cluster, key: str, steps_per_s: float, samples_per_s: float
) -> asyncio.subprocess.Process:
    """Returns once it loads."""
    (pod,) = cluster.pods_of("registry")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.deploy.load", "--url", cluster.url, "--key", key),
        *("--steps-per-s", str(steps_per_s), "--samples-per-s", str(samples_per_s)),
        env=cluster.environ(pod.main, pod),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    while (line := await process.stdout.readline()).strip() != b"loading":
        assert line, "the load did not start"
    return process


def problems(told: dict[str, Any], steps_per_s: float, samples_per_s: float) -> list[str]:
    """What did not hold."""
    found = []
    for kind, wanted in (("steps", steps_per_s), ("samples", samples_per_s)):
        account = told[kind]
        if account["num_failed"]:
            found.append(f"{account['num_failed']} {kind} failed: {account['failed']}")
        if account["answered"] != account["sent"]:
            found.append(f"{account['sent'] - account['answered']} {kind} are lost")
        if account["sent_per_s"] < wanted:
            found.append(f"{account['sent_per_s']} {kind}/s, not {wanted}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps-per-s", type=float, default=20)
    parser.add_argument("--samples-per-s", type=float, default=50)
    arguments = parser.parse_args()
    steps, samples = arguments.steps_per_s, arguments.samples_per_s
    told = {}
    with contextlib.suppress(KeyboardInterrupt):
        # A twentieth more is offered, so that the rate that is asked for is kept.
        told = asyncio.run(roll(1.05 * steps, 1.05 * samples))
    print(json.dumps(told))
    found = problems(told, steps, samples) if told else ["interrupted"]
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
