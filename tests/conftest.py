"""Real parts for every suite: Valkey, the operation log on it, object stores, the demo model."""

import fcntl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
import redis.asyncio as redis
from tests.stores.kinds import KINDS, Store, running_store

from luthier_core.oplog import Oplog, connect
from luthier_core.testing import running_valkey
from luthier_model.demo import ensure_demo_model

# The same examples in every run: a failure is one of the change, and is there again the next time.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def demo_model(request: pytest.FixtureRequest) -> Path:
    """Built whole by the first test run, which takes 30 s, and kept in pytest's cache."""
    import torch  # late: most suites need none of it

    assert request.config.cache is not None
    torch.set_num_threads(1)
    folder = Path(request.config.cache.mkdir("demo-model"))
    with (folder / "lock").open("w") as lock:  # the workers of pytest-xdist build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        return ensure_demo_model(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stores", default="", help=f"object stores to test on: {', '.join(KINDS)}")
    parser.addoption("--races", type=int, default=10, help="races of conditional writes per store")
    parser.addoption("--bombs", type=int, default=28, help="bodies that become too much when read")
    parser.addoption("--cancellations", type=int, default=1000, help="of calls to Redis")
    parser.addoption("--slow-connections", type=int, default=300, help="that send nothing more")


@pytest.fixture(scope="session")
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """The object store that a suite is run on; each folder's conftest says which by default."""
    with running_store(request.param) as running:
        yield running


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
