"""Real parts for every suite: a Valkey from the wheel, the operation log on it, the demo model."""

import fcntl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
import redis.asyncio as redis

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
