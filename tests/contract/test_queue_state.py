"""Why a result is not there yet: one answer per cause, over a real log."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from luthier_core import keys
from luthier_core.config import LimitsConfig
from luthier_core.futures import FutureId
from luthier_core.oplog import Oplog
from luthier_core.ops import Body, Kind, Op, Outcome, digest_of
from luthier_gateway.backends import Backends
from luthier_gateway.queue_state import QueueState, queue_state

SESSION, MODEL, TENANT = "a" * 32, "tiny/one", "ann"
RUN, SAMPLER = f"{SESSION}:train:0", f"{SESSION}:sample:0"
DONE = Outcome.completed(Body.of(b"{}"))
NOW_MS = 1_000_000_000_000


class World:
    """One log, and what its workers say of themselves."""

    def __init__(self, oplog: Oplog) -> None:
        self.oplog = oplog

    async def worker(self, name: str, *, role: str = "trainer", state: str = "ready") -> str:
        """How a run's header names this worker."""
        await self.oplog.register_worker(name)
        lease = {"role": role, "base_model": MODEL, "state": state, "incarnation": "1", "pid": 1}
        await self.oplog.hold_lease(keys.worker_lease(name), "1", json.dumps(lease), 60_000)
        return f"{name}/1"

    async def admit(self, *seqs: int, run_id: str = RUN) -> None:
        for seq in seqs:
            body = Body.of(b"{}")
            op = Op(run_id=run_id, seq=seq, kind=Kind.FORWARD, digest=digest_of(b""), body=body)
            header = {"base_model": MODEL, "facts": "{}"}
            await self.oplog.admit(
                op, tenant=TENANT, limits=LimitsConfig(), header=None if seq else header
            )

    async def enqueue(self, seq: int) -> None:
        await self.oplog.open_jobs(MODEL)
        await self.oplog.enqueue(
            tenant=TENANT,
            base_model=MODEL,
            sampling_session_id=SAMPLER,
            seq=str(seq),
            digest=digest_of(b""),
            job={"session": SAMPLER, "tenant": TENANT, "weights": "", **Body.of(b"{}").fields()},
            max_jobs=10,
            header={"base_model": MODEL, "weights": ""},
        )

    async def state(self, seq: int, parent: str = RUN) -> QueueState:
        async def sampler(tenant: str, sampling_session_id: str) -> Any:
            return SimpleNamespace(base_model=MODEL)

        future = FutureId.parse(f"{parent}:{seq}")
        assert future is not None
        backends = cast(Backends, SimpleNamespace(oplog=self.oplog, sampler=sampler))
        return await queue_state(backends, TENANT, future)


@pytest.fixture
def world(oplog: Oplog, monkeypatch: pytest.MonkeyPatch) -> World:
    """12 seconds pass between what is asked of the log and the question why it takes so long."""
    monkeypatch.setattr("luthier_gateway.queue_state.time.time", lambda: NOW_MS / 1000 + 12)
    oplog._clock = lambda: NOW_MS / 1000
    return World(oplog)


async def test_no_trainer_runs(world: World):
    await world.admit(0)
    reason = f"no trainer of {MODEL} is running; waiting for 12 s"
    assert await world.state(0) == QueueState("paused_capacity", reason)


async def test_the_trainer_is_starting(world: World):
    await world.worker("t0", state="starting")
    await world.admit(0)
    reason = f"the trainer of {MODEL} is starting; waiting for 12 s"
    assert await world.state(0) == QueueState("paused_capacity", reason)


async def test_the_owner_has_died_and_another_takes_the_run_over(world: World):
    await world.worker("t1")
    await world.admit(0)
    await world.oplog.acquire(RUN, 1, "t0/1")
    reason = "a trainer is taking the run over; waiting for 12 s"
    assert await world.state(0) == QueueState("paused_capacity", reason)


async def test_every_slot_is_taken(world: World):
    await world.worker("t0")
    for run_id in (f"{SESSION}:train:{n}" for n in range(4)):
        await world.admit(0, run_id=run_id)
        await world.oplog.announce_run(MODEL, run_id, 0)
    reason = "waiting for a free adapter slot: 3 other runs are live; waiting for 12 s"
    assert await world.state(0) == QueueState("paused_capacity", reason)


async def test_it_is_being_executed(world: World):
    owner = await world.worker("t0")
    await world.admit(0)
    await world.oplog.acquire(RUN, 1, owner)
    assert await world.state(0) == QueueState("active", "being executed; waiting for 12 s")


async def test_others_of_the_run_are_ahead(world: World):
    owner = await world.worker("t0")
    await world.admit(0, 1, 2, 3)
    await world.oplog.acquire(RUN, 1, owner)
    await world.oplog.commit(RUN, 1, 0, DONE)
    reason = "2 operations of this run are ahead; waiting for 12 s"
    assert await world.state(3) == QueueState("active", reason)


async def test_an_earlier_request_has_not_arrived(world: World):
    owner = await world.worker("t0")
    await world.admit(0, 2)
    await world.oplog.acquire(RUN, 1, owner)
    reason = "waiting for seq 1, which has not arrived for 12 s"
    assert await world.state(2) == QueueState("active", reason)


async def test_somebody_is_told_to_look_at_a_gap_of_a_run_that_nobody_owns(world: World):
    await world.admit(0)
    await world.oplog.acquire(RUN, 1, "t0/1")
    await world.oplog.commit(RUN, 1, 0, DONE)
    await world.oplog.release(RUN, 1)
    await world.admit(2)
    assert await world.oplog.live_runs(MODEL) == []
    await world.state(2)
    assert await world.oplog.live_runs(MODEL) == [RUN]


@pytest.mark.parametrize(
    ("state", "words"),
    [(None, "no sampler of {} is running"), ("starting", "the sampler of {} is starting")],
)
async def test_no_sampler_is_ready(world: World, state: str | None, words: str):
    if state:
        await world.worker("s0", role="sampler", state=state)
    await world.enqueue(0)
    reason = f"{words.format(MODEL)}; waiting for 12 s"
    assert await world.state(0, SAMPLER) == QueueState("paused_capacity", reason)


async def test_other_samples_were_queued_before(world: World):
    await world.worker("s0", role="sampler")
    for seq in range(4):
        await world.enqueue(seq)
    await world.oplog.claim(MODEL, "s0", max_jobs=1, block_ms=None)
    reason = "2 requests were queued before; waiting for 12 s"
    assert await world.state(3, SAMPLER) == QueueState("active", reason)
    assert await world.state(0, SAMPLER) == QueueState(
        "active", "being generated; waiting for 12 s"
    )


async def test_a_run_that_is_not_there_yet_is_being_created(world: World):
    assert await world.state(0) == QueueState("active", "the run is being created")
