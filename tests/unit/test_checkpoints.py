"""A save is whole or absent, whoever dies where; a path means one checkpoint or is refused."""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis
from tests.unit.dying import BLOB_CALLS, Countdown, Died, Dying

from luthier_core import keys
from luthier_core.blobs import Blobs
from luthier_core.checkpoints import (
    TinkerPath,
    read_files,
    read_manifest,
    save_checkpoint,
    save_sampler,
)
from luthier_core.disk_blobs import DiskBlobs
from luthier_core.errors import BadRequest, CheckpointDamaged, InvalidField
from luthier_core.listing import Listing
from luthier_core.records import CheckpointRecord, LoraConfig, RunRecord, SamplerRecord
from luthier_core.testing import running_valkey

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
RUN = RunRecord(
    run_id="0" * 32 + ":train:0",
    tenant="ann",
    session_id="0" * 32,
    base_model="tiny",
    lora=LoraConfig(rank=8, seed=7),
    optimizer_config={"type": "adamw"},
    created_at=NOW,
)
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights " * 100}
NAME_KEY = keys.name_record("ann", RUN.run_id, "weights", "x")


@pytest.fixture(scope="module")
def valkey_url() -> Iterator[str]:
    with running_valkey() as url:
        yield url


@pytest.fixture
async def client(valkey_url: str) -> AsyncIterator[redis.Redis]:
    async with redis.Redis.from_url(valkey_url) as connected:
        await connected.flushall()
        yield connected


@pytest.fixture
def disk(tmp_path: Path) -> DiskBlobs:
    return DiskBlobs(tmp_path, "", b"")


async def save(blobs: Blobs, client: redis.Redis, **changes: Any) -> CheckpointRecord:
    wanted: dict[str, Any] = {
        **{"run": RUN, "kind": "weights", "name": "x", "seq": 3, "epoch": 1},
        **{"files": FILES, "now": NOW},
    }
    return await save_checkpoint(blobs, client, **{**wanted, **changes})


async def listed(client: redis.Redis, now: datetime = NOW) -> list[str]:
    page = await Listing(client, "ann").checkpoint_page("checkpoints", offset=0, limit=99, now=now)
    assert page.total_count == len(page.rows)
    return [row["tinker_path"] for row in page.rows]


async def stored(blobs: Blobs) -> CheckpointRecord:
    return CheckpointRecord.from_bytes(await blobs.get(NAME_KEY))


# --- saving ---------------------------------------------------------------------------------------


async def test_a_save_can_be_read_back_and_is_listed(disk: DiskBlobs, client: redis.Redis) -> None:
    record = await save(disk, client, user_metadata={"step": "3"})
    assert record == await stored(disk)
    assert await read_files(disk, record.manifest_key) == FILES
    assert record.size_bytes == sum(len(data) for data in FILES.values())
    manifest = await disk.get(record.manifest_key)
    assert record.manifest_digest == hashlib.sha256(manifest).hexdigest()
    assert await listed(client) == [f"tinker://{RUN.run_id}/weights/x"]
    assert record.row() == {
        "checkpoint_id": "weights/x",
        "checkpoint_type": "training",
        "time": "2026-01-02T03:04:05+00:00",
        "tinker_path": f"tinker://{RUN.run_id}/weights/x",
        "size_bytes": 802,
        "public": False,
        "user_metadata": {"step": "3"},
        "expires_at": None,
    }


