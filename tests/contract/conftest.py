"""The object stores that one contract suite runs on, and a gateway to speak HTTP with."""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from minio import Minio
from tests.contract.gateway_client import Api
from tests.contract.gateway_stack import KEYS, GatewayStack, running_gateway_stack
from tests.stores.kinds import Store, parametrize_stores, running_moto
from tests.stores.rgw import ACCESS_KEY, SECRET_KEY

from luthier_core.blobs import Blobs
from luthier_core.disk_blobs import DiskBlobs
from luthier_core.oplog import Oplog, connect
from luthier_gateway.app import build_app


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_stores(metafunc, ["disk", "moto"])


@pytest.fixture
async def blobs(store: Store, tmp_path: Path) -> AsyncIterator[Blobs]:
    """An empty store of each sort."""
    url = store.new_url(tmp_path)
    if store.kind == "disk":
        yield DiskBlobs(tmp_path, "http://gateway", b"secret")
        return
    from luthier_core.s3_blobs import S3Blobs

    async with S3Blobs(
        store.endpoint,
        url.rpartition("/")[2],
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
        secure=False,
        region="us-east-1",
        retry_base_s=0.0,
    ) as opened:
        yield opened


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """host:port of an in-process S3 server with an empty bucket `luthier`."""
    with running_moto() as endpoint:
        server = Minio(endpoint, ACCESS_KEY, SECRET_KEY, secure=False, region="us-east-1")
        server.make_bucket("luthier")
        yield endpoint


@pytest.fixture(scope="session")
def gateway_stack() -> Iterator[GatewayStack]:
    """A whole stack that all tests share and leave running."""
    with (
        tempfile.TemporaryDirectory(prefix="lu-gw-") as folder,
        running_gateway_stack(Path(folder)) as stack,
    ):
        yield stack


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


@pytest.fixture
def api(gateway_stack: GatewayStack, http: aiohttp.ClientSession) -> Api:
    """The gateway with a good key."""
    return Api(http, gateway_stack.url, KEYS["ann"])


@pytest.fixture
def stranger(gateway_stack: GatewayStack, http: aiohttp.ClientSession) -> Api:
    """The gateway with the good key of another tenant."""
    return Api(http, gateway_stack.url, KEYS["bob"])


@pytest.fixture
def keyless(gateway_stack: GatewayStack, http: aiohttp.ClientSession) -> Api:
    return Api(http, gateway_stack.url, None)


@pytest.fixture
async def second_gateway(
    gateway_stack: GatewayStack, http: aiohttp.ClientSession
) -> AsyncIterator[Callable[..., Any]]:
    """Starts one more gateway on the same stack, with parts of its configuration changed."""
    async with contextlib.AsyncExitStack() as servers:

        async def start(**changes: Any) -> Api:
            app = build_app(replace(gateway_stack.config, **changes))
            server = await servers.enter_async_context(TestServer(app))
            return Api(http, str(server.make_url("")).rstrip("/"), KEYS["ann"])

        yield start


@pytest.fixture
async def oplog_of_stack(gateway_stack: GatewayStack) -> AsyncIterator[Oplog]:
    """The operation log that the stack uses."""
    async with connect(gateway_stack.config.redis_url) as client:
        yield Oplog(client)
