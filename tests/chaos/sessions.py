"""The sessions of `make chaos` and `make chaos-long`, and of the planted bugs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.chaos.scenarios import (
    Scenario,
    crash_points,
    damaged_snapshots,
    full_disks,
    in_turn,
    random_kills,
    redis_restarts,
    redis_rollbacks,
    store_trouble,
    undisturbed,
    zombies,
)
from tests.chaos.script import Script
from tests.chaos.session import Session
from tests.chaos.stack import may_mount
from tests.cluster.processes import BASE_MODEL, LEASE_RENEW_S, LEASE_S, Plan

from luthier_core.config import ModelConfig, TrainerConfig

GAP_TIMEOUT_S = 3.0
"""After a rollback of Redis a program waits no longer for what is lost; elsewhere nothing is."""
TOY = Plan(
    num_trainers=2,
    sampler="tests.chaos.sampler",
    settings=TrainerConfig(lease_s=LEASE_S, lease_renew_s=LEASE_RENEW_S),
)
TOY_CHILD = replace(TOY, trainer="tests.chaos.child")
TOY_OF_LOSSES = replace(TOY, settings=replace(TOY.settings, gap_timeout_s=GAP_TIMEOUT_S))
TORCH_MODEL = "luthier/demo"


def scripts(count: int, **fields: object) -> tuple[Script, ...]:
    wanted = {"base_model": BASE_MODEL, **fields}
    return tuple(Script(seed=seed, **wanted) for seed in range(count))  # type: ignore[arg-type]


def toy(name: str, scenario: Scenario, **fields: object) -> Session:
    wanted = {"plan": TOY, "scripts": scripts(3), **fields}
    return Session(name=name, scenario=scenario, **wanted)  # type: ignore[arg-type]


def torch(name: str, scenario: Scenario, model: Path, *, min_runs: int) -> Session:
    """The real engine, in deterministic execution, with snapshots often enough to be hurt in."""
    plan = Plan(
        num_trainers=2,
        trainer="luthier_trainer.__main__",
        sampler="luthier_sampler.__main__",
        model=ModelConfig(name=TORCH_MODEL, path=str(model)),
        settings=replace(TOY.settings, lease_s=5.0, lease_renew_s=1.0, snapshot_max_ops=6),
    )
    return Session(
        name=name,
        plan=plan,
        scripts=scripts(2, base_model=TORCH_MODEL, num_ops=10, large=False),
        scenario=scenario,
        lanes=3,
        min_runs=min_runs,
    )


def _sessions(model: Callable[[], Path], *, long: bool) -> dict[str, Session]:
    """`long`: the same ones, each until its share of 900 + 100 runs was faulted."""
    many = 10 if long else 1
    share = 150 if long else 0
    listed = [
        toy("crash points", crash_points, min_runs=share),
        toy("zombies", in_turn(*[zombies] * many), min_runs=share),
        toy("damaged snapshots", in_turn(*[damaged_snapshots] * many)),
        toy("redis restarts", redis_restarts(3 * many), min_runs=share // 2),
        toy(
            "redis rollbacks",
            redis_rollbacks(3 * many),
            plan=TOY_OF_LOSSES,
            min_runs=share // 2,
        ),
        toy(
            "s3: kills, outages, slowness, lost answers",
            in_turn(random_kills(10 * many), store_trouble(many)),
            s3=True,
            min_runs=max(share, 8),
        ),
        toy(
            "engine children, poison",
            random_kills(10 * many),
            plan=TOY_CHILD,
            scripts=scripts(2, poison=True),
            min_runs=max(share, 8),
        ),
        torch("torch", random_kills(3, pause_s=4.0), model(), min_runs=100 if long else 10),
    ]
    if may_mount():
        listed.insert(-1, toy("disk full", full_disks(many), small_disks=True, min_runs=share))
    return {session.name: session for session in listed}


def short_sessions(model: Callable[[], Path]) -> dict[str, Session]:
    return _sessions(model, long=False)


def long_sessions(model: Callable[[], Path]) -> dict[str, Session]:
    return _sessions(model, long=True)


PLANTED = {
    "trim before compare-and-swap": toy(
        "planted", damaged_snapshots, scripts=scripts(3, stuck_s=25.0)
    ),
    "unconditional HEAD write": toy("planted", zombies),
    "result overwritten on replay": toy("planted", random_kills(10)),
    "no blame": toy("planted", undisturbed, plan=TOY_CHILD, scripts=scripts(1, poison=True)),
    "no tombstone": toy("planted", undisturbed, scripts=scripts(1, stuck_s=20.0)),
    "commit: no epoch check": toy("planted", zombies),
}
"""Bug -> the session that has to catch it."""
