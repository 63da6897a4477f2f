"""The whole service as processes, used through the official SDK while it is hurt: make chaos.

Every faulted run must be what the undisturbed one was, bit for bit. `--long` takes hours;
`--session NAME` plays one session only; `--bug NAME` plants one of tests.cluster.planted's bugs,
`--planted` those of this layer, one by one.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.chaos.scenarios import CELLS, NUM_CELLS  # noqa: E402
from tests.chaos.script import hurry  # noqa: E402
from tests.chaos.session import Session, Shown, show  # noqa: E402
from tests.chaos.sessions import PLANTED, long_sessions, short_sessions  # noqa: E402
from tests.cluster.planted import BUGS  # noqa: E402
from tests.cluster.processes import preload  # noqa: E402

from luthier_model.demo import ensure_demo_model  # noqa: E402

MAX_TRIES = 5
"""A planted bug that none of so many sessions has caught has survived."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--session", help="the name of one, or the beginning of it")
    parser.add_argument("--bug", choices=sorted(BUGS), help="plant this one")
    parser.add_argument("--planted", action="store_true", help="catch planted bugs instead")
    parser.add_argument("--verbose", action="store_true", help="say what is done as it is done")
    parser.add_argument("--model", type=Path, default=ROOT / ".pytest_cache" / "d" / "demo-model")
    arguments = parser.parse_args()
    prepare()
    if arguments.verbose:
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    if arguments.planted:
        return len([bug for bug in PLANTED if not is_caught(bug)])
    make = long_sessions if arguments.long else short_sessions
    sessions = make(lambda: ensure_demo_model(arguments.model))
    wanted = [s for name, s in sessions.items() if name.startswith(arguments.session or "")]
    if not wanted:
        parser.error(f"--session: there are {', '.join(sessions)}")
    total, of_toys = Shown(), 0
    for session in wanted:
        plan = replace(session.plan, bug=arguments.bug or "")
        shown = show(replace(session, plan=plan), seed=arguments.seed)
        report(session, shown)
        total.add(shown)
        of_toys += shown.num_faulted if session.name != "torch" else 0
    summarize(total, of_toys, whole=arguments.session is None)
    return int(bool(total.verdict.violations))


def prepare() -> None:
    """Before anything is started."""
    os.environ["TINKER_TELEMETRY"] = "0"
    warnings.filterwarnings("ignore", category=FutureWarning, message="DEPRECATED")
    logging.getLogger("tinker").setLevel(logging.CRITICAL)
    hurry()
    programs = ("luthier_trainer.__main__", "luthier_sampler.__main__")
    preload("tests.chaos.sampler", "tests.chaos.child", *programs)


def is_caught(bug: str) -> bool:
    """Whether a session fails with this bug, one of MAX_TRIES at most."""
    session = PLANTED[bug]
    for seed in range(MAX_TRIES):
        shown = show(replace(session, plan=replace(session.plan, bug=bug)), seed=seed)
        if violations := shown.verdict.violations:
            print(f"planted {bug!r}: caught by seed {seed}: {violations[0][:300]}", flush=True)
            return True
    print(f"planted {bug!r}: SURVIVED {MAX_TRIES} sessions", flush=True)
    return False


def report(session: Session, shown: Shown) -> None:
    print(
        f"{session.name}: {shown.num_faulted} faulted runs of {shown.num_runs} "
        f"in {shown.seconds:.0f} s, {len(shown.verdict.violations)} violations"
    )
    print("  " + ", ".join(f"{number} {name}" for name, number in _by_kind(shown).items()))
    for violation in shown.verdict.violations:
        print(f"  VIOLATED: {violation}")
    sys.stdout.flush()


def _by_kind(shown: Shown) -> dict[str, int]:
    """The faults, those of one crash point together."""
    counted: dict[str, int] = {}
    for fault, number in sorted(shown.faults.items()):
        name = fault.partition("/")[0]
        counted[name] = counted.get(name, 0) + number
    return counted


def summarize(total: Shown, of_toys: int, *, whole: bool) -> None:
    """All of it added up, for people and as one line of JSON."""
    counters = asdict(total.verdict.counters)
    n = total.num_faulted
    killed_at = {fault.removeprefix("kill9 ") for fault in total.faults}
    cells = {point for points in CELLS.values() for point in points}
    missing = cells - killed_at
    if whole and missing:
        total.verdict.violations.append(f"nobody was killed at {sorted(missing)}")
        print(f"VIOLATED: {total.verdict.violations[-1]}")
    print(f"{n} faulted runs ({of_toys} with a toy engine), {sum(total.faults.values())} faults:")
    print(
        "  " + ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in counters.items())
    )
    print(f"  crash points x kinds of op with a kill: {NUM_CELLS - len(missing)} of {NUM_CELLS}")
    print(f"  programs told of a loss after a rollback of Redis: {total.num_ended_early}")
    bound = f", so fewer than {300 / n:.2g} % of such runs have one (95 %)" if n else ""
    print(f"  violations: {len(total.verdict.violations)}{bound}; {total.seconds:.0f} s")
    figures = {"bench": "chaos", "faulted": n, "toy": of_toys, **counters}
    figures |= {"violations": len(total.verdict.violations), "seconds": round(total.seconds)}
    print(json.dumps(figures | {"cells": NUM_CELLS - len(missing)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
