"""A registry for each test that asks for one."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis.asyncio as redis
from tests.unit.registry_stack import Clock, Stack, serving

from luthier_core.config import Config, HousekeepingConfig, ModelConfig
from luthier_core.disk_blobs import DiskBlobs
from luthier_core.registry_client import RegistryClient
from luthier_core.testing import running_valkey


@pytest.fixture(scope="module")
def valkey_url() -> Iterator[str]:
    with running_valkey() as url:
        yield url


@pytest.fixture
def config(tmp_path: Path, valkey_url: str) -> Iterator[Config]:
    secret = tmp_path / "secret"
    secret.write_text("ab" * 32)
    # Not below tmp_path: a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="lu-rg-") as folder:
        yield Config(
            redis_url=valkey_url,
            store_url=f"file://{tmp_path}/store",
            registry_url=f"unix://{folder}/s",
            secret_file=str(secret),
            housekeeping=HousekeepingConfig(runner="celery", trash_s=3600),  # only when asked for
            models=(
                ModelConfig(name="tiny", path="/models/tiny"),
                ModelConfig(name="other", path="/models/other"),
            ),
        )


@pytest.fixture
async def stack(config: Config, tmp_path: Path) -> AsyncIterator[Stack]:
    clock = Clock()
    async with (
        redis.Redis.from_url(config.redis_url) as valkey,
        serving(config, clock) as socket,
        RegistryClient(config) as client,
    ):
        await valkey.flushall()
        blobs = DiskBlobs(tmp_path / "store", "", b"")
        yield Stack(config, clock, client, valkey, blobs, socket)
