"""Real parts for every suite: a Valkey from the wheel, and the operation log on it."""

from collections.abc import AsyncIterator, Iterator

import pytest
import redis.asyncio as redis

from luthier_core.oplog import Oplog, connect
from luthier_core.testing import running_valkey


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    with running_valkey() as url:
        yield url


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[redis.Redis]:
    """A client of an empty Valkey."""
    client = connect(valkey_url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def oplog(valkey: redis.Redis) -> Oplog:
    log = Oplog(valkey)
    await log.load_library()
    return log
