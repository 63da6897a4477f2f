"""The Redis client that every service uses."""

import asyncio
import contextlib
import os
import random
import signal
import tempfile
from collections import Counter
from functools import partial

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


async def test_a_cancelled_call_leaves_its_reply_to_nobody(
    pytestconfig: pytest.Config,
) -> None:
    """Each value is of one tenant; between client and server replies wait a little (S3)."""
    wanted, rng = pytestconfig.getoption("cancellations"), random.Random(3)
    seen: Counter[str] = Counter()

    async def call(client: redis.Redis) -> None:
        while seen["cancelled"] < wanted:
            tenant = f"tenant-{rng.randrange(1000)}"
            task = asyncio.create_task(client.get(tenant))
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
            if rng.random() < 0.8:
                task.cancel()
            await asyncio.wait({task})
            kind = "cancelled" if task.cancelled() else "answered"
            seen[kind if task.cancelled() or task.result() == tenant.encode() else "wrong"] += 1

    with running_valkey() as url, tempfile.TemporaryDirectory(prefix="lu-px-") as folder:
        async with connect(url) as direct:
            await direct.mset({f"tenant-{n}": f"tenant-{n}" for n in range(1000)})
        server = await asyncio.start_unix_server(
            partial(_delaying, url.removeprefix("unix://"), rng), f"{folder}/s"
        )
        async with server, connect(f"unix://{folder}/s") as client:
            await asyncio.gather(*(call(client) for _ in range(MAX_CONNECTIONS)))
    assert not seen["wrong"]
    assert seen["answered"] > wanted / 20
    print(f"S3: {seen['cancelled']} cancelled, {seen['answered']} answered, 0 wrong")


async def _delaying(
    target: str, rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Passes bytes both ways, those of the server after a random moment."""
    server_reader, server_writer = await asyncio.open_unix_connection(target)

    async def pump(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, delay_s: float
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                await asyncio.sleep(rng.random() * delay_s)
                sink.write(data)
        sink.close()

    await asyncio.gather(pump(reader, server_writer, 0), pump(server_reader, writer, 0.002))


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
