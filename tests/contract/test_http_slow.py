"""Clients that send slowly, or nothing: they hold up nobody else, and not for long (S19)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.contract.gateway_client import Api
from tests.contract.gateway_stack import GatewayStack

from luthier_gateway import web_io

HEAD = b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nX-A"
NUM_GOOD = 100


@contextlib.asynccontextmanager
async def unfinished(url: str, number: int) -> AsyncIterator[list[asyncio.StreamReader]]:
    """So many connections, each with a request whose head does not end."""
    parts, writers, readers = urlsplit(url), [], []
    try:
        for _ in range(number):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(HEAD)
            writers.append(writer)
            readers.append(reader)
        yield readers
    finally:
        for writer in writers:
            writer.close()


async def test_connections_that_send_nothing_hold_up_nobody_else(
    gateway_stack: GatewayStack, api: Api, pytestconfig: pytest.Config
) -> None:
    number, times = pytestconfig.getoption("slow_connections"), []
    async with unfinished(gateway_stack.url, number):
        for _ in range(NUM_GOOD):
            began = time.perf_counter()
            assert (await api.get("get_server_capabilities")).status == 200
            times.append(time.perf_counter() - began)
    p99_ms = 1000 * sorted(times)[int(0.99 * NUM_GOOD)]
    print(f"S19 slow: {number} open, {NUM_GOOD} others answered, p99 {p99_ms:.0f} ms")


async def test_a_connection_whose_request_does_not_begin_is_closed(
    second_gateway: Callable[..., Any], gateway_stack: GatewayStack
) -> None:
    gateway = replace(gateway_stack.config.gateway, idle_connection_s=0.1)
    api = await second_gateway(gateway=gateway)
    async with unfinished(api.url, 20) as readers, asyncio.timeout(30):
        assert await asyncio.gather(*(reader.read() for reader in readers)) == [b""] * 20


async def test_a_body_that_does_not_come_is_refused(
    second_gateway: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_io, "BODY_S", 0.05)
    api = await second_gateway()

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    answer = await api.call("POST", "create_session", body())
    assert (answer.status, "took longer" in answer.detail) == (422, True)
