"""Run the simulation: `python tests/simulation/run.py --histories 500`.

Plays every planted bug on its saved seed, then histories by seed, and prints what was tried, what
went wrong in it, and what was caught. `--mutant NAME` plays the histories with that bug instead,
`--long` each bug in a tenth as many, to see how often it shows. `--seed N` plays one history again,
with `--trace` event by event.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.simulation.history import Verdict, simulate  # noqa: E402
from tests.simulation.planted import BUGS, FOUND, PLANTED  # noqa: E402

CHUNK = 25
"""Histories that a process plays before it reports."""


def main() -> int:
    arguments = _arguments()
    if arguments.seed is not None:
        return _one(arguments.seed, arguments.mutant, traced=arguments.trace)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        if arguments.mutant:
            return _rarity(pool, [arguments.mutant], arguments.first, arguments.histories)
        survived = _saved(pool)
        failed = _histories(pool, arguments.first, arguments.histories)
        if arguments.long:
            survived |= _rarity(pool, list(BUGS), arguments.first, arguments.histories // 10)
    return int(failed or survived)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="seed of the first history")
    parser.add_argument("--seed", type=int, help="play this history alone")
    parser.add_argument("--mutant", choices=list(BUGS), help="plant this bug")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event")
    parser.add_argument("--long", action="store_true", help="look for every bug by chance, too")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    return parser.parse_args()


def _one(seed: int, mutant: str | None, *, traced: bool) -> int:
    verdict = simulate(seed, BUGS[mutant].parts if mutant else None, traced=traced)
    for line in verdict.trace or ():
        print(line)
    print(f"seed {seed}: {verdict.virtual_s:.0f} s of virtual time, {dict(verdict.faults)}")
    for violation in verdict.violations:
        print(f"  violated: {violation}")
    return int(bool(verdict.violations))


def _histories(pool: ProcessPoolExecutor, first: int, number: int) -> int:
    """Play them on the real protocol; how many violated a promise."""
    began = time.monotonic()
    total = Totals()
    for verdict in _play(pool, None, range(first, first + number)):
        total.add(verdict)
        if verdict.violations:
            print(f"VIOLATED by seed {verdict.seed}: {'; '.join(verdict.violations[:3])}")
            print(f"  again: python tests/simulation/run.py --seed {verdict.seed} --trace")
    total.show(time.monotonic() - began)
    return total.num_violated


def _saved(pool: ProcessPoolExecutor) -> int:
    """Every planted bug on its saved seed; how many are not caught."""
    names = list(BUGS)
    verdicts = pool.map(_play_mutant, names, [BUGS[name].seed for name in names])
    survived = {name for name, verdict in zip(names, verdicts, strict=True) if not verdict}
    for kind, bugs in (("planted", PLANTED), ("found and planted again", FOUND)):
        caught = [name for name in bugs if name not in survived]
        print(f"bugs {kind}: {len(caught)}/{len(bugs)} caught by their saved seed")
    for name in sorted(survived):
        print(f"  SURVIVED: {name}")
    return len(survived)


def _rarity(pool: ProcessPoolExecutor, names: Iterable[str], first: int, number: int) -> int:
    """How often each bug shows in random histories; how many never do."""
    num_never = 0
    print(f"bugs in {number} random histories each:")
    for name in names:
        seeds = [
            verdict.seed
            for verdict in _play(pool, name, range(first, first + number))
            if verdict.violations
        ]
        num_never += not seeds
        print(f"  {name:28} caught in {len(seeds):5}  first by seed {seeds[0] if seeds else '-'}")
    return num_never


def _play(pool: ProcessPoolExecutor, mutant: str | None, seeds: range) -> Iterator[Verdict]:
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    for verdicts in pool.map(_play_chunk, [mutant] * len(chunks), chunks):
        yield from verdicts


def _play_chunk(mutant: str | None, seeds: range) -> list[Verdict]:
    parts = BUGS[mutant].parts if mutant else None
    return [simulate(seed, parts) for seed in seeds]


def _play_mutant(name: str, seed: int) -> list[str]:
    return simulate(seed, BUGS[name].parts).violations


class Totals:
    """What all histories together tried."""

    def __init__(self) -> None:
        self.num_histories = self.num_violated = self.num_rolled_back = 0
        self.num_ops = self.num_committed = self.num_executed = 0
        self.virtual_s = 0.0
        self.faults: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def add(self, verdict: Verdict) -> None:
        self.num_histories += 1
        self.num_violated += bool(verdict.violations)
        self.num_rolled_back += verdict.rolled_back
        self.num_ops += verdict.num_ops
        self.num_committed += verdict.num_committed
        self.num_executed += verdict.num_executed
        self.virtual_s += verdict.virtual_s
        self.faults += verdict.faults
        self.seen += verdict.seen

    def show(self, seconds: float) -> None:
        bound = 3 / self.num_histories if self.num_histories else 1.0
        print(
            f"{self.num_histories} histories in {seconds:.0f} s ({self.virtual_s / 3600:.1f} h of "
            f"virtual time): {self.num_violated} violated"
            + (f", so fewer than {bound:.2g} do (95 %)" if not self.num_violated else "")
        )
        print(f"  {self.num_ops} ops accepted, {self.num_committed} committed,", end=" ")
        print(f"{self.num_executed} executions; {self.num_rolled_back} histories with a rollback")
        for name, counter in (("faults", self.faults), ("seen", self.seen)):
            print(f"  {name}: " + ", ".join(f"{n} {kind}" for kind, n in counter.most_common()))
        figures = {"bench": "simulation", "histories": self.num_histories}
        figures |= {"violated": self.num_violated, "ops": self.num_ops, "seconds": round(seconds)}
        print(json.dumps(figures | {"faults": dict(self.faults)}))


if __name__ == "__main__":
    sys.exit(main())
