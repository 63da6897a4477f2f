"""The Redis client that every service uses."""

import asyncio
import os
import signal

import pytest
from redis import asyncio as redis
from redis.asyncio import retry
from redis.exceptions import ConnectionError as RedisConnectionError

from luthier_core import oplog
from luthier_core.oplog import MAX_CONNECTIONS, connect
from luthier_core.testing import running_valkey

LIMIT_S = 5.0
"""Far above what any of this takes; only a lost cancellation reaches it."""


async def test_a_command_loses_no_cancellation_wherever_it_arrives(valkey: redis.Redis) -> None:
    async def command_then_wait() -> None:
        await valkey.ping()
        await asyncio.Event().wait()

    for num_iterations in range(25):  # of the event loop: from not yet sent to long answered
        task = asyncio.create_task(command_then_wait())
        for _ in range(num_iterations):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=LIMIT_S)
        assert task.cancelled(), f"cancelled after {num_iterations} iterations: goes on"


async def test_a_reply_that_comes_too_late_is_nobody_elses(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oplog, "IO_TIMEOUT_S", 0.05)
    async with connect(valkey_url) as client:
        await client.mset({"x": "of x", "y": "of y"})
        await client.client_pause(300)
        assert await asyncio.gather(client.get("x"), client.get("y")) == [b"of x", b"of y"]
        assert await asyncio.gather(client.get("y"), client.get("x")) == [b"of y", b"of x"]


async def test_a_call_under_way_gives_up_with_the_server_after_the_tries_of_one_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    async def sleep(delay_s: float) -> None:
        waits.append(delay_s)

    monkeypatch.setattr(retry, "sleep", sleep)
    with running_valkey() as url:
        client = connect(url)
        observer = redis.Redis.from_url(url)
        call = asyncio.create_task(client.blpop(["x"], timeout=0))
        while not (await observer.info("clients"))["blocked_clients"]:
            await asyncio.sleep(0)
        os.kill((await observer.info("server"))["process_id"], signal.SIGKILL)
        with pytest.raises(RedisConnectionError):  # its socket is still there and refuses
            await call
        await observer.aclose()
        await client.aclose()
    assert sum(waits) < 12


async def test_more_calls_at_once_than_connections_wait_and_are_all_answered(
    valkey_url: str,
) -> None:
    client = connect(valkey_url)
    await client.set("x", "1")
    answers = await asyncio.gather(*(client.get("x") for _ in range(10 * MAX_CONNECTIONS)))
    assert answers == [b"1"] * 10 * MAX_CONNECTIONS
    await client.aclose()
