"""A crash between any two steps of a change: afterwards listing and bytes agree.

Every call to the object store and to Redis is lost once before and once after it was carried out.
"""

import io
import tarfile
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.dying import BLOB_CALLS, Countdown, Died, Dying, DyingRedis
from tests.unit.registry_stack import Stack
from tests.unit.test_registry_housekeeping import has_org, job

from luthier_core import keys
from luthier_core.checkpoints import TinkerPath, read_files, save_checkpoint
from luthier_core.errors import NotFound
from luthier_core.records import CheckpointRecord, RunRecord
from luthier_registry.builds import Builds
from luthier_registry.checkpoints import Checkpoints
from luthier_registry.lists import Lists

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 100}
MAX_STEPS = 60

Change = Callable[[Checkpoints, RunRecord, Any, Any], Awaitable[object]]


def path_of(run: RunRecord) -> TinkerPath:
    return TinkerPath(run.run_id, "weights", "x")


async def save(checkpoints: Checkpoints, run: RunRecord, blobs: Any, client: Any) -> object:
    wanted: dict[str, Any] = {"kind": "weights", "name": "new", "seq": 2, "epoch": 1}
    return await save_checkpoint(blobs, client, run=run, files=FILES, now=run.created_at, **wanted)


async def overwrite(checkpoints: Checkpoints, run: RunRecord, blobs: Any, client: Any) -> object:
    wanted: dict[str, Any] = {"kind": "weights", "name": "x", "seq": 2, "epoch": 1}
    return await save_checkpoint(
        *(blobs, client), run=run, files=FILES, overwrite=True, now=run.created_at, **wanted
    )


CHANGES: dict[str, Change] = {
    "save": save,
    "overwrite": overwrite,
    "publish": lambda own, run, *_: own.publish("ann", path_of(run)),
    "unpublish": lambda own, run, *_: own.unpublish("ann", path_of(run)),
    "set_ttl": lambda own, run, *_: own.set_ttl("ann", path_of(run), 86400),
    "delete": lambda own, run, *_: own.delete("ann", path_of(run)),
    "archive": lambda own, run, *_: own.archive("ann", path_of(run)),
}
REPEATED_BY_THE_LOG = ("save", "overwrite")
"""The next owner of the run executes the op again; nobody need repeat the others."""
LEAST_STEPS = {
    **{"save": 10, "overwrite": 18, "publish": 20, "unpublish": 20, "set_ttl": 18},
    **{"delete": 14, "archive": 8},
}
"""Calls, each lost before and after: a change with fewer would not be the one that is tested."""


@pytest.mark.parametrize("what", CHANGES)
async def test_listing_and_bytes_agree_after_a_crash_between_any_two_steps(
    stack: Stack, what: str
) -> None:
    await has_org(stack)
    runs = []
    for num_steps in range(MAX_STEPS):
        run = await stack.run()
        await stack.save(run, files=FILES)
        if what in ("unpublish", "delete"):
            await stack.client.publish("ann", run.run_id, "weights", "x")
            await stack.client.archive("ann", run.run_id, "weights", "x")
        died = await dies(stack, run, what, num_steps)
        if died and what in REPEATED_BY_THE_LOG:
            own = Checkpoints(*parts(stack, stack.blobs, stack.valkey), clock=stack.clock)
            await CHANGES[what](own, run, stack.blobs, stack.valkey)
        runs.append(run)
        if not died:
            break
    print(what, len(runs) - 1, "crashes")
    assert len(runs) > LEAST_STEPS[what]
    stack.clock.now += timedelta(minutes=2)
    await job(stack, "lists")
    for run in runs:
        await check_agreement(stack, run)
    await check_nothing_is_left(stack)


def parts(stack: Stack, blobs: Any, client: Any) -> tuple[Any, Any, Builds, Lists]:
    return blobs, client, Builds(), Lists(blobs, client, clock=stack.clock)


async def dies(stack: Stack, run: RunRecord, what: str, num_steps: int) -> bool:
    """Whether the change died after so many steps, or else has come to its end."""
    countdown = Countdown(num_steps)
    blobs: Any = Dying(stack.blobs, countdown, BLOB_CALLS)
    client: Any = DyingRedis(stack.valkey, countdown)
    own = Checkpoints(*parts(stack, blobs, client), clock=stack.clock)
    try:
        await CHANGES[what](own, run, blobs, client)
    except Died:
        return True
    return False


async def check_agreement(stack: Stack, run: RunRecord) -> None:
    """Rows are those of the records, and each record has its bytes."""
    prefix = f"t/ann/names/{run.run_id}/"
    records = [
        CheckpointRecord.from_bytes(await stack.blobs.get(info.key))
        async for info in stack.blobs.list(prefix)
    ]
    rows = (await stack.client.list_run_checkpoints("ann", run.run_id))["checkpoints"]
    by_path = {row["tinker_path"]: row for row in rows}
    assert by_path == {record.tinker_path: record.row() for record in records}
    for record in records:
        assert await read_files(stack.blobs, record.manifest_key) == FILES
        await check_archive(stack, record)
        if record.public:
            await stack.client.resolve("bob", record.tinker_path)
        else:
            with pytest.raises(NotFound):
                await stack.client.resolve("bob", record.tinker_path)


async def check_archive(stack: Stack, record: CheckpointRecord) -> None:
    """A whole tar, or none."""
    key = keys.archive("ann", record.manifest_digest)
    if await stack.blobs.size(key) is not None:
        with tarfile.open(fileobj=io.BytesIO(await stack.blobs.get(key))) as archive:
            assert set(archive.getnames()) == set(FILES)


async def check_nothing_is_left(stack: Stack) -> None:
    """After the grace every file, manifest and archive is one that a record names."""
    await job(stack, "sweep")
    stack.clock.now += timedelta(hours=2)
    await job(stack, "sweep")
    named, digests = set(), set()
    async for info in stack.blobs.list("t/ann/names/"):
        record = CheckpointRecord.from_bytes(await stack.blobs.get(info.key))
        named.add(record.manifest_key)
        digests.add(keys.archive("ann", record.manifest_digest))
        prefix = keys.checkpoint_prefix("ann", record.run_id, record.seq, 1)
        named |= {f"{prefix}{name}" for name in FILES}
    async for info in stack.blobs.list("t/ann/"):
        if "/ckpt/" in info.key or "/man/" in info.key:
            assert info.key in named
        if "/archives/" in info.key:
            assert info.key in digests