@pytest.mark.parametrize("overwrites", [False, True])
async def test_a_save_that_died_anywhere_is_completed_by_the_next_owner(
    tmp_path: Path, client: redis.Redis, overwrites: bool
) -> None:
    replayed = {**FILES, "adapter_model.safetensors": b"slightly other bits"}
    num_deaths = 0
    for num_steps in range(100):
        await client.flushall()
        blobs = DiskBlobs(tmp_path / str(num_steps), "", b"")
        if overwrites:
            await save(blobs, client, seq=1)
        dying: Any = Dying(blobs, Countdown(num_steps), BLOB_CALLS)
        try:
            await save(dying, client, epoch=1, overwrite=overwrites)
        except Died:
            num_deaths += 1
        record = await save(blobs, client, epoch=2, files=replayed, overwrite=overwrites)
        assert record == await stored(blobs)
        assert record.seq == 3
        files = await read_files(blobs, record.manifest_key)
        epoch = (await read_manifest(blobs, record.manifest_key)).epoch
        assert files == {1: FILES, 2: replayed}[epoch]
        assert await listed(client) == [record.tinker_path]
        if num_deaths == num_steps:
            break
    # Two files, manifest, name, two HEADs: each lost before and after it was done.
    assert num_deaths >= 12


async def test_the_first_complete_files_of_an_op_are_its_checkpoint(
    disk: DiskBlobs, client: redis.Redis
) -> None:
    first = await save(disk, client)
    again = await save(disk, client, epoch=2, files={"adapter_config.json": b"[]"})
    assert again == first
    assert await read_files(disk, first.manifest_key) == FILES
    assert hashlib.sha256(await disk.get(first.manifest_key)).hexdigest() == first.manifest_digest


async def test_a_save_whose_files_the_store_lost_is_not_listed(
    disk: DiskBlobs, client: redis.Redis
) -> None:
    async def lose_a_file() -> None:
        await disk.delete(keys.checkpoint_prefix("ann", RUN.run_id, 3, 1) + "adapter_config.json")

    paused: Any = Paused(disk, lose_a_file)
    with pytest.raises(CheckpointDamaged, match=r"adapter_config\.json"):
        await save(paused, client)
    assert await listed(client) == []


async def test_a_save_that_died_before_its_row_is_listed_by_the_repeat(
    disk: DiskBlobs, client: redis.Redis
) -> None:
    first = await save(disk, client)
    await client.flushall()
    assert await save(disk, client, epoch=2, now=NOW + timedelta(hours=1)) == first
    assert await listed(client) == [first.tinker_path]


async def test_a_name_in_use_is_refused_with_the_seq_that_saved_it(
    disk: DiskBlobs, client: redis.Redis
) -> None:
    first = await save(disk, client)
    with pytest.raises(BadRequest, match="exists, saved by seq 3"):
        await save(disk, client, seq=4)
    assert await stored(disk) == first


async def test_the_same_name_of_another_kind_is_another_checkpoint(
    disk: DiskBlobs, client: redis.Redis
) -> None:
    await save(disk, client)
    await save(disk, client, seq=4, kind="sampler_weights")
    assert len(await listed(client)) == 2


async def test_overwrite_replaces_contents_and_metadata(
    disk: DiskBlobs, client: redis.Redis
) -> None:
    await save(disk, client, ttl_seconds=60)
    record = await save(disk, client, seq=4, files={"new": b"1"}, overwrite=True)
    assert await read_files(disk, (await stored(disk)).manifest_key) == {"new": b"1"}
    # The expiry of the old contents is gone with them.
    assert await listed(client, NOW + timedelta(days=1)) == [record.tinker_path]


async def test_an_expired_name_is_off_the_list_and_can_be_taken(
    disk: DiskBlobs, client: redis.Redis
) -> None:
    record = await save(disk, client, ttl_seconds=3600)
    later = NOW + timedelta(hours=1)
    assert await listed(client, later - timedelta(seconds=1)) == [record.tinker_path]
    assert await listed(client, later) == []
    await save(disk, client, seq=4, now=later)
    assert await listed(client, later) == [record.tinker_path]


class Paused:
    """Runs `meanwhile` once, just before the name is taken: the owner was stopped there."""

    def __init__(self, real: DiskBlobs, meanwhile: Callable[[], Awaitable[Any]]) -> None:
        self._real = real
        self._meanwhile: Callable[[], Awaitable[Any]] | None = meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        if key == NAME_KEY and self._meanwhile:
            meanwhile, self._meanwhile = self._meanwhile, None
            await meanwhile()
        return await self._real.put_if_absent(key, data)


