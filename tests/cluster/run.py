"""Trials on real processes: `python tests/cluster/run.py --trials 50`.

Two gateways, three toy trainers, a registry, a Valkey that fsyncs always. In every trial each
failpoint kills a process once, in an order and at hits that the seed draws, and some freeze one;
what the seed cannot fix is how the processes interleave. `--bug NAME` plants one of planted.BUGS,
`--planted` several, one by one.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.cluster.client import REQUEST_S, Client, Refused  # noqa: E402
from tests.cluster.faults import POINTS, Injector, gateway_faults, trainer_faults  # noqa: E402
from tests.cluster.history import History, watching  # noqa: E402
from tests.cluster.oracle import Counters, Verdict, judge  # noqa: E402
from tests.cluster.planted import BUGS  # noqa: E402
from tests.cluster.processes import Cluster, Ended, Plan, running_cluster  # noqa: E402

from luthier_core.blobs import open_blobs  # noqa: E402
from luthier_core.oplog import connect  # noqa: E402
from luthier_core.testing import running_valkey  # noqa: E402

NUM_RUNS = 4
PLANTED = (
    "commit: no epoch check",
    "begin: no epoch check",
    "trim: no epoch check",
    "admit: no dedupe",
    "admit: order of arrival",
    "advance: only the first parked op",
)
MAX_TRIALS = 5
"""A planted bug that none of so many trials has caught has survived."""


@dataclass(slots=True)
class Trial:
    """What one seed has shown."""

    seed: int
    verdict: Verdict = field(default_factory=Verdict)
    faults: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    """Failpoint -> how often it was reached."""
    seen: Counter[str] = field(default_factory=Counter)
    """What clients met that was no result."""
    seconds: float = 0.0

    @property
    def violations(self) -> list[str]:
        return self.verdict.violations


def play(seed: int, *, bug: str = "") -> Trial:
    """One trial; `bug`: one of planted.BUGS."""
    trial, began = Trial(seed), time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="lu-cl-") as folder,
        running_valkey(fsync="always") as url,
    ):
        try:
            asyncio.run(_play(trial, Path(folder), url, Plan(bug=bug)))
        except* Ended as errors:
            trial.violations.extend(str(error) for error in leaves(errors))
    trial.seconds = time.monotonic() - began
    return trial


async def _play(trial: Trial, folder: Path, redis_url: str, plan: Plan) -> None:
    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    async with (
        connect(redis_url) as client,
        watching(redis_url) as history,
        running_cluster(folder, redis_url, client, plan) as cluster,
        aiohttp.ClientSession(timeout=timeout) as http,
    ):
        rng = random.Random(trial.seed)
        clients = [Client(http, cluster.urls, rng.random()) for _ in range(NUM_RUNS)]
        injectors = [
            Injector(cluster, parts, history, random.Random(rng.random()))
            for parts in (cluster.gateways, cluster.trainers)
        ]
        trial.violations.extend(await _disturb(clients, injectors, rng))
        trial.seen = sum((client.seen for client in clients), Counter[str]())
        if not trial.violations:
            await _judge(trial, cluster, clients, history)
        for injector in injectors:
            trial.faults += injector.done
        num_killed = sum(injector.num_killed for injector in injectors)
        num_ended = sum(part.num_killed for part in cluster.parts)
        if not trial.violations and num_ended != num_killed:
            trial.violations.append(f"{num_killed} processes were killed, {num_ended} died")
        _count_hits(trial, folder)
        if trial.verdict.counters.failed_by_us > trial.faults["raise"]:
            trial.violations.append("more ops failed than exceptions were ordered")


async def _disturb(
    clients: list[Client], injectors: list[Injector], rng: random.Random
) -> list[str]:
    """Train while every fault happens, then read everything again; what cut it short."""
    enough, reasons = asyncio.Event(), list[str]()
    try:
        async with asyncio.TaskGroup() as runs:
            for client in clients:
                runs.create_task(client.play(enough))
            try:
                async with asyncio.TaskGroup() as faults:
                    for injector, draw in zip(
                        injectors, (gateway_faults, trainer_faults), strict=True
                    ):
                        faults.create_task(injector.carry_out(draw(rng)))
            finally:
                enough.set()
        await asyncio.gather(*(client.ask_again() for client in clients))
    except* (Refused, TimeoutError) as errors:
        reasons.extend(str(error) or repr(error) for error in leaves(errors))
    return reasons


async def _judge(trial: Trial, cluster: Cluster, clients: list[Client], history: History) -> None:
    async with open_blobs(cluster.config) as blobs:
        for client in clients:
            verdict = await judge(client, history.runs[client.run_id], blobs)
            trial.verdict.counters.add(verdict.counters)
            trial.violations.extend(verdict.violations)
            if client.stuck:
                trial.violations.append(await cluster.describe(client.run_id))


def leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The exceptions in a group and in its groups."""
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


def _count_hits(trial: Trial, folder: Path) -> None:
    for hits in folder.glob("*/hits"):
        trial.hits.update(point.partition("/")[0] for point in hits.read_text().split())
    trial.verdict.counters.executed = trial.hits["tr.exec"] + trial.hits["tr.replay"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="seed of the first trial")
    parser.add_argument("--bug", choices=sorted(BUGS), help="plant this one")
    parser.add_argument("--planted", action="store_true", help="catch planted bugs after that")
    arguments = parser.parse_args()
    trials = []
    for seed in range(arguments.first, arguments.first + arguments.trials):
        trials.append(play(seed, bug=arguments.bug))
        show(trials[-1:])
    if trials:
        show(trials)
    survived = [name for name in PLANTED if not _is_caught(name)] if arguments.planted else []
    return int(any(trial.violations for trial in trials) or bool(survived))


def _is_caught(bug: str) -> bool:
    """Whether a trial fails with this bug, one of MAX_TRIALS at most."""
    for seed in range(MAX_TRIALS):
        if violations := play(seed, bug=bug).violations:
            print(f"planted {bug!r}: caught by seed {seed}: {violations[0]}", flush=True)
            return True
    print(f"planted {bug!r}: SURVIVED {MAX_TRIALS} trials", flush=True)
    return False


def show(trials: list[Trial]) -> None:
    """What these trials have shown, added up."""
    counters = Counters()
    for trial in trials:
        counters.add(trial.verdict.counters)
        for violation in trial.violations:
            print(f"VIOLATED by seed {trial.seed}: {violation}")
    violated = sum(bool(trial.violations) for trial in trials)
    seconds = sum(trial.seconds for trial in trials)
    faults = sum((trial.faults for trial in trials), Counter[str]())
    hits = sum((trial.hits for trial in trials), Counter[str]())
    print(f"{len(trials)} trials in {seconds:.0f} s, {violated} violated")
    print("  " + ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in asdict(counters).items()))
    print("  faults: " + ", ".join(f"{n} {name}" for name, n in sorted(faults.items())))
    rarest = min(POINTS & hits.keys(), key=lambda point: hits[point], default="none")
    num_hit = len(POINTS & hits.keys())
    print(f"  failpoints hit {num_hit} of {len(POINTS)}, least often {rarest}: {hits[rarest]}")
    print("  clients saw: ", dict(sum((trial.seen for trial in trials), Counter[str]())))
    figures = {"bench": "cluster", "trials": len(trials), "violated": violated}
    print(json.dumps(figures | asdict(counters) | {"faults": dict(faults)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
