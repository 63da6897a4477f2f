"""Waiting for outcomes on a real server: woken by the commit, never by a poll."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from luthier_core import hints, keys
from luthier_core.config import LimitsConfig
from luthier_core.futures import FutureId, Futures
from luthier_core.oplog import Oplog
from luthier_core.ops import Body, Kind, Op, Outcome

RUN = "s1:train:0"
NEVER_S = 3600.0
"""A re-check interval that no test reaches: what wakes the waiter is the hint."""


@pytest.fixture
async def futures(oplog: Oplog) -> AsyncIterator[Futures]:
    waiting = Futures(oplog.redis, recheck_s=NEVER_S)
    listening = asyncio.create_task(waiting.listen())
    for seq in range(3):
        op = Op(run_id=RUN, seq=seq, kind=Kind.FORWARD, digest="d", body=Body.of(b""))
        header = {"base_model": "m", "facts": "{}"}
        await oplog.admit(op, tenant="t", limits=LimitsConfig(), header=header)
    await oplog.acquire(RUN, 1, "w/a")
    yield waiting
    listening.cancel()
    await asyncio.wait([listening])


def future(seq: int) -> FutureId:
    parsed = FutureId.parse(f"{RUN}:{seq}")
    assert parsed is not None
    return parsed


async def test_a_commit_wakes_everyone_who_waits_for_it_and_nobody_else(futures, oplog):
    first = [asyncio.create_task(futures.wait(future(0), timeout_s=30)) for _ in range(3)]
    other = asyncio.create_task(futures.wait(future(1), timeout_s=30))
    while futures.num_waiting < 4:
        await asyncio.sleep(0)
    await oplog.commit(RUN, 1, 0, Outcome.completed(Body.of(b"result")))
    outcomes = await asyncio.gather(*first)
    assert [outcome.body.inline for outcome in outcomes] == [b"result"] * 3
    assert not other.done()
    other.cancel()


async def test_an_outcome_that_is_there_needs_no_hint(futures, oplog):
    await oplog.commit(RUN, 1, 0, Outcome.completed(Body.of(b"result")))
    assert await futures.wait(future(0), timeout_s=30) is not None


async def test_a_wait_that_runs_out_is_no_outcome_and_leaves_nothing_behind(futures):
    assert await futures.wait(future(2), timeout_s=0.01) is None
    assert futures.num_waiting == 0


async def test_who_waits_is_let_go_when_the_process_stops(futures):
    waiting = asyncio.create_task(futures.wait(future(2), timeout_s=NEVER_S))
    while futures.num_waiting < 1:
        await asyncio.sleep(0)
    futures.end_waits()
    assert await waiting is None
    assert await futures.wait(future(2), timeout_s=NEVER_S) is None


async def test_a_lost_hint_costs_one_recheck(oplog):
    await oplog.open_jobs("m")
    waiting = Futures(oplog.redis, recheck_s=0.05)
    listening = asyncio.create_task(waiting.listen())
    sample = FutureId.parse("s1:sample:0:5")
    assert sample is not None
    task = asyncio.create_task(waiting.wait(sample, timeout_s=30))
    while not waiting.num_waiting:
        await asyncio.sleep(0)
    # Written behind the library's back: no hint is published.
    fields = Outcome.completed(Body.of(b"late")).fields()
    await oplog.redis.hset(sample.outcome_key, mapping=fields)
    outcome = await task
    assert outcome is not None
    assert outcome.body.inline == b"late"
    listening.cancel()
    await asyncio.wait([listening])


async def test_a_completion_that_is_there_needs_no_subscription(oplog):
    waiting = Futures(oplog.redis, recheck_s=NEVER_S)  # nobody listens: none is ever confirmed
    fields = {"seq": "5", "state": "finished", "size": "1"}
    await oplog.redis.xadd(keys.sampling_completions("s1:sample:0", 0), fields, id="1-0")
    (found,) = await waiting.wait_completions("s1:sample:0", 0, after=0, timeout_s=0.1)
    assert found.request_id == "s1:sample:0:5"


async def test_a_subscription_that_got_lost_is_asked_for_again__with_a_mock_of_the_first_request(
    oplog, monkeypatch
):
    async def get_lost(channel: str) -> None:
        pass

    monkeypatch.setattr(hints, "CONFIRM_TIMEOUT_S", 0.01)
    heard: asyncio.Queue[str] = asyncio.Queue()
    listened = hints.Hints(oplog.redis, lambda channel, text: heard.put_nowait(text))
    with monkeypatch.context() as first:
        first.setattr(listened._pubsub, "ssubscribe", get_lost)
        await listened.subscribe("{s}:lost")
    await listened.subscribe("{s}:lost")
    listening = asyncio.create_task(listened.listen())
    await oplog.redis.execute_command("SPUBLISH", "{s}:lost", "news")
    async with asyncio.timeout(10):
        assert await heard.get() == "news"
    listening.cancel()
    await asyncio.wait([listening])
    await listened.aclose()


@pytest.mark.parametrize(
    "text", ["", "x", "a:train:0", "a:train:0:1:2", "a:other:0:1", "a:train:x:1", "a b:train:0:1"]
)
def test_what_is_no_id_of_ours_is_no_future(text):
    assert FutureId.parse(text) is None