async def test_an_owner_that_was_replaced_does_not_put_its_save_over_a_later_one(
    disk: DiskBlobs, client: redis.Redis
) -> None:
    async def new_owner() -> None:
        await save(disk, client, epoch=2, overwrite=True)
        await save(disk, client, epoch=2, seq=5, files={"later": b"1"}, overwrite=True)

    paused: Any = Paused(disk, new_owner)
    await save(paused, client, epoch=1, overwrite=True)
    assert (await stored(disk)).seq == 5
    assert await read_files(disk, (await stored(disk)).manifest_key) == {"later": b"1"}


async def test_an_ephemeral_save_is_not_listed(disk: DiskBlobs, client: redis.Redis) -> None:
    record = await save(disk, client, kind="ephemeral", name="3")
    assert await read_files(disk, record.manifest_key) == FILES
    assert await listed(client) == []


@pytest.mark.parametrize("ttl_seconds", [0, -1, 10**12])
async def test_a_ttl_out_of_range_is_refused(
    disk: DiskBlobs, client: redis.Redis, ttl_seconds: int
) -> None:
    with pytest.raises(InvalidField, match=r"ttl_seconds=.* must be null or 1\.\."):
        await save(disk, client, ttl_seconds=ttl_seconds)


async def test_a_sampling_session_keeps_its_first_record(
    disk: DiskBlobs, client: redis.Redis
) -> None:
    first = SamplerRecord(
        sampling_session_id="s:sample:0",
        tenant="ann",
        session_id="s",
        base_model="tiny",
        weights="t/ann/runs/r/man/3",
        created_at=NOW,
    )
    assert await save_sampler(disk, client, first) == first
    assert await save_sampler(disk, client, first.model_copy(update={"weights": ""})) == first
    assert await Listing(client, "ann").ids("samplers:s") == ["s:sample:0"]


# --- reading --------------------------------------------------------------------------------------


async def test_a_changed_file_is_not_handed_out(disk: DiskBlobs, client: redis.Redis) -> None:
    record = await save(disk, client)
    file = (await read_manifest(disk, record.manifest_key)).files["adapter_model.safetensors"]
    data = bytearray(await disk.get(file.key))
    data[5] ^= 1
    await disk.put(file.key, bytes(data))
    with pytest.raises(CheckpointDamaged, match=r"adapter_model\.safetensors"):
        await read_files(disk, record.manifest_key)
    await disk.delete(file.key)
    with pytest.raises(CheckpointDamaged, match="is gone"):
        await read_files(disk, record.manifest_key)
    with pytest.raises(CheckpointDamaged, match="no manifest"):
        await read_files(disk, "t/ann/runs/r/man/99")


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_a_path_is_read_and_written_alike(kind: str) -> None:
    path = f"tinker://{RUN.run_id}/{kind}/step-10_v=1.0+a"
    assert TinkerPath.parse(path) == TinkerPath(RUN.run_id, kind, "step-10_v=1.0+a")
    assert str(TinkerPath.parse(path)) == path


@pytest.mark.parametrize(
    "path",
    [
        *("", "weights", "http://r/weights/x", "tinker:/r/weights/x", "tinker://r/weights"),
        *("tinker://r/weights/x/y", "tinker://r/ephemeral/x", "tinker://r/weights/"),
        *(
            "tinker:///weights/x",
            "tinker://../weights/x",
            "tinker://r/weights/..",
            "TINKER://r/w/x",
        ),
        *("tinker://r/weights/.hidden", "tinker://r/weights/a b", "tinker://r/weights/a\n"),
        *("tinker://r/weights/a\0", "tinker://r/weights/" + "a" * 129, "tinker://r\n/weights/x"),
        *("tinker://r/weights/é", "tinker://r/weights/a%2e"),
    ],
)
def test_a_malformed_path_is_refused_with_its_field(path: str) -> None:
    with pytest.raises(InvalidField, match="model_path="):
        TinkerPath.parse(path, "model_path")
