"""What is done to a stack while programs are played on it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from tests.chaos.stack import Stack
from tests.cluster.faults import Fault
from tests.cluster.processes import LEASE_S

from luthier_core.ops import Kind

Scenario = Callable[[Stack], Awaitable[None]]

SAVES = (Kind.SAVE_WEIGHTS, Kind.SAVE_WEIGHTS_FOR_SAMPLER, Kind.SAVE_WEIGHTS_EXTERNAL)
CHANGES = (Kind.CREATE_MODEL, Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.LOAD_WEIGHTS)
KINDS = (*CHANGES, Kind.FORWARD, *SAVES)
LARGE = (Kind.FORWARD, Kind.FORWARD_BACKWARD)
CHECKPOINTS = ("weights", "sampler_weights", "external_weights", "ephemeral")

CELLS: dict[str, Sequence[str]] = {
    "gateway": [
        *(f"{point}/{kind}" for point in ("gw.body", "gw.admit", "gw.reply") for kind in KINDS),
        *("gw.body/sample", "gw.admit/sample", "gw.reply/sample"),
        *(f"gw.put/{kind}" for kind in LARGE),
        *(f"gw.poll/{kind}" for kind in ("train", "sample", "samples")),
        *(f"gw.deliver/{kind}" for kind in ("train", "sample", "samples")),
    ],
    "trainer": [
        *("tr.acquire", "tr.restore", "tr.read"),
        *(f"tr.replay/{kind}" for kind in CHANGES),
        *(f"{point}/{kind}" for point in ("tr.begin", "tr.exec", "tr.mid") for kind in KINDS),
        *(f"tr.commit/{kind}" for kind in (*KINDS, Kind.REJECTED)),
        *(f"tr.put_res/{kind}" for kind in LARGE),
        *("sn.copy", "sn.upload", "sn.manifest", "sn.cas", "sn.trim"),
        *(
            f"{point}/{kind}"
            for point in ("sv.blobs", "sv.man", "sv.name", "sv.verify")
            for kind in CHECKPOINTS
        ),
    ],
    "sampler": ["sm.claim", "sm.gen", "sm.store", "sm.ack"],
    "registry": [
        f"{point}/{call}"
        for point in ("rg.before", "rg.after")
        for call in ("create_session", "create_run", "create_sampler")
    ],
}
"""Role -> every crash point of it, by kind of op where the op has one."""
NUM_CELLS = sum(map(len, CELLS.values()))


async def crash_points(stack: Stack) -> None:
    """SIGKILL once at every crash point for every kind of op, in any order."""

    async def kill(role: str, points: Sequence[str]) -> None:
        for point in stack.rng.sample(points, len(points)):
            await stack.order(role, Fault(point, "kill9"))

    async with asyncio.TaskGroup() as roles:
        for role, points in CELLS.items():
            roles.create_task(kill(role, points))


async def zombies(stack: Stack) -> None:
    """Owners that are frozen until others have their runs, before each kind of write."""
    points = ["tr.begin", "tr.commit", "tr.exec", "sn.cas", "sn.trim", "tr.acquire"]
    for point in stack.rng.sample(points, len(points)):
        await stack.order("trainer", Fault(point, "stop"))
    await stack.order("gateway", Fault("gw.reply", "stop"))


def random_kills(num_kills: int, pause_s: float = 0.5) -> Scenario:
    """SIGKILL to any part, SIGSTOP beyond its lease to one in five."""

    async def kill(stack: Stack) -> None:
        for _ in range(num_kills):
            await asyncio.sleep(stack.rng.uniform(0, 2 * pause_s))
            part = stack.rng.choice(stack.cluster.parts)
            if stack.rng.random() < 0.2:
                await stack.freeze(part, 1.5 * LEASE_S)
            elif part.role == "trainer" and stack.rng.random() < 0.5 and _has_child(stack):
                await stack.kill_engine(part)
            else:
                await stack.kill(part)

    return kill


def _has_child(stack: Stack) -> bool:
    return stack.cluster.plan.trainer != "tests.cluster.trainer"


def redis_restarts(times: int) -> Scenario:
    async def restart(stack: Stack) -> None:
        for _ in range(times):
            await asyncio.sleep(stack.rng.uniform(0.5, 2))
            await stack.restart_redis(stack.rng.uniform(0, 1))

    return restart


def redis_rollbacks(times: int) -> Scenario:
    async def roll_back(stack: Stack) -> None:
        for _ in range(times):
            await asyncio.sleep(stack.rng.uniform(1, 3))
            await stack.roll_redis_back(stack.rng.uniform(0.1, 1.0))
            await asyncio.sleep(5)  # what was lost shows only at the next poll or post

    return roll_back


def store_trouble(times: int) -> Scenario:
    """An outage, slowness, and writes whose answers are lost, with a kill in the midst of each."""

    async def trouble(stack: Stack) -> None:
        for _ in range(times):
            for hurt in (
                lambda: stack.take_store_away(2.0),
                lambda: stack.slow_store_down(0.2, 3.0),
            ):
                await asyncio.sleep(stack.rng.uniform(0.2, 1))
                hurting = asyncio.create_task(hurt())  # type: ignore[no-untyped-call]
                await asyncio.sleep(stack.rng.uniform(0, 1))
                await stack.kill(stack.rng.choice(stack.cluster.trainers))
                await hurting
            stack.lose_answers(stack.rng.randint(1, 8))
            await asyncio.sleep(1)

    return trouble


def full_disks(times: int) -> Scenario:
    """No room for objects; none for the operation log, which is the end of Redis; both again."""

    async def fill(stack: Stack) -> None:
        for _ in range(2 * times):
            await asyncio.sleep(stack.rng.uniform(0.5, 2))
            await stack.fill_disk_of_objects(2.0)
            await asyncio.sleep(stack.rng.uniform(0.5, 2))
            await stack.fill_disk_of_redis(stack.rng.uniform(0, 1))

    return fill


async def damaged_snapshots(stack: Stack) -> None:
    """Who takes over from one who died at a snapshot finds the newest one damaged."""
    stack.damages = True
    try:
        for _ in range(3):
            await stack.order("trainer", Fault("sn.cas", "kill9", stack.rng.randint(1, 4)))
    finally:
        stack.damages = False


async def undisturbed(stack: Stack) -> None:
    """Nothing but what the programs do themselves."""


def in_turn(*scenarios: Scenario) -> Scenario:
    async def play(stack: Stack) -> None:
        for scenario in scenarios:
            await scenario(stack)

    return play
