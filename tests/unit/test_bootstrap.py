"""The first steps of a deployment that `luthier up` does not start."""

import secrets
from pathlib import Path

import pytest

from luthier.up.bootstrap import main
from luthier_core import keys
from luthier_core.auth import key_hmac, new_api_key
from luthier_core.blobs import open_blobs
from luthier_core.config import Config, dump_config
from luthier_core.records import ApiKeyRecord


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "secret").write_text(secrets.token_hex(32))
    config = Config(
        redis_url="redis://nowhere:1/0",
        store_url=f"file://{tmp_path}/objects",
        registry_url="http://nowhere:1",
        secret_file=str(tmp_path / "secret"),
    )
    (tmp_path / "luthier.toml").write_text(dump_config(config))
    return config


def bootstrap(folder: Path, key: str) -> int:
    (folder / "operator-key").write_text(f"{key}\n")
    argv = ["--config", f"{folder}/luthier.toml", "--operator-key-file", f"{folder}/operator-key"]
    return main([*argv, "--make-bucket"])


async def record_of(config: Config, key: str) -> ApiKeyRecord:
    async with open_blobs(config) as blobs:
        name = keys.api_key_record(key_hmac(config.secret(), key))
        return ApiKeyRecord.from_bytes(await blobs.get(name))


def test_the_operators_key_works_however_often_it_is_made(tmp_path: Path, config: Config):
    import asyncio

    key = new_api_key()
    assert bootstrap(tmp_path, key) == 0
    first = asyncio.run(record_of(config, key))
    assert "operator" in first.scopes
    assert bootstrap(tmp_path, key) == 0
    assert asyncio.run(record_of(config, key)) == first


@pytest.mark.parametrize("key", ["", "admin", "change-me"])
def test_a_key_that_could_be_guessed_is_refused(
    tmp_path: Path, config: Config, key: str, capsys: pytest.CaptureFixture[str]
):
    assert bootstrap(tmp_path, key) == 2
    assert "holds no key" in capsys.readouterr().err
