"""A registry for each test that asks for one."""

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis.asyncio as redis
from tests.stores.kinds import Store, parametrize_stores
from tests.stores.rgw import ACCESS_KEY, SECRET_KEY
from tests.unit.registry_stack import Clock, Stack, serving

from luthier_core.blobs import open_blobs
from luthier_core.config import Config, HousekeepingConfig, ModelConfig
from luthier_core.registry_client import RegistryClient
from luthier_core.testing import running_valkey

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_stores(metafunc, ["disk"])


@pytest.fixture(scope="module")
def valkey_url() -> Iterator[str]:
    with running_valkey() as url:
        yield url


@pytest.fixture
def config(
    tmp_path: Path, valkey_url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Config]:
    # For the services that a test starts as processes.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    secret = tmp_path / "secret"
    secret.write_text("ab" * 32)
    # Not below tmp_path: a socket's path has at most 107 bytes, and a disk's fsync takes time.
    with tempfile.TemporaryDirectory(prefix="lu-rg-", dir=MEMORY) as folder:
        yield Config(
            redis_url=valkey_url,
            store_url=store.new_url(Path(folder)),
            s3_access_key=ACCESS_KEY,
            s3_secret_key=SECRET_KEY,
            registry_url=f"unix://{folder}/s",
            secret_file=str(secret),
            housekeeping=HousekeepingConfig(trash_s=3600),
            models=(
                ModelConfig(name="tiny", path="/models/tiny"),
                ModelConfig(name="other", path="/models/other"),
            ),
        )


@pytest.fixture
async def stack(config: Config) -> AsyncIterator[Stack]:
    clock = Clock()
    async with (
        redis.Redis.from_url(config.redis_url) as valkey,
        serving(config, clock) as socket,
        RegistryClient(config) as client,
        open_blobs(config) as blobs,
    ):
        await valkey.flushall()
        yield Stack(config, clock, client, valkey, blobs, socket)
